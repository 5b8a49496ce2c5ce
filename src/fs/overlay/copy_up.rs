//! Copies files and directories up: makes an inode of a lower layer one of the upper layer.
//!
//! The copy is made in the work directory, or as a file without a name, and gets its name when it is
//! complete, so that a crash at any moment leaves either the lower inode or the whole copy. The
//! invariant: a node is copied up once, after its parents.

use std::ffi::{CStr, CString};
use std::sync::Arc;

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use super::layer::SERVER;
use super::node::{Location, Node, Real};
use super::work::NOREPLACE;
use super::{Overlay, UPPER, copy_data};
use crate::fs::{
    Attributes, Caller, Changes, Entry, Handle, HandleKind, NewNode, NewTime, NodeId, OpenFile,
    Result, XattrFlags, waiting,
};

const PERMISSIONS: u32 = 0o7777;
/// The limit of values and lists of extended attributes.
const XATTR_MAX: usize = 65536;

/// How much of a file is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CopyUp {
    /// All of it.
    Whole,
    /// No data, because it is about to be truncated.
    Truncated,
}

/// A finished copy that has not got its name yet. Its lookup is counted.
struct Copy {
    entry: Entry,
    /// Its name in the work directory; `None` for a file without a name.
    name: Option<CString>,
}

impl Overlay {
    /// Makes `node` one of the upper layer, and its parents.
    ///
    /// # Errors
    ///
    /// `EROFS` without an upper layer; [`waiting::MUST_WAIT`] where the calling thread may not wait
    /// for data to be copied; otherwise those of the layers.
    pub(super) fn copy_up(&self, node: &Arc<Node>, how: CopyUp) -> Result<()> {
        if self.is_upper(node.top()) {
            return Ok(());
        }
        if self.upper.is_none() {
            return Err(Errno::ROFS);
        }
        if how == CopyUp::Whole && !waiting::is_allowed() {
            let (attributes, _) = self.attributes(node, None)?;
            let kind = FileType::from_raw_mode(attributes.mode);
            if kind == FileType::RegularFile && attributes.size > 0 {
                return Err(waiting::MUST_WAIT);
            }
        }
        let mut parents = Vec::new();
        let mut next = node.location();
        while let Some(at) = next.filter(|at| !self.is_upper(at.parent.top())) {
            next = at.parent.location();
            parents.push(at.parent);
        }
        for parent in parents.iter().rev() {
            self.copy_up_one(parent, CopyUp::Whole)?;
        }
        self.copy_up_one(node, how)
    }

    /// As [`copy_up`](Self::copy_up); the parents are in the upper layer.
    fn copy_up_one(&self, node: &Arc<Node>, how: CopyUp) -> Result<()> {
        let _copying = node.lock_copying();
        let lower = node.top();
        if self.is_upper(lower) {
            return Ok(());
        }
        let location = node.location();
        if location.is_none() && node.is_dir {
            return Err(Errno::NOENT);
        }
        let (attributes, _) = self.layer(lower).getattr(&SERVER, lower.node, None)?;
        let copy = self.make_copy(node, lower, &attributes, how)?;
        let upper = Real {
            layer: UPPER,
            node: copy.entry.node,
        };
        let number = self.layers[UPPER].number(copy.entry.attributes.inode);
        if let Err(error) = self.place(node, location, &copy) {
            self.forget_upper(copy.entry.node);
            if let Some(name) = &copy.name {
                self.discard(name, node.is_dir);
            }
            return Err(error);
        }
        let is_separated = attributes.links > 1;
        let forgotten = self.nodes.copied_up(node, upper, number, is_separated);
        self.forget_reals(forgotten);
        Ok(())
    }

