//! A vhost-user connection, as the front end has it.
//!
//! [`Connection::send`] and [`Connection::recv`] transfer any message, right or wrong; the methods
//! named after messages (in `calls`) send right ones and check the replies. It knows no order of
//! messages: that is [`crate::profile`]'s. The invariant: nothing blocks longer than the timeout.

mod calls;
pub mod message;

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use message::{Header, flag, protocol};

/// How long a reply may take unless [`Connection::set_timeout`] says otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

/// The most file descriptors that one message can carry (the kernel's SCM_MAX_FD).
pub const MAX_FDS: usize = 253;

/// The longest body that is accepted from the other side.
const MAX_BODY: u32 = 1 << 20;

/// Errors of a connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The socket can't be connected to.
    #[error("can't connect to {path}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// Sending or receiving failed.
    #[error("can't {act} a vhost-user message")]
    Io {
        /// The failed action.
        act: &'static str,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// The other side has closed the connection.
    #[error("the connection was closed while message {request} waited for its reply")]
    Closed {
        /// The message's number, 0 if none waited.
        request: u32,
    },
    /// No reply in time.
    #[error("message {request} got no reply in time")]
    TimedOut {
        /// The message's number, 0 if none waited.
        request: u32,
    },
    /// A reply breaks the protocol.
    #[error("message {request} got a wrong reply: {what}")]
    BadReply {
        /// The message's number.
        request: u32,
        /// What is wrong.
        what: String,
    },
    /// The back end acknowledged with an error.
    #[error("the back end refused message {request} with {code}")]
    Refused {
        /// The message's number.
        request: u32,
        /// The acknowledgement: not 0.
        code: u64,
    },
    /// More file descriptors than a message can carry.
    #[error("{0} file descriptors don't fit in one message")]
    TooManyFds(usize),
    /// Guest memory did not resolve.
    #[error("an address is not in guest memory")]
    Memory(#[from] crate::memory::MemoryError),
}

/// A received message.
#[derive(Debug)]
pub struct Message {
    /// Number, flags and size.
    pub header: Header,
    /// The body.
    pub body: Vec<u8>,
    /// Its file descriptors.
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// The body as a value.
    ///
    /// # Errors
    /// [`ConnectionError::BadReply`] if it is shorter.
    pub fn value<T: FromBytes>(&self) -> Result<T, ConnectionError> {
        let value = T::read_from_prefix(&self.body);
        value.map(|(value, _rest)| value).map_err(|_short| {
            let len = self.body.len();
            bad_reply(self.header.request, format!("a body of {len} bytes"))
        })
    }
}

/// One end of a vhost-user connection. Dropping it is the front end's sudden death.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    timeout: Duration,
    protocol_features: u64,
    need_reply: bool,
}

impl Connection {
    /// A connection over this stream, with [`DEFAULT_TIMEOUT`].
    ///
    /// # Errors
    /// [`ConnectionError::Io`].
    pub fn new(stream: UnixStream) -> Result<Self, ConnectionError> {
        let mut connection = Self {
            stream,
            timeout: DEFAULT_TIMEOUT,
            protocol_features: 0,
            need_reply: false,
        };
        connection.set_timeout(DEFAULT_TIMEOUT)?;
        Ok(connection)
    }

    /// Connects to a listening back end.
    ///
    /// # Errors
    /// [`ConnectionError::Connect`].
    pub fn connect(path: impl AsRef<Path>) -> Result<Self, ConnectionError> {
        let path = path.as_ref();
        let stream = UnixStream::connect(path).map_err(|source| ConnectionError::Connect {
            path: path.to_owned(),
            source,
        })?;
        Self::new(stream)
    }

    /// How long sending and receiving may take from now on; not zero.
    ///
    /// # Errors
    /// [`ConnectionError::Io`].
    pub fn set_timeout(&mut self, timeout: Duration) -> Result<(), ConnectionError> {
        let set = |result: io::Result<()>| result.map_err(io_error("set the timeout of"));
        set(self.stream.set_read_timeout(Some(timeout)))?;
        set(self.stream.set_write_timeout(Some(timeout)))?;
        self.timeout = timeout;
        Ok(())
    }

