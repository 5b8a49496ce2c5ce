//! By which name an inode is found: taken note of as lookups, links, renames and removals show it.
//!
//! The invariant: a name is taken note of only if names in its directory have not changed since
//! before it was looked at, and the directory of a name that leads somewhere stays in the store.

use std::ffi::CStr;
use std::sync::MutexGuard;
use std::sync::atomic::Ordering;

use super::{InodeStore, MAX_DEPTH};
use crate::fs::NodeId;
use crate::fs::passthrough::dir_seqcount::{DirChange, DirSeq};
use crate::fs::passthrough::inode::{Inode, RefKind};
use crate::fs::passthrough::inode_ref::{ParentLink, ReopenMethod};

impl InodeStore {
    /// Takes note that `inode`, which the guest has, went by `name` in `parent` since `dir_seq`,
    /// unless names in `parent` have changed meanwhile.
    pub(in crate::fs::passthrough) fn record_name(
        &self,
        inode: &Inode,
        parent: &Inode,
        name: &CStr,
        dir_seq: DirSeq,
    ) {
        if inode.record.is_nameless() {
            // Under the lock: who takes the name away has announced that before.
            let _ref_kind = inode.ref_kind();
            if dir_seq.is_unchanged(&self.dir_seqcounts) {
                inode.record.set_nameless(false);
            }
        }
        self.record_name_if(inode, parent, name, 0, || {
            dir_seq.is_unchanged(&self.dir_seqcounts)
        });
    }

    /// As [`see`](Self::see), for an inode that was just added without being opened; `digest` is
    /// as in [`ParentLink`]. Answers whether it can be reached now.
    pub(in crate::fs::passthrough) fn record_name_of_new(
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

    /// As [`see`](Self::see), for who changes the name.
    pub(in crate::fs::passthrough) fn record_rename(
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

    /// Makes `place` the way to `inode`; answers which parent has a child less now.
    fn set_parent_link(
        &self,
        inode: &Inode,
        link: ParentLink,
        valid: impl FnOnce() -> bool,
    ) -> Option<NodeId> {
        let mut ref_kind = inode.ref_kind();
        // Asked under the lock: who changes the name says so before he comes here.
        if !valid() || matches!(*ref_kind, RefKind::Handle(_) | RefKind::Removed) {
            return Some(link.parent);
        }
        let parent = link.parent;
        // What tells it from another of its name stays.
        let digest = inode.print(&ref_kind).unwrap_or(link.digest);
        let old_parent = inode.set_reopen_method(
            &mut ref_kind,
            ReopenMethod::Name(ParentLink { digest, ..link }),
        );
        if !matches!(*ref_kind, RefKind::Name) {
            // The table is full; nothing leads there through the parent.
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

    /// Takes note that `inode` has lost `name` in `parent`. If that was the way to it, its
    /// descriptor, which the caller uses, stays from now on.
    pub(in crate::fs::passthrough) fn record_removal(
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

    /// Which changes of names were known when this was called: before the name is looked at.
    pub(in crate::fs::passthrough) fn dir_seq(&self, parent: &Inode) -> DirSeq {
        self.dir_seqcounts.dir_seq(parent.node())
    }

    /// Announces that names in two directories change, until the answer is dropped. To be called
    /// while the descriptors of the inodes concerned are in use.
    pub(in crate::fs::passthrough) fn begin_name_change(
        &self,
        parents: [&Inode; 2],
    ) -> DirChange<'_> {
        self.dir_seqcounts.begin(parents.map(Inode::node))
    }

    /// Whether names in the directory of `dir_seq` have not changed since.
    pub(in crate::fs::passthrough) fn is_unchanged(&self, dir_seq: DirSeq) -> bool {
        dir_seq.is_unchanged(&self.dir_seqcounts)
    }

    /// Sets whether the guest itself has taken the last name from `inode`, or is about to do so.
    pub(in crate::fs::passthrough) fn set_nameless(&self, inode: &Inode, nameless: bool) {
        let _ref_kind = inode.ref_kind();
        inode.record.set_nameless(nameless);
    }

    /// How many changes of names there have been.
    pub(in crate::fs::passthrough) fn name_changes(&self) -> u64 {
        self.dir_seqcounts.count()
    }

    /// Makes `way` what leads to `inode`, whose guard `held` is.
    pub(in crate::fs::passthrough) fn change_reopen_method(
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

    /// Breaks a circle of names, which can only come of names that are outdated: directories
    /// that the host moved about. `node` is now known to be in `parent`.
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
