//! What keeps an inode within reach: a descriptor, a file handle, or a name.
//!
//! A descriptor pins the inode and costs one of a limited number; a file handle costs a few
//! bytes, needs `CAP_DAC_READ_SEARCH` to be opened, and goes stale when the inode ends; a name
//! needs nothing, and leads there until somebody else on the host takes it away. The invariant:
//! whatever is opened by them is the inode they were made for, never one that took over its
//! name or its number.

use std::collections::HashMap;
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Statx, StatxFlags};
use rustix::io::Errno;
use rustix::path::DecInt;

use super::inode::Inode;
use crate::fs::{NodeId, Result};
use crate::io::File;
use crate::sys::fd_slot::Borrowed;
use crate::sys::file_handle::FileHandle;

/// When inodes are held by file handle instead of by descriptor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InodeFileHandles {
    /// Descriptors, as many as [`Options::max_open_inodes`](super::Options) allows; beyond
    /// that file handles where they work, and names where they don't.
    #[default]
    Never,
    /// File handles where they work, elsewhere as with `Never`.
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
    /// How many anchors there are. Orders nothing; a budget goes by it.
    anchors: Arc<AtomicUsize>,
}

impl Drop for Mount {
    fn drop(&mut self) {
        self.anchors.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How an inode is reached while no descriptor of it is open.
#[derive(Debug)]
pub(super) enum ReopenMethod {
    /// Not at all: its descriptor is kept until the guest forgets it.
    None,
    /// By a file handle.
    Handle {
        mount: Arc<Mount>,
        handle: FileHandle,
    },
    /// By the name that it had when it was last seen.
    Name(ParentLink),
    /// By a file that the guest has open.
    Open(File),
    /// It is no longer in the store, and gets no descriptor any more.
    Removed,
}

/// Where an inode was last seen. The parent is named by its node id, so it may be moved without
/// its children being told; the store keeps it as long as they are there.
#[derive(Clone, Debug)]
pub(super) struct ParentLink {
    pub(super) parent: NodeId,
    pub(super) name: Box<CStr>,
    /// What tells the inode from a later one that number and birth can't tell it from; 0 where
    /// they can. See [`digest_of`].
    pub(super) digest: u64,
}

/// A digest of the file handle, which needs no privilege to be asked for and has the inode's
/// generation in it; never 0.
pub(super) fn digest_of(fd: impl AsFd) -> Result<u64> {
    FileHandle::of(fd).map(|handle| digest(&handle))
}

/// As [`digest_of`], of what goes by `name` in `directory`.
pub(super) fn digest_at(directory: impl AsFd, name: &CStr) -> Result<u64> {
    FileHandle::at(directory, name).map(|handle| digest(&handle))
}

/// The state table stores this value, so it must not depend on the version of a crate.
fn digest(handle: &FileHandle) -> u64 {
    let bytes = handle.bytes();
    let length = (bytes.len() as u64).to_le_bytes();
    let digest = length.iter().chain(bytes).fold(0, |digest: u64, byte| {
        let product = (digest ^ u64::from(*byte)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        product ^ product >> 32
    });
    digest.max(1)
}

/// A descriptor of an inode for the length of one operation, `O_PATH`.
#[derive(Debug)]
pub(super) struct InodeFd<'a> {
    inode: &'a Inode,
    fd: Source<'a>,
}

#[derive(Debug)]
enum Source<'a> {
    /// The inode's own.
    Installed(Borrowed<'a>),
    /// For this operation alone.
    Opened(OwnedFd),
}

impl<'a> InodeFd<'a> {
    pub(super) fn installed(inode: &'a Inode, fd: Borrowed<'a>) -> Self {
        let fd = Source::Installed(fd);
        Self { inode, fd }
    }

    pub(super) fn opened(inode: &'a Inode, fd: OwnedFd) -> Self {
        let fd = Source::Opened(fd);
        Self { inode, fd }
    }

    /// Whether it was opened for this operation alone.
    pub(super) fn is_opened(&self) -> bool {
        matches!(self.fd, Source::Opened(_))
    }

    /// The descriptor, if it was opened for this operation alone.
    pub(super) fn into_opened(self) -> Option<OwnedFd> {
        match self.fd {
            Source::Installed(_) => None,
            Source::Opened(fd) => Some(fd),
        }
    }

    /// The descriptor's name in `/proc/self/fd`.
    pub(super) fn proc_name(&self) -> DecInt {
        DecInt::from_fd(self)
    }
}

impl AsFd for InodeFd<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.fd {
            Source::Installed(fd) => fd.as_fd(),
            Source::Opened(fd) => fd.as_fd(),
        }
    }
}

/// A directory in which names are looked up: an inode, and a descriptor of it.
pub(super) trait Directory: AsFd {
    fn inode(&self) -> &Inode;
}

impl Directory for InodeFd<'_> {
    fn inode(&self) -> &Inode {
        self.inode
    }
}

impl<D: Directory> Directory for &D {
    fn inode(&self) -> &Inode {
        (**self).inode()
    }
}

impl Mount {
    pub(super) fn open(&self, handle: &FileHandle, flags: OFlags) -> Result<OwnedFd> {
        handle.open(self.anchor.as_ref().ok_or(Errno::STALE)?, flags)
    }

