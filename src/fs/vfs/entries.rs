//! Names: what is found by one, and which ones can't be changed.
//!
//! The invariant: what a mounted file system returns reaches the guest under a node id with the
//! number of the mount.

use std::ffi::CStr;

use rustix::io::Errno;

use super::Vfs;
use super::attributes::{entry_of, is_directory};
use super::points::Point;
use super::table::{At, Table, Target};
use crate::fs::{Caller, Entry, NodeId, Result};

impl Vfs {
    /// Finds `name` in `parent`.
    pub(super) fn find(
        &self,
        table: &Table,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
    ) -> Result<Entry> {
        match table.resolve(parent)? {
            Target::Point(point) => {
                let child = table.points.child(point, name).ok_or(Errno::NOENT)?;
                self.entry_of_child(table, caller, None, (child, name))
            }
            Target::Node(at) => {
                let point = table.point_at(&at);
                match point.and_then(|point| table.points.child(point, name)) {
                    Some(child) => self.entry_of_child(table, caller, Some(at), (child, name)),
                    None => translated(table, &at, at.fs.lookup(caller, at.node, name)?),
                }
            }
        }
    }

    /// The entry of a point that was found by its name, in `parent` of a mounted file system or in
    /// another point.
    pub(super) fn entry_of_child(
        &self,
        table: &Table,
        caller: &Caller,
        parent: Option<At<'_>>,
        (child, name): (&Point, &CStr),
    ) -> Result<Entry> {
        if let Some(mount) = child.mount {
            return self.root_entry(table, caller, mount);
        }
        let Some(at) = parent else {
            return Ok(entry_of(child, self.made));
        };
        match at.fs.lookup(caller, at.node, name) {
            Ok(entry) if is_directory(&entry.attributes) => {
                child.stand_for(Some(entry.node));
                translated(table, &at, entry)
            }
            Ok(entry) => {
                at.fs.forget(entry.node, 1);
                child.stand_for(None);
                Ok(entry_of(child, self.made))
            }
            Err(Errno::NOENT) => {
                child.stand_for(None);
                Ok(entry_of(child, self.made))
            }
            Err(error) => Err(error),
        }
    }

    /// The node itself, as one more lookup of it.
    pub(super) fn find_self(&self, table: &Table, node: NodeId) -> Result<Entry> {
        match table.resolve(node)? {
            Target::Point(point) => Ok(entry_of(point, self.made)),
            Target::Node(at) if at.node == NodeId::ROOT => Ok(Entry {
                // The guest's kernel asks from within the mount that it made for it.
                submount: false,
                ..self.root_entry(table, &Caller::default(), at.mount)?
            }),
            Target::Node(at) => translated(table, &at, at.fs.lookup_self(at.node)?),
        }
    }

    /// The directory above the node; the root is above itself.
    pub(super) fn find_parent(&self, table: &Table, node: NodeId) -> Result<Entry> {
        let point = match table.resolve(node)? {
            Target::Point(point) => point,
            Target::Node(at) if at.node == NodeId::ROOT => {
                let mount = table.mount(at.mount).ok_or(Errno::STALE)?;
                table.points.get(mount.point).ok_or(Errno::STALE)?
            }
            Target::Node(at) => {
                let entry = at.fs.lookup_parent(at.node)?;
                return translated(table, &at, entry);
            }
        };
        let parent = table.points.get(point.parent).ok_or(Errno::STALE)?;
        match parent.directory() {
            Some((mount, node)) => self.find_self(table, table.outward(mount, node)?),
            None => Ok(entry_of(parent, self.made)),
        }
    }

    /// The entry of the root of a mount. It counts as no lookup there.
    fn root_entry(&self, table: &Table, caller: &Caller, mount: u16) -> Result<Entry> {
        let at = table.node(mount, NodeId::ROOT)?;
        let (attributes, ttl) = at.fs.getattr(caller, at.node, None)?;
        Ok(Entry {
            node: table.outward(mount, at.node)?,
            // Linux gives the root of a submount this generation.
            generation: 0,
            attributes,
            attribute_ttl: ttl,
            entry_ttl: ttl.min(super::attributes::TTL),
            submount: self.options.announce_submounts,
        })
    }
}

/// The entry that a mounted file system has returned, as the guest gets it.
pub(super) fn translated(table: &Table, at: &At<'_>, entry: Entry) -> Result<Entry> {
    match table.outward(at.mount, entry.node) {
        Ok(node) => Ok(Entry { node, ..entry }),
        Err(error) => {
            at.fs.forget(entry.node, 1);
            Err(error)
        }
    }
}

/// The node of a mounted file system, or `otherwise` for a directory that only leads to mount points.
pub(super) fn at(table: &Table, node: NodeId, otherwise: Errno) -> Result<At<'_>> {
    match table.resolve(node)? {
        Target::Point(_) => Err(otherwise),
        Target::Node(at) => Ok(at),
    }
}

/// The directory in which `name` is to be created: `EEXIST` for a name that leads to a mount point,
/// and `EROFS` where there are only such names.
pub(super) fn parent_to_create<'t>(
    table: &'t Table,
    parent: NodeId,
    name: &CStr,
) -> Result<At<'t>> {
    changeable(table, parent, name, (Errno::EXIST, Errno::ROFS))
}

/// The directory from which `name` is to be removed: `EBUSY` for a name that leads to a mount point,
/// and `ENOENT` where there are only such names.
pub(super) fn parent_to_remove<'t>(
    table: &'t Table,
    parent: NodeId,
    name: &CStr,
) -> Result<At<'t>> {
    changeable(table, parent, name, (Errno::BUSY, Errno::NOENT))
}

fn changeable<'t>(
    table: &'t Table,
    parent: NodeId,
    name: &CStr,
    (taken, nowhere): (Errno, Errno),
) -> Result<At<'t>> {
    let target = table.resolve(parent)?;
    let point = match &target {
        Target::Point(point) => Some(*point),
        Target::Node(at) => table.point_at(at),
    };
    if point.is_some_and(|point| point.children.contains_key(name)) {
        return Err(taken);
    }
    match target {
        Target::Point(_) => Err(nowhere),
        Target::Node(at) => Ok(at),
    }
}
