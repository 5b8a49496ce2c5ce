//! Keeps files that the guest has closed open for a while, as it may open them again.
//!
//! Opening and closing an inode costs more than reading a page of it, and programs open the same
//! files again and again. So a file that was open for reading only goes to this cache when it is
//! released, and the next OPEN of its inode takes it. Nothing uses the file in between, and it has
//! no state: it is read at explicit offsets, it never had a lock, and it doesn't prevent others
//! from writing to the file or executing it.
//!
//! The cache is used only if opening again would yield the same file and can't be refused. This
//! excludes files that aren't on a [local mount](super::LocalMount), and servers without the
//! capabilities to open every file. The invariant: a cached file was opened for its
//! node, and is closed when the guest forgets the node.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::fs::NodeId;
use crate::io::File;

/// Enough for a handful of workers to collide rarely.
const SHARDS: usize = 64;

/// A node and a file that is open on it.
type ClosedFile = (NodeId, File);

/// The cached files.
#[derive(Debug)]
pub(crate) struct ClosedFdCache {
    /// Oldest first. The queues are short, so they are searched linearly.
    shards: Box<[Mutex<VecDeque<ClosedFile>>]>,
    /// How many files may be cached.
    max: usize,
    /// The number of cached files. It orders nothing and is used for limits.
    count: AtomicUsize,
}

impl ClosedFdCache {
    /// Caches up to `max` files.
    pub(crate) fn new(max: usize) -> Self {
        Self {
            shards: (0..max.min(SHARDS)).map(|_| Mutex::default()).collect(),
            max,
            count: AtomicUsize::new(0),
        }
    }

    /// The number of cached files.
    pub(crate) fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Takes a file of `node` from the cache.
    pub(crate) fn pop(&self, node: NodeId) -> Option<File> {
        if self.count() == 0 {
            return None;
        }
        let mut shard = lock(&self.shards[self.shard_of(node)]);
        let at = shard.iter().position(|(cached, _)| *cached == node)?;
        let (_, file) = shard.remove(at)?;
        self.count.fetch_sub(1, Ordering::Relaxed);
        Some(file)
    }

    /// Whether files are cached at all.
    pub(crate) fn is_enabled(&self) -> bool {
        self.max > 0
    }

    /// Caches `file`. Closes the oldest one if there are too many.
    pub(crate) fn keep(&self, node: NodeId, file: File) {
        let shard = self.shard_of(node);
        // The first shards get the remainder of the division.
        let capacity = (self.max + self.shards.len() - 1 - shard) / self.shards.len();
        let mut shard = lock(&self.shards[shard]);
        let evicted = (shard.len() >= capacity)
            .then(|| shard.pop_front())
            .flatten();
        shard.push_back((node, file));
        if evicted.is_none() {
            // Under the lock: another thread that takes the file subtracts one.
            self.count.fetch_add(1, Ordering::Relaxed);
        }
        drop(shard);
        // Closing can take long, so it happens outside the lock.
        drop(evicted);
    }

    /// Closes all cached files.
    pub(crate) fn clear(&self) {
        for shard in &self.shards {
            let files = std::mem::take(&mut *lock(shard));
            self.count.fetch_sub(files.len(), Ordering::Relaxed);
            drop(files);
        }
    }

    /// The shard of a node. There must be at least one shard.
    fn shard_of(&self, node: NodeId) -> usize {
        let shard = node.0 % self.shards.len() as u64;
        usize::try_from(shard).unwrap_or_default()
    }
}

fn lock(shard: &Mutex<VecDeque<ClosedFile>>) -> MutexGuard<'_, VecDeque<ClosedFile>> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}
