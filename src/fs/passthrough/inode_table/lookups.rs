//! Counts the guest's lookups: finds or adds inodes, and removes those that nothing needs.
//!
//! The invariant: the counts change only under the lock of the inode's shard by identity, and
//! reaching zero and being removed are one step under that lock.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard};

use super::identity::Identity;
use super::inode::Inode;
use super::reopen_method::ReopenMethod;
use super::{InodeTable, Keys, by_key, remove_key};
use crate::fs::NodeId;
use crate::fs::passthrough::current_request;

/// What a new inode starts with.
#[derive(Debug)]
pub(crate) struct NewInode {
    pub(crate) fd: Option<OwnedFd>,
    pub(crate) method: ReopenMethod,
}

impl NewInode {
    /// With a descriptor. The reopen method is set when the name is recorded.
    pub(crate) fn open(fd: OwnedFd) -> Self {
        Self {
            fd: Some(fd),
            method: ReopenMethod::None,
        }
    }
}

impl InodeTable {
    /// Finds a known inode and counts one lookup. Also returns `None` if `identity` is not
    /// sufficient to identify it.
    pub(crate) fn find(&self, identity: &Identity) -> Option<Arc<Inode>> {
        let keys = self.keys(&identity.key);
        // A forgotten inode needs a descriptor first, as a new one does.
        let known = |inode: &&Arc<Inode>| inode.is(identity) && !inode.is_forgotten();
        let inode = by_key(&keys, &identity.key).filter(known)?;
        self.increment_lookups(&keys, inode);
        Some(Arc::clone(inode))
    }

    /// The inode with `identity`'s key, if it can be the same inode.
    pub(crate) fn peek(&self, identity: &Identity) -> Option<Arc<Inode>> {
        let keys = self.keys(&identity.key);
        let inode = by_key(&keys, &identity.key)?;
        inode.may_be(identity).then(|| Arc::clone(inode))
    }

    /// Finds or adds an inode without opening it, and counts one lookup. Returns `None` if it may
    /// be a known inode and `identity` is not sufficient to tell, or one that was forgotten. A new
    /// inode can't be opened before [`record_name_of_new`](Self::record_name_of_new).
    pub(crate) fn add_unopened(&self, identity: &Identity) -> Option<Arc<Inode>> {
        let mut keys = self.keys(&identity.key);
        if let Some(known) = by_key(&keys, &identity.key) {
            let is_known = known.is(identity) && !known.is_forgotten();
            let known = is_known.then_some(known)?;
            self.increment_lookups(&keys, known);
            return Some(Arc::clone(known));
        }
        self.add(&mut keys, identity, None, ReopenMethod::None)
    }

    /// Finds or adds an inode that is open at this moment, and counts one lookup. If a known inode
    /// has the same key, `same` decides by system calls whether it is the same inode. Returns
    /// `None` if the table is full.
    pub(crate) fn find_or_insert(
        &self,
        identity: &Identity,
        new: NewInode,
        same: impl FnOnce(&Inode, &NewInode) -> bool,
    ) -> Option<Arc<Inode>> {
        let mut keys = self.keys(&identity.key);
        if let Some(known) = by_key(&keys, &identity.key) {
            if known.is(identity) || same(known, &new) {
                let was_forgotten_before = known.is_forgotten();
                self.increment_lookups(&keys, known);
                self.settle(known, identity);
                let known = Arc::clone(known);
                drop(keys);
                if was_forgotten_before && let Some(fd) = new.fd {
                    drop(self.install(&known, fd));
                }
                return Some(known);
            }
            // The inode that had this number before no longer exists. The guest keeps its node id.
            let known = Arc::clone(known);
            remove_key(&mut keys, &known);
            if known.is_forgotten() {
                let new = self.add(&mut keys, identity, new.fd, new.method);
                drop(keys);
                self.drop_forgotten(&known);
                return new;
            }
        }
        self.add(&mut keys, identity, new.fd, new.method)
    }

    fn add(
        &self,
        keys: &mut Keys,
        identity: &Identity,
        fd: Option<OwnedFd>,
        method: ReopenMethod,
    ) -> Option<Arc<Inode>> {
        let node = self.next_node();
        let entry = self.table.own_journal_entry(current_request::unique());
        entry.inspect(|entry| entry.before(node.0, false));
        let inode = Inode::new(&self.table, identity, node, fd, method)?;
        entry.inspect(|entry| entry.after());
        inode.set_settled(self.is_settled(identity));
        let inode = Arc::new(inode);
        self.insert(keys, Arc::clone(&inode));
        Some(inode)
    }

