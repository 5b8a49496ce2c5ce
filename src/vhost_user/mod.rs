//! The vhost-user back end: the listening socket, and one vhost-user session at a time.
//!
//! A session implements the back end of a virtio-fs device as the vhost-user specification
//! describes it. It has `vhost`'s messages, and handles them itself: `dispatch` says why, and the
//! daemon of `vhost-user-backend` polls the kick eventfds in a thread of its own, while here the
//! workers own them. The invariant: a queue is stopped and drained before anything changes that it relies on.

mod back_channel;
mod connection;
mod dispatch;
mod handlers;
mod listener;
mod message;
mod message_reader;
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
use std::time::Instant;

pub(crate) use listener::SocketFile;
pub use listener::{ListenError, Listener};
pub(crate) use session::{End, SessionError};
pub(crate) use session_runner::resume;
pub use session_runner::serve;
pub(crate) use session_snapshot::OLDEST_VERSION;
pub use session_snapshot::{SessionSnapshot, VERSION};

use crate::device::BackChannel;
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

    /// Hands over the way to send requests to the VMM, when a session begins or is resumed. Requests
    /// fail until the VMM has opened its side, and when the session has ended.
    fn connected(&mut self, _channel: Arc<dyn BackChannel>) {}

    /// Called when requests can be sent on the channel: the VMM has opened its side, or, if
    /// `resumed`, had opened it before another process continued the session.
    fn channel_opened(&mut self, _resumed: bool) {}

    /// Reports that all queues run again that ran in the previous server process.
    fn resumed(&mut self) {}

    /// Reports that the session runs, if it is time to. Returns when to call this again at the
    /// latest, if at all.
    fn heartbeat(&mut self) -> Option<Instant> {
        None
    }

    /// Called when the descriptor that stops the server is readable: whether it was for something
    /// else, which is done then.
    fn reports(&mut self) -> bool {
        false
    }

    /// Whether the guest's session can be saved and loaded. If not, the front end is told before it
    /// tries to migrate the guest.
    fn can_migrate(&self) -> bool {
        false
    }

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

/// What has ended [`wait_readable`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Woken {
    /// The server was asked to stop.
    Stop,
    /// The descriptor is readable or closed.
    Readable,
    /// The time has come.
    Time,
}

/// Polls two descriptors until one of them is readable or closed, at the longest until `time`.
///
/// # Errors
///
/// Fails as `poll(2)` does.
pub(crate) fn wait_readable(
    fd: impl AsFd,
    stop: BorrowedFd<'_>,
    time: Option<Instant>,
) -> std::io::Result<Woken> {
    use rustix::event::{PollFd, PollFlags, poll};
    let mut fds = [
        PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN),
        PollFd::from_borrowed_fd(stop, PollFlags::IN),
    ];
    loop {
        match poll(&mut fds, timeout_until(time).as_ref()) {
            Ok(0) => return Ok(Woken::Time),
            Ok(_) if !fds[1].revents().is_empty() => return Ok(Woken::Stop),
            Ok(_) => return Ok(Woken::Readable),
            Err(rustix::io::Errno::INTR) => (),
            Err(error) => return Err(error.into()),
        }
    }
}

/// The longest time that `poll(2)` may wait; `None` if there is no limit.
fn timeout_until(time: Option<Instant>) -> Option<rustix::event::Timespec> {
    let left = time?.saturating_duration_since(Instant::now());
    rustix::event::Timespec::try_from(left).ok()
}