    /// Gives a copy the name of its node, unless that has been removed meanwhile.
    fn place(&self, node: &Arc<Node>, location: Option<Location>, copy: &Copy) -> Result<()> {
        let (fs, _, work) = self.work()?;
        let Some(at) = location else {
            return self.leave_nameless(copy, work);
        };
        let _names = at.parent.lock_names();
        if !node.is_at(&at.parent, &at.name) {
            if node.is_dir {
                return Err(Errno::NOENT);
            }
            return self.leave_nameless(copy, work);
        }
        let parent = at.parent.top();
        if !self.is_upper(parent) {
            return Err(Errno::STALE);
        }
        let (before, _) = fs.getattr(&SERVER, parent.node, None)?;
        match &copy.name {
            Some(name) => {
                let (from, to) = ((work, name.as_c_str()), (parent.node, at.name.as_c_str()));
                fs.rename(&SERVER, from, to, NOREPLACE)?;
            }
            None => {
                let linked = fs.link(&SERVER, copy.entry.node, parent.node, &at.name)?;
                self.forget_upper(linked.node);
            }
        }
        // To the guest, the directory has not changed.
        let times = Changes {
            accessed: Some(NewTime::At(before.accessed)),
            modified: Some(NewTime::At(before.modified)),
            ..Changes::default()
        };
        if let Err(error) = fs.setattr(&SERVER, parent.node, None, &times) {
            log::debug!("overlay: a directory's times can't be restored: {error}");
        }
        Ok(())
    }

    /// The node has no name, and its copy gets none.
    fn leave_nameless(&self, copy: &Copy, work: NodeId) -> Result<()> {
        match &copy.name {
            Some(name) => self.upper()?.0.unlink(&SERVER, work, name),
            None => Ok(()),
        }
    }

