//! Composition root: the start-up order, top to bottom, once.
//!
//! The invariant: whatever a session took (threads, descriptors, mappings) is given back before
//! the next one begins.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::config::{Config, Descriptors, Listen};
use crate::device::Device;
use crate::front::{self, End, ListenError, Listener, Runner};
use crate::fs::passthrough::{self, Passthrough};
use crate::fuse::{Session, SessionOptions};
use crate::io::{Chosen, RuntimeError};
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
    /// Waiting for connections failed.
    #[error("waiting for the VMM to connect")]
    Accept(#[source] io::Error),
    /// A session's threads can't be had.
    #[error("starting to serve the VMM that has connected")]
    Crew(#[from] CrewError),
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
}

impl Server {
    /// Gets everything ready, the socket last: whoever sees it can connect.
    ///
    /// # Errors
    ///
    /// Something that the configuration asks for is not to be had on this host.
    pub fn new(config: Config) -> Result<Self, ServerError> {
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
        let mut options = config.share.file_system;
        options.max_open_inodes = config.max_open_inodes.map(NonZeroUsize::get);
        options.max_inodes = config.max_inodes.get();
        options.max_handles = config.max_handles.map(NonZeroUsize::get);
        let fs =
            Passthrough::new(&config.shared_dir, options).map_err(|source| ServerError::Share {
                path: config.shared_dir.clone(),
                source,
            })?;
        Ok(Self {
            device: Device {
                tag: config.tag,
                request_queues: config.request_queues,
            },
            workers: config.workers,
            runtime,
            fs: Arc::new(fs),
            listener: listen()?,
            poll: config.poll,
            session: config.share.session,
            once: config.once,
        })
    }

    /// Serves one VMM after the other until `stop` becomes readable, or, if so configured, only
    /// the first.
    ///
    /// # Errors
    ///
    /// Connections can't be taken any more, or the host has no threads for a session. What a
    /// VMM does wrong ends its session and is logged.
    pub fn run(&self, stop: BorrowedFd<'_>) -> Result<(), ServerError> {
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
