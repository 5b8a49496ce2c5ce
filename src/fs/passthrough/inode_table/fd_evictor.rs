//! Chooses which inode descriptor to close when there are too many: the clock algorithm with a
//! second chance.
//!
//! Inodes that have a descriptor and can be reopened are in queues. Eviction takes the first of a
//! queue; if it was used since it was last considered, it goes to the end. Using a descriptor
//! doesn't touch the queues. The invariant: an inode is in a queue at most once, as the mark in its
//! slot says, and a queue has at most about as many stale entries as valid ones.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::inode::Inode;
use crate::fs::NodeId;

/// Enough for a handful of workers to collide rarely.
const SHARDS: usize = 16;

/// How many stale entries may be in a queue before it is compacted.
const COMPACT_SLACK: usize = 32;

#[derive(Debug, Default)]
struct Queue {
    nodes: VecDeque<NodeId>,
    /// How many entries are of inodes that were removed.
    stale: usize,
}

/// The inodes whose descriptors can be closed.
#[derive(Debug)]
pub(crate) struct FdEvictor {
    queues: Box<[Mutex<Queue>]>,
    /// The queue to take from next. Orders nothing.
    hand: AtomicUsize,
    /// Descriptors that were closed so far. Orders nothing.
    evicted: AtomicU64,
}

impl FdEvictor {
    pub(crate) fn new() -> Self {
        Self {
            queues: (0..SHARDS).map(|_| Mutex::default()).collect(),
            hand: AtomicUsize::new(0),
            evicted: AtomicU64::new(0),
        }
    }

    /// Puts `inode` at the end of a queue, unless it is in one.
    pub(crate) fn add(&self, inode: &Inode) {
        if !inode.slot().mark(true) {
            self.queue(inode.node()).nodes.push_back(inode.node());
        }
    }

    /// Takes the next inode from its queue. Returns `None` if the queue whose turn it is is empty.
    pub(crate) fn next(&self, find: impl Fn(NodeId) -> Option<Arc<Inode>>) -> Option<Arc<Inode>> {
        let turn = self.hand.fetch_add(1, Ordering::Relaxed) % SHARDS;
        loop {
            let mut queue = lock(&self.queues[turn]);
            let node = queue.nodes.pop_front()?;
            if let Some(inode) = find(node) {
                drop(queue);
                inode.slot().mark(false);
                return Some(inode);
            }
            queue.stale = queue.stale.saturating_sub(1);
        }
    }

    /// Counts a descriptor that was closed.
    pub(crate) fn count_eviction(&self) {
        self.evicted.fetch_add(1, Ordering::Relaxed);
    }

    /// The number of descriptors that were closed so far.
    pub(crate) fn evicted(&self) -> u64 {
        self.evicted.load(Ordering::Relaxed)
    }

    /// The number of entries, including stale ones.
    pub(crate) fn len(&self) -> usize {
        self.queues
            .iter()
            .map(|queue| lock(queue).nodes.len())
            .sum()
    }

    /// The number of calls of [`next`](Self::next) that visit every queue once.
    pub(crate) fn turns(&self) -> usize {
        self.queues.len()
    }

    /// Records that an inode in a queue was removed from the table.
    pub(crate) fn inode_removed(&self, node: NodeId, find: impl Fn(NodeId) -> Option<Arc<Inode>>) {
        let mut queue = self.queue(node);
        queue.stale += 1;
        if queue.stale > queue.nodes.len() / 2 + COMPACT_SLACK {
            queue.nodes.retain(|node| find(*node).is_some());
            queue.nodes.shrink_to_fit();
            queue.stale = 0;
        }
    }

    fn queue(&self, node: NodeId) -> MutexGuard<'_, Queue> {
        let shard = node.0 % SHARDS as u64;
        lock(&self.queues[usize::try_from(shard).unwrap_or_default()])
    }
}

fn lock(queue: &Mutex<Queue>) -> MutexGuard<'_, Queue> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}
