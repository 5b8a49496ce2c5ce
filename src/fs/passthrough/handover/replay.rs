//! Tells what a previous server process already did for a request that is replayed.
//!
//! The invariant: a request counts as done only if the current state of the file system shows it.

use std::ffi::CStr;

use crate::fs::passthrough::{Passthrough, current_request};
use crate::fs::{Handle, LockOwner, NodeId, Replay, Result};
use crate::io::{Lock, LockKind};

impl Replay for Passthrough {
    fn begin_request(&self, unique: u64) {
        current_request::set(unique);
        if let Some(number) = self.previous_attempts.seen(unique)
            && let Some(entry) = self.table().own_journal_entry(unique)
        {
            entry.seen(number);
        }
    }

    fn was_forgotten(&self, node: NodeId, unique: u64) -> bool {
        // An inode that is no longer in the store has no lookups left.
        self.previous_attempts.has_forgotten(unique, node) || self.inodes.any(node).is_none()
    }

    fn recorded_inode(&self, unique: u64) -> Option<u64> {
        self.previous_attempts.seen(unique)
    }

    fn inode_at(&self, parent: NodeId, name: &CStr) -> Result<u64> {
        self.identity_at(parent, name)
            .map(|identity| identity.key.number)
    }

    fn is_known(&self, parent: NodeId, name: &CStr) -> bool {
        let there = self.identity_at(parent, name);
        there.is_ok_and(|identity| self.inodes.peek(&identity).is_some())
    }

    fn was_removed(&self, parent: NodeId, name: &CStr, number: u64) -> bool {
        self.name_was_removed(parent, name, number)
    }

    fn was_renamed(&self, from: (NodeId, &CStr), to: (NodeId, &CStr), number: u64) -> bool {
        self.name_was_moved(from, to, number)
    }

    fn record_lock(&self, node: NodeId, handle: Handle, owner: LockOwner, lock: Lock) {
        match lock {
            Lock::Record(lock) => self.locks.note(node, owner, lock),
            Lock::Whole(kind) => {
                let kind = match kind {
                    LockKind::Unlock => 0,
                    LockKind::Shared => 1,
                    LockKind::Exclusive => 2,
                };
                self.handles.note_lock(node, handle, kind);
            }
        }
    }
}
