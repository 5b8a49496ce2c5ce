//! Files and directories that the guest opens without OPEN or OPENDIR (`--no-open`,
//! `--no-opendir`).
//!
//! The guest's kernel then sends handle 0 and never reports a close. The first request that needs a
//! file opens it, under the rules of OPEN and OPENDIR. It stays open until the guest forgets the
//! inode or the descriptor is needed elsewhere; eviction gives a second chance to what was used
//! recently, as for inodes. Lookups take a shared lock. The invariant: a file is stored under the
//! node it was opened for, and the guest knew that node when it was stored.

use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use rustc_hash::FxHashMap;

use super::dir_stream::DirStream;
use crate::fs::{Handle, NodeId};
use crate::io::File;

/// The handle that a guest's kernel sends if it has none.
pub(crate) const IMPLICIT: Handle = Handle(0);

/// The most descriptors that are kept. A file that is open for writing can't be executed on the
/// host, so their number is limited even if there are plenty.
const MAX_FILES: usize = 4096;

/// The fewest descriptors that are kept, however few there are.
const MIN_FILES: usize = 4;

/// Enough for a handful of workers to collide rarely.
const SHARDS: usize = 32;

/// How many forgotten nodes may be in the queue before it is compacted.
const COMPACT_SLACK: usize = 32;

/// The open files of one inode.
#[derive(Debug, Default)]
pub(crate) struct InodeFiles {
    /// Open for reading. The same as `writing` if that is open for both.
    pub(crate) reading: Option<File>,
    pub(crate) writing: Option<File>,
    /// The read position of a directory.
    pub(crate) stream: Option<Arc<Mutex<DirStream>>>,
    /// Used since it was last considered for eviction. Orders nothing.
    used: AtomicBool,
}

impl InodeFiles {
    fn descriptors(&self) -> usize {
        match (&self.reading, &self.writing) {
            (Some(reading), Some(writing)) if reading.as_raw_fd() != writing.as_raw_fd() => 2,
            (None, None) => 0,
            _ => 1,
        }
    }

    /// Whether a request is using it now.
    fn is_in_use(&self) -> bool {
        let files = [&self.reading, &self.writing];
        let own = files.iter().filter(|file| file.is_some()).count();
        let shared = own - self.descriptors() + 1;
        let stream = |stream: &Arc<_>| Arc::strong_count(stream) > 1;
        files
            .into_iter()
            .flatten()
            .any(|file| file.users() > shared)
            || self.stream.as_ref().is_some_and(stream)
    }
}

#[derive(Debug, Default)]
struct Shard {
    by_node: FxHashMap<NodeId, InodeFiles>,
    /// Each node in `by_node` once, and some that have been forgotten.
    queue: VecDeque<NodeId>,
}

impl Shard {
    /// Takes the first entry from the queue. Puts it at the end instead if it is in use or was used
    /// recently.
    fn next(&mut self) -> Option<InodeFiles> {
        let node = self.queue.pop_front()?;
        let files = self.by_node.get(&node)?;
        if files.used.swap(false, Ordering::Relaxed) || files.is_in_use() {
            self.queue.push_back(node);
            return None;
        }
        self.by_node.remove(&node)
    }

    fn remove(&mut self, node: NodeId) -> Option<InodeFiles> {
        let removed = self.by_node.remove(&node);
        if self.queue.len() > 2 * self.by_node.len() + COMPACT_SLACK {
            self.queue.retain(|node| self.by_node.contains_key(node));
            self.queue.shrink_to_fit();
            self.by_node.shrink_to_fit();
        }
        removed
    }
}

/// All files that are open without a handle.
#[derive(Debug)]
pub(crate) struct HandlelessOpens {
    shards: Box<[RwLock<Shard>]>,
    /// The number of descriptors. It changes under the lock of the shard and is used for limits.
    count: AtomicUsize,
    max: usize,
    /// The shard to evict from next. Orders nothing.
    hand: AtomicUsize,
}

