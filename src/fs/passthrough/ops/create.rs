//! Creates files: CREATE, MKDIR, MKNOD, SYMLINK, LINK, TMPFILE.
//!
//! The invariant: a new file belongs to the caller, and a creation neither opens nor changes an
//! existing file.

use std::ffi::CStr;
use std::os::fd::AsFd;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, StatxFlags};
use rustix::io::Errno;

use super::Operations;
use super::attributes::{PERMISSIONS, decode_device};
use crate::fs::passthrough::ids::CredentialsGuard;
use crate::fs::passthrough::inode_table::{Directory, InodeFd, component, stat_fd};
use crate::fs::{Caller, Entry, Label, NewNode, NodeId, Opened, Result};

/// How often a CREATE without `O_EXCL` retries while others create and remove the name.
const CREATE_TRIES: usize = 16;

const SET_GROUP_ID: u32 = 0o2000;
const GROUP_EXECUTE: u32 = 0o0010;

impl Operations {
    /// Makes `caller` the owner of what this thread creates. See [`Ids::as_caller`].
    ///
    /// [`Ids::as_caller`]: crate::fs::passthrough::ids::Ids::as_caller
    pub(super) fn as_caller(
        &self,
        caller: &Caller,
        umask: Option<u32>,
    ) -> Result<CredentialsGuard> {
        self.ids.as_caller(self.fds.proc_fds(), caller, umask)
    }

    /// Creates an inode without opening it: calls `make` and labels what it creates as `name` in
    /// `parent`.
    pub(crate) fn create_node(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        label: Option<Label<'_>>,
        make: impl FnOnce() -> Result<Entry>,
    ) -> Result<Entry> {
        self.fds.writable()?;
        let made = self.labelled(label, Some((parent, name)), make);
        self.unless_outdated(caller, &[parent], made)
    }

    pub(crate) fn make_symlink(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        target: &CStr,
    ) -> Result<Entry> {
        let parent = self.fds.inode(parent)?;
        let parent = self.fds.fd(&parent)?;
        self.confirm(caller, &parent)?;
        self.fds.room_for_inode()?;
        self.make_and_find(&parent, name, || {
            let _as_caller = self.as_caller(caller, None)?;
            rustix::fs::symlinkat(target, &parent, component(name)?)
        })
    }

    pub(crate) fn make_node(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        new: &NewNode<'_>,
    ) -> Result<Entry> {
        let parent = self.fds.inode(parent)?;
        let parent = self.fds.fd(&parent)?;
        self.confirm(caller, &parent)?;
        // No file type means a regular file, as in mknod(2).
        let kind = match FileType::from_raw_mode(new.mode) {
            FileType::Unknown if new.mode & !PERMISSIONS == 0 => FileType::RegularFile,
            FileType::Unknown | FileType::Directory | FileType::Symlink => {
                return Err(Errno::INVAL);
            }
            kind => kind,
        };
        let mode = self.permitted_mode(caller, &parent, new.mode)?;
        self.fds.room_for_inode()?;
        let (major, minor) = decode_device(new.rdev);
        let device = rustix::fs::makedev(major, minor);
        self.make_and_find(&parent, name, || {
            let _as_caller = self.as_caller(caller, Some(new.umask))?;
            rustix::fs::mknodat(&parent, component(name)?, kind, mode, device)
        })
    }

    pub(crate) fn make_directory(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        new: &NewNode<'_>,
    ) -> Result<Entry> {
        let parent = self.fds.inode(parent)?;
        let parent = self.fds.fd(&parent)?;
        self.confirm(caller, &parent)?;
        let mode = Mode::from_raw_mode(new.mode & PERMISSIONS);
        self.fds.room_for_inode()?;
        self.make_and_find(&parent, name, || {
            let _as_caller = self.as_caller(caller, Some(new.umask))?;
            rustix::fs::mkdirat(&parent, component(name)?, mode)
        })
    }

    /// Creates an inode by `make` and finds it. Does so again if a host process has removed it
    /// before it was found, so that the guest gets an inode and not an error of a call that has
    /// succeeded.
    fn make_and_find(
        &self,
        parent: &InodeFd<'_>,
        name: &CStr,
        make: impl Fn() -> Result<()>,
    ) -> Result<Entry> {
        let mut tries = 1;
        loop {
            make()?;
            match self.find_new(parent, name) {
                Err(Errno::NOENT) if tries < CREATE_TRIES => tries += 1,
                found => return found,
            }
        }
    }

