//! Paths in the shared directory: whether a path leads to an inode, and which path an inode has.
//!
//! The invariant: a path is never followed out of the shared directory or through a symbolic link.

use std::ffi::{CString, OsStr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::Descriptors;
use crate::fs::passthrough::inode_table::component;
use crate::fs::passthrough::inode_table::{IDENTITY, Identity, Inode, stat_fd};
use crate::fs::{NodeId, Result};

impl Descriptors {
    /// Opens `path`, relative to `from`, as an `O_PATH` descriptor.
    pub(crate) fn follow(&self, from: BorrowedFd<'_>, path: &[u8]) -> Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut at: Option<OwnedFd> = None;
        for name in path.split(|byte| *byte == b'/') {
            let name = CString::new(name).map_err(|_nul| Errno::INVAL)?;
            let name = component(&name)?;
            let above = at.as_ref().map_or(from, AsFd::as_fd);
            let open = || rustix::fs::openat(above, name, flags, Mode::empty());
            at = Some(self.with_room(open)?);
        }
        at.ok_or(Errno::INVAL)
    }

    /// Whether `path`, relative to `from`, leads to `inode`.
    pub(crate) fn path_leads_to(&self, from: NodeId, path: &[u8], inode: &Inode) -> bool {
        let found = self.inodes.any(from).ok_or(Errno::STALE).and_then(|from| {
            let from = self.fd(&from)?;
            let fd = self.follow(from.as_fd(), path)?;
            Ok(Identity::of(&stat_fd(&fd, IDENTITY)?))
        });
        found.is_ok_and(|identity| inode.may_be(&identity))
    }

    /// The path of the file that `fd` is open on, relative to the shared directory, as the kernel
    /// knows it.
    pub(crate) fn path_of(&self, fd: BorrowedFd<'_>) -> Result<Vec<u8>> {
        let root = self.inodes.any(NodeId::ROOT).ok_or(Errno::STALE)?;
        let shared = self.link_of(self.fd(&root)?.as_fd())?;
        let path = self.link_of(fd)?;
        let rest = if shared == b"/" {
            path.strip_prefix(b"/")
        } else {
            path.strip_prefix(&shared[..])
                .and_then(|rest| rest.strip_prefix(b"/"))
        };
        rest.filter(|rest| !rest.is_empty())
            .map(<[u8]>::to_vec)
            .ok_or(Errno::NOENT)
    }

    fn link_of(&self, fd: BorrowedFd<'_>) -> Result<Vec<u8>> {
        let name = rustix::path::DecInt::from_fd(fd);
        let name = OsStr::from_bytes(name.as_bytes());
        let link = rustix::fs::readlinkat(&self.proc_fds, name, Vec::new())?;
        Ok(link.into_bytes())
    }
}
