//! Sets the security labels of new files (`--security-label`).
//!
//! Where the host doesn't set a label itself, it is an extended attribute like any other, set after
//! the creation. The invariant: a file that could not be labelled as the guest asked is removed
//! before the guest gets a reply, and no existing file is labelled.

use std::ffi::CStr;

use rustix::fs::{AtFlags, FileType, XattrFlags};
use rustix::io::Errno;

use super::Operations;
use crate::fs::passthrough::inode_table::{IDENTITY, Identity};
use crate::fs::{Entry, HandleKind, Label, NodeId, Opened, Result};

/// The result of a creation.
pub(crate) trait Created {
    fn entry(&self) -> &Entry;
    fn opened(&self) -> Option<&Opened> {
        None
    }
}

impl Created for Entry {
    fn entry(&self) -> &Entry {
        self
    }
}

impl Created for (Entry, Opened) {
    fn entry(&self) -> &Entry {
        &self.0
    }

    fn opened(&self) -> Option<&Opened> {
        Some(&self.1)
    }
}

impl Operations {
    /// Calls `make`, which creates a file, as `name` in `parent` if it has a name, and labels the
    /// file.
    pub(crate) fn labelled<M: Created>(
        &self,
        label: Option<Label<'_>>,
        link: Option<(NodeId, &CStr)>,
        make: impl FnOnce() -> Result<M>,
    ) -> Result<M> {
        let Some(Label { name, value }) = label else {
            return make();
        };
        let guard = self
            .xattrs
            .label_new_files(self.fds.proc_fds(), name, value)?;
        if guard.is_some() {
            return make();
        }
        let created = make()?;
        let node = created.entry().node;
        let set = |path: &CStr| self.xattrs.set(path, name, value, XattrFlags::empty());
        match self.with_path(node, set) {
            Ok(()) => Ok(created),
            Err(error) => {
                self.undo_create(&created, link);
                Err(error)
            }
        }
    }

    /// Undoes a creation.
    fn undo_create(&self, created: &impl Created, link: Option<(NodeId, &CStr)>) {
        let entry = created.entry();
        if let Some((parent, name)) = link
            && let Err(error) = self.remove_created(entry, parent, name)
        {
            log::warn!("can't remove a new file that could not be labelled: {error}");
        }
        if let Some(opened) = created.opened()
            && self.terms.explicit(Some(opened.handle)).is_some()
        {
            let _unknown =
                self.fds
                    .files()
                    .handles()
                    .release(entry.node, opened.handle, HandleKind::File);
        }
        self.fds.forget_lookups(entry.node, 1);
        drop(self.fds.files().handleless().forget(entry.node));
    }

    /// Removes `name`, unless it belongs to another file now.
    fn remove_created(&self, entry: &Entry, parent: NodeId, name: &CStr) -> Result<()> {
        let created = self.fds.inode(entry.node)?;
        let directory = self.fds.inode(parent)?;
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let there = rustix::fs::statx(self.fds.fd(&directory)?, name, flags, IDENTITY)?;
        if Identity::of(&there).key != created.key() {
            return Err(Errno::STALE);
        }
        let flags = match created.kind() {
            FileType::Directory => AtFlags::REMOVEDIR,
            _ => AtFlags::empty(),
        };
        self.remove_name(&self.fds.fd(&directory)?, name, flags)
    }
}
