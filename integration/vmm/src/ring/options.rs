//! A queue's options, and its errors.

use std::io;

use super::Addresses;
use crate::memory::MemoryError;

/// How a queue is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueOptions {
    /// Entries: a power of two up to 32768.
    pub size: u16,
    /// `VIRTIO_F_EVENT_IDX` is negotiated.
    pub event_idx: bool,
    /// `VIRTIO_F_INDIRECT_DESC` is negotiated.
    pub indirect: bool,
    /// Descriptors in each slot's indirect table. A longer chain is made of the ring's own.
    pub indirect_capacity: u16,
    /// The ring's address; by default any free memory.
    pub addresses: Option<Addresses>,
}

impl QueueOptions {
    /// A queue of `size` entries with neither EVENT_IDX nor INDIRECT_DESC.
    #[must_use]
    pub fn new(size: u16) -> Self {
        Self {
            size,
            event_idx: false,
            indirect: false,
            indirect_capacity: 0,
            addresses: None,
        }
    }
}

/// Errors of a queue.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// Not a power of two up to 32768.
    #[error("a queue can't have {0} entries")]
    Size(u16),
    /// The rings don't fit in guest memory.
    #[error("no place for the rings in guest memory")]
    Memory(#[from] MemoryError),
    /// A chain has no buffers.
    #[error("a chain needs at least one buffer")]
    EmptyChain,
    /// A chain that never fits.
    #[error("a chain of {buffers} buffers does not fit in a queue whose limit is {longest}")]
    TooLong {
        /// Its buffers.
        buffers: usize,
        /// [`super::Queue::longest_chain`].
        longest: usize,
    },
    /// Too few free descriptors.
    #[error("the chain needs {needed} descriptors and {free} are free")]
    Full {
        /// Descriptors the chain needs.
        needed: usize,
        /// Descriptors that are free.
        free: u16,
    },
    /// The device returned something that is not in flight.
    #[error("the device returned chain {id}, which is not in flight")]
    NotInFlight {
        /// The head in the used element.
        id: u32,
    },
    /// The used index exceeds the number in flight.
    #[error("the device's used index {used} is not within reach of {seen}")]
    UsedIndex {
        /// The index that the device wrote.
        used: u16,
        /// How far the driver has read.
        seen: u16,
    },
    /// Nothing came back in time.
    #[error("{in_flight} chains are in flight and too few came back in time")]
    TimedOut {
        /// How many are out.
        in_flight: u16,
    },
    /// An eventfd failed.
    #[error("can't use a queue's eventfd")]
    Event(#[source] io::Error),
}
