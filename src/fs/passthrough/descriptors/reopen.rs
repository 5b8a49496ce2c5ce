//! Opens the descriptors of inodes on demand and closes them when there are too many.
//!
//! An inode without a descriptor is opened by its file handle, or by its name in its parent
//! directory. If the parent is closed too, it is opened first, and so on up to an open directory.
//! The invariant: what is found under a name is used only if device, number and birth time match
//! the inode and, where these are not sufficient, the digest of its file handle matches too.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::Descriptors;
use crate::fs::Result;
use crate::fs::passthrough::inode_table::{
    IDENTITY, Identity, Inode, InodeFd, MAX_DEPTH, ParentLink, RefKind, ReopenMethod, digest_of,
    reopen_fd, stat_fd,
};

/// How often opening an inode is retried while names change.
const TRIES: usize = 64;

/// How to open one inode on the path.
enum Step {
    Open(OwnedFd),
    Name(ParentLink),
}

/// Whether `fd`, which `link` has led to, is open on `inode`.
pub(super) fn is_same(inode: &Inode, link: &ParentLink, fd: &OwnedFd) -> Result<bool> {
    let identity = Identity::of(&stat_fd(fd, IDENTITY)?);
    Ok(inode.may_be(&identity)
        && (link.digest == 0 || digest_of(fd).is_ok_and(|digest| digest == link.digest)))
}

impl Descriptors {
    /// An `O_PATH` descriptor of `inode`.
    pub(crate) fn fd<'a>(&self, inode: &'a Inode) -> Result<InodeFd<'a>> {
        match inode.slot().borrow() {
            Some(fd) => Ok(InodeFd::installed(inode, fd)),
            None => self
                .open_closed(inode)
                .or_else(|error| self.open_through_file(inode, error))
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
                // The name is being changed, or was. The thread that changes it has given the
                // inode a descriptor before.
                Err(Errno::STALE)
                    if self.inodes.name_changes() != changes || inode.slot().is_full() => {}
                done => return done,
            }
        }
        match self.try_open_closed(inode) {
            Err(Errno::AGAIN) => Err(Errno::STALE),
            done => done,
        }
    }

    /// Opens an inode whose name leads elsewhere through a file that the guest has open on it. Other
    /// errors than `ESTALE` are returned as they are.
    fn open_through_file<'a>(&self, inode: &'a Inode, error: Errno) -> Result<InodeFd<'a>> {
        if error != Errno::STALE {
            return Err(error);
        }
        let mut found = None;
        self.files.handles().each(|open, _, file| {
            if found.is_none() && open.node == inode.node().0 {
                found = Some(file.clone());
            }
        });
        let file = found.ok_or(error)?;
        let fd = self.with_room(|| reopen_fd(&file, &self.proc_fds, OFlags::PATH))?;
        self.install(inode, fd)
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
        if is_same(inode, link, &fd)? {
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
}
