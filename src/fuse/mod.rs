//! FUSE: the ABI, decoding, dispatch and replies; knows nothing of virtio.
//!
//! A transport hands each request over as an [`Transport`]; [`Session::serve`] answers it. The
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
mod init;
mod reply;
pub mod request;
mod session;
#[cfg(test)]
mod testing;
mod transport;

pub use counters::Counters;
pub use init::{Negotiated, Readdirplus, SessionOptions, Wanted};
pub use reply::error_reply;
pub use session::{NoWaits, Outcome, Queues, Session};
pub use transport::{OUT_HEADER_LEN, RecordedIntent, Transport};
