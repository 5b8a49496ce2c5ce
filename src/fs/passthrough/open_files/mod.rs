//! What the guest has open: handles, files without a handle, and record locks.
//!
//! Also the files that it has closed and that are still open here: those that are cached, and those
//! that are being closed. Everything is found by node id or handle, so this room knows nothing of
//! inodes. The invariant: a file is used only for the node that it was opened for.

mod closed_fd_cache;
mod closer;
mod dir_stream;
mod handleless;
mod handles;
mod local_mount;
mod record_locks;

use std::sync::Arc;

pub(crate) use self::closed_fd_cache::ClosedFdCache;
pub(crate) use self::closer::Closer;
pub(crate) use self::dir_stream::{DirStream, DirentCache, RawEntry};
pub(crate) use self::handleless::{HandlelessOpens, IMPLICIT, InodeFiles};
pub(crate) use self::handles::{Handles, Released};
pub(crate) use self::local_mount::LocalMount;
pub(crate) use self::record_locks::RecordLocks;

use crate::state::Table;

/// All files that are open for the guest.
#[derive(Debug)]
pub(crate) struct OpenFiles {
    handles: Handles,
    handleless: HandlelessOpens,
    closed: ClosedFdCache,
    local: LocalMount,
    record_locks: RecordLocks,
    closer: Closer,
    /// Limits how many open directories keep their entry buffers.
    dirent_cache: DirentCache,
}

impl OpenFiles {
    /// With at most `descriptors` descriptors of the guest, of which up to `closed` are those of
    /// `local` files that it has closed.
    pub(crate) fn new(
        table: &Arc<Table>,
        local: LocalMount,
        closed: usize,
        descriptors: usize,
    ) -> Self {
        let closed = if local.exists() { closed } else { 0 };
        Self {
            handles: Handles::new(table),
            handleless: HandlelessOpens::new(descriptors),
            closed: ClosedFdCache::new(closed),
            local,
            record_locks: RecordLocks::new(table),
            closer: Closer::default(),
            dirent_cache: DirentCache::default(),
        }
    }

    /// The files and directories that the guest has opened.
    pub(crate) fn handles(&self) -> &Handles {
        &self.handles
    }

    /// The files and directories that the guest uses without having opened them.
    pub(crate) fn handleless(&self) -> &HandlelessOpens {
        &self.handleless
    }

    /// The files that the guest has closed and may open again.
    pub(crate) fn closed(&self) -> &ClosedFdCache {
        &self.closed
    }

    /// Which files are on a file system of this host.
    pub(crate) fn local(&self) -> LocalMount {
        self.local
    }

    /// The descriptors that hold record locks.
    pub(crate) fn record_locks(&self) -> &RecordLocks {
        &self.record_locks
    }

    /// The files that are being closed.
    pub(crate) fn closer(&self) -> &Closer {
        &self.closer
    }

    /// The count of the kept entry buffers.
    pub(crate) fn dirent_cache(&self) -> &DirentCache {
        &self.dirent_cache
    }

    /// The number of descriptors.
    pub(crate) fn descriptors(&self) -> usize {
        self.until_released() + self.handleless.count() + self.closed.count() + self.closer.count()
    }

    /// The number of descriptors that stay open until the guest releases a handle or a lock.
    pub(crate) fn until_released(&self) -> usize {
        self.handles.count() + self.record_locks.count()
    }

    /// Whether files are open that the guest doesn't have open.
    pub(crate) fn has_idle(&self) -> bool {
        self.handleless.count() > 0 || self.closed.count() > 0
    }

    /// Closes everything that the guest has open.
    pub(crate) fn clear(&self) {
        self.record_locks.clear();
        self.handles.clear();
        self.handleless.clear();
        self.closed.clear();
    }
}
