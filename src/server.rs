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
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::config::{Config, Descriptors, Listen};
use crate::device::Device;
use crate::front::{self, End, ListenError, Listener, Runner, SocketFile};
use crate::fs::passthrough::{self, InodeFileHandles, Passthrough};
use crate::fuse::{Session, SessionOptions};
use crate::io::{Chosen, RuntimeError};
use crate::sandbox::{self, Begun, Ending, Filter, FilterError, Guardian, Needs, SandboxError};
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
        source: rustix::io::Errno,
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
    filter: Filter,
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
        let mut listener = listen()?;
        let keep: Vec<_> = log.into_iter().chain([listener.as_fd()]).collect();
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
            file_handles: options.inode_file_handles != InodeFileHandles::Never,
        };
        let place = inside.enter(&config.shared_dir, needs)?;
        let mut fs = Passthrough::of(place.root, place.proc_fds, &config.shared_dir, options)
            .map_err(|source| ServerError::Share {
                path: config.shared_dir.clone(),
                source,
            })?;
        if let Some(file) = place.file {
            fs.is_for(file);
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
        let session = Session::new(Arc::clone(&self.fs), self.session.clone());
        let mut crew = Crew::start(
            Arc::new(session),
            self.workers,
            self.runtime.kind,
            self.poll,
        )?;
        let end = front::serve(stream, &self.device, &mut crew, stop);
        crew.session().reset();
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

impl<F: crate::fs::FileSystem> Runner for Crew<F> {
    fn run(&mut self, queue: Queue, kick: Arc<OwnedFd>) -> io::Result<()> {
        Self::run(self, queue, kick)
    }

    fn stop(&mut self, index: QueueIndex) -> Option<u16> {
        Self::stop(self, index).map(|queue| queue.next_available())
    }

    fn reset(&mut self) {
        self.session().reset();
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
