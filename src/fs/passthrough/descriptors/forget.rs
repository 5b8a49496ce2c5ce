//! FORGET and DESTROY, and how the guest finds a forgotten inode again by a file handle.
//!
//! A guest's kernel builds file handles from node id and generation, and drops inodes from its
//! cache at will. It then asks for them by LOOKUP of `.` and `..`. So an inode can be kept after
//! the guest has forgotten it: without a descriptor, so that it keeps nothing alive on the host,
//! and with the file handle or name by which it can be reopened. The invariant: only these two
//! requests see a forgotten inode, and they find the same inode by device, number and birth time.

use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::io::Errno;

use super::Descriptors;
use crate::fs::passthrough::inode_table::{IDENTITY, Identity, Inode, RefKind, stat_fd};
use crate::fs::{NodeId, Result};

impl Descriptors {
    /// Forgets all inodes that the guest knows, as if it had forgotten them one by one.
    pub(crate) fn forget_all(&self) {
        let known = self.inodes.known_to_guest();
        // The others would be dropped again at once.
        let surplus = known.len().saturating_sub(self.inodes.max_forgotten());
        let (longest, others) = known.split_at(surplus);
        longest
            .iter()
            .for_each(|node| self.inodes.forget_and_remove(*node));
        others
            .iter()
            .for_each(|node| self.forget_lookups(*node, u64::MAX));
    }

    /// Subtracts `count` lookups from `node`.
    pub(crate) fn forget_lookups(&self, node: NodeId, count: u64) {
        let Some(inode) = self.inodes.get(node) else {
            return;
        };
        let is_nameless = Self::may_be_nameless(&inode);
        if self.inodes.forget(&inode, count) {
            self.evict_now(&inode);
        } else if is_nameless {
            self.close_forgotten(inode);
        }
    }

    /// The inode that the guest refers to by `node`, even if the guest has forgotten it.
    pub(crate) fn inode_or_forgotten(&self, node: NodeId) -> Result<Arc<Inode>> {
        let inode = self.inodes.get_or_forgotten(node).ok_or(Errno::STALE)?;
        if inode.is_forgotten() {
            let found = self.fd(&inode).and_then(|fd| stat_fd(fd, IDENTITY));
            match found.map(|stat| Identity::of(&stat)) {
                Ok(identity) if inode.may_be(&identity) => {}
                Ok(_) => {
                    self.evict_forgotten(&inode);
                    return Err(Errno::STALE);
                }
                Err(error) => {
                    if error == Errno::STALE && !matches!(&*inode.ref_kind(), RefKind::Name) {
                        self.inodes.drop_forgotten(&inode);
                    }
                    return Err(error);
                }
            }
        }
        Ok(inode)
    }

    /// Closes the descriptor of a forgotten inode, which was opened for one operation.
    pub(crate) fn evict_forgotten(&self, inode: &Arc<Inode>) {
        if inode.is_forgotten() {
            self.evict_now(inode);
        }
    }

    /// Closes the descriptor of an inode that the guest has just forgotten. Drops the inode if it
    /// can't be reopened.
    fn evict_now(&self, inode: &Arc<Inode>) {
        // Evict it even if it was used recently.
        inode.slot().second_chance();
        if self.can_be_reopened(inode) && self.close_now(inode) {
            self.inodes.drop_surplus_forgotten();
        } else {
            self.inodes.drop_forgotten(inode);
        }
    }

    /// Whether `inode` can be reopened. An inode that lost its known name may have a file handle.
    fn can_be_reopened(&self, inode: &Inode) -> bool {
        let ref_kind = inode.ref_kind();
        match *ref_kind {
            RefKind::Name | RefKind::Handle(_) => return true,
            RefKind::Open(_) | RefKind::Removed => return false,
            RefKind::Nothing => {}
        }
        let Some(fd) = inode.slot().inspect() else {
            return false;
        };
        let Ok(stat) = stat_fd(fd.as_fd(), IDENTITY) else {
            return false;
        };
        let identity = Identity::of(&stat);
        if stat.stx_nlink == 0 || identity.key != inode.key() {
            return false;
        }
        match self
            .reopen_policy
            .by_handle(fd.as_fd(), &identity, &self.proc_fds)
        {
            Ok(method) => {
                self.inodes.change_reopen_method(inode, ref_kind, method);
                matches!(&*inode.ref_kind(), RefKind::Handle(_))
            }
            Err(_) => false,
        }
    }
}
