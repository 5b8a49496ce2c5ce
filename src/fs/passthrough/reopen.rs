//! From inodes to descriptors: opened when needed, and closed when there are too many.
//!
//! An inode that was closed is opened by its file handle, or by its name in its directory, which
//! may have to be opened itself, up to one that is open. The invariant: what is found under a
//! name is used only if device, number and birth say that it is the inode, and where these
//! could deceive, a digest of its file handle.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::Passthrough;
use super::inode::{Inode, RefKind};
use super::inode_ref::{
    IDENTITY, Identity, InodeFd, ParentLink, ReopenMethod, digest_of, reopen_fd, stat_fd,
};
use super::inodes::MAX_DEPTH;
use crate::fs::Result;

/// Descriptors of inodes that are left to those however many files are open: a few for each
/// operation that runs.
pub(super) const MIN_FDS: usize = 16;

/// How many inodes are closed where the host has no descriptor left.
const EVICTION_BATCH: usize = 32;

/// How often an inode is looked for while names change.
const TRIES: usize = 64;

/// How an inode is opened at this moment.
enum Step {
    Open(OwnedFd),
    Name(ParentLink),
}

impl Passthrough {
    /// An `O_PATH` descriptor of `inode`.
    pub(super) fn fd<'a>(&self, inode: &'a Inode) -> Result<InodeFd<'a>> {
        match inode.slot().borrow() {
            Some(fd) => Ok(InodeFd::installed(inode, fd)),
            None => self
                .open_closed(inode)
                .or_else(|error| self.search_lost(inode, error))
                .inspect_err(|error| self.note_stale(inode, *error)),
        }
    }

    /// A descriptor of `inode` for use. The caller has made sure that it is a regular file or a
    /// directory: to open anything else may block, or act on a device.
    ///
    /// A lease that somebody on the host holds is waited for, as by any local process, at most
    /// for as long as `/proc/sys/fs/lease-break-time` says.
    pub(super) fn reopen(&self, inode: &Inode, flags: OFlags) -> Result<OwnedFd> {
        if !inode.slot().is_full()
            && let ReopenMethod::Handle { mount, handle } = inode.reopen_method()
        {
            match self.with_room(|| mount.open(&handle, flags)) {
                // It has got a descriptor meanwhile, as the guest was about to take its last name.
                Err(Errno::STALE) if inode.slot().is_full() => {}
                opened => return opened.inspect_err(|error| self.note_stale(inode, *error)),
            }
        }
        let fd = self.fd(inode)?;
        self.with_room(|| reopen_fd(&fd, &self.proc_fds, flags))
    }

    /// What can't be reached any more shall not be found by a lookup again, unless that sees
    /// for sure that it is the same: the guest answers `ESTALE` with another lookup of the name.
    fn note_stale(&self, inode: &Inode, error: Errno) {
        let is_found_for_sure = inode.is_settled() || matches!(&*inode.ref_kind(), RefKind::Name);
        if error == Errno::STALE && !is_found_for_sure {
            self.inodes.remove_key_of(inode);
        }
    }

    /// As [`fd`](Self::fd) of an inode without a descriptor; one that can't be reached stays who it is.
    pub(super) fn open_closed<'a>(&self, inode: &'a Inode) -> Result<InodeFd<'a>> {
        for _ in 0..TRIES {
            let changes = self.inodes.name_changes();
            match self.try_open_closed(inode) {
                // A directory on the way was closed to make room for another thread.
                Err(Errno::AGAIN) => {}
                // A name that is just being changed: who does so uses the inode's descriptor.
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
        // Up to a directory that is open, or can be opened without a name.
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
                // A circle, of names that are all outdated.
                Some(_) => return Err(Errno::STALE),
                None => break,
            }
        }
        // And down again.
        let mut above: Option<InodeFd<'_>> = None;
        for (parent, step) in parents.iter_mut().rev() {
            let parent = &**parent;
            let fd = match (step.take(), &above) {
                (Some(Step::Open(fd)), _) => self.install(parent, fd)?,
                (Some(Step::Name(link)), Some(above)) => self.open_in(parent, above, &link)?,
                // It was open a moment ago.
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

    /// Opens `inode` by its name.
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

    /// Makes `fd` the inode's own, where inodes have descriptors of their own.
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

    /// Closes inodes that are not in use, as long as there are more than there may be.
    pub(super) fn make_room(&self) {
        let too_many = || {
            let max = self.fd_limits.soft;
            self.inodes.descriptors() > MIN_FDS.min(max) && self.descriptors() > max
        };
        if too_many() {
            self.closed_fds.clear();
            self.close_some(too_many);
        }
    }

    /// Calls `open`, and once more with some inodes closed if there was no descriptor left.
    pub(super) fn with_room<T>(&self, open: impl Fn() -> Result<T>) -> Result<T> {
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

    /// Goes around the clock, at most twice, while `more` says so.
    pub(super) fn close_some(&self, more: impl Fn() -> bool) {
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

    /// Takes the descriptor from `inode`, unless it was used lately or can't be missed.
    pub(super) fn close(&self, inode: &Inode) -> bool {
        !inode.slot().second_chance() && self.close_now(inode)
    }

    /// As [`close`](Self::close), for who has asked whether it was used lately.
    pub(super) fn close_now(&self, inode: &Inode) -> bool {
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

    /// How `inode`, open as `fd`, will be found again.
    fn plan_reopen(&self, inode: &Inode, ref_kind: &RefKind, fd: BorrowedFd<'_>) -> ReopenPlan {
        match ref_kind {
            // It has no business with the clock any more.
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
        // One that has lost its names behind our back stays usable too. What has another
        // number by now (overlayfs when it copies up) would not be found by it.
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

/// How an inode that is about to be closed will be found again.
enum ReopenPlan {
    /// As before.
    Same,
    /// By its name, with this print.
    Digest(u64),
    /// By this instead of its name.
    Better(ReopenMethod),
    /// Not now; once it is older.
    Later,
    /// Not at all, until it is seen again.
    Never,
}
