//! What an operator can see of an overlay: `impl Inspect`, and how much is in use.
//!
//! Nodes and handles are the overlay's own; what they are on the host is asked of the layers. The
//! invariant: the lock of one shard is held at a time, and no layer is asked under it.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::node::{Node, Real};
use super::{Handles, Overlay, UPPER};
use crate::fs::{
    Dropped, Handle, HandleKind, Inspect, KnownInode, NodeId, OpenHandle, Page, Usage,
};

/// How many directories above a node are named at most.
const MAX_PATH_DEPTH: usize = 1024;

impl Inspect for Overlay {
    fn inode(&self, node: NodeId) -> Option<KnownInode> {
        Some(self.known(&*self.nodes.get(node).ok()?))
    }

    fn inodes(&self, from: u64, limit: usize) -> Page<KnownInode> {
        let (nodes, next) = self.nodes.from(from, limit);
        Page {
            entries: nodes.iter().map(|node| self.known(node)).collect(),
            next,
        }
    }

    fn handles(&self, from: u64, limit: usize) -> Page<OpenHandle> {
        let (handles, next) = self.handles.from(from, limit);
        let open = |handle| self.open_handle(handle);
        Page {
            entries: handles.into_iter().filter_map(open).collect(),
            next,
        }
    }

    fn path(&self, node: NodeId) -> Option<Vec<u8>> {
        self.path_of(&*self.nodes.get(node).ok()?)
    }

    /// Of all layers.
    fn drop_caches(&self) -> Dropped {
        let layers = self.layers.iter().filter_map(|layer| layer.fs.inspect());
        layers.fold(Dropped::default(), |sum, fs| sum + fs.drop_caches())
    }
}

impl Overlay {
    /// The nodes and handles of the overlay, and the descriptors of its layers. There is no limit
    /// of handles but that of each layer.
    pub(super) fn in_use(&self) -> Usage {
        let layers: Usage = self.layers.iter().map(|layer| layer.fs.usage()).sum();
        let (nodes, limit) = self.nodes.count_and_limit();
        Usage {
            inodes: Some(nodes as u64),
            max_inodes: Some(limit as u64),
            handles: Some(self.handles.count() as u64),
            max_handles: None,
            ..layers
        }
    }

    fn known(&self, node: &Node) -> KnownInode {
        let top = self.in_layer_of(node.top());
        let kind = if node.is_dir { libc::S_IFDIR } else { 0 };
        KnownInode {
            node: node.id,
            number: node.number(),
            device: top.as_ref().map_or(0, |inode| inode.device),
            kind: top.as_ref().map_or(kind, |inode| inode.kind),
            lookups: match node.id {
                NodeId::ROOT => 0,
                _ => node.refs.load(Ordering::Relaxed),
            },
            is_open: top.is_some_and(|inode| inode.is_open),
            path: self.path_of(node),
        }
    }

    /// What the layer knows of an inode.
    fn in_layer_of(&self, real: Real) -> Option<KnownInode> {
        let layer = self.layers.get(real.layer)?;
        layer.fs.inspect()?.inode(real.node)
    }

    fn open_handle(&self, handle: Handle) -> Option<OpenHandle> {
        let (node, real, in_layer, kind) = self.handles.open_in(handle)?;
        // The layer lists it first from there on, if it is still open.
        let layer = self.layers.get(real.layer)?;
        let listed = layer.fs.inspect().map(|fs| fs.handles(in_layer.0, 1));
        let listed = listed.and_then(|page| page.entries.into_iter().next());
        let listed = listed.filter(|open| open.handle == in_layer);
        Some(OpenHandle {
            handle,
            node: node.id,
            kind,
            flags: listed.as_ref().map_or(0, |open| open.flags),
            path: self
                .path_of(&node)
                .or_else(|| self.guest_path(real, listed?.path?)),
        })
    }

    /// The path by which the guest knows a node, or where it lies in its layer.
    fn path_of(&self, node: &Node) -> Option<Vec<u8>> {
        self.named_path(node).or_else(|| {
            let top = node.top();
            let layer = self.layers.get(top.layer)?;
            self.guest_path(top, layer.fs.inspect()?.path(top.node)?)
        })
    }

    /// The path that the names of a node and of the directories above it make up.
    fn named_path(&self, node: &Node) -> Option<Vec<u8>> {
        if node.id == NodeId::ROOT {
            return Some(b"/".to_vec());
        }
        let mut names: Vec<CString> = Vec::new();
        let mut at = node.location()?;
        loop {
            names.push(at.name);
            if at.parent.id == NodeId::ROOT {
                break;
            }
            if names.len() > MAX_PATH_DEPTH {
                return None;
            }
            at = at.parent.location()?;
        }
        let path = names.iter().rev();
        Some(
            path.flat_map(|name| [b"/", name.to_bytes()].concat())
                .collect(),
        )
    }

    /// The guest's path of what has this path in a layer. The upper directory is a part of its
    /// layer.
    fn guest_path(&self, real: Real, path: Vec<u8>) -> Option<Vec<u8>> {
        let Some(upper) = self.upper.as_ref().filter(|_| real.layer == UPPER) else {
            return Some(path);
        };
        let root = Path::new("/").join(&upper.directory);
        let within = Path::new(std::ffi::OsStr::from_bytes(&path));
        let within = within.strip_prefix(root).ok()?;
        Some([b"/", within.as_os_str().as_bytes()].concat())
    }
}

/// Where a handle is in the list: by its number, and handles of equal numbers by their layer.
fn position(handle: Handle) -> u64 {
    (handle.0 << super::handles::TAG_BITS) | (handle.0 >> super::handles::LAYER_SHIFT)
}

impl Handles {
    fn count(&self) -> usize {
        self.files.count() + self.lock_directories().len()
    }

    /// The `limit` first handles from a position on, and the position of the next one.
    fn from(&self, from: u64, limit: usize) -> (Vec<Handle>, Option<u64>) {
        let mut lowest = crate::fs::lowest::Lowest::new(limit);
        let mut add = |handle| {
            let position = position(handle);
            if position >= from {
                lowest.add((position, handle));
            }
        };
        self.files.each_handle(&mut add);
        self.lock_directories()
            .keys()
            .for_each(|number| add(super::handles::of_directory(*number)));
        let (handles, next) = lowest.take();
        let handles = handles.into_iter().map(|(_, handle)| handle);
        (handles.collect(), next.map(|(position, _)| position))
    }

    /// The node of a handle, and what it is open as.
    fn open_in(&self, handle: Handle) -> Option<(Arc<Node>, Real, Handle, HandleKind)> {
        match super::handles::directory_number(handle) {
            Some(number) => {
                let directories = self.lock_directories();
                let open = directories.get(&number)?;
                let node = Arc::clone(&open.node);
                Some((node, open.real, open.handle, HandleKind::Directory))
            }
            None => {
                let (node, real, in_layer) = self.files.open_in(handle)?;
                Some((node, real, in_layer, HandleKind::File))
            }
        }
    }
}
