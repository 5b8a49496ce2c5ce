//! Handles the messages of one session in order, and saves a snapshot at each step.
//!
//! The loop saves a message before it takes the message off the socket, and saves what the message
//! changes before it sends the reply. So a process that resumes the session after this one was
//! killed handles each message once. A front end that waits for a reply gets it once: the kernel
//! records in the table how much of the reply was sent, in the system call that sends it
//! (`sys/receipt.rs`). The invariant: a descriptor that the snapshot in the table names is open.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use vhost::vhost_user::Error as ProtocolError;
use vhost::vhost_user::message::FrontendReq;

use super::connection::Connection;
use super::dispatch::Handled;
use super::message::{FdMessage, Header};
use super::message_reader::{self, Incoming, Readable};
use super::restore::{self, OpenDescriptors};
use super::session::{End, Session, SessionError};
use super::session_snapshot::{EncodedState, Pending, SessionSnapshot};
use super::shared_memory::{self, PrivateMemoryCheck};
use super::{Runner, Stop};
use crate::state::Table;

/// One front end and its session.
pub(super) struct SessionLoop<'a, R: Runner> {
    connection: Connection,
    session: Session<'a, R>,
    table: &'a Arc<Table>,
    /// The session as the snapshot in the table has it, without the pending message.
    state: EncodedState,
    /// Keeps the descriptors open that the snapshot in the table names.
    open: OpenDescriptors,
    /// Detects a VMM that has not shared its memory.
    private_memory: PrivateMemoryCheck,
}

impl<'a, R: Runner> SessionLoop<'a, R> {
    pub(super) fn new(stream: UnixStream, session: Session<'a, R>, table: &'a Arc<Table>) -> Self {
        Self {
            connection: Connection::new(stream),
            session,
            table,
            state: EncodedState::default(),
            open: OpenDescriptors::default(),
            private_memory: PrivateMemoryCheck::default(),
        }
    }

    /// Handles messages until the front end disconnects or `stop` fires. Starts a new session, or
    /// resumes the one of `snapshot`.
    pub(super) fn run(
        mut self,
        snapshot: Option<SessionSnapshot>,
        stop: Stop<'_>,
    ) -> Result<End, SessionError> {
        let started = match snapshot {
            None => {
                self.save(&Pending::Nothing);
                Ok(None)
            }
            Some(snapshot) => self.resume(snapshot),
        };
        let end = match started {
            Ok(None) => self.receive_messages(stop),
            Ok(Some(end)) => Ok(end),
            Err(error) => Err(error),
        };
        self.session.stop_all();
        if matches!(end, Ok(End::Stopped)) && stop.leaves() {
            // The process that resumes the session shares these descriptors, and needs them open.
            std::mem::forget(self);
            return Ok(End::Left);
        }
        self.session.end();
        self.table.set_session_snapshot(&[]);
        end
    }

    /// Receives and handles messages until the session ends.
    fn receive_messages(&mut self, stop: Stop<'_>) -> Result<End, SessionError> {
        loop {
            let kick = self
                .private_memory
                .awaits_kick()
                .then(|| self.session.first_kick())
                .flatten();
            let watch = self.private_memory.watch(kick.as_ref());
            let heartbeat = self.session.heartbeat();
            let incoming =
                message_reader::wait(&self.connection.socket, stop.asked, watch, heartbeat)
                    .map_err(SessionError::socket)?;
            let readable = match incoming {
                Incoming::HeartbeatDue => continue,
                Incoming::WatchFired => {
                    if self.private_memory.watch_fired() {
                        self.session.warn_of_private_memory();
                    }
                    continue;
                }
                Incoming::Message(Readable { len: 0, .. }) => return Ok(End::Disconnected),
                Incoming::Message(readable) => readable,
                Incoming::Stop if self.session.reports() => continue,
                Incoming::Stop => return Ok(End::Stopped),
                Incoming::Stalled { have } => return Err(SessionError::Stalled { have }),
            };
            let message = self.take(readable)?;
            if let Some(end) = self.handle_message(message)? {
                return Ok(end);
            }
        }
    }

    /// Takes a message off the socket, after it was recorded.
    fn take(&mut self, readable: Readable) -> Result<FdMessage, SessionError> {
        let Readable { len, bytes } = readable;
        let peeked = match bytes {
            Some(bytes) => Some(FdMessage {
                bytes,
                fds: Vec::new(),
            }),
            None => self.connection.peek(len).map_err(SessionError::socket)?,
        };
        let Some(mut message) = peeked else {
            let message = self.connection.receive(len).map_err(SessionError::socket)?;
            self.record(&Pending::message(&message));
            return Ok(message);
        };
        self.record(&Pending::message(&message));
        let has_fds = self
            .connection
            .discard(&message)
            .map_err(SessionError::socket)?;
        match (has_fds, message.fds.is_empty()) {
            (true, true) => Err(ProtocolError::IncorrectFds.into()),
            (false, false) => {
                // They are those of the message that follows. The snapshot names them, so they are
                // closed only after it is replaced.
                let of_next = std::mem::take(&mut message.fds);
                self.record(&Pending::message(&message));
                drop(of_next);
                Ok(message)
            }
            (true, false) | (false, true) => Ok(message),
        }
    }