    /// A mount for tests, in which nothing can be opened.
    #[cfg(test)]
    pub(super) fn nowhere() -> Arc<Self> {
        let anchors = Arc::new(AtomicUsize::new(1));
        Arc::new(Self {
            anchor: None,
            anchors,
        })
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
pub(super) struct ReopenPolicy {
    mode: InodeFileHandles,
    mounts: Mutex<HashMap<u64, Exportable>>,
    /// The mount of the shared directory stays anchored there: that is busy anyway.
    root: Option<Arc<Mount>>,
    /// How many descriptors mounts have.
    anchors: Arc<AtomicUsize>,
}

/// Whether a mount's inodes can be opened by file handle.
#[derive(Debug)]
enum Exportable {
    /// As long as some inode there is held so: the anchor keeps the mount busy.
    Yes(Weak<Mount>),
    No,
}

impl ReopenPolicy {
    /// Finds out whether file handles work for the shared directory, open as `root`.
    ///
    /// # Errors
    ///
    /// They don't, and are mandatory.
    pub(super) fn new(
        mode: InodeFileHandles,
        root: BorrowedFd<'_>,
        identity: &Identity,
        proc_fds: &OwnedFd,
    ) -> Result<Self> {
        let anchors = Arc::default();
        let (root, verdict) = match probe_mount(root, identity.kind, proc_fds, &anchors) {
            Ok((mount, _)) => {
                let verdict = Exportable::Yes(Arc::downgrade(&mount));
                (Some(mount), verdict)
            }
            Err(error) if mode == InodeFileHandles::Mandatory => return Err(error),
            Err(_) => (None, Exportable::No),
        };
        Ok(Self {
            mode,
            mounts: Mutex::new(HashMap::from([(identity.key.mount, verdict)])),
            root,
            anchors,
        })
    }

    /// How many descriptors mounts have.
    pub(super) fn anchors(&self) -> usize {
        self.anchors.load(Ordering::Relaxed)
    }

    /// The way by file handle to a new inode, which `fd` is open on; `None` if it shall be held
    /// by a descriptor.
    pub(super) fn method_for_new(
        &self,
        fd: BorrowedFd<'_>,
        identity: &Identity,
        proc_fds: &OwnedFd,
    ) -> Result<Option<ReopenMethod>> {
        if self.mode == InodeFileHandles::Never {
            return Ok(None);
        }
        match self.by_handle(fd, identity, proc_fds) {
            Ok(method) => Ok(Some(method)),
            Err(error) if self.mode == InodeFileHandles::Mandatory => Err(error),
            Err(_) => Ok(None),
        }
    }

    /// The mount of the shared directory, where file handles can be opened in it.
    pub(super) fn shared_mount(&self) -> Option<Arc<Mount>> {
        self.root.clone()
    }

    /// The mount with the number `id`, if file handles are opened in it already.
    pub(super) fn mount(&self, id: u64) -> Option<Arc<Mount>> {
        let mounts = self.mounts.lock().unwrap_or_else(PoisonError::into_inner);
        match mounts.get(&id)? {
            Exportable::Yes(mount) => mount.upgrade(),
            Exportable::No => None,
        }
    }

    /// Whether an inode that was opened by its file handle keeps the descriptor until it is
    /// needed elsewhere.
    pub(super) fn keeps_opened_fds(&self) -> bool {
        self.mode == InodeFileHandles::Never
    }

    /// The way by file handle to the inode that `fd` is open on.
    pub(super) fn by_handle(
        &self,
        fd: BorrowedFd<'_>,
        identity: &Identity,
        proc_fds: &OwnedFd,
    ) -> Result<ReopenMethod> {
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
            None => probe_mount(fd, identity.kind, proc_fds, &self.anchors),
        };
        // Whether a mount can be used is asked of its directories and files alone: others
        // can't serve as its anchor. Being short of descriptors says nothing of the mount.
        let is_representative =
            matches!(identity.kind, FileType::Directory | FileType::RegularFile);
        let verdict = match &found {
            Ok((mount, _)) => Some(Exportable::Yes(Arc::downgrade(mount))),
            Err(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::STALE) => None,
            Err(_) => is_representative.then_some(Exportable::No),
        };
        if let Some(verdict) = verdict {
            let mut mounts = self.mounts.lock().unwrap_or_else(PoisonError::into_inner);
            mounts.insert(id, verdict);
        }
        let (mount, handle) = found?;
        Ok(ReopenMethod::Handle { mount, handle })
    }
}

/// Tries whether the mount that `fd` is on can open file handles.
fn probe_mount(
    fd: BorrowedFd<'_>,
    kind: FileType,
    proc_fds: &OwnedFd,
    anchors: &Arc<AtomicUsize>,
) -> Result<(Arc<Mount>, FileHandle)> {
    let handle = FileHandle::of(fd)?;
    let flags = OFlags::RDONLY | OFlags::NOCTTY | OFlags::NONBLOCK;
    let anchor = match kind {
        FileType::Directory | FileType::RegularFile => reopen_fd(fd, proc_fds, flags)?,
        _ => return Err(Errno::OPNOTSUPP),
    };
    handle.open(&anchor, OFlags::PATH)?;
    anchors.fetch_add(1, Ordering::Relaxed);
    let mount = Mount {
        anchor: Some(anchor),
        anchors: Arc::clone(anchors),
    };
    Ok((Arc::new(mount), handle))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digest_of_file_handle_is_the_same_in_every_version() {
        let bytes: Vec<u8> = (1..=16).collect();
        let handle = FileHandle::from_bytes(&bytes).unwrap();
        assert_eq!(digest(&handle), 13_940_510_430_640_886_229);
    }
}
