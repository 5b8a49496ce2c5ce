//! An eventfd that is awaited on the caller's runtime. The invariant: no signal is lost.

#![allow(unsafe_code, reason = "tokio wants a promise about the descriptor")]

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// An eventfd that another process signals, as a guest does to kick a queue.
///
/// It need not be read: the descriptor is registered edge-triggered, and each write to an eventfd is
/// a new edge. That saves a system call for each signal. The counter, up to 2⁶⁴ - 2, doesn't
/// overflow. An epoll instance will do instead of an eventfd.
#[derive(Debug)]
pub struct Event(AsyncFd<Arc<OwnedFd>>);

impl Event {
    /// Registers `eventfd` with the current runtime. Earlier signals count as one.
    ///
    /// # Errors
    ///
    /// Fails if the descriptor can't be polled (`EPERM`), or if there is no memory or space for it
    /// (`ENOMEM`, `ENOSPC`).
    ///
    /// # Panics
    ///
    /// Outside of a [`Runtime`](super::Runtime).
    pub fn new(eventfd: Arc<OwnedFd>) -> io::Result<Self> {
        // SAFETY: the descriptor stays open as long as the `Arc`, which the `AsyncFd` holds, and
        // an `OwnedFd` that is shared can't come to mean another file.
        let registered = unsafe { AsyncFd::register_with_interest(eventfd, Interest::READABLE) };
        match registered {
            Ok(fd) => Ok(Self(fd)),
            Err(error) => Err(error.into_parts().1),
        }
    }

    /// The eventfd.
    #[must_use]
    pub fn eventfd(&self) -> &Arc<OwnedFd> {
        self.0.get_ref()
    }

    /// Ready once for all signals since the last time. Only one task at a time may wait.
    pub fn poll(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0
            .poll_read_ready(cx)
            .map(|ready| ready.map(|mut guard| guard.clear_ready()))
    }
}

/// Duplicates the descriptor of an eventfd.
#[cfg(feature = "rust-vmm")]
pub(crate) fn duplicate_eventfd(eventfd: &vmm_sys_util::eventfd::EventFd) -> io::Result<OwnedFd> {
    use std::os::fd::{AsRawFd, BorrowedFd};
    // SAFETY: the descriptor is open as long as its owner `eventfd`, which is borrowed meanwhile.
    let fd = unsafe { BorrowedFd::borrow_raw(eventfd.as_raw_fd()) };
    fd.try_clone_to_owned()
}

/// Whether a write to `fd` blocks until there is space: some front ends create their eventfds so.
pub(crate) fn writing_blocks(fd: impl AsFd) -> bool {
    let flags = rustix::fs::fcntl_getfl(fd);
    flags.map_or(true, |flags| !flags.contains(rustix::fs::OFlags::NONBLOCK))
}

/// Whether a write to `fd` would not block at this moment.
pub(crate) fn takes_writing(fd: impl AsFd) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::OUT)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
}
