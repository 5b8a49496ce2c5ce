//! Conversions from and to the types of the rust-vmm crates.
//!
//! The invariant: a conversion to and fro gives the same queue.

use std::io;
use std::sync::Arc;

use virtio_queue::QueueState;
use vmm_sys_util::eventfd::EventFd;

use super::device::VirtioFs;
use super::queue::{Kick, RingState};
use crate::io::duplicate_eventfd;
use crate::virtqueue::Call;

impl From<&QueueState> for RingState {
    fn from(state: &QueueState) -> Self {
        Self {
            size: state.size,
            descriptors: state.desc_table,
            available: state.avail_ring,
            used: state.used_ring,
            next_available: state.next_avail,
            next_used: state.next_used,
        }
    }
}

impl RingState {
    /// The state as a [`virtio_queue::Queue`] has it, from which one can be made again.
    #[must_use]
    pub fn to_queue_state(&self, max_size: u16, event_idx: bool) -> QueueState {
        QueueState {
            max_size,
            next_avail: self.next_available,
            next_used: self.next_used,
            event_idx_enabled: event_idx,
            size: self.size,
            ready: true,
            desc_table: self.descriptors,
            avail_ring: self.available,
            used_ring: self.used,
        }
    }
}

impl VirtioFs {
    /// Where the queue `index` has stopped, for the VMM's own snapshot of queues that may have up to
    /// `max_size` entries; `None` if it runs, or was never started.
    #[must_use]
    pub fn queue_state(&self, index: u16, max_size: u16) -> Option<QueueState> {
        let (ring, event_idx) = self.stopped(index)?;
        Some(ring.to_queue_state(max_size, event_idx))
    }
}

impl TryFrom<&EventFd> for Kick {
    type Error = io::Error;

    /// A kick by writes to `eventfd`, of which the kick has a duplicate.
    fn try_from(eventfd: &EventFd) -> io::Result<Self> {
        Ok(Self::from(duplicate_eventfd(eventfd)?))
    }
}

impl Call {
    /// Calls by a write to `eventfd`, of which the call has a duplicate.
    ///
    /// # Errors
    ///
    /// There is no descriptor for the duplicate.
    pub fn by_eventfd(eventfd: &EventFd) -> io::Result<Arc<Self>> {
        Ok(Self::eventfd(Arc::new(duplicate_eventfd(eventfd)?)))
    }
}
