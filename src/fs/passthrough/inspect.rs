//! What an operator can see of a passthrough: `impl Inspect`.
//!
//! Lists are walked without stopping the guest, so an entry that is added or removed meanwhile may
//! be missed. The invariant: each lock is held for the walk of one shard, and never over a system
//! call.

use std::os::fd::AsFd;

use super::Passthrough;
use super::descriptors::Descriptors;
use super::inode_table::Inode;
use crate::fs::{Dropped, Handle, HandleKind, Inspect, KnownInode, NodeId, OpenHandle, Page};

/// How many directories above an inode are named at most.
const MAX_PATH_DEPTH: usize = 1024;

impl Inspect for Passthrough {
    fn inode(&self, node: NodeId) -> Option<KnownInode> {
        let fds = self.fds();
        Some(known_inode(fds, &*fds.inodes().any(node)?))
    }

    fn inodes(&self, from: u64, limit: usize) -> Page<KnownInode> {
        let fds = self.fds();
        let (nodes, next) = fds.inodes().nodes_from(NodeId(from), limit);
        let inodes = nodes.into_iter().filter_map(|node| fds.inodes().any(node));
        Page {
            entries: inodes.map(|inode| known_inode(fds, &inode)).collect(),
            next: next.map(|NodeId(node)| node),
        }
    }

    fn handles(&self, from: u64, limit: usize) -> Page<OpenHandle> {
        let fds = self.fds();
        let (handles, next) = fds.files().handles().from(from, limit);
        let entries = handles.into_iter().map(|(fields, file)| OpenHandle {
            handle: Handle(fields.handle),
            node: NodeId(fields.node),
            kind: match fields.directory {
                true => HandleKind::Directory,
                false => HandleKind::File,
            },
            flags: fields.flags,
            path: match fields.node {
                1 => Some(b"/".to_vec()),
                _ => from_root(fds.path_of(file.as_fd()).ok()),
            },
        });
        Page {
            entries: entries.collect(),
            next,
        }
    }

    fn path(&self, node: NodeId) -> Option<Vec<u8>> {
        let fds = self.fds();
        path(fds, &*fds.inodes().any(node)?)
    }

    fn drop_caches(&self) -> Dropped {
        self.fds().drop_caches()
    }
}

fn known_inode(fds: &Descriptors, inode: &Inode) -> KnownInode {
    let key = inode.key();
    KnownInode {
        node: inode.node(),
        number: key.number,
        device: key.device,
        kind: inode.kind().as_raw_mode(),
        lookups: inode.lookups(),
        is_open: inode.slot().is_full(),
        path: path(fds, inode),
    }
}

/// The path by which the guest knows an inode, or where it is open on the host.
fn path(fds: &Descriptors, inode: &Inode) -> Option<Vec<u8>> {
    named_path(fds, inode).or_else(|| {
        let fd = inode.slot().borrow()?;
        from_root(fds.path_of(fd.as_fd()).ok())
    })
}

/// The path that the names of an inode and of the directories above it make up.
fn named_path(fds: &Descriptors, inode: &Inode) -> Option<Vec<u8>> {
    let mut names = Vec::new();
    let mut link = inode.link();
    let mut at = inode.node();
    while at != NodeId::ROOT {
        let (parent, name) = link?;
        names.push(name);
        if names.len() > MAX_PATH_DEPTH {
            return None;
        }
        at = parent;
        link = fds.inodes().any(parent)?.link();
    }
    if names.is_empty() {
        return Some(b"/".to_vec());
    }
    let mut path = Vec::new();
    for name in names.iter().rev() {
        path.push(b'/');
        path.extend_from_slice(name.to_bytes());
    }
    Some(path)
}

fn from_root(path: Option<Vec<u8>>) -> Option<Vec<u8>> {
    path.map(|path| [b"/", &path[..]].concat())
}
