//! The inode table: maps node ids and identities to inodes, and counts the guest's lookups.
//!
//! The same inodes are in two sets, by node id and by identity. Each set is split into shards with
//! a lock each. A node id is never reused, so a node id that the guest has forgotten is not found,
//! instead of being another file. If an inode is reopened by name, the parent directory stays in
//! the table, so the inode is found even after the parent has been renamed. The invariant: as long
//! as one of an inode's counts is not zero, its node id finds it. The counts change only under the
//! lock of the inode's shard by identity, and reaching zero and being removed are one step under
//! that lock.
//!
//! Lock order: the shard by identity, the shard by node id, the inode's `ref_kind`, the queue of
//! forgotten inodes.

mod dir_seqcount;
mod fd_evictor;
mod fds;
mod forgotten_inodes;
mod identity;
mod inode;
mod inode_fd;
mod lookups;
mod names;
mod reopen_method;
#[cfg(test)]
mod tests;

use std::ffi::CStr;
use std::hash::BuildHasher;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use hashbrown::HashTable;
use rustc_hash::FxBuildHasher;

pub(crate) use self::dir_seqcount::{DirChange, DirSeq};
#[cfg(test)]
pub(crate) use self::identity::CLOCK_AHEAD;
pub(crate) use self::identity::{IDENTITY, Identity, Key, LocalBirths, stat_fd};
pub(crate) use self::inode::{Inode, RefKind};
pub(crate) use self::inode_fd::{Directory, InodeFd, component, reopen_fd, stat_name};
pub(crate) use self::lookups::NewInode;
pub(crate) use self::reopen_method::{Mount, ParentLink, ReopenMethod, digest_at, digest_of};

use self::dir_seqcount::DirSeqCounts;
use self::fd_evictor::FdEvictor;
use self::forgotten_inodes::ForgottenInodes;
use crate::fs::NodeId;
use crate::fs::lowest::Lowest;
use crate::state::Table;

/// A set of inodes. An entry is one pointer; the key is read from the inode's record.
type Keys = HashTable<Arc<Inode>>;
type Nodes = HashTable<Arc<Inode>>;

fn hash_of_key(key: &Key) -> u64 {
    FxBuildHasher.hash_one(key)
}

fn hash_of_node(node: NodeId) -> u64 {
    FxBuildHasher.hash_one(node)
}

fn key_hash(inode: &Arc<Inode>) -> u64 {
    hash_of_key(&inode.key())
}

fn node_hash(inode: &Arc<Inode>) -> u64 {
    hash_of_node(inode.node())
}

/// The inode that has `key`.
fn by_key<'a>(keys: &'a Keys, key: &Key) -> Option<&'a Arc<Inode>> {
    keys.find(hash_of_key(key), |known| known.key() == *key)
}

/// Enough for a handful of workers to collide rarely.
const SHARDS: usize = 64;

/// How many parent links are followed at most, which ends a cycle.
pub(crate) const MAX_DEPTH: usize = 1 << 17;

/// All inodes in use.
#[derive(Debug)]
pub(crate) struct InodeTable {
    by_key: Box<[Mutex<Keys>]>,
    by_node: Box<[RwLock<Nodes>]>,
    root: Arc<Inode>,
    table: Arc<Table>,
    /// The next node id, and how many ids are left before the table must be asked for more. 64 bits
    /// don't run out.
    next: Mutex<(u64, u64)>,
    /// The number of inodes in the table that have a descriptor. It orders nothing and is used for
    /// limits.
    descriptors: AtomicUsize,
    /// The number of inodes in the table, including the root. It orders nothing and is used for
    /// limits.
    count: AtomicUsize,
    evictor: FdEvictor,
    dir_seqcounts: DirSeqCounts,
    forgotten: ForgottenInodes,
    local_births: LocalBirths,
}

