//! The device side of split virtqueues (virtio 1.2, section 2.7).
//!
//! A [`Queue`] takes chains off the available ring; one task owns it. A [`Chain`] is one request.
//! It may move to any thread, and returns to the guest through the [`UsedRing`] that all chains of
//! a queue share. The invariant: each chain taken is returned exactly once, by a reply or by being
//! dropped. If the queue is tracked, this holds for this process and its successors together.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

mod bad_chain;
mod chain;
pub(crate) mod inflight;
pub(crate) mod journal;
mod layout;
mod queue;
mod segments;
mod shared_words;
mod sync;
#[cfg(test)]
#[allow(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    reason = "tests may fail by panicking"
)]
pub(crate) mod tests;
mod used;

pub(crate) use bad_chain::BadChain;
pub use chain::Chain;
pub(crate) use inflight::InflightRegion;
pub use inflight::{InflightError, InflightPart};
pub use journal::{Journal, unanswered_requests};
pub use queue::{Features, Queue, QueueError, RingAddresses, Setup, Tracking};
pub use used::Call;
pub(crate) use used::{QueueStats, UsedRing};

/// Index of a queue of the device: 0 is the high-priority queue, and the request queues follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QueueIndex(pub u16);

impl QueueIndex {
    /// The queue of FORGET and INTERRUPT (virtio 1.2, section 5.11.2).
    pub const HIGH_PRIORITY: Self = Self(0);
}

impl std::fmt::Display for QueueIndex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}
