//! The session of a guest that is moved to another server, on this host or another.
//!
//! [`save`] writes down how each inode is found again, [`load`] finds it. What has lost its last name
//! and is still open has no way to it but its file handle, for as long as somebody has it open; so
//! its content goes along. Where an inode isn't found, the option `on_error` says whether that is the
//! end of the migration. The invariant: the guest's node ids and handles lead to what they led to
//! before, or to errors.

mod content;
mod load;
mod locks;
mod names;
mod save;
mod search;

pub(super) use self::search::Search;

use super::Passthrough;
use crate::fs::{Migrate, MoveError};
use crate::state::stream::Snapshot;

/// How the source describes inodes to the destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MigrationMode {
    /// By their paths in the shared directory.
    #[default]
    FindPaths,
    /// By their file handles: both servers share the same file system.
    FileHandles,
}

/// What the destination does about an inode that it can't have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnMigrationError {
    /// Refuses the guest, which goes on where it was.
    #[default]
    Abort,
    /// Takes the guest, which gets errors for that inode.
    GuestError,
}

/// How a session is moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MigrationOptions {
    /// How inodes are described.
    pub mode: MigrationMode,
    /// What is done about those that are not found.
    pub on_error: OnMigrationError,
    /// With paths go file handles, by which the destination makes sure of what it finds.
    pub verify_handles: bool,
    /// The source looks whether each path leads to its inode, before it tells it.
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
