//! What an operator can see of a file system, and can make it give up, while it is served.
//!
//! A file system has this optionally, as [`Replay`](super::Replay) and [`Migrate`](super::Migrate).
//! The invariant: nothing here waits for the guest or makes it wait, and no answer is larger than
//! asked for.

use super::{Handle, HandleKind, NodeId};

/// Part of a long list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page<T> {
    /// The entries.
    pub entries: Vec<T>,
    /// Where the next page begins, if there may be more entries.
    pub next: Option<u64>,
}

impl<T> Page<T> {
    /// A page without entries, after which there are none.
    #[must_use]
    pub fn empty() -> Self {
        Self {
            entries: Vec::new(),
            next: None,
        }
    }
}

/// An inode that the guest knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownInode {
    /// The node id by which the guest knows it.
    pub node: NodeId,
    /// The inode number on the host.
    pub number: u64,
    /// The device on the host: the major number above 32 bits of the minor one.
    pub device: u64,
    /// The type, as in `st_mode`.
    pub kind: u32,
    /// How often the guest has looked it up without forgetting it. 0 for a directory that is kept for
    /// what is below it, and for an inode that is remembered.
    pub lookups: u64,
    /// The server has a descriptor of it.
    pub is_open: bool,
    /// The path, from `/`, if it is known. It may be outdated if the host has changed it.
    pub path: Option<Vec<u8>>,
}

/// A file or directory that the guest has open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenHandle {
    /// The handle.
    pub handle: Handle,
    /// The node id by which the guest knows the inode.
    pub node: NodeId,
    /// What it is.
    pub kind: HandleKind,
    /// The flags of `open(2)`.
    pub flags: u32,
    /// The path, from `/`, if there is one. That of a removed file ends with ` (deleted)`.
    pub path: Option<Vec<u8>>,
}

/// What was closed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dropped {
    /// Files that the guest has closed and might have opened again.
    pub closed_files: usize,
    /// Files and directories that the guest uses without opening them.
    pub unreported_opens: usize,
    /// Descriptors of inodes, which are opened again when they are needed.
    pub inode_descriptors: usize,
}

impl std::ops::Add for Dropped {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            closed_files: self.closed_files.saturating_add(other.closed_files),
            unreported_opens: self.unreported_opens.saturating_add(other.unreported_opens),
            inode_descriptors: self
                .inode_descriptors
                .saturating_add(other.inode_descriptors),
        }
    }
}

/// A file system that an operator can look into.
pub trait Inspect {
    /// An inode, if the guest may know it.
    fn inode(&self, _node: NodeId) -> Option<KnownInode> {
        None
    }

    /// Up to `limit` inodes, from the one on at which a [`Page`] ended; 0 for the first.
    fn inodes(&self, from: u64, limit: usize) -> Page<KnownInode>;

    /// Up to `limit` open files and directories, likewise.
    fn handles(&self, from: u64, limit: usize) -> Page<OpenHandle>;

    /// The paths below which it isn't recorded what a guest knows and has open, so that no list has
    /// anything of it.
    fn unlisted(&self) -> Vec<Vec<u8>> {
        Vec::new()
    }

    /// The path of an inode that the guest knows, from `/`, if it is known.
    fn path(&self, node: NodeId) -> Option<Vec<u8>>;

    /// Closes what is open only because it may be needed again.
    fn drop_caches(&self) -> Dropped;
}
