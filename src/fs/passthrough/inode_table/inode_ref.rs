//! The ways to refer to an inode: a descriptor, a file handle, or a name.
//!
//! A descriptor pins the inode, but the number of descriptors is limited. A file handle costs a few
//! bytes; opening it needs `CAP_DAC_READ_SEARCH`, and it goes stale when the inode is deleted. A
//! name needs nothing, and works until a host process removes or renames it. The invariant: opening
//! a reference yields the inode that it was created for, never another one that took over its name
//! or number.

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

/// When inodes are referred to by file handle instead of by descriptor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InodeFileHandles {
    /// Descriptors, up to [`Options::max_open_inodes`](crate::fs::passthrough::Options). Beyond that, file handles
    /// where they work, and names elsewhere.
    #[default]
    Never,
    /// File handles where they work, elsewhere as with `Never`.
    Prefer,
    /// File handles only. Lookups on a file system without file handles fail with `EOPNOTSUPP`.
    Mandatory,
}

/// Identifies an inode among all that exist on the host at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) number: u64,
    /// The major number is in the upper half, the minor number in the lower.
    pub(crate) device: u64,
    /// The mount: one inode in two mounts is two inodes to the guest, as different file systems may
    /// be mounted below it.
    pub(crate) mount: u64,
}

/// What a `statx` tells about the identity of an inode.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Identity {
    pub(crate) key: Key,
    /// The birth time in nanoseconds since 1970, if the file system has it. It tells an inode from
    /// an earlier one with the same number.
    pub(crate) birth: Option<i64>,
    pub(crate) kind: FileType,
}

/// The fields that [`Identity`] and a LOOKUP reply need.
pub(crate) const IDENTITY: StatxFlags = StatxFlags::BASIC_STATS
    .union(StatxFlags::BTIME)
    .union(StatxFlags::MNT_ID);

