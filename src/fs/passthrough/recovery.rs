//! How another process or another server continues the session: `impl Replay` and `impl Migrate`.

use std::ffi::CStr;

use super::handover::{identity_at, name_was_removed, name_was_renamed};
use super::{Passthrough, current_request};
use crate::fs::{self, Handle, LockOwner, Migrate, MoveError, NodeId, Replay};
use crate::io::{Lock, LockKind};
use crate::migration::stream::Snapshot;

impl Replay for Passthrough {
    fn begin_request(&self, unique: u64) {
        current_request::set(unique);
        if let Some(number) = self.handover.attempts().seen(unique)
            && let Some(entry) = self.table().own_journal_entry(unique)
        {
            entry.seen(number);
        }
    }

    fn was_forgotten(&self, node: NodeId, unique: u64) -> bool {
        // An inode that is no longer in the table has no lookups left.
        self.handover.attempts().has_forgotten(unique, node)
            || self.fds().inodes().any(node).is_none()
    }

    fn recorded_inode(&self, unique: u64) -> Option<u64> {
        self.handover.attempts().seen(unique)
    }

    fn inode_at(&self, parent: NodeId, name: &CStr) -> fs::Result<u64> {
        identity_at(self.fds(), parent, name).map(|identity| identity.key.number)
    }

    fn is_known(&self, parent: NodeId, name: &CStr) -> bool {
        let there = identity_at(self.fds(), parent, name);
        there.is_ok_and(|identity| self.fds().inodes().peek(&identity).is_some())
    }

    fn was_removed(&self, parent: NodeId, name: &CStr, number: u64) -> bool {
        name_was_removed(self.fds(), parent, name, number)
    }

    fn was_renamed(&self, from: (NodeId, &CStr), to: (NodeId, &CStr), number: u64) -> bool {
        name_was_renamed(self.fds(), from, to, number)
    }

    fn record_lock(&self, node: NodeId, handle: Handle, owner: LockOwner, lock: Lock) {
        let files = self.fds().files();
        match lock {
            Lock::Record(lock) => files.record_locks().note(node, owner, lock),
            Lock::Whole(kind) => {
                let kind = match kind {
                    LockKind::Unlock => 0,
                    LockKind::Shared => 1,
                    LockKind::Exclusive => 2,
                };
                files.handles().note_lock(node, handle, kind);
            }
        }
    }
}

impl Migrate for Passthrough {
    fn save(&self) -> Result<Snapshot, MoveError> {
        self.handover.save(self.fds(), self.ops.terms().no_open())
    }

    fn release_for_migration(&self) {
        self.handover.release_locks(self.fds());
    }

    fn reacquire(&self) {
        self.handover.reacquire_locks(self.fds());
    }

    fn load(&self, snapshot: &Snapshot) -> Result<(), MoveError> {
        self.handover.load(self.fds(), snapshot)
    }
}
