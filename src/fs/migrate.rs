//! What a file system offers so that a guest's session can be migrated to another server.
//!
//! The invariant: after an error from [`Migrate::load`] the session is empty once it is reset, and after
//! one from [`Migrate::save`] it is unchanged.

use rustix::io::Errno;

use crate::state::stream::{Snapshot, StreamError};

/// Lets another server continue the session from a stream.
///
/// A file system without it can't be migrated; the VMM's request is refused.
pub trait Migrate {
    /// All that the session holds, for another server; changes nothing here. Called while no request is
    /// in flight.
    ///
    /// # Errors
    ///
    /// See [`MoveError`].
    fn save(&self) -> Result<Snapshot, MoveError>;

    /// Releases what only one server can hold, such as locks: the snapshot has been sent.
    fn release_for_migration(&self);

    /// Takes back what was released, as the session continues here after all.
    fn reacquire(&self);

    /// Continues from what another server saved. Called after
    /// [`FileSystem::reset`](super::FileSystem::reset) and
    /// [`FileSystem::begin`](super::FileSystem::begin), while no request is in flight.
    ///
    /// # Errors
    ///
    /// See [`MoveError`]. Parts of the session may be there until the next reset.
    fn load(&self, snapshot: &Snapshot) -> Result<(), MoveError>;
}

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
