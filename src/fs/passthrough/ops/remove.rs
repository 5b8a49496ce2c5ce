//! Removes names: UNLINK and RMDIR, and the part of RENAME that replaces a name.
//!
//! The invariant: an inode that has lost its last name keeps a descriptor as long as the guest
//! knows it.

use std::ffi::CStr;
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, StatxFlags};
use rustix::io::Errno;

use super::Operations;
use crate::fs::passthrough::current_request;
use crate::fs::passthrough::inode_table::{
    DirChange, Directory, IDENTITY, Identity, Inode, InodeFd, RefKind, ReopenMethod, component,
    stat_fd,
};
use crate::fs::{Caller, NodeId, Result};
use crate::sys::file_handle::FileHandle;

/// An inode whose name is about to change.
pub(super) struct KnownInode {
    pub(super) inode: Arc<Inode>,
    links: u32,
}

impl KnownInode {
    /// Whether this is its last name.
    fn is_last(&self) -> bool {
        self.links == 1 || self.inode.kind() == FileType::Directory
    }
}

/// An inode that is about to lose a name.
pub(super) struct Victim<'a> {
    known: &'a KnownInode,
    by_handle: bool,
    /// A descriptor that keeps the inode alive, if it could be opened.
    fd: Option<InodeFd<'a>>,
}

impl Operations {
    pub(crate) fn remove(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        flags: AtFlags,
    ) -> Result<()> {
        let parent = self.fds.inode(parent)?;
        let parent = self.fds.fd(&parent)?;
        self.confirm(caller, &parent)?;
        self.remove_name(&parent, name, flags)
    }

    pub(crate) fn remove_name(
        &self,
        parent: &InodeFd<'_>,
        name: &CStr,
        flags: AtFlags,
    ) -> Result<()> {
        let named = self.known_inode(parent, component(name)?, true);
        if named.is_some() {
            self.fds.room_for_descriptor()?;
        }
        let removed = self.remove_known(named.as_ref(), parent, name, flags);
        if let Some(known) = &named {
            self.fds.evict_forgotten(&known.inode);
        }
        removed
    }

    fn remove_known(
        &self,
        named: Option<&KnownInode>,
        fd: &InodeFd<'_>,
        name: &CStr,
        flags: AtFlags,
    ) -> Result<()> {
        let parent = fd.inode();
        if let Some(known) = named.filter(|known| known.links == 1) {
            let dir_seq = self.fds.inodes().dir_seq(parent);
            self.fds
                .inodes()
                .record_name(&known.inode, parent, name, dir_seq);
        }
        let change = self.fds.inodes().begin_name_change([parent, parent]);
        // Another request may have added it before the change was announced.
        let new = match named {
            None => self.known_inode(fd, name, false),
            Some(_) => None,
        };
        let victim = named.or(new.as_ref()).map(|known| self.victim(known));
        let victim = victim.transpose()?;
        let removed = rustix::fs::unlinkat(fd, name, flags);
        if let Some(victim) = victim {
            self.finish_unlink(victim, removed.is_ok(), (parent, name), &change);
        }
        drop(change);
        if let Some(known) = &new {
            self.fds.evict_forgotten(&known.inode);
        }
        removed
    }

