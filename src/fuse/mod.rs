//! FUSE: the ABI, decoding, dispatch and replies, independent of virtio.
//!
//! A transport passes each request as a [`Transport`], and [`Session::serve`] answers it. The
//! invariant: every request is answered exactly once, whatever its content.

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
pub use session::{Outcome, Queues, Session};
pub use transport::{OUT_HEADER_LEN, RecordedIntent, Transport};
