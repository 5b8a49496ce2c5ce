//! Closes the files of inodes: caches them, or lets the closer do it if that may take long.
//!
//! The invariant: a cached file is closed when the guest forgets its node.

use std::sync::Arc;

use rustix::fs::{FileType, OFlags};

use super::Descriptors;
use crate::fs::NodeId;
use crate::fs::passthrough::inode_table::{Inode, Key, RefKind};
use crate::fs::passthrough::open_files::Released;
use crate::io::File;

/// Whether files opened with these flags are interchangeable.
fn is_plain(flags: OFlags) -> bool {
    flags.difference(OFlags::NOCTTY | OFlags::CLOEXEC) == OFlags::RDONLY
}

impl Descriptors {
    /// Whether an inode with `key` is on a file system of this host.
    pub(crate) fn is_local(&self, key: &Key) -> bool {
        self.files.local().contains((key.device, key.mount))
    }

    /// Whether `inode` may be a file that only its descriptor keeps alive.
    pub(crate) fn may_be_nameless(inode: &Inode) -> bool {
        inode.kind() == FileType::RegularFile && matches!(&*inode.ref_kind(), RefKind::Nothing)
    }

    /// Closes the descriptor of a forgotten inode, unless a request is using it.
    pub(crate) fn close_forgotten(&self, inode: Arc<Inode>) {
        if let Some(fd) = Arc::into_inner(inode).and_then(Inode::into_descriptor) {
            self.files.closer().close(fd);
        }
    }

    /// Closes the cached files of a node that the guest has forgotten, or whose inode has lost its
    /// last name.
    pub(crate) fn close_idle_files(&self, node: NodeId) {
        let files = self.files.handleless().forget(node);
        files
            .into_iter()
            .flatten()
            .for_each(|file| self.close_file(node, file));
        self.close_cached(node);
    }

    /// Closes the files that are cached in case the guest opens `node` again.
    pub(crate) fn close_cached(&self, node: NodeId) {
        while let Some(file) = self.files.closed().pop(node) {
            self.close_file(node, file);
        }
    }

    /// Closes a file that the guest had open as `node`.
    pub(crate) fn close_file(&self, node: NodeId, file: File) {
        // The inode's own descriptor keeps the file alive.
        let inode = self.inodes.get(node);
        if inode.is_some_and(|inode| inode.slot().is_full()) {
            return;
        }
        if let Some(fd) = file.into_fd() {
            self.files.closer().close(fd);
        }
    }

    /// Takes a cached file that is open as OPEN with `flags` would open it.
    pub(crate) fn take_closed(&self, node: NodeId, flags: OFlags) -> Option<File> {
        if is_plain(flags) {
            self.files.closed().pop(node)
        } else {
            None
        }
    }

    /// Caches a released file, or closes it.
    pub(crate) fn cache_closed(&self, node: NodeId, released: Released) {
        let Released {
            file,
            flags,
            locked,
        } = released;
        let alone = !locked && file.users() == 1;
        if !self.files.closed().is_enabled() || !alone || !is_plain(flags) {
            self.close_file(node, file);
            return;
        }
        let Some(inode) = self
            .inodes
            .get(node)
            .filter(|inode| self.is_local(&inode.key()))
        else {
            self.close_file(node, file);
            return;
        };
        self.files.closed().keep(node, file);
        drop(inode);
        // A FORGET in the meantime didn't see the file.
        if self.inodes.get(node).is_none() {
            self.close_idle_files(node);
        }
        self.make_room();
    }
}
