//! What keeps an inode within reach: a descriptor, or a file handle.
//!
//! A descriptor pins the inode and costs one of a limited number; a file handle costs a few
//! bytes, needs `CAP_DAC_READ_SEARCH` to be opened, and goes stale when the inode ends. The
//! invariant: whatever a hold opens is the inode it was made for, never one that took over its
//! name or its number.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Statx, StatxFlags};
use rustix::io::Errno;
use rustix::path::DecInt;

use crate::fs::Result;
use crate::sys::file_handle::FileHandle;

/// When inodes are held by file handle instead of by descriptor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InodeFileHandles {
    /// Descriptors, as long as [`Options::inode_descriptors`](super::Options) allows; beyond
    /// that file handles where they work, and descriptors where they don't.
    #[default]
    Never,
    /// File handles where they work, descriptors elsewhere.
    Prefer,
    /// File handles; an inode whose file system has none answers `EOPNOTSUPP`.
    Mandatory,
}

/// Names an inode among all that the host has at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) number: u64,
    /// Major number in the upper half, minor in the lower.
    pub(super) device: u64,
    /// Where it is mounted: the same inode through two mounts is two inodes to the guest, since
    /// what lies below may differ.
    pub(super) mount: u64,
}

/// What a `statx` tells of who an inode is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Identity {
    pub(super) key: Key,
    /// When it was made, nanoseconds since 1970, where the file system knows. Tells an inode
    /// from an earlier one of the same number.
    pub(super) birth: Option<i64>,
    pub(super) kind: FileType,
}

/// What an [`Identity`] is made of, and what LOOKUP answers.
pub(super) const IDENTITY: StatxFlags = StatxFlags::BASIC_STATS
    .union(StatxFlags::BTIME)
    .union(StatxFlags::MNT_ID);

impl Identity {
    pub(super) fn of(stat: &Statx) -> Self {
        let knows = |what: StatxFlags| stat.stx_mask & what.bits() != 0;
        let birth = knows(StatxFlags::BTIME)
            .then_some(stat.stx_btime)
            .and_then(|at| {
                at.tv_sec
                    .checked_mul(1_000_000_000)?
                    .checked_add(i64::from(at.tv_nsec))
            });
        Self {
            key: Key {
                number: stat.stx_ino,
                device: u64::from(stat.stx_dev_major) << 32 | u64::from(stat.stx_dev_minor),
                mount: if knows(StatxFlags::MNT_ID) {
                    stat.stx_mnt_id
                } else {
                    0
                },
            },
            birth,
            kind: FileType::from_raw_mode(u32::from(stat.stx_mode)),
        }
    }
}

/// `statx` of the very inode that `fd` is open on.
pub(super) fn stat_fd(fd: impl AsFd, mask: StatxFlags) -> Result<Statx> {
    rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH | AtFlags::NO_AUTOMOUNT, mask)
}

/// A mount that file handles are opened in.
#[derive(Debug)]
pub(super) struct Mount {
    /// Anything in the mount, opened for reading: the kernel takes no `O_PATH` here. `None` in
    /// tests alone.
    anchor: Option<OwnedFd>,
}

/// Keeps one inode within reach. It never changes; an inode that shall be held otherwise gets
/// a new hold in the store, while who uses the old one keeps it.
#[derive(Debug)]
pub(super) enum Hold {
    Descriptor(OwnedFd),
    FileHandle {
        mount: Arc<Mount>,
        handle: FileHandle,
    },
}

/// A descriptor of an inode for the length of one operation, `O_PATH`.
#[derive(Debug)]
pub(super) enum InodeFd<'a> {
    Held(BorrowedFd<'a>),
    Opened(OwnedFd),
}

impl AsFd for InodeFd<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Held(fd) => *fd,
            Self::Opened(fd) => fd.as_fd(),
        }
    }
}

impl InodeFd<'_> {
    /// The descriptor's name in `/proc/self/fd`.
    pub(super) fn proc_name(&self) -> DecInt {
        DecInt::from_fd(self)
    }
}

impl Hold {
    /// An `O_PATH` descriptor of the inode.
    pub(super) fn fd(&self) -> Result<InodeFd<'_>> {
        match self {
            Self::Descriptor(fd) => Ok(InodeFd::Held(fd.as_fd())),
            Self::FileHandle { mount, handle } => mount
                .open(handle, OFlags::PATH | OFlags::NOFOLLOW)
                .map(InodeFd::Opened),
        }
    }

    /// Opens the inode anew, for use. The caller has made sure that it is a regular file or a
    /// directory: to open anything else may block, or act on a device.
    ///
    /// `proc_fds` is `/proc/self/fd`, whose links lead to the inode itself, whatever its name
    /// is by now. A lease that somebody on the host holds is waited for, as by any local
    /// process, at most for as long as `/proc/sys/fs/lease-break-time` says.
    pub(super) fn reopen(&self, proc_fds: &OwnedFd, flags: OFlags) -> Result<OwnedFd> {
        match self {
            Self::Descriptor(fd) => reopen_fd(fd, proc_fds, flags),
            Self::FileHandle { mount, handle } => mount.open(handle, flags),
        }
    }
}

