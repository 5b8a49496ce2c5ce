//! The inode store: which node id stands for which inode, and how often the guest has it.
//!
//! Two sets of the same inodes, by node id and by identity, each in shards with a lock of its
//! own. A node id is never given out twice, so one that the guest has no right to any more is
//! not found instead of being another file. An inode whose way is a name keeps the directory of
//! that name in the store, so that it is found however often that is renamed. The invariant: as
//! long as an inode's counts are not zero, its node id finds it; the counts change only under
//! the lock of the inode's shard by identity, where reaching zero and being removed are one
//! step.
//!
//! Order of locks: the shard by identity, the shard by node id, the inode's way, the line of those
//! that are remembered.

mod forgotten_inodes;
mod names;
#[cfg(test)]
mod tests;

use std::ffi::CStr;
use std::hash::BuildHasher;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use hashbrown::HashTable;
use rustc_hash::FxBuildHasher;

use self::forgotten_inodes::ForgottenInodes;
use super::current_request;
use super::dir_seqcount::DirSeqCounts;
use super::fd_evictor::FdEvictor;
use super::inode::{Inode, RefKind};
use super::inode_ref::{Identity, Key, ReopenMethod};
use crate::fs::NodeId;
use crate::state::Table;
use crate::sys::fd_slot::Borrowed;

/// What a new inode begins with.
#[derive(Debug)]
pub(super) struct NewInode {
    pub(super) fd: Option<OwnedFd>,
    pub(super) method: ReopenMethod,
}

impl NewInode {
    /// With a descriptor; the way is learned when its name is seen.
    pub(super) fn open(fd: OwnedFd) -> Self {
        Self {
            fd: Some(fd),
            method: ReopenMethod::None,
        }
    }
}

/// A set of inodes by what their records say of them: its entry is one pointer.
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

/// The inode that goes by `key`.
fn by_key<'a>(keys: &'a Keys, key: &Key) -> Option<&'a Arc<Inode>> {
    keys.find(hash_of_key(key), |known| known.key() == *key)
}

/// So many that a handful of workers rarely meet.
const SHARDS: usize = 64;

/// How deep a directory may lie for its names to be followed: a circle ends here.
pub(super) const MAX_DEPTH: usize = 1 << 17;

/// All inodes that the guest knows.
#[derive(Debug)]
pub(super) struct InodeStore {
    by_key: Box<[Mutex<Keys>]>,
    by_node: Box<[RwLock<Nodes>]>,
    root: Arc<Inode>,
    table: Arc<Table>,
    /// The next node id, and how many there are from there on before the table has to be asked
    /// again. 64 bits are not used up.
    next: Mutex<(u64, u64)>,
    /// Inodes in the store that have a descriptor. Orders nothing; a budget goes by it.
    descriptors: AtomicUsize,
    /// Inodes in the store, the root included. Orders nothing; a bound goes by it.
    count: AtomicUsize,
    evictor: FdEvictor,
    dir_seqcounts: DirSeqCounts,
    forgotten: ForgottenInodes,
}

impl InodeStore {
    /// A store that knows the root alone, open as `fd` for ever, and remembers up to `remembered` inodes
    /// that were given back. `None` if there is no room for it in `table`.
    pub(super) fn new(
        identity: &Identity,
        fd: OwnedFd,
        table: &Arc<Table>,
        forgotten: usize,
    ) -> Option<Self> {
        let inode = Inode::new(table, identity, NodeId::ROOT, Some(fd), ReopenMethod::None)?;
        Some(Self::of(inode, table, forgotten))
    }

