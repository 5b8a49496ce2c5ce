//! The table of nodes: by id, by name, and by the inode of the upper layer.
//!
//! Directories, and files that are in a lower layer, are known by their name: each has exactly one.
//! A file of a lower layer with several links has a node for each name, because a copy-up separates
//! them. Files of the upper layer are known by their inode there, so hard links share a node. The
//! invariant: a node is in the table as long as it is referred to, and references are added only
//! under the lock of the index.

use std::ffi::{CStr, CString};
use std::hash::{Hash, Hasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use hashbrown::{Equivalent, HashMap};
use rustc_hash::FxBuildHasher;
use rustix::io::Errno;

use super::node::{Location, Node, Real, Stack};
use crate::fs::lowest::Lowest;
use crate::fs::{NodeId, Result};

const SHARDS: usize = 16;

type Shard = RwLock<HashMap<u64, Arc<Node>, FxBuildHasher>>;

/// The nodes that a guest knows, and their parents.
#[derive(Debug)]
pub(super) struct NodeTable {
    shards: [Shard; SHARDS],
    index: Mutex<Index>,
    next: AtomicU64,
    limit: usize,
}

#[derive(Debug, Default)]
struct Index {
    by_name: HashMap<Name, Arc<Node>, RandomState>,
    by_upper: HashMap<u64, Arc<Node>, FxBuildHasher>,
    /// The numbers that copied-up files report, by their inode number in the upper layer.
    numbers: HashMap<u64, u64, FxBuildHasher>,
    count: usize,
}

#[derive(Debug, PartialEq, Eq)]
struct Name(u64, CString);

impl Hash for Name {
    fn hash<H: Hasher>(&self, state: &mut H) {
        NameRef(self.0, &self.1).hash(state);
    }
}

#[derive(Hash)]
struct NameRef<'a>(u64, &'a CStr);

impl Equivalent<Name> for NameRef<'_> {
    fn equivalent(&self, key: &Name) -> bool {
        self.0 == key.0 && self.1 == key.1.as_c_str()
    }
}

/// How a node is found again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Identity {
    /// By its name in a directory.
    Name,
    /// By its inode in the upper layer.
    Upper,
}

/// A node to be added, unless it is known.
pub(super) struct Candidate {
    pub(super) identity: Identity,
    pub(super) is_dir: bool,
    pub(super) number: u64,
    pub(super) stack: Stack,
}

