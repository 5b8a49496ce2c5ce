//! The front door: listening, and one vhost-user session at a time.
//!
//! The session follows the vhost-user specification as the back end of a virtio-fs device; it
//! implements `vhost`'s request handler itself, because the ready-made daemon keeps the kick
//! eventfds in a thread of its own, where here they belong to the workers. The invariant:
//! while anything changes that a running queue relies on, that queue is stopped and drained.

mod device_state;
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

pub use device_state::{Cause, DeviceState};
pub use listener::{ListenError, Listener, SocketFile};
pub use session::{End, SessionError};
pub use session_runner::{resume, serve};
pub use session_snapshot::{SessionSnapshot, SnapshotError, VERSION};

use crate::virtqueue::{Queue, QueueIndex};

/// What runs the queues for a session.
pub trait Runner {
    /// Serves `queue` from now on, looking at it once without a kick.
    ///
    /// # Errors
    ///
    /// The queue's thread is gone, or can't wait for `kick`.
    fn run(&mut self, queue: Queue, kick: Arc<OwnedFd>) -> std::io::Result<()>;

    /// Stops serving the queue, waits until everything taken off it has been returned, and
    /// answers the available entry that comes next; `None` if it wasn't being served.
    fn stop(&mut self, queue: QueueIndex) -> Option<u16>;

    /// Forgets what the guest held: it has been reset.
    fn reset(&mut self);

    /// All queues run again that ran in the process that served before.
    fn resumed(&mut self) {}

    /// What the guest's session is saved and loaded by. By default nothing is.
    fn device_state(&mut self) -> Arc<dyn DeviceState> {
        Arc::new(device_state::Stateless)
    }
}

/// How a session is told to end.
#[derive(Clone, Copy, Debug)]
pub struct Stop<'a> {
    /// Readable when it is to.
    pub asked: BorrowedFd<'a>,
    /// Whether another process is to go on with it: then nothing of it is closed.
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

/// Polls two descriptors until one of them can be read or has ended; true if it is `stop`.
///
/// # Errors
///
/// Those of `poll(2)`.
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
