//! Record locks, and the descriptors that hold them on the host.
//!
//! The guest has several lock owners (its processes or open files), but to the host this server is
//! one process. So each owner has a descriptor of each file that it has locked, opened for this
//! purpose only. The locks belong to the descriptor's open file description (`F_OFD_SETLK`) and
//! conflict with those of other owners and of host processes. A write lock needs a descriptor that
//! is open for writing, so that is tried first, regardless of how the guest opened the file, unless
//! the share is read-only. The host does not detect deadlocks among such locks, as it does among
//! those of processes.
//!
//! The invariant: while a request may use an owner's descriptor of a file, the owner has no other
//! descriptor of that file.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustc_hash::FxHashMap;
use rustix::io::Errno;

use crate::fs::{Handle, LockOwner, NodeId, Result};
use crate::io::{File, Lock, LockKind, RecordLock};
use crate::state::{LockFields, LockRecord, Range, Table};

/// The whole range of a file.
const EVERYTHING: Lock = Lock::Record(RecordLock {
    kind: LockKind::Unlock,
    start: 0,
    end: i64::MAX.cast_unsigned(),
});

/// The locks of an owner on one file.
#[derive(Debug)]
struct Owned {
    /// The state that outlives this process. It is dropped before the file is closed.
    record: LockRecord,
    owner: LockOwner,
    file: Arc<File>,
    /// The handle of the last lock request.
    handle: Handle,
}

/// The descriptors that hold record locks.
#[derive(Debug)]
pub(crate) struct RecordLocks {
    table: Arc<Table>,
    nodes: Mutex<FxHashMap<NodeId, Vec<Owned>>>,
    /// The number of descriptors. It changes under the lock and is used for limits.
    count: AtomicUsize,
}

impl RecordLocks {
    pub(crate) fn new(table: &Arc<Table>) -> Self {
        Self {
            table: Arc::clone(table),
            nodes: Mutex::default(),
            count: AtomicUsize::new(0),
        }
    }

    /// The descriptor of an owner, if it has one.
    pub(crate) fn find(&self, node: NodeId, owner: LockOwner) -> Option<Arc<File>> {
        let nodes = self.nodes();
        let owned = nodes.get(&node)?.iter().find(|one| one.owner == owner)?;
        Some(Arc::clone(&owned.file))
    }

    /// As [`find`](Self::find), and records the handle.
    pub(crate) fn get(&self, node: NodeId, handle: Handle, owner: LockOwner) -> Option<Arc<File>> {
        let mut nodes = self.nodes();
        let of_node = nodes.get_mut(&node)?;
        let owned = of_node.iter_mut().find(|one| one.owner == owner)?;
        owned.used_with(handle);
        Some(Arc::clone(&owned.file))
    }

    /// Adds an owner, whose locks `file` holds from now on.
    ///
    /// # Errors
    ///
    /// `ENOLCK` if the table has no room.
    pub(crate) fn add(
        &self,
        node: NodeId,
        handle: Handle,
        owner: LockOwner,
        file: File,
    ) -> Result<Arc<File>> {
        let mut nodes = self.nodes();
        let of_node = nodes.entry(node).or_default();
        // Another thread of the same owner may have been first.
        if let Some(owned) = of_node.iter_mut().find(|one| one.owner == owner) {
            owned.used_with(handle);
            return Ok(Arc::clone(&owned.file));
        }
        let fields = LockFields {
            owner: owner.0,
            node: node.0,
            handle: handle.0,
            fd: file.as_fd().as_raw_fd(),
        };
        let record = self.table.new_lock(&fields).ok_or(Errno::NOLCK)?;
        Ok(self.push(of_node, record, file))
    }

    fn push(&self, of_node: &mut Vec<Owned>, record: LockRecord, file: File) -> Arc<File> {
        let fields = record.fields();
        let file = Arc::new(file);
        of_node.push(Owned {
            record,
            owner: LockOwner(fields.owner),
            file: Arc::clone(&file),
            handle: Handle(fields.handle),
        });
        self.count.fetch_add(1, Ordering::Relaxed);
        file
    }

    /// Adds an owner that has a record. `file` holds its locks.
    pub(crate) fn put(&self, record: LockRecord, file: File) {
        let node = NodeId(record.fields().node);
        let mut nodes = self.nodes();
        self.push(nodes.entry(node).or_default(), record, file);
    }

    /// Calls `each` with all owners, their locks, and the descriptors that hold them.
    pub(crate) fn each(&self, mut each: impl FnMut(&LockFields, Vec<Range>, &File)) {
        for owned in self.nodes().values().flatten() {
            each(&owned.record.fields(), owned.record.ranges(), &owned.file);
        }
    }

    /// Adds an owner of another server. `file` holds its locks.
    ///
    /// # Errors
    ///
    /// `EEXIST` if the owner is already known, `ENOLCK` if the table has no room.
    pub(crate) fn import(&self, fields: &LockFields, ranges: &[Range], file: File) -> Result<()> {
        if self
            .find(NodeId(fields.node), LockOwner(fields.owner))
            .is_some()
        {
            return Err(Errno::EXIST);
        }
        let record = self.table.new_lock(fields).ok_or(Errno::NOLCK)?;
        if !record.set_ranges(ranges) {
            return Err(Errno::NOLCK);
        }
        self.put(record, file);
        Ok(())
    }

