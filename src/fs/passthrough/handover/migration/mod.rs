//! Moves the session of a guest to another server, on this host or another.
//!
//! `save` describes how each inode can be found, and `load` finds it. An open file without a
//! name can be found only by its file handle, and only while it stays open, so its content is sent
//! as well. If an inode isn't found, the option `on_error` decides whether the migration fails. The
//! invariant: the guest's node ids and handles lead to what they led to before, or to errors.

mod content;
mod load;
mod load_locks;
mod locks;
mod save;

use std::sync::atomic::Ordering;

use self::load::Loader;
use self::save::Saver;
use super::Handover;
use crate::fs::MoveError;
use crate::fs::passthrough::descriptors::Descriptors;
use crate::migration::stream::Snapshot;

impl Handover {
    /// Describes the session for another server. `no_open` says that the guest doesn't report which
    /// files it has open.
    ///
    /// # Errors
    ///
    /// See [`MoveError`].
    pub(crate) fn save(&self, fds: &Descriptors, no_open: bool) -> Result<Snapshot, MoveError> {
        let options = &self.options;
        Saver {
            fds,
            options,
            no_open,
        }
        .snapshot()
    }

    /// Finds what another server has described.
    ///
    /// # Errors
    ///
    /// See [`MoveError`].
    pub(crate) fn load(&self, fds: &Descriptors, snapshot: &Snapshot) -> Result<(), MoveError> {
        let options = &self.options;
        Loader { fds, options }.load(snapshot)
    }

    /// Releases all locks on the host, so that the destination can take them. Their records stay.
    pub(crate) fn release_locks(&self, fds: &Descriptors) {
        self.locks_released.store(true, Ordering::Relaxed);
        locks::release_locks(fds);
    }

    /// Acquires the locks again, if they were released.
    pub(crate) fn reacquire_locks(&self, fds: &Descriptors) {
        if self.locks_released.swap(false, Ordering::Relaxed) {
            locks::reacquire_locks(fds);
        }
    }
}
