//! The vhost-user back end: the listening socket, and one vhost-user session at a time.
//!
//! A session implements the back end of a virtio-fs device as the vhost-user specification
//! describes it. It implements `vhost`'s request handler itself, because the daemon of
//! `vhost-user-backend` polls the kick eventfds in a thread of its own, while here the workers own
//! them. The invariant: a queue is stopped and drained before anything changes that it relies on.

mod listener;
mod message_reader;
mod proxy;
mod restore;
mod session;
mod session_loop;
mod session_runner;
mod session_snapshot;
mod shared_memory;
mod vring;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub use listener::{ListenError, Listener, SocketFile};
pub use session::{End, SessionError};
pub use session_runner::{resume, serve};
pub use session_snapshot::{SessionSnapshot, SnapshotError, VERSION};

use crate::migration::{DeviceState, NoDeviceState};
use crate::virtqueue::{Queue, QueueIndex};

/// Runs the queues of a session.
pub trait Runner {
    /// Starts serving `queue`; looks at its ring once without a kick.
    ///
    /// # Errors
    ///
    /// Fails if the queue's thread has ended, or can't wait for `kick`.
    fn run(&mut self, queue: Queue, kick: Arc<OwnedFd>) -> std::io::Result<()>;

    /// Stops serving the queue, waits until all chains taken off it have been returned, and returns
    /// the index of the next available entry. Returns `None` if the queue wasn't being served.
    fn stop(&mut self, queue: QueueIndex) -> Option<u16>;

    /// Discards the state of the guest, which has been reset.
    fn reset(&mut self);

    /// Reports that all queues run again that ran in the previous server process.
    fn resumed(&mut self) {}

    /// Returns what saves and loads the state of the guest's session. By default neither is
    /// supported.
    fn device_state(&mut self) -> Arc<dyn DeviceState> {
        Arc::new(NoDeviceState)
    }
}

/// Tells a session to end.
#[derive(Clone, Copy, Debug)]
pub struct Stop<'a> {
    /// Readable once the session has to end.
    pub asked: BorrowedFd<'a>,
    /// Whether another process will resume the session. Then none of its descriptors is closed.
    pub leave: &'a AtomicBool,
}

impl Stop<'_> {
    /// Whether another process is to continue with the session.
    #[must_use]
    pub fn leaves(&self) -> bool {
        // Acquire: pairs with the store before `asked` became readable.
        self.leave.load(Ordering::Acquire)
    }
}

/// Polls two descriptors until one of them is readable or closed; returns true if `stop` is.
///
/// # Errors
///
/// Fails as `poll(2)` does.
pub fn wait_readable(fd: impl AsFd, stop: BorrowedFd<'_>) -> std::io::Result<bool> {
    use rustix::event::{PollFd, PollFlags, poll};
    let mut fds = [
        PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN),
        PollFd::from_borrowed_fd(stop, PollFlags::IN),
    ];
    loop {
        match poll(&mut fds, None) {
            Ok(_) => return Ok(!fds[1].revents().is_empty()),
            Err(rustix::io::Errno::INTR) => (),
            Err(error) => return Err(error.into()),
        }
    }
}
