//! Composition root: the start-up order, top to bottom, once.
//!
//! The process is split in two on the way, before it has a second thread: what lies outside of the
//! sandbox is had before, and what serves a guest after. `docs/sandbox.md` says why in this order.
//! The invariant: whatever a session took (threads, descriptors, mappings) is given back before
//! the next one begins.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use crate::config::{Config, Descriptors, Listen};
use crate::device::Device;
use crate::front::{self, DeviceState, End, ListenError, Listener, Runner, SocketFile};
use crate::fs::passthrough::{self, InodeFileHandles, MigrationMode, Passthrough, Past, Shared};
use crate::fuse::{Session, SessionOptions};
use crate::io::{Chosen, RuntimeError};
use crate::sandbox::{self, Begun, Ending, Filter, FilterError, Guardian, Needs, SandboxError};
use crate::state::{Limits, StateError, Table};
use crate::virtqueue::{Queue, QueueIndex};
use crate::worker::{Crew, CrewError};

/// Why the server can't start, or can't go on.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The runtime asked for can't be had.
    #[error("choosing the runtime")]
    Runtime(#[from] RuntimeError),
    /// The directory can't be shared.
    #[error("sharing {path}")]
    Share {
        /// Which directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: passthrough::PassthroughError,
    },
    /// The limit of open descriptors can't be set.
    #[error(
        "setting the limit of open descriptors to {limit}: beyond the hard limit (`ulimit -Hn`) \
         it needs CAP_SYS_RESOURCE, and never goes beyond /proc/sys/fs/nr_open"
    )]
    Descriptors {
        /// To what.
        limit: u64,
        /// Why not.
        #[source]
        source: Errno,
    },
    /// There is nothing to listen on.
    #[error("listening for the VMM")]
    Listen(#[from] ListenError),
    /// The server can't be kept in.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The server can't be kept to its system calls.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// The state file can't be used.
    #[error("--state: can't open {path}")]
    StateFile {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: Errno,
    },
    /// Another process uses it.
    #[error("--state: {0} is another server's, which is still running: give each its own")]
    StateInUse(PathBuf),
    /// It is no table, or a damaged one.
    #[error(
        "--state: can't go on from {path}; where no guest is to go on from it, remove it and start \
         again"
    )]
    InStateFile {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: StateError,
    },
    /// It was made for another device.
    #[error("--state: {path} was made with --request-queues {queues}: give that, or remove it")]
    StateQueues {
        /// Which file.
        path: PathBuf,
        /// For how many.
        queues: usize,
    },
    /// What the guest holds can't be written down.
    #[error(transparent)]
    State(#[from] StateError),
    /// Waiting for connections failed.
    #[error("waiting for the VMM to connect")]
    Accept(#[source] io::Error),
    /// A session's threads can't be had.
    #[error("starting to serve the VMM that has connected")]
    Crew(#[from] CrewError),
}

/// Which of the two processes this is from now on.
#[derive(Debug)]
pub enum Started {
    /// The one that the launcher knows.
    Outside(Outside),
    /// The one that serves.
    Inside(Box<Server>),
}

/// What stays outside of the sandbox: the guardian, and the socket's file, which is removed at
/// the end.
#[derive(Debug)]
pub struct Outside {
    guardian: Guardian,
    _socket: Option<SocketFile>,
}

impl Outside {
    /// Waits until the server has ended, and removes its socket.
    ///
    /// # Errors
    ///
    /// Whatever a seccomp filter of the launcher says.
    pub fn watch(self) -> io::Result<Ending> {
        self.guardian.watch()
    }
}

/// A server: one shared directory, one session at a time.
#[derive(Debug)]
pub struct Server {
    device: Device,
    workers: NonZeroUsize,
    runtime: Chosen,
    fs: Arc<Passthrough>,
    listener: Listener,
    poll: Duration,
    session: SessionOptions,
    once: bool,
    /// What the guest holds outlives this process.
    keeps: bool,
    filter: Filter,
}

/// A state file, and what it tells of.
struct Kept {
    table: Arc<Table>,
    /// If there is something to go on from.
    past: Option<Past>,
}

impl Kept {
    fn open(path: &Path, limits: &Limits) -> Result<Self, ServerError> {
        let failed = |source: Errno| ServerError::StateFile {
            path: path.to_owned(),
            source,
        };
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR).map_err(failed)?;
        // As long as the file is open, in whichever process.
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::AGAIN) => return Err(ServerError::StateInUse(path.to_owned())),
            locked => locked.map_err(failed)?,
        }
        let in_file = |source| ServerError::InStateFile {
            path: path.to_owned(),
            source,
        };
        if rustix::fs::fstat(&file).map_err(failed)?.st_size == 0 {
            let table = Table::create(file, limits).map_err(in_file)?;
            return Ok(Self { table, past: None });
        }
        let table = Table::open(file).map_err(in_file)?;
        let wanted = usize::from(limits.queues);
        if table.queue_count() < wanted {
            return Err(ServerError::StateQueues {
                path: path.to_owned(),
                queues: table.queue_count().saturating_sub(1),
            });
        }
        let past = table.is_in_use().then(Past::default);
        Ok(Self { table, past })
    }
}