impl HandlelessOpens {
    /// Keeps at most a quarter of `descriptors`.
    pub(crate) fn new(descriptors: usize) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| RwLock::default()).collect(),
            count: AtomicUsize::new(0),
            max: (descriptors / 4).clamp(MIN_FILES, MAX_FILES),
            hand: AtomicUsize::new(0),
        }
    }

    /// The number of descriptors.
    pub(crate) fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    fn find<T>(&self, node: NodeId, choose: impl FnOnce(&InodeFiles) -> Option<T>) -> Option<T> {
        let shard = self
            .shard(node)
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let files = shard.by_node.get(&node)?;
        // Written once a round, so that concurrent readers don't contend for the cache line.
        if !files.used.load(Ordering::Relaxed) {
            files.used.store(true, Ordering::Relaxed);
        }
        choose(files)
    }

    /// The file of a node, open for reading or for writing.
    pub(crate) fn file(&self, node: NodeId, write: bool) -> Option<File> {
        self.find(node, |files| match (write, &files.stream) {
            (_, Some(_)) => None,
            (true, None) => files.writing.clone(),
            (false, None) => files.reading.clone(),
        })
    }

    /// The directory of a node and its stream.
    pub(crate) fn directory(&self, node: NodeId) -> Option<(File, Arc<Mutex<DirStream>>)> {
        self.find(node, |files| {
            Some((files.reading.clone()?, Arc::clone(files.stream.as_ref()?)))
        })
    }

    /// Lets `update` store a file for `node`.
    pub(crate) fn keep(&self, node: NodeId, update: impl FnOnce(&mut InodeFiles)) {
        {
            let mut shard = self
                .shard(node)
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            let Shard { by_node, queue } = &mut *shard;
            let files = by_node.entry(node).or_insert_with(|| {
                queue.push_back(node);
                InodeFiles::default()
            });
            let before = files.descriptors();
            update(files);
            let after = files.descriptors();
            self.count.fetch_add(after, Ordering::Relaxed);
            self.count.fetch_sub(before, Ordering::Relaxed);
        }
        self.close_some(|| self.count() > self.max);
    }

    /// Closes files that are neither in use nor recently used, while `more` returns true.
    pub(crate) fn close_some(&self, more: impl Fn() -> bool) {
        let mut turns = 2 * (self.count() + SHARDS);
        while turns > 0 && more() {
            turns -= 1;
            let turn = self.hand.fetch_add(1, Ordering::Relaxed) % SHARDS;
            let closed = {
                let mut shard = self.shards[turn]
                    .write()
                    .unwrap_or_else(PoisonError::into_inner);
                let closed = shard.next();
                self.uncount(closed.as_ref());
                closed
            };
            // Closing can take long, so it happens outside the lock.
            drop(closed);
        }
    }

    /// Removes the files of a node and returns them.
    pub(crate) fn forget(&self, node: NodeId) -> [Option<File>; 2] {
        let shard = self.shard(node);
        let here = shard
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .by_node
            .contains_key(&node);
        if !here {
            return [None, None];
        }
        let mut shard = shard.write().unwrap_or_else(PoisonError::into_inner);
        let removed = shard.remove(node);
        self.uncount(removed.as_ref());
        removed.map_or([None, None], |files| [files.reading, files.writing])
    }

    pub(crate) fn clear(&self) {
        for shard in &self.shards {
            let removed = {
                let mut shard = shard.write().unwrap_or_else(PoisonError::into_inner);
                let removed = std::mem::take(&mut *shard);
                for files in removed.by_node.values() {
                    self.uncount(Some(files));
                }
                removed
            };
            drop(removed);
        }
    }

    fn uncount(&self, removed: Option<&InodeFiles>) {
        if let Some(files) = removed {
            self.count.fetch_sub(files.descriptors(), Ordering::Relaxed);
        }
    }

    fn shard(&self, node: NodeId) -> &RwLock<Shard> {
        &self.shards[usize::try_from(node.0 % SHARDS as u64).unwrap_or_default()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn null() -> File {
        File::from(std::fs::File::open("/dev/null").unwrap())
    }

    fn keep(files: &HandlelessOpens, node: u64) {
        files.keep(NodeId(node), |files| files.reading = Some(null()));
    }

    #[test]
    fn file_open_for_reading_and_writing_counts_once() {
        let files = HandlelessOpens::new(1000);
        keep(&files, 1);
        let both = null();
        files.keep(NodeId(1), |files| files.writing = Some(both.clone()));
        assert_eq!(files.count(), 2);
        files.keep(NodeId(1), |files| files.reading = Some(both));
        assert_eq!(files.count(), 1);
        drop(files.forget(NodeId(1)));
        assert_eq!(files.count(), 0);
        assert!(files.file(NodeId(1), false).is_none());
    }

    #[test]
    fn kept_files_never_exceed_limit() {
        let files = HandlelessOpens::new(40);
        for node in 0..1000 {
            keep(&files, node);
            assert!(files.count() <= 10);
        }
        assert_eq!(files.count(), 10);
        files.clear();
        assert_eq!(files.count(), 0);
    }

    #[test]
    fn used_files_are_not_evicted() {
        let files = HandlelessOpens::new(40);
        keep(&files, 0);
        keep(&files, 1);
        let in_use = files.file(NodeId(1), false);
        for node in 2..1000 {
            keep(&files, node);
            assert!(files.file(NodeId(0), false).is_some(), "found each time");
        }
        assert!(in_use.is_some());
        assert!(
            files.file(NodeId(1), false).is_some(),
            "in use all the time"
        );
        assert_eq!(files.count(), 10);
    }

    #[test]
    fn forgotten_nodes_leave_queue_short() {
        let files = HandlelessOpens::new(40);
        for node in 0..100_000 {
            keep(&files, node);
            drop(files.forget(NodeId(node)));
        }
        let queues = files
            .shards
            .iter()
            .map(|shard| shard.read().unwrap().queue.len());
        assert!(queues.sum::<usize>() <= SHARDS * (COMPACT_SLACK + 1));
    }
}
