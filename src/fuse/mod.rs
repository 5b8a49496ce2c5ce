//! FUSE: the ABI, decoding, dispatch and replies; knows nothing of virtio.
//!
//! A transport hands each request over as an [`Exchange`]; [`Session::serve`] answers it. The
//! invariant: every exchange is answered exactly once, whatever is in it.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![cfg_attr(
    test,
    allow(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        reason = "a test that is wrong may panic"
    )
)]

pub mod abi;
mod counters;
mod directory;
mod exchange;
mod init;
mod reply;
pub mod request;
mod session;
#[cfg(test)]
mod testing;

pub use counters::Counters;
pub use exchange::{Exchange, Intent, OUT_HEADER_LEN};
pub use init::{Negotiated, Readdirplus, SessionOptions, Wanted};
pub use reply::error_reply;
pub use session::{NoWaits, Outcome, Queues, Session};
