//! Closes the descriptors of inodes when there are too many.
//!
//! The invariant: an inode is closed only if it can be reopened, and is then reopened as itself or
//! not at all.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::io::Errno;

use super::Descriptors;
use crate::fs::Result;
use crate::fs::passthrough::inode_table::{
    IDENTITY, Identity, Inode, RefKind, ReopenMethod, digest_of, stat_fd,
};

/// Inode descriptors that are never closed in favour of open files: a few for each running
/// operation.
pub(crate) const MIN_FDS: usize = 16;

/// How many inodes are closed at once when the host has no descriptor left.
const EVICTION_BATCH: usize = 32;

impl Descriptors {
    /// Closes unused inode descriptors while there are more than the limit.
    pub(crate) fn make_room(&self) {
        let too_many = || {
            let max = self.limits.soft;
            self.inodes.descriptors() > MIN_FDS.min(max) && self.count() > max
        };
        if too_many() {
            self.files.closed().clear();
            self.close_some(too_many);
        }
    }

    /// Calls `open`. If it fails for lack of descriptors, closes some and calls it once more.
    pub(crate) fn with_room<T>(&self, open: impl Fn() -> Result<T>) -> Result<T> {
        match open() {
            Err(error @ (Errno::MFILE | Errno::NFILE)) => {
                let cached = self.files.closed().count();
                self.files.closed().clear();
                let handleless = self.files.handleless().count();
                let enough = handleless.saturating_sub(EVICTION_BATCH);
                self.files
                    .handleless()
                    .close_some(|| self.files.handleless().count() > enough);
                let before = self.inodes.descriptors();
                let max = before.saturating_sub(EVICTION_BATCH);
                self.close_some(|| self.inodes.descriptors() > max);
                let fewer = self.inodes.descriptors() < before
                    || self.files.handleless().count() < handleless;
                if fewer || cached > 0 {
                    open()
                } else {
                    Err(error)
                }
            }
            done => done,
        }
    }

    /// Evicts inode descriptors, in at most two rounds over all queues, while `more` returns true.
    pub(crate) fn close_some(&self, more: impl Fn() -> bool) {
        let evictor = self.inodes.evictor();
        let mut turns = 2 * evictor.len() + evictor.turns();
        while turns > 0 && more() {
            turns -= 1;
            let Some(inode) = evictor.next(|node| self.inodes.any(node)) else {
                continue;
            };
            if self.close(&inode) {
                evictor.count_eviction();
            } else {
                self.inodes.enqueue_for_eviction(&inode);
            }
        }
    }

    /// Closes the descriptor of `inode`, unless it was used recently or can't be reopened. Returns
    /// whether the inode has no descriptor now.
    pub(crate) fn close(&self, inode: &Inode) -> bool {
        !inode.slot().second_chance() && self.close_now(inode)
    }

    /// As [`close`](Self::close), without the check for recent use.
    pub(crate) fn close_now(&self, inode: &Inode) -> bool {
        let mut ref_kind = inode.ref_kind();
        let Some(fd) = inode.slot().inspect() else {
            return true;
        };
        let plan = match self.plan_reopen(inode, &ref_kind, fd.as_fd()) {
            ReopenPlan::Later => return false,
            ReopenPlan::Never => {
                self.inodes
                    .change_reopen_method(inode, ref_kind, ReopenMethod::None);
                return false;
            }
            plan => plan,
        };
        let taken = self.inodes.uninstall(inode, &ref_kind, fd);
        let closed = taken.is_some();
        match plan {
            _ if !closed => drop(ref_kind),
            ReopenPlan::Same | ReopenPlan::Later | ReopenPlan::Never => drop(ref_kind),
            ReopenPlan::Digest(digest) => inode.set_digest(&mut ref_kind, digest),
            ReopenPlan::Better(better) => self.inodes.change_reopen_method(inode, ref_kind, better),
        }
        drop(taken);
        closed
    }

    /// Decides how `inode`, open as `fd`, will be reopened once it is closed.
    fn plan_reopen(&self, inode: &Inode, ref_kind: &RefKind, fd: BorrowedFd<'_>) -> ReopenPlan {
        match ref_kind {
            // These don't belong in the evictor's queues any more.
            RefKind::Nothing | RefKind::Open(_) | RefKind::Removed => return ReopenPlan::Later,
            RefKind::Handle(_) | RefKind::Name => {}
        }
        let Ok(stat) = stat_fd(fd, IDENTITY) else {
            return ReopenPlan::Later;
        };
        if matches!(ref_kind, RefKind::Handle(_)) {
            return if stat.stx_nlink == 0 {
                ReopenPlan::Never
            } else {
                ReopenPlan::Same
            };
        }
        let identity = Identity::of(&stat);
        // An inode that lost its last name on the host stays usable, so its descriptor stays. An
        // inode that changed its number (overlayfs on copy-up) would not match when it is reopened.
        if stat.stx_nlink == 0 || identity.key != inode.key() {
            return ReopenPlan::Never;
        }
        if let Ok(better) = self.reopen_policy.by_handle(fd, &identity, &self.proc_fds) {
            return ReopenPlan::Better(better);
        }
        self.inodes.settle(inode, &identity);
        if inode.is_settled() {
            return ReopenPlan::Digest(0);
        }
        match digest_of(fd) {
            Ok(digest) => ReopenPlan::Digest(digest),
            Err(_) if identity.birth.is_some() => ReopenPlan::Later,
            Err(_) => ReopenPlan::Never,
        }
    }
}

/// How an inode that is about to be closed will be reopened.
enum ReopenPlan {
    /// In the same way as before.
    Same,
    /// By its name, with this digest.
    Digest(u64),
    /// By this method instead of its name.
    Better(ReopenMethod),
    /// It can't be reopened yet; once it is older, it can.
    Later,
    /// It can't be reopened until a lookup sees it again.
    Never,
}
