//! Moves the session of a guest to another server, on this host or another.
//!
//! [`save`] describes how each inode can be found, and [`load`] finds it. An open file without a
//! name can be found only by its file handle, and only while it stays open, so its content is sent
//! as well. If an inode isn't found, the option `on_error` decides whether the migration fails. The
//! invariant: the guest's node ids and handles lead to what they led to before, or to errors.

mod content;
mod load;
mod locks;
mod save;

use crate::fs::passthrough::Passthrough;
use crate::fs::{Migrate, MoveError};
use crate::state::stream::Snapshot;

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
