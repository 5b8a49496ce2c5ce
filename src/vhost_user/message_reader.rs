//! Waits until a complete message of the front end is in the socket's receive buffer.
//!
//! A front end that stalls within a message must not keep the server from stopping, so the rest of
//! a message is never waited for by a call that reads it. This module only peeks: it takes nothing
//! off the socket, and leaves it to others to refuse malformed messages. The invariant: the bytes
//! that `Incoming::Message` reports can be read without blocking.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvFlags, ReturnFlags, recvmsg};
use vhost::vhost_user::message::MAX_MSG_SIZE;

use super::message::Header;

/// How long a front end may take to send one message, from its first byte on.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);

/// How often an incomplete message is checked: a socket that is readable already reports no further
/// bytes.
const INTERVAL: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 1_000_000,
};

/// Length of the longest message.
const MAX_LEN: usize = Header::LEN + MAX_MSG_SIZE;

/// What ended the wait.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Incoming {
    /// Bytes can be read.
    Message(Readable),
    /// The server was asked to stop.
    Stop,
    /// The [`Watch`] fired and no message has arrived.
    WatchFired,
    /// A heartbeat is due, and no message has arrived.
    HeartbeatDue,
    /// The rest of a message has not arrived in time.
    Stalled {
        /// Bytes of it that have arrived.
        have: usize,
    },
}

/// Bytes at the head of the socket's receive buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Readable {
    /// How many: a complete message; or its beginning, if its header is invalid or the front end
    /// has disconnected; or 0 at the end of the stream.
    pub(super) len: usize,
    /// The bytes themselves, if they are a complete message that has no descriptors.
    pub(super) bytes: Option<Vec<u8>>,
}

/// A condition that ends the wait besides a message.
#[derive(Clone, Copy, Debug)]
pub(super) enum Watch<'a> {
    /// None.
    Nothing,
    /// The descriptor is readable.
    Readable(BorrowedFd<'a>),
    /// The time has come.
    Until(Instant),
}

impl Watch<'_> {
    fn time(self) -> Option<Instant> {
        match self {
            Self::Until(time) => Some(time),
            Self::Nothing | Self::Readable(_) => None,
        }
    }
}

