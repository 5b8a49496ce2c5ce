//! Opens a file that has no descriptor by directory and name, with one system call instead of four,
//! and reads an inode's attributes so, without opening it.
//!
//! What a name leads to may change at any time, and a guest could put a device or a FIFO there. So
//! a file is opened only in a mount where no device can be opened (`nodev`, as the sandbox sets it), and
//! with `O_NONBLOCK`, with which opening a FIFO for reading doesn't wait. The invariant: a descriptor
//! or attributes are used only if device, number and birth time match the inode, and, where these are
//! not sufficient, the digest of its file handle too.

use std::os::fd::OwnedFd;

use rustix::fs::{FileType, Mode, OFlags, StatVfsMountFlags, Statx};

use super::Descriptors;
use super::reopen::is_same;
use crate::fs::NodeId;
use crate::fs::passthrough::inode_table::{
    Identity, Inode, InodeFd, InodeTable, ReopenMethod, stat_name,
};

/// After so many uses by its name an inode is opened, if there is room. A use by name takes about
/// 0.7 µs longer than one by a descriptor, and opening one about four times as long.
pub(crate) const MAX_USES_BY_NAME: u8 = 4;

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
    /// is open already or should be, or isn't found by a name in an open directory, or the attempt
    /// failed.
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
        if self.should_be_open(inode) {
            return None;
        }
        let parent = self.inodes.any(link.parent)?;
        let directory = parent.slot().borrow()?;
        let temporary = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        // `EAGAIN` if a process of the host holds a lease, which the careful way waits for.
        let fd = self
            .with_room(|| {
                rustix::fs::openat(&directory, &*link.name, flags | temporary, Mode::empty())
            })
            .ok()?;
        if !is_same(inode, &link, &fd).ok()? {
            return None;
        }
        // With the flag io_uring would fail instead of waiting for the disk.
        let kept = flags & (OFlags::DIRECT | OFlags::NOATIME);
        rustix::fs::fcntl_setfl(&fd, kept).ok()?;
        Some(fd)
    }

    /// The attributes of an inode without a descriptor, with its birth time, found by its name in
    /// an open directory. `None` if it is open or should be by now, or if that isn't certain to be
    /// this inode.
    pub(crate) fn stat_by_name(&self, inode: &Inode) -> Option<Statx> {
        if inode.slot().is_full() {
            return None;
        }
        let ReopenMethod::Name(link) = inode.reopen_method() else {
            return None;
        };
        if link.digest != 0 && !inode.is_settled() {
            return None;
        }
        if self.should_be_open(inode) {
            return None;
        }
        let parent = self.inodes.any(link.parent)?;
        let directory = InodeFd::installed(&parent, parent.slot().borrow()?);
        let stat = stat_name(&directory, &link.name).ok()?;
        inode.may_be(&Identity::of(&stat)).then_some(stat)
    }

    /// Counts a use of an inode without a descriptor. Returns whether it is used so often that it
    /// should have one, and there is room. Without room it would take the place of another inode's
    /// descriptor, which the next use of that one would have to open again: with more inodes than
    /// descriptors each use costs three calls more.
    fn should_be_open(&self, inode: &Inode) -> bool {
        inode.count_use_by_name() >= MAX_USES_BY_NAME && self.has_room_for_inodes()
    }
}
