//! A queue, as the thread that serves it sees it at one moment.
//!
//! The invariant: it is plain data, which keeps nothing of the queue.

use crate::virtqueue::{QueueIndex, QueueStats};

/// A queue, as its thread sees it.
#[derive(Clone, Copy, Debug)]
pub struct QueueReport {
    /// Which one.
    pub index: QueueIndex,
    /// Its number of entries.
    pub size: u16,
    /// The next available index.
    pub next_available: u16,
    /// The used index.
    pub used: u16,
    /// Chains on the available ring.
    pub waiting: u16,
    /// Chains taken off the ring and not returned yet.
    pub in_flight: u16,
    /// The guest was asked for a kick at the next chain.
    pub wants_kick: bool,
    /// What has passed through it.
    pub stats: QueueStats,
}
