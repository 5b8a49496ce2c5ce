//! The work directory: where new inodes are prepared before they appear under their name.
//!
//! The invariant: what is in the work directory is never needed after a restart, so it is removed
//! then.

use std::ffi::{CStr, CString};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use rustix::fs::{FileType, RenameFlags};
use rustix::io::Errno;

use super::layer::SERVER;
use super::node::Real;
use super::{Overlay, UPPER, UpperLayer};
use crate::fs::{Caller, Changes, Entry, FileSystem, NewNode, NodeId, Result, XattrFlags};

const DEFAULT_ACL: &CStr = c"system.posix_acl_default";
const SET_GROUP_ID: u32 = 0o2000;

pub(super) const EXCHANGE: u32 = RenameFlags::EXCHANGE.bits();
pub(super) const NOREPLACE: u32 = RenameFlags::NOREPLACE.bits();
pub(super) const WHITEOUT: u32 = RenameFlags::WHITEOUT.bits();

/// A new directory, as the server makes them.
pub(super) const PRIVATE_DIRECTORY: NewNode<'static> = NewNode {
    mode: 0o700,
    umask: 0,
    rdev: 0,
    label: None,
};

/// A directory in which something is created before it is moved to its own place.
pub(super) struct Nursery {
    pub(super) node: NodeId,
    /// Its name in the work directory, if it was made for one inode.
    name: Option<CString>,
}

impl UpperLayer {
    /// A new name for the work directory.
    pub(super) fn new_name(&self) -> CString {
        let number = self.next_name.fetch_add(1, Ordering::Relaxed);
        let digits = format!("#{number:x}");
        CString::new(digits).unwrap_or_default()
    }
}

impl Overlay {
    /// The upper layer.
    ///
    /// # Errors
    ///
    /// `EROFS` if there is none.
    pub(super) fn upper(&self) -> Result<(&dyn FileSystem, &UpperLayer)> {
        let upper = self.upper.as_ref().ok_or(Errno::ROFS)?;
        Ok((&*self.layers[UPPER].fs, upper))
    }

    /// The upper layer and the work directory.
    pub(super) fn work(&self) -> Result<(&dyn FileSystem, &UpperLayer, NodeId)> {
        let (fs, upper) = self.upper()?;
        let work = *upper
            .work_node
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        Ok((fs, upper, work.ok_or(Errno::IO)?))
    }

    /// Gives back the lookup of an inode of the upper layer.
    pub(super) fn forget_upper(&self, node: NodeId) {
        self.layers[UPPER].fs.forget(node, 1);
    }

    /// Creates a whiteout in the work directory, and returns its name.
    pub(super) fn new_whiteout(&self) -> Result<CString> {
        let (fs, upper, work) = self.work()?;
        let name = upper.new_name();
        let new = NewNode {
            mode: FileType::CharacterDevice.as_raw_mode(),
            umask: 0,
            rdev: 0,
            label: None,
        };
        let entry = fs.mknod(&SERVER, work, &name, &new)?;
        self.forget_upper(entry.node);
        Ok(name)
    }

    /// Removes `name` from the work directory, and a directory with all that is in it.
    pub(super) fn discard(&self, name: &CStr, is_dir: bool) {
        let discarded = self
            .work()
            .and_then(|(_, _, work)| self.remove_tree(work, name, is_dir));
        if let Err(error) = discarded
            && error != Errno::NOENT
        {
            log::warn!(
                "overlay: {name:?} stays in the work directory until the next start: {error}"
            );
        }
    }

    /// Removes `name` from `parent` in the upper layer, and a directory with all that is in it.
    pub(super) fn remove_tree(&self, parent: NodeId, name: &CStr, is_dir: bool) -> Result<()> {
        let (fs, _) = self.upper()?;
        if !is_dir {
            return fs.unlink(&SERVER, parent, name);
        }
        let entry = fs.lookup(&SERVER, parent, name)?;
        let emptied = self.empty_directory(entry.node);
        self.forget_upper(entry.node);
        emptied.and_then(|()| fs.rmdir(&SERVER, parent, name))
    }

    /// Removes everything in a directory of the upper layer.
    pub(super) fn empty_directory(&self, node: NodeId) -> Result<()> {
        let dir = Real { layer: UPPER, node };
        for (name, is_dir) in self.names_in(dir)? {
            self.remove_tree(node, &name, is_dir)?;
        }
        Ok(())
    }

    /// A directory in which a new inode gets what it would inherit from `parent`: the group and the
    /// default ACL. Usually that is nothing, and the work directory itself will do.
    pub(super) fn nursery(&self, parent: NodeId) -> Result<Nursery> {
        let (fs, upper, work) = self.work()?;
        let (attributes, _) = fs.getattr(&SERVER, parent, None)?;
        let acl = self.layers[UPPER].xattr(parent, DEFAULT_ACL)?;
        if attributes.mode & SET_GROUP_ID == 0 && acl.is_none() {
            return Ok(Nursery {
                node: work,
                name: None,
            });
        }
        let name = upper.new_name();
        let entry = fs.mkdir(&SERVER, work, &name, &PRIVATE_DIRECTORY)?;
        let nursery = Nursery {
            node: entry.node,
            name: Some(name),
        };
        let changes = Changes {
            gid: Some(attributes.gid),
            mode: None,
            ..Changes::default()
        };
        let inherit = || {
            fs.setattr(&SERVER, entry.node, None, &changes)?;
            let changes = Changes {
                mode: Some(0o700 | attributes.mode & SET_GROUP_ID),
                ..Changes::default()
            };
            fs.setattr(&SERVER, entry.node, None, &changes)?;
            match &acl {
                Some(acl) => {
                    let flags = XattrFlags::empty();
                    fs.setxattr(&SERVER, entry.node, DEFAULT_ACL, acl, flags)
                }
                None => Ok(()),
            }
        };
        match inherit() {
            Ok(()) => Ok(nursery),
            Err(error) => {
                self.close_nursery(nursery);
                Err(error)
            }
        }
    }

    pub(super) fn close_nursery(&self, nursery: Nursery) {
        if let Some(name) = nursery.name {
            self.forget_upper(nursery.node);
            self.discard(&name, true);
        }
    }

    /// Creates a directory with the same attributes as `model` in the work directory, and marks it as
    /// hiding what lies below. Its lookup is counted.
    pub(super) fn new_opaque_like(&self, model: NodeId) -> Result<(CString, Entry)> {
        let (fs, upper, work) = self.work()?;
        let (attributes, _) = fs.getattr(&SERVER, model, None)?;
        let name = upper.new_name();
        let owner = Caller {
            uid: Some(attributes.uid),
            gid: Some(attributes.gid),
            ..SERVER
        };
        let entry = fs.mkdir(&owner, work, &name, &PRIVATE_DIRECTORY)?;
        let made = (|| {
            self.layers[UPPER].set_opaque(entry.node)?;
            let model = Real {
                layer: UPPER,
                node: model,
            };
            self.copy_metadata(model, &attributes, entry.node)
        })();
        match made {
            Ok(()) => Ok((name, entry)),
            Err(error) => {
                self.forget_upper(entry.node);
                self.discard(&name, true);
                Err(error)
            }
        }
    }
}
