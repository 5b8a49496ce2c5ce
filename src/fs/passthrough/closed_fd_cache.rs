//! Files that the guest has closed and may well open again: kept open for a while.
//!
//! To open an inode and to close it again costs more than to read a page of it, and programs open
//! the same files again and again. So a file that was open for reading and nothing else is put by
//! as it is released, and the next OPEN of its inode takes it. Nobody uses it meanwhile, and it has
//! no state: it is read at offsets, it never had a lock, and it keeps nobody from writing to the
//! file or from running it.
//!
//! Only where opening is nothing but opening: on a file system of this host that has no other file
//! to show after a while (an overlay has, once it has copied up; NFS asks its server), with the
//! capabilities by which the host would not refuse. The invariant: what is put by for a node was
//! opened as that node, and goes when the guest forgets it.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::OFlags;

use super::handles::Released;
use super::inode_ref::Key;
use super::{Passthrough, credentials};
use crate::fs::{NodeId, Result};
use crate::io::File;

/// So many that a handful of workers rarely meet.
const SHARDS: usize = 64;

/// Types of uapi `linux/magic.h` on which a file that is open stays the one to be opened: ext2 to
/// ext4, XFS, Btrfs, tmpfs, F2FS, ZFS, bcachefs.
const LOCAL: [u32; 7] = [
    0xef53,
    0x5846_5342,
    0x9123_683e,
    0x0102_1994,
    0xf2f5_2010,
    0x2fc1_2fc1,
    0xca45_1a4e,
];

/// A node, and what is open of it.
type ClosedFile = (NodeId, File);

/// All that is put by.
#[derive(Debug)]
pub(super) struct ClosedFdCache {
    /// The longest put by first. Short, so they are searched from end to end.
    shards: Box<[Mutex<VecDeque<ClosedFile>>]>,
    /// How many there may be.
    max: usize,
    /// What files may be of: device and mount.
    file_system: (u64, u64),
    /// How many there are. Orders nothing; a budget goes by it.
    count: AtomicUsize,
}

impl ClosedFdCache {
    /// Puts by up to `most` files of the file system that `root`, of this `key`, is on; none
    /// where that is not for this process to do.
    pub(super) fn new(root: impl AsFd, key: &Key, max: usize) -> Result<Self> {
        let kind = rustix::fs::fstatfs(root)?.f_type;
        let is_local = LOCAL
            .iter()
            .any(|&magic| i64::from(magic) == kind & 0xffff_ffff);
        let max = if is_local && credentials::overrides()? {
            max
        } else {
            0
        };
        Ok(Self {
            shards: (0..max.min(SHARDS)).map(|_| Mutex::default()).collect(),
            max,
            file_system: (key.device, key.mount),
            count: AtomicUsize::new(0),
        })
    }

    /// How many are put by.
    pub(super) fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// What is put by for `node`, for whoever opens it now.
    pub(super) fn take(&self, node: NodeId) -> Option<File> {
        if self.count() == 0 {
            return None;
        }
        let mut shard = lock(&self.shards[self.shard_of(node)]);
        let at = shard.iter().position(|(cached, _)| *cached == node)?;
        let (_, file) = shard.remove(at)?;
        self.count.fetch_sub(1, Ordering::Relaxed);
        Some(file)
    }

    fn keep(&self, node: NodeId, file: File) {
        let shard = self.shard_of(node);
        // What doesn't come out even the first ones have.
        let capacity = (self.max + self.shards.len() - 1 - shard) / self.shards.len();
        let mut shard = lock(&self.shards[shard]);
        let evicted = (shard.len() >= capacity)
            .then(|| shard.pop_front())
            .flatten();
        shard.push_back((node, file));
        drop(shard);
        if evicted.is_none() {
            self.count.fetch_add(1, Ordering::Relaxed);
        }
        // Closing may take long, and happens outside of the lock.
        drop(evicted);
    }

    /// Closes all.
    pub(super) fn clear(&self) {
        for shard in &self.shards {
            let files = std::mem::take(&mut *lock(shard));
            self.count.fetch_sub(files.len(), Ordering::Relaxed);
            drop(files);
        }
    }

    /// Which shard a node belongs to, where there are any.
    fn shard_of(&self, node: NodeId) -> usize {
        let shard = node.0 % self.shards.len() as u64;
        usize::try_from(shard).unwrap_or_default()
    }
}

fn lock(shard: &Mutex<VecDeque<ClosedFile>>) -> MutexGuard<'_, VecDeque<ClosedFile>> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether what is opened with these flags is like whatever else is.
fn is_plain(flags: OFlags) -> bool {
    flags.difference(OFlags::NOCTTY | OFlags::CLOEXEC) == OFlags::RDONLY
}

impl Passthrough {
    /// A file that is open on `node` as OPEN with `flags` would open it, if one is put by.
    pub(super) fn take_closed(&self, node: NodeId, flags: OFlags) -> Option<File> {
        if is_plain(flags) {
            self.closed_fds.take(node)
        } else {
            None
        }
    }

    /// Puts by what was released, or closes it.
    pub(super) fn cache_closed(&self, node: NodeId, released: Released) {
        let Released {
            file,
            flags,
            locked,
        } = released;
        let alone = !locked && file.users() == 1;
        if self.closed_fds.max == 0 || !alone || !is_plain(flags) {
            self.close_file(node, file);
            return;
        }
        let same_file_system = |key: Key| (key.device, key.mount) == self.closed_fds.file_system;
        let Some(inode) = self
            .inodes
            .get(node)
            .filter(|inode| same_file_system(inode.key()))
        else {
            self.close_file(node, file);
            return;
        };
        self.closed_fds.keep(node, file);
        drop(inode);
        // Whoever forgot it meanwhile has looked too early.
        if self.inodes.get(node).is_none() {
            self.close_idle_files(node);
        }
        self.make_room();
    }
}
