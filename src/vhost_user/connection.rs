//! The front end's socket: messages are recorded before they leave it, and replies are sent once.
//!
//! What has been read from a socket is lost if the process is killed. So a message is peeked at,
//! with its descriptors, the caller records it, and only then it is taken off the socket. The
//! invariant: a message whose parts the kernel delivers at once leaves the socket only after the
//! caller has seen it.

use std::io::{self, IoSliceMut};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvFlags, ReturnFlags, recvmsg};

use super::message::FdMessage;
use crate::sys::closing::First;
use crate::sys::receipt::Receipt;
use crate::sys::rights::{self, Received};

/// The front end's socket.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) socket: UnixStream,
    /// Lets the front end notice at once if the process is killed.
    _first: First,
}

impl Connection {
    pub(super) fn new(socket: UnixStream) -> Self {
        Self {
            _first: First::new(&socket),
            socket,
        }
    }

    /// Peeks at the next `len` bytes, which must have arrived. Returns `None` if they can't be read
    /// as a whole, as descriptors that belong to the first of them may end the read early. For
    /// bytes without descriptors the kernel may return those of the message that follows.
    pub(super) fn peek(&self, len: usize) -> io::Result<Option<FdMessage>> {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let message = receive(&self.socket, len, flags)?;
        Ok(Some(message).filter(|message| message.bytes.len() == len))
    }

    /// Takes `len` bytes, which must have arrived, off the socket, with their descriptors.
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

    /// Takes a message off the socket that [`peek`](Self::peek) has returned, or
    /// `message_reader::wait`. Returns whether it has descriptors; those were peeked at already.
    pub(super) fn discard(&self, message: &FdMessage) -> io::Result<bool> {
        let mut bytes = vec![0; message.bytes.len()];
        let mut left = &mut bytes[..];
        let mut has_fds = false;
        while !left.is_empty() {
            let mut slices = [IoSliceMut::new(left)];
            // Without room for descriptors, the kernel drops them, and says so.
            let mut no_control = RecvAncillaryBuffer::default();
            match recvmsg(
                &self.socket,
                &mut slices,
                &mut no_control,
                RecvFlags::empty(),
            ) {
                Ok(got) if got.bytes == 0 => break,
                Ok(got) => {
                    has_fds |= got.flags.contains(ReturnFlags::CTRUNC);
                    left = left.get_mut(got.bytes..).unwrap_or_default();
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(has_fds)
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
    let Received { len, fds } = rights::receive(socket, &mut bytes, flags)?;
    bytes.truncate(len);
    Ok(FdMessage { bytes, fds })
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;
    use std::mem::MaybeUninit;
    use std::os::fd::OwnedFd;
    use std::sync::atomic::AtomicU64;

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

    use super::*;

    fn send(socket: &UnixStream, message: &FdMessage) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds: Vec<_> = message.fds.iter().map(AsFd::as_fd).collect();
        assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(&fds)));
        let bytes = [IoSlice::new(&message.bytes)];
        let sent = sendmsg(socket, &bytes, &mut control, SendFlags::NOSIGNAL);
        assert_eq!(sent, Ok(message.bytes.len()));
    }

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
        let connection = Connection::new(socket);
        send(&front, &message(b"one", 2));
        send(&front, &message(b"two", 0));
        for _ in 0..2 {
            let seen = connection.peek(3).unwrap().unwrap();
            assert_eq!((&seen.bytes[..], seen.fds.len()), (&b"one"[..], 2));
        }
        assert_eq!(connection.receive(3).unwrap().fds.len(), 2);
        let second = connection.peek(3).unwrap().unwrap();
        assert_eq!(second.bytes, b"two");
    }

    #[test]
    fn discard_tells_whose_the_peeked_descriptors_are() {
        let (front, socket) = UnixStream::pair().unwrap();
        let connection = Connection::new(socket);
        send(&front, &message(b"one", 0));
        send(&front, &message(b"two", 1));
        let one = connection.peek(3).unwrap().unwrap();
        assert!(!connection.discard(&one).unwrap());
        let two = connection.peek(3).unwrap().unwrap();
        assert_eq!(two.fds.len(), 1);
        assert!(connection.discard(&two).unwrap());
        assert_eq!(two.bytes, b"two");
    }

    #[test]
    fn receive_collects_descriptors_within_message() {
        let (front, socket) = UnixStream::pair().unwrap();
        let connection = Connection::new(socket);
        send(&front, &message(b"head", 1));
        send(&front, &message(b"body", 1));
        assert!(connection.peek(8).unwrap().is_none());
        let whole = connection.receive(8).unwrap();
        assert_eq!((&whole.bytes[..], whole.fds.len()), (&b"headbody"[..], 2));
    }

    #[test]
    fn reply_is_sent_once_with_its_descriptors() {
        let (front, socket) = UnixStream::pair().unwrap();
        let connection = Connection::new(socket);
        let reply = message(b"yes", 1);
        let words: Vec<_> = (0..Receipt::WORDS).map(|_| AtomicU64::new(0)).collect();
        for _killed_and_resumed in 0..2 {
            connection.send_reply(&reply, Receipt::new(&words)).unwrap();
        }
        let got = receive(&front, 10, RecvFlags::empty()).unwrap();
        assert_eq!((&got.bytes[..], got.fds.len()), (&b"yes"[..], 1));
        assert!(connection.send_reply(&reply, None).is_err());
    }
}
