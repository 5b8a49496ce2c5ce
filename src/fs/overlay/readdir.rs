//! Reads directories: READDIR and READDIRPLUS.
//!
//! A directory of one layer is read as that layer reads it. The entries of a merged directory are
//! collected once for each time that it is read from the start; offsets are positions in that list.
//! The invariant: a name appears once, as the topmost layer that has it says, and no whiteout does.

use std::collections::HashSet;
use std::ffi::{CStr, CString};
use std::sync::{Arc, PoisonError};

use rustix::io::Errno;

use super::Overlay;
use super::handles::OpenDirectory;
use super::layer::SERVER;
use super::listing::{Listed, Listing};
use super::node::{Node, Real, Stack};
use crate::fs::{Caller, DirEntry, DirSink, Entry, Handle, NodeId, Result};

/// Collects all entries of a directory of a layer.
#[derive(Default)]
struct Collector(Vec<Listed>);

impl DirSink for Collector {
    fn has_room(&self, _name: &CStr) -> bool {
        true
    }

    fn add(&mut self, entry: DirEntry<'_>, _: Option<&Entry>) {
        self.0.push(Listed {
            number: entry.inode,
            kind: entry.kind,
            name: entry.name.to_owned(),
        });
    }
}

impl Overlay {
    pub(super) fn read_entries(
        &self,
        caller: &Caller,
        (node, handle): (NodeId, Handle),
        offset: u64,
        plus: bool,
        sink: &mut dyn DirSink,
    ) -> Result<()> {
        let open = self.handles.directory(node, handle)?;
        let mut listing = open.listing.lock().unwrap_or_else(PoisonError::into_inner);
        if offset == 0 {
            let stack = open.node.stack();
            let same = stack.len() == 1 && stack.first() == Some(&open.real);
            *listing = if same || open.node.is_removed() {
                None
            } else {
                Some(Arc::new(self.list(&open.node, &stack)?))
            };
        }
        let merged = listing.clone();
        drop(listing);
        match merged {
            Some(listing) => self.pass_on(&open.node, &listing, (offset, plus), sink),
            None => {
                let mut sink = OneLayer {
                    overlay: self,
                    open: &open,
                    sink,
                };
                let (node, handle) = (open.real.node, open.handle);
                let layer = self.layer(open.real);
                layer.readdir(caller, node, handle, offset, plus, &mut sink)
            }
        }
    }

    /// Passes the entries of a merged directory from `offset` on to `sink`.
    fn pass_on(
        &self,
        node: &Arc<Node>,
        listing: &Listing,
        (offset, plus): (u64, bool),
        sink: &mut dyn DirSink,
    ) -> Result<()> {
        let from = usize::try_from(offset).map_err(|_too_large| Errno::INVAL)?;
        let entries = listing.0.get(from..).unwrap_or_default();
        for (listed, next_offset) in entries.iter().zip(offset + 1..) {
            if !sink.has_room(&listed.name) {
                break;
            }
            let own = matches!(listed.name.to_bytes(), b"." | b"..");
            let found = if plus && !own {
                self.find(node, &listed.name).ok()
            } else {
                None
            };
            let listed = DirEntry {
                inode: listed.number,
                next_offset,
                kind: listed.kind,
                name: &listed.name,
            };
            sink.add(listed, found.as_ref().map(|(_, entry)| entry));
        }
        Ok(())
    }

    /// The entries of a merged directory.
    fn list(&self, node: &Arc<Node>, stack: &[Real]) -> Result<Listing> {
        let mut entries = vec![
            Listed {
                number: node.number(),
                kind: libc::DT_DIR,
                name: c".".to_owned(),
            },
            Listed {
                number: parent_number(node),
                kind: libc::DT_DIR,
                name: c"..".to_owned(),
            },
        ];
        self.each_visible(stack, &mut |real, listed| {
            let upper = self.is_upper(real);
            let number = self.layers[real.layer].number(listed.number);
            let number = self.nodes.number_of(node, &listed.name, upper, number);
            entries.push(Listed { number, ..listed });
            true
        })?;
        Ok(Listing(entries))
    }

