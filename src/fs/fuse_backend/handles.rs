//! The files and directories that the guest has open, by handles of our own.
//!
//! A file system may use one handle for several files, or none; the guest's handles are unique, so
//! that the flags and the user of each are known. The invariant: a handle works only for the node
//! and the kind of file that it was opened for.

use std::fmt;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use fuse_backend_rs::api::filesystem::Context;
use rustc_hash::FxHashMap;
use rustix::io::Errno;

use crate::fs::{Handle, HandleKind, LockOwner, NodeId, Result};

/// An open file or directory.
#[derive(Debug)]
pub(super) struct Open {
    pub(super) node: NodeId,
    pub(super) kind: HandleKind,
    /// The file system's handle. 0 if it returned none, as fuse-backend-rs's own server says it.
    pub(super) handle: u64,
    /// Whether the file system returned a handle.
    pub(super) is_explicit: bool,
    /// On whose behalf it was opened. Requests on open files are made for this user, as on Linux
    /// an open file belongs to who opened it.
    pub(super) context: Context,
    /// The flags it was opened with, and `O_APPEND` as of the last WRITE.
    flags: AtomicU32,
    /// Who has a lock on the whole file.
    pub(super) flock_owner: Mutex<Option<LockOwner>>,
}

impl Open {
    pub(super) fn new(
        (node, kind): (NodeId, HandleKind),
        handle: Option<u64>,
        flags: u32,
        context: Context,
    ) -> Self {
        Self {
            node,
            kind,
            handle: handle.unwrap_or(0),
            is_explicit: handle.is_some(),
            context,
            flags: AtomicU32::new(flags),
            flock_owner: Mutex::default(),
        }
    }

    /// A file that is used without having been opened.
    pub(super) fn implicit(node: NodeId, kind: HandleKind) -> Self {
        let flags = match kind {
            HandleKind::File => libc::O_RDWR,
            HandleKind::Directory => libc::O_RDONLY | libc::O_DIRECTORY,
        };
        Self::new((node, kind), None, flags.cast_unsigned(), Context::new())
    }

    /// The file's flags.
    pub(super) fn flags(&self) -> u32 {
        self.flags.load(Ordering::Relaxed)
    }

    /// Sets or clears `O_APPEND`, which a program may change at any time; returns the flags.
    pub(super) fn flags_with_append(&self, append: bool) -> u32 {
        let bit = libc::O_APPEND.cast_unsigned();
        let before = self.flags();
        let flags = if append { before | bit } else { before & !bit };
        if flags != before {
            self.flags.store(flags, Ordering::Relaxed);
        }
        flags
    }

    /// Who has a lock on the whole file, to be released with it.
    pub(super) fn flock_owner(&self) -> Option<LockOwner> {
        *self
            .flock_owner
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// All open files and directories.
#[derive(Default)]
pub(super) struct Handles {
    last: AtomicU64,
    open: RwLock<FxHashMap<u64, Arc<Open>>>,
}

impl Handles {
    /// Adds an open file and returns its handle, never 0.
    pub(super) fn add(&self, open: Open) -> Handle {
        let handle = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        self.write().insert(handle, Arc::new(open));
        Handle(handle)
    }

    /// An open file of `node`; of any kind unless one is given.
    pub(super) fn get(
        &self,
        node: NodeId,
        handle: Handle,
        kind: Option<HandleKind>,
    ) -> Result<Arc<Open>> {
        let open = self.read().get(&handle.0).cloned().ok_or(Errno::BADF)?;
        if open.node != node || kind.is_some_and(|kind| kind != open.kind) {
            return Err(Errno::BADF);
        }
        Ok(open)
    }

    /// Removes an open file.
    pub(super) fn remove(
        &self,
        node: NodeId,
        handle: Handle,
        kind: HandleKind,
    ) -> Result<Arc<Open>> {
        let open = self.get(node, handle, Some(kind))?;
        self.write().remove(&handle.0).ok_or(Errno::BADF)?;
        Ok(open)
    }

    /// Removes all.
    pub(super) fn take_all(&self) -> Vec<Arc<Open>> {
        self.write().drain().map(|(_, open)| open).collect()
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.read().len()
    }

    fn read(&self) -> RwLockReadGuard<'_, FxHashMap<u64, Arc<Open>>> {
        self.open.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, FxHashMap<u64, Arc<Open>>> {
        self.open.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Handles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handles")
            .field("open", &self.count())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: NodeId = NodeId(5);

    #[test]
    fn handle_works_for_its_node_and_kind_until_removed() {
        let handles = Handles::default();
        let open = Open::new((NODE, HandleKind::File), Some(9), 0, Context::new());
        let handle = handles.add(open);
        assert_eq!(handles.get(NODE, handle, None).unwrap().handle, 9);
        for (node, handle, kind) in [
            (NodeId(6), handle, HandleKind::File),
            (NODE, Handle(handle.0 + 1), HandleKind::File),
            (NODE, Handle(0), HandleKind::File),
            (NODE, handle, HandleKind::Directory),
        ] {
            let refused = handles.remove(node, handle, kind);
            assert_eq!(refused.unwrap_err(), Errno::BADF);
        }
        handles.remove(NODE, handle, HandleKind::File).unwrap();
        let removed = handles.get(NODE, handle, None);
        assert_eq!((removed.unwrap_err(), handles.count()), (Errno::BADF, 0));
    }

    #[test]
    fn append_follows_last_write() {
        let append = libc::O_APPEND.cast_unsigned();
        let opened = libc::O_RDWR.cast_unsigned() | append;
        let open = Open::new((NODE, HandleKind::File), None, opened, Context::new());
        assert_eq!(open.flags_with_append(false), opened & !append);
        assert_eq!(open.flags(), opened & !append);
        assert_eq!(open.flags_with_append(true), opened);
    }
}