impl Server {
    /// Gets everything ready, and splits the process in two; see [`sandbox::begin`] for when this
    /// may be called. The one that serves keeps `log`, which its log is written to, if that is
    /// not standard error.
    ///
    /// # Errors
    ///
    /// Something that the configuration asks for is not to be had on this host. Either process
    /// may get one; the other has ended then, or tells so by the way it ends.
    pub fn start(config: Config, log: Option<BorrowedFd<'_>>) -> Result<Started, ServerError> {
        let listen: Box<dyn FnOnce() -> Result<Listener, ListenError>> = match config.listen {
            Listen::Path(path) => Box::new(move || {
                let listener = Listener::bind(&path)?;
                if let Some(group) = config.socket_group {
                    listener.admit_group(&group)?;
                }
                Ok(listener)
            }),
            Listen::Inherited(fd) => {
                // At once, before something of ours could get the number.
                let listener = Listener::inherited(fd)?;
                Box::new(move || Ok(listener))
            }
        };
        let runtime = crate::io::choose(config.runtime)?;
        log::info!("runtime {}: {}", runtime.kind, runtime.reason);
        match config.descriptors {
            Descriptors::Inherited => {}
            Descriptors::Most => {
                passthrough::raise_descriptor_limit();
            }
            Descriptors::Limit(limit) => passthrough::set_descriptor_limit(limit)
                .map_err(|source| ServerError::Descriptors { limit, source })?,
        }
        let options = config.share.file_system;
        // What can be known beforehand to fail leaves no socket.
        passthrough::check_shared(&config.shared_dir).map_err(|source| ServerError::Share {
            path: config.shared_dir.clone(),
            source,
        })?;
        let queues = config.request_queues.get().saturating_add(1);
        let kept = match &config.state {
            Some(path) => Some(Kept::open(path, &options.limits(queues))?),
            None => None,
        };
        let mut listener = listen()?;
        let table_file = kept.as_ref().map(|kept| kept.table.file().as_fd());
        let keep: Vec<_> = log
            .into_iter()
            .chain([listener.as_fd()])
            .chain(table_file)
            .collect();
        let inside = match sandbox::begin(&config.sandbox, &keep)? {
            Begun::Outside(guardian) => {
                return Ok(Started::Outside(Outside {
                    guardian,
                    _socket: listener.into_file(),
                }));
            }
            Begun::Inside(inside) => inside,
        };
        listener.leave_file();
        let needs = Needs {
            readonly: options.readonly,
            file_handles: options.inode_file_handles != InodeFileHandles::Never
                || options.migration.mode == MigrationMode::FileHandles,
        };
        let place = inside.enter(&config.shared_dir, needs)?;
        let (table, past) = match kept {
            Some(Kept { table, past }) => (table, past),
            None => (Table::in_memory(&options.limits(queues))?, None),
        };
        let shared = Shared {
            root: place.root,
            proc_fds: place.proc_fds,
            path: config.shared_dir.clone(),
        };
        let (fs, restored) =
            Passthrough::of(shared, options, &table, past.as_ref()).map_err(|source| {
                ServerError::Share {
                    path: config.shared_dir.clone(),
                    source,
                }
            })?;
        if past.is_some() {
            log::info!("going on from where another process ended: {restored}");
        }
        let filter = Filter::new(config.sandbox.seccomp, runtime.kind, place.file_handles)?;
        Ok(Started::Inside(Box::new(Self {
            device: Device {
                tag: config.tag,
                request_queues: config.request_queues,
            },
            workers: config.workers,
            runtime,
            fs: Arc::new(fs),
            listener,
            poll: config.poll,
            session: config.share.session,
            once: config.once,
            keeps: config.state.is_some(),
            filter,
        })))
    }

