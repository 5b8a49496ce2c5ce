//! Records the names by which inodes can be reopened, as lookups, links, renames and removals show
//! them.
//!
//! The invariant: a name is recorded only if no name in its directory has changed since before the
//! name was read, and the parent of a recorded name stays in the table.

use std::ffi::CStr;
use std::sync::MutexGuard;
use std::sync::atomic::Ordering;

use super::dir_seqcount::{DirChange, DirSeq};
use super::inode::{Inode, RefKind};
use super::reopen_method::{ParentLink, ReopenMethod};
use super::{InodeTable, MAX_DEPTH};
use crate::fs::NodeId;

impl InodeTable {
    /// Records that `inode`, which the guest knows, had `name` in `parent` at `dir_seq`, unless
    /// names in `parent` have changed since.
    pub(crate) fn record_name(&self, inode: &Inode, parent: &Inode, name: &CStr, dir_seq: DirSeq) {
        if inode.record.is_nameless() {
            // Under the lock: a thread that removes the name announces the change before it takes
            // the lock.
            let _ref_kind = inode.ref_kind();
            if dir_seq.is_unchanged(&self.dir_seqcounts) {
                inode.record.set_nameless(false);
            }
        }
        self.record_name_if(inode, parent, name, 0, || {
            dir_seq.is_unchanged(&self.dir_seqcounts)
        });
    }

    /// As [`record_name`](Self::record_name), for an inode that was just added without being
    /// opened. `digest` is that of [`ParentLink`]. Returns whether the inode can be opened now.
    pub(crate) fn record_name_of_new(
        &self,
        inode: &Inode,
        parent: &Inode,
        name: &CStr,
        digest: u64,
        dir_seq: DirSeq,
    ) -> bool {
        self.record_name_if(inode, parent, name, digest, || {
            dir_seq.is_unchanged(&self.dir_seqcounts)
        });
        inode.slot.is_full() || !matches!(&*inode.ref_kind(), RefKind::Nothing)
    }

    /// As [`record_name`](Self::record_name), for the thread that changes the name itself.
    pub(crate) fn record_rename(
        &self,
        inode: &Inode,
        parent: &Inode,
        name: &CStr,
        _: &DirChange<'_>,
    ) {
        self.record_name_if(inode, parent, name, 0, || true);
    }

    fn record_name_if(
        &self,
        inode: &Inode,
        parent: &Inode,
        name: &CStr,
        digest: u64,
        valid: impl FnOnce() -> bool,
    ) {
        let is_settled = {
            let ref_kind = inode.ref_kind();
            match &*ref_kind {
                RefKind::Name => inode.is_linked_as(&ref_kind, parent.node(), name),
                RefKind::Nothing | RefKind::Open(_) => {
                    inode.node() == NodeId::ROOT || inode.node() == parent.node()
                }
                RefKind::Handle(_) | RefKind::Removed => true,
            }
        };
        if is_settled || !self.add_child(parent) {
            return;
        }
        let link = ParentLink {
            parent: parent.node(),
            name: name.into(),
            digest,
        };
        if let Some(old_parent) = self.set_parent_link(inode, link, valid) {
            self.remove_child(old_parent);
        }
        if inode.children.load(Ordering::Relaxed) > 0 {
            self.break_cycle(inode.node(), parent.node());
        }
    }

    /// Makes `link` the inode's parent link. Returns the parent that lost a child by this.
    fn set_parent_link(
        &self,
        inode: &Inode,
        link: ParentLink,
        valid: impl FnOnce() -> bool,
    ) -> Option<NodeId> {
        let mut ref_kind = inode.ref_kind();
        // Checked under the lock: a thread that changes the name announces the change first.
        if !valid() || matches!(*ref_kind, RefKind::Handle(_) | RefKind::Removed) {
            return Some(link.parent);
        }
        let parent = link.parent;
        // The digest belongs to the inode, so it stays.
        let digest = inode.digest(&ref_kind).unwrap_or(link.digest);
        let old_parent = inode.set_reopen_method(
            &mut ref_kind,
            ReopenMethod::Name(ParentLink { digest, ..link }),
        );
        if !matches!(*ref_kind, RefKind::Name) {
            // The table is full, so the inode has no parent link now.
            drop(ref_kind);
            if let Some(old_parent) = old_parent {
                self.remove_child(old_parent);
            }
            return Some(parent);
        }
        if inode.slot.is_full() {
            self.evictor.add(inode);
        }
        old_parent
    }

    /// Records that `inode` has lost `name` in `parent`. If it was to be reopened by that name, its
    /// descriptor, which the caller is using, is kept from now on.
    pub(crate) fn record_removal(
        &self,
        inode: &Inode,
        parent: &Inode,
        name: &CStr,
        _: &DirChange<'_>,
    ) {
        let old_parent = {
            let mut ref_kind = inode.ref_kind();
            if !inode.is_linked_as(&ref_kind, parent.node(), name) {
                return;
            }
            inode.set_reopen_method(&mut ref_kind, ReopenMethod::None)
        };
        if let Some(old_parent) = old_parent {
            self.remove_child(old_parent);
        }
    }

    /// The current sequence count of the directory. Read it before reading a name.
    pub(crate) fn dir_seq(&self, parent: &Inode) -> DirSeq {
        self.dir_seqcounts.dir_seq(parent.node())
    }

    /// Announces that names in two directories are about to change, until the return value is
    /// dropped. The caller must be using the descriptors of the inodes concerned.
    pub(crate) fn begin_name_change(&self, parents: [&Inode; 2]) -> DirChange<'_> {
        self.dir_seqcounts.begin(parents.map(Inode::node))
    }

    /// Whether no name in the directory has changed since `dir_seq`.
    pub(crate) fn is_unchanged(&self, dir_seq: DirSeq) -> bool {
        dir_seq.is_unchanged(&self.dir_seqcounts)
    }

    /// Sets whether the guest has removed the last name of `inode` or is about to do so.
    pub(crate) fn set_nameless(&self, inode: &Inode, nameless: bool) {
        let _ref_kind = inode.ref_kind();
        inode.record.set_nameless(nameless);
    }

    /// The total number of name changes.
    pub(crate) fn name_changes(&self) -> u64 {
        self.dir_seqcounts.count()
    }

    /// Sets the reopen method of `inode`, whose lock `ref_kind` is.
    pub(crate) fn change_reopen_method(
        &self,
        inode: &Inode,
        mut ref_kind: MutexGuard<'_, RefKind>,
        method: ReopenMethod,
    ) {
        let old_parent = inode.set_reopen_method(&mut ref_kind, method);
        drop(ref_kind);
        if let Some(old_parent) = old_parent {
            self.remove_child(old_parent);
        }
    }

    /// Breaks a cycle of parent links. A cycle arises only from outdated names, when the host moves
    /// directories. `node` is now known to be in `parent`.
    fn break_cycle(&self, node: NodeId, parent: NodeId) {
        let mut at = self.any(parent);
        for _ in 0..MAX_DEPTH {
            let Some(inode) = at else {
                return;
            };
            let Some(up) = inode.parent() else {
                return;
            };
            if up == node {
                let ref_kind = inode.ref_kind();
                if inode.parent_of_kind(&ref_kind) == Some(node) {
                    self.change_reopen_method(&inode, ref_kind, ReopenMethod::None);
                }
                return;
            }
            at = self.any(up);
        }
    }
}