    /// Whether each message asks for a reply from now on, if REPLY_ACK is negotiated, as Cloud
    /// Hypervisor does: the flag is set on messages that have a reply anyway, too.
    pub fn set_need_reply(&mut self, need_reply: bool) {
        self.need_reply = need_reply;
    }

    /// Performs `act` with replies requested, as QEMU does for some messages.
    ///
    /// # Errors
    /// Those of `act`.
    pub fn acknowledged<T>(
        &mut self,
        act: impl FnOnce(&mut Self) -> Result<T, ConnectionError>,
    ) -> Result<T, ConnectionError> {
        let before = std::mem::replace(&mut self.need_reply, true);
        let result = act(self);
        self.need_reply = before;
        result
    }

    /// Performs `act`, and returns when the back end has done it: with an acknowledgement if there is
    /// REPLY_ACK, else followed by a GET_FEATURES, as QEMU does.
    ///
    /// # Errors
    /// Those of `act`, and of [`Connection::get_features`].
    pub fn settled(
        &mut self,
        act: impl FnOnce(&mut Self) -> Result<(), ConnectionError>,
    ) -> Result<(), ConnectionError> {
        self.acknowledged(act)?;
        if !self.has(protocol::REPLY_ACK) {
            self.get_features()?;
        }
        Ok(())
    }

    /// The protocol features that were set last.
    #[must_use]
    pub fn protocol_features(&self) -> u64 {
        self.protocol_features
    }

    /// Whether all these protocol features are set.
    #[must_use]
    pub fn has(&self, features: u64) -> bool {
        self.protocol_features & features == features
    }

