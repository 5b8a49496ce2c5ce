//! Renames: RENAME and RENAME2.
//!
//! The invariant: an inode that is renamed can be opened at any moment, by its old name, its new
//! one, or a descriptor.

use std::ffi::CStr;

use rustix::fs::RenameFlags;
use rustix::io::Errno;

use super::Operations;
use super::remove::KnownInode;
use crate::fs::passthrough::inode_table::{DirChange, Directory, InodeFd, RefKind, component};
use crate::fs::{Caller, NodeId, Result};

impl Operations {
    pub(crate) fn rename(
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
        let old_parent = self.fds.inode(from.0)?;
        let new_parent = self.fds.inode(to.0)?;
        // A whiteout is a new file, so it needs an owner.
        let _as_caller = flags
            .contains(RenameFlags::WHITEOUT)
            .then(|| self.as_caller(caller, None))
            .transpose()?;
        let old_fd = self.fds.fd(&old_parent)?;
        let new_fd = self.fds.fd(&new_parent)?;
        self.confirm_both(caller, &old_fd, &new_fd)?;
        component(to.1)?;
        let moved = self.known_inode(&old_fd, component(from.1)?, true);
        if let Some(known) = &moved {
            let dir_seq = self.fds.inodes().dir_seq(&old_parent);
            self.fds
                .inodes()
                .record_name(&known.inode, &old_parent, from.1, dir_seq);
        }
        // Announced before it is read what is replaced: if another request adds the inode to the
        // table later, it opens it.
        let change = self
            .fds
            .inodes()
            .begin_name_change([&old_parent, &new_parent]);
        let replaced = self.known_inode(&new_fd, to.1, false);
        let known = (moved.as_ref(), replaced.as_ref());
        let renamed = self.rename_known(known, (&old_fd, from.1), (&new_fd, to.1), flags, &change);
        drop(change);
        for known in moved.iter().chain(&replaced) {
            self.fds.evict_forgotten(&known.inode);
        }
        renamed
    }

    fn rename_known(
        &self,
        (moved, replaced): (Option<&KnownInode>, Option<&KnownInode>),
        (old_fd, old_name): (&InodeFd<'_>, &CStr),
        (new_fd, new_name): (&InodeFd<'_>, &CStr),
        flags: RenameFlags,
        change: &DirChange<'_>,
    ) -> Result<()> {
        let (old_parent, new_parent) = (old_fd.inode(), new_fd.inode());
        if replaced.is_some() && !flags.contains(RenameFlags::EXCHANGE) {
            self.fds.room_for_descriptor()?;
        }
        // A descriptor in use is not closed before the table has recorded the rename.
        let by_name = |known: &&KnownInode| !matches!(&*known.inode.ref_kind(), RefKind::Handle(_));
        let in_use = [
            self.pin(moved.filter(by_name))?,
            self.pin(replaced.filter(by_name))?,
        ];
        let node = |known: &KnownInode| known.inode.node();
        // Both names are links of one inode. rename(2) does nothing then.
        let same = moved.is_some() && moved.map(node) == replaced.map(node);
        let exchanged = flags.contains(RenameFlags::EXCHANGE);
        let victim = replaced.filter(|_| !same && !exchanged);
        let victim = victim.map(|known| self.victim(known)).transpose()?;
        let renamed = rustix::fs::renameat_with(old_fd, old_name, new_fd, new_name, flags);
        if let Some(victim) = victim {
            self.finish_unlink(victim, renamed.is_ok(), (new_parent, new_name), change);
        }
        renamed?;
        if same {
            return Ok(());
        }
        if let Some(known) = replaced.filter(|_| exchanged) {
            let (parent, name) = (old_parent, old_name);
            self.fds
                .inodes()
                .record_rename(&known.inode, parent, name, change);
        }
        if let Some(known) = moved {
            let (parent, name) = (new_parent, new_name);
            self.fds
                .inodes()
                .record_rename(&known.inode, parent, name, change);
        }
        drop(in_use);
        Ok(())
    }
}
