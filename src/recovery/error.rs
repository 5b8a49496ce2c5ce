//! Why a session can't be kept for the next process, or resumed from the previous one.
//!
//! The invariant: an error names the act that failed and, where the operator can do something, what.

use std::io;
use std::path::PathBuf;

use rustix::io::Errno;

use super::exec_handover::ExecHandoverError;
use crate::state::StateError;

/// Why a session can't be kept or resumed.
#[derive(Debug, thiserror::Error)]
pub enum RecoveryError {
    /// The state file can't be used.
    #[error("--state: can't open {path}")]
    StateFile {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: Errno,
    },
    /// Another user could change the state file.
    #[error(
        "--state: {path} belongs to user {user}, who could change what it says: give it to the \
         server's user, or remove it"
    )]
    StateOwner {
        /// Which file.
        path: PathBuf,
        /// Its owner.
        user: u32,
    },
    /// Another process uses the state file.
    #[error("--state: {0} is another server's, which is still running: give each its own")]
    StateInUse(PathBuf),
    /// The state file is no table, or a damaged one.
    #[error(
        "--state: can't resume from {path}; if no guest needs its session, remove it and start \
         again"
    )]
    InStateFile {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: StateError,
    },
    /// The state file was made for another device.
    #[error("--state: {path} was made with --request-queues {queues}: give that, or remove it")]
    StateQueues {
        /// Which file.
        path: PathBuf,
        /// For how many.
        queues: usize,
    },
    /// The state table can't be made or opened.
    #[error(transparent)]
    State(#[from] StateError),
    /// The table has no second descriptor.
    #[error("keeping the table of what a session holds for the next process")]
    Keep(#[source] io::Error),
    /// What the previous process has left open can't be closed.
    #[error("closing what the process that served before has left open")]
    Leftovers(#[source] io::Error),
    /// What the previous program in this process has passed on can't be used.
    #[error("taking over from the program that ran before")]
    ExecHandover(#[from] ExecHandoverError),
    /// The guardian can't wait.
    #[error("waiting for the process that serves")]
    Watch(#[source] io::Error),
}
