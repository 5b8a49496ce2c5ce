//! Why a server can't start or can't continue.
//!
//! The invariant: an error names the act that failed and, where the operator can do something, what.

use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::limits::LimitError;
use super::space::SpaceError;
use crate::fs::overlay::OverlayError;
use crate::fs::vfs::MountError;
use crate::io::RuntimeError;
use crate::metrics::{Address, MetricsError};
use crate::recovery::RecoveryError;
use crate::sandbox::{FilterError, SandboxError};
use crate::state::StateError;
use crate::vhost_user::ListenError;
use crate::worker::{ThreadsError, WorkerPoolError};

/// Why the server can't start, or can't continue.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The requested runtime isn't available.
    #[error("choosing the runtime")]
    Runtime(#[from] RuntimeError),
    /// The session to resume has mappings outside of the window.
    #[error(
        "the session to resume has mappings up to byte {needed} of its DAX window, and --dax-window is \
         {window}: start the server with the size that it had"
    )]
    Window {
        /// Where the last mapping ends.
        needed: u64,
        /// The size of the window.
        window: u64,
    },
    /// The directory can't be shared.
    #[error("sharing {path}")]
    Share {
        /// Which directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// What is to be served is a kind of file system that this build doesn't have.
    #[error("{0} isn't built in")]
    NotBuiltIn(&'static str),
    /// No cache can be made for an image.
    #[error("making a temporary cache {path} (TMPDIR says where, --cache-dir does without)")]
    Cache {
        /// Which directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// An overlay can't be served.
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    /// A file system can't be mounted.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The sandbox reaches less than what is to be served.
    #[error("the sandbox doesn't reach all that is to be served")]
    NotReached,
    /// The limit of open descriptors can't be set.
    #[error(
        "setting the limit of open descriptors to {limit}: beyond the hard limit (`ulimit -Hn`) \
         it needs CAP_SYS_RESOURCE, and never goes beyond /proc/sys/fs/nr_open"
    )]
    Descriptors {
        /// The requested limit.
        limit: u64,
        /// Why not.
        #[source]
        source: Errno,
    },
    /// The unix socket of the metrics can't be made.
    #[error("--metrics")]
    MetricsSocket(#[source] ListenError),
    /// The metrics can't be served.
    #[error("--metrics: listening on {address}")]
    MetricsAddress {
        /// The address.
        address: Address,
        /// Why not.
        source: io::Error,
    },
    /// The thread that serves the metrics can't be started.
    #[error("--metrics: starting the thread that serves them")]
    MetricsThread(#[source] io::Error),
    /// There is no memory for the counters.
    #[error("counting what the server does")]
    Metrics(#[from] MetricsError),
    /// A limit set by the launcher would kill the server.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// The space that the guest may take can't be limited.
    #[error(transparent)]
    Space(#[from] SpaceError),
    /// There is nothing to listen on.
    #[error("listening for the VMM")]
    Listen(#[from] ListenError),
    /// There is no socket to control the server by.
    #[error("--control: {0}")]
    Control(String),
    /// The thread of the control socket can't be started.
    #[error("starting the thread that serves the control socket")]
    ControlThread(#[source] io::Error),
    /// The PID file can't be written.
    #[error("writing the PID file {path}")]
    PidFile {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Another server has the PID file.
    #[error(
        "the PID file {0} is locked by another server, which is still running: give each its own"
    )]
    PidFileInUse(PathBuf),
    /// The sandbox can't be set up.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The system call filter can't be installed.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// The session can't be kept for another process, or resumed from one.
    #[error(transparent)]
    Recovery(#[from] RecoveryError),
    /// The state table can't be made.
    #[error(transparent)]
    State(#[from] StateError),
    /// Waiting for connections failed.
    #[error("waiting for the VMM to connect")]
    Accept(#[source] io::Error),
    /// A session's threads can't be started.
    #[error("starting to serve the VMM that has connected")]
    WorkerPool(#[from] WorkerPoolError),
    /// No session's threads could be started.
    #[error("trying whether the threads that serve a VMM can be had")]
    NoThreads(#[from] ThreadsError),
}

impl ServerError {
    pub(super) fn metrics(address: &Address, source: io::Error) -> Self {
        Self::MetricsAddress {
            address: address.clone(),
            source,
        }
    }

    /// `path` can't be shared.
    pub(super) fn share(
        path: &Path,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self::Share {
            path: path.to_path_buf(),
            source: source.into(),
        }
    }
}
