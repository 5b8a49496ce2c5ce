//! The messages of one session, one after the other, and what is kept of them.
//!
//! Whatever a message changes is written down before it is answered, and the message itself before
//! it is taken off the socket. So a process that goes on with the session after this one was
//! killed deals with each message once, and a front end that waits for an answer gets it, once: how
//! much of it was sent the kernel writes into the table, in the very call that sends it
//! (`sys/receipt.rs`). The invariant: a descriptor that the table's block names is open.

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
use super::shared_memory::{self, Suspicion};
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
    /// What the block in the table names.
    held: OpenDescriptors,
    /// That the VMM's memory is another than this server's.
    suspicion: Suspicion,
}

impl<'a, R: Runner + Send> SessionLoop<'a, R> {
    pub(super) fn new(
        stream: UnixStream,
        session: Session<'a, R>,
        table: &'a Arc<Table>,
    ) -> Result<Self, SessionError> {
        let (proxy, theirs) = Proxy::new(stream).map_err(SessionError::socket)?;
        let session = Arc::new(Mutex::new(session));
        let handler = BackendReqHandler::from_stream(theirs, Arc::clone(&session));
        Ok(Self {
            proxy,
            session,
            handler,
            table,
            held: OpenDescriptors::default(),
            suspicion: Suspicion::default(),
        })
    }

    /// Talks until the front end goes or `stop` says so; from the beginning, or from where
    /// `record` says that it was.
    pub(super) fn run(
        mut self,
        record: Option<SessionSnapshot>,
        stop: Stop<'_>,
    ) -> Result<End, SessionError> {
        let begun = match record {
            None => {
                self.save(Pending::Nothing);
                Ok(None)
            }
            Some(record) => self.go_on(record),
        };
        let end = match begun {
            Ok(None) => self.handle(stop),
            Ok(Some(end)) => Ok(end),
            Err(error) => Err(error),
        };
        self.session
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .stop_all();
        if matches!(end, Ok(End::Stopped)) && stop.leaves() {
            // Whoever goes on has the same descriptors, and wants them open.
            std::mem::forget(self);
            return Ok(End::Left);
        }
        self.table.set_front(&[]);
        end
    }

    fn lock(&self) -> MutexGuard<'_, Session<'a, R>> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn handle(&mut self, stop: Stop<'_>) -> Result<End, SessionError> {
        loop {
            let kick = self.suspicion.is_open().then(|| self.lock().first_kick());
            let watch = self.suspicion.watch(kick.as_ref().and_then(Option::as_ref));
            let (len, last) = match message_reader::wait(&self.proxy.socket, stop.asked, watch) {
                Ok(Incoming::Watched) => {
                    if self.suspicion.is_due() {
                        self.lock().tell_of_private_memory();
                    }
                    continue;
                }
                Ok(Incoming::Message { len: 0, .. }) => return Ok(End::Disconnected),
                Ok(Incoming::Message { len, last }) => (len, last),
                Ok(Incoming::Stop) => return Ok(End::Stopped),
                Ok(Incoming::Stalled { have }) => return Err(SessionError::Stalled { have }),
                Err(error) => return Err(SessionError::socket(error)),
            };
            let seen = self.proxy.look(len).map_err(SessionError::socket)?;
            if let Some(seen) = &seen {
                self.save(Pending::message(seen));
            }
            let taken = self.proxy.take(len).map_err(SessionError::socket)?;
            let message = match seen {
                // Its descriptors are the ones that are written down, so they stay open.
                Some(seen) if seen.fds.len() == taken.fds.len() => seen,
                seen => {
                    self.save(Pending::message(&taken));
                    drop(seen);
                    taken
                }
            };
            if let Some(end) = self.deal_with(message, last)? {
                return Ok(end);
            }
        }
    }

