//! What a file system offers so that a guest's session can be migrated to another server.
//!
//! The invariant: after an error from [`Migrate::load`] the session is empty once it is reset, and
//! after one from [`Migrate::save`] it is unchanged.

use rustix::io::Errno;

use crate::migration::stream::{Snapshot, StreamError};

/// Lets another server continue the session from a stream.
///
/// A file system without it can't be migrated; the VMM's request is refused.
pub trait Migrate {
    /// Everything the session holds, for another server. Changes nothing here. Called while no
    /// request is in flight.
    ///
    /// # Errors
    ///
    /// See [`MoveError`].
    fn save(&self) -> Result<Snapshot, MoveError>;

    /// Releases what only one server can hold, such as locks: the snapshot has been sent.
    fn release_for_migration(&self);

    /// Acquires again what was released, because the session continues here after all.
    fn reacquire(&self);

    /// Continues from what another server saved. Called after
    /// [`FileSystem::reset`](super::FileSystem::reset) and
    /// [`FileSystem::begin`](super::FileSystem::begin), while no request is in flight.
    ///
    /// # Errors
    ///
    /// See [`MoveError`]. Parts of the session may remain until the next reset.
    fn load(&self, snapshot: &Snapshot) -> Result<(), MoveError>;
}

/// Why a session can't be migrated.
#[derive(Debug, thiserror::Error)]
pub enum MoveError {
    /// The session depends on something that no other server can have.
    #[error("this file system can't be migrated to another server")]
    Unsupported,
    /// The stream is malformed.
    #[error("decoding the state sent by the source")]
    Stream(#[from] StreamError),
    /// The VMM has files mapped for the guest, which another VMM doesn't have.
    #[error(
        "the guest has {count} mappings in its DAX window, which can't be migrated: unmount the file \
         system in the guest before, or mount it with -o dax=never"
    )]
    Mapped {
        /// Their number.
        count: usize,
    },
    /// The guest uses features that this server doesn't offer.
    #[error(
        "the guest's session uses {missing}, which this server has not enabled: start it with the \
         options of the source's server"
    )]
    Options {
        /// The missing features.
        missing: String,
    },
    /// The guest holds more than the limits of this server allow.
    #[error("the guest has {have} {what}, and this server allows {most}")]
    TooMany {
        /// What is counted.
        what: &'static str,
        /// How many the guest has.
        have: usize,
        /// How many are allowed.
        most: usize,
    },
    /// The source claims identifiers that are out of range.
    #[error("the source claims to have assigned more identifiers than exist")]
    Numbers,
    /// An inode was not found.
    #[error("the guest's inode {node} can't be found {how}")]
    Inode {
        /// The guest's node id.
        node: u64,
        /// How it was searched for.
        how: String,
        /// The host's error.
        #[source]
        source: Errno,
    },
    /// A file can't be opened with the flags the guest has it open with.
    #[error("the guest's inode {node} can't be opened again with flags {flags:#o}")]
    Open {
        /// The guest's node id.
        node: u64,
        /// The flags.
        flags: u32,
        /// The host's error.
        #[source]
        source: Errno,
    },
    /// A lock can't be acquired here.
    #[error("a lock of the guest on its inode {node} can't be acquired")]
    Lock {
        /// The guest's node id.
        node: u64,
        /// The host's error.
        #[source]
        source: Errno,
    },
}
