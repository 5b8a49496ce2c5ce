//! The state of one vring, as the front end has configured it so far.
//!
//! Plain state. The invariant: nothing here accesses guest memory or starts and stops a queue.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::virtqueue::{Call, RingAddresses};

/// One vring.
#[derive(Debug, Default)]
pub(super) struct Vring {
    /// Number of entries; 0 until SET_VRING_NUM.
    pub(super) size: u16,
    pub(super) addresses: Option<RingAddresses>,
    /// Index of the next available entry; valid while the queue doesn't run.
    pub(super) base: u16,
    /// Set from SET_VRING_KICK to GET_VRING_BASE, while the ring is started.
    pub(super) kick: Option<Arc<OwnedFd>>,
    pub(super) call: Arc<Call>,
    /// The eventfd that `call` signals.
    pub(super) call_fd: Option<Arc<OwnedFd>>,
    /// Kept because the protocol requires it. It is never signalled: faults of a guest are reported
    /// on the ring.
    pub(super) err: Option<Arc<OwnedFd>>,
    pub(super) enabled: bool,
    pub(super) running: bool,
}

impl Vring {
    /// Returns what is needed to run the queue, if the vring is ready. `enabled_at_start` says that
    /// starting a ring enables it, because the front end has no message to enable rings.
    pub(super) fn ready(&self, enabled_at_start: bool) -> Option<(RingAddresses, Arc<OwnedFd>)> {
        if self.size == 0 || !(self.enabled || enabled_at_start) {
            return None;
        }
        Some((self.addresses?, Arc::clone(self.kick.as_ref()?)))
    }

    /// Resets the vring to its state before the guest's driver set it up. Keeps the call and error
    /// eventfds, which QEMU sets before it resets the device.
    pub(super) fn reset(&mut self) {
        *self = Self {
            call: Arc::clone(&self.call),
            call_fd: self.call_fd.take(),
            err: self.err.take(),
            ..Self::default()
        };
    }
}