    /// A store that knows `root` alone, and remembers as [`new`](Self::new) says.
    pub(super) fn of(root: Inode, table: &Arc<Table>, forgotten: usize) -> Self {
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
        };
        store.insert(&mut store.keys(&store.root.key()), Arc::clone(&store.root));
        store
    }

    pub(super) fn root_key(&self) -> Key {
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

    /// Takes in inodes that a table has told of, each with its own way, which may lead through
    /// others of them.
    pub(super) fn restore_all(&self, inodes: Vec<Inode>) {
        let mut inodes: Vec<_> = inodes.into_iter().map(Arc::new).collect();
        // Of several with one key the youngest is there; the others have lost it.
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
        // Those that nobody counts on any more: what was given back as the other process ended.
        for inode in &inodes {
            self.remove_if_unused(self.keys(&inode.key()), inode);
        }
    }

    /// All inodes but the root, also those that are here for their children alone, and none of
    /// which nobody has one.
    pub(super) fn all(&self) -> Vec<Arc<Inode>> {
        let all = self.all_with_forgotten();
        if self.forgotten() == 0 {
            return all;
        }
        self.needed(all)
    }

    fn all_with_forgotten(&self) -> Vec<Arc<Inode>> {
        let of = |shard: &RwLock<Nodes>| {
            let nodes = shard.read().unwrap_or_else(PoisonError::into_inner);
            let inodes = nodes.iter().filter(|inode| inode.node() != NodeId::ROOT);
            inodes.map(Arc::clone).collect::<Vec<_>>()
        };
        self.by_node.iter().flat_map(of).collect()
    }

    /// Gives out no node id below `node` any more.
    pub(super) fn skip_to_node(&self, node: u64) {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        self.table.skip_to_node(node);
        *next = (0, 0);
    }

    /// Adds an inode that another server has given out as `node`, with so many lookups. False if
    /// the node id is taken or was never given out, if the directory of its name is not here, or
    /// if the table is full.
    pub(super) fn import(
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
        // Two may be one here: the first keeps the key.
        self.insert(&mut self.keys(&inode.key()), Arc::clone(&inode));
        if let Some(parent) = parent {
            parent.children.fetch_add(1, Ordering::Relaxed);
        }
        self.enqueue_for_eviction(&inode);
        true
    }

    /// The inode that `node` stands for, if the guest has it.
    pub(super) fn get(&self, node: NodeId) -> Option<Arc<Inode>> {
        let known = self.any(node)?;
        // Those that are here for their children alone are not the guest's.
        let known_to_guest = known.node() == NodeId::ROOT || known.lookups() > 0;
        known_to_guest.then_some(known)
    }

    /// The inode that `node` stands for, also if it is here for its children alone.
    pub(super) fn any(&self, node: NodeId) -> Option<Arc<Inode>> {
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

    /// The inode whose way is `name` in `parent`: looks at all of them.
    pub(super) fn by_name(&self, parent: NodeId, name: &CStr) -> Option<Arc<Inode>> {
        let is_linked_as = |inode: &Inode| inode.is_linked_as(&inode.ref_kind(), parent, name);
        self.by_node.iter().find_map(|shard| {
            let nodes = shard.read().unwrap_or_else(PoisonError::into_inner);
            nodes
                .iter()
                .find(|known| is_linked_as(known))
                .map(Arc::clone)
        })
    }

    /// Finds an inode that is known already, and counts one lookup of it. `None` also if it
    /// takes more than `identity` to tell.
    pub(super) fn find(&self, identity: &Identity) -> Option<Arc<Inode>> {
        let keys = self.keys(&identity.key);
        // One that is remembered gets a descriptor first, as one that is new does.
        let known = |inode: &&Arc<Inode>| inode.is(identity) && !inode.is_forgotten();
        let inode = by_key(&keys, &identity.key).filter(known)?;
        self.increment_lookups(&keys, inode);
        Some(Arc::clone(inode))
    }

    /// The inode that goes by `identity`'s key, if it may be it.
    pub(super) fn peek(&self, identity: &Identity) -> Option<Arc<Inode>> {
        let keys = self.keys(&identity.key);
        let inode = by_key(&keys, &identity.key)?;
        inode.may_be(identity).then(|| Arc::clone(inode))
    }

    /// Finds or adds an inode without opening it, and counts one lookup of it. `None` if it may
    /// be known, and it takes more than `identity` to tell. A new one can't be reached before
    /// [`record_name_of_new`](Self::record_name_of_new).
    pub(super) fn add_unopened(&self, identity: &Identity) -> Option<Arc<Inode>> {
        let mut keys = self.keys(&identity.key);
        if let Some(known) = by_key(&keys, &identity.key) {
            let known = known.is(identity).then_some(known)?;
            self.increment_lookups(&keys, known);
            return Some(Arc::clone(known));
        }
        self.add(&mut keys, identity, None, ReopenMethod::None)
    }

    /// Finds or adds an inode that is open at this moment, and counts one lookup of it. Where a
    /// known inode goes by the same key, `same` tells by system calls whether it is the one.
    /// `None` if the table is full.
    pub(super) fn find_or_insert(
        &self,
        identity: &Identity,
        new: NewInode,
        same: impl FnOnce(&Inode, &NewInode) -> bool,
    ) -> Option<Arc<Inode>> {
        let mut keys = self.keys(&identity.key);
        if let Some(known) = by_key(&keys, &identity.key) {
            if known.is(identity) || same(known, &new) {
                let was_forgotten_before = known.is_forgotten();
                self.increment_lookups(&keys, known);
                known.settle(identity);
                let known = Arc::clone(known);
                drop(keys);
                if was_forgotten_before && let Some(fd) = new.fd {
                    drop(self.install(&known, fd));
                }
                return Some(known);
            }
            // What had this number before is no more. Its node id stays with who has it.
            let known = Arc::clone(known);
            remove_key(&mut keys, &known);
            if known.is_forgotten() {
                let new = self.add(&mut keys, identity, new.fd, new.method);
                drop(keys);
                self.drop_forgotten(&known);
                return new;
            }
        }
        self.add(&mut keys, identity, new.fd, new.method)
    }

    fn add(
        &self,
        keys: &mut Keys,
        identity: &Identity,
        fd: Option<OwnedFd>,
        method: ReopenMethod,
    ) -> Option<Arc<Inode>> {
        let node = self.next_node();
        let entry = self.table.own_journal_entry(current_request::unique());
        entry.inspect(|entry| entry.before(node.0, false));
        let inode = Inode::new(&self.table, identity, node, fd, method)?;
        entry.inspect(|entry| entry.after());
        let inode = Arc::new(inode);
        self.insert(keys, Arc::clone(&inode));
        Some(inode)
    }

    /// Gives `inode` a descriptor again, and borrows it.
    ///
    /// # Errors
    ///
    /// Gives `fd` back if the inode has been forgotten.
    pub(super) fn install<'a>(
        &self,
        inode: &'a Inode,
        fd: OwnedFd,
    ) -> Result<Borrowed<'a>, OwnedFd> {
        let ref_kind = inode.ref_kind();
        if matches!(*ref_kind, RefKind::Removed) {
            return Err(fd);
        }
        match inode.slot.fill(fd) {
            Ok(borrowed) => {
                let number = borrowed.as_fd().as_raw_fd();
                inode.record.set_descriptor(Some(number));
                self.descriptors.fetch_add(1, Ordering::Relaxed);
                if !matches!(*ref_kind, RefKind::Nothing | RefKind::Open(_)) {
                    self.evictor.add(inode);
                }
                Ok(borrowed)
            }
            // Somebody was faster.
            Err(fd) => inode.slot.borrow().ok_or(fd),
        }
    }

    /// Takes the descriptor from `inode`, whose way is locked; `None` if it is in use.
    pub(super) fn uninstall(
        &self,
        inode: &Inode,
        _ref_kind: &MutexGuard<'_, RefKind>,
        fd: Borrowed<'_>,
    ) -> Option<OwnedFd> {
        let taken = fd.take();
        if taken.is_some() {
            inode.record.set_descriptor(None);
            self.descriptors.fetch_sub(1, Ordering::Relaxed);
        }
        taken
    }

    /// Puts `inode` at the end of those that may be closed, if it has a descriptor and a way.
    pub(super) fn enqueue_for_eviction(&self, inode: &Inode) {
        let ref_kind = inode.ref_kind();
        if inode.slot.is_full() && !matches!(*ref_kind, RefKind::Nothing | RefKind::Removed) {
            self.evictor.add(inode);
        }
    }

    /// Which descriptors go first.
    pub(super) fn evictor(&self) -> &FdEvictor {
        &self.evictor
    }

    /// Counts one child more of `parent`; answers whether that is still in the store.
    fn add_child(&self, parent: &Inode) -> bool {
        let _keys = self.keys(&parent.key());
        let is_present = parent.is_in_use();
        if is_present {
            parent.children.fetch_add(1, Ordering::Relaxed);
        }
        is_present
    }

    /// Counts one child less of `node`, and if that ends it, of what it was a child of.
    fn remove_child(&self, node: NodeId) {
        let mut next = Some(node);
        while let Some(parent) = next.and_then(|node| self.any(node)) {
            let mut keys = self.keys(&parent.key());
            let before = parent.children.load(Ordering::Relaxed);
            if before == 0 {
                return;
            }
            parent.children.store(before - 1, Ordering::Relaxed);
            next = None;
            if !parent.is_in_use() {
                let removed = self.remove(&mut keys, &parent);
                drop(keys);
                next = self.finish_removal(&parent);
                drop(removed);
            }
        }
    }

    /// Removes `inode`, the lock of whose shard `keys` is, if nobody counts on it any more.
    fn remove_if_unused(&self, mut keys: MutexGuard<'_, Keys>, inode: &Arc<Inode>) {
        if inode.is_in_use() {
            return;
        }
        let removed = self.remove(&mut keys, inode);
        drop(keys);
        if removed.is_some()
            && let Some(parent) = self.finish_removal(inode)
        {
            self.remove_child(parent);
        }
        // Descriptors are closed outside of the locks.
        drop(removed);
    }

    /// Counts one lookup more of an inode that the guest has, or that is remembered.
    ///
    /// Answers whether that is still so: another thread may have forgotten it meanwhile.
    pub(super) fn count_lookup(&self, inode: &Inode) -> bool {
        let keys = self.keys(&inode.key());
        let known_to_guest =
            inode.node() == NodeId::ROOT || inode.lookups() > 0 || inode.is_forgotten();
        if known_to_guest {
            self.increment_lookups(&keys, inode);
        }
        known_to_guest
    }

    /// The lock's guard is asked for to show that it is held.
    fn increment_lookups(&self, _keys: &MutexGuard<'_, Keys>, inode: &Inode) {
        let entry = self.table.own_journal_entry(current_request::unique());
        entry.inspect(|entry| entry.before(inode.node().0, false));
        let lookups = inode.lookups().saturating_add(1);
        inode
            .record
            .set_lookups(lookups, current_request::unique(), true);
        entry.inspect(|entry| entry.after());
        self.forgotten.take(inode);
    }

    /// Gives back `count` lookups; the last one removes the inode, unless it is to be remembered,
    /// which is answered. The root is never removed.
    #[must_use]
    pub(super) fn forget(&self, inode: &Arc<Inode>, count: u64) -> bool {
        inode.node() != NodeId::ROOT && self.forget_inode(inode, count, true)
    }

    /// Answers whether the inode is remembered from now on.
    fn forget_inode(&self, inode: &Arc<Inode>, count: u64, keep: bool) -> bool {
        let keys = self.keys(&inode.key());
        let before = inode.lookups();
        let left = before.saturating_sub(count);
        let entry = self.table.own_journal_entry(current_request::unique());
        entry.inspect(|entry| entry.before(inode.node().0, true));
        inode
            .record
            .set_lookups(left, current_request::unique(), false);
        entry.inspect(|entry| entry.after());
        // `before` is 0 if another thread has removed it since `get`.
        if before == 0 || left > 0 {
            return false;
        }
        let forgotten = keep && self.keep_forgotten(&keys, inode);
        if !forgotten {
            self.remove_if_unused(keys, inode);
        }
        forgotten
    }

    /// Ends what an inode that was removed still has; answers whose child it was.
    fn finish_removal(&self, inode: &Inode) -> Option<NodeId> {
        let mut ref_kind = inode.ref_kind();
        let left = inode.set_reopen_method(&mut ref_kind, ReopenMethod::Removed);
        if inode.slot.is_full() {
            self.descriptors.fetch_sub(1, Ordering::Relaxed);
        }
        drop(ref_kind);
        if inode.slot.mark(false) {
            self.evictor
                .inode_removed(inode.node(), |node| self.any(node));
        }
        left
    }

    /// Makes the next lookup find another inode under this one's key: it was found stale.
    pub(super) fn remove_key_of(&self, inode: &Inode) {
        if inode.node() != NodeId::ROOT {
            let mut keys = self.keys(&inode.key());
            remove_key(&mut keys, inode);
        }
    }

    /// Forgets all but the root.
    pub(super) fn clear(&self) {
        for shard in &self.by_node {
            // Who looks up meanwhile adds to what is left of a session that has ended; nodes
            // are taken out one by one, so that the sets agree at each moment.
            let nodes: Vec<NodeId> = {
                let nodes = shard.read().unwrap_or_else(PoisonError::into_inner);
                nodes.iter().map(|known| known.node()).collect()
            };
            for node in nodes {
                if let Some(inode) = self.any(node).filter(|_| node != NodeId::ROOT) {
                    let keys = self.keys(&inode.key());
                    self.forgotten.take(&inode);
                    inode.children.store(0, Ordering::Relaxed);
                    // One that is here for its children alone has no lookup to give back.
                    inode.record.set_lookups(inode.lookups().max(1), 0, false);
                    drop(keys);
                    self.forget_inode(&inode, u64::MAX, false);
                }
            }
        }
    }

    /// How many inodes there are, the root included.
    pub(super) fn len(&self) -> usize {
        let len =
            |shard: &RwLock<Nodes>| shard.read().unwrap_or_else(PoisonError::into_inner).len();
        self.by_node.iter().map(len).sum()
    }

    /// As [`len`](Self::len), give or take those that come or go right now.
    pub(super) fn known(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// How many of them have a descriptor.
    pub(super) fn descriptors(&self) -> usize {
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

/// Whether a set has so much room left that memory shall be given back. Four times what is
/// needed, so that a set near the limit isn't moved to and fro.
fn is_sparse(len: usize, capacity: usize) -> bool {
    capacity > 64 && len < capacity / 4
}