/// Waits for the next message on `socket`, until `stop` is readable, until `watch` fires, or until
/// `heartbeat`.
///
/// # Errors
///
/// Fails if polling or peeking at the socket fails.
pub(super) fn wait(
    socket: &UnixStream,
    stop: BorrowedFd<'_>,
    watch: Watch<'_>,
    heartbeat: Option<Instant>,
) -> std::io::Result<Incoming> {
    let heartbeat_is_first = match (heartbeat, watch.time()) {
        (Some(heartbeat), Some(watch)) => heartbeat < watch,
        (heartbeat, _) => heartbeat.is_some(),
    };
    let time = if heartbeat_is_first {
        heartbeat
    } else {
        watch.time()
    };
    // When the first part of an incomplete message was seen.
    let mut started = None;
    loop {
        let watched = match watch {
            Watch::Readable(fd) => fd,
            // A placeholder: `stop` is polled twice.
            Watch::Nothing | Watch::Until(_) => stop,
        };
        let mut fds =
            [stop, socket.as_fd(), watched].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        // With part of a message in it the socket is always readable, so it can't be polled for the
        // rest.
        let polled = match started {
            None => poll(&mut fds, super::timeout_until(time).as_ref()),
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
        if polled == Ok(0) && started.is_none() && heartbeat_is_first {
            return Ok(Incoming::HeartbeatDue);
        }
        let fired = polled == Ok(0) || !fds[2].revents().is_empty();
        if started.is_none() && fired && fds[1].revents().is_empty() {
            return Ok(Incoming::WatchFired);
        }
        if let Some(readable) = readable_message(socket)? {
            return Ok(Incoming::Message(readable));
        }
        if started.get_or_insert_with(Instant::now).elapsed() > MESSAGE_TIMEOUT {
            let have = queued(socket)?;
            return Ok(Incoming::Stalled { have });
        }
    }
}

/// Returns what to read: a complete message, a header that is invalid, or all that a disconnected
/// front end has sent. `None` if the message is incomplete.
fn readable_message(socket: &UnixStream) -> std::io::Result<Option<Readable>> {
    let mut bytes = [0; MAX_LEN];
    let mut slices = [IoSliceMut::new(&mut bytes)];
    // Without room for descriptors, the kernel says whether there are any, and opens none.
    let mut no_control = RecvAncillaryBuffer::default();
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    let got = match recvmsg(socket, &mut slices, &mut no_control, flags) {
        Ok(got) => got,
        Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
        Err(Errno::CONNRESET) => return Ok(Some(Readable::only(0))),
        Err(error) => return Err(error.into()),
    };
    let bytes = bytes.get(..got.bytes).unwrap_or_default();
    if bytes.is_empty() {
        return Ok(Some(Readable::only(0)));
    }
    let header = Header::read(bytes);
    let len = match header.map(Header::message_len) {
        // Its body isn't waited for.
        Some(None) => return Ok(Some(Readable::only(Header::LEN))),
        Some(Some(len)) => Some(len),
        None => None,
    };
    if let Some(message) = len.and_then(|len| bytes.get(..len)) {
        // Descriptors may be those of the message that follows.
        let has_fds = got.flags.contains(ReturnFlags::CTRUNC);
        return Ok(Some(Readable {
            len: message.len(),
            bytes: (!has_fds).then(|| message.to_vec()),
        }));
    }
    // One call doesn't read beyond bytes that have descriptors. In this order: what the front end
    // sent before it disconnected is in the buffer then.
    let disconnected = has_hung_up(socket)?;
    let available = queued(socket)?;
    if let Some(len) = len.filter(|len| *len <= available) {
        return Ok(Some(Readable::only(len)));
    }
    Ok(disconnected.then_some(Readable::only(available)))
}

impl Readable {
    fn only(len: usize) -> Self {
        Self { len, bytes: None }
    }
}

/// How many bytes can be read, over all messages sent.
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
    use std::io::{IoSlice, Write};

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

    use super::*;

    fn pair() -> (UnixStream, UnixStream) {
        UnixStream::pair().unwrap()
    }

    fn message(size: u32, sent: usize) -> Vec<u8> {
        let mut bytes = vec![1, 0, 0, 0, 1, 0, 0, 0];
        bytes.extend(size.to_ne_bytes());
        bytes.resize(Header::LEN + sent, 7);
        bytes
    }

    #[test]
    fn message_is_readable_once_its_last_byte_arrived() {
        let (ours, mut theirs) = pair();
        theirs.write_all(&message(8, 7)).unwrap();
        assert_eq!(readable_message(&ours).unwrap(), None);
        theirs.write_all(&[7, 7]).unwrap();
        let readable = readable_message(&ours).unwrap().unwrap();
        assert_eq!(readable.len, Header::LEN + 8);
        assert_eq!(readable.bytes, Some(message(8, 8)));
    }

    #[test]
    fn message_in_two_parts_with_descriptors_is_readable() {
        let (ours, mut theirs) = pair();
        let fds = [theirs.as_fd()];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let header = message(8, 0);
        let slices = [IoSlice::new(&header)];
        let flags = SendFlags::empty();
        rustix::net::sendmsg(&theirs, &slices, &mut control, flags).unwrap();
        assert_eq!(readable_message(&ours).unwrap(), None);
        theirs.write_all(&[7; 9]).unwrap();
        let whole = Readable::only(Header::LEN + 8);
        assert_eq!(readable_message(&ours).unwrap(), Some(whole));
    }

    #[test]
    fn partial_header_is_readable_only_after_disconnect() {
        let (ours, mut theirs) = pair();
        theirs.write_all(&message(0, 0)[..5]).unwrap();
        assert_eq!(readable_message(&ours).unwrap(), None);
        drop(theirs);
        assert_eq!(readable_message(&ours).unwrap(), Some(Readable::only(5)));
    }

    #[test]
    fn header_with_too_large_size_is_readable_without_body() {
        let (ours, mut theirs) = pair();
        theirs.write_all(&message(0x1001, 0)).unwrap();
        let header = Readable::only(Header::LEN);
        assert_eq!(readable_message(&ours).unwrap(), Some(header));
    }

    #[test]
    fn stop_ends_wait_within_message() {
        let (ours, mut theirs) = pair();
        let (stop, mut stopper) = pair();
        theirs.write_all(&message(8, 1)).unwrap();
        let waiting =
            std::thread::spawn(move || wait(&ours, stop.as_fd(), Watch::Nothing, None).unwrap());
        stopper.write_all(&[0]).unwrap();
        assert_eq!(waiting.join().unwrap(), Incoming::Stop);
    }

    #[test]
    fn heartbeat_is_due_before_later_watch_and_after_earlier_one() {
        let (ours, mut theirs) = pair();
        let (stop, _stopper) = pair();
        let now = Instant::now();
        let later = now + Duration::from_secs(1000);
        let on = |watch, heartbeat| wait(&ours, stop.as_fd(), watch, Some(heartbeat)).unwrap();
        assert_eq!(on(Watch::Nothing, now), Incoming::HeartbeatDue);
        assert_eq!(on(Watch::Until(later), now), Incoming::HeartbeatDue);
        assert_eq!(on(Watch::Until(now), later), Incoming::WatchFired);
        theirs.write_all(&message(0, 0)).unwrap();
        assert!(matches!(on(Watch::Nothing, now), Incoming::Message { .. }));
    }

    #[test]
    fn watch_ends_wait_unless_message_arrived() {
        let (ours, mut theirs) = pair();
        let (stop, _stopper) = pair();
        let (event, mut other) = pair();
        let late = Watch::Until(Instant::now());
        let on = |watch| wait(&ours, stop.as_fd(), watch, None).unwrap();
        assert_eq!(on(late), Incoming::WatchFired);
        other.write_all(&[0]).unwrap();
        assert_eq!(on(Watch::Readable(event.as_fd())), Incoming::WatchFired);
        theirs.write_all(&message(0, 0)).unwrap();
        for watch in [Watch::Readable(event.as_fd()), late] {
            assert!(matches!(on(watch), Incoming::Message(_)));
        }
    }
}
