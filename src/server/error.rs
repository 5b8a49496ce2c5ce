//! What goes wrong when a server starts and serves.
//!
//! The invariant: an error names the act that failed and, where the operator can do something, what.

use std::io;
use std::path::PathBuf;

use rustix::io::Errno;

use super::exec_handover::ExecHandoverError;
use super::limits::LimitError;
use crate::io::RuntimeError;
use crate::sandbox::{FilterError, SandboxError};
use crate::state::StateError;
use crate::vhost_user::ListenError;
use crate::worker::{ThreadsError, WorkerPoolError};

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
        source: Box<dyn std::error::Error + Send + Sync>,
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
    /// A limit of the launcher's that the server would die of.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// There is nothing to listen on.
    #[error("listening for the VMM")]
    Listen(#[from] ListenError),
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
    /// Another user could change it.
    #[error(
        "--state: {path} belongs to user {user}, who could change what it says: give it to the \
         server's user, or remove it"
    )]
    StateOwner {
        /// Which file.
        path: PathBuf,
        /// Whose.
        user: u32,
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
    /// The table has no second descriptor.
    #[error("keeping the table of what a session holds for the next process")]
    Keep(#[source] io::Error),
    /// What an earlier process has left can't be sorted.
    #[error("closing what the process that served before has left open")]
    Leftovers(#[source] io::Error),
    /// What an earlier program in this process has left is not there.
    #[error("taking over from the program that ran before")]
    ExecHandover(#[from] ExecHandoverError),
    /// The guardian can't wait.
    #[error("waiting for the process that serves")]
    Watch(#[source] io::Error),
    /// Waiting for connections failed.
    #[error("waiting for the VMM to connect")]
    Accept(#[source] io::Error),
    /// A session's threads can't be had.
    #[error("starting to serve the VMM that has connected")]
    WorkerPool(#[from] WorkerPoolError),
    /// No session's threads could be had.
    #[error("trying whether the threads that serve a VMM can be had")]
    NoThreads(#[from] ThreadsError),
}
