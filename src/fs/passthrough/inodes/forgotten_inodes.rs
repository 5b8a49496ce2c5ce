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

use super::Store;
use crate::fs::NodeId;
use crate::fs::passthrough::inode::{Inode, RefKind};

/// Entries in vain that are not worth a clearing.
const FEW: usize = 64;

/// The line, and how long it may be.
#[derive(Debug)]
pub(super) struct Remembered {
    most: usize,
    line: Mutex<Line>,
    /// How many stand in it. Orders nothing.
    count: AtomicUsize,
}

/// When an inode was given back, among all that were.
type Turn = u64;

#[derive(Debug, Default)]
struct Line {
    /// Those in the line.
    turns: FxHashMap<NodeId, Turn>,
    /// In which order; an entry with a turn that its inode has no more is in vain.
    order: VecDeque<(NodeId, Turn)>,
    next: Turn,
}

impl Line {
    fn holds(&self, node: NodeId, turn: Turn) -> bool {
        self.turns.get(&node) == Some(&turn)
    }

    fn strike(&mut self, node: NodeId) {
        self.turns.remove(&node);
        if self.order.len() > 2 * self.turns.len() + FEW {
            let turns = &self.turns;
            self.order
                .retain(|(node, turn)| turns.get(node) == Some(turn));
            self.order.shrink_to_fit();
            self.turns.shrink_to_fit();
        }
    }
}

impl Remembered {
    /// For `most` inodes.
    pub(super) fn new(most: usize) -> Self {
        Self {
            most,
            line: Mutex::default(),
            count: AtomicUsize::new(0),
        }
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn len(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    fn add(&self, inode: &Inode) {
        let mut line = self.line();
        let (node, turn) = (inode.node(), line.next);
        line.next += 1;
        line.turns.insert(node, turn);
        line.order.push_back((node, turn));
        inode.set_remembered(true);
        self.count.store(line.turns.len(), Ordering::Relaxed);
    }

    /// Takes `inode` out of the line; answers whether it stood there.
    #[inline]
    pub(super) fn take(&self, inode: &Inode) -> bool {
        let stood = inode.is_remembered();
        if stood {
            self.strike(inode);
        }
        stood
    }

    fn strike(&self, inode: &Inode) {
        let mut line = self.line();
        line.strike(inode.node());
        inode.set_remembered(false);
        self.count.store(line.turns.len(), Ordering::Relaxed);
    }

    /// Takes `inode` out of the line if this is still its turn.
    fn take_turn(&self, inode: &Inode, turn: Turn) -> bool {
        let due = self.line().holds(inode.node(), turn);
        due && self.take(inode)
    }

    fn oldest(&self) -> Option<(NodeId, Turn)> {
        let mut line = self.line();
        while let Some((node, turn)) = line.order.front().copied() {
            if line.holds(node, turn) {
                return Some((node, turn));
            }
            line.order.pop_front();
        }
        None
    }
}

impl Store {
    /// Whether inodes are remembered at all.
    pub(in crate::fs::passthrough) fn remembers(&self) -> bool {
        self.remembered.most > 0
    }

    /// How many are.
    pub(in crate::fs::passthrough) fn remembered(&self) -> usize {
        self.remembered.len()
    }

    /// The inode that `node` stands for, if the guest has it, or has given it back and it is
    /// remembered.
    pub(in crate::fs::passthrough) fn get_or_remembered(&self, node: NodeId) -> Option<Arc<Inode>> {
        let known = self.any(node)?;
        let had = known.node() == NodeId::ROOT || known.lookups() > 0;
        (had || known.is_remembered()).then_some(known)
    }

    /// Remembers an inode that was just given back, unless there is nothing that leads to it, or
    /// another has its number by now. Asked under its shard's lock.
    pub(super) fn remember(&self, keys: &super::Keys, inode: &Arc<Inode>) -> bool {
        let own = || super::by_key(keys, &inode.key()).is_some_and(|it| Arc::ptr_eq(it, inode));
        let may = self.remembers()
            && inode.node() != NodeId::ROOT
            && !matches!(*inode.held(), RefKind::Forgotten)
            && own();
        if may {
            self.remembered.add(inode);
        }
        may
    }

    /// Gives back all lookups, and remembers nothing.
    pub(in crate::fs::passthrough) fn forget_for_good(&self, node: NodeId) {
        if let Some(inode) = self.get(node).filter(|_| node != NodeId::ROOT) {
            self.forget_inode(&inode, u64::MAX, false);
        }
    }

    /// Ends that `inode` is remembered; it goes, unless somebody else counts on it.
    pub(in crate::fs::passthrough) fn let_go(&self, inode: &Arc<Inode>) {
        let keys = self.keys(&inode.key());
        if self.remembered.take(inode) {
            self.end_uncounted(keys, inode);
        }
    }

    /// Ends that more are remembered than may be.
    pub(in crate::fs::passthrough) fn let_surplus_go(&self) {
        while self.remembered.len() > self.remembered.most && self.let_oldest_go() {}
    }

    /// Ends that the one is remembered that was given back before all others; false if none is.
    pub(in crate::fs::passthrough) fn let_oldest_go(&self) -> bool {
        if self.remembered.len() == 0 {
            return false;
        }
        let Some((node, turn)) = self.remembered.oldest() else {
            return false;
        };
        // Otherwise another thread was faster.
        if let Some(inode) = self.any(node) {
            let keys = self.keys(&inode.key());
            if self.remembered.take_turn(&inode, turn) {
                self.end_uncounted(keys, &inode);
            }
        }
        true
    }

    /// Makes sure that what is remembered does not keep the table from taking in a further inode.
    pub(in crate::fs::passthrough) fn room_in_table(&self) {
        while self.remembered.len() > 0 && !self.table.has_room_for_inode() {
            if !self.let_oldest_go() {
                return;
            }
        }
    }

    /// The inodes that the guest has, the root left out, as long known first.
    pub(in crate::fs::passthrough) fn had(&self) -> Vec<NodeId> {
        let mut had: Vec<NodeId> = self
            .everything()
            .into_iter()
            .filter(|inode| inode.lookups() > 0)
            .map(|inode| inode.node())
            .collect();
        had.sort_unstable();
        had
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
