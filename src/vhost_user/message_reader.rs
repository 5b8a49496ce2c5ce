//! Waits until a message of the front end is there as a whole.
//!
//! `vhost` reads a message with calls that block and that it repeats for ever, so a front end
//! that stalls within one would keep the server from being stopped. Here the message is only
//! looked at: nothing is taken off the socket, and what makes no sense is left to `vhost` to
//! refuse. The invariant: what `Incoming::Message` says can be taken without waiting.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::RecvFlags;

/// How long a front end may take over one message, once it has begun it.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);

/// How often a message that is not whole is looked at; a socket doesn't tell of the rest coming.
const INTERVAL: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 1_000_000,
};

/// Request, flags and size, four bytes each (vhost-user specification, "Header").
const HEADER: usize = 12;

/// The largest size that `vhost` accepts; it refuses a header with more without reading on.
const MAX_BODY: usize = 0x1000;

/// What came first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Incoming {
    /// Something is there that can be taken.
    Message {
        /// How many bytes: a message, or its beginning, if that is for `vhost` to refuse, or if its
        /// front end has gone; 0 if there is nothing more.
        len: usize,
        /// Nothing comes after it.
        last: bool,
    },
    /// The server is to stop.
    Stop,
    /// What was also waited for has come about, and no message.
    Watched,
    /// Part of a message is there and the rest doesn't come.
    Stalled {
        /// Bytes of it that are there.
        have: usize,
    },
}

/// What is also waited for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Watch<'a> {
    /// Nothing.
    Nothing,
    /// That this is readable.
    Readable(BorrowedFd<'a>),
    /// That it is so late.
    Until(Instant),
}

impl Watch<'_> {
    /// How long may be waited at most.
    fn left(self) -> Option<Timespec> {
        let Self::Until(end) = self else { return None };
        let left = end.saturating_duration_since(Instant::now());
        Timespec::try_from(left).ok()
    }
}

