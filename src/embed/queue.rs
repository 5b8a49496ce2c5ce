//! A queue as a VMM describes it: its ring, and how both sides notify each other.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::guest_memory::GuestAddress;
use crate::virtqueue::RingAddresses;

/// A ring and its position, in guest-physical addresses: what a snapshot has of a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingState {
    /// Number of entries: a power of two, up to 32,768.
    pub size: u16,
    /// The descriptor table.
    pub descriptors: GuestAddress,
    /// The available ring.
    pub available: GuestAddress,
    /// The used ring.
    pub used: GuestAddress,
    /// The next entry of the available ring to take; 0 for a queue that the driver has just set up.
    pub next_available: u16,
    /// The next element of the used ring to write. Guest memory has the same number, and a queue with
    /// another one doesn't start.
    pub next_used: u16,
}

impl RingState {
    pub(super) fn addresses(&self) -> RingAddresses {
        RingAddresses {
            descriptors: self.descriptors,
            available: self.available,
            used: self.used,
            log: Some(self.used),
        }
    }
}

/// A queue to be served.
#[derive(Clone, Debug)]
pub struct QueueSetup {
    /// The ring.
    pub ring: RingState,
    /// Tells the device of new chains.
    pub kick: Kick,
    /// Tells the guest of used chains.
    pub call: Arc<crate::virtqueue::Call>,
}

/// Tells a queue's thread that the guest has made chains available. A clone kicks the same queue.
///
/// It is an eventfd: one that the VMM has registered with KVM (`ioeventfd`), so that kicks don't pass
/// through the VMM at all, or one for [`notify`](Self::notify). It is never read, so a counter that
/// grows is no fault.
#[derive(Clone, Debug)]
pub struct Kick(pub(super) Arc<OwnedFd>);

impl Kick {
    /// A kick by [`notify`](Self::notify).
    ///
    /// # Errors
    ///
    /// There is no descriptor or no memory for an eventfd.
    pub fn new() -> io::Result<Self> {
        use rustix::event::EventfdFlags;
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        Ok(Self(Arc::new(rustix::event::eventfd(0, flags)?)))
    }

    /// Kicks the queue, on any thread.
    pub fn notify(&self) {
        if let Err(error) = rustix::io::write(&self.0, &1_u64.to_ne_bytes()) {
            // EAGAIN: the counter is full, and so the queue has been kicked.
            log::debug!("kicking a queue: {error}");
        }
    }
}

impl From<OwnedFd> for Kick {
    /// A kick by writes to this eventfd.
    fn from(eventfd: OwnedFd) -> Self {
        Self(Arc::new(eventfd))
    }
}
