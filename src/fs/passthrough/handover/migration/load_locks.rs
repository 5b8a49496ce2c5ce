//! The destination's side of locks: acquires those that the guest had at the source.
//!
//! The invariant: a lock that can't be acquired counts as a loss.

use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;

use super::load::Loader;
use super::locks::{acquire, set, whole};
use crate::fs::{Handle, HandleKind, MoveError, NodeId};
use crate::io::File;
use crate::migration::stream::{Locks, Snapshot};
use crate::state::{LockFields, Range};

impl Loader<'_> {
    /// Acquires the locks that the guest had at the source.
    pub(super) fn import_locks(
        &self,
        snapshot: &Snapshot,
        lost: &mut usize,
    ) -> Result<(), MoveError> {
        for open in &snapshot.opens {
            let Some(lock) = whole(open.flock) else {
                continue;
            };
            let (node, handle) = (NodeId(open.node), Handle(open.handle));
            let file = self
                .fds
                .files()
                .handles()
                .file(node, handle, HandleKind::File);
            if let Err(source) = file.and_then(|file| set(&file, lock)) {
                let node = open.node;
                self.count_loss(MoveError::Lock { node, source }, lost)?;
                self.fds
                    .files()
                    .handles()
                    .note_lock(NodeId(node), handle, 0);
            }
        }
        for locks in &snapshot.locks {
            if let Err(source) = self.import_owner(locks) {
                let node = locks.node;
                self.count_loss(MoveError::Lock { node, source }, lost)?;
            }
        }
        Ok(())
    }

    fn import_owner(&self, locks: &Locks) -> Result<(), Errno> {
        let inode = self
            .fds
            .inodes()
            .any(NodeId(locks.node))
            .ok_or(Errno::STALE)?;
        let ranges: Vec<Range> = locks
            .ranges
            .iter()
            .map(|range| Range {
                start: range.start,
                end: range.end,
                exclusive: range.exclusive,
            })
            .collect();
        let file = File::from_fd(self.fds.open_to_lock(&inode)?);
        acquire(&file, &ranges)?;
        let fields = LockFields {
            owner: locks.owner,
            node: locks.node,
            handle: locks.handle,
            fd: file.as_fd().as_raw_fd(),
        };
        self.fds
            .files()
            .record_locks()
            .import(&fields, &ranges, file)
    }
}