    /// The stream, for tests that need more than the methods.
    #[must_use]
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends one message as it is. `flags` should contain [`flag::VERSION`].
    ///
    /// # Errors
    /// [`ConnectionError::Io`], [`ConnectionError::TooManyFds`].
    pub fn send(
        &mut self,
        request: u32,
        flags: u32,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ConnectionError> {
        let header = Header {
            request,
            flags,
            size: u32::try_from(body.len()).unwrap_or(u32::MAX),
        };
        self.send_parts(&[header.as_bytes(), body], fds)
    }

    /// Sends a header whose size may lie, and a body.
    ///
    /// # Errors
    /// As [`Connection::send`].
    pub fn send_with_header(
        &mut self,
        header: Header,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ConnectionError> {
        self.send_parts(&[header.as_bytes(), body], fds)
    }

    /// Sends bytes that need not be a message.
    ///
    /// # Errors
    /// As [`Connection::send`].
    pub fn send_bytes(
        &mut self,
        bytes: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ConnectionError> {
        self.send_parts(&[bytes], fds)
    }

    /// Receives any message.
    ///
    /// # Errors
    /// [`ConnectionError::TimedOut`], [`ConnectionError::Closed`], [`ConnectionError::Io`].
    pub fn recv(&mut self) -> Result<Message, ConnectionError> {
        self.recv_for(0)
    }

    /// Receives the reply to `request`, and checks that it is one.
    ///
    /// # Errors
    /// As [`Connection::recv`], and [`ConnectionError::BadReply`].
    pub fn recv_reply(&mut self, request: u32) -> Result<Message, ConnectionError> {
        let message = self.recv_for(request)?;
        let header = message.header;
        if header.request != request {
            let what = format!("it answers message {}", header.request);
            return Err(bad_reply(request, what));
        }
        if header.flags & (0b11 | flag::REPLY) != flag::VERSION | flag::REPLY {
            let what = format!("flags {:#x}", header.flags);
            return Err(bad_reply(request, what));
        }
        Ok(message)
    }

    /// Replies to a message of the other side, as the socket of SET_BACKEND_REQ_FD needs it.
    ///
    /// # Errors
    /// As [`Connection::send`].
    pub fn reply(&mut self, request: u32, body: &[u8]) -> Result<(), ConnectionError> {
        self.send(request, flag::VERSION | flag::REPLY, body, &[])
    }

    /// Waits until the other side closes the connection.
    ///
    /// # Errors
    /// [`ConnectionError::TimedOut`], or [`ConnectionError::BadReply`] if a message comes
    /// instead.
    pub fn wait_closed(&mut self) -> Result<(), ConnectionError> {
        match self.recv() {
            Err(ConnectionError::Closed { .. }) => Ok(()),
            Err(error) => Err(error),
            Ok(message) => Err(bad_reply(
                message.header.request,
                "the connection should have been closed".to_owned(),
            )),
        }
    }

    /// Sends a message that has no reply of its own, and waits for the acknowledgement if replies
    /// are requested.
    ///
    /// # Errors
    /// As [`Connection::recv_reply`], and [`ConnectionError::Refused`].
    pub fn command(
        &mut self,
        request: u32,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ConnectionError> {
        self.send(request, self.flags(), body, fds)?;
        if self.flags() & flag::NEED_REPLY == 0 {
            return Ok(());
        }
        match self.recv_reply(request)?.value::<u64>()? {
            0 => Ok(()),
            code => Err(ConnectionError::Refused { request, code }),
        }
    }

    /// Sends a message that has a reply, and waits for it.
    ///
    /// # Errors
    /// As [`Connection::recv_reply`].
    pub fn query(
        &mut self,
        request: u32,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Message, ConnectionError> {
        self.send(request, self.flags(), body, fds)?;
        self.recv_reply(request)
    }

    fn flags(&self) -> u32 {
        if self.need_reply && self.has(protocol::REPLY_ACK) {
            flag::VERSION | flag::NEED_REPLY
        } else {
            flag::VERSION
        }
    }

    fn send_parts(
        &mut self,
        parts: &[&[u8]],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ConnectionError> {
        if fds.len() > MAX_FDS {
            return Err(ConnectionError::TooManyFds(fds.len()));
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(ConnectionError::TooManyFds(fds.len()));
        }
        let bytes = parts.concat();
        let mut left = bytes.as_slice();
        while !left.is_empty() {
            let slices = [IoSlice::new(left)];
            match sendmsg(&self.stream, &slices, &mut control, SendFlags::NOSIGNAL) {
                Ok(sent) => {
                    left = left.get(sent..).unwrap_or_default();
                    control.clear();
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(io_error("send")(errno.into())),
            }
        }
        Ok(())
    }

    fn recv_for(&mut self, request: u32) -> Result<Message, ConnectionError> {
        let mut header = Header::new_zeroed();
        let mut fds = Vec::new();
        self.recv_exact(request, header.as_mut_bytes(), &mut fds)?;
        if header.size > MAX_BODY {
            let what = format!("it is {} bytes long", header.size);
            return Err(bad_reply(request, what));
        }
        let mut body = vec![0; header.size as usize];
        self.recv_exact(request, &mut body, &mut fds)?;
        Ok(Message { header, body, fds })
    }

    fn recv_exact(
        &mut self,
        request: u32,
        bytes: &mut [u8],
        fds: &mut Vec<OwnedFd>,
    ) -> Result<(), ConnectionError> {
        let mut left = bytes;
        while !left.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut slices = [IoSliceMut::new(left)];
            let flags = RecvFlags::CMSG_CLOEXEC;
            let received = match recvmsg(&self.stream, &mut slices, &mut control, flags) {
                Ok(received) => received.bytes,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Err(ConnectionError::TimedOut { request }),
                Err(Errno::CONNRESET) => return Err(ConnectionError::Closed { request }),
                Err(errno) => return Err(io_error("receive")(errno.into())),
            };
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    fds.extend(rights);
                }
            }
            if received == 0 {
                return Err(ConnectionError::Closed { request });
            }
            left = left.get_mut(received..).unwrap_or_default();
        }
        Ok(())
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn io_error(act: &'static str) -> impl Fn(io::Error) -> ConnectionError {
    move |source| ConnectionError::Io { act, source }
}

fn bad_reply(request: u32, what: String) -> ConnectionError {
    ConnectionError::BadReply { request, what }
}

#[cfg(test)]
mod tests;
