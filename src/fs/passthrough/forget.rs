//! What the guest gives back (FORGET, DESTROY), and how it finds it again by a file handle.
//!
//! A guest's kernel makes file handles of node id and generation, and drops inodes from its cache
//! as it likes; then it asks for them by LOOKUP of `.` and `..` alone. So an inode that was given
//! back may be remembered: without a descriptor, so that it keeps nothing on the host, and by the
//! file handle or the name that leads to it. The invariant: what is remembered is nobody's but by
//! those two requests, and what they find is the inode that it was, as device, number and birth
//! say.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::io::Errno;

use super::Passthrough;
use super::inode::{Inode, RefKind};
use super::inode_ref::{IDENTITY, Identity, stat_fd};
use crate::fs::{NodeId, Result};

impl Passthrough {
    /// Gives back `count` lookups of `node`.
    pub(super) fn forget_lookups(&self, node: NodeId, count: u64) {
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

    /// Gives back all that the guest has, and remembers of it what it does of what is given back
    /// one by one.
    pub(super) fn forget_all(&self) {
        let known = self.inodes.known_to_guest();
        // The others would be remembered for a moment only.
        let surplus = known.len().saturating_sub(self.options.remember_inodes);
        let (longest, others) = known.split_at(surplus);
        longest
            .iter()
            .for_each(|node| self.inodes.forget_and_remove(*node));
        others
            .iter()
            .for_each(|node| self.forget_lookups(*node, u64::MAX));
    }

    /// Whether what the guest gives back as its session ends may be remembered: not where this
    /// process has the session from another, since who goes on with it may be another guest.
    pub(super) fn outlives_session(&self) -> bool {
        self.inodes.keeps_forgotten() && !self.inherited.load(Ordering::Relaxed)
    }

    /// The inode that the guest calls `node`, also if it has given it back and it is remembered.
    pub(super) fn inode_or_forgotten(&self, node: NodeId) -> Result<Arc<Inode>> {
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

    /// Takes the descriptor that was opened for a moment from an inode that is remembered.
    pub(super) fn evict_forgotten(&self, inode: &Arc<Inode>) {
        if inode.is_forgotten() {
            self.evict_now(inode);
        }
    }

    /// Takes the descriptor from an inode that is remembered from now on; one that is not found
    /// without goes.
    fn evict_now(&self, inode: &Arc<Inode>) {
        // However lately it was used.
        inode.slot().second_chance();
        if self.can_be_reopened(inode) && self.close_now(inode) {
            self.inodes.drop_surplus_forgotten();
        } else {
            self.inodes.drop_forgotten(inode);
        }
    }

    /// Whether there is a way to `inode`. One that has lost the name that led to it may have a
    /// file handle.
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
