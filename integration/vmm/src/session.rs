//! A session: a connection, and the guest memory and queues that were shared over it.
//!
//! It stops, restarts, pauses and reconnects what a [`Profile`] has set up; the order of the
//! messages is the profile's. Dropping it is the front end's sudden death. The invariant: ring
//! number `i` of the back end is `queues[i]`, of which 0 is the high-priority queue.

mod activate;
mod log;
mod negotiate;
mod options;
mod state;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::connection::message::{FsConfig, InflightLayout, feature, protocol};
use crate::connection::{Connection, ConnectionError, DEFAULT_TIMEOUT};
use crate::event::Event;
use crate::memory::{Memory, MemoryError};
use crate::profile::Profile;
use crate::ring::{Queue, QueueOptions, RingError};
pub use log::DirtyLog;
pub use options::Options;

/// How long to wait before another try to connect.
const RETRY: Duration = Duration::from_millis(10);

/// Errors of a session.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// A message failed.
    #[error("the vhost-user session failed")]
    Connection(#[from] ConnectionError),
    /// Guest memory could not be made.
    #[error("no guest memory")]
    Memory(#[from] MemoryError),
    /// A queue could not be made.
    #[error("no queue")]
    Ring(#[from] RingError),
    /// An eventfd could not be made.
    #[error("no eventfd for a ring")]
    Event(#[source] io::Error),
    /// More queues than the back end has.
    #[error("{wanted} queues are requested and the back end has {offered}")]
    TooManyQueues {
        /// The requested number, the high-priority queue included.
        wanted: u16,
        /// The reply to GET_QUEUE_NUM.
        offered: u64,
    },
    /// The pipe for the device's state failed.
    #[error("can't move the device's state")]
    State(#[source] io::Error),
}

/// The result of the first half of a handshake.
#[derive(Debug)]
pub(crate) struct Agreed {
    pub(crate) connection: Connection,
    pub(crate) features: u64,
    /// The high-priority queue included.
    pub(crate) queues: u16,
    pub(crate) queue_size: u16,
    pub(crate) config: Option<FsConfig>,
    pub(crate) backend: Option<Connection>,
    pub(crate) shared_memory: Vec<u64>,
}

/// The in-flight region.
#[derive(Debug)]
struct Inflight {
    layout: InflightLayout,
    fd: OwnedFd,
}

/// A vhost-user session that is up.
#[derive(Debug)]
pub struct Session {
    /// The connection, for messages that no method here sends.
    pub connection: Connection,
    /// The guest's memory.
    pub memory: Memory,
    /// The queues: 0 is the high-priority queue, then the request queues. They can be taken out,
    /// for instance to give each to a thread.
    pub queues: Vec<Queue>,
    /// The features that were set.
    pub features: u64,
    /// The configuration space, if the front end reads it.
    pub config: Option<FsConfig>,
    /// The socket on which the back end sends requests, where it was handed over.
    pub backend: Option<Connection>,
    /// Sizes of the shared-memory regions, if the front end asks for them.
    pub shared_memory: Vec<u64>,
    profile: Profile,
    inflight: Option<Inflight>,
    /// The regions were added one by one on this connection.
    pub(crate) regions_added: bool,
    /// The rings' error eventfds, if the front end hands them over.
    pub(crate) errors: Vec<Event>,
    /// Eventfds in the place of the rings' calls, while the front end has them masked.
    pub(crate) masked: Vec<Event>,
}

impl Session {
    /// Makes memory and queues for what was negotiated. Nothing is sent.
    pub(crate) fn new(
        profile: Profile,
        agreed: Agreed,
        options: &Options,
    ) -> Result<Self, SessionError> {
        let memory = Memory::new(&options.regions())?;
        let shared_call = match profile {
            Profile::Libkrun => Some(Arc::new(Event::new().map_err(SessionError::Event)?)),
            _ => None,
        };
        let mut queues = Vec::new();
        let mut masked = Vec::new();
        let mut errors = Vec::new();
        for _ in 0..agreed.queues {
            let kick = match profile {
                Profile::Crosvm => Event::blocking(),
                _ => Event::new(),
            };
            let call = match &shared_call {
                Some(call) => Arc::clone(call),
                None => Arc::new(Event::new().map_err(SessionError::Event)?),
            };
            let layout = QueueOptions {
                size: agreed.queue_size,
                event_idx: agreed.features & feature::EVENT_IDX != 0,
                indirect: agreed.features & feature::INDIRECT_DESC != 0,
                indirect_capacity: options.table_capacity(agreed.queue_size),
                addresses: None,
            };
            let kick = Arc::new(kick.map_err(SessionError::Event)?);
            queues.push(Queue::with_events(&memory, &layout, kick, call)?);
            masked.push(Event::new().map_err(SessionError::Event)?);
            errors.push(Event::new().map_err(SessionError::Event)?);
        }
        Ok(Self {
            connection: agreed.connection,
            memory,
            queues,
            features: agreed.features,
            config: agreed.config,
            backend: agreed.backend,
            shared_memory: agreed.shared_memory,
            profile,
            inflight: None,
            regions_added: false,
            errors,
            masked,
        })
    }

    /// The front end that this session plays.
    #[must_use]
    pub fn profile(&self) -> Profile {
        self.profile
    }

    /// Whether all these features are set.
    #[must_use]
    pub fn has(&self, features: u64) -> bool {
        self.features & features == features
    }

    /// The eventfd by which the back end tells of ring `index`'s errors, if QEMU's handshake
    /// has handed it over.
    #[must_use]
    pub fn error_event(&self, index: usize) -> Option<&Event> {
        self.errors.get(index)
    }

    /// Stops every ring by GET_VRING_BASE, and disables it before where the front end does that.
    /// Returns the index at which each ring would resume.
    ///
    /// # Errors
    /// [`SessionError::Connection`].
    pub fn stop(&mut self) -> Result<Vec<u16>, SessionError> {
        if matches!(self.profile, Profile::Qemu | Profile::Crosvm) {
            self.pause()?;
        }
        let mut bases = Vec::new();
        for index in 0..self.queues.len() {
            let base = self.connection.get_vring_base(number(index).into())?;
            bases.push(u16::try_from(base).unwrap_or(u16::MAX));
        }
        Ok(bases)
    }

    /// Starts stopped rings again at these bases, as [`Session::stop`] gave them, with all the
    /// messages of the handshake's second half.
    ///
    /// # Errors
    /// [`SessionError::Connection`].
    pub fn restart(&mut self, bases: &[u16]) -> Result<(), SessionError> {
        self.profile.activate(self, bases)
    }

    /// Disables every ring.
    ///
    /// # Errors
    /// [`SessionError::Connection`].
    pub fn pause(&mut self) -> Result<(), SessionError> {
        self.enable(false)
    }

    /// Enables every ring.
    ///
    /// # Errors
    /// [`SessionError::Connection`].
    pub fn resume(&mut self) -> Result<(), SessionError> {
        self.enable(true)
    }

    /// Goes on with the same memory and rings on a new connection, as Cloud Hypervisor does after
    /// the back end has gone: the protocol features are set without having been asked for, each
    /// ring's base is its available index, what was in flight is told by the inflight buffer
    /// where there is one, and nothing is kicked. What is in flight in the queues stays there.
    ///
    /// # Errors
    /// [`SessionError::Connection`].
    pub fn reconnect(&mut self, stream: UnixStream) -> Result<(), SessionError> {
        let protocol_features = self.connection.protocol_features();
        self.connection = Connection::new(stream)?;
        self.regions_added = false;
        self.connection.set_owner()?;
        self.connection.get_features()?;
        if self.has(feature::PROTOCOL_FEATURES) {
            self.connection.set_protocol_features(protocol_features)?;
        }
        self.connection.set_need_reply(true);
        if self.connection.has(protocol::BACKEND_REQ) {
            self.backend = Some(self.connection.set_backend_req_fd()?);
        }
        let bases: Vec<_> = self.queues.iter().map(Queue::avail_idx).collect();
        Profile::CloudHypervisor.activate(self, &bases)
    }

    /// As [`reconnect`](Self::reconnect), to whatever listens on the socket at `path`, as soon as
    /// something does; tries every 10 ms, where Cloud Hypervisor does every 100.
    ///
    /// # Errors
    /// [`SessionError::Connection`]; nothing has listened for as long as a reply may take.
    pub fn reconnect_path(&mut self, path: impl AsRef<Path>) -> Result<(), SessionError> {
        let path = path.as_ref();
        let end = Instant::now() + DEFAULT_TIMEOUT;
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => return self.reconnect(stream),
                Err(_) if Instant::now() < end => std::thread::sleep(RETRY),
                Err(source) => {
                    let path = path.to_owned();
                    return Err(ConnectionError::Connect { path, source }.into());
                }
            }
        }
    }

    /// Asks for an inflight buffer unless there is one, and hands it to the back end.
    pub(crate) fn send_inflight(&mut self) -> Result<(), SessionError> {
        if !self.connection.has(protocol::INFLIGHT_SHMFD) {
            return Ok(());
        }
        let inflight = match self.inflight.take() {
            Some(inflight) => inflight,
            None => {
                let queues = u16::from(number(self.queues.len()));
                let size = self.queues.first().map_or(0, Queue::size);
                let (layout, fd) = self.connection.get_inflight_fd(queues, size)?;
                Inflight { layout, fd }
            }
        };
        let set = self
            .connection
            .set_inflight_fd(inflight.layout, inflight.fd.as_fd());
        self.inflight = Some(inflight);
        Ok(set?)
    }

    /// The inflight buffer's layout and file descriptor, if one was handed over.
    #[must_use]
    pub fn inflight(&self) -> Option<(InflightLayout, &OwnedFd)> {
        let inflight = self.inflight.as_ref()?;
        Some((inflight.layout, &inflight.fd))
    }

    fn enable(&mut self, on: bool) -> Result<(), SessionError> {
        if self.has(feature::PROTOCOL_FEATURES) {
            for index in 0..self.queues.len() {
                self.connection.set_vring_enable(number(index).into(), on)?;
            }
        }
        Ok(())
    }
}

/// A ring's number on the wire. A session has at most 255 rings.
pub(crate) fn number(index: usize) -> u8 {
    u8::try_from(index).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests;
