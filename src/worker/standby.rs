//! Lets idle workers watch the queue of a worker that waits for the host in a system call.
//!
//! To wait in the call itself is the fastest way to serve a request that is alone: the call isn't
//! handed to another thread, which would cost two wake-ups. But the guest may send more meanwhile.
//! So the queue's kicks wake the idle workers until the call returns, and one of them takes the new
//! chains. While nothing arrives, nobody is woken. The invariants: at most one queue of a pool is
//! watched, and only while another worker is idle; no kick is lost when watching begins and ends.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::epoll;
use rustix::io::{IoSliceMut, ReadWriteFlags};

use crate::virtqueue::Queue;

/// What the workers of a pool watch while they are idle.
#[derive(Debug)]
pub(super) struct Standby {
    /// Readable after a kick of the watched queue.
    epoll: Arc<OwnedFd>,
    watched: Mutex<Option<Watched>>,
}

/// A queue that is watched, and its kick eventfd.
#[derive(Debug)]
struct Watched {
    queue: Box<Queue>,
    kick: Arc<OwnedFd>,
}

impl Standby {
    /// Nothing is watched yet.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC)?),
            watched: Mutex::new(None),
        })
    }

    /// What becomes readable when the watched queue may have chains.
    pub(super) fn readable(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.epoll)
    }

    /// Lets the idle workers watch `queue`, whose kicks come through `kick`, and enables its
    /// notifications. Returns it, enabled or not, if it has chains or another one is watched.
    pub(super) fn watch(
        &self,
        mut queue: Box<Queue>,
        kick: &Arc<OwnedFd>,
    ) -> Result<WatchedQueue<'_>, Box<Queue>> {
        let mut watched = self.lock();
        if watched.is_some() {
            return Err(queue);
        }
        forget_kicks(kick);
        // After the earlier kicks were forgotten, so that no chain is missed.
        if queue.enable_notifications() {
            return Err(queue);
        }
        let edges = epoll::EventFlags::IN | epoll::EventFlags::ET;
        if epoll::add(&self.epoll, kick, epoll::EventData::new_u64(0), edges).is_err() {
            return Err(queue);
        }
        let begun_at = queue.next_available();
        let kick = Arc::clone(kick);
        *watched = Some(Watched { queue, kick });
        Ok(WatchedQueue {
            standby: self,
            begun_at,
        })
    }

    /// Calls `serve` with the queue that is watched, if any.
    pub(super) fn with_watched<R>(&self, serve: impl FnOnce(&mut Queue) -> R) -> Option<R> {
        let mut watched = self.lock();
        watched.as_mut().map(|watched| serve(&mut watched.queue))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Watched>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The queue of a worker that waits for the host.
#[derive(Debug)]
#[must_use = "its worker needs the queue again"]
pub(super) struct WatchedQueue<'a> {
    standby: &'a Standby,
    /// The next entry of the available ring when watching began.
    begun_at: u16,
}

impl WatchedQueue<'_> {
    /// Ends the watching. Returns the queue, whose notifications are enabled, and whether the guest
    /// has added chains meanwhile.
    pub(super) fn end(self) -> (Box<Queue>, bool) {
        let watched = self.standby.lock().take();
        let Watched { mut queue, kick } =
            watched.expect("invariant: only its worker ends the watching");
        // Fails only if it isn't watched.
        let _ = epoll::delete(&self.standby.epoll, &kick);
        let is_changed = queue.next_available() != self.begun_at || queue.has_more();
        (queue, is_changed)
    }
}

/// Makes an eventfd that nobody reads unreadable until the next signal, as epoll reports one that is
/// readable at once.
fn forget_kicks(kick: &OwnedFd) {
    let mut count = [0; 8];
    let into = &mut [IoSliceMut::new(&mut count)];
    // At no offset, that is `read(2)` which never waits. Fails if there was no signal. If it fails
    // otherwise, a worker is woken for nothing.
    let _ = rustix::io::preadv2(kick, into, u64::MAX, ReadWriteFlags::NOWAIT);
}
