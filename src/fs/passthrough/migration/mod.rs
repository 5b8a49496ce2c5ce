//! Moves the session of a guest to another server, on this host or another.
//!
//! [`save`] describes how each inode can be found, and [`load`] finds it. An open file without a
//! name can be found only by its file handle, and only while it stays open, so its content is sent
//! as well. If an inode isn't found, the option `on_error` decides whether the migration fails. The
//! invariant: the guest's node ids and handles lead to what they led to before, or to errors.

mod content;
mod load;
mod locks;
mod names;
mod save;
mod search;

pub(super) use self::search::Search;

use super::Passthrough;
use crate::fs::{Migrate, MoveError};
use crate::migration::stream::Snapshot;

/// How the source describes inodes to the destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MigrationMode {
    /// By their paths in the shared directory.
    #[default]
    FindPaths,
    /// By their file handles: both servers share the same file system.
    FileHandles,
}

/// What the destination does if it can't find an inode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnMigrationError {
    /// Refuse the guest, which continues at the source.
    #[default]
    Abort,
    /// Accept the guest, which gets errors for that inode.
    GuestError,
}

/// How a session is migrated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MigrationOptions {
    /// How the source describes inodes.
    pub mode: MigrationMode,
    /// What the destination does if an inode is not found.
    pub on_error: OnMigrationError,
    /// Send file handles along with paths, so that the destination can verify what it finds.
    pub verify_handles: bool,
    /// Check at the source that each path leads to its inode before sending it.
    pub confirm_paths: bool,
}

impl Migrate for Passthrough {
    fn save(&self) -> Result<Snapshot, MoveError> {
        self.snapshot()
    }

    fn release_for_migration(&self) {
        self.release_locks_for_migration();
    }

    fn reacquire(&self) {
        self.reacquire_locks();
    }

    fn load(&self, snapshot: &Snapshot) -> Result<(), MoveError> {
        self.load_snapshot(snapshot)
    }
}
