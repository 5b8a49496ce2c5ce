//! Continues a session in another server process or on another server.
//!
//! After a crash or an upgrade the next process resumes from the state table and replays the
//! requests that were in flight; a migration sends a snapshot. The invariant: what the guest knows
//! leads to what it led to before, or to errors, never to something else.

mod attempts;
mod migration;
mod replay;
mod resume;

use std::sync::atomic::{AtomicBool, Ordering};

pub(crate) use self::attempts::PreviousAttempts;
pub(crate) use self::replay::{identity_at, name_was_removed, name_was_renamed};
pub(crate) use self::resume::{OtherRecords, Records, inherited_fd, key_of};
pub use self::resume::{PreviousProcess, Restored};

use crate::fs::passthrough::descriptors::Descriptors;
use crate::fs::passthrough::inode_table::Key;
use crate::fs::passthrough::options::MigrationOptions;

/// What is known about where the session was before, and where it may go.
#[derive(Debug)]
pub(crate) struct Handover {
    options: MigrationOptions,
    /// What earlier server processes recorded about requests that are replayed.
    attempts: PreviousAttempts,
    /// Another process started this session.
    inherited: AtomicBool,
    /// Locks were released so that the destination of a migration can take them.
    locks_released: AtomicBool,
}

impl Handover {
    /// For a session that starts here.
    pub(crate) fn new(options: MigrationOptions) -> Self {
        Self {
            options,
            attempts: PreviousAttempts::default(),
            inherited: AtomicBool::new(false),
            locks_released: AtomicBool::new(false),
        }
    }

    /// Resumes a session that another process has started, from its `records`. `old_root` is the
    /// key that the root had there.
    pub(crate) fn resume(
        options: MigrationOptions,
        fds: &mut Descriptors,
        records: OtherRecords,
        old_root: Key,
        past: &PreviousProcess,
    ) -> (Self, Restored) {
        let (attempts, restored) = resume::resume(fds, records, old_root, past);
        let resumed = Self {
            attempts,
            inherited: AtomicBool::new(true),
            ..Self::new(options)
        };
        (resumed, restored)
    }

    /// What earlier server processes recorded about requests that are replayed.
    pub(crate) fn attempts(&self) -> &PreviousAttempts {
        &self.attempts
    }

    /// Whether another process started this session.
    pub(crate) fn is_inherited(&self) -> bool {
        self.inherited.load(Ordering::Relaxed)
    }

    /// The session has ended, except for its inodes.
    pub(crate) fn end_session(&self) {
        self.locks_released.store(false, Ordering::Relaxed);
    }

    /// The next session starts here.
    pub(crate) fn reset(&self) {
        self.inherited.store(false, Ordering::Relaxed);
    }
}
