//! The open file behind a handle, or behind a node that the guest uses without OPEN (`--no-open`,
//! `--no-opendir`).
//!
//! In the second case the first request that needs a file opens it, under the rules of OPEN and
//! OPENDIR. The invariant: a file is stored under the node it was opened for, and the guest knew
//! that node when it was stored.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, TryLockError};

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use super::Operations;
use crate::fs::passthrough::inode_table::{Inode, reopen_fd};
use crate::fs::passthrough::open_files::{DirStream, InodeFiles};
use crate::fs::{Handle, HandleKind, LockOwner, NodeId, Result};
use crate::io::File;

impl Operations {
    /// The open file of a handle, or of the inode if there is no handle.
    pub(crate) fn file_of(
        &self,
        node: NodeId,
        handle: Handle,
        kind: HandleKind,
        write: bool,
    ) -> Result<File> {
        if !self.terms.is_implicit(handle, kind) {
            return self.fds.files().handles().file(node, handle, kind);
        }
        if kind == HandleKind::Directory {
            return self.implicit_directory(node).map(|(file, _)| file);
        }
        let file = match self.fds.files().handleless().file(node, write) {
            Some(file) => file,
            None => self.open_handleless(node, write)?,
        };
        if write {
            self.confirm_implicit(node, &file)?;
        }
        Ok(file)
    }

    /// As [`file_of`](Self::file_of), for a handle of either kind.
    pub(crate) fn any_of(&self, node: NodeId, handle: Handle) -> Result<File> {
        if self.terms.explicit(Some(handle)).is_some() {
            return self.fds.files().handles().any(node, handle);
        }
        let kind = match self.fds.inode(node)?.kind() {
            FileType::Directory => HandleKind::Directory,
            _ => HandleKind::File,
        };
        self.file_of(node, handle, kind, false)
    }

    /// As [`any_of`](Self::any_of), for a request that changes the inode.
    pub(crate) fn any_to_change(&self, node: NodeId, handle: Handle) -> Result<File> {
        let file = self.any_of(node, handle)?;
        if self.terms.explicit(Some(handle)).is_none() {
            self.confirm_implicit(node, &file)?;
        }
        Ok(file)
    }

    /// The open directory of a handle, or of the inode if there is no handle.
    pub(crate) fn directory_of(
        &self,
        node: NodeId,
        handle: Handle,
    ) -> Result<(File, Arc<Mutex<DirStream>>)> {
        if self.terms.is_implicit(handle, HandleKind::Directory) {
            self.implicit_directory(node)
        } else {
            self.fds.files().handles().directory(node, handle)
        }
    }

    fn implicit_directory(&self, node: NodeId) -> Result<(File, Arc<Mutex<DirStream>>)> {
        let files = self.fds.files().handleless().directory(node);
        if let Some((file, stream)) = &files {
            // If another request is reading it, open a second stream instead of waiting.
            let busy = matches!(stream.try_lock(), Err(TryLockError::WouldBlock));
            if !busy {
                return Ok((file.clone(), Arc::clone(stream)));
            }
        }
        let inode = self.fds.inode(node)?;
        let opened = (
            File::from_fd(self.fds.open_directory(&inode)?),
            Arc::<Mutex<DirStream>>::default(),
        );
        if files.is_none() {
            self.keep_handleless(node, |files| {
                files.reading = Some(opened.0.clone());
                files.stream = Some(Arc::clone(&opened.1));
            });
        }
        Ok(opened)
    }

    fn open_handleless(&self, node: NodeId, write: bool) -> Result<File> {
        let inode = self.regular(node)?;
        if !write {
            let file = File::from_fd(self.fds.open_for_reading(&inode, OFlags::NOCTTY)?);
            self.keep_handleless(node, |files| files.reading = Some(file.clone()));
            return Ok(file);
        }
        self.fds.writable()?;
        let (file, readable) = match self.open_for_writing(&inode, OFlags::RDWR) {
            // The file is write-only.
            Err(Errno::ACCESS) => (self.open_for_writing(&inode, OFlags::WRONLY)?, false),
            opened => (opened?, true),
        };
        let file = File::from_fd(file);
        self.keep_handleless(node, |files| {
            files.writing = Some(file.clone());
            if readable {
                files.reading = Some(file.clone());
            }
        });
        Ok(file)
    }

    /// Opens a file for writing, including files that can only be appended to.
    fn open_for_writing(&self, inode: &Inode, access: OFlags) -> Result<OwnedFd> {
        self.fds
            .open_appendable(inode, access | OFlags::NOCTTY, true)
    }

    /// Stores a file that CREATE opened as `node`.
    pub(crate) fn keep_created(&self, node: NodeId, file: File) {
        let flags = rustix::fs::fcntl_getfl(&file);
        let access = flags.map_or(OFlags::RDONLY, |flags| flags & OFlags::RWMODE);
        self.keep_handleless(node, |files| {
            if access != OFlags::RDONLY {
                files.writing = Some(file.clone());
            }
            if access != OFlags::WRONLY {
                files.reading = Some(file);
            }
        });
    }

    fn keep_handleless(&self, node: NodeId, update: impl FnOnce(&mut InodeFiles)) {
        self.fds.files().handleless().keep(node, update);
        // A FORGET may have run in the meantime.
        if self.fds.inodes().get(node).is_none() {
            self.fds.close_idle_files(node);
        }
        self.fds.make_room();
    }

    /// The descriptor for an owner's locks on an open file. It is opened if the owner has none.
    pub(crate) fn lock_file_of(
        &self,
        node: NodeId,
        handle: Handle,
        owner: LockOwner,
    ) -> Result<Arc<File>> {
        // A file must be open to be locked.
        self.fds
            .files()
            .handles()
            .file(node, handle, HandleKind::File)?;
        let inode = self.fds.inode(node)?;
        if let Some(file) = self.fds.files().record_locks().get(node, handle, owner) {
            return Ok(file);
        }
        self.fds.room_for_handle().map_err(|_full| Errno::NOLCK)?;
        match self.fds.open_to_lock(&inode) {
            Ok(fd) => self
                .fds
                .files()
                .record_locks()
                .add(node, handle, owner, File::from_fd(fd)),
            Err(Errno::MFILE | Errno::NFILE) => Err(Errno::NOLCK),
            Err(error) => Err(error),
        }
    }

    /// An open file on the file system of `node`, for SYNCFS.
    pub(crate) fn file_system_file(&self, node: NodeId) -> Result<File> {
        if let (NodeId::ROOT, Some(file)) = (node, &self.single_file) {
            let file = reopen_fd(file, self.fds.proc_fds(), OFlags::RDONLY)?;
            return Ok(File::from_fd(file));
        }
        let inode = self.fds.inode(node)?;
        match inode.kind() {
            FileType::Directory | FileType::RegularFile => {
                Ok(File::from_fd(self.fds.reopen(&inode, OFlags::RDONLY)?))
            }
            _ => Err(Errno::INVAL),
        }
    }
}
