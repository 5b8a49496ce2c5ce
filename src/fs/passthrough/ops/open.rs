//! Opens files and directories: which of the guest's flags apply on the host, and what may be
//! opened.
//!
//! The invariant: only regular files and directories are opened, and a file is opened for a change
//! only after the check that changes are allowed.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use super::Operations;
use super::path_checks::is_reopened_by_name;
use crate::fs::passthrough::inode_table::{Inode, Key};
use crate::fs::passthrough::open_files::IMPLICIT;
use crate::fs::passthrough::options::Cache;
use crate::fs::{Caller, Entry, HandleKind, NodeId, Opened, Result};
use crate::io::File;

impl Operations {
    /// The flags of the guest's `open(2)` that are passed on to the host.
    ///
    /// These flags are not passed on:
    ///
    /// - `O_CREAT` and `O_EXCL`, which CREATE sets itself;
    /// - `O_APPEND`, which the guest can clear without notice, and which it says with each write;
    /// - `O_NOFOLLOW`, as the path in `/proc/self/fd` is a symbolic link;
    /// - `O_NONBLOCK`, which would make io_uring fail instead of waiting for the disk;
    /// - `O_NOATIME`, unless the option is set, as the host refuses it if the server doesn't own
    ///   the file;
    /// - all flags that mean nothing for a regular file.
    ///
    /// With `--no-open` one file serves all users of an inode, so it is opened without any of the
    /// optional flags.
    pub(crate) fn file_flags(&self, flags: u32) -> OFlags {
        let flags = OFlags::from_bits_retain(flags);
        let dsync = OFlags::from_bits_retain(libc::O_DSYNC.cast_unsigned());
        let mut host_flags = OFlags::RWMODE | OFlags::TRUNC;
        if !self.terms.no_open() {
            host_flags |= OFlags::SYNC | dsync;
            if self.options.allow_direct_io {
                host_flags |= OFlags::DIRECT;
            }
            if self.options.preserve_noatime {
                host_flags |= OFlags::NOATIME;
            }
        }
        let mut host_flags = flags & host_flags;
        let read_too = self.terms.collects_writes() || self.terms.no_open();
        if read_too && host_flags & OFlags::RWMODE == OFlags::WRONLY {
            host_flags = host_flags.difference(OFlags::RWMODE) | OFlags::RDWR;
        }
        host_flags | OFlags::NOCTTY
    }

    /// The inode of a regular file. Other types are refused without a system call that could block
    /// or act on a device: FIFOs, sockets and devices are handled by the guest's kernel, which
    /// never opens them here. `ENXIO` is Linux's error for opening a socket or a missing device,
    /// `ELOOP` that for opening a symbolic link with `O_NOFOLLOW`.
    pub(crate) fn regular(&self, node: NodeId) -> Result<Arc<Inode>> {
        let inode = self.fds.inode(node)?;
        match inode.kind() {
            FileType::RegularFile => Ok(inode),
            FileType::Directory => Err(Errno::ISDIR),
            FileType::Symlink => Err(Errno::LOOP),
            _ => Err(Errno::NXIO),
        }
    }