    /// Does what a message says, and answers it.
    fn deal_with(&mut self, message: FdMessage, last: bool) -> Result<Option<End>, SessionError> {
        self.proxy
            .forward(&message, last)
            .map_err(SessionError::socket)?;
        let outcome = self.handler.handle_request();
        let answer = self.proxy.answer().map_err(SessionError::socket)?;
        let sent = match &answer {
            None => Ok(None),
            Some(answer) => {
                // Before the answer stands there that it is about.
                if let Some(receipt) = self.table.receipt() {
                    receipt.clear();
                }
                self.save(Pending::reply(answer));
                self.answer(answer)
            }
        };
        self.save(Pending::Nothing);
        let missing = outcome.is_err().then(|| shared_memory::missing(&message));
        // What came and went with them is named no more.
        drop((message, answer));
        if let Some(error) = missing.flatten() {
            return Err(error);
        }
        match outcome {
            Ok(()) => sent,
            Err(ProtocolError::Disconnected) => Ok(Some(End::Disconnected)),
            Err(error) => Err(session_error(error)),
        }
    }

    /// Sends what the front end has not had of an answer that is written down.
    fn answer(&self, answer: &FdMessage) -> Result<Option<End>, SessionError> {
        match self.proxy.reply(answer, self.table.receipt()) {
            Ok(()) => Ok(None),
            Err(error) => match error.kind() {
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                    Ok(Some(End::Disconnected))
                }
                _ => Err(SessionError::socket(error)),
            },
        }
    }

    /// Writes down how things stand. What is named no more is closed only after that.
    fn save(&mut self, pending: Pending) {
        let session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut record, held) = session.record();
        drop(session);
        record.socket = self.proxy.socket.as_raw_fd();
        record.pending = pending;
        self.table.set_front(&record.encode());
        self.held = held;
    }

    /// Brings `vhost` and the session to where the record says that they were.
    fn go_on(&mut self, mut record: SessionSnapshot) -> Result<Option<End>, SessionError> {
        for message in restore::agreement(&record) {
            let message = FdMessage {
                bytes: message,
                fds: Vec::new(),
            };
            self.proxy
                .forward(&message, false)
                .map_err(SessionError::socket)?;
            self.handler.handle_request().map_err(session_error)?;
            // The front end has had it.
            self.proxy.answer().map_err(SessionError::socket)?;
        }
        let pending = std::mem::take(&mut record.pending);
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        session.restore(&record)?;
        session.resumed();
        drop(session);
        match pending {
            Pending::Nothing => {
                self.save(Pending::Nothing);
                Ok(None)
            }
            Pending::Message(bytes, fds) => {
                let kept = FdMessage {
                    bytes,
                    fds: restore::adopt_all(&fds)?,
                };
                self.save(Pending::message(&kept));
                let message = match self.duplicate(&kept)? {
                    Some(duplicate) => duplicate,
                    None => kept,
                };
                self.deal_with(message, false)
            }
            Pending::Reply(bytes, fds) => {
                let answer = FdMessage {
                    bytes,
                    fds: restore::adopt_all(&fds)?,
                };
                self.save(Pending::reply(&answer));
                let sent = self.answer(&answer)?;
                self.save(Pending::Nothing);
                Ok(sent)
            }
        }
    }

    /// Takes off the socket what has been kept of it already. Of two messages that look the same,
    /// none of which waits for an answer, the second may carry other descriptors: doing one twice
    /// then does no harm.
    fn duplicate(&self, message: &FdMessage) -> Result<Option<FdMessage>, SessionError> {
        let len = message.bytes.len();
        let next = match self.proxy.look(len) {
            Ok(next) => next,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(error) => return Err(SessionError::socket(error)),
        };
        let word = |at: usize| {
            let bytes = message.bytes.get(at..).and_then(<[u8]>::first_chunk);
            bytes.map_or(0, |bytes| u32::from_ne_bytes(*bytes))
        };
        let once = message.fds.is_empty() || word(4) & NEED_REPLY != 0 || word(0) == ADD_MEM_REG;
        if once && next.is_some_and(|next| next.bytes == message.bytes) {
            return self.proxy.take(len).map(Some).map_err(SessionError::socket);
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

/// What we said ourselves comes back wrapped in the protocol's error; unwrap it.
fn session_error(error: ProtocolError) -> SessionError {
    match error {
        ProtocolError::ReqHandlerError(inner) => inner
            .downcast()
            .unwrap_or_else(|inner| SessionError::Protocol(ProtocolError::ReqHandlerError(inner))),
        other => SessionError::Protocol(other),
    }
}
