//! One descriptor instead of two for a file that is open and has no name any more.
//!
//! Such a file's inode can't be found again, so its descriptor can't be closed, and each open file
//! has one of its own besides. When descriptors run short, the inode gives up its own and is
//! reached by the open file's. The invariant: an inode without a name has a descriptor, or an open
//! file that is kept open for it.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::OFlags;

use super::Passthrough;
use super::inode::{Inode, RefKind};
use super::inode_ref::reopen_fd;
use super::inodes::InodeStore;
use crate::fs::NodeId;
use crate::io::File;

/// What share of the open files must be new before they are looked at again.
const NEW: usize = 32;

/// When to look for descriptors to share. Orders nothing.
#[derive(Debug, Default)]
pub(super) struct Sharing {
    /// How often a file was opened, or was about to be.
    opened: AtomicU64,
    /// What [`Passthrough::change_count`] was when all open files were last looked at.
    looked_at: AtomicU64,
    /// Something was shared at some time.
    any: AtomicBool,
}

impl Sharing {
    /// A file is about to be opened.
    pub(super) fn opens(&self) {
        self.opened.fetch_add(1, Ordering::Relaxed);
    }
}

impl InodeStore {
    /// Takes the descriptor from `inode`, which has no name, and reaches it by `file` from now on.
    fn share(&self, inode: &Inode, file: &File) -> bool {
        let mut ref_kind = inode.ref_kind();
        if !matches!(*ref_kind, RefKind::Nothing) {
            return false;
        }
        inode.slot().second_chance();
        let own = inode.slot().inspect();
        let Some(own) = own.and_then(|fd| self.uninstall(inode, &ref_kind, fd)) else {
            return false;
        };
        *ref_kind = RefKind::Open(file.clone());
        drop(ref_kind);
        drop(own);
        true
    }
}

impl Inode {
    /// Whether it is reached by `file`.
    fn shares(&self, file: &File) -> bool {
        matches!(&*self.ref_kind(), RefKind::Open(shared) if shared.as_raw_fd() == file.as_raw_fd())
    }
}

impl Passthrough {
    /// How often there was something that may have made a descriptor one to be shared.
    fn change_count(&self) -> u64 {
        self.inodes
            .name_changes()
            .wrapping_add(self.sharing.opened.load(Ordering::Relaxed))
    }

    /// Closes the descriptors of inodes without a name that the guest has open. Goes through all that
    /// is open, so not each time that descriptors are short.
    pub(super) fn share_descriptors(&self) {
        let now = self.change_count();
        let before = self.sharing.looked_at.load(Ordering::Relaxed);
        let few = u64::try_from(self.handles.count() / NEW).unwrap_or(u64::MAX);
        if now.wrapping_sub(before) <= few {
            return;
        }
        self.sharing.looked_at.store(now, Ordering::Relaxed);
        self.sharing.any.store(true, Ordering::Relaxed);
        // None of them can be released meanwhile.
        self.handles.each(|open, _, file| {
            if !open.directory
                && let Some(inode) = self.inodes.get(NodeId(open.node))
            {
                self.inodes.share(&inode, file);
            }
        });
    }

    /// Gives the inode a descriptor of its own, if it is reached by `file`, which is released.
    pub(super) fn unshare(&self, node: NodeId, file: &File) {
        if !self.sharing.any.load(Ordering::Relaxed) {
            return;
        }
        let Some(inode) = self.inodes.get(node).filter(|inode| inode.shares(file)) else {
            return;
        };
        match self.with_room(|| reopen_fd(file, &self.proc_fds, OFlags::PATH)) {
            Ok(own) => {
                // In this order: there is a way at any time.
                let _own = self.inodes.install(&inode, own);
                let mut ref_kind = inode.ref_kind();
                if matches!(*ref_kind, RefKind::Open(_)) {
                    *ref_kind = RefKind::Nothing;
                }
            }
            // It stays open for the inode.
            Err(error) => log::debug!("node {}: {error}", node.0),
        }
    }

    /// Lets an inode that has come back without a way be reached by what is open of it.
    pub(super) fn share_if_nameless(&self, inode: &Arc<Inode>, file: &File) {
        let mut ref_kind = inode.ref_kind();
        if matches!(*ref_kind, RefKind::Nothing) && !inode.slot().is_full() {
            *ref_kind = RefKind::Open(file.clone());
            self.sharing.any.store(true, Ordering::Relaxed);
        }
    }
}
