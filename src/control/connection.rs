//! One client's connection: the line that arrives, and the reply that is on its way.
//!
//! Nothing here waits. The invariant: a client has at most one request that isn't answered, a line
//! of at most [`MAX_LINE`] bytes, one descriptor, and [`TIMEOUT`] to complete either.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use serde_json::Value;

use super::protocol::{Code, Failure, Request, reply};
use crate::sys::rights;

/// How many clients may be connected. One more replaces the one that has been idle for longest.
pub(crate) const MAX_CLIENTS: usize = 16;

/// The longest request, in bytes.
const MAX_LINE: usize = 64 << 10;

/// How many bytes are read at once.
const CHUNK: usize = 4096;

/// How long a client may take to complete a request that it has begun, or to read a reply.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A client's connection.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    input: Vec<u8>,
    /// The first descriptor that came with the line.
    descriptor: Option<OwnedFd>,
    output: Vec<u8>,
    sent: usize,
    /// When the client must have completed its request, or have read the reply.
    deadline: Option<Instant>,
    last_active: Instant,
    /// Is closed once the reply is sent.
    closing: bool,
    /// The client sends no more.
    ended: bool,
}

/// The connection is of no use any more.
#[derive(Debug)]
pub(super) struct Ended;

impl Connection {
    pub(super) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            input: Vec::new(),
            descriptor: None,
            output: Vec::new(),
            sent: 0,
            deadline: None,
            last_active: Instant::now(),
            closing: false,
            ended: false,
        })
    }

    /// What to wait for.
    pub(super) fn interest(&self) -> PollFlags {
        if !self.output.is_empty() {
            PollFlags::OUT
        } else if self.ended {
            PollFlags::empty()
        } else {
            PollFlags::IN
        }
    }

    /// Until when to wait for it.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    pub(super) fn last_active(&self) -> Instant {
        self.last_active
    }

    /// Whether a request is complete that was not answered.
    pub(super) fn has_request(&self) -> bool {
        self.output.is_empty() && !self.closing && self.input.contains(&b'\n')
    }

    /// Receives and sends what there is, after an event or a time-out.
    pub(super) fn progress(&mut self, events: PollFlags, now: Instant) -> Result<(), Ended> {
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            return Err(Ended);
        }
        if !self.output.is_empty() {
            return self.send();
        }
        if events.is_empty() || self.ended {
            return Ok(());
        }
        self.receive(now)
    }

    fn receive(&mut self, now: Instant) -> Result<(), Ended> {
        let mut bytes = [0; CHUNK];
        let received = match rights::receive_one(&self.stream, &mut bytes, RecvFlags::DONTWAIT) {
            Ok(received) => received,
            Err(Errno::AGAIN) => return Ok(()),
            Err(_) => return Err(Ended),
        };
        if received.len == 0 {
            self.ended = true;
            // It may still read the replies to what it has sent.
            return if self.has_request() {
                Ok(())
            } else {
                Err(Ended)
            };
        }
        self.last_active = now;
        if self.descriptor.is_none() {
            self.descriptor = received.fds.into_iter().next();
        }
        self.input.extend_from_slice(&bytes[..received.len]);
        // Not extended by more bytes: a client can't hold its place by one byte now and then.
        self.deadline.get_or_insert(now + TIMEOUT);
        if !self.input.contains(&b'\n') && self.input.len() > MAX_LINE {
            let failure = Failure::new(
                Code::Malformed,
                format!("a request has at most {MAX_LINE} bytes"),
            );
            self.refuse(failure);
        }
        Ok(())
    }

    /// Takes the next request, if there is a complete one.
    pub(super) fn take_request(&mut self) -> Option<Request> {
        if !self.has_request() {
            return None;
        }
        let end = self.input.iter().position(|byte| *byte == b'\n')?;
        let request = Request::parse(&self.input[..end], self.descriptor.take());
        self.input.drain(..=end);
        Some(request)
    }

    /// Begins to send a reply.
    pub(super) fn answer(&mut self, id: Option<Value>, outcome: Result<Value, Failure>) {
        self.output = reply(id, outcome);
        self.sent = 0;
        self.deadline = Some(Instant::now() + TIMEOUT);
        self.last_active = Instant::now();
    }

    /// Refuses the client, and closes the connection after that.
    pub(super) fn refuse(&mut self, failure: Failure) {
        self.closing = true;
        self.input.clear();
        self.answer(None, Err(failure));
    }

    /// Sends as much of the reply as the socket takes.
    pub(super) fn send(&mut self) -> Result<(), Ended> {
        while let Some(rest) = self.output.get(self.sent..).filter(|rest| !rest.is_empty()) {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::send(&self.stream, rest, flags) {
                Ok(sent) => self.sent += sent,
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(_) => return Err(Ended),
            }
        }
        if self.closing {
            return Err(Ended);
        }
        self.output = Vec::new();
        self.sent = 0;
        if self.ended && !self.has_request() {
            return Err(Ended);
        }
        self.deadline = (!self.input.is_empty()).then(|| Instant::now() + TIMEOUT);
        Ok(())
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Whether an error of `accept(2)` is that of the connection alone.
pub(super) fn is_of_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::Interrupted | ErrorKind::WouldBlock | ErrorKind::ConnectionAborted
    )
}