impl InodeTable {
    /// Creates a table that contains only the root, open as `fd` for good. It keeps up to
    /// `forgotten` forgotten inodes. Returns `None` if the table has no room.
    pub(crate) fn new(
        identity: &Identity,
        fd: OwnedFd,
        table: &Arc<Table>,
        forgotten: usize,
    ) -> Option<Self> {
        let inode = Inode::new(table, identity, NodeId::ROOT, Some(fd), ReopenMethod::None)?;
        Some(Self::with_root(inode, table, forgotten))
    }

    /// As [`new`](Self::new), with an existing root inode.
    pub(crate) fn with_root(root: Inode, table: &Arc<Table>, forgotten: usize) -> Self {
        let root = Arc::new(root);
        let store = Self {
            by_key: (0..SHARDS).map(|_| Mutex::default()).collect(),
            by_node: (0..SHARDS).map(|_| RwLock::default()).collect(),
            root,
            table: Arc::clone(table),
            next: Mutex::new((0, 0)),
            descriptors: AtomicUsize::new(0),
            count: AtomicUsize::new(0),
            evictor: FdEvictor::new(),
            dir_seqcounts: DirSeqCounts::new(),
            forgotten: ForgottenInodes::new(forgotten),
            local_births: LocalBirths::default(),
        };
        store.insert(&mut store.keys(&store.root.key()), Arc::clone(&store.root));
        store
    }

    /// States where birth times come from this host's clock.
    #[must_use]
    pub(crate) fn with_local_births(self, local_births: LocalBirths) -> Self {
        Self {
            local_births,
            ..self
        }
    }

    /// Whether number and birth time tell the inode with this `identity` from all later ones.
    pub(crate) fn is_settled(&self, identity: &Identity) -> bool {
        self.local_births.is_settled(&identity.key, identity.birth)
    }

    /// Stores the birth time of an `identity` that certainly describes `inode`. See
    /// [`Inode::settle`].
    pub(crate) fn settle(&self, inode: &Inode, identity: &Identity) {
        inode.settle(identity, self.is_settled(identity));
    }

    /// Uses the record of an inode to decide whether it is settled.
    pub(crate) fn settle_by_record(&self, inode: &Inode) {
        inode.set_settled(self.local_births.is_settled(&inode.key(), inode.birth()));
    }

    /// The table of the guest's state.
    pub(crate) fn table(&self) -> &Arc<Table> {
        &self.table
    }

    pub(crate) fn root_key(&self) -> Key {
        self.root.key()
    }

    fn next_node(&self) -> NodeId {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        if next.1 == 0 {
            *next = self.table.more_nodes();
        }
        let node = next.0;
        *next = (node + 1, next.1 - 1);
        NodeId(node)
    }

    /// Adds inodes restored from a table. Each has a reopen method, which may lead through others
    /// of them.
    pub(crate) fn restore_all(&self, inodes: Vec<Inode>) {
        let mut inodes: Vec<_> = inodes.into_iter().map(Arc::new).collect();
        // If several have the same key, the youngest gets it.
        inodes.sort_unstable_by_key(|inode| inode.node());
        for inode in &inodes {
            let mut keys = self.keys(&inode.key());
            let before = by_key(&keys, &inode.key()).map(Arc::clone);
            if let Some(before) = before {
                remove_key(&mut keys, &before);
            }
            self.insert(&mut keys, Arc::clone(inode));
        }
        for inode in &inodes {
            if let Some(parent) = inode.parent().and_then(|node| self.any(node)) {
                parent.children.fetch_add(1, Ordering::Relaxed);
            }
            self.enqueue_for_eviction(inode);
        }
        // Remove those that nothing needs: the guest forgot them as the other process ended.
        for inode in &inodes {
            self.remove_if_unused(self.keys(&inode.key()), inode);
        }
    }

    /// All inodes that the guest knows, and the parents needed to reopen them, without the root.
    pub(crate) fn all(&self) -> Vec<Arc<Inode>> {
        let all = self.all_with_forgotten();
        if self.forgotten() == 0 {
            return all;
        }
        self.needed(all)
    }

