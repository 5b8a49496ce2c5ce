//! Names made, moved and removed: CREATE, MKDIR, MKNOD, SYMLINK, LINK, UNLINK, RMDIR, RENAME.
//!
//! The invariant: what is created belongs to the caller, and nothing that is there already is
//! opened or changed by a creation.

use std::ffi::CStr;
use std::os::fd::AsFd;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags, StatxFlags};
use rustix::io::Errno;

use super::Passthrough;
use super::attributes::{PERMISSIONS, decode_device};
use super::credentials::Section;
use super::holds::stat_fd;
use super::lookup::component;
use crate::fs::{Caller, Entry, HandleKind, NewNode, NodeId, Opened, Result};

/// How often a CREATE without `O_EXCL` looks again when others make and remove the name.
const CREATE_TRIES: usize = 16;

const SET_GROUP_ID: u32 = 0o2000;
const GROUP_EXECUTE: u32 = 0o0010;

impl Passthrough {
    pub(super) fn section(&self, caller: &Caller, umask: Option<u32>) -> Result<Section> {
        self.wear
            .section(&self.proc_fds, &self.on_host(caller)?, umask)
    }

    pub(super) fn make_symlink(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        target: &CStr,
    ) -> Result<Entry> {
        let parent = self.inode(parent)?;
        let parent = self.fd(&parent)?;
        {
            let _as_caller = self.section(caller, None)?;
            rustix::fs::symlinkat(target, &parent, component(name)?)?;
        }
        self.find_new(parent, name)
    }

    pub(super) fn make_node(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        new: &NewNode,
    ) -> Result<Entry> {
        let parent = self.inode(parent)?;
        let parent = self.fd(&parent)?;
        // No type at all is a regular file, as in mknod(2).
        let kind = match FileType::from_raw_mode(new.mode) {
            FileType::Unknown if new.mode & !PERMISSIONS == 0 => FileType::RegularFile,
            FileType::Unknown | FileType::Directory | FileType::Symlink => {
                return Err(Errno::INVAL);
            }
            kind => kind,
        };
        let mode = honest_mode(&self.on_host(caller)?, &parent, new.mode)?;
        let (major, minor) = decode_device(new.rdev);
        let device = rustix::fs::makedev(major, minor);
        {
            let _as_caller = self.section(caller, Some(new.umask))?;
            rustix::fs::mknodat(&parent, component(name)?, kind, mode, device)?;
        }
        self.find_new(parent, name)
    }

    pub(super) fn make_directory(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        new: &NewNode,
    ) -> Result<Entry> {
        let parent = self.inode(parent)?;
        let parent = self.fd(&parent)?;
        let mode = Mode::from_raw_mode(new.mode & PERMISSIONS);
        {
            let _as_caller = self.section(caller, Some(new.umask))?;
            rustix::fs::mkdirat(&parent, component(name)?, mode)?;
        }
        self.find_new(parent, name)
    }

    /// `O_EXCL` is always said to the host: it makes the kernel neither follow a symbolic link
    /// nor mind `fs.protected_regular`, and tells a new file, which is the caller's, from one
    /// that is there, which is opened as OPEN would.
    pub(super) fn create_file(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        flags: u32,
        new: &NewNode,
    ) -> Result<(Entry, Opened)> {
        let parent = self.inode(parent)?;
        let parent = self.fd(&parent)?;
        let exclusive = flags & OFlags::EXCL.bits() != 0;
        if self.options.readonly {
            // What is there can be opened for reading, as on any file system.
            if exclusive {
                return Err(Errno::ROFS);
            }
            let opened = self.open_existing(caller, &parent, name, flags);
            return opened.map_err(|error| match error {
                Errno::NOENT => Errno::ROFS,
                error => error,
            });
        }
        let mode = honest_mode(&self.on_host(caller)?, &parent, new.mode)?;
        for _ in 0..CREATE_TRIES {
            match self.create_new(caller, &parent, name, flags, new.umask, mode) {
                Err(Errno::EXIST) if !exclusive => {}
                done => return done,
            }
            match self.open_existing(caller, &parent, name, flags) {
                Err(Errno::NOENT) => {}
                done => return done,
            }
        }
        Err(Errno::NOENT)
    }