    /// Lets the signals come that end a server, which [`start`](Self::start) holds: to be called
    /// once they make the descriptor readable that [`run`](Self::run) is given.
    ///
    /// # Errors
    ///
    /// Whatever a seccomp filter of the launcher says.
    pub fn release_signals(&self) -> io::Result<()> {
        sandbox::release_signals()
    }

    /// Serves one VMM after the other until `stop` becomes readable, or, if so configured, only
    /// the first. From here on the calling thread makes the server's system calls and no others.
    ///
    /// # Errors
    ///
    /// Connections can't be taken any more, or the host has no threads for a session. What a
    /// VMM does wrong ends its session and is logged.
    pub fn run(&self, stop: BorrowedFd<'_>) -> Result<(), ServerError> {
        self.filter.install()?;
        loop {
            // Launchers wait for these very words.
            log::info!(
                "Waiting for vhost-user socket connection on {}",
                self.listener.name()
            );
            if front::wait_readable(&self.listener, stop).map_err(ServerError::Accept)? {
                log::info!("asked to stop");
                return Ok(());
            }
            let stream = self.listener.accept().map_err(ServerError::Accept)?;
            let end = self.serve(stream, stop)?;
            if self.once || end == End::Stopped {
                return Ok(());
            }
        }
    }

    /// Serves one VMM from connect to disconnect.
    fn serve(&self, stream: UnixStream, stop: BorrowedFd<'_>) -> Result<End, ServerError> {
        log::info!("a VMM has connected");
        let session = Session::new(Arc::clone(&self.fs), self.session.clone())
            .remembering(Arc::clone(self.fs.table()));
        if let Some(negotiated) = session.negotiated() {
            log::info!("the guest's session goes on: {negotiated}");
        }
        let mut crew = Crew::start(
            Arc::new(session),
            self.workers,
            self.runtime.kind,
            self.poll,
        )?;
        let end = front::serve(stream, &self.device, &mut crew, stop);
        // Who is asked to stop leaves to the next one what the guest holds.
        if !(self.keeps && matches!(end, Ok(End::Stopped))) {
            crew.session().reset();
        }
        let malformed = crew.session().counters().malformed();
        if malformed != 0 {
            log::warn!("the guest has sent {malformed} malformed requests");
        }
        crew.dismiss();
        match end {
            Ok(End::Disconnected) => log::info!("the VMM has disconnected"),
            Ok(End::Stopped) => log::info!("asked to stop; the session is ended"),
            Err(error) => {
                log::error!("the session is ended: {}", chain(&error));
                return Ok(End::Disconnected);
            }
        }
        Ok(end.unwrap_or(End::Disconnected))
    }
}

impl<F: crate::fs::FileSystem + std::fmt::Debug> Runner for Crew<F> {
    fn run(&mut self, queue: Queue, kick: Arc<OwnedFd>) -> io::Result<()> {
        // The guest goes on here, perhaps after all.
        self.session().take_back();
        Self::run(self, queue, kick)
    }

    fn stop(&mut self, index: QueueIndex) -> Option<u16> {
        Self::stop(self, index).map(|queue| queue.next_available())
    }

    fn reset(&mut self) {
        self.session().reset();
    }

    fn device_state(&self) -> Arc<dyn DeviceState> {
        Arc::new(Movable(Arc::clone(self.session())))
    }
}

/// A guest's session, as `front` saves and loads it.
#[derive(Debug)]
struct Movable<F>(Arc<Session<F>>);

impl<F: crate::fs::FileSystem + std::fmt::Debug> DeviceState for Movable<F> {
    fn save(&self) -> Result<Vec<u8>, front::Cause> {
        Ok(self.0.save()?)
    }

    fn saved(&self) {
        self.0.lend();
    }

    fn load(&self, bytes: &[u8]) -> Result<(), front::Cause> {
        Ok(self.0.load(bytes)?)
    }
}

/// An error with its causes, in one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
