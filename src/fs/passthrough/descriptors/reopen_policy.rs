//! Decides whether inodes are referred to by descriptor or by file handle.
//!
//! The invariant: a file handle is used only in a mount where opening one has succeeded.

use std::collections::HashMap;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use crate::fs::Result;
use crate::fs::passthrough::inode_table::reopen_fd;
use crate::fs::passthrough::inode_table::{Identity, Mount, ReopenMethod};
use crate::fs::passthrough::options::InodeFileHandles;
use crate::sys::file_handle::FileHandle;

/// Decides which kind of reference each inode has.
#[derive(Debug)]
pub(crate) struct ReopenPolicy {
    mode: InodeFileHandles,
    may_open: bool,
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
    /// Checks whether file handles work for the shared directory, open as `root`; not at all unless
    /// they `may_open` files.
    ///
    /// # Errors
    ///
    /// File handles don't work and are mandatory.
    pub(crate) fn new(
        (mode, may_open): (InodeFileHandles, bool),
        root: BorrowedFd<'_>,
        identity: &Identity,
        proc_fds: &OwnedFd,
    ) -> Result<Self> {
        let anchors = Arc::default();
        let probed = match may_open {
            true => probe_mount(root, identity.kind, proc_fds, &anchors),
            false => Err(Errno::PERM),
        };
        let (root, verdict) = match probed {
            Ok((mount, _)) => {
                let verdict = Exportable::Yes(Arc::downgrade(&mount));
                (Some(mount), verdict)
            }
            Err(error) if mode == InodeFileHandles::Mandatory => return Err(error),
            Err(_) => (None, Exportable::No),
        };
        Ok(Self {
            mode,
            may_open,
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
        if !self.may_open {
            return Err(Errno::PERM);
        }
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
    Ok((Arc::new(Mount::new(anchor, anchors)), handle))
}
