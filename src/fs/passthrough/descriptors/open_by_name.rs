//! Opens a file that has no descriptor by directory and name, with one system call instead of four.
//!
//! What a name leads to may change at any time, and a guest could put a device or a FIFO there. So
//! this is done only in a mount where no device can be opened (`nodev`, as the sandbox sets it), and
//! with `O_NONBLOCK`, with which opening a FIFO for reading doesn't wait. The invariant: a
//! descriptor is used only if device, number and birth time match the inode, and, where these are
//! not sufficient, the digest of its file handle too.

use std::os::fd::OwnedFd;

use rustix::fs::{FileType, Mode, OFlags, StatVfsMountFlags};

use super::Descriptors;
use crate::fs::NodeId;
use crate::fs::passthrough::inode_table::{
    IDENTITY, Identity, Inode, InodeTable, ReopenMethod, digest_of, stat_fd,
};

/// The number of the shared directory's mount, if no device can be opened in it.
pub(super) fn mount_without_devices(inodes: &InodeTable) -> Option<u64> {
    let root = inodes.get(NodeId::ROOT)?;
    let root_fd = root.slot().borrow()?;
    let mount = rustix::fs::fstatvfs(&root_fd).ok()?;
    mount
        .f_flag
        .contains(StatVfsMountFlags::NODEV)
        .then(|| root.key().mount)
}

impl Descriptors {
    /// Opens a regular file for reading, or returns `None` if that has to be done with more care: it
    /// is open already, or isn't found by a name in an open directory, or the attempt failed.
    pub(super) fn open_by_name(&self, inode: &Inode, flags: OFlags) -> Option<OwnedFd> {
        if inode.slot().is_full()
            || inode.kind() != FileType::RegularFile
            || self.mount_without_devices != Some(inode.key().mount)
        {
            return None;
        }
        let ReopenMethod::Name(link) = inode.reopen_method() else {
            return None;
        };
        let parent = self.inodes.any(link.parent)?;
        let directory = parent.slot().borrow()?;
        let temporary = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        // `EAGAIN` if a process of the host holds a lease, which the careful way waits for.
        let fd = self
            .with_room(|| {
                rustix::fs::openat(&directory, &*link.name, flags | temporary, Mode::empty())
            })
            .ok()?;
        let identity = Identity::of(&stat_fd(&fd, IDENTITY).ok()?);
        let same = inode.may_be(&identity)
            && (link.digest == 0 || digest_of(&fd).is_ok_and(|digest| digest == link.digest));
        if !same {
            return None;
        }
        // With the flag io_uring would fail instead of waiting for the disk.
        let kept = flags & (OFlags::DIRECT | OFlags::NOATIME);
        rustix::fs::fcntl_setfl(&fd, kept).ok()?;
        Some(fd)
    }
}
