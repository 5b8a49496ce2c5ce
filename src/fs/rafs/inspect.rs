//! What an operator can see of an image: `impl Inspect`.
//!
//! As nothing changes, it isn't recorded which inodes a guest knows and what it has open. The
//! invariant: what isn't recorded isn't reported as none, but as unlisted.

use std::sync::PoisonError;

use super::Rafs;
use crate::fs::{Dropped, Inspect, KnownInode, NodeId, OpenHandle, Page};

impl Inspect for Rafs {
    fn inode(&self, node: NodeId) -> Option<KnownInode> {
        let inode = self.image().find(node).ok()?;
        let attributes = self.image().attributes(&*inode).ok()?;
        Some(KnownInode {
            node,
            number: attributes.inode,
            device: 0,
            kind: attributes.mode & libc::S_IFMT,
            lookups: 0,
            is_open: false,
            path: self.path(node),
        })
    }

    fn inodes(&self, _: u64, _: usize) -> Page<KnownInode> {
        Page::empty()
    }

    fn handles(&self, _: u64, _: usize) -> Page<OpenHandle> {
        Page::empty()
    }

    fn unlisted(&self) -> Vec<Vec<u8>> {
        vec![b"/".to_vec()]
    }

    /// A file of an image doesn't say which directory it is in.
    fn path(&self, node: NodeId) -> Option<Vec<u8>> {
        (node == NodeId::ROOT).then(|| b"/".to_vec())
    }

    /// Files are kept open once they have been read.
    fn drop_caches(&self) -> Dropped {
        let opened = self.files.opened.lock();
        let opened = std::mem::take(&mut *opened.unwrap_or_else(PoisonError::into_inner));
        Dropped {
            closed_files: opened.len(),
            ..Dropped::default()
        }
    }
}
