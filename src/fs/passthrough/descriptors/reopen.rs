//! Opens the descriptors of inodes on demand and closes them when there are too many.
//!
//! An inode without a descriptor is opened by its file handle, or by its name in its parent
//! directory. If the parent is closed too, it is opened first, and so on up to an open directory.
//! The invariant: what is found under a name is used only if device, number and birth time match
//! the inode and, where these are not sufficient, the digest of its file handle matches too.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::fs::Result;
use crate::fs::passthrough::Passthrough;
use crate::fs::passthrough::inode_table::MAX_DEPTH;
use crate::fs::passthrough::inode_table::identity::{IDENTITY, Identity, stat_fd};
use crate::fs::passthrough::inode_table::inode::{Inode, RefKind};
use crate::fs::passthrough::inode_table::inode_fd::{InodeFd, reopen_fd};
use crate::fs::passthrough::inode_table::reopen_method::{ParentLink, ReopenMethod, digest_of};

/// Inode descriptors that are never closed in favour of open files: a few for each running
/// operation.
pub(crate) const MIN_FDS: usize = 16;

/// How many inodes are closed at once when the host has no descriptor left.
const EVICTION_BATCH: usize = 32;

/// How often opening an inode is retried while names change.
const TRIES: usize = 64;

/// How to open one inode on the path.
enum Step {
    Open(OwnedFd),
    Name(ParentLink),
}

