//! Between the front end's socket and `vhost`: messages in, replies out, each a whole.
//!
//! `vhost` reads from the socket it is given, and what it has read is gone when the process is
//! killed. So it is given one end of a pair, and here a message is looked at, with the descriptors
//! that it carries, before it is taken off the front end's socket; what is to be kept of it can be
//! kept in between. The invariant: a message leaves the front end's socket only after it was
//! shown to whoever keeps it.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, recvmsg, sendmsg,
};

use crate::sys::closing::First;
use crate::sys::receipt::Receipt;

/// As many descriptors as the kernel lets one message carry (SCM_MAX_FD).
const MOST_FDS: usize = 253;

/// Bytes and the descriptors that came with them.
#[derive(Debug, Default)]
pub(super) struct FdMessage {
    pub(super) bytes: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

/// The front end's socket, and our end of the pair that `vhost` has the other of.
#[derive(Debug)]
pub(super) struct Proxy {
    pub(super) socket: UnixStream,
    inner: UnixStream,
    /// The front end is to notice at once that the process was killed.
    _first: First,
}

impl Proxy {
    /// Answers also the end for `vhost`.
    pub(super) fn new(socket: UnixStream) -> io::Result<(Self, UnixStream)> {
        let (inner, theirs) = UnixStream::pair()?;
        inner.set_nonblocking(true)?;
        let proxy = Self {
            _first: First::new(&socket),
            socket,
            inner,
        };
        Ok((proxy, theirs))
    }

    /// What the next `len` bytes are, which are there, if they can be had as a whole: descriptors
    /// that come with the first of them may keep the rest from being seen. With bytes that carry none
    /// the kernel may show those of the message that follows.
    pub(super) fn look(&self, len: usize) -> io::Result<Option<FdMessage>> {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let message = receive(&self.socket, len, flags)?;
        Ok(Some(message).filter(|message| message.bytes.len() == len))
    }

    /// Takes `len` bytes that are there off the front end's socket.
    pub(super) fn take(&self, len: usize) -> io::Result<FdMessage> {
        let mut whole = FdMessage::default();
        while whole.bytes.len() < len {
            let missing = len - whole.bytes.len();
            let part = receive(&self.socket, missing, RecvFlags::empty())?;
            if part.bytes.is_empty() {
                break;
            }
            whole.bytes.extend(part.bytes);
            whole.fds.extend(part.fds);
        }
        Ok(whole)
    }

    /// Hands a message to `vhost`; `last` says that no more will come.
    pub(super) fn forward(&self, message: &FdMessage, last: bool) -> io::Result<()> {
        send(&self.inner, message)?;
        if last {
            rustix::net::shutdown(&self.inner, Shutdown::Write)?;
        }
        Ok(())
    }

    /// What `vhost` has answered, if anything.
    pub(super) fn answer(&self) -> io::Result<Option<FdMessage>> {
        let mut whole = FdMessage::default();
        loop {
            match receive(&self.inner, 1 << 13, RecvFlags::DONTWAIT) {
                Ok(part) if part.bytes.is_empty() => break,
                Ok(part) => {
                    whole.bytes.extend(part.bytes);
                    whole.fds.extend(part.fds);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(Some(whole).filter(|whole| !whole.bytes.is_empty()))
    }

    /// Sends what has not been sent of an answer to the front end, which `receipt` is about.
    pub(super) fn reply(&self, answer: &FdMessage, receipt: Option<Receipt<'_>>) -> io::Result<()> {
        let receipt = receipt.ok_or(io::ErrorKind::InvalidInput)?;
        let fds: Vec<_> = answer.fds.iter().map(AsFd::as_fd).collect();
        Ok(receipt.send(&self.socket, &answer.bytes, &fds)?)
    }
}

fn receive(socket: &UnixStream, len: usize, flags: RecvFlags) -> io::Result<FdMessage> {
    let mut bytes = vec![0; len];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = flags | RecvFlags::CMSG_CLOEXEC;
    let got = loop {
        let mut slices = [IoSliceMut::new(&mut bytes)];
        match recvmsg(socket, &mut slices, &mut control, flags) {
            // There is room for as many descriptors as there can be, so the kernel found none free
            // in this process.
            Ok(got) if got.flags.contains(ReturnFlags::CTRUNC) => return Err(Errno::MFILE.into()),
            Ok(got) => break got.bytes,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    };
    bytes.truncate(got);
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    Ok(FdMessage { bytes, fds })
}

fn send(socket: &UnixStream, message: &FdMessage) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<_> = message.fds.iter().map(AsFd::as_fd).collect();
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(Errno::TOOBIG.into());
    }
    let mut left = &message.bytes[..];
    while !left.is_empty() {
        match sendmsg(
            socket,
            &[IoSlice::new(left)],
            &mut control,
            SendFlags::NOSIGNAL,
        ) {
            Ok(sent) => {
                left = left.get(sent..).unwrap_or_default();
                control.clear();
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    fn message(bytes: &[u8], fds: usize) -> FdMessage {
        let open = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        FdMessage {
            bytes: bytes.to_vec(),
            fds: (0..fds).map(|_| open()).collect(),
        }
    }

    #[test]
    fn a_message_that_was_looked_at_is_still_there() {
        let (front, socket) = UnixStream::pair().unwrap();
        let (proxy, vhost) = Proxy::new(socket).unwrap();
        send(&front, &message(b"one", 2)).unwrap();
        send(&front, &message(b"two", 0)).unwrap();
        for _ in 0..2 {
            let seen = proxy.look(3).unwrap().unwrap();
            assert_eq!((&seen.bytes[..], seen.fds.len()), (&b"one"[..], 2));
        }
        assert_eq!(proxy.take(3).unwrap().fds.len(), 2);
        let second = proxy.look(3).unwrap().unwrap();
        assert_eq!(second.bytes, b"two");
        proxy.forward(&message(b"on", 1), true).unwrap();
        let got = receive(&vhost, 10, RecvFlags::empty()).unwrap();
        assert_eq!((&got.bytes[..], got.fds.len()), (&b"on"[..], 1));
        let end = receive(&vhost, 10, RecvFlags::empty()).unwrap();
        assert!(end.bytes.is_empty());
    }

    #[test]
    fn descriptors_within_a_message_are_taken_with_it() {
        let (front, socket) = UnixStream::pair().unwrap();
        let (proxy, _vhost) = Proxy::new(socket).unwrap();
        send(&front, &message(b"head", 1)).unwrap();
        send(&front, &message(b"body", 1)).unwrap();
        assert!(proxy.look(8).unwrap().is_none());
        let whole = proxy.take(8).unwrap();
        assert_eq!((&whole.bytes[..], whole.fds.len()), (&b"headbody"[..], 2));
    }

    #[test]
    fn answers_go_the_other_way() {
        let (front, socket) = UnixStream::pair().unwrap();
        let (proxy, vhost) = Proxy::new(socket).unwrap();
        assert!(proxy.answer().unwrap().is_none());
        send(&vhost, &message(b"yes", 1)).unwrap();
        let answer = proxy.answer().unwrap().unwrap();
        let words: Vec<_> = (0..Receipt::WORDS).map(|_| AtomicU64::new(0)).collect();
        for _killed_and_gone_on in 0..2 {
            proxy.reply(&answer, Receipt::new(&words)).unwrap();
        }
        let got = receive(&front, 10, RecvFlags::empty()).unwrap();
        assert_eq!((&got.bytes[..], got.fds.len()), (&b"yes"[..], 1));
        assert!(proxy.reply(&answer, None).is_err());
    }
}