    /// Opens a regular file, as for OPEN.
    pub(crate) fn open_file(&self, caller: &Caller, node: NodeId, flags: u32) -> Result<Opened> {
        let inode = self.regular(node)?;
        self.fds.room_for_handle()?;
        let appends = flags & OFlags::APPEND.bits() != 0;
        let flags = self.file_flags(flags);
        let truncates = flags.contains(OFlags::TRUNC);
        let place = inode.key();
        let no_flush = self.needs_no_flush(&place, flags);
        if let Some(file) = self.fds.take_closed(node, flags) {
            return self.opened_as(node, file, flags, HandleKind::File, no_flush);
        }
        let changes = truncates || flags & OFlags::RWMODE != OFlags::RDONLY;
        let by_name = is_reopened_by_name(&inode);
        if changes && (by_name || truncates) {
            self.fds.writable()?;
            self.confirm(caller, &self.fd_to_change(caller, &inode)?)?;
        }
        // If ids are mapped, user 0 may be any user.
        let privileged = caller.uid == Some(0) && !self.terms.idmapped();
        let file = if truncates && (caller.kill_set_id || !privileged) {
            self.fds.writable()?;
            let flags = flags.difference(OFlags::TRUNC);
            let fd = self.fds.open_appendable(&inode, flags, appends)?;
            let file = self.fds.regular_file_at(&place, fd, flags);
            self.kill_set_id_of_open(&file)?;
            self.truncate_to_zero(&file)?;
            file
        } else if !changes {
            let fd = self.fds.open_for_reading(&inode, flags)?;
            self.fds.regular_file_at(&place, fd, flags)
        } else {
            self.fds.writable()?;
            let fd = self.fds.open_appendable(&inode, flags, appends)?;
            self.fds.regular_file_at(&place, fd, flags)
        };
        if changes {
            if !by_name && !truncates {
                self.confirm_opened(caller, &inode, &file)?;
            }
            self.note_opened(caller, node);
        }
        self.opened_as(node, file, flags, HandleKind::File, no_flush)
    }

    /// Whether nothing is lost if the guest leaves out FLUSH for a file, at `place` and open with
    /// `flags`. What is open for reading and writing may be mapped, and a guest's kernel writes a
    /// mapping back on `close(2)` only if it sends FLUSH.
    fn needs_no_flush(&self, place: &Key, flags: OFlags) -> bool {
        flags & OFlags::RWMODE != OFlags::RDWR && self.fds.is_local(place)
    }

    /// Opens a regular file for a mapping of the VMM.
    pub(crate) fn open_to_map(&self, node: NodeId, writable: bool) -> Result<OwnedFd> {
        let inode = self.regular(node)?;
        if writable {
            self.fds.writable()?;
            self.fds
                .open_appendable(&inode, OFlags::RDWR | OFlags::NOCTTY, false)
        } else {
            self.fds
                .open_for_reading(&inode, OFlags::RDONLY | OFlags::NOCTTY)
        }
    }

    /// Adds a new file to the handles: `entry`, whose lookup is counted already, and `fd`, which
    /// was opened with `flags` in `directory`.
    pub(crate) fn opened_entry(
        &self,
        directory: &Inode,
        entry: Entry,
        fd: OwnedFd,
        flags: OFlags,
    ) -> Result<(Entry, Opened)> {
        let place = directory.key();
        let no_flush = self.needs_no_flush(&place, flags);
        let file = self.fds.regular_file_at(&place, fd, flags);
        match self.opened_as(entry.node, file, flags, HandleKind::File, no_flush) {
            Ok(opened) => Ok((entry, opened)),
            Err(error) => {
                self.fds.forget_lookups(entry.node, 1);
                Err(error)
            }
        }
    }

    /// Adds the directory `fd` to the handles.
    pub(crate) fn opened_directory(&self, node: NodeId, fd: OwnedFd) -> Result<Opened> {
        let file = File::from_fd(fd);
        self.opened_as(node, file, OFlags::RDONLY, HandleKind::Directory, false)
    }

    fn opened_as(
        &self,
        node: NodeId,
        file: File,
        flags: OFlags,
        kind: HandleKind,
        no_flush: bool,
    ) -> Result<Opened> {
        let directory = kind == HandleKind::Directory;
        let handle = if self.terms.is_implicit(IMPLICIT, kind) {
            self.keep_created(node, file);
            IMPLICIT
        } else {
            let handle = self.fds.files().handles().add(node, file, flags, kind)?;
            self.fds.make_room();
            handle
        };
        Ok(Opened {
            handle,
            keep_cache: match self.options.cache {
                Cache::Never | Cache::Auto => false,
                Cache::Metadata => directory,
                Cache::Always => true,
            },
            direct_io: !directory && matches!(self.options.cache, Cache::Never | Cache::Metadata),
            cache_dir: directory && matches!(self.options.cache, Cache::Metadata | Cache::Always),
            no_flush,
        })
    }
}