    /// Calls `act` for each name that the directories of `stack` have together, until it returns
    /// false.
    fn each_visible(
        &self,
        stack: &[Real],
        act: &mut dyn FnMut(Real, Listed) -> bool,
    ) -> Result<()> {
        let mut seen = HashSet::new();
        let (last, above) = (stack.len().saturating_sub(1), stack.len() > 1);
        for (at, dir) in stack.iter().enumerate() {
            for listed in self.entries_in(*dir)? {
                if seen.contains(&listed.name) {
                    continue;
                }
                let is_whiteout = self.is_listed_whiteout(*dir, &listed)?;
                if above && at != last {
                    seen.insert(listed.name.clone());
                }
                if !is_whiteout && !act(*dir, listed) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn is_listed_whiteout(&self, dir: Real, listed: &Listed) -> Result<bool> {
        if !self.layers[dir.layer].may_be_whiteout(listed.kind) {
            return Ok(false);
        }
        match self.layer(dir).lookup(&SERVER, dir.node, &listed.name) {
            Ok(entry) => {
                let found = self.found(dir.layer, entry);
                let attributes = &found.entry.attributes;
                self.layers[dir.layer].is_whiteout(dir.node, entry.node, attributes)
            }
            Err(Errno::NOENT) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// The entries of one directory of a layer, without `.` and `..`.
    fn entries_in(&self, dir: Real) -> Result<Vec<Listed>> {
        let layer = self.layer(dir);
        let opened = layer.opendir(&SERVER, dir.node, 0)?;
        let mut all = Collector::default();
        // A layer may pass fewer entries than there is room for.
        let mut offset = 0;
        let read = loop {
            let before = all.0.len();
            let mut batch = Batch {
                all: &mut all,
                last: offset,
            };
            let read = layer.readdir(&SERVER, dir.node, opened.handle, offset, false, &mut batch);
            offset = batch.last;
            if read.is_err() || all.0.len() == before {
                break read;
            }
        };
        layer.releasedir(dir.node, opened.handle)?;
        read?;
        all.0
            .retain(|listed| !matches!(listed.name.to_bytes(), b"." | b".."));
        Ok(all.0)
    }

    /// Whether the directories of `stack` have no name together.
    pub(super) fn is_empty(&self, stack: &Stack) -> Result<bool> {
        let mut is_empty = true;
        self.each_visible(stack, &mut |_, _| {
            is_empty = false;
            false
        })?;
        Ok(is_empty)
    }

    /// The names in a directory of the upper layer, and whether each is a directory.
    pub(super) fn names_in(&self, dir: Real) -> Result<Vec<(CString, bool)>> {
        let entries = self.entries_in(dir)?;
        let is_dir = |kind| kind == libc::DT_DIR;
        Ok(entries
            .into_iter()
            .map(|listed| (listed.name, is_dir(listed.kind)))
            .collect())
    }
}

/// Collects entries and the offset after the last one.
struct Batch<'a> {
    all: &'a mut Collector,
    last: u64,
}

impl DirSink for Batch<'_> {
    fn has_room(&self, _name: &CStr) -> bool {
        true
    }

    fn add(&mut self, dir_entry: DirEntry<'_>, entry: Option<&Entry>) {
        self.last = dir_entry.next_offset;
        self.all.add(dir_entry, entry);
    }
}

/// Passes the entries of a directory of one layer on, as the guest sees them.
struct OneLayer<'a> {
    overlay: &'a Overlay,
    open: &'a OpenDirectory,
    sink: &'a mut dyn DirSink,
}

impl OneLayer<'_> {
    fn adopt(&self, name: &CStr, entry: &Entry) -> Option<Option<Entry>> {
        let (overlay, dir) = (self.overlay, self.open.real);
        let found = overlay.found(dir.layer, *entry);
        let attributes = &entry.attributes;
        if found.is_dir() && overlay.has_layers_below(dir.layer) {
            // It may say that something lies below it.
            let found = overlay.find(&self.open.node, name);
            return Some(found.map(|(_, entry)| entry).ok());
        }
        match overlay.layers[dir.layer].is_whiteout(dir.node, entry.node, attributes) {
            Ok(true) => None,
            Ok(false) => Some(
                overlay
                    .adopt(&self.open.node, name, found)
                    .map(|(_, entry)| entry)
                    .ok(),
            ),
            // The guest looks it up itself and gets the error.
            Err(_) => Some(None),
        }
    }
}

impl DirSink for OneLayer<'_> {
    fn room(&self) -> usize {
        self.sink.room()
    }

    fn has_room(&self, name: &CStr) -> bool {
        self.sink.has_room(name)
    }

    fn add(&mut self, dir_entry: DirEntry<'_>, entry: Option<&Entry>) {
        let (overlay, node, real) = (self.overlay, &self.open.node, self.open.real);
        let upper = overlay.is_upper(real);
        let name = dir_entry.name;
        let number = match name.to_bytes() {
            b"." => node.number(),
            b".." => parent_number(node),
            _ => {
                let number = overlay.layers[real.layer].number(dir_entry.inode);
                overlay.nodes.number_of(node, name, upper, number)
            }
        };
        let entry = match entry {
            Some(entry) => match self.adopt(name, entry) {
                Some(entry) => entry,
                None => return,
            },
            None => {
                let listed = Listed {
                    number,
                    kind: dir_entry.kind,
                    name: name.to_owned(),
                };
                if dir_entry.kind != libc::DT_DIR
                    && matches!(overlay.is_listed_whiteout(real, &listed), Ok(true))
                {
                    return;
                }
                None
            }
        };
        let listed = DirEntry {
            inode: number,
            ..dir_entry
        };
        self.sink.add(listed, entry.as_ref());
    }
}

/// The inode number of `..`. The guest must not see the directory above the root.
fn parent_number(node: &Node) -> u64 {
    node.location()
        .map_or(node.number(), |at| at.parent.number())
}
