//! Forwards whole messages from the front end's socket to `vhost`, and whole replies back.
//!
//! `vhost` reads from the socket it is given, and what it has read is lost if the process is
//! killed. So it gets one end of a socket pair, and the [`Proxy`] peeks at a message and its
//! descriptors before it takes the message off the front end's socket. In between, the caller can
//! save the message. The invariant: a message leaves the front end's socket only after the caller
//! has peeked at it.

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

/// The most descriptors that one message can carry (the kernel's SCM_MAX_FD).
const MAX_FDS: usize = 253;

/// Bytes, and the descriptors sent with them.
#[derive(Debug, Default)]
pub(super) struct FdMessage {
    pub(super) bytes: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

/// The front end's socket, and this end of the socket pair whose other end `vhost` has.
#[derive(Debug)]
pub(super) struct Proxy {
    pub(super) socket: UnixStream,
    inner: UnixStream,
    /// Lets the front end notice at once if the process is killed.
    _first: First,
}

impl Proxy {
    /// Returns the proxy and the end of the pair for `vhost`.
    pub(super) fn new(socket: UnixStream) -> io::Result<(Self, UnixStream)> {
        let (inner, vhost_end) = UnixStream::pair()?;
        inner.set_nonblocking(true)?;
        let proxy = Self {
            _first: First::new(&socket),
            socket,
            inner,
        };
        Ok((proxy, vhost_end))
    }

    /// Peeks at the next `len` bytes, which must have arrived. Returns `None` if they can't be read
    /// as a whole, as descriptors that belong to the first of them may end the read early. For
    /// bytes without descriptors the kernel may return those of the message that follows.
    pub(super) fn peek(&self, len: usize) -> io::Result<Option<FdMessage>> {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let message = receive(&self.socket, len, flags)?;
        Ok(Some(message).filter(|message| message.bytes.len() == len))
    }

    /// Takes `len` bytes, which must have arrived, off the front end's socket.
    pub(super) fn receive(&self, len: usize) -> io::Result<FdMessage> {
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

    /// Forwards a message to `vhost`; `last` says that no other follows.
    pub(super) fn forward(&self, message: &FdMessage, last: bool) -> io::Result<()> {
        send(&self.inner, message)?;
        if last {
            rustix::net::shutdown(&self.inner, Shutdown::Write)?;
        }
        Ok(())
    }

    /// Returns the reply of `vhost`, if there is one.
    pub(super) fn take_reply(&self) -> io::Result<Option<FdMessage>> {
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

    /// Sends the part of a reply to the front end that `receipt` doesn't count as sent already.
    pub(super) fn send_reply(
        &self,
        reply: &FdMessage,
        receipt: Option<Receipt<'_>>,
    ) -> io::Result<()> {
        let receipt = receipt.ok_or(io::ErrorKind::InvalidInput)?;
        let fds: Vec<_> = reply.fds.iter().map(AsFd::as_fd).collect();
        Ok(receipt.send(&self.socket, &reply.bytes, &fds)?)
    }
}

fn receive(socket: &UnixStream, len: usize, flags: RecvFlags) -> io::Result<FdMessage> {
    let mut bytes = vec![0; len];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = flags | RecvFlags::CMSG_CLOEXEC;
    let got = loop {
        let mut slices = [IoSliceMut::new(&mut bytes)];
        match recvmsg(socket, &mut slices, &mut control, flags) {
            // The buffer has room for the most descriptors a message can carry, so truncation means
            // that this process has no free descriptor.
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
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
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
    fn peek_leaves_message_in_socket() {
        let (front, socket) = UnixStream::pair().unwrap();
        let (proxy, vhost) = Proxy::new(socket).unwrap();
        send(&front, &message(b"one", 2)).unwrap();
        send(&front, &message(b"two", 0)).unwrap();
        for _ in 0..2 {
            let seen = proxy.peek(3).unwrap().unwrap();
            assert_eq!((&seen.bytes[..], seen.fds.len()), (&b"one"[..], 2));
        }
        assert_eq!(proxy.receive(3).unwrap().fds.len(), 2);
        let second = proxy.peek(3).unwrap().unwrap();
        assert_eq!(second.bytes, b"two");
        proxy.forward(&message(b"on", 1), true).unwrap();
        let got = receive(&vhost, 10, RecvFlags::empty()).unwrap();
        assert_eq!((&got.bytes[..], got.fds.len()), (&b"on"[..], 1));
        let end = receive(&vhost, 10, RecvFlags::empty()).unwrap();
        assert!(end.bytes.is_empty());
    }

    #[test]
    fn receive_collects_descriptors_within_message() {
        let (front, socket) = UnixStream::pair().unwrap();
        let (proxy, _vhost) = Proxy::new(socket).unwrap();
        send(&front, &message(b"head", 1)).unwrap();
        send(&front, &message(b"body", 1)).unwrap();
        assert!(proxy.peek(8).unwrap().is_none());
        let whole = proxy.receive(8).unwrap();
        assert_eq!((&whole.bytes[..], whole.fds.len()), (&b"headbody"[..], 2));
    }

    #[test]
    fn reply_is_sent_once_with_its_descriptors() {
        let (front, socket) = UnixStream::pair().unwrap();
        let (proxy, vhost) = Proxy::new(socket).unwrap();
        assert!(proxy.take_reply().unwrap().is_none());
        send(&vhost, &message(b"yes", 1)).unwrap();
        let reply = proxy.take_reply().unwrap().unwrap();
        let words: Vec<_> = (0..Receipt::WORDS).map(|_| AtomicU64::new(0)).collect();
        for _killed_and_resumed in 0..2 {
            proxy.send_reply(&reply, Receipt::new(&words)).unwrap();
        }
        let got = receive(&front, 10, RecvFlags::empty()).unwrap();
        assert_eq!((&got.bytes[..], got.fds.len()), (&b"yes"[..], 1));
        assert!(proxy.send_reply(&reply, None).is_err());
    }
}
