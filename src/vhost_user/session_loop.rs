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
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vhost::vhost_user::{BackendReqHandler, Error as ProtocolError};

use super::message_reader::{self, Incoming};
use super::proxy::{FdMessage, Proxy};
use super::restore::{self, OpenDescriptors};
use super::session::{End, Session, SessionError};
use super::session_snapshot::{Pending, SessionSnapshot};
use super::shared_memory::{self, PrivateMemoryCheck};
use super::{Runner, Stop};
use crate::state::Table;

/// `VHOST_USER_NEED_REPLY_MASK`, in a message's flags.
const NEED_REPLY: u32 = 1 << 3;

/// `VHOST_USER_ADD_MEM_REG`.
const ADD_MEM_REG: u32 = 37;

/// One front end and its session.
pub(super) struct SessionLoop<'a, R: Runner> {
    proxy: Proxy,
    session: Arc<Mutex<Session<'a, R>>>,
    handler: BackendReqHandler<Mutex<Session<'a, R>>>,
    table: &'a Arc<Table>,
    /// Keeps the descriptors open that the snapshot in the table names.
    open: OpenDescriptors,
    /// Detects a VMM that has not shared its memory.
    private_memory: PrivateMemoryCheck,
}

impl<'a, R: Runner + Send> SessionLoop<'a, R> {
    pub(super) fn new(
        stream: UnixStream,
        session: Session<'a, R>,
        table: &'a Arc<Table>,
    ) -> Result<Self, SessionError> {
        let (proxy, vhost_end) = Proxy::new(stream).map_err(SessionError::socket)?;
        let session = Arc::new(Mutex::new(session));
        let handler = BackendReqHandler::from_stream(vhost_end, Arc::clone(&session));
        Ok(Self {
            proxy,
            session,
            handler,
            table,
            open: OpenDescriptors::default(),
            private_memory: PrivateMemoryCheck::default(),
        })
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
                self.save(Pending::Nothing);
                Ok(None)
            }
            Some(snapshot) => self.resume(snapshot),
        };
        let end = match started {
            Ok(None) => self.handle(stop),
            Ok(Some(end)) => Ok(end),
            Err(error) => Err(error),
        };
        self.session
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .stop_all();
        if matches!(end, Ok(End::Stopped)) && stop.leaves() {
            // The process that resumes the session shares these descriptors, and needs them open.
            std::mem::forget(self);
            return Ok(End::Left);
        }
        self.table.set_session_snapshot(&[]);
        end
    }

    fn lock(&self) -> MutexGuard<'_, Session<'a, R>> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Receives and handles messages until the session ends.
    fn handle(&mut self, stop: Stop<'_>) -> Result<End, SessionError> {
        loop {
            let kick = self
                .private_memory
                .awaits_kick()
                .then(|| self.lock().first_kick());
            let watch = self
                .private_memory
                .watch(kick.as_ref().and_then(Option::as_ref));
            let heartbeat = self.lock().heartbeat();
            let incoming = message_reader::wait(&self.proxy.socket, stop.asked, watch, heartbeat);
            let (len, last) = match incoming {
                Ok(Incoming::HeartbeatDue) => continue,
                Ok(Incoming::WatchFired) => {
                    if self.private_memory.watch_fired() {
                        self.lock().warn_of_private_memory();
                    }
                    continue;
                }
                Ok(Incoming::Message { len: 0, .. }) => return Ok(End::Disconnected),
                Ok(Incoming::Message { len, last }) => (len, last),
                Ok(Incoming::Stop) => return Ok(End::Stopped),
                Ok(Incoming::Stalled { have }) => return Err(SessionError::Stalled { have }),
                Err(error) => return Err(SessionError::socket(error)),
            };
            let peeked = self.proxy.peek(len).map_err(SessionError::socket)?;
            if let Some(peeked) = &peeked {
                self.save(Pending::message(peeked));
            }
            let received = self.proxy.receive(len).map_err(SessionError::socket)?;
            let message = match peeked {
                // The snapshot names the descriptors of the peeked message, so keep these open.
                Some(peeked) if peeked.fds.len() == received.fds.len() => peeked,
                peeked => {
                    self.save(Pending::message(&received));
                    drop(peeked);
                    received
                }
            };
            if let Some(end) = self.handle_message(message, last)? {
                return Ok(end);
            }
        }
    }

    /// Handles a message and sends the reply.
    fn handle_message(
        &mut self,
        message: FdMessage,
        last: bool,
    ) -> Result<Option<End>, SessionError> {
        self.proxy
            .forward(&message, last)
            .map_err(SessionError::socket)?;
        let outcome = self.handler.handle_request();
        let reply = self.proxy.take_reply().map_err(SessionError::socket)?;
        let sent = match &reply {
            None => Ok(None),
            Some(reply) => {
                // The receipt must be empty before the snapshot names the reply that it is about.
                if let Some(receipt) = self.table.receipt() {
                    receipt.clear();
                }
                self.save(Pending::reply(reply));
                self.send_reply(reply)
            }
        };
        self.save(Pending::Nothing);
        let not_shared = outcome.is_err().then(|| shared_memory::diagnose(&message));
        // The snapshot no longer names their descriptors.
        drop((message, reply));
        if let Some(error) = not_shared.flatten() {
            return Err(error);
        }
        match outcome {
            Ok(()) => sent,
            Err(ProtocolError::Disconnected) => Ok(Some(End::Disconnected)),
            Err(error) => Err(session_error(error)),
        }
    }

    /// Sends what the front end has not received yet of a reply that the snapshot names.
    fn send_reply(&self, reply: &FdMessage) -> Result<Option<End>, SessionError> {
        match self.proxy.send_reply(reply, self.table.receipt()) {
            Ok(()) => Ok(None),
            Err(error) => match error.kind() {
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                    Ok(Some(End::Disconnected))
                }
                _ => Err(SessionError::socket(error)),
            },
        }
    }

    /// Saves a snapshot in the table. Descriptors that it no longer names are closed only
    /// afterwards.
    fn save(&mut self, pending: Pending) {
        let session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut snapshot, open) = session.snapshot();
        drop(session);
        snapshot.socket = self.proxy.socket.as_raw_fd();
        snapshot.pending = pending;
        self.table.set_session_snapshot(&snapshot.encode());
        self.open = open;
    }

    /// Restores `vhost` and the session from the snapshot, and handles the pending message.
    fn resume(&mut self, mut snapshot: SessionSnapshot) -> Result<Option<End>, SessionError> {
        for message in restore::negotiation(&snapshot) {
            let message = FdMessage {
                bytes: message,
                fds: Vec::new(),
            };
            self.proxy
                .forward(&message, false)
                .map_err(SessionError::socket)?;
            self.handler.handle_request().map_err(session_error)?;
            // The front end received this reply from the previous process.
            self.proxy.take_reply().map_err(SessionError::socket)?;
        }
        let pending = std::mem::take(&mut snapshot.pending);
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        session.restore(&snapshot)?;
        session.resumed();
        drop(session);
        match pending {
            Pending::Nothing => {
                self.save(Pending::Nothing);
                Ok(None)
            }
            Pending::Message(bytes, fds) => {
                let saved = FdMessage {
                    bytes,
                    fds: restore::adopt_all(&fds)?,
                };
                self.save(Pending::message(&saved));
                let message = match self.duplicate(&saved)? {
                    Some(duplicate) => duplicate,
                    None => saved,
                };
                self.handle_message(message, false)
            }
            Pending::Reply(bytes, fds) => {
                let reply = FdMessage {
                    bytes,
                    fds: restore::adopt_all(&fds)?,
                };
                self.save(Pending::reply(&reply));
                let sent = self.send_reply(&reply)?;
                self.save(Pending::Nothing);
                Ok(sent)
            }
        }
    }

    /// Takes a message off the socket if it is the one that was saved. Of two messages with the
    /// same bytes whose sender expects no reply, the second may carry other descriptors, so it is
    /// left on the socket. If it was the saved one after all, handling it twice does no harm.
    fn duplicate(&self, message: &FdMessage) -> Result<Option<FdMessage>, SessionError> {
        let len = message.bytes.len();
        let next = match self.proxy.peek(len) {
            Ok(next) => next,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(error) => return Err(SessionError::socket(error)),
        };
        let word = |at: usize| {
            let bytes = message.bytes.get(at..).and_then(<[u8]>::first_chunk);
            bytes.map_or(0, |bytes| u32::from_ne_bytes(*bytes))
        };
        let handle_once =
            message.fds.is_empty() || word(4) & NEED_REPLY != 0 || word(0) == ADD_MEM_REG;
        if handle_once && next.is_some_and(|next| next.bytes == message.bytes) {
            return self
                .proxy
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

/// Unwraps a [`SessionError`] that a handler returned through `vhost`'s error type.
fn session_error(error: ProtocolError) -> SessionError {
    match error {
        ProtocolError::ReqHandlerError(inner) => inner
            .downcast()
            .unwrap_or_else(|inner| SessionError::Protocol(ProtocolError::ReqHandlerError(inner))),
        other => SessionError::Protocol(other),
    }
}