impl Passthrough {
    /// An `O_PATH` descriptor of `inode`.
    pub(crate) fn fd<'a>(&self, inode: &'a Inode) -> Result<InodeFd<'a>> {
        match inode.slot().borrow() {
            Some(fd) => Ok(InodeFd::installed(inode, fd)),
            None => self
                .open_closed(inode)
                .or_else(|error| self.search_lost(inode, error))
                .inspect_err(|error| self.note_stale(inode, *error)),
        }
    }

    /// Opens `inode` with `flags`. The caller ensures that it is a regular file or a directory:
    /// opening anything else may block or act on a device.
    ///
    /// If a host process holds a lease on the file, the call waits for it as any local process
    /// would, at most as long as `/proc/sys/fs/lease-break-time` says.
    pub(crate) fn reopen(&self, inode: &Inode, flags: OFlags) -> Result<OwnedFd> {
        if !inode.slot().is_full()
            && let ReopenMethod::Handle { mount, handle } = inode.reopen_method()
        {
            match self.with_room(|| mount.open(&handle, flags)) {
                // Another thread installed a descriptor before it removes the inode's last name.
                Err(Errno::STALE) if inode.slot().is_full() => {}
                opened => return opened.inspect_err(|error| self.note_stale(inode, *error)),
            }
        }
        let fd = self.fd(inode)?;
        self.with_room(|| reopen_fd(&fd, &self.proc_fds, flags))
    }

    /// Ensures that the next lookup doesn't return an inode that can't be opened, unless lookups
    /// can tell for certain that it is the same inode. The guest reacts to `ESTALE` with another
    /// lookup of the name.
    fn note_stale(&self, inode: &Inode, error: Errno) {
        let is_found_for_sure = inode.is_settled() || matches!(&*inode.ref_kind(), RefKind::Name);
        if error == Errno::STALE && !is_found_for_sure {
            self.inodes.remove_key_of(inode);
        }
    }

    /// As [`fd`](Self::fd), for an inode without a descriptor. If it can't be opened, the inode
    /// keeps its identity.
    pub(crate) fn open_closed<'a>(&self, inode: &'a Inode) -> Result<InodeFd<'a>> {
        for _ in 0..TRIES {
            let changes = self.inodes.name_changes();
            match self.try_open_closed(inode) {
                // A directory on the path was closed to make room for another thread.
                Err(Errno::AGAIN) => {}
                // The name is being changed. The thread that changes it uses the inode's
                // descriptor.
                Err(Errno::STALE) if self.inodes.name_changes() != changes => {}
                done => return done,
            }
        }
        match self.try_open_closed(inode) {
            Err(Errno::AGAIN) => Err(Errno::STALE),
            done => done,
        }
    }

    fn try_open_closed<'a>(&self, inode: &'a Inode) -> Result<InodeFd<'a>> {
        if let Some(fd) = inode.slot().borrow() {
            return Ok(InodeFd::installed(inode, fd));
        }
        let link = match self.step(inode)? {
            Step::Open(fd) => return self.install(inode, fd),
            Step::Name(link) => link,
        };
        // Go up to a directory that is open or has a file handle.
        let mut parents: Vec<(Arc<Inode>, Option<Step>)> = Vec::new();
        let mut at = link.parent;
        loop {
            let parent = self.inodes.any(at).ok_or(Errno::STALE)?;
            if parent.slot().is_full() {
                parents.push((parent, None));
                break;
            }
            let step = self.step(&parent)?;
            let above = match &step {
                Step::Open(_) => None,
                Step::Name(link) => Some(link.parent),
            };
            parents.push((parent, Some(step)));
            match above {
                Some(above) if parents.len() < MAX_DEPTH => at = above,
                // A cycle, which consists of outdated names.
                Some(_) => return Err(Errno::STALE),
                None => break,
            }
        }
        // Go down again, opening each directory.
        let mut above: Option<InodeFd<'_>> = None;
        for (parent, step) in parents.iter_mut().rev() {
            let parent = &**parent;
            let fd = match (step.take(), &above) {
                (Some(Step::Open(fd)), _) => self.install(parent, fd)?,
                (Some(Step::Name(link)), Some(above)) => self.open_in(parent, above, &link)?,
                // It was open when the path was collected.
                _ => match parent.slot().borrow() {
                    Some(fd) => InodeFd::installed(parent, fd),
                    None => return Err(Errno::AGAIN),
                },
            };
            above = Some(fd);
        }
        let above = above.ok_or(Errno::STALE)?;
        self.open_in(inode, &above, &link)
    }

    fn step(&self, inode: &Inode) -> Result<Step> {
        let (mount, handle) = match inode.reopen_method() {
            ReopenMethod::Name(link) => return Ok(Step::Name(link)),
            ReopenMethod::Handle { mount, handle } => (mount, handle),
            ReopenMethod::Open(file) => {
                let open = || reopen_fd(&file, &self.proc_fds, OFlags::PATH);
                return self.with_room(open).map(Step::Open);
            }
            ReopenMethod::None | ReopenMethod::Removed => return Err(Errno::STALE),
        };
        self.with_room(|| mount.open(&handle, OFlags::PATH | OFlags::NOFOLLOW))
            .map(Step::Open)
    }

    /// Opens `inode` by its name in `parent`.
    fn open_in<'a>(
        &self,
        inode: &'a Inode,
        parent: &InodeFd<'_>,
        link: &ParentLink,
    ) -> Result<InodeFd<'a>> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = || rustix::fs::openat(parent, &*link.name, flags, Mode::empty());
        let fd = match self.with_room(open) {
            Err(Errno::NOENT | Errno::NOTDIR) => return Err(Errno::STALE),
            opened => opened?,
        };
        let identity = Identity::of(&stat_fd(&fd, IDENTITY)?);
        let same = inode.may_be(&identity)
            && (link.digest == 0 || digest_of(&fd).is_ok_and(|digest| digest == link.digest));
        if same {
            self.install(inode, fd)
        } else {
            Err(Errno::STALE)
        }
    }

    /// Installs `fd` as the inode's own descriptor, unless inodes of this kind have none.
    fn install<'a>(&self, inode: &'a Inode, fd: OwnedFd) -> Result<InodeFd<'a>> {
        let only_for_this_call = match &*inode.ref_kind() {
            RefKind::Handle(_) => !self.reopen_policy.keeps_opened_fds(),
            // Descriptors are short.
            RefKind::Open(_) => true,
            _ => false,
        };
        if only_for_this_call {
            return Ok(InodeFd::opened(inode, fd));
        }
        let installed = match self.inodes.install(inode, fd) {
            Ok(fd) => InodeFd::installed(inode, fd),
            Err(fd) => InodeFd::opened(inode, fd),
        };
        self.make_room();
        Ok(installed)
    }

    /// Closes unused inode descriptors while there are more than the limit.
    pub(crate) fn make_room(&self) {
        let too_many = || {
            let max = self.fd_limits.soft;
            self.inodes.descriptors() > MIN_FDS.min(max) && self.descriptors() > max
        };
        if too_many() {
            self.closed_fds.clear();
            self.close_some(too_many);
        }
    }

    /// Calls `open`. If it fails for lack of descriptors, closes some and calls it once more.
    pub(crate) fn with_room<T>(&self, open: impl Fn() -> Result<T>) -> Result<T> {
        match open() {
            Err(error @ (Errno::MFILE | Errno::NFILE)) => {
                let cached = self.closed_fds.count();
                self.closed_fds.clear();
                let handleless = self.handleless.count();
                let enough = handleless.saturating_sub(EVICTION_BATCH);
                self.handleless
                    .close_some(|| self.handleless.count() > enough);
                let before = self.inodes.descriptors();
                let max = before.saturating_sub(EVICTION_BATCH);
                self.close_some(|| self.inodes.descriptors() > max);
                let fewer =
                    self.inodes.descriptors() < before || self.handleless.count() < handleless;
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
            if !self.close(&inode) {
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
        inode.settle(&identity);
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
