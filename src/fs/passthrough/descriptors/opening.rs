//! Opens inodes for the guest: for reading, for writing, and for locks.
//!
//! The invariant: on a read-only share nothing is opened for writing.

use std::os::fd::OwnedFd;

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use super::Descriptors;
use crate::fs::Result;
use crate::fs::passthrough::inode_table::{Inode, Key};
use crate::io::File;

impl Descriptors {
    /// Fails with `EROFS` if the share is read-only. Every operation that changes something calls
    /// it first.
    pub(crate) fn writable(&self) -> Result<()> {
        if self.readonly {
            Err(Errno::ROFS)
        } else {
            Ok(())
        }
    }

    /// As [`regular_file`], with what is known of files at `place`.
    pub(crate) fn regular_file_at(&self, place: &Key, fd: OwnedFd, flags: OFlags) -> File {
        let mut file = regular_file(fd, flags);
        let (local, location) = (self.files.local(), (place.device, place.mount));
        if local.contains(location) {
            file = file.local();
        }
        if local.is_in_memory(location) {
            file = file.in_memory();
        }
        file
    }

    pub(crate) fn open_for_reading(&self, inode: &Inode, flags: OFlags) -> Result<OwnedFd> {
        if self.readonly {
            // Reading leaves no trace, if the host allows that.
            match self.open_unchanged(inode, flags | OFlags::NOATIME) {
                Err(Errno::PERM) => {}
                opened => return opened,
            }
        }
        self.open_unchanged(inode, flags)
    }

    fn open_unchanged(&self, inode: &Inode, flags: OFlags) -> Result<OwnedFd> {
        match self.open_by_name(inode, flags) {
            Some(fd) => Ok(fd),
            None => self.reopen(inode, flags),
        }
    }

    /// Opens a file for writing; `appends` says whether the caller opened it with `O_APPEND`. An
    /// append-only file (`chattr +a`) can't be opened without that flag, and the kernel never lets
    /// it be written anywhere but at the end.
    pub(crate) fn open_appendable(
        &self,
        inode: &Inode,
        flags: OFlags,
        appends: bool,
    ) -> Result<OwnedFd> {
        match self.reopen(inode, flags) {
            Err(Errno::PERM) if appends => self.reopen(inode, flags | OFlags::APPEND),
            opened => opened,
        }
    }

    pub(crate) fn open_directory(&self, inode: &Inode) -> Result<OwnedFd> {
        if inode.kind() != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        self.open_for_reading(inode, OFlags::RDONLY | OFlags::DIRECTORY)
    }

    /// Opens `inode` for locks of both kinds, if possible.
    pub(crate) fn open_to_lock(&self, inode: &Inode) -> Result<OwnedFd> {
        let access = if self.readonly {
            OFlags::RDONLY
        } else {
            OFlags::RDWR
        };
        match self.reopen(inode, access) {
            Err(Errno::ACCESS | Errno::PERM | Errno::ROFS | Errno::TXTBSY) => {
                self.reopen(inode, OFlags::RDONLY)
            }
            opened => opened,
        }
    }
}

/// A regular file that was opened with `flags`.
pub(crate) fn regular_file(fd: OwnedFd, flags: OFlags) -> File {
    File::opened(fd, FileType::RegularFile, flags)
}
