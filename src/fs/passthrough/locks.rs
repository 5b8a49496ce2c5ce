//! Record locks: who holds them on the host.
//!
//! The guest's lock owners (its processes, or its open files) must be told apart on the host,
//! which knows this server as one process. So each owner has a descriptor of each file that it
//! has locked, opened for nothing else, and locks belong to its open file description
//! (`F_OFD_SETLK`): they conflict with other owners' and with those of the host's processes. A
//! lock that one guest process takes for writing needs a descriptor for writing, so that is
//! tried first, whatever the guest has open, unless the share is read-only. The host does not
//! look for deadlocks among such locks, as it does for those of processes.
//!
//! The invariant: as long as somebody may use an owner's descriptor, it stays the owner's one
//! and only of that file.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::Passthrough;
use super::inodes::Mix;
use crate::fs::{Handle, HandleKind, LockOwner, NodeId, Result};
use crate::io::{File, Lock, LockKind, RecordLock};

/// All that may be locked of a file.
const EVERYTHING: Lock = Lock::Record(RecordLock {
    kind: LockKind::Unlock,
    start: 0,
    end: i64::MAX.cast_unsigned(),
});

/// What an owner has of one file.
#[derive(Debug)]
struct Owned {
    owner: LockOwner,
    file: Arc<File>,
    /// What the last lock was asked for with.
    handle: Handle,
}

/// The descriptors that record locks belong to.
#[derive(Debug, Default)]
pub(super) struct Locks {
    nodes: Mutex<HashMap<NodeId, Vec<Owned>, Mix>>,
    /// How many there are. Changed under the lock; a bound goes by it.
    count: AtomicUsize,
}

impl Locks {
    /// The descriptor of an owner that has one.
    pub(super) fn find(&self, node: NodeId, owner: LockOwner) -> Option<Arc<File>> {
        let nodes = self.nodes();
        let owned = nodes.get(&node)?.iter().find(|one| one.owner == owner)?;
        Some(Arc::clone(&owned.file))
    }

    /// The same, from now on with this handle.
    fn find_with(&self, node: NodeId, handle: Handle, owner: LockOwner) -> Option<Arc<File>> {
        let mut nodes = self.nodes();
        let of_node = nodes.get_mut(&node)?;
        let owned = of_node.iter_mut().find(|one| one.owner == owner)?;
        owned.handle = handle;
        Some(Arc::clone(&owned.file))
    }

    fn add(&self, node: NodeId, handle: Handle, owner: LockOwner, file: File) -> Arc<File> {
        let mut nodes = self.nodes();
        let of_node = nodes.entry(node).or_default();
        // Another thread of the same owner may have come first.
        if let Some(owned) = of_node.iter_mut().find(|one| one.owner == owner) {
            owned.handle = handle;
            return Arc::clone(&owned.file);
        }
        let file = Arc::new(file);
        of_node.push(Owned {
            owner,
            file: Arc::clone(&file),
            handle,
        });
        self.count.fetch_add(1, Ordering::Relaxed);
        file
    }

    /// Gives up an owner's locks on a file: it has closed a descriptor of it.
    pub(super) fn end(&self, node: NodeId, owner: LockOwner) {
        self.end_where(node, |one| one.owner == owner);
    }

    /// Gives up the locks that were last asked for with a handle which is no more. Those of
    /// processes have been given up before, as each has closed it; those of open files in the
    /// guest (its own `F_OFD_SETLK`) are told of by nothing else.
    pub(super) fn released(&self, node: NodeId, handle: Handle) {
        self.end_where(node, |one| one.handle == handle);
    }

    pub(super) fn clear(&self) {
        let ended = {
            let mut nodes = self.nodes();
            self.count.store(0, Ordering::Relaxed);
            std::mem::take(&mut *nodes)
        };
        drop(ended);
    }

    /// How many descriptors locks have.
    pub(super) fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    fn end_where(&self, node: NodeId, ends: impl Fn(&Owned) -> bool) {
        let mut nodes = self.nodes();
        let Some(of_node) = nodes.get_mut(&node) else {
            return;
        };
        let before = of_node.len();
        of_node.retain(|one| {
            if !ends(one) {
                return true;
            }
            if let Err(error) = one.file.try_lock(EVERYTHING) {
                log::debug!("giving up locks: {error}");
            }
            // A request that is under way, or waits, goes on and may lock again.
            Arc::strong_count(&one.file) > 1
        });
        self.count
            .fetch_sub(before - of_node.len(), Ordering::Relaxed);
        if of_node.is_empty() {
            nodes.remove(&node);
        }
    }

    fn nodes(&self) -> MutexGuard<'_, HashMap<NodeId, Vec<Owned>, Mix>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Passthrough {
    /// The descriptor that an owner's locks on an open file belong to, opened if need be.
    pub(super) fn lock_file_of(
        &self,
        node: NodeId,
        handle: Handle,
        owner: LockOwner,
    ) -> Result<Arc<File>> {
        // Only who has the file open may lock it.
        self.handles.file(node, handle, HandleKind::File)?;
        let inode = self.inode(node)?;
        if let Some(file) = self.locks.find_with(node, handle, owner) {
            return Ok(file);
        }
        self.room_for_handle().map_err(|_full| Errno::NOLCK)?;
        let most = if self.options.readonly {
            OFlags::RDONLY
        } else {
            OFlags::RDWR
        };
        let opened = match self.reopen(&inode, most) {
            Err(Errno::ACCESS | Errno::PERM | Errno::ROFS | Errno::TXTBSY) => {
                self.reopen(&inode, OFlags::RDONLY)
            }
            opened => opened,
        };
        match opened {
            Ok(fd) => Ok(self.locks.add(node, handle, owner, File::from_fd(fd))),
            Err(Errno::MFILE | Errno::NFILE) => Err(Errno::NOLCK),
            Err(error) => Err(error),
        }
    }
}
