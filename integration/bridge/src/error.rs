//! The errors that end a lane.
//!
//! The invariant: an error says which peer failed: the kernel, the server, or the memory.

use std::io;

use vmm::memory::MemoryError;
use vmm::ring::RingError;

/// What ends a lane before its time.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LaneError {
    /// The device can't be read.
    #[error("can't read /dev/fuse")]
    Read(#[source] io::Error),
    /// Waiting failed.
    #[error("can't wait for requests")]
    Wait(#[source] io::Error),
    /// The server does with the ring what it may not.
    #[error("a virtqueue failed")]
    Ring(#[from] RingError),
    /// An address was not in guest memory.
    #[error("guest memory failed")]
    Memory(#[from] MemoryError),
    /// The server says no where it has no reason to.
    #[error("the server refuses DESTROY")]
    Destroy(#[source] io::Error),
}
