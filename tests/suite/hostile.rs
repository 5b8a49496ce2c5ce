//! Attacks by a hostile guest or VMM, kind by kind; `docs/hostile-guest.md` has the table.
//!
//! Each kind is a named case. After each the reply is checked, and then that the same session
//! (after a VMM's fault: the next one) is served as usual.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking"
)]
#![allow(unreachable_pub, reason = "one program, of several files")]

mod faults;
mod limits;
mod messages;
mod names;
mod numbers;
mod rings;
mod scene;
mod sessions;
mod taken;