    /// The `limit` lowest node ids from `from` on, and the next one.
    pub(crate) fn nodes_from(&self, from: NodeId, limit: usize) -> (Vec<NodeId>, Option<NodeId>) {
        let mut lowest = Lowest::new(limit);
        for shard in &self.by_node {
            let nodes = shard.read().unwrap_or_else(PoisonError::into_inner);
            let nodes = nodes.iter().map(|inode| inode.node());
            nodes
                .filter(|node| *node >= from)
                .for_each(|node| lowest.add(node));
        }
        lowest.take()
    }

    fn all_with_forgotten(&self) -> Vec<Arc<Inode>> {
        let of = |shard: &RwLock<Nodes>| {
            let nodes = shard.read().unwrap_or_else(PoisonError::into_inner);
            let inodes = nodes.iter().filter(|inode| inode.node() != NodeId::ROOT);
            inodes.map(Arc::clone).collect::<Vec<_>>()
        };
        self.by_node.iter().flat_map(of).collect()
    }

    /// Ensures that node ids below `node` are not handed out any more.
    pub(crate) fn skip_to_node(&self, node: u64) {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        self.table.skip_to_node(node);
        *next = (0, 0);
    }

    /// Adds an inode that another server handed out as `node`, with its lookup count. Returns false
    /// if the node id is taken or was never handed out, if the parent is not in the table, or if
    /// the table is full.
    pub(crate) fn import(
        &self,
        node: NodeId,
        lookups: u64,
        identity: &Identity,
        fd: Option<OwnedFd>,
        method: ReopenMethod,
    ) -> bool {
        let given_out = NodeId::ROOT.0 + 1..self.table.nodes_given_out();
        if self.any(node).is_some() || !given_out.contains(&node.0) {
            return false;
        }
        let parent = match &method {
            ReopenMethod::Name(link) => match self.any(link.parent) {
                Some(parent) => Some(parent),
                None => return false,
            },
            _ => None,
        };
        let Some(inode) = Inode::new(&self.table, identity, node, fd, method) else {
            return false;
        };
        inode.record.set_lookups(lookups, 0, false);
        let inode = Arc::new(inode);
        // If two inodes of the source are one inode here, the first keeps the key.
        self.insert(&mut self.keys(&inode.key()), Arc::clone(&inode));
        if let Some(parent) = parent {
            parent.children.fetch_add(1, Ordering::Relaxed);
        }
        self.enqueue_for_eviction(&inode);
        true
    }

    /// The inode that `node` stands for, if the guest knows it.
    pub(crate) fn get(&self, node: NodeId) -> Option<Arc<Inode>> {
        let known = self.any(node)?;
        // An inode that is in the table only for its children is not known to the guest.
        let known_to_guest = known.node() == NodeId::ROOT || known.lookups() > 0;
        known_to_guest.then_some(known)
    }

    /// The inode that `node` stands for, even if it is in the table only for its children.
    pub(crate) fn any(&self, node: NodeId) -> Option<Arc<Inode>> {
        if node == NodeId::ROOT {
            return Some(Arc::clone(&self.root));
        }
        let nodes = self
            .nodes(node)
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        nodes
            .find(hash_of_node(node), |known| known.node() == node)
            .map(Arc::clone)
    }

    /// The inode that is reopened by `name` in `parent`. Scans all inodes.
    pub(crate) fn by_name(&self, parent: NodeId, name: &CStr) -> Option<Arc<Inode>> {
        let is_linked_as = |inode: &Inode| inode.is_linked_as(&inode.ref_kind(), parent, name);
        self.by_node.iter().find_map(|shard| {
            let nodes = shard.read().unwrap_or_else(PoisonError::into_inner);
            nodes
                .iter()
                .find(|known| is_linked_as(known))
                .map(Arc::clone)
        })
    }

