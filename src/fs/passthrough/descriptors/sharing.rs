//! Saves a descriptor for each open file that has no name.
//!
//! The inode of such a file can't be reopened, so its descriptor can't be closed, and the open file
//! has a descriptor as well. When descriptors are short, the inode gives up its own and is reopened
//! through that of the open file. The invariant: an inode without a name that the guest may have open
//! has a descriptor, or an open file that stays open for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::OFlags;

use super::Descriptors;
use crate::fs::NodeId;
use crate::fs::passthrough::inode_table::reopen_fd;
use crate::fs::passthrough::inode_table::{Inode, RefKind};
use crate::io::File;

/// The open files are scanned again once one in this many is new.
const NEW: usize = 32;

/// When to scan for descriptors to share. Orders nothing.
#[derive(Debug, Default)]
pub(crate) struct Sharing {
    /// How often a file was opened or was about to be.
    opened: AtomicU64,
    /// The value of [`Descriptors::change_count`] at the last scan.
    scanned_at: AtomicU64,
    /// Whether any descriptor was ever shared.
    any: AtomicBool,
}

impl Sharing {
    /// Records that a file is about to be opened.
    pub(crate) fn note_open(&self) {
        self.opened.fetch_add(1, Ordering::Relaxed);
    }
}

impl Descriptors {
    /// How many events so far may have made a descriptor redundant.
    fn change_count(&self) -> u64 {
        self.inodes
            .name_changes()
            .wrapping_add(self.sharing.opened.load(Ordering::Relaxed))
    }

    /// Closes the descriptors of nameless inodes that the guest has open. It scans all handles, so
    /// it doesn't run each time that descriptors are short.
    pub(crate) fn share_descriptors(&self) {
        let now = self.change_count();
        let before = self.sharing.scanned_at.load(Ordering::Relaxed);
        let few = u64::try_from(self.files.handles().count() / NEW).unwrap_or(u64::MAX);
        if now.wrapping_sub(before) <= few {
            return;
        }
        self.sharing.scanned_at.store(now, Ordering::Relaxed);
        self.sharing.any.store(true, Ordering::Relaxed);
        // The lock of the shard prevents a release during the scan.
        self.files.handles().each(|open, _, file| {
            if !open.directory
                && let Some(inode) = self.inodes.get(NodeId(open.node))
            {
                self.inodes.reopen_through(&inode, file);
            }
        });
    }

    /// If the inode is reopened through `file`, which is being released, gives it its own
    /// descriptor.
    pub(crate) fn unshare(&self, node: NodeId, file: &File) {
        if !self.sharing.any.load(Ordering::Relaxed) {
            return;
        }
        let Some(inode) = self
            .inodes
            .get(node)
            .filter(|inode| inode.is_reopened_through(file))
        else {
            return;
        };
        match self.with_room(|| reopen_fd(file, &self.proc_fds, OFlags::PATH)) {
            Ok(own) => {
                // In this order the inode can be opened at any time.
                let _own = self.inodes.install(&inode, own);
                let mut ref_kind = inode.ref_kind();
                if matches!(*ref_kind, RefKind::Open(_)) {
                    *ref_kind = RefKind::Nothing;
                }
            }
            // The file stays open for the inode.
            Err(error) => log::debug!("node {}: {error}", node.0),
        }
    }

    /// Reopens a restored inode without a reopen method through a file that is open on it.
    pub(crate) fn share_if_nameless(&self, inode: &Arc<Inode>, file: &File) {
        let mut ref_kind = inode.ref_kind();
        if matches!(*ref_kind, RefKind::Nothing) && !inode.slot().is_full() {
            *ref_kind = RefKind::Open(file.clone());
            self.sharing.any.store(true, Ordering::Relaxed);
        }
    }
}
