//! Inodes that the guest has forgotten, but that are kept because it may have file handles of them.
//!
//! They are in a queue, the longest forgotten first. Being in the queue keeps an inode in the
//! store, as lookups and children do. The invariant: an inode is in the queue exactly while its
//! `forgotten` flag is set; both change only under the lock of its shard by identity, and an inode
//! that the guest knows is not in the queue.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustc_hash::FxHashMap;

use super::InodeTable;
use super::inode::{Inode, RefKind};
use crate::fs::NodeId;

/// How many stale entries may be in the queue before it is compacted.
const COMPACT_SLACK: usize = 64;

/// The queue, and how long it may be.
#[derive(Debug)]
pub(crate) struct ForgottenInodes {
    max: usize,
    queue: Mutex<Queue>,
    /// The length of the queue. Orders nothing.
    count: AtomicUsize,
}

/// The position of an inode in the order of forgetting.
type Turn = u64;

#[derive(Debug, Default)]
struct Queue {
    /// The inodes in the queue.
    turns: FxHashMap<NodeId, Turn>,
    /// The order. An entry is stale if its inode has another turn now, or none.
    order: VecDeque<(NodeId, Turn)>,
    next: Turn,
}

impl Queue {
    fn has_turn(&self, node: NodeId, turn: Turn) -> bool {
        self.turns.get(&node) == Some(&turn)
    }

    fn remove(&mut self, node: NodeId) {
        self.turns.remove(&node);
        if self.order.len() > 2 * self.turns.len() + COMPACT_SLACK {
            let turns = &self.turns;
            self.order
                .retain(|(node, turn)| turns.get(node) == Some(turn));
            self.order.shrink_to_fit();
            self.turns.shrink_to_fit();
        }
    }
}

impl ForgottenInodes {
    /// For up to `max` inodes.
    pub(crate) fn new(max: usize) -> Self {
        Self {
            max,
            queue: Mutex::default(),
            count: AtomicUsize::new(0),
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn len(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    fn add(&self, inode: &Inode) {
        let mut queue = self.queue();
        let (node, turn) = (inode.node(), queue.next);
        queue.next += 1;
        queue.turns.insert(node, turn);
        queue.order.push_back((node, turn));
        inode.set_forgotten(true);
        self.count.store(queue.turns.len(), Ordering::Relaxed);
    }

    /// Removes `inode` from the queue. Returns whether it was there.
    #[inline]
    pub(crate) fn take(&self, inode: &Inode) -> bool {
        let was_queued = inode.is_forgotten();
        if was_queued {
            self.remove(inode);
        }
        was_queued
    }

    fn remove(&self, inode: &Inode) {
        let mut queue = self.queue();
        queue.remove(inode.node());
        inode.set_forgotten(false);
        self.count.store(queue.turns.len(), Ordering::Relaxed);
    }

    /// Removes `inode` from the queue if this is still its turn.
    fn take_turn(&self, inode: &Inode, turn: Turn) -> bool {
        let is_due = self.queue().has_turn(inode.node(), turn);
        is_due && self.take(inode)
    }

    fn oldest(&self) -> Option<(NodeId, Turn)> {
        let mut queue = self.queue();
        while let Some((node, turn)) = queue.order.front().copied() {
            if queue.has_turn(node, turn) {
                return Some((node, turn));
            }
            queue.order.pop_front();
        }
        None
    }
}

impl InodeTable {
    /// Whether forgotten inodes are kept at all.
    pub(crate) fn keeps_forgotten(&self) -> bool {
        self.forgotten.max > 0
    }

    /// How many forgotten inodes are kept.
    pub(crate) fn max_forgotten(&self) -> usize {
        self.forgotten.max
    }

    /// The number of forgotten inodes.
    pub(crate) fn forgotten(&self) -> usize {
        self.forgotten.len()
    }

    /// The inode that `node` stands for, if the guest knows it or it is kept after being forgotten.
    pub(crate) fn get_or_forgotten(&self, node: NodeId) -> Option<Arc<Inode>> {
        let known = self.any(node)?;
        let known_to_guest = known.node() == NodeId::ROOT || known.lookups() > 0;
        (known_to_guest || known.is_forgotten()).then_some(known)
    }

    /// Keeps an inode that was just forgotten, unless it can't be reopened or another inode has its
    /// key now. Called under the lock of its shard.
    pub(crate) fn keep_forgotten(&self, keys: &super::Keys, inode: &Arc<Inode>) -> bool {
        let own = || super::by_key(keys, &inode.key()).is_some_and(|it| Arc::ptr_eq(it, inode));
        let keep = self.keeps_forgotten()
            && inode.node() != NodeId::ROOT
            && !matches!(*inode.ref_kind(), RefKind::Removed)
            && own();
        if keep {
            self.forgotten.add(inode);
        }
        keep
    }

    /// Subtracts all lookups and removes the inode.
    pub(crate) fn forget_and_remove(&self, node: NodeId) {
        if let Some(inode) = self.get(node).filter(|_| node != NodeId::ROOT) {
            self.forget_inode(&inode, u64::MAX, false);
        }
    }

    /// Takes `inode` out of the forgotten ones. Removes it unless something else needs it.
    pub(crate) fn drop_forgotten(&self, inode: &Arc<Inode>) {
        let keys = self.keys(&inode.key());
        if self.forgotten.take(inode) {
            self.remove_if_unused(keys, inode);
        }
    }

    /// Drops forgotten inodes until there are no more than allowed.
    pub(crate) fn drop_surplus_forgotten(&self) {
        while self.forgotten.len() > self.forgotten.max && self.drop_oldest_forgotten() {}
    }

    /// Drops the longest forgotten inode. Returns false if there is none.
    pub(crate) fn drop_oldest_forgotten(&self) -> bool {
        if self.forgotten.len() == 0 {
            return false;
        }
        let Some((node, turn)) = self.forgotten.oldest() else {
            return false;
        };
        // Otherwise another thread has dropped it.
        if let Some(inode) = self.any(node) {
            let keys = self.keys(&inode.key());
            if self.forgotten.take_turn(&inode, turn) {
                self.remove_if_unused(keys, &inode);
            }
        }
        true
    }

    /// Drops forgotten inodes until the table has room for a new inode.
    pub(crate) fn make_room_in_table(&self) {
        while self.forgotten.len() > 0 && !self.table.has_room_for_inode() {
            if !self.drop_oldest_forgotten() {
                return;
            }
        }
    }

    /// The inodes that the guest knows, without the root, the longest known first.
    pub(crate) fn known_to_guest(&self) -> Vec<NodeId> {
        let mut known_to_guest: Vec<NodeId> = self
            .all_with_forgotten()
            .into_iter()
            .filter(|inode| inode.lookups() > 0)
            .map(|inode| inode.node())
            .collect();
        known_to_guest.sort_unstable();
        known_to_guest
    }

    /// Those of `inodes` that the guest knows, and the parents needed to reopen them.
    pub(crate) fn needed(&self, inodes: Vec<Arc<Inode>>) -> Vec<Arc<Inode>> {
        let mut needed: HashSet<NodeId> = HashSet::new();
        for inode in inodes.iter().filter(|inode| inode.lookups() > 0) {
            let mut at = Some(Arc::clone(inode));
            while let Some(inode) = at.filter(|inode| needed.insert(inode.node())) {
                at = inode.parent().and_then(|parent| self.any(parent));
            }
        }
        let mut inodes = inodes;
        inodes.retain(|inode| needed.contains(&inode.node()));
        inodes
    }
}