    /// Removes all inodes except the root.
    pub(crate) fn clear(&self) {
        for shard in &self.by_node {
            // Lookups that run concurrently add to a session that has ended. Removing nodes one by
            // one keeps the two sets consistent at every moment.
            let nodes: Vec<NodeId> = {
                let nodes = shard.read().unwrap_or_else(PoisonError::into_inner);
                nodes.iter().map(|known| known.node()).collect()
            };
            for node in nodes {
                if let Some(inode) = self.any(node).filter(|_| node != NodeId::ROOT) {
                    let keys = self.keys(&inode.key());
                    self.forgotten.take(&inode);
                    inode.children.store(0, Ordering::Relaxed);
                    // An inode that is in the table only for its children has no lookup to
                    // subtract.
                    inode.record.set_lookups(inode.lookups().max(1), 0, false);
                    drop(keys);
                    self.forget_inode(&inode, u64::MAX, false);
                }
            }
        }
    }

    /// The number of inodes, including the root.
    pub(crate) fn len(&self) -> usize {
        let len =
            |shard: &RwLock<Nodes>| shard.read().unwrap_or_else(PoisonError::into_inner).len();
        self.by_node.iter().map(len).sum()
    }

    /// As [`len`](Self::len), but approximate while inodes are added or removed.
    pub(crate) fn known(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// The number of inodes that have a descriptor.
    pub(crate) fn descriptors(&self) -> usize {
        self.descriptors.load(Ordering::Relaxed)
    }

    fn keys(&self, key: &Key) -> MutexGuard<'_, Keys> {
        // The lower 26 bits of the hash depend on every bit of the key. The table within a shard
        // uses the lowest of them, so the shard is chosen by the highest.
        let shard = hash_of_key(key) >> 20 & (SHARDS as u64 - 1);
        self.by_key[usize::try_from(shard).unwrap_or_default()]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn nodes(&self, node: NodeId) -> &RwLock<Nodes> {
        let shard = node.0 & (SHARDS as u64 - 1);
        &self.by_node[usize::try_from(shard).unwrap_or_default()]
    }

    fn insert(&self, keys: &mut Keys, inode: Arc<Inode>) {
        self.count.fetch_add(1, Ordering::Relaxed);
        if inode.slot.is_full() {
            self.descriptors.fetch_add(1, Ordering::Relaxed);
        }
        self.nodes(inode.node())
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert_unique(node_hash(&inode), Arc::clone(&inode), node_hash);
        keys.insert_unique(key_hash(&inode), inode, key_hash);
    }

    fn remove(&self, keys: &mut Keys, inode: &Inode) -> Option<Arc<Inode>> {
        remove_key(keys, inode);
        let mut nodes = self
            .nodes(inode.node())
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let node = inode.node();
        let removed = nodes
            .find_entry(hash_of_node(node), |known| known.node() == node)
            .map(|entry| entry.remove().0)
            .ok();
        if removed.is_some() {
            self.count.fetch_sub(1, Ordering::Relaxed);
        }
        if is_sparse(nodes.len(), nodes.capacity()) {
            nodes.shrink_to_fit(node_hash);
        }
        removed
    }
}

fn remove_key(keys: &mut Keys, inode: &Inode) {
    // Another inode may have taken over the key.
    let own = |known: &Arc<Inode>| std::ptr::eq(&**known, inode);
    if let Ok(entry) = keys.find_entry(hash_of_key(&inode.key()), own) {
        entry.remove();
        if is_sparse(keys.len(), keys.capacity()) {
            keys.shrink_to_fit(key_hash);
        }
    }
}

/// Whether a set is so empty that its memory should be freed. The factor of four keeps a set from
/// being reallocated again and again.
fn is_sparse(len: usize, capacity: usize) -> bool {
    capacity > 64 && len < capacity / 4
}

/// A random number that tells node ids of this session from those of another. Linux uses 32 bits of
/// it.
pub(crate) fn new_generation() -> u64 {
    // The standard library has no other source of random numbers.
    let random = std::hash::RandomState::new().hash_one(std::process::id());
    (random & u64::from(u32::MAX)).max(1)
}