impl Identity {
    pub(crate) fn of(stat: &Statx) -> Self {
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

/// Calls `statx` on the inode that `fd` is open on.
pub(crate) fn stat_fd(fd: impl AsFd, mask: StatxFlags) -> Result<Statx> {
    rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH | AtFlags::NO_AUTOMOUNT, mask)
}

/// A mount in which file handles can be opened.
#[derive(Debug)]
pub(crate) struct Mount {
    /// Any file or directory in the mount, opened for reading: the kernel doesn't accept `O_PATH`
    /// here. `None` only in tests.
    anchor: Option<OwnedFd>,
    /// The number of anchors. It orders nothing and is used for limits.
    anchors: Arc<AtomicUsize>,
}

impl Drop for Mount {
    fn drop(&mut self) {
        self.anchors.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How an inode is opened when it has no descriptor.
#[derive(Debug)]
pub(crate) enum ReopenMethod {
    /// It can't be opened: its descriptor is kept until the guest forgets it.
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
    /// It is no longer in the store and gets no descriptor any more.
    Removed,
}

/// The name under which an inode was last seen. The parent is referred to by its node id, so it can
/// be renamed without changing its children. The store keeps it while it has children.
#[derive(Clone, Debug)]
pub(crate) struct ParentLink {
    pub(crate) parent: NodeId,
    pub(crate) name: Box<CStr>,
    /// Tells the inode from a later one if number and birth time can't; 0 if they can. See
    /// [`digest_of`].
    pub(crate) digest: u64,
}

/// A digest of the file handle, never 0. Reading a handle needs no privilege, and the handle
/// includes the generation of the inode.
pub(crate) fn digest_of(fd: impl AsFd) -> Result<u64> {
    FileHandle::of(fd).map(|handle| digest(&handle))
}

/// As [`digest_of`], for `name` in `directory`.
pub(crate) fn digest_at(directory: impl AsFd, name: &CStr) -> Result<u64> {
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

/// An `O_PATH` descriptor of an inode, for the duration of one operation.
#[derive(Debug)]
pub(crate) struct InodeFd<'a> {
    inode: &'a Inode,
    fd: Source<'a>,
}

#[derive(Debug)]
enum Source<'a> {
    /// The inode's own descriptor.
    Installed(Borrowed<'a>),
    /// A descriptor for this operation only.
    Opened(OwnedFd),
}

impl<'a> InodeFd<'a> {
    pub(crate) fn installed(inode: &'a Inode, fd: Borrowed<'a>) -> Self {
        let fd = Source::Installed(fd);
        Self { inode, fd }
    }

    pub(crate) fn opened(inode: &'a Inode, fd: OwnedFd) -> Self {
        let fd = Source::Opened(fd);
        Self { inode, fd }
    }

    /// Whether it was opened for this operation only.
    pub(crate) fn is_opened(&self) -> bool {
        matches!(self.fd, Source::Opened(_))
    }

    /// Returns the descriptor if it was opened for this operation only.
    pub(crate) fn into_opened(self) -> Option<OwnedFd> {
        match self.fd {
            Source::Installed(_) => None,
            Source::Opened(fd) => Some(fd),
        }
    }

    /// The descriptor's name in `/proc/self/fd`.
    pub(crate) fn proc_name(&self) -> DecInt {
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

/// A directory in which names are looked up: an inode and a descriptor of it.
pub(crate) trait Directory: AsFd {
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
    pub(crate) fn open(&self, handle: &FileHandle, flags: OFlags) -> Result<OwnedFd> {
        handle.open(self.anchor.as_ref().ok_or(Errno::STALE)?, flags)
    }

    /// A mount for tests, in which nothing can be opened.
    #[cfg(test)]
    pub(crate) fn nowhere() -> Arc<Self> {
        let anchors = Arc::new(AtomicUsize::new(1));
        Arc::new(Self {
            anchor: None,
            anchors,
        })
    }
}

/// Opens the file that `fd` is open on once more, through its link in `/proc/self/fd`.
pub(crate) fn reopen_fd(fd: impl AsFd, proc_fds: &OwnedFd, flags: OFlags) -> Result<OwnedFd> {
    let name = DecInt::from_fd(fd);
    let flags = flags | OFlags::CLOEXEC;
    rustix::fs::openat(proc_fds, name.as_c_str(), flags, Mode::empty())
}

/// Decides which kind of reference each inode has.
#[derive(Debug)]
pub(crate) struct ReopenPolicy {
    mode: InodeFileHandles,
    mounts: Mutex<HashMap<u64, Exportable>>,
    /// The mount of the shared directory stays anchored, as the server keeps it busy anyway.
    root: Option<Arc<Mount>>,
    /// The number of descriptors that mounts have.
    anchors: Arc<AtomicUsize>,
}

/// Whether inodes of a mount can be opened by file handle.
#[derive(Debug)]
enum Exportable {
    /// Held by the inodes that have such a handle: an anchor keeps its mount busy.
    Yes(Weak<Mount>),
    No,
}

impl ReopenPolicy {
    /// Checks whether file handles work for the shared directory, open as `root`.
    ///
    /// # Errors
    ///
    /// File handles don't work and are mandatory.
    pub(crate) fn new(
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

    /// The number of descriptors that mounts have.
    pub(crate) fn anchors(&self) -> usize {
        self.anchors.load(Ordering::Relaxed)
    }

    /// The file handle of a new inode, open as `fd`. Returns `None` if the inode is to have a
    /// descriptor.
    pub(crate) fn method_for_new(
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

    /// The mount of the shared directory, if file handles can be opened in it.
    pub(crate) fn shared_mount(&self) -> Option<Arc<Mount>> {
        self.root.clone()
    }

    /// The mount with the number `id`, if file handles are already opened in it.
    pub(crate) fn mount(&self, id: u64) -> Option<Arc<Mount>> {
        let mounts = self.mounts.lock().unwrap_or_else(PoisonError::into_inner);
        match mounts.get(&id)? {
            Exportable::Yes(mount) => mount.upgrade(),
            Exportable::No => None,
        }
    }

    /// Whether an inode that was opened by its file handle keeps the descriptor until it is
    /// evicted.
    pub(crate) fn keeps_opened_fds(&self) -> bool {
        self.mode == InodeFileHandles::Never
    }

    /// The file handle of the inode that `fd` is open on, as its reopen method.
    pub(crate) fn by_handle(
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
        // Only files and directories tell whether a mount is usable, as nothing else can be its
        // anchor. A shortage of descriptors says nothing about the mount.
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

/// Checks whether file handles can be opened in the mount that `fd` is on.
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
