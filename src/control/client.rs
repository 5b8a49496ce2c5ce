//! The client's end of the control socket.
//!
//! The invariant: no call takes longer than its time-outs, whatever the server does.

use std::io::{self, BufRead, BufReader, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde_json::{Map, Value};

use super::protocol::{Failure, VERSION, request};
use crate::sys::supervision::peer;

/// How long a command may take. Closing many files takes the longest.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Why a call has no result.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    /// No server listens.
    #[error("connecting to {path}: does a server run with --control unix:{path}?")]
    Connect {
        /// The path of the socket.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The server doesn't take the request, or doesn't answer.
    #[error("asking the server")]
    Ask(#[source] io::Error),
    /// The server has closed the connection.
    #[error("the server has closed the connection: it has ended, or is being replaced")]
    Closed,
    /// The reply can't be understood.
    #[error("the reply of the server is not of version {VERSION} of the protocol: {0}")]
    Reply(String),
    /// The server refuses.
    #[error(transparent)]
    Refused(#[from] Failure),
}

/// A connection to a server.
#[derive(Debug)]
pub(crate) struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects to the control socket at `path`.
    ///
    /// # Errors
    ///
    /// No server listens there, or this user may not connect.
    pub(crate) fn connect(path: &Path) -> Result<Self, CallError> {
        Self::connect_within(path, TIMEOUT)
    }

    /// As [`connect`](Self::connect), for commands that take no longer than `timeout`.
    ///
    /// # Errors
    ///
    /// As for `connect`.
    pub(crate) fn connect_within(path: &Path, timeout: Duration) -> Result<Self, CallError> {
        let failed = |source| CallError::Connect {
            path: path.to_owned(),
            source,
        };
        let stream = UnixStream::connect(path).map_err(failed)?;
        stream.set_read_timeout(Some(timeout)).map_err(failed)?;
        stream.set_write_timeout(Some(timeout)).map_err(failed)?;
        Ok(Self {
            stream: BufReader::new(stream),
        })
    }

    /// The process that has begun to listen: the one that the launcher has started.
    ///
    /// # Errors
    ///
    /// Those of `getsockopt(2)`.
    pub(crate) fn server(&self) -> io::Result<i32> {
        Ok(peer(self.stream.get_ref())?.pid)
    }

    /// Asks for a command, and returns its result.
    ///
    /// # Errors
    ///
    /// See [`CallError`].
    pub(crate) fn call(
        &mut self,
        command: &str,
        arguments: &Map<String, Value>,
        descriptor: Option<BorrowedFd<'_>>,
    ) -> Result<Value, CallError> {
        let line = request(command, arguments);
        let mut rest = &line[..];
        let mut descriptor = descriptor.as_slice();
        while !rest.is_empty() {
            let sent = send(self.stream.get_ref(), rest, descriptor);
            rest = match sent {
                Ok(sent) => rest.get(sent..).unwrap_or_default(),
                // A server that refuses closes the connection after it has said why.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => break,
                Err(error) => return Err(CallError::Ask(error)),
            };
            // They come with the first byte.
            descriptor = &[];
        }
        let mut reply = String::new();
        match self.stream.read_line(&mut reply) {
            Ok(0) => return Err(CallError::Closed),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                return Err(CallError::Closed);
            }
            Err(error) => return Err(CallError::Ask(error)),
        }
        let strange = |reason: String| CallError::Reply(reason);
        let mut reply = match serde_json::from_str(&reply) {
            Ok(Value::Object(reply)) => reply,
            Ok(_) => return Err(strange("it is no object".to_owned())),
            Err(error) => return Err(strange(error.to_string())),
        };
        if let Some(error) = reply.get("error") {
            return Err(Failure::from_json(error).into());
        }
        let result = reply.remove("result");
        result.ok_or_else(|| strange("it has no result".to_owned()))
    }
}

fn send(stream: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    let sent = rustix::io::retry_on_intr(|| {
        let bytes = [IoSlice::new(bytes)];
        rustix::net::sendmsg(stream.as_fd(), &bytes, &mut control, SendFlags::NOSIGNAL)
    });
    Ok(sent?)
}
