//! A vring of `vhost-user-backend` whose kicks go to the device's threads, and not to the daemon's.
//!
//! The daemon would read each kick in an epoll thread of its own and hand it on, which costs every
//! request the wake-up of another thread. So it gets an eventfd in place of the kick's that nobody
//! signals. The invariant: the device serves the queue only while the daemon has the ring ready and
//! enabled.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLockReadGuard, RwLockWriteGuard, Weak};

use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VringRwLock, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::{Error as QueueError, QueueT};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use super::device::VirtioFs;
use super::queue::{Kick, QueueSetup, RingState};
use crate::virtqueue::Call;

/// The guest's memory in the daemon.
pub(super) type DaemonMemory = GuestMemoryAtomic<GuestMemoryMmap<BitmapMmapRegion>>;

/// A vring whose kicks go to the device's threads. The daemon makes it; nothing else needs to.
#[derive(Clone)]
pub struct DirectVring {
    daemon: VringRwLock<DaemonMemory>,
    own: Arc<Mutex<Own>>,
}

/// What the daemon's vring doesn't have.
#[derive(Debug, Default)]
struct Own {
    kick: Option<Kick>,
    call: Arc<Call>,
    /// The device, and the index of its queue.
    queue: Option<(Weak<Mutex<VirtioFs>>, u16)>,
}

/// Locks a device that several threads of a daemon use.
pub(super) fn lock(device: &Mutex<VirtioFs>) -> MutexGuard<'_, VirtioFs> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

impl DirectVring {
    /// Names the queue of this ring. To be called before [`setup`](Self::setup) is looked at: a ring
    /// that is disabled meanwhile is either seen there, or stopped afterwards.
    pub(super) fn belongs_to(&self, device: &Arc<Mutex<VirtioFs>>, index: u16) {
        self.own().queue = Some((Arc::downgrade(device), index));
    }

    /// The queue to serve, if the ring is ready, enabled and has a kick. To be called while the device
    /// is locked.
    pub(super) fn setup(&self) -> Option<QueueSetup> {
        let own = self.own();
        let kick = own.kick.clone()?;
        let state = self.daemon.get_ref();
        let queue = state.get_queue();
        if !(queue.ready() && state.is_enabled()) {
            return None;
        }
        let mut ring = RingState::from(&queue.state());
        drop(state);
        // The front end names no used index: it is the one in guest memory.
        if let Ok(used) = self.daemon.queue_used_idx() {
            ring.next_used = used;
        }
        Some(QueueSetup {
            ring,
            kick,
            call: Arc::clone(&own.call),
        })
    }

    /// Stops the queue if it runs, and notes where.
    fn stop(&self) {
        let queue = self.own().queue.clone();
        let Some((device, index)) =
            queue.and_then(|(device, index)| Some((device.upgrade()?, index)))
        else {
            return;
        };
        let stopped = lock(&device).stop_queue(index);
        if let Some(ring) = stopped {
            self.daemon.set_queue_next_avail(ring.next_available);
            self.daemon.set_queue_next_used(ring.next_used);
        }
    }

    fn own(&self) -> MutexGuard<'_, Own> {
        self.own.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for DirectVring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirectVring")
            .field("own", &self.own)
            .finish_non_exhaustive()
    }
}

impl<'a> VringStateGuard<'a, DaemonMemory> for DirectVring {
    type G = RwLockReadGuard<'a, VringState<DaemonMemory>>;
}

impl<'a> VringStateMutGuard<'a, DaemonMemory> for DirectVring {
    type G = RwLockWriteGuard<'a, VringState<DaemonMemory>>;
}

impl VringT<DaemonMemory> for DirectVring {
    fn new(memory: DaemonMemory, max_queue_size: u16) -> Result<Self, QueueError> {
        Ok(Self {
            daemon: VringRwLock::new(memory, max_queue_size)?,
            own: Arc::default(),
        })
    }

    fn get_ref(&self) -> RwLockReadGuard<'_, VringState<DaemonMemory>> {
        self.daemon.get_ref()
    }

    fn get_mut(&self) -> RwLockWriteGuard<'_, VringState<DaemonMemory>> {
        self.daemon.get_mut()
    }

    fn add_used(&self, head: u16, len: u32) -> Result<(), QueueError> {
        self.daemon.add_used(head, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.own().call.signal();
        Ok(())
    }

    fn enable_notification(&self) -> Result<bool, QueueError> {
        self.daemon.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), QueueError> {
        self.daemon.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, QueueError> {
        self.daemon.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        self.daemon.set_enabled(enabled);
        if !enabled {
            self.stop();
        }
    }

    fn set_queue_info(
        &self,
        descriptors: u64,
        available: u64,
        used: u64,
    ) -> Result<(), QueueError> {
        self.daemon.set_queue_info(descriptors, available, used)
    }

    fn queue_next_avail(&self) -> u16 {
        self.daemon.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.daemon.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, index: u16) {
        self.daemon.set_queue_next_used(index);
    }

    fn queue_used_idx(&self) -> Result<u16, QueueError> {
        self.daemon.queue_used_idx()
    }

    fn set_queue_size(&self, size: u16) {
        self.daemon.set_queue_size(size);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.daemon.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        self.daemon.set_queue_ready(ready);
        if !ready {
            self.stop();
        }
    }

    fn set_kick(&self, file: Option<File>) {
        // The daemon registers what it has, so it gets another eventfd.
        let in_its_place = file.as_ref().map(|_| Kick::new());
        match in_its_place.transpose() {
            Ok(other) => {
                let other = other.and_then(|kick| Some(File::from(Arc::into_inner(kick.0)?)));
                self.daemon.set_kick(other);
                self.own().kick = file.map(|file| Kick::from(OwnedFd::from(file)));
            }
            Err(error) => log::error!("a queue doesn't start: no eventfd for the daemon: {error}"),
        }
    }

    fn read_kick(&self) -> io::Result<bool> {
        self.daemon.read_kick()
    }

    fn set_call(&self, file: Option<File>) {
        self.own()
            .call
            .set(file.map(|file| Arc::new(OwnedFd::from(file))));
    }

    fn set_err(&self, file: Option<File>) {
        self.daemon.set_err(file);
    }
}
