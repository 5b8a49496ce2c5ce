//! Inodes that the guest has given back, and that are kept for the file handles it may have of them.
//!
//! They stand in a line, the longest given back first, and stay in the store by a hold of their
//! own, which is one count more beside lookups and children. The invariant: an inode stands in
//! the line as long as its mark says so; both change only under the lock of its shard by
//! identity, and one that the guest has stands in no line.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustc_hash::FxHashMap;

use super::InodeStore;
use crate::fs::NodeId;
use crate::fs::passthrough::inode::{Inode, RefKind};

/// Entries in vain that are not worth a clearing.
const COMPACT_SLACK: usize = 64;

/// The line, and how long it may be.
#[derive(Debug)]
pub(super) struct ForgottenInodes {
    max: usize,
    queue: Mutex<Queue>,
    /// How many stand in it. Orders nothing.
    count: AtomicUsize,
}

/// When an inode was given back, among all that were.
type Turn = u64;

#[derive(Debug, Default)]
struct Queue {
    /// Those in the line.
    turns: FxHashMap<NodeId, Turn>,
    /// In which order; an entry with a turn that its inode has no more is in vain.
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
    /// For `most` inodes.
    pub(super) fn new(max: usize) -> Self {
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

    /// Takes `inode` out of the line; answers whether it stood there.
    #[inline]
    pub(super) fn take(&self, inode: &Inode) -> bool {
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

    /// Takes `inode` out of the line if this is still its turn.
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

impl InodeStore {
    /// Whether inodes are remembered at all.
    pub(in crate::fs::passthrough) fn keeps_forgotten(&self) -> bool {
        self.forgotten.max > 0
    }

    /// How many are.
    pub(in crate::fs::passthrough) fn forgotten(&self) -> usize {
        self.forgotten.len()
    }

    /// The inode that `node` stands for, if the guest has it, or has given it back and it is
    /// remembered.
    pub(in crate::fs::passthrough) fn get_or_forgotten(&self, node: NodeId) -> Option<Arc<Inode>> {
        let known = self.any(node)?;
        let known_to_guest = known.node() == NodeId::ROOT || known.lookups() > 0;
        (known_to_guest || known.is_forgotten()).then_some(known)
    }

    /// Remembers an inode that was just given back, unless there is nothing that leads to it, or
    /// another has its number by now. Asked under its shard's lock.
    pub(super) fn keep_forgotten(&self, keys: &super::Keys, inode: &Arc<Inode>) -> bool {
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

    /// Gives back all lookups, and remembers nothing.
    pub(in crate::fs::passthrough) fn forget_and_remove(&self, node: NodeId) {
        if let Some(inode) = self.get(node).filter(|_| node != NodeId::ROOT) {
            self.forget_inode(&inode, u64::MAX, false);
        }
    }

    /// Ends that `inode` is remembered; it goes, unless somebody else counts on it.
    pub(in crate::fs::passthrough) fn drop_forgotten(&self, inode: &Arc<Inode>) {
        let keys = self.keys(&inode.key());
        if self.forgotten.take(inode) {
            self.remove_if_unused(keys, inode);
        }
    }

    /// Ends that more are remembered than may be.
    pub(in crate::fs::passthrough) fn drop_surplus_forgotten(&self) {
        while self.forgotten.len() > self.forgotten.max && self.drop_oldest_forgotten() {}
    }

    /// Ends that the one is remembered that was given back before all others; false if none is.
    pub(in crate::fs::passthrough) fn drop_oldest_forgotten(&self) -> bool {
        if self.forgotten.len() == 0 {
            return false;
        }
        let Some((node, turn)) = self.forgotten.oldest() else {
            return false;
        };
        // Otherwise another thread was faster.
        if let Some(inode) = self.any(node) {
            let keys = self.keys(&inode.key());
            if self.forgotten.take_turn(&inode, turn) {
                self.remove_if_unused(keys, &inode);
            }
        }
        true
    }

    /// Makes sure that what is remembered does not keep the table from taking in a further inode.
    pub(in crate::fs::passthrough) fn make_room_in_table(&self) {
        while self.forgotten.len() > 0 && !self.table.has_room_for_inode() {
            if !self.drop_oldest_forgotten() {
                return;
            }
        }
    }

    /// The inodes that the guest has, the root left out, as long known first.
    pub(in crate::fs::passthrough) fn known_to_guest(&self) -> Vec<NodeId> {
        let mut known_to_guest: Vec<NodeId> = self
            .all_with_forgotten()
            .into_iter()
            .filter(|inode| inode.lookups() > 0)
            .map(|inode| inode.node())
            .collect();
        known_to_guest.sort_unstable();
        known_to_guest
    }

    /// Of `inodes`, the ones that the guest has, and those that the way to them leads through.
    pub(super) fn needed(&self, inodes: Vec<Arc<Inode>>) -> Vec<Arc<Inode>> {
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