impl Mount {
    fn open(&self, handle: &FileHandle, flags: OFlags) -> Result<OwnedFd> {
        handle.open(self.anchor.as_ref().ok_or(Errno::STALE)?, flags)
    }

    /// A mount for tests, in which nothing can be opened.
    #[cfg(test)]
    pub(super) fn nowhere() -> Arc<Self> {
        Arc::new(Self { anchor: None })
    }
}

/// Opens what `fd` is open on anew, through its link in `/proc/self/fd`.
pub(super) fn reopen_fd(fd: impl AsFd, proc_fds: &OwnedFd, flags: OFlags) -> Result<OwnedFd> {
    let name = DecInt::from_fd(fd);
    let flags = flags | OFlags::CLOEXEC;
    rustix::fs::openat(proc_fds, name.as_c_str(), flags, Mode::empty())
}

/// Decides how each inode is held.
#[derive(Debug)]
pub(super) struct Holder {
    mode: InodeFileHandles,
    /// Descriptors that may hold inodes; the others are for open files.
    budget: usize,
    mounts: Mutex<HashMap<u64, Exportable>>,
    /// The mount of the shared directory stays anchored there: that is busy anyway.
    _root: Option<Arc<Mount>>,
}

/// Whether a mount's inodes can be opened by file handle.
#[derive(Debug)]
enum Exportable {
    /// As long as some inode there is held so: the anchor keeps the mount busy.
    Yes(Weak<Mount>),
    No,
}

impl Holder {
    /// Finds out whether file handles work for the shared directory, open as `root`.
    ///
    /// # Errors
    ///
    /// They don't, and are mandatory.
    pub(super) fn new(
        mode: InodeFileHandles,
        budget: usize,
        root: BorrowedFd<'_>,
        identity: &Identity,
        proc_fds: &OwnedFd,
    ) -> Result<Self> {
        let (root, verdict) = match meet_mount(root, identity.kind, proc_fds) {
            Ok((mount, _)) => {
                let verdict = Exportable::Yes(Arc::downgrade(&mount));
                (Some(mount), verdict)
            }
            Err(error) if mode == InodeFileHandles::Mandatory => return Err(error),
            Err(_) => (None, Exportable::No),
        };
        Ok(Self {
            mode,
            budget,
            mounts: Mutex::new(HashMap::from([(identity.key.mount, verdict)])),
            _root: root,
        })
    }

    /// The hold by file handle of the inode that `fd` is open on, while `held` inodes have a
    /// descriptor; `None` if this one shall have a descriptor too.
    pub(super) fn handle_hold(
        &self,
        fd: BorrowedFd<'_>,
        identity: &Identity,
        proc_fds: &OwnedFd,
        held: usize,
    ) -> Result<Option<Hold>> {
        if self.mode == InodeFileHandles::Never && held < self.budget {
            return Ok(None);
        }
        match self.by_handle(fd, identity, proc_fds) {
            Ok(hold) => Ok(Some(hold)),
            Err(error) if self.mode == InodeFileHandles::Mandatory => Err(error),
            Err(_) => Ok(None),
        }
    }

    fn by_handle(
        &self,
        fd: BorrowedFd<'_>,
        identity: &Identity,
        proc_fds: &OwnedFd,
    ) -> Result<Hold> {
        let id = identity.key.mount;
        let known = {
            let mounts = self.mounts.lock().unwrap_or_else(PoisonError::into_inner);
            match mounts.get(&id) {
                Some(Exportable::Yes(mount)) => mount.upgrade(),
                Some(Exportable::No) if self.mode != InodeFileHandles::Mandatory => {
                    return Err(Errno::OPNOTSUPP);
                }
                Some(Exportable::No) | None => None,
            }
        };
        let found = match known {
            Some(mount) => FileHandle::of(fd).map(|handle| (mount, handle)),
            None => meet_mount(fd, identity.kind, proc_fds),
        };
        // Whether a mount can be used is asked of its directories and files alone: others
        // can't serve as its anchor. Being short of descriptors says nothing of the mount.
        let telling = matches!(identity.kind, FileType::Directory | FileType::RegularFile);
        let verdict = match &found {
            Ok((mount, _)) => Some(Exportable::Yes(Arc::downgrade(mount))),
            Err(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::STALE) => None,
            Err(_) => telling.then_some(Exportable::No),
        };
        if let Some(verdict) = verdict {
            let mut mounts = self.mounts.lock().unwrap_or_else(PoisonError::into_inner);
            mounts.insert(id, verdict);
        }
        let (mount, handle) = found?;
        Ok(Hold::FileHandle { mount, handle })
    }
}

/// Tries whether the mount that `fd` is on can open file handles.
fn meet_mount(
    fd: BorrowedFd<'_>,
    kind: FileType,
    proc_fds: &OwnedFd,
) -> Result<(Arc<Mount>, FileHandle)> {
    let handle = FileHandle::of(fd)?;
    let flags = OFlags::RDONLY | OFlags::NOCTTY | OFlags::NONBLOCK;
    let anchor = match kind {
        FileType::Directory | FileType::RegularFile => reopen_fd(fd, proc_fds, flags)?,
        _ => return Err(Errno::OPNOTSUPP),
    };
    handle.open(&anchor, OFlags::PATH)?;
    let anchor = Some(anchor);
    Ok((Arc::new(Mount { anchor }), handle))
}
