//! Counts requests by file, while somebody asks for it.
//!
//! The invariant: while nobody does, a request costs one load more, and while somebody does, the
//! counts take a bounded amount of memory.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::request::{Operation, Request};
use crate::fs::NodeId;

/// Enough for a handful of workers to collide rarely; a power of two.
const SHARDS: usize = 16;

/// The bits of a node id that choose the shard.
const MASK: u64 = SHARDS as u64 - 1;

/// How many files are counted in each shard. For another one, half of them are dropped.
const MAX_FILES: usize = 4096;

/// What was done with a file since counting began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct FileCounts {
    /// Requests of any kind; those by name count for the directory.
    pub(crate) requests: u64,
    /// Bytes that READs have asked for.
    pub(crate) bytes_read: u64,
    /// Bytes of WRITEs.
    pub(crate) bytes_written: u64,
}

/// The counts.
#[derive(Debug, Default)]
pub(crate) struct FileWatch {
    /// Orders nothing: requests that are served when it changes may be counted or not.
    on: AtomicBool,
    shards: [Mutex<HashMap<NodeId, FileCounts>>; SHARDS],
}

impl FileWatch {
    /// Whether requests are counted.
    #[inline]
    pub(crate) fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// Begins to count, or ends that and forgets all counts.
    pub(crate) fn switch(&self, on: bool) {
        self.on.store(on, Ordering::Relaxed);
        if !on {
            for shard in &self.shards {
                *lock(shard) = HashMap::new();
            }
        }
    }

    /// The files with the most requests, most of all first. Of several with as many, those that the
    /// guest has met last come first: it may know a file again that it had forgotten, by another
    /// node id.
    pub(crate) fn busiest(&self, limit: usize) -> Vec<(NodeId, FileCounts)> {
        let mut files = Vec::new();
        for shard in &self.shards {
            files.extend(lock(shard).iter().map(|(node, counts)| (*node, *counts)));
        }
        files.sort_unstable_by_key(rank);
        files.truncate(limit);
        files
    }

    /// Counts a request.
    #[cold]
    pub(super) fn count(&self, request: &Request<'_>) {
        let (read, written) = match &request.operation {
            Operation::Read(range) => (range.size, 0),
            Operation::Write { range, .. } => (0, range.size),
            _ => (0, 0),
        };
        self.add(request.node, u64::from(read), u64::from(written));
    }

    fn add(&self, node: NodeId, read: u64, written: u64) {
        let at = usize::try_from(node.0 & MASK).unwrap_or_default();
        let Some(shard) = self.shards.get(at) else {
            return;
        };
        let mut files = lock(shard);
        if files.len() >= MAX_FILES && !files.contains_key(&node) {
            let mut ranked: Vec<_> = files.drain().collect();
            ranked.sort_unstable_by_key(rank);
            ranked.truncate(MAX_FILES / 2);
            files.extend(ranked);
        }
        let counts = files.entry(node).or_default();
        counts.requests = counts.requests.saturating_add(1);
        counts.bytes_read = counts.bytes_read.saturating_add(read);
        counts.bytes_written = counts.bytes_written.saturating_add(written);
    }
}

/// What files are sorted by.
fn rank((node, counts): &(NodeId, FileCounts)) -> Reverse<(u64, NodeId)> {
    Reverse((counts.requests, *node))
}

fn lock(shard: &Mutex<HashMap<NodeId, FileCounts>>) -> MutexGuard<'_, HashMap<NodeId, FileCounts>> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busiest_files_come_first_and_their_number_is_bounded() {
        let watch = FileWatch::default();
        watch.switch(true);
        for _ in 0..4 {
            watch.add(NodeId(7), 10, 1);
        }
        for node in 100..200_100 {
            watch.add(NodeId(node), 0, 0);
            assert!(node % 50_000 != 0 || watch.busiest(usize::MAX).len() <= SHARDS * MAX_FILES);
        }
        let counts = FileCounts {
            requests: 4,
            bytes_read: 40,
            bytes_written: 4,
        };
        let one = FileCounts {
            requests: 1,
            ..FileCounts::default()
        };
        // The latest ones are counted, too.
        assert_eq!(
            watch.busiest(3),
            [
                (NodeId(7), counts),
                (NodeId(200_099), one),
                (NodeId(200_098), one)
            ]
        );
        watch.switch(false);
        assert!(watch.busiest(1).is_empty());
    }
}