    /// Adds one to the child count of `parent`. Returns whether it is still in the table.
    pub(super) fn add_child(&self, parent: &Inode) -> bool {
        let _keys = self.keys(&parent.key());
        let is_present = parent.is_in_use();
        if is_present {
            parent.children.fetch_add(1, Ordering::Relaxed);
        }
        is_present
    }

    /// Subtracts one from the child count of `node`. If that removes the inode, continues with its
    /// parent.
    pub(super) fn remove_child(&self, node: NodeId) {
        let mut next = Some(node);
        while let Some(parent) = next.and_then(|node| self.any(node)) {
            let mut keys = self.keys(&parent.key());
            let before = parent.children.load(Ordering::Relaxed);
            if before == 0 {
                return;
            }
            parent.children.store(before - 1, Ordering::Relaxed);
            next = None;
            if !parent.is_in_use() {
                let removed = self.remove(&mut keys, &parent);
                drop(keys);
                next = self.finish_removal(&parent);
                drop(removed);
            }
        }
    }

    /// Removes `inode` if nothing needs it. `keys` is the lock of its shard.
    pub(super) fn remove_if_unused(&self, mut keys: MutexGuard<'_, Keys>, inode: &Arc<Inode>) {
        if inode.is_in_use() {
            return;
        }
        let removed = self.remove(&mut keys, inode);
        drop(keys);
        if removed.is_some()
            && let Some(parent) = self.finish_removal(inode)
        {
            self.remove_child(parent);
        }
        // Close descriptors outside the locks.
        drop(removed);
    }

    /// Counts one more lookup of an inode that the guest knows, or of a forgotten one.
    ///
    /// Returns false if another thread has removed it in the meantime.
    pub(crate) fn count_lookup(&self, inode: &Inode) -> bool {
        let keys = self.keys(&inode.key());
        let known_to_guest =
            inode.node() == NodeId::ROOT || inode.lookups() > 0 || inode.is_forgotten();
        if known_to_guest {
            self.increment_lookups(&keys, inode);
        }
        known_to_guest
    }

    /// Takes the guard to show that the lock is known.
    fn increment_lookups(&self, _keys: &MutexGuard<'_, Keys>, inode: &Inode) {
        let entry = self.table.own_journal_entry(current_request::unique());
        entry.inspect(|entry| entry.before(inode.node().0, false));
        let lookups = inode.lookups().saturating_add(1);
        inode
            .record
            .set_lookups(lookups, current_request::unique(), true);
        entry.inspect(|entry| entry.after());
        self.forgotten.take(inode);
    }

    /// Subtracts `count` lookups. The last one removes the inode, unless the table keeps it as a
    /// forgotten one. Returns whether it does. The root is never removed.
    #[must_use]
    pub(crate) fn forget(&self, inode: &Arc<Inode>, count: u64) -> bool {
        inode.node() != NodeId::ROOT && self.forget_inode(inode, count, true)
    }

    /// Returns whether the table keeps the inode as a forgotten one.
    pub(super) fn forget_inode(&self, inode: &Arc<Inode>, count: u64, keep: bool) -> bool {
        let keys = self.keys(&inode.key());
        let before = inode.lookups();
        let left = before.saturating_sub(count);
        let entry = self.table.own_journal_entry(current_request::unique());
        entry.inspect(|entry| entry.before(inode.node().0, true));
        inode
            .record
            .set_lookups(left, current_request::unique(), false);
        entry.inspect(|entry| entry.after());
        // `before` is 0 if another thread has removed the inode since `get`.
        if before == 0 || left > 0 {
            return false;
        }
        let forgotten = keep && self.keep_forgotten(&keys, inode);
        if !forgotten {
            self.remove_if_unused(keys, inode);
        }
        forgotten
    }

    /// Cleans up an inode that was removed. Returns its parent, which has lost a child.
    fn finish_removal(&self, inode: &Inode) -> Option<NodeId> {
        let mut ref_kind = inode.ref_kind();
        let left = inode.set_reopen_method(&mut ref_kind, ReopenMethod::Removed);
        if inode.slot.is_full() {
            self.descriptors.fetch_sub(1, Ordering::Relaxed);
        }
        drop(ref_kind);
        if inode.slot.mark(false) {
            self.evictor
                .inode_removed(inode.node(), |node| self.any(node));
        }
        left
    }

    /// Ensures that the next lookup creates a new inode for this key: this inode turned out to be
    /// stale.
    pub(crate) fn remove_key_of(&self, inode: &Inode) {
        if inode.node() != NodeId::ROOT {
            let mut keys = self.keys(&inode.key());
            remove_key(&mut keys, inode);
        }
    }
}
