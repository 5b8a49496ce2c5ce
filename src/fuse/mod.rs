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

pub(crate) mod abi;
mod counters;
mod dax_marks;
mod directory;
mod file_watch;
mod init;
mod reply;
pub(crate) mod request;
mod session;
#[cfg(test)]
mod testing;
mod transport;

pub(crate) use counters::Counters;
pub(crate) use file_watch::{FileCounts, FileWatch};
pub(crate) use init::Negotiated;
pub use init::{Readdirplus, SessionOptions, Wanted};
pub(crate) use reply::error_reply;
pub(crate) use session::Queues;
pub use session::{Outcome, Session};
pub(crate) use transport::RecordedIntent;
pub use transport::{OUT_HEADER_LEN, Transport};

/// The name of the opcode with this number, if there is one.
pub(crate) fn opcode_name(number: u32) -> Option<String> {
    abi::Opcode::name_of(number)
}
