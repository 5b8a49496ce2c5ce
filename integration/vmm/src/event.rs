//! Eventfds, which kicks, calls and errors are made of.
//!
//! An [`Event`] is one eventfd. It knows nothing of rings. The invariant: a reader never blocks in
//! `read`, even if the file description is a blocking one: it calls `poll` first.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

/// One eventfd.
#[derive(Debug)]
pub struct Event {
    fd: OwnedFd,
    blocking: bool,
}

impl Event {
    /// Makes an eventfd whose file description does not block, as most front ends do.
    ///
    /// # Errors
    /// Those of `eventfd`.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            fd: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            blocking: false,
        })
    }

    /// Makes an eventfd whose file description blocks, as crosvm does: a server that reads it
    /// before it is readable is stuck.
    ///
    /// # Errors
    /// Those of `eventfd`.
    pub fn blocking() -> io::Result<Self> {
        Ok(Self {
            fd: eventfd(0, EventfdFlags::CLOEXEC)?,
            blocking: true,
        })
    }

    /// Adds one to the counter, which wakes waiting threads.
    ///
    /// # Errors
    /// Those of `write`.
    pub fn signal(&self) -> io::Result<()> {
        rustix::io::write(&self.fd, &1_u64.to_ne_bytes())?;
        Ok(())
    }

    /// Resets the counter and returns its value, without waiting: 0 if it was not signalled.
    ///
    /// # Errors
    /// Those of `poll` and `read`.
    pub fn take(&self) -> io::Result<u64> {
        let mut counter = [0_u8; 8];
        if self.blocking && !self.wait(Duration::ZERO)? {
            return Ok(0);
        }
        match rustix::io::read(&self.fd, &mut counter) {
            Ok(_) => Ok(u64::from_ne_bytes(counter)),
            // Not signalled, or another waiter on a shared eventfd was faster.
            Err(Errno::AGAIN) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until the counter is not 0, and leaves it as it is. False on timeout.
    ///
    /// # Errors
    /// Those of `poll`.
    pub fn wait(&self, timeout: Duration) -> io::Result<bool> {
        wait_readable(self.fd.as_fd(), timeout)
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Waits until `fd` is readable or hung up. False on timeout.
///
/// # Errors
/// Those of `poll`.
pub fn wait_readable(fd: BorrowedFd<'_>, timeout: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
        match poll(&mut fds, Some(&left)) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taking_from_a_quiet_blocking_event_does_not_block() {
        assert_eq!(Event::blocking().unwrap().take().unwrap(), 0);
    }

    #[test]
    fn signals_add_up_until_they_are_taken() {
        let event = Event::new().unwrap();
        event.signal().unwrap();
        event.signal().unwrap();
        assert!(event.wait(Duration::ZERO).unwrap());
        assert_eq!(event.take().unwrap(), 2);
        assert_eq!(event.take().unwrap(), 0);
    }
}
