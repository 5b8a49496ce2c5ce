//! Creates files: CREATE, MKDIR, MKNOD, SYMLINK, LINK, TMPFILE.
//!
//! A name that the upper layer has no entry for is created there at once. Where it has a whiteout,
//! the new inode is prepared in the work directory and replaces the whiteout. The invariant: a new
//! directory hides one of the same name below.

use std::ffi::CStr;
use std::sync::Arc;

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use super::copy_up::CopyUp;
use super::layer::SERVER;
use super::lookup::Used;
use super::node::Node;
use super::work::EXCHANGE;
use super::{Overlay, UPPER};
use crate::fs::{Caller, Entry, NewNode, NodeId, Opened, Result};

/// How often a CREATE without `O_EXCL` is tried while others create and remove the name.
const CREATE_TRIES: usize = 16;

/// Creates an inode under a name in a directory of the upper layer.
type Make<'a, T> = &'a dyn Fn(NodeId, &CStr) -> Result<(Entry, T)>;

impl Overlay {
    /// Creates `name` in `parent` by `make`, which gets a directory of the upper layer and a name.
    pub(super) fn make<T>(
        &self,
        parent: &Arc<Node>,
        name: &CStr,
        is_dir: bool,
        make: Make<'_, T>,
    ) -> Result<(Arc<Node>, Entry, T)> {
        self.copy_up(parent, CopyUp::Whole)?;
        let _names = parent.lock_names();
        if parent.is_removed() {
            return Err(Errno::NOENT);
        }
        let (upper, stack) = (parent.top().node, parent.stack());
        let is_merged = stack.len() > 1;
        let has_whiteout = if is_merged {
            let search = self.search(&stack, name)?;
            if search.found.is_some() {
                return Err(Errno::EXIST);
            }
            search.has_whiteout
        } else {
            false
        };
        let (entry, more) = if has_whiteout {
            self.make_over_whiteout(upper, name, is_dir, make)?
        } else {
            match make(upper, name) {
                // Left over where nothing is below any more.
                Err(Errno::EXIST) if !is_merged && self.has_whiteout(upper, name)? => {
                    self.make_over_whiteout(upper, name, is_dir, make)?
                }
                made => made?,
            }
        };
        let (node, entry) = self.adopt(parent, name, self.found(UPPER, entry))?;
        Ok((node, entry, more))
    }

    fn make_over_whiteout<T>(
        &self,
        parent: NodeId,
        name: &CStr,
        is_dir: bool,
        make: Make<'_, T>,
    ) -> Result<(Entry, T)> {
        let (fs, upper, _) = self.work()?;
        let nursery = self.nursery(parent)?;
        let new_name = upper.new_name();
        let made = make(nursery.node, &new_name).and_then(|(entry, more)| {
            let opaque = if is_dir {
                self.layers[UPPER].set_opaque(entry.node)
            } else {
                Ok(())
            };
            let flags = if is_dir { EXCHANGE } else { 0 };
            let from = (nursery.node, new_name.as_c_str());
            let moved = opaque.and_then(|()| fs.rename(&SERVER, from, (parent, name), flags));
            if let Err(error) = moved {
                self.forget_upper(entry.node);
                self.remove_tree(nursery.node, &new_name, is_dir)?;
                return Err(error);
            }
            if is_dir {
                // The whiteout is there now.
                self.remove_tree(nursery.node, &new_name, false)?;
            }
            Ok((entry, more))
        });
        self.close_nursery(nursery);
        made
    }

    /// Creates an inode that isn't opened.
    pub(super) fn make_node(
        &self,
        parent: NodeId,
        name: &CStr,
        is_dir: bool,
        make: &dyn Fn(NodeId, &CStr) -> Result<Entry>,
    ) -> Result<Entry> {
        let parent = self.nodes.get(parent)?;
        let made = self.make(&parent, name, is_dir, &|parent, name| {
            make(parent, name).map(|entry| (entry, ()))
        });
        made.map(|(_, entry, ())| entry)
    }