    /// A descriptor of an inode whose name is about to change, if it can be opened.
    ///
    /// # Errors
    ///
    /// No descriptor is left. The name must not change then, as the inode could not be reopened.
    pub(super) fn pin<'a>(
        &self,
        known: Option<&'a KnownInode>,
    ) -> Result<Option<Result<InodeFd<'a>>>> {
        match known.map(|known| self.fds.fd(&known.inode)) {
            Some(Err(Errno::MFILE | Errno::NFILE)) => Err(Errno::NFILE),
            opened => Ok(opened),
        }
    }

    /// Prepares an inode for the loss of a name. A descriptor in use is not closed before the table
    /// has recorded the loss. An inode that is about to lose its last name keeps a descriptor from
    /// here on, as its file handle will not open it.
    ///
    /// # Errors
    ///
    /// As [`pin`](Self::pin).
    pub(super) fn victim<'a>(&self, known: &'a KnownInode) -> Result<Victim<'a>> {
        let inode = &*known.inode;
        self.fds.inodes().set_nameless(inode, true);
        let by_handle = matches!(&*inode.ref_kind(), RefKind::Handle(_));
        let mut fd = None;
        if !by_handle || known.is_last() {
            fd = match self.pin(Some(known)) {
                Ok(opened) => opened.and_then(Result::ok),
                Err(error) => {
                    self.fds.inodes().set_nameless(inode, false);
                    return Err(error);
                }
            };
            if let Some(opened) = fd
                .take_if(|fd| fd.is_opened())
                .and_then(InodeFd::into_opened)
            {
                fd = match self.fds.inodes().install(inode, opened) {
                    Ok(fd) => Some(InodeFd::installed(inode, fd)),
                    Err(opened) => Some(InodeFd::opened(inode, opened)),
                };
            }
        }
        Ok(Victim {
            known,
            by_handle,
            fd,
        })
    }

    /// Records whether `victim` lost a name.
    pub(super) fn finish_unlink(
        &self,
        victim: Victim<'_>,
        lost: bool,
        (parent, name): (&Inode, &CStr),
        change: &DirChange<'_>,
    ) {
        let Victim {
            known,
            by_handle,
            fd,
        } = victim;
        let inode = &*known.inode;
        if lost && let Some(fd) = &fd {
            self.fds
                .inodes()
                .record_removal(inode, parent, name, change);
            if known.is_last() {
                self.fds.close_cached(inode.node());
            } else {
                // It has other names, none of them known. A server process that doesn't inherit the
                // descriptor can only find it by searching the share; recording the handle says
                // that it has a name. Without file handles the record is empty, which says the
                // same.
                let handle = FileHandle::of(fd);
                let bytes = handle.as_ref().map_or(&[][..], FileHandle::bytes);
                let ref_kind = inode.ref_kind();
                if !matches!(*ref_kind, RefKind::Handle(_)) {
                    inode.record().set_handle(bytes);
                }
            }
            let ref_kind = inode.ref_kind();
            if known.is_last() && inode.slot().is_full() && matches!(*ref_kind, RefKind::Handle(_))
            {
                self.fds
                    .inodes()
                    .change_reopen_method(inode, ref_kind, ReopenMethod::None);
            }
        }
        let is_nameless = lost
            && (known.is_last() || {
                let links = fd.as_ref().map(|fd| stat_fd(fd, StatxFlags::NLINK));
                matches!(links, Some(Ok(stat)) if stat.stx_nlink == 0)
            });
        if !is_nameless {
            self.fds.inodes().set_nameless(inode, false);
        }
        drop(fd);
        if by_handle && !lost && !self.fds.reopen_policy().keeps_opened_fds() {
            // Evict it even if it was used recently.
            inode.slot().second_chance();
            self.fds.close_now(inode);
        }
    }

    /// The inode that the guest knows under `name` in `parent`. If `loses` is set, the inode number
    /// is recorded in the journal for the next server process.
    pub(super) fn known_inode(
        &self,
        parent: &InodeFd<'_>,
        name: &CStr,
        loses: bool,
    ) -> Option<KnownInode> {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let stat = rustix::fs::statx(parent, name, flags, IDENTITY).ok()?;
        if loses
            && let Some(entry) = self
                .fds
                .inodes()
                .table()
                .own_journal_entry(current_request::unique())
        {
            entry.seen(stat.stx_ino);
        }
        let inode = self.fds.inodes().peek(&Identity::of(&stat))?;
        Some(KnownInode {
            inode,
            links: stat.stx_nlink,
        })
    }
}
