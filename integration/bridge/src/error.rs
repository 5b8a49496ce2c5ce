//! The errors that end a lane.
//!
//! The invariant: an error says which peer failed: the kernel, the server, or the memory.

use std::io;

use vmm::memory::MemoryError;
use vmm::ring::RingError;

/// An error that ends a lane.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LaneError {
    /// Reading the device failed.
    #[error("can't read /dev/fuse")]
    Read(#[source] io::Error),
    /// Waiting failed.
    #[error("can't wait for requests")]
    Wait(#[source] io::Error),
    /// The server broke the rules of the ring.
    #[error("a virtqueue failed")]
    Ring(#[from] RingError),
    /// An address was not in guest memory.
    #[error("guest memory failed")]
    Memory(#[from] MemoryError),
    /// The server refused a request without a reason.
    #[error("the server refuses DESTROY")]
    Destroy(#[source] io::Error),
}