    /// Creates and opens a file.
    ///
    /// The host always gets `O_EXCL`. With it the kernel neither follows a symbolic link nor
    /// applies `fs.protected_regular`, and a new file, which belongs to the caller, can be told
    /// from an existing one, which is opened as by OPEN.
    pub(crate) fn create_file(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        flags: u32,
        new: &NewNode<'_>,
    ) -> Result<(Entry, Opened)> {
        let parent = self.fds.inode(parent)?;
        let parent = self.fds.fd(&parent)?;
        let exclusive = flags & OFlags::EXCL.bits() != 0;
        if self.options.readonly {
            // An existing file can be opened for reading, as on any read-only file system.
            if exclusive {
                return Err(Errno::ROFS);
            }
            let opened = self.open_existing(caller, &parent, name, flags);
            return opened.map_err(|error| match error {
                Errno::NOENT => Errno::ROFS,
                error => error,
            });
        }
        self.confirm(caller, &parent)?;
        let mode = self.permitted_mode(caller, &parent, new.mode)?;
        for _ in 0..CREATE_TRIES {
            let create = || self.create_new(caller, &parent, name, flags, new.umask, mode);
            match self.labelled(new.label, Some((parent.inode().node(), name)), create) {
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
        parent: &impl Directory,
        name: &CStr,
        flags: u32,
        umask: u32,
        mode: Mode,
    ) -> Result<(Entry, Opened)> {
        let flags = self.file_flags(flags).difference(OFlags::TRUNC);
        let creating = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        self.fds.room_for_inode()?;
        self.fds.room_for_handle()?;
        let fd = {
            let _as_caller = self.as_caller(caller, Some(umask))?;
            let name = component(name)?;
            self.fds
                .with_room(|| rustix::fs::openat(parent, name, flags | creating, mode))?
        };
        let entry = self.entry_of_created(parent, name, &fd)?;
        self.opened_entry(parent.inode(), entry, fd, flags)
    }

    fn open_existing(
        &self,
        caller: &Caller,
        parent: &impl Directory,
        name: &CStr,
        flags: u32,
    ) -> Result<(Entry, Opened)> {
        let entry = self.find(parent, name)?;
        match self.open_file(caller, entry.node, flags) {
            Ok(opened) => Ok((entry, opened)),
            Err(error) => {
                self.fds.forget_lookups(entry.node, 1);
                // The inode was removed in the meantime. The name may now belong to another inode.
                Err(if error == Errno::STALE {
                    Errno::NOENT
                } else {
                    error
                })
            }
        }
    }

    /// The permission bits of a new file, without a set-group-ID bit that the caller may not set.
    ///
    /// In a set-group-ID directory a file gets the directory's group. The kernel clears the bit of
    /// an executable file if the creator isn't in that group, but it would not for the server,
    /// which has `CAP_FSETID`. Guest kernels since 6.0 clear the bit themselves. Guest kernels
    /// since 6.3 report a caller that is in the group by a supplementary group as a member; with
    /// older ones such a caller can set the bit afterwards. If ids are mapped, only the guest's
    /// kernel knows which callers are privileged.
    pub(crate) fn permitted_mode(
        &self,
        caller: &Caller,
        parent: &impl AsFd,
        mode: u32,
    ) -> Result<Mode> {
        let caller = self.ids.caller_on_host(caller)?;
        let mut mode = mode & PERMISSIONS;
        let group_program = SET_GROUP_ID | GROUP_EXECUTE;
        let doubtful = caller.uid != Some(0) && !self.terms.idmapped();
        if doubtful && mode & group_program == group_program {
            let stat = stat_fd(parent, StatxFlags::BASIC_STATS)?;
            let inherits = u32::from(stat.stx_mode) & SET_GROUP_ID != 0;
            let is_member = [caller.gid, caller.group].contains(&Some(stat.stx_gid));
            if inherits && !is_member {
                mode &= !SET_GROUP_ID;
            }
        }
        Ok(Mode::from_raw_mode(mode))
    }

    /// Creates another name for an inode through its link in `/proc/self/fd`, which needs no
    /// privilege, unlike `AT_EMPTY_PATH`.
    pub(crate) fn make_link(
        &self,
        caller: &Caller,
        node: NodeId,
        parent: NodeId,
        name: &CStr,
    ) -> Result<Entry> {
        let inode = self.fds.inode(node)?;
        let parent = self.fds.inode(parent)?;
        let fd = self.fds.fd(&inode)?;
        let parent_fd = self.fds.fd(&parent)?;
        self.confirm_both(caller, &fd, &parent_fd)?;
        let dir_seq = self.fds.inodes().dir_seq(&parent);
        rustix::fs::linkat(
            self.fds.proc_fds(),
            fd.proc_name().as_c_str(),
            parent_fd,
            component(name)?,
            AtFlags::SYMLINK_FOLLOW,
        )?;
        self.fds
            .inodes()
            .record_name(&inode, &parent, name, dir_seq);
        self.entry_of_open(fd)
    }

    /// Creates a file without a name. The guest's kernel can link it by LINK.
    pub(crate) fn make_nameless(
        &self,
        caller: &Caller,
        parent: NodeId,
        flags: u32,
        new: &NewNode<'_>,
    ) -> Result<(Entry, Opened)> {
        let parent = self.fds.inode(parent)?;
        let parent = self.fds.fd(&parent)?;
        self.confirm(caller, &parent)?;
        let mode = self.permitted_mode(caller, &parent, new.mode)?;
        let exclusive = OFlags::from_bits_retain(flags) & OFlags::EXCL;
        let flags = self.file_flags(flags).difference(OFlags::TRUNC);
        let making = OFlags::TMPFILE | OFlags::CLOEXEC | exclusive;
        self.fds.room_for_inode()?;
        self.fds.room_for_handle()?;
        let fd = {
            let _as_caller = self.as_caller(caller, Some(new.umask))?;
            rustix::fs::openat(&parent, c".", flags | making, mode)?
        };
        let entry = self.entry_of_nameless(&fd)?;
        if let Some(inode) = self.fds.inodes().get(entry.node) {
            self.fds.inodes().set_nameless(&inode, true);
        }
        self.opened_entry(parent.inode(), entry, fd, flags)
    }
}