    /// Handles a message and sends the reply.
    fn handle_message(&mut self, message: FdMessage) -> Result<Option<End>, SessionError> {
        let Handled { reply, outcome } = self.session.handle(&message);
        let sent = match &reply {
            None => {
                self.save(&Pending::Nothing);
                Ok(None)
            }
            Some(reply) => {
                // The receipt must be empty before the snapshot names the reply that it is about.
                if let Some(receipt) = self.table.receipt() {
                    receipt.clear();
                }
                self.save(&Pending::reply(reply));
                let sent = self.send_reply(reply);
                self.record(&Pending::Nothing);
                sent
            }
        };
        let not_shared = outcome.is_err().then(|| shared_memory::diagnose(&message));
        // The snapshot no longer names their descriptors.
        drop((message, reply));
        match not_shared.flatten() {
            Some(error) => Err(error),
            None => outcome.and(sent),
        }
    }

    /// Sends what the front end has not received yet of a reply that the snapshot names.
    fn send_reply(&self, reply: &FdMessage) -> Result<Option<End>, SessionError> {
        match self.connection.send_reply(reply, self.table.receipt()) {
            Ok(()) => Ok(None),
            Err(error) => match error.kind() {
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                    Ok(Some(End::Disconnected))
                }
                _ => Err(SessionError::socket(error)),
            },
        }
    }

    /// Saves a snapshot of the session in the table. Descriptors that it no longer names are closed
    /// only afterwards.
    fn save(&mut self, pending: &Pending) {
        let (mut snapshot, open) = self.session.snapshot();
        snapshot.socket = self.connection.socket.as_raw_fd();
        self.state = snapshot.encode_state();
        self.record(pending);
        self.open = open;
        self.session.saved();
    }

    /// As [`save`](Self::save), if nothing of the session has changed since.
    fn record(&self, pending: &Pending) {
        self.table.set_session_snapshot(&self.state.with(pending));
    }

    /// Restores the session from the snapshot, and handles the pending message.
    fn resume(&mut self, mut snapshot: SessionSnapshot) -> Result<Option<End>, SessionError> {
        let pending = std::mem::take(&mut snapshot.pending);
        self.session.restore(&snapshot)?;
        self.session.resumed();
        match pending {
            Pending::Nothing => {
                self.save(&Pending::Nothing);
                Ok(None)
            }
            Pending::Message(bytes, fds) => {
                let saved = FdMessage {
                    bytes,
                    fds: restore::adopt_all(&fds)?,
                };
                self.save(&Pending::message(&saved));
                let message = match self.duplicate(&saved)? {
                    Some(duplicate) => duplicate,
                    None => saved,
                };
                self.handle_message(message)
            }
            Pending::Reply(bytes, fds) => {
                let reply = FdMessage {
                    bytes,
                    fds: restore::adopt_all(&fds)?,
                };
                self.save(&Pending::reply(&reply));
                let sent = self.send_reply(&reply)?;
                self.record(&Pending::Nothing);
                Ok(sent)
            }
        }
    }

    /// Takes a message off the socket if it is the one that was saved. Of two messages with the
    /// same bytes whose sender expects no reply, the second may carry other descriptors, so it is
    /// left on the socket. If it was the saved one after all, handling it twice does no harm.
    fn duplicate(&self, message: &FdMessage) -> Result<Option<FdMessage>, SessionError> {
        let len = message.bytes.len();
        let next = match self.connection.peek(len) {
            Ok(next) => next,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(error) => return Err(SessionError::socket(error)),
        };
        let only_once = |header: Header| {
            header.needs_reply() || header.request == u32::from(FrontendReq::ADD_MEM_REG)
        };
        let handle_once =
            message.fds.is_empty() || Header::read(&message.bytes).is_some_and(only_once);
        if handle_once && next.is_some_and(|next| next.bytes == message.bytes) {
            return self
                .connection
                .receive(len)
                .map(Some)
                .map_err(SessionError::socket);
        }
        Ok(None)
    }
}

impl Pending {
    fn message(message: &FdMessage) -> Self {
        Self::Message(message.bytes.clone(), numbers(message))
    }

    fn reply(message: &FdMessage) -> Self {
        Self::Reply(message.bytes.clone(), numbers(message))
    }
}

fn numbers(message: &FdMessage) -> Vec<std::os::fd::RawFd> {
    message.fds.iter().map(AsRawFd::as_raw_fd).collect()
}
