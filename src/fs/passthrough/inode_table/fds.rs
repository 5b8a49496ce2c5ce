//! The descriptors that inodes own: installing, taking and counting them.
//!
//! The invariant: a slot is filled and emptied only under the inode's `ref_kind` lock, and an inode
//! that was removed from the table gets no descriptor.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::MutexGuard;
use std::sync::atomic::Ordering;

use super::InodeTable;
use super::fd_evictor::FdEvictor;
use super::inode::{Inode, RefKind};
use crate::io::File;
use crate::sys::fd_slot::Borrowed;

impl InodeTable {
    /// Gives `inode` a descriptor again, and borrows it.
    ///
    /// # Errors
    ///
    /// Returns `fd` if the inode has been removed from the table.
    pub(crate) fn install<'a>(
        &self,
        inode: &'a Inode,
        fd: OwnedFd,
    ) -> Result<Borrowed<'a>, OwnedFd> {
        let ref_kind = inode.ref_kind();
        if matches!(*ref_kind, RefKind::Removed) {
            return Err(fd);
        }
        match inode.slot.fill(fd) {
            Ok(borrowed) => {
                let number = borrowed.as_fd().as_raw_fd();
                inode.record.set_descriptor(Some(number));
                self.descriptors.fetch_add(1, Ordering::Relaxed);
                if !matches!(*ref_kind, RefKind::Nothing | RefKind::Open(_)) {
                    self.evictor.add(inode);
                }
                Ok(borrowed)
            }
            // Another thread installed a descriptor first.
            Err(fd) => inode.slot.borrow().ok_or(fd),
        }
    }

    /// Takes the descriptor from `inode`, whose `ref_kind` is locked. Returns `None` if the
    /// descriptor is in use.
    pub(crate) fn uninstall(
        &self,
        inode: &Inode,
        _ref_kind: &MutexGuard<'_, RefKind>,
        fd: Borrowed<'_>,
    ) -> Option<OwnedFd> {
        let taken = fd.take();
        if taken.is_some() {
            inode.record.set_descriptor(None);
            self.descriptors.fetch_sub(1, Ordering::Relaxed);
        }
        taken
    }

    /// Puts `inode` at the end of the eviction queue if it has a descriptor and can be reopened.
    pub(crate) fn enqueue_for_eviction(&self, inode: &Inode) {
        let ref_kind = inode.ref_kind();
        if inode.slot.is_full() && !matches!(*ref_kind, RefKind::Nothing | RefKind::Removed) {
            self.evictor.add(inode);
        }
    }

    /// Decides which descriptors are closed first.
    pub(crate) fn evictor(&self) -> &FdEvictor {
        &self.evictor
    }

    /// Closes the descriptor of `inode`, which has no name, and reopens it through `file` from now
    /// on.
    pub(crate) fn reopen_through(&self, inode: &Inode, file: &File) -> bool {
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
