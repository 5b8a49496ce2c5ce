//! What the front end has said of one queue so far.
//!
//! Plain state: nothing here touches guest memory or threads.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::virtqueue::{Call, RingAddresses};

/// One queue as the front end set it up.
#[derive(Debug, Default)]
pub(super) struct Vring {
    /// Entries; 0 until SET_VRING_NUM.
    pub(super) size: u16,
    pub(super) addresses: Option<RingAddresses>,
    /// The available entry that comes next; valid while the queue does not run.
    pub(super) base: u16,
    /// There from SET_VRING_KICK until GET_VRING_BASE: the ring is started.
    pub(super) kick: Option<Arc<OwnedFd>>,
    pub(super) call: Arc<Call>,
    /// What `call` signals on.
    pub(super) call_fd: Option<Arc<OwnedFd>>,
    /// Kept for the front end's sake; nothing is ever signalled on it, because a guest's
    /// faults are answered on the ring.
    pub(super) err: Option<Arc<OwnedFd>>,
    pub(super) enabled: bool,
    pub(super) running: bool,
}

impl Vring {
    /// What is needed to run the queue, if it is all there. `implicit` says that rings are
    /// enabled as they start, because the front end has no way to enable them.
    pub(super) fn ready(&self, implicit: bool) -> Option<(RingAddresses, Arc<OwnedFd>)> {
        if self.size == 0 || !(self.enabled || implicit) {
            return None;
        }
        Some((self.addresses?, Arc::clone(self.kick.as_ref()?)))
    }

    /// Back to before the guest's driver came; the call and error eventfds stay, as QEMU sets
    /// them before it resets.
    pub(super) fn reset(&mut self) {
        *self = Self {
            call: Arc::clone(&self.call),
            call_fd: self.call_fd.take(),
            err: self.err.take(),
            ..Self::default()
        };
    }
}
