//! Finds names in the layers, and the nodes for what is found.
//!
//! The invariant: every lookup that a layer counts is given back, unless it belongs to a node.

use std::ffi::{CStr, CString};
use std::sync::Arc;

use rustix::fs::FileType;
use rustix::io::Errno;

use super::layer::{Redirect, SERVER};
use super::node::{Node, Real, Stack};
use super::table::{Candidate, Identity};
use super::{Overlay, UPPER};
use crate::fs::{Attributes, Entry, NodeId, Result};

/// A name that was found: the inodes behind it, topmost first, and the entry of the first.
#[derive(Debug)]
pub(super) struct Found<'a> {
    overlay: &'a Overlay,
    pub(super) stack: Stack,
    pub(super) entry: Entry,
}

impl Found<'_> {
    pub(super) fn is_dir(&self) -> bool {
        is_dir(&self.entry.attributes)
    }

    pub(super) fn top(&self) -> Option<Real> {
        self.stack.first().copied()
    }
}

impl Drop for Found<'_> {
    fn drop(&mut self) {
        self.overlay.forget_reals(std::mem::take(&mut self.stack));
    }
}

/// The result of looking for a name in a stack of directories.
#[derive(Debug)]
pub(super) struct Search<'a> {
    pub(super) found: Option<Found<'a>>,
    /// The upper layer has a whiteout of this name.
    pub(super) has_whiteout: bool,
}

/// A node that an operation uses; the reference is given back when it is dropped.
#[derive(Debug)]
pub(super) struct Used<'a> {
    overlay: &'a Overlay,
    node: Arc<Node>,
}

impl std::ops::Deref for Used<'_> {
    type Target = Arc<Node>;

    fn deref(&self) -> &Arc<Node> {
        &self.node
    }
}

impl Drop for Used<'_> {
    fn drop(&mut self) {
        self.overlay.drop_refs(&self.node, 1);
    }
}

pub(super) fn is_dir(attributes: &Attributes) -> bool {
    FileType::from_raw_mode(attributes.mode) == FileType::Directory
}

impl Overlay {
    /// Drops `count` references of a node.
    pub(super) fn drop_refs(&self, node: &Arc<Node>, count: u64) {
        let forgotten = self.nodes.drop_refs(node, count);
        self.forget_reals(forgotten);
    }