    /// Records that an owner has acquired or released a lock.
    pub(crate) fn note(&self, node: NodeId, owner: LockOwner, lock: RecordLock) {
        let nodes = self.nodes();
        let of_node = nodes.get(&node);
        let Some(owned) = of_node.and_then(|all| all.iter().find(|one| one.owner == owner)) else {
            return;
        };
        let ranges = ranges_after(owned.record.ranges(), lock);
        if !owned.record.set_ranges(&ranges) {
            log::warn!("node {}: the state table has no room for its locks", node.0);
        }
    }

    /// Releases an owner's locks on a file, as it has closed a descriptor of the file.
    pub(crate) fn end(&self, node: NodeId, owner: LockOwner) {
        self.end_where(node, |one| one.owner == owner);
    }

    /// Releases the locks that were last requested with a handle that is released now. RecordLocks
    /// of processes were released before, when each process closed the file. For locks of open
    /// files in the guest (its own `F_OFD_SETLK`) this is the only notice.
    pub(crate) fn released(&self, node: NodeId, handle: Handle) {
        self.end_where(node, |one| one.handle == handle);
    }

    pub(crate) fn clear(&self) {
        let ended = {
            let mut nodes = self.nodes();
            self.count.store(0, Ordering::Relaxed);
            std::mem::take(&mut *nodes)
        };
        drop(ended);
    }

    /// The number of descriptors that locks have.
    pub(crate) fn count(&self) -> usize {
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
                log::debug!("can't release locks: {error}");
            }
            one.record.set_ranges(&[]);
            // A running or waiting request continues and may lock again.
            Arc::strong_count(&one.file) > 1
        });
        self.count
            .fetch_sub(before - of_node.len(), Ordering::Relaxed);
        if of_node.is_empty() {
            nodes.remove(&node);
        }
    }

    fn nodes(&self) -> MutexGuard<'_, FxHashMap<NodeId, Vec<Owned>>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Owned {
    fn used_with(&mut self, handle: Handle) {
        self.handle = handle;
        self.record.set_handle(handle.0);
    }
}

/// `ranges` after `lock` was set. The lock replaces what it covers, and merges with adjacent ranges
/// of the same kind, as in the kernel.
fn ranges_after(ranges: Vec<Range>, lock: RecordLock) -> Vec<Range> {
    let exclusive = lock.kind == LockKind::Exclusive;
    let (mut start, mut end) = (lock.start, lock.end);
    let mut left = Vec::with_capacity(ranges.len() + 2);
    for range in ranges {
        let alike = lock.kind != LockKind::Unlock && range.exclusive == exclusive;
        let touches = range.start <= end.saturating_add(1) && start <= range.end.saturating_add(1);
        let covers = range.start <= lock.end && lock.start <= range.end;
        if alike && touches {
            start = start.min(range.start);
            end = end.max(range.end);
        } else if covers {
            if range.start < lock.start {
                let end = lock.start - 1;
                left.push(Range { end, ..range });
            }
            if range.end > lock.end {
                let start = lock.end + 1;
                left.push(Range { start, ..range });
            }
        } else {
            left.push(range);
        }
    }
    if lock.kind != LockKind::Unlock {
        left.push(Range {
            exclusive,
            start,
            end,
        });
    }
    left.sort_unstable_by_key(|range| range.start);
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: LockKind = LockKind::Shared;
    const WRITE: LockKind = LockKind::Exclusive;

    fn ranges(locks: &[(LockKind, u64, u64)]) -> Vec<(bool, u64, u64)> {
        let mut ranges = Vec::new();
        for &(kind, start, end) in locks {
            ranges = ranges_after(ranges, RecordLock { kind, start, end });
        }
        let plain = |range: Range| (range.exclusive, range.start, range.end);
        ranges.into_iter().map(plain).collect()
    }

    #[test]
    fn ranges_match_those_of_kernel() {
        assert_eq!(ranges(&[(READ, 0, 9), (READ, 10, 19)]), [(false, 0, 19)]);
        assert_eq!(
            ranges(&[(READ, 0, 9), (WRITE, 3, 5)]),
            [(false, 0, 2), (true, 3, 5), (false, 6, 9)]
        );
        assert_eq!(
            ranges(&[(WRITE, 0, 99), (LockKind::Unlock, 10, 19)]),
            [(true, 0, 9), (true, 20, 99)]
        );
        assert_eq!(
            ranges(&[(READ, 0, 4), (WRITE, 10, 14), (READ, 3, 20)]),
            [(false, 0, 20)]
        );
        assert_eq!(
            ranges(&[(WRITE, 5, u64::MAX), (LockKind::Unlock, 0, u64::MAX)]),
            []
        );
        assert_eq!(
            ranges(&[(READ, 0, 4), (WRITE, 5, 9)]),
            [(false, 0, 4), (true, 5, 9)]
        );
    }
}
