//! Why a device can't do what the VMM asks for.

use std::io;

use crate::fs::MoveError;
use crate::guest_memory::{GuestAddress, MemoryError};
use crate::io::RuntimeError;
use crate::metrics::MetricsError;
use crate::state::StateError;
use crate::virtqueue::{QueueError, QueueIndex};
use crate::worker::WorkerPoolError;

/// Why a device can't do what the VMM asks for.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The engine that the options ask for isn't available.
    #[error("choosing the engine of the device's threads")]
    Engine(#[source] RuntimeError),
    /// The host has no threads for the device, or the file system can't use them.
    #[error("starting the device's threads")]
    Workers(#[source] WorkerPoolError),
    /// There is no memory for the counters.
    #[error("counting what the device does")]
    Counters(#[from] MetricsError),
    /// There is no memory to record the mappings of the DAX window.
    #[error("recording the mappings of the DAX window")]
    Mappings(#[from] StateError),
    /// The driver has accepted features that the device doesn't offer.
    #[error("the driver accepted features {accepted:#x}, of which {extra:#x} were not offered")]
    Features {
        /// The features that it accepted.
        accepted: u64,
        /// Those of them that were not offered.
        extra: u64,
    },
    /// The device isn't active.
    #[error("the device isn't active")]
    Inactive,
    /// The device has been activated, and not been reset since.
    #[error("the device is active already")]
    Active,
    /// Queues run, which must be stopped for this.
    #[error("queues of the device run: pause it first")]
    QueuesRun,
    /// The queue runs already.
    #[error("queue {0} runs already")]
    Runs(u16),
    /// The device has no such queue.
    #[error("the device has no queue {index}, but {queues} queues")]
    NoSuchQueue {
        /// The queue.
        index: u16,
        /// The number of queues, including the high-priority queue.
        queues: u16,
    },
    /// Guest memory can't be used.
    #[error("using the guest's memory")]
    Memory(#[source] MemoryError),
    /// Part of the ring is outside of guest memory.
    #[error("the {part} of queue {index} at {address:#x} is not in guest memory")]
    NotInMemory {
        /// The queue.
        index: QueueIndex,
        /// The part of the ring.
        part: &'static str,
        /// Its address.
        address: GuestAddress,
    },
    /// The state of the queue isn't that of the ring in guest memory.
    #[error(
        "queue {index} is to continue at used index {wanted}, and the ring in guest memory is at {found}: \
         state and memory are not of the same moment"
    )]
    Position {
        /// The queue.
        index: u16,
        /// The index of the queue's state.
        wanted: u16,
        /// The index in guest memory.
        found: u16,
    },
    /// The ring can't be used.
    #[error("setting up a queue")]
    Queue(#[source] QueueError),
    /// The queue can't be started.
    #[error("starting queue {index}")]
    Run {
        /// The queue.
        index: u16,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The session of the guest can't be saved.
    #[error("saving the guest's session")]
    Save(#[source] MoveError),
    /// The session of the guest can't be loaded.
    #[error("loading the guest's session")]
    Load(#[source] MoveError),
}

impl From<QueueError> for DeviceError {
    fn from(error: QueueError) -> Self {
        match error {
            QueueError::NotShared {
                index,
                part,
                address,
            } => Self::NotInMemory {
                index,
                part,
                address,
            },
            error => Self::Queue(error),
        }
    }
}