    /// The entry of `entry`, found in `layer`.
    pub(super) fn found(&self, layer: usize, entry: Entry) -> Found<'_> {
        let real = Real {
            layer,
            node: entry.node,
        };
        Found {
            overlay: self,
            stack: Stack::from_slice(&[real]),
            entry,
        }
    }

    /// Looks `name` up in one directory of a layer. Returns what was found and whether it is a
    /// whiteout.
    fn find_in_layer(&self, dir: Real, name: &CStr) -> Result<Option<(Found<'_>, bool)>> {
        let entry = match self.layer(dir).lookup(&SERVER, dir.node, name) {
            Ok(entry) => entry,
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            // A lower layer may allow shorter names only.
            Err(Errno::NAMETOOLONG) if !self.is_upper(dir) => return Ok(None),
            Err(error) => return Err(error),
        };
        let found = self.found(dir.layer, entry);
        let layer = &self.layers[dir.layer];
        let is_whiteout = layer.is_whiteout(dir.node, entry.node, &entry.attributes)?;
        Ok(Some((found, is_whiteout)))
    }

    /// Looks `name` up in the directories of `stack`.
    pub(super) fn search(&self, stack: &[Real], name: &CStr) -> Result<Search<'_>> {
        let mut result = Search {
            found: None,
            has_whiteout: false,
        };
        let mut name = std::borrow::Cow::Borrowed(name);
        for dir in stack {
            let Some((mut next, is_whiteout)) = self.find_in_layer(*dir, &name)? else {
                continue;
            };
            if is_whiteout {
                result.has_whiteout = self.is_upper(*dir);
                break;
            }
            let next_is_dir = next.is_dir();
            let real = next.top();
            match &mut result.found {
                // A file hides what is below, and is hidden by a directory.
                Some(_) if !next_is_dir => break,
                Some(found) => found.stack.append(&mut next.stack),
                None => result.found = Some(next),
            }
            // A redirect leads anywhere below, even if this directory has nothing below.
            let real = real.filter(|real| next_is_dir && self.has_layers_below(real.layer));
            let Some(real) = real else { break };
            let marks = self.layers[real.layer].marks(real.node)?;
            if marks.is_opaque {
                break;
            }
            match marks.redirect {
                None => {}
                Some(Redirect::Name(other)) => name = std::borrow::Cow::Owned(other),
                Some(Redirect::Path(path)) => {
                    let mut lower = self.search_path(real.layer, &path)?;
                    if let (Some(found), Some(lower)) = (&mut result.found, &mut lower)
                        && lower.is_dir()
                    {
                        found.stack.append(&mut lower.stack);
                    }
                    break;
                }
            }
        }
        Ok(result)
    }

    pub(super) fn has_layers_below(&self, layer: usize) -> bool {
        layer + 1 < self.layers.len()
    }

    /// Finds `path` from the root in the layers below `layer`.
    fn search_path(&self, layer: usize, path: &[CString]) -> Result<Option<Found<'_>>> {
        let root = self.nodes.get(NodeId::ROOT)?.stack();
        let mut stack: Stack = root.into_iter().filter(|real| real.layer > layer).collect();
        let mut last: Option<Found<'_>> = None;
        for name in path {
            // The previous directory is kept until its entry was found.
            let next = self.search(&stack, name)?.found;
            let Some(found) = next else { return Ok(None) };
            stack.clone_from(&found.stack);
            last = Some(found);
        }
        Ok(last)
    }

    /// Whether a layer below the upper one has `name` in the directory `stack`.
    pub(super) fn is_in_lower(&self, stack: &[Real], name: &CStr) -> Result<bool> {
        let upper_dirs = stack.iter().take_while(|dir| self.is_upper(**dir)).count();
        let lower = stack.get(upper_dirs..).unwrap_or_default();
        Ok(self.search(lower, name)?.found.is_some())
    }

    /// Looks `name` up in `parent`, and counts one reference of the node.
    pub(super) fn find(&self, parent: &Arc<Node>, name: &CStr) -> Result<(Arc<Node>, Entry)> {
        if let Some(node) = self.nodes.find_named(parent, name) {
            match self.entry_of(&node) {
                // Without links, the host has removed the file from the layer.
                Ok(entry) if node.is_dir || entry.attributes.links != 0 => {
                    return Ok((node, entry));
                }
                Ok(_) | Err(Errno::STALE | Errno::NOENT) => {
                    let forgotten = self.nodes.detach(parent, name);
                    self.forget_reals(forgotten);
                    self.drop_refs(&node, 1);
                }
                Err(error) => {
                    self.drop_refs(&node, 1);
                    return Err(error);
                }
            }
        }
        if parent.is_removed() {
            return Err(Errno::NOENT);
        }
        let found = self.search(&parent.stack(), name)?.found;
        self.adopt(parent, name, found.ok_or(Errno::NOENT)?)
    }

    /// As [`find`](Self::find), for use during one operation.
    pub(super) fn find_used(&self, parent: &Arc<Node>, name: &CStr) -> Result<Used<'_>> {
        let (node, _) = self.find(parent, name)?;
        Ok(Used {
            overlay: self,
            node,
        })
    }

    /// The node for what was `found` as `name` in `parent`; counts one reference.
    pub(super) fn adopt(
        &self,
        parent: &Arc<Node>,
        name: &CStr,
        mut found: Found<'_>,
    ) -> Result<(Arc<Node>, Entry)> {
        let candidate = self.candidate(&found)?;
        let (node, is_new) = self.nodes.find_or_add(parent, name, &candidate)?;
        if is_new {
            // The lookups belong to the node now.
            found.stack.clear();
        }
        let mut entry = found.entry;
        self.show(&node, &mut entry);
        Ok((node, entry))
    }

    pub(super) fn candidate(&self, found: &Found<'_>) -> Result<Candidate> {
        let real = found.top().ok_or(Errno::IO)?;
        let is_dir = found.is_dir();
        Ok(Candidate {
            identity: if self.is_upper(real) && !is_dir {
                Identity::Upper
            } else {
                Identity::Name
            },
            is_dir,
            number: self.layers[real.layer].number(found.entry.attributes.inode),
            stack: found.stack.clone(),
        })
    }

    /// Replaces what the layer says by what the guest sees.
    pub(super) fn show(&self, node: &Node, entry: &mut Entry) {
        entry.node = node.id;
        entry.generation = 0;
        entry.entry_ttl = self.options.entry_ttl;
        entry.submount = false;
        self.show_attributes(node, &mut entry.attributes);
    }

    /// The entry of a known node, without counting a reference.
    pub(super) fn entry_of(&self, node: &Node) -> Result<Entry> {
        let (attributes, attribute_ttl) = self.attributes(node, None)?;
        Ok(Entry {
            node: node.id,
            generation: 0,
            attributes,
            attribute_ttl,
            entry_ttl: self.options.entry_ttl,
            submount: false,
        })
    }

    /// Whether the upper layer has a whiteout `name` in its directory `dir`.
    pub(super) fn has_whiteout(&self, dir: NodeId, name: &CStr) -> Result<bool> {
        let dir = Real {
            layer: UPPER,
            node: dir,
        };
        let found = self.find_in_layer(dir, name)?;
        Ok(found.is_some_and(|(_, is_whiteout)| is_whiteout))
    }
}
