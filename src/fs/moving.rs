//! What can go wrong when a guest's session is moved to another server.
//!
//! The invariant: whoever gets such an error has a session without anything in it, or, where it was
//! to be saved, the one that he had.

use rustix::io::Errno;

use crate::state::stream::StreamError;

/// Why a session can't be moved.
#[derive(Debug, thiserror::Error)]
pub enum MoveError {
    /// It is made of what no other server can have.
    #[error("what is served can't be moved to another server")]
    Unsupported,
    /// The stream is none.
    #[error("reading what the source has sent")]
    Stream(#[from] StreamError),
    /// The guest goes by what this server does not do.
    #[error(
        "the guest's session has {missing}, which this server has not been started for: give it the \
         options of the source's server"
    )]
    Options {
        /// What.
        missing: String,
    },
    /// The guest has more than it may have here.
    #[error("the guest has {have} {what}, and {most} are the most that it may have here")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many it has.
        have: usize,
        /// How many it may have.
        most: usize,
    },
    /// Numbers that no server comes to.
    #[error("the source claims to have given out more numbers than there are")]
    Numbers,
    /// Something is not where it must be.
    #[error("the guest's inode {node} is not to be had {how}")]
    Inode {
        /// What the guest calls it.
        node: u64,
        /// How it was looked for.
        how: String,
        /// What the host says.
        #[source]
        source: Errno,
    },
    /// A file can't be opened as the guest has it open.
    #[error("the guest's inode {node} can't be opened again with flags {flags:#o}")]
    Open {
        /// What the guest calls it.
        node: u64,
        /// What it was open with.
        flags: u32,
        /// What the host says.
        #[source]
        source: Errno,
    },
    /// A lock is not to be had again.
    #[error("a lock of the guest on its inode {node} is not to be had")]
    Lock {
        /// What the guest calls it.
        node: u64,
        /// What the host says.
        #[source]
        source: Errno,
    },
}
