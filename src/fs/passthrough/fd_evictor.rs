//! Which descriptor goes when there are too many: a clock with a second chance.
//!
//! The inodes that have a descriptor and can be reached without stand in queues. Whoever needs
//! room takes the first of one; if that was used since it was last asked, it goes to the end.
//! Using a descriptor touches nothing here. The invariant: an inode stands in a queue at most
//! once, which the mark of its slot says, and what the queues hold in vain is at most as much
//! as what they hold with a reason, and a little.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::inode::Inode;
use crate::fs::NodeId;

/// So many that a handful of workers rarely meet.
const SHARDS: usize = 16;

/// Entries in vain that are not worth a clearing.
const COMPACT_SLACK: usize = 32;

#[derive(Debug, Default)]
struct Queue {
    nodes: VecDeque<NodeId>,
    /// How many of them stand for inodes that have been forgotten.
    stale: usize,
}

/// The inodes that may have to give up their descriptors.
#[derive(Debug)]
pub(super) struct FdEvictor {
    queues: Box<[Mutex<Queue>]>,
    /// Where to take the next one from. Orders nothing.
    hand: AtomicUsize,
}

impl FdEvictor {
    pub(super) fn new() -> Self {
        Self {
            queues: (0..SHARDS).map(|_| Mutex::default()).collect(),
            hand: AtomicUsize::new(0),
        }
    }

    /// Puts `inode` at the end, if it doesn't stand in a queue.
    pub(super) fn add(&self, inode: &Inode) {
        if !inode.slot().mark(true) {
            self.queue(inode.node()).nodes.push_back(inode.node());
        }
    }

    /// Takes the next one out of its queue; `None` where the one whose turn it is has none.
    pub(super) fn next(&self, find: impl Fn(NodeId) -> Option<Arc<Inode>>) -> Option<Arc<Inode>> {
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

    /// How many there are, those in vain included.
    pub(super) fn len(&self) -> usize {
        self.queues
            .iter()
            .map(|queue| lock(queue).nodes.len())
            .sum()
    }

    /// How many turns it takes for each queue to have had one.
    pub(super) fn turns(&self) -> usize {
        self.queues.len()
    }

    /// An inode that stands in a queue has been forgotten.
    pub(super) fn inode_removed(&self, node: NodeId, find: impl Fn(NodeId) -> Option<Arc<Inode>>) {
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
