//! READDIR and READDIRPLUS: entries of a mounted file system, and the names that lead to mount points.
//!
//! Such names are listed after all others, at offsets that no file system uses: from 2⁶³ − 2³² up to
//! but not including 2⁶³ − 1, where file systems have the end. The invariant: a name is listed once,
//! also if the mounted file system has it too.

use std::cell::Cell;
use std::ffi::CStr;

use super::Vfs;
use super::points::Point;
use super::table::{At, Table, Target};
use crate::fs::{Caller, DirEntry, DirSink, Entry, Handle, NodeId, Result};

/// The offset after all entries of a mounted file system.
const BASE: u64 = (1 << 63) - (1 << 32);
/// The end of a directory, for file systems that have a largest offset.
const END: u64 = (1 << 63) - 1;

/// A request for entries.
#[derive(Clone, Copy)]
pub(super) struct Listing<'a> {
    pub(super) caller: &'a Caller,
    pub(super) node: NodeId,
    pub(super) handle: Handle,
    pub(super) offset: u64,
    pub(super) plus: bool,
}

impl Vfs {
    /// Passes entries from the listing's offset on to `sink`.
    pub(super) fn list(
        &self,
        table: &Table,
        listing: Listing<'_>,
        sink: &mut dyn DirSink,
    ) -> Result<()> {
        let at = match table.resolve(listing.node)? {
            Target::Point(point) => {
                if list_dots(&listing, point, sink) {
                    self.list_children(table, listing, (None, point), 0, sink);
                }
                return Ok(());
            }
            Target::Node(at) => at,
        };
        let Some(point) = table.point_at(&at) else {
            return list_node(table, &listing, at, None, sink).map(|_| ());
        };
        if (BASE..END).contains(&listing.offset)
            || list_node(table, &listing, at, Some(point), sink)?
        {
            self.list_children(table, listing, (Some(at), point), BASE, sink);
        }
        Ok(())
    }

    /// Lists the children of `point`, each at the offset of its number after `base`.
    fn list_children(
        &self,
        table: &Table,
        listing: Listing<'_>,
        (at, point): (Option<At<'_>>, &Point),
        base: u64,
        sink: &mut dyn DirSink,
    ) {
        // An offset of the mounted file system's is before all of them.
        let from = if listing.offset == END {
            0
        } else {
            listing.offset
        };
        let mut children: Vec<_> = point.children.iter().collect();
        // By their numbers, which don't change when others come and go.
        children.sort_unstable_by_key(|(_, number)| **number);
        for (name, number) in children {
            let next_offset = base + number + 1;
            let Some(child) = table.points.get(*number).filter(|_| next_offset > from) else {
                continue;
            };
            if !sink.has_room(name) {
                return;
            }
            let dir_entry = DirEntry {
                inode: child.number,
                next_offset,
                kind: libc::DT_DIR,
                name,
            };
            if listing.plus {
                let entry = self.entry_of_child(table, listing.caller, at, (child, name));
                // After an error the guest looks the name up, and gets the error in its place.
                sink.add(dir_entry, entry.ok().as_ref());
            } else {
                sink.add(dir_entry, None);
            }
        }
    }
}

/// Lists `.` and `..` of a directory that only leads to mount points. Returns whether there is room
/// for more.
fn list_dots(listing: &Listing<'_>, point: &Point, sink: &mut dyn DirSink) -> bool {
    for (next_offset, name, inode) in [(1, c".", point.number), (2, c"..", point.parent)] {
        if listing.offset < next_offset {
            if !sink.has_room(name) {
                return false;
            }
            let kind = libc::DT_DIR;
            sink.add(
                DirEntry {
                    inode,
                    next_offset,
                    kind,
                    name,
                },
                None,
            );
        }
    }
    true
}

/// Lists a directory of a mounted file system, without the names of `except`'s children. Returns
/// whether that was all of it, with room for more.
fn list_node(
    table: &Table,
    listing: &Listing<'_>,
    at: At<'_>,
    except: Option<&Point>,
    sink: &mut dyn DirSink,
) -> Result<bool> {
    let Listing {
        caller,
        handle,
        offset,
        plus,
        ..
    } = *listing;
    if !plus && except.is_none() {
        // Nothing to translate.
        at.fs.readdir(caller, at.node, handle, offset, plus, sink)?;
        return Ok(false);
    }
    let mut outward = Outward {
        sink,
        table,
        at,
        except,
        is_full: Cell::new(false),
        dropped: Vec::new(),
    };
    let listed = at
        .fs
        .readdir(caller, at.node, handle, offset, plus, &mut outward);
    let Outward {
        is_full, dropped, ..
    } = outward;
    // Not from within the listing, for which the file system may hold a lock.
    dropped.iter().for_each(|node| at.fs.forget(*node, 1));
    listed.map(|()| !is_full.get())
}

/// Passes the entries of a mounted file system on to the guest.
struct Outward<'a> {
    sink: &'a mut dyn DirSink,
    table: &'a Table,
    at: At<'a>,
    /// The names of its children are left out.
    except: Option<&'a Point>,
    is_full: Cell<bool>,
    /// Nodes that were looked up, and that the guest doesn't get to know.
    dropped: Vec<NodeId>,
}

impl Outward<'_> {
    fn leaves_out(&self, name: &CStr) -> bool {
        self.except
            .is_some_and(|point| point.children.contains_key(name))
    }
}

impl DirSink for Outward<'_> {
    fn room(&self) -> usize {
        self.sink.room()
    }

    fn has_room(&self, name: &CStr) -> bool {
        let has_room = self.leaves_out(name) || self.sink.has_room(name);
        self.is_full.set(!has_room);
        has_room
    }

    fn add(&mut self, dir_entry: DirEntry<'_>, entry: Option<&Entry>) {
        let leaves_out = self.leaves_out(dir_entry.name);
        let node = entry.map(|entry| self.table.outward(self.at.mount, entry.node));
        if let (Some(entry), true) = (entry, leaves_out || matches!(node, Some(Err(_)))) {
            self.dropped.push(entry.node);
        }
        if leaves_out {
            return;
        }
        let translated = match (entry, node) {
            (Some(entry), Some(Ok(node))) => Some(Entry { node, ..*entry }),
            _ => None,
        };
        self.sink.add(dir_entry, translated.as_ref());
    }
}