    fn make_copy(
        &self,
        node: &Arc<Node>,
        lower: Real,
        attributes: &Attributes,
        how: CopyUp,
    ) -> Result<Copy> {
        let (fs, upper, work) = self.work()?;
        let owner = Caller {
            uid: Some(attributes.uid),
            gid: Some(attributes.gid),
            ..SERVER
        };
        let new = NewNode {
            mode: attributes.mode & !PERMISSIONS | 0o600,
            umask: 0,
            rdev: attributes.rdev,
            label: None,
        };
        let kind = FileType::from_raw_mode(attributes.mode);
        if kind == FileType::RegularFile {
            self.refuse_metacopy(node, lower)?;
            let flags = OFlags::RDWR.bits();
            let (made, name) = match fs.tmpfile(&owner, work, flags, &new) {
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::ISDIR | Errno::INVAL) => {
                    let name = upper.new_name();
                    let exclusive = flags | OFlags::EXCL.bits();
                    (fs.create(&owner, work, &name, exclusive, &new)?, Some(name))
                }
                made => (made?, None),
            };
            let (entry, opened) = made;
            let filled = self.fill(lower, attributes, (entry.node, opened.handle), how);
            let released = fs.release(entry.node, opened.handle);
            let copy = Copy { entry, name };
            return self.kept(copy, filled.and(released), false);
        }
        let name = upper.new_name();
        let entry = match kind {
            FileType::Directory => fs.mkdir(&owner, work, &name, &new)?,
            FileType::Symlink => {
                let target = self.layer(lower).readlink(&SERVER, lower.node)?;
                let target = CString::new(target).map_err(|_nul| Errno::IO)?;
                fs.symlink(&owner, work, &name, &target, None)?
            }
            _ => fs.mknod(&owner, work, &name, &new)?,
        };
        let copied = self.copy_metadata(lower, attributes, entry.node);
        let copy = Copy {
            entry,
            name: Some(name),
        };
        self.kept(copy, copied, kind == FileType::Directory)
    }

    /// The copy, or nothing of it if it is incomplete.
    fn kept(&self, copy: Copy, complete: Result<()>, is_dir: bool) -> Result<Copy> {
        complete.inspect_err(|_| {
            self.forget_upper(copy.entry.node);
            if let Some(name) = &copy.name {
                self.discard(name, is_dir);
            }
        })?;
        Ok(copy)
    }

    /// Copies data and metadata of a regular file to `target`, an inode and a handle of the upper
    /// layer, and makes the data durable.
    fn fill(
        &self,
        lower: Real,
        attributes: &Attributes,
        target: (NodeId, Handle),
        how: CopyUp,
    ) -> Result<()> {
        let (fs, _) = self.upper()?;
        let has_data = how == CopyUp::Whole && attributes.size > 0;
        let file = match fs.file(target.0, target.1, HandleKind::File)? {
            OpenFile::Host(file) => file,
            OpenFile::Object(_) => return Err(Errno::OPNOTSUPP),
        };
        if has_data {
            let layer = self.layer(lower);
            let flags = OFlags::RDONLY.bits();
            let opened = layer.open(&SERVER, lower.node, flags)?;
            let from = layer.file(lower.node, opened.handle, HandleKind::File);
            let copied = from.and_then(|from| copy_data::copy(from, &file, attributes.size));
            layer.release(lower.node, opened.handle)?;
            copied?;
        }
        self.copy_metadata(lower, attributes, target.0)?;
        if has_data && self.options.sync_copies {
            rustix::fs::fsync(&file)?;
        }
        Ok(())
    }

    /// Gives an inode of the upper layer the owner, extended attributes, mode and times of one with
    /// these `attributes`.
    pub(super) fn copy_metadata(
        &self,
        from: Real,
        attributes: &Attributes,
        upper: NodeId,
    ) -> Result<()> {
        let (fs, _) = self.upper()?;
        let is_symlink = FileType::from_raw_mode(attributes.mode) == FileType::Symlink;
        let (now, _) = fs.getattr(&SERVER, upper, None)?;
        // First, as it clears the set-ID bits and capabilities.
        if (now.uid, now.gid) != (attributes.uid, attributes.gid) {
            let owner = Changes {
                uid: Some(attributes.uid),
                gid: Some(attributes.gid),
                ..Changes::default()
            };
            fs.setattr(&SERVER, upper, None, &owner)?;
        }
        self.copy_xattrs(from, upper)?;
        let changes = Changes {
            mode: (!is_symlink).then_some(attributes.mode & PERMISSIONS),
            accessed: Some(NewTime::At(attributes.accessed)),
            modified: Some(NewTime::At(attributes.modified)),
            ..Changes::default()
        };
        fs.setattr(&SERVER, upper, None, &changes).map(drop)
    }

    /// Copies the extended attributes, without the overlay's own.
    fn copy_xattrs(&self, from: Real, upper: NodeId) -> Result<()> {
        let prefix = self.options.xattr_prefix;
        let layer = self.layer(from);
        let names = match layer.listxattr(&SERVER, from.node, XATTR_MAX) {
            Ok(names) => names,
            Err(Errno::NOSYS | Errno::OPNOTSUPP) => return Ok(()),
            Err(error) => return Err(error),
        };
        let (fs, _) = self.upper()?;
        for name in prefix.to_guest(&names).split_inclusive(|byte| *byte == 0) {
            let name = CStr::from_bytes_with_nul(name).map_err(|_nul| Errno::IO)?;
            let in_layer = self.layer_name(name);
            let value = match layer.getxattr(&SERVER, from.node, &in_layer, XATTR_MAX) {
                Ok(value) => value,
                Err(Errno::NODATA) => continue,
                Err(error) => return Err(error),
            };
            let flags = XattrFlags::empty();
            match fs.setxattr(&SERVER, upper, &in_layer, &value, flags) {
                // As in the kernel: only what affects security must not be lost.
                Err(Errno::OPNOTSUPP) if !must_keep(name) => {}
                set => set?,
            }
        }
        Ok(())
    }
}

fn must_keep(name: &CStr) -> bool {
    let name = name.to_bytes();
    name.starts_with(b"security.") || name.starts_with(b"system.posix_acl_")
}