impl NodeTable {
    /// For at most `limit` nodes.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            shards: std::array::from_fn(|_| Shard::default()),
            index: Mutex::default(),
            next: AtomicU64::new(NodeId::ROOT.0 + 1),
            limit,
        }
    }

    /// Forgets all nodes; `root` is the new root's stack, if the layers can be reached.
    pub(super) fn reset(&self, root: Option<(u64, Stack)>) {
        let mut index = self.index();
        *index = Index::default();
        for shard in &self.shards {
            shard
                .write()
                .unwrap_or_else(PoisonError::into_inner)
                .clear();
        }
        if let Some((number, stack)) = root {
            let root = Node::new(NodeId::ROOT, true, number, stack, None);
            self.insert(Arc::new(root));
        }
    }

    /// The node with this id.
    pub(super) fn get(&self, id: NodeId) -> Result<Arc<Node>> {
        let shard = self.shard(id);
        let nodes = shard.read().unwrap_or_else(PoisonError::into_inner);
        nodes.get(&id.0).cloned().ok_or(Errno::STALE)
    }

    /// How many nodes there are besides the root, and how many there may be.
    pub(super) fn count_and_limit(&self) -> (usize, usize) {
        (self.index().count, self.limit)
    }

    /// The `limit` nodes with the lowest ids from `from` on, and the id of the next one.
    pub(super) fn from(&self, from: u64, limit: usize) -> (Vec<Arc<Node>>, Option<u64>) {
        let mut lowest = Lowest::new(limit);
        for shard in &self.shards {
            let nodes = shard.read().unwrap_or_else(PoisonError::into_inner);
            let ids = nodes.keys().copied().filter(|id| *id >= from);
            ids.for_each(|id| lowest.add(id));
        }
        let (ids, next) = lowest.take();
        let nodes = ids.into_iter().filter_map(|id| self.get(NodeId(id)).ok());
        (nodes.collect(), next)
    }

    /// The node that is known as `name` in `parent`; counts one reference.
    pub(super) fn find_named(&self, parent: &Node, name: &CStr) -> Option<Arc<Node>> {
        let index = self.index();
        let node = index.by_name.get(&NameRef(parent.id.0, name))?;
        node.refs.fetch_add(1, Ordering::Relaxed);
        Some(Arc::clone(node))
    }

    /// The number that an entry reports: that of a known node, else `number`.
    pub(super) fn number_of(&self, parent: &Node, name: &CStr, upper: bool, number: u64) -> u64 {
        let index = self.index();
        match index.by_name.get(&NameRef(parent.id.0, name)) {
            Some(node) => node.number(),
            None if upper => *index.numbers.get(&number).unwrap_or(&number),
            None => number,
        }
    }

    /// The node of `candidate`, known as `name` in `parent`; counts one reference. Returns whether it
    /// is new and has taken over the references of the candidate's stack.
    ///
    /// # Errors
    ///
    /// `ENFILE` if the table is full.
    pub(super) fn find_or_add(
        &self,
        parent: &Arc<Node>,
        name: &CStr,
        candidate: &Candidate,
    ) -> Result<(Arc<Node>, bool)> {
        let mut index = self.index();
        let known = match (candidate.identity, candidate.stack.first()) {
            (Identity::Upper, Some(upper)) => index.by_upper.get(&upper.node.0),
            _ => index.by_name.get(&NameRef(parent.id.0, name)),
        };
        if let Some(node) = known {
            node.refs.fetch_add(1, Ordering::Relaxed);
            return Ok((Arc::clone(node), false));
        }
        self.add(&mut index, Some((parent, name)), candidate)
            .map(|node| (node, true))
    }

    /// Adds the node of a file without a name.
    ///
    /// # Errors
    ///
    /// `ENFILE` if the table is full.
    pub(super) fn add_nameless(&self, candidate: &Candidate) -> Result<Arc<Node>> {
        self.add(&mut self.index(), None, candidate)
    }

    fn add(
        &self,
        index: &mut Index,
        at: Option<(&Arc<Node>, &CStr)>,
        candidate: &Candidate,
    ) -> Result<Arc<Node>> {
        if index.count >= self.limit {
            return Err(Errno::NFILE);
        }
        let id = NodeId(self.next.fetch_add(1, Ordering::Relaxed));
        let named = at.filter(|_| candidate.identity == Identity::Name);
        let location = named.map(|(parent, name)| Location {
            parent: Arc::clone(parent),
            name: name.to_owned(),
        });
        let (is_dir, number) = (candidate.is_dir, candidate.number);
        let stack = candidate.stack.clone();
        let node = Arc::new(Node::new(id, is_dir, number, stack, location));
        if let Some((parent, name)) = named {
            parent.refs.fetch_add(1, Ordering::Relaxed);
            let name = Name(parent.id.0, name.to_owned());
            index.by_name.insert(name, Arc::clone(&node));
        } else if let Some(upper) = candidate.stack.first() {
            index.by_upper.insert(upper.node.0, Arc::clone(&node));
        }
        index.count += 1;
        self.insert(Arc::clone(&node));
        Ok(node)
    }

    /// Counts one more reference of a node that is in use.
    pub(super) fn count(&self, node: &Node) {
        let _index = self.index();
        node.refs.fetch_add(1, Ordering::Relaxed);
    }

    /// Drops `count` references. Returns what is then to be forgotten in the layers.
    pub(super) fn drop_refs(&self, node: &Arc<Node>, count: u64) -> Stack {
        let mut forgotten = Stack::new();
        if node.id == NodeId::ROOT {
            return forgotten;
        }
        let mut next = Some((Arc::clone(node), count));
        while let Some((node, count)) = next.take() {
            let saturated = |refs: u64| Some(refs.saturating_sub(count));
            let before = node
                .refs
                .fetch_update(Ordering::AcqRel, Ordering::Acquire, saturated)
                .unwrap_or_default();
            if before > count || node.id == NodeId::ROOT {
                break;
            }
            let mut index = self.index();
            // A lookup may have found it meanwhile, or another thread dropped it.
            if node.refs.load(Ordering::Acquire) != 0 || !self.remove(&node) {
                break;
            }
            index.count -= 1;
            if let Some(at) = node.set_location(None) {
                index.by_name.remove(&NameRef(at.parent.id.0, &at.name));
                next = Some((at.parent, 1));
            }
            if let Some(upper) = node.stack().first()
                && index
                    .by_upper
                    .get(&upper.node.0)
                    .is_some_and(|known| known.id == node.id)
            {
                index.by_upper.remove(&upper.node.0);
            }
            if let Some((_, number)) = node.origin() {
                index.numbers.remove(&number);
            }
            drop(index);
            forgotten.extend(node.all());
        }
        forgotten
    }

    /// The node known as `name` in `parent` has no name any more. Returns what is to be forgotten if
    /// only the name referred to its parent.
    pub(super) fn detach(&self, parent: &Arc<Node>, name: &CStr) -> Stack {
        let mut index = self.index();
        let Some(node) = index.by_name.remove(&NameRef(parent.id.0, name)) else {
            return Stack::new();
        };
        node.set_removed();
        let had_location = node.set_location(None).is_some();
        drop(index);
        if had_location {
            self.drop_refs(parent, 1)
        } else {
            Stack::new()
        }
    }

    /// The node known as `from` is `to` now. Files of the upper layer aren't known by name.
    pub(super) fn rename(&self, from: (&Arc<Node>, &CStr), to: (&Arc<Node>, &CStr)) -> Stack {
        let mut index = self.index();
        let Some(node) = index.by_name.remove(&NameRef(from.0.id.0, from.1)) else {
            return Stack::new();
        };
        to.0.refs.fetch_add(1, Ordering::Relaxed);
        node.set_location(Some(Location {
            parent: Arc::clone(to.0),
            name: to.1.to_owned(),
        }));
        index.by_name.insert(Name(to.0.id.0, to.1.to_owned()), node);
        drop(index);
        self.drop_refs(from.0, 1)
    }

    /// Exchanges the nodes known by two names.
    pub(super) fn exchange(&self, one: (&Arc<Node>, &CStr), other: (&Arc<Node>, &CStr)) -> Stack {
        let mut index = self.index();
        let take = |index: &mut Index, at: (&Arc<Node>, &CStr)| {
            index.by_name.remove(&NameRef(at.0.id.0, at.1))
        };
        let pairs = [
            (take(&mut index, one), one, other),
            (take(&mut index, other), other, one),
        ];
        let mut left = Vec::new();
        for (node, from, to) in pairs {
            let Some(node) = node else { continue };
            to.0.refs.fetch_add(1, Ordering::Relaxed);
            node.set_location(Some(Location {
                parent: Arc::clone(to.0),
                name: to.1.to_owned(),
            }));
            index.by_name.insert(Name(to.0.id.0, to.1.to_owned()), node);
            left.push(from.0);
        }
        drop(index);
        left.into_iter()
            .flat_map(|parent| self.drop_refs(parent, 1))
            .collect()
    }

    /// The node has been copied up to `upper`, whose inode number there is `number`. A file is no
    /// longer known by its name, and if it `is_separated` from other names, it gets that number.
    /// Returns what is to be forgotten.
    pub(super) fn copied_up(
        &self,
        node: &Arc<Node>,
        upper: Real,
        number: u64,
        is_separated: bool,
    ) -> Stack {
        let mut index = self.index();
        node.set_upper(upper, number, is_separated);
        if node.is_dir {
            return Stack::new();
        }
        index.by_upper.insert(upper.node.0, Arc::clone(node));
        index.numbers.insert(number, node.number());
        let Some(at) = node.set_location(None) else {
            return Stack::new();
        };
        index.by_name.remove(&NameRef(at.parent.id.0, &at.name));
        drop(index);
        self.drop_refs(&at.parent, 1)
    }

    fn insert(&self, node: Arc<Node>) {
        self.shard(node.id)
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(node.id.0, node);
    }

    fn remove(&self, node: &Node) -> bool {
        self.shard(node.id)
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&node.id.0)
            .is_some()
    }

    fn shard(&self, id: NodeId) -> &Shard {
        &self.shards[usize::try_from(id.0 % SHARDS as u64).unwrap_or_default()]
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