    pub(super) fn make_special(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        new: &NewNode<'_>,
    ) -> Result<Entry> {
        let (fs, _) = self.upper()?;
        // It would be a whiteout.
        if FileType::from_raw_mode(new.mode) == FileType::CharacterDevice && new.rdev == 0 {
            return Err(Errno::PERM);
        }
        self.make_node(parent, name, false, &|parent, name| {
            fs.mknod(caller, parent, name, new)
        })
    }

    pub(super) fn create_file(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        flags: u32,
        new: &NewNode<'_>,
    ) -> Result<(Entry, Opened)> {
        let parent = self.nodes.get(parent)?;
        let exclusive = flags & OFlags::EXCL.bits() != 0;
        for _ in 0..CREATE_TRIES {
            if !exclusive || self.upper.is_none() {
                match self.find(&parent, name) {
                    Ok(_) if exclusive => return Err(Errno::EXIST),
                    Ok(found) => return self.open_existing(caller, found, flags),
                    Err(Errno::NOENT) => {}
                    Err(error) => return Err(error),
                }
            }
            let (fs, _) = self.upper()?;
            let flags = flags | OFlags::EXCL.bits();
            let made = self.make(&parent, name, false, &|parent, name| {
                fs.create(caller, parent, name, flags, new)
            });
            match made {
                Err(Errno::EXIST) if !exclusive => {}
                made => {
                    let (node, entry, opened) = made?;
                    return Ok((entry, self.opened(&node, node.top(), opened)));
                }
            }
        }
        Err(Errno::NOENT)
    }

    fn open_existing(
        &self,
        caller: &Caller,
        (node, entry): (Arc<Node>, Entry),
        flags: u32,
    ) -> Result<(Entry, Opened)> {
        match self.open_node(caller, &node, flags) {
            Ok(opened) => {
                // Truncating and copying up have changed the attributes.
                let entry = self.entry_of(&node).unwrap_or(entry);
                Ok((entry, opened))
            }
            Err(error) => {
                self.drop_refs(&node, 1);
                Err(error)
            }
        }
    }

    /// Creates a file without a name.
    pub(super) fn make_nameless(
        &self,
        caller: &Caller,
        parent: NodeId,
        flags: u32,
        new: &NewNode<'_>,
    ) -> Result<(Entry, Opened)> {
        let (fs, _) = self.upper()?;
        let parent = self.nodes.get(parent)?;
        self.copy_up(&parent, CopyUp::Whole)?;
        let (entry, opened) = fs.tmpfile(caller, parent.top().node, flags, new)?;
        let mut found = self.found(UPPER, entry);
        let node = self.nodes.add_nameless(&self.candidate(&found)?)?;
        found.stack.clear();
        let mut entry = found.entry;
        self.show(&node, &mut entry);
        Ok((entry, self.opened(&node, node.top(), opened)))
    }

    /// Creates another name for a node.
    pub(super) fn make_link(
        &self,
        caller: &Caller,
        node: NodeId,
        parent: NodeId,
        name: &CStr,
    ) -> Result<Entry> {
        let (fs, _) = self.upper()?;
        let (node, parent) = (self.nodes.get(node)?, self.nodes.get(parent)?);
        if node.is_dir {
            return Err(Errno::PERM);
        }
        self.copy_up(&node, CopyUp::Whole)?;
        let linked = node.top().node;
        let (_, entry, ()) = self.make(&parent, name, false, &|parent, name| {
            fs.link(caller, linked, parent, name)
                .map(|entry| (entry, ()))
        })?;
        Ok(entry)
    }

    /// The node that is known as `name` in `parent`, which must be there.
    pub(super) fn existing(&self, parent: &Arc<Node>, name: &CStr) -> Result<Used<'_>> {
        self.find_used(parent, name)
    }
}
