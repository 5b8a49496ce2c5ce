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
    IDENTITY, Identity, InodeFd, ParentLink, ReopenMethod, print_of, reopen_fd, stat_fd,
};
use super::inodes::DEEPEST;
use crate::fs::Result;

/// Descriptors of inodes that are left to those however many files are open: a few for each
/// operation that runs.
pub(super) const LEAST: usize = 16;

/// How many inodes are closed where the host has no descriptor left.
const SOME: usize = 32;

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
            Some(fd) => Ok(InodeFd::held(inode, fd)),
            None => self
                .open_closed(inode)
                .or_else(|error| self.seek(inode, error))
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
            && let ReopenMethod::Handle { mount, handle } = inode.way()
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
        let is_found_for_sure = inode.is_settled() || matches!(&*inode.held(), RefKind::Name);
        if error == Errno::STALE && !is_found_for_sure {
            self.inodes.disown(inode);
        }
    }

    /// As [`fd`](Self::fd) of an inode without a descriptor; one that can't be reached stays who it is.
    pub(super) fn open_closed<'a>(&self, inode: &'a Inode) -> Result<InodeFd<'a>> {
        for _ in 0..TRIES {
            let changes = self.inodes.changes();
            match self.open_again(inode) {
                // A directory on the way was closed to make room for another thread.
                Err(Errno::AGAIN) => {}
                // A name that is just being changed: who does so uses the inode's descriptor.
                Err(Errno::STALE) if self.inodes.changes() != changes => {}
                done => return done,
            }
        }
        match self.open_again(inode) {
            Err(Errno::AGAIN) => Err(Errno::STALE),
            done => done,
        }
    }

    fn open_again<'a>(&self, inode: &'a Inode) -> Result<InodeFd<'a>> {
        if let Some(fd) = inode.slot().borrow() {
            return Ok(InodeFd::held(inode, fd));
        }
        let place = match self.step(inode)? {
            Step::Open(fd) => return self.keep(inode, fd),
            Step::Name(place) => place,
        };
        // Up to a directory that is open, or can be opened without a name.
        let mut parents: Vec<(Arc<Inode>, Option<Step>)> = Vec::new();
        let mut at = place.parent;
        loop {
            let parent = self.inodes.any(at).ok_or(Errno::STALE)?;
            if parent.slot().is_full() {
                parents.push((parent, None));
                break;
            }
            let step = self.step(&parent)?;
            let above = match &step {
                Step::Open(_) => None,
                Step::Name(place) => Some(place.parent),
            };
            parents.push((parent, Some(step)));
            match above {
                Some(above) if parents.len() < DEEPEST => at = above,
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
                (Some(Step::Open(fd)), _) => self.keep(parent, fd)?,
                (Some(Step::Name(place)), Some(above)) => self.open_in(parent, above, &place)?,
                // It was open a moment ago.
                _ => match parent.slot().borrow() {
                    Some(fd) => InodeFd::held(parent, fd),
                    None => return Err(Errno::AGAIN),
                },
            };
            above = Some(fd);
        }
        let above = above.ok_or(Errno::STALE)?;
        self.open_in(inode, &above, &place)
    }

    fn step(&self, inode: &Inode) -> Result<Step> {
        let (mount, handle) = match inode.way() {
            ReopenMethod::Name(place) => return Ok(Step::Name(place)),
            ReopenMethod::Handle { mount, handle } => (mount, handle),
            ReopenMethod::Open(file) => {
                let open = || reopen_fd(&file, &self.proc_fds, OFlags::PATH);
                return self.with_room(open).map(Step::Open);
            }
            ReopenMethod::None | ReopenMethod::Forgotten => return Err(Errno::STALE),
        };
        self.with_room(|| mount.open(&handle, OFlags::PATH | OFlags::NOFOLLOW))
            .map(Step::Open)
    }

    /// Opens `inode` by its name.
    fn open_in<'a>(
        &self,
        inode: &'a Inode,
        parent: &InodeFd<'_>,
        place: &ParentLink,
    ) -> Result<InodeFd<'a>> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = || rustix::fs::openat(parent, &*place.name, flags, Mode::empty());
        let fd = match self.with_room(open) {
            Err(Errno::NOENT | Errno::NOTDIR) => return Err(Errno::STALE),
            opened => opened?,
        };
        let identity = Identity::of(&stat_fd(&fd, IDENTITY)?);
        let same = inode.may_be(&identity)
            && (place.print == 0 || print_of(&fd).is_ok_and(|print| print == place.print));
        if same {
            self.keep(inode, fd)
        } else {
            Err(Errno::STALE)
        }
    }

    /// Makes `fd` the inode's own, where inodes have descriptors of their own.
    fn keep<'a>(&self, inode: &'a Inode, fd: OwnedFd) -> Result<InodeFd<'a>> {
        let for_now = match &*inode.held() {
            RefKind::Handle(_) => !self.holder.keeps_opened(),
            // Descriptors are short.
            RefKind::Open(_) => true,
            _ => false,
        };
        if for_now {
            return Ok(InodeFd::opened(inode, fd));
        }
        let kept = match self.inodes.install(inode, fd) {
            Ok(held) => InodeFd::held(inode, held),
            Err(fd) => InodeFd::opened(inode, fd),
        };
        self.make_room();
        Ok(kept)
    }

    /// Closes inodes that are not in use, as long as there are more than there may be.
    pub(super) fn make_room(&self) {
        let too_many = || {
            let most = self.bounds.most;
            self.inodes.descriptors() > LEAST.min(most) && self.descriptors() > most
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
                let spare = self.closed_fds.count();
                self.closed_fds.clear();
                let kept = self.on_demand.count();
                let enough = kept.saturating_sub(SOME);
                self.on_demand
                    .close_some(|| self.on_demand.count() > enough);
                let before = self.inodes.descriptors();
                let most = before.saturating_sub(SOME);
                self.close_some(|| self.inodes.descriptors() > most);
                let fewer = self.inodes.descriptors() < before || self.on_demand.count() < kept;
                if fewer || spare > 0 {
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
        let clock = self.inodes.clock();
        let mut turns = 2 * clock.len() + clock.turns();
        while turns > 0 && more() {
            turns -= 1;
            let Some(inode) = clock.next(|node| self.inodes.any(node)) else {
                continue;
            };
            if !self.close(&inode) {
                self.inodes.line_up(&inode);
            }
        }
    }

    /// Takes the descriptor from `inode`, unless it was used lately or can't be missed.
    pub(super) fn close(&self, inode: &Inode) -> bool {
        !inode.slot().second_chance() && self.close_now(inode)
    }

    /// As [`close`](Self::close), for who has asked whether it was used lately.
    pub(super) fn close_now(&self, inode: &Inode) -> bool {
        let mut held = inode.held();
        let Some(fd) = inode.slot().inspect() else {
            return true;
        };
        let found = match self.way_back(inode, &held, fd.as_fd()) {
            Found::Later => return false,
            Found::Never => {
                self.inodes.change_way(inode, held, ReopenMethod::None);
                return false;
            }
            found => found,
        };
        let taken = self.inodes.uninstall(inode, &held, fd);
        let closed = taken.is_some();
        match found {
            _ if !closed => drop(held),
            Found::Same | Found::Later | Found::Never => drop(held),
            Found::Print(print) => inode.set_print(&mut held, print),
            Found::Better(better) => self.inodes.change_way(inode, held, better),
        }
        drop(taken);
        closed
    }

    /// How `inode`, open as `fd`, will be found again.
    fn way_back(&self, inode: &Inode, held: &RefKind, fd: BorrowedFd<'_>) -> Found {
        match held {
            // It has no business with the clock any more.
            RefKind::Nothing | RefKind::Open(_) | RefKind::Forgotten => return Found::Later,
            RefKind::Handle(_) | RefKind::Name => {}
        }
        let Ok(stat) = stat_fd(fd, IDENTITY) else {
            return Found::Later;
        };
        if matches!(held, RefKind::Handle(_)) {
            return if stat.stx_nlink == 0 {
                Found::Never
            } else {
                Found::Same
            };
        }
        let identity = Identity::of(&stat);
        // One that has lost its names behind our back stays usable too. What has another
        // number by now (overlayfs when it copies up) would not be found by it.
        if stat.stx_nlink == 0 || identity.key != inode.key() {
            return Found::Never;
        }
        if let Ok(better) = self.holder.by_handle(fd, &identity, &self.proc_fds) {
            return Found::Better(better);
        }
        inode.settle(&identity);
        if inode.is_settled() {
            return Found::Print(0);
        }
        match print_of(fd) {
            Ok(print) => Found::Print(print),
            Err(_) if identity.birth.is_some() => Found::Later,
            Err(_) => Found::Never,
        }
    }
}

/// How an inode that is about to be closed will be found again.
enum Found {
    /// As before.
    Same,
    /// By its name, with this print.
    Print(u64),
    /// By this instead of its name.
    Better(ReopenMethod),
    /// Not now; once it is older.
    Later,
    /// Not at all, until it is seen again.
    Never,
}
