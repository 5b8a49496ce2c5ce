//! By which name an inode is found: taken note of as lookups, links, renames and removals show it.
//!
//! The invariant: a name is taken note of only if names in its directory have not changed since
//! before it was looked at, and the directory of a name that leads somewhere stays in the store.

use std::ffi::CStr;
use std::sync::MutexGuard;
use std::sync::atomic::Ordering;

use super::{DEEPEST, Store};
use crate::fs::NodeId;
use crate::fs::passthrough::dir_seqcount::{Changing, DirSeq};
use crate::fs::passthrough::inode::{Inode, RefKind};
use crate::fs::passthrough::inode_ref::{ParentLink, ReopenMethod};

impl Store {
    /// Takes note that `inode`, which the guest has, went by `name` in `parent` since `moment`,
    /// unless names in `parent` have changed meanwhile.
    pub(in crate::fs::passthrough) fn see(
        &self,
        inode: &Inode,
        parent: &Inode,
        name: &CStr,
        moment: DirSeq,
    ) {
        if inode.record.is_nameless() {
            // Under the lock: who takes the name away has announced that before.
            let _held = inode.held();
            if moment.lasts(&self.changes) {
                inode.record.set_nameless(false);
            }
        }
        self.see_if(inode, parent, name, 0, || moment.lasts(&self.changes));
    }

    /// As [`see`](Self::see), for an inode that was just added without being opened; `print` is
    /// as in [`ParentLink`]. Answers whether it can be reached now.
    pub(in crate::fs::passthrough) fn see_new(
        &self,
        inode: &Inode,
        parent: &Inode,
        name: &CStr,
        print: u64,
        moment: DirSeq,
    ) -> bool {
        self.see_if(inode, parent, name, print, || moment.lasts(&self.changes));
        inode.slot.is_full() || !matches!(&*inode.held(), RefKind::Nothing)
    }

    /// As [`see`](Self::see), for who changes the name.
    pub(in crate::fs::passthrough) fn rename(
        &self,
        inode: &Inode,
        parent: &Inode,
        name: &CStr,
        _: &Changing<'_>,
    ) {
        self.see_if(inode, parent, name, 0, || true);
    }

    fn see_if(
        &self,
        inode: &Inode,
        parent: &Inode,
        name: &CStr,
        print: u64,
        valid: impl FnOnce() -> bool,
    ) {
        let settled = {
            let held = inode.held();
            match &*held {
                RefKind::Name => inode.goes_by(&held, parent.node(), name),
                RefKind::Nothing | RefKind::Open(_) => {
                    inode.node() == NodeId::ROOT || inode.node() == parent.node()
                }
                RefKind::Handle(_) | RefKind::Forgotten => true,
            }
        };
        if settled || !self.adopt(parent) {
            return;
        }
        let place = ParentLink {
            parent: parent.node(),
            name: name.into(),
            print,
        };
        if let Some(left) = self.put(inode, place, valid) {
            self.leave(left);
        }
        if inode.children.load(Ordering::Relaxed) > 0 {
            self.unwind(inode.node(), parent.node());
        }
    }

    /// Makes `place` the way to `inode`; answers which parent has a child less now.
    fn put(
        &self,
        inode: &Inode,
        place: ParentLink,
        valid: impl FnOnce() -> bool,
    ) -> Option<NodeId> {
        let mut held = inode.held();
        // Asked under the lock: who changes the name says so before he comes here.
        if !valid() || matches!(*held, RefKind::Handle(_) | RefKind::Forgotten) {
            return Some(place.parent);
        }
        let parent = place.parent;
        // What tells it from another of its name stays.
        let print = inode.print(&held).unwrap_or(place.print);
        let left = inode.set_way(&mut held, ReopenMethod::Name(ParentLink { print, ..place }));
        if !matches!(*held, RefKind::Name) {
            // The table is full; nothing leads there through the parent.
            drop(held);
            if let Some(left) = left {
                self.leave(left);
            }
            return Some(parent);
        }
        if inode.slot.is_full() {
            self.clock.add(inode);
        }
        left
    }

    /// Takes note that `inode` has lost `name` in `parent`. If that was the way to it, its
    /// descriptor, which the caller uses, stays from now on.
    pub(in crate::fs::passthrough) fn lose(
        &self,
        inode: &Inode,
        parent: &Inode,
        name: &CStr,
        _: &Changing<'_>,
    ) {
        let left = {
            let mut held = inode.held();
            if !inode.goes_by(&held, parent.node(), name) {
                return;
            }
            inode.set_way(&mut held, ReopenMethod::None)
        };
        if let Some(left) = left {
            self.leave(left);
        }
    }

    /// Which changes of names were known when this was called: before the name is looked at.
    pub(in crate::fs::passthrough) fn moment(&self, parent: &Inode) -> DirSeq {
        self.changes.moment(parent.node())
    }

    /// Announces that names in two directories change, until the answer is dropped. To be called
    /// while the descriptors of the inodes concerned are in use.
    pub(in crate::fs::passthrough) fn changing(&self, parents: [&Inode; 2]) -> Changing<'_> {
        self.changes.begin(parents.map(Inode::node))
    }

    /// Whether names in the directory of `moment` have not changed since.
    pub(in crate::fs::passthrough) fn lasts(&self, moment: DirSeq) -> bool {
        moment.lasts(&self.changes)
    }

    /// Sets whether the guest itself has taken the last name from `inode`, or is about to do so.
    pub(in crate::fs::passthrough) fn set_nameless(&self, inode: &Inode, nameless: bool) {
        let _held = inode.held();
        inode.record.set_nameless(nameless);
    }

    /// How many changes of names there have been.
    pub(in crate::fs::passthrough) fn changes(&self) -> u64 {
        self.changes.count()
    }

    /// Makes `way` what leads to `inode`, whose guard `held` is.
    pub(in crate::fs::passthrough) fn change_way(
        &self,
        inode: &Inode,
        mut held: MutexGuard<'_, RefKind>,
        way: ReopenMethod,
    ) {
        let left = inode.set_way(&mut held, way);
        drop(held);
        if let Some(left) = left {
            self.leave(left);
        }
    }

    /// Breaks a circle of names, which can only come of names that are outdated: directories
    /// that the host moved about. `node` is now known to be in `parent`.
    fn unwind(&self, node: NodeId, parent: NodeId) {
        let mut at = self.any(parent);
        for _ in 0..DEEPEST {
            let Some(inode) = at else {
                return;
            };
            let Some(up) = inode.parent() else {
                return;
            };
            if up == node {
                let held = inode.held();
                if inode.parent_by(&held) == Some(node) {
                    self.change_way(&inode, held, ReopenMethod::None);
                }
                return;
            }
            at = self.any(up);
        }
    }
}