    fn create_new(
        &self,
        caller: &Caller,
        parent: &impl AsFd,
        name: &CStr,
        flags: u32,
        umask: u32,
        mode: Mode,
    ) -> Result<(Entry, Opened)> {
        let flags = self.file_flags(flags).difference(OFlags::TRUNC);
        let creating = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = {
            let _as_caller = self.section(caller, Some(umask))?;
            rustix::fs::openat(parent, component(name)?, flags | creating, mode)?
        };
        let entry = self.find_opened(&fd)?;
        Ok((entry, self.opened(entry.node, fd, HandleKind::File)))
    }

    fn open_existing(
        &self,
        caller: &Caller,
        parent: &impl AsFd,
        name: &CStr,
        flags: u32,
    ) -> Result<(Entry, Opened)> {
        let entry = self.find(parent, name)?;
        match self.open_file(caller, entry.node, flags) {
            Ok(opened) => Ok((entry, opened)),
            Err(error) => {
                self.inodes.forget(entry.node, 1);
                // An inode that has ended since; its name may be another's by now.
                Err(if error == Errno::STALE {
                    Errno::NOENT
                } else {
                    error
                })
            }
        }
    }

    /// Another name for an inode, by its link in `/proc/self/fd`: unlike `AT_EMPTY_PATH` this
    /// needs no privilege.
    pub(super) fn make_link(&self, node: NodeId, parent: NodeId, name: &CStr) -> Result<Entry> {
        let inode = self.inode(node)?;
        let parent = self.inode(parent)?;
        let fd = self.fd(&inode)?;
        rustix::fs::linkat(
            &self.proc_fds,
            fd.proc_name().as_c_str(),
            self.fd(&parent)?,
            component(name)?,
            AtFlags::SYMLINK_FOLLOW,
        )?;
        self.find_again(&inode, fd)
    }

    pub(super) fn remove(&self, parent: NodeId, name: &CStr, flags: AtFlags) -> Result<()> {
        let parent = self.inode(parent)?;
        rustix::fs::unlinkat(self.fd(&parent)?, component(name)?, flags)
    }

    pub(super) fn move_name(
        &self,
        caller: &Caller,
        from: (NodeId, &CStr),
        to: (NodeId, &CStr),
        flags: u32,
    ) -> Result<()> {
        let flags = RenameFlags::from_bits_retain(flags);
        let known = RenameFlags::NOREPLACE | RenameFlags::EXCHANGE | RenameFlags::WHITEOUT;
        if !(flags - known).is_empty() {
            return Err(Errno::INVAL);
        }
        let old_parent = self.inode(from.0)?;
        let new_parent = self.inode(to.0)?;
        // A whiteout is created, and so it is somebody's.
        let _as_caller = flags
            .contains(RenameFlags::WHITEOUT)
            .then(|| self.section(caller, None))
            .transpose()?;
        rustix::fs::renameat_with(
            self.fd(&old_parent)?,
            component(from.1)?,
            self.fd(&new_parent)?,
            component(to.1)?,
            flags,
        )
    }
}

/// The permission bits of a new file, without a set-group-ID bit that the caller has no right
/// to. In a set-group-ID directory a file gets the directory's group; the kernel takes the bit
/// from an executable file whose creator isn't in that group, but it would not from the server,
/// who has `CAP_FSETID`. Kernels from 6.0 on have done so in the guest already; a member by a
/// supplementary group, whom the server can't tell, may set it afterwards.
pub(super) fn honest_mode(caller: &Caller, parent: &impl AsFd, mode: u32) -> Result<Mode> {
    let mut mode = mode & PERMISSIONS;
    let group_program = SET_GROUP_ID | GROUP_EXECUTE;
    if caller.uid != 0 && mode & group_program == group_program {
        let stat = stat_fd(parent, StatxFlags::BASIC_STATS)?;
        let inherits = u32::from(stat.stx_mode) & SET_GROUP_ID != 0;
        if inherits && stat.stx_gid != caller.gid {
            mode &= !SET_GROUP_ID;
        }
    }
    Ok(Mode::from_raw_mode(mode))
}