/// Waits on `socket` for the next message, or until `stop` is readable, or for what `watch` says.
///
/// # Errors
///
/// Those of `poll(2)`, and of looking at the socket.
pub(super) fn wait(
    socket: &UnixStream,
    stop: BorrowedFd<'_>,
    watch: Watch<'_>,
) -> std::io::Result<Incoming> {
    let mut begun = None;
    loop {
        let also = match watch {
            Watch::Readable(fd) => fd,
            // Once more.
            Watch::Nothing | Watch::Until(_) => stop,
        };
        let mut fds =
            [stop, socket.as_fd(), also].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        // Once a part is there the socket is readable all the time and can't be waited for.
        let polled = match begun {
            None => poll(&mut fds, watch.left().as_ref()),
            Some(_) => poll(&mut fds[..1], Some(&INTERVAL)),
        };
        match polled {
            Ok(_) => (),
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        if !fds[0].revents().is_empty() {
            return Ok(Incoming::Stop);
        }
        let is_time = polled == Ok(0) || !fds[2].revents().is_empty();
        if begun.is_none() && is_time && fds[1].revents().is_empty() {
            return Ok(Incoming::Watched);
        }
        if let Some((len, last)) = is_whole(socket)? {
            return Ok(Incoming::Message { len, last });
        }
        if begun.get_or_insert_with(Instant::now).elapsed() > MESSAGE_TIMEOUT {
            let have = queued(socket)?;
            return Ok(Incoming::Stalled { have });
        }
    }
}

/// How many bytes can be taken without waiting for more, if that is a message, can't become one, or
/// is all that comes; and whether it is that.
fn is_whole(socket: &UnixStream) -> std::io::Result<Option<(usize, bool)>> {
    let mut header = [0; HEADER];
    let (have, _) = match rustix::net::recv(
        socket,
        &mut header[..],
        RecvFlags::PEEK | RecvFlags::DONTWAIT,
    ) {
        Ok(have) => have,
        Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
        Err(Errno::CONNRESET) => return Ok(Some((0, true))),
        Err(error) => return Err(error.into()),
    };
    if have == 0 {
        return Ok(Some((0, true)));
    }
    let size = header
        .last_chunk()
        .map_or(0, |size| u32::from_ne_bytes(*size));
    let body = usize::try_from(size).unwrap_or(usize::MAX);
    if have == HEADER && body > MAX_BODY {
        return Ok(Some((HEADER, false)));
    }
    // In this order: what was sent before the front end went is there by then.
    let gone = has_hung_up(socket)?;
    let there = queued(socket)?;
    if have == HEADER && there >= HEADER + body {
        return Ok(Some((HEADER + body, false)));
    }
    Ok(gone.then_some((there, true)))
}

/// How many bytes wait to be read, over all that was sent.
fn queued(socket: &UnixStream) -> std::io::Result<usize> {
    let bytes = rustix::io::ioctl_fionread(socket)?;
    Ok(usize::try_from(bytes).unwrap_or(usize::MAX))
}

fn has_hung_up(socket: &UnixStream) -> std::io::Result<bool> {
    let mut fds = [PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::RDHUP)];
    poll(&mut fds, Some(&Timespec::default()))?;
    Ok(!fds[0].revents().is_empty())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn pair() -> (UnixStream, UnixStream) {
        UnixStream::pair().unwrap()
    }

    fn message(size: u32, sent: usize) -> Vec<u8> {
        let mut bytes = vec![1, 0, 0, 0, 1, 0, 0, 0];
        bytes.extend(size.to_ne_bytes());
        bytes.resize(HEADER + sent, 7);
        bytes
    }

    #[test]
    fn a_message_is_there_when_its_last_byte_is() {
        let (ours, mut theirs) = pair();
        theirs.write_all(&message(8, 7)).unwrap();
        assert_eq!(is_whole(&ours).unwrap(), None);
        theirs.write_all(&[7, 7]).unwrap();
        assert_eq!(is_whole(&ours).unwrap(), Some((HEADER + 8, false)));
    }

    #[test]
    fn part_of_a_header_is_no_message_until_its_sender_goes() {
        let (ours, mut theirs) = pair();
        theirs.write_all(&message(0, 0)[..5]).unwrap();
        assert_eq!(is_whole(&ours).unwrap(), None);
        drop(theirs);
        assert_eq!(is_whole(&ours).unwrap(), Some((5, true)));
    }

    #[test]
    fn a_size_that_nobody_accepts_is_not_waited_for() {
        let (ours, mut theirs) = pair();
        theirs.write_all(&message(0x1001, 0)).unwrap();
        assert_eq!(is_whole(&ours).unwrap(), Some((HEADER, false)));
    }

    #[test]
    fn stop_ends_the_wait_within_a_message() {
        let (ours, mut theirs) = pair();
        let (stop, mut stopper) = pair();
        theirs.write_all(&message(8, 1)).unwrap();
        let waiting =
            std::thread::spawn(move || wait(&ours, stop.as_fd(), Watch::Nothing).unwrap());
        stopper.write_all(&[0]).unwrap();
        assert_eq!(waiting.join().unwrap(), Incoming::Stop);
    }

    #[test]
    fn watch_ends_the_wait_and_a_message_comes_first() {
        let (ours, mut theirs) = pair();
        let (stop, _stopper) = pair();
        let (event, mut other) = pair();
        let late = Watch::Until(Instant::now());
        let on = |watch| wait(&ours, stop.as_fd(), watch).unwrap();
        assert_eq!(on(late), Incoming::Watched);
        other.write_all(&[0]).unwrap();
        assert_eq!(on(Watch::Readable(event.as_fd())), Incoming::Watched);
        theirs.write_all(&message(0, 0)).unwrap();
        for watch in [Watch::Readable(event.as_fd()), late] {
            assert!(matches!(on(watch), Incoming::Message { .. }));
        }
    }
}
