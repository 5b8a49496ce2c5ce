//! The device in the process of its VMM, and in the daemon of `vhost-user-backend`.
//!
//! A binary of its own: it needs the feature `rust-vmm`, and checks that the device leaves the signals
//! of the process alone, which the server's tests don't.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod daemon;
mod dax;
mod device;
mod example;
mod guest;
mod memory;
mod positions;
#[path = "../suite/frontends/work.rs"]
mod work;
