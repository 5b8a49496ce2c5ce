//! The inode store: which node id stands for which inode, and how often the guest has it.
//!
//! Two sets of the same inodes, by node id and by identity, each in shards with a lock of its
//! own. A node id is never given out twice, so one that the guest has no right to any more is
//! not found instead of being another file. The invariant: as long as an inode's count is not
//! zero, its node id finds it; the count changes only under the lock of the inode's shard by
//! identity, where reaching zero and being removed are one step.
//!
//! Order of locks: the shard by identity, then the shard by node id.

#![allow(
    clippy::mutable_key_type,
    reason = "inodes are found by their node id and their key, which never change"
)]

use std::borrow::Borrow;
use std::collections::HashSet;
use std::hash::{BuildHasher, BuildHasherDefault, Hash, Hasher};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::FileType;

use super::holds::{Hold, Identity, Key};
use crate::fs::NodeId;

/// An inode that the guest knows.
#[derive(Debug)]
pub(super) struct Inode {
    key: Key,
    node: NodeId,
    /// Lookups that the guest has not given back. Changed under the shard's lock only, which
    /// is what orders it.
    lookups: AtomicU64,
    /// Nanoseconds since 1970; `NO_BIRTH` where the file system doesn't tell.
    birth: AtomicI64,
    hold: Hold,
    kind: FileType,
    /// Whether another inode of the same number must have a later birth. See [`Self::settle`].
    settled: AtomicBool,
}

const NO_BIRTH: i64 = i64::MIN;

/// How much older than now a birth must be to tell inodes apart: more than a tick of the clock
/// that file systems stamp with, and than the coarsest stamp (two seconds, FAT).
const SETTLED_AFTER: i64 = 4_000_000_000;

impl Inode {
    fn new(identity: &Identity, node: NodeId, hold: Hold) -> Self {
        let inode = Self {
            key: identity.key,
            node,
            lookups: AtomicU64::new(1),
            birth: AtomicI64::new(NO_BIRTH),
            hold,
            kind: identity.kind,
            settled: AtomicBool::new(false),
        };
        inode.settle(identity);
        inode
    }

    pub(super) fn node(&self) -> NodeId {
        self.node
    }

    pub(super) fn key(&self) -> &Key {
        &self.key
    }

    pub(super) fn hold(&self) -> &Hold {
        &self.hold
    }

    /// What sort of file it is: never changes.
    pub(super) fn kind(&self) -> FileType {
        self.kind
    }

    /// Whether `identity`, which has this inode's key, is this inode beyond doubt.
    fn is(&self, identity: &Identity) -> bool {
        let same_birth = self.birth.load(Ordering::Relaxed) == birth_of(identity);
        match &self.hold {
            // The descriptor keeps the number from being given to another. A birth that
            // differs all the same is either a file system that moves it (overlayfs when it
            // copies up) or a `statx` from before the inode was there.
            Hold::Descriptor(_) => same_birth,
            Hold::FileHandle { .. } => same_birth && self.settled.load(Ordering::Relaxed),
        }
    }

    /// Takes over what is now known for sure to describe this inode.
    ///
    /// Inode numbers are reused, and births come from a clock with ticks of milliseconds: a
    /// file made, removed and made again within one tick may agree in both. But once the clock
    /// is past the birth of an inode that is still there, whatever takes its number later is
    /// born later. From then on number and birth are enough; before, handles are compared.
    fn settle(&self, identity: &Identity) {
        let birth = birth_of(identity);
        self.birth.store(birth, Ordering::Relaxed);
        let settled =
            birth != NO_BIRTH && now().is_some_and(|now| now.saturating_sub(birth) > SETTLED_AFTER);
        self.settled.store(settled, Ordering::Relaxed);
    }
}

fn birth_of(identity: &Identity) -> i64 {
    identity.birth.unwrap_or(NO_BIRTH)
}

fn now() -> Option<i64> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
    i64::try_from(since.as_nanos()).ok()
}

/// An inode, found by its node id. No copy of it: a set's entry is one pointer.
#[derive(Debug)]
struct ByNode(Arc<Inode>);

/// An inode, found by its identity.
#[derive(Debug)]
struct ByKey(Arc<Inode>);

impl Borrow<NodeId> for ByNode {
    fn borrow(&self) -> &NodeId {
        &self.0.node
    }
}

impl Borrow<Key> for ByKey {
    fn borrow(&self) -> &Key {
        &self.0.key
    }
}

impl Hash for ByNode {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.node.hash(state);
    }
}

impl Hash for ByKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.key.hash(state);
    }
}

impl PartialEq for ByNode {
    fn eq(&self, other: &Self) -> bool {
        self.0.node == other.0.node
    }
}

impl PartialEq for ByKey {
    fn eq(&self, other: &Self) -> bool {
        self.0.key == other.0.key
    }
}

impl Eq for ByNode {}
impl Eq for ByKey {}

/// Mixes a few integers. The numbers come from the host's file systems and from a counter, so
/// nobody can choose them to collide on purpose.
#[derive(Default)]
pub(super) struct Mixer(u64);

impl Hasher for Mixer {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u64(&mut self, word: u64) {
        // The low half of a product depends on the low half of its factors alone; folding the
        // high half in makes each bit of the word reach all of them.
        let product = (self.0 ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = product ^ product >> 32;
    }
}

/// Hashes with [`Mixer`].
pub(super) type Mix = BuildHasherDefault<Mixer>;

type Keys = HashSet<ByKey, Mix>;
type Nodes = HashSet<ByNode, Mix>;

/// So many that a handful of workers rarely meet.
const SHARDS: usize = 64;

/// All inodes that the guest knows.
#[derive(Debug)]
pub(super) struct Store {
    by_key: Box<[Mutex<Keys>]>,
    by_node: Box<[RwLock<Nodes>]>,
    root: Arc<Inode>,
    /// The next node id. 64 bits are not used up.
    next: AtomicU64,
    /// Inodes in the store whose hold is a descriptor. Orders nothing; a budget goes by it.
    descriptors: AtomicUsize,
}

impl Store {
    pub(super) fn new(identity: &Identity, hold: Hold) -> Self {
        let root = Arc::new(Inode::new(identity, NodeId::ROOT, hold));
        let store = Self {
            by_key: (0..SHARDS).map(|_| Mutex::default()).collect(),
            by_node: (0..SHARDS).map(|_| RwLock::default()).collect(),
            root,
            next: AtomicU64::new(NodeId::ROOT.0 + 1),
            descriptors: AtomicUsize::new(0),
        };
        store.insert(&mut store.keys(&identity.key), Arc::clone(&store.root));
        store
    }

    /// The inode that `node` stands for, if the guest has it.
    pub(super) fn get(&self, node: NodeId) -> Option<Arc<Inode>> {
        if node == NodeId::ROOT {
            return Some(Arc::clone(&self.root));
        }
        let nodes = self
            .nodes(node)
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        nodes.get(&node).map(|found| Arc::clone(&found.0))
    }

    /// Finds an inode that is known already, and counts one lookup of it. `None` also if it
    /// takes more than `identity` to tell.
    pub(super) fn find(&self, identity: &Identity) -> Option<Arc<Inode>> {
        let keys = self.keys(&identity.key);
        let ByKey(inode) = keys
            .get(&identity.key)
            .filter(|known| known.0.is(identity))?;
        count_up(&keys, inode);
        Some(Arc::clone(inode))
    }

    /// Whether some inode goes by `key`: a guess for what to try first.
    pub(super) fn has(&self, key: &Key) -> bool {
        self.keys(key).contains(key)
    }

    /// Finds or adds the inode that `hold` was made for, and counts one lookup of it. Where a
    /// known inode goes by the same key, `same` tells by system calls whether it is the one.
    pub(super) fn admit(
        &self,
        identity: &Identity,
        hold: Hold,
        same: impl FnOnce(&Inode, &Hold) -> bool,
    ) -> Arc<Inode> {
        let mut keys = self.keys(&identity.key);
        if let Some(ByKey(known)) = keys.get(&identity.key) {
            if known.is(identity) || same(known, &hold) {
                count_up(&keys, known);
                known.settle(identity);
                let known = Arc::clone(known);
                drop(keys);
                return known;
            }
            // What had this number before is no more. Its node id stays with who has it.
            keys.remove(&identity.key);
        }
        let node = NodeId(self.next.fetch_add(1, Ordering::Relaxed));
        let inode = Arc::new(Inode::new(identity, node, hold));
        self.insert(&mut keys, Arc::clone(&inode));
        inode
    }

    /// Counts one lookup more of an inode that the guest has.
    ///
    /// Answers whether it still has it: another thread may have forgotten it meanwhile.
    pub(super) fn count(&self, inode: &Inode) -> bool {
        let keys = self.keys(&inode.key);
        let had = inode.node == NodeId::ROOT || inode.lookups.load(Ordering::Relaxed) > 0;
        if had {
            count_up(&keys, inode);
        }
        had
    }

    /// Gives back `count` lookups; the last one removes the inode. The root is never removed.
    pub(super) fn forget(&self, node: NodeId, count: u64) {
        if node == NodeId::ROOT {
            return;
        }
        let Some(inode) = self.get(node) else {
            return;
        };
        let mut keys = self.keys(&inode.key);
        let before = inode.lookups.load(Ordering::Relaxed);
        let left = before.saturating_sub(count);
        inode.lookups.store(left, Ordering::Relaxed);
        // `before` is 0 if another thread has removed it since `get`.
        let removed = (left == 0 && before != 0).then(|| self.remove(&mut keys, &inode));
        drop(keys);
        // Descriptors are closed outside of the locks.
        drop(removed);
    }

    /// Makes the next lookup find another inode under this one's key: it was found stale.
    pub(super) fn disown(&self, inode: &Inode) {
        if inode.node != NodeId::ROOT {
            let mut keys = self.keys(&inode.key);
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
                nodes.iter().map(|known| known.0.node).collect()
            };
            for node in nodes {
                self.forget(node, u64::MAX);
            }
        }
    }

    /// How many inodes the guest has, the root included.
    pub(super) fn len(&self) -> usize {
        let len =
            |shard: &RwLock<Nodes>| shard.read().unwrap_or_else(PoisonError::into_inner).len();
        self.by_node.iter().map(len).sum()
    }

    /// How many of them are held by a descriptor.
    pub(super) fn descriptors(&self) -> usize {
        self.descriptors.load(Ordering::Relaxed)
    }

    fn keys(&self, key: &Key) -> MutexGuard<'_, Keys> {
        // The set takes the lowest and the highest bits of the same hash.
        let shard = Mix::default().hash_one(key) >> 40 & (SHARDS as u64 - 1);
        self.by_key[usize::try_from(shard).unwrap_or_default()]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn nodes(&self, node: NodeId) -> &RwLock<Nodes> {
        let shard = node.0 & (SHARDS as u64 - 1);
        &self.by_node[usize::try_from(shard).unwrap_or_default()]
    }

    fn insert(&self, keys: &mut Keys, inode: Arc<Inode>) {
        if matches!(inode.hold, Hold::Descriptor(_)) {
            self.descriptors.fetch_add(1, Ordering::Relaxed);
        }
        self.nodes(inode.node)
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(ByNode(Arc::clone(&inode)));
        keys.insert(ByKey(inode));
    }

    fn remove(&self, keys: &mut Keys, inode: &Inode) -> Option<ByNode> {
        if matches!(inode.hold, Hold::Descriptor(_)) {
            self.descriptors.fetch_sub(1, Ordering::Relaxed);
        }
        remove_key(keys, inode);
        let mut nodes = self
            .nodes(inode.node)
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let removed = nodes.take(&inode.node);
        if roomy(nodes.len(), nodes.capacity()) {
            nodes.shrink_to_fit();
        }
        removed
    }
}

/// The lock's guard is asked for to show that it is held.
fn count_up(_keys: &MutexGuard<'_, Keys>, inode: &Inode) {
    inode.lookups.fetch_add(1, Ordering::Relaxed);
}

fn remove_key(keys: &mut Keys, inode: &Inode) {
    // Another inode may have taken over the key.
    let own = keys
        .get(&inode.key)
        .is_some_and(|known| known.0.node == inode.node);
    if own {
        keys.remove(&inode.key);
        if roomy(keys.len(), keys.capacity()) {
            keys.shrink_to_fit();
        }
    }
}

/// Whether a set has so much room left that memory shall be given back. Four times what is
/// needed, so that a set near the limit isn't moved to and fro.
fn roomy(len: usize, capacity: usize) -> bool {
    capacity > 64 && len < capacity / 4
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::passthrough::holds::Mount;
    use crate::sys::file_handle::FileHandle;

    /// Long enough ago to be settled.
    const LONG_AGO: i64 = 1_000_000_000_000_000_000;

    fn identity(number: u64, birth: Option<i64>) -> Identity {
        let key = Key {
            number,
            device: 7,
            mount: 3,
        };
        Identity {
            key,
            birth,
            kind: FileType::RegularFile,
        }
    }

    fn hold(bytes: &[u8]) -> Hold {
        Hold::FileHandle {
            mount: Mount::nowhere(),
            handle: FileHandle::invented(bytes),
        }
    }

    fn store() -> Store {
        Store::new(&identity(2, Some(LONG_AGO)), hold(b"root"))
    }

    fn admit(store: &Store, identity: &Identity) -> Arc<Inode> {
        store.admit(identity, hold(b"handle"), |_, _| false)
    }

    #[test]
    fn an_inode_is_small() {
        // With the two counters of its `Arc`, the allocator's header and two entries of the
        // sets (nine bytes each, half of them empty at worst) this stays below 200.
        assert!(size_of::<Inode>() <= 104, "{}", size_of::<Inode>());
    }

    #[test]
    fn an_inode_is_found_by_both_names_until_its_last_lookup_is_given_back() {
        let store = store();
        let who = identity(10, Some(LONG_AGO));
        let inode = admit(&store, &who);
        assert_eq!(store.find(&who).unwrap().node(), inode.node());
        assert_eq!(admit(&store, &who).node(), inode.node());
        store.forget(inode.node(), 2);
        assert!(store.get(inode.node()).is_some());
        store.forget(inode.node(), 1);
        assert!(store.get(inode.node()).is_none());
        assert!(store.find(&who).is_none());
        assert!(!store.count(&inode));
    }

    #[test]
    fn a_node_id_is_never_given_out_again() {
        let store = store();
        let who = identity(10, Some(LONG_AGO));
        let first = admit(&store, &who).node();
        store.forget(first, 1);
        assert_ne!(admit(&store, &who).node(), first);
    }

    #[test]
    fn too_many_forgets_remove_once_and_no_more() {
        let store = store();
        let node = admit(&store, &identity(10, Some(LONG_AGO))).node();
        store.forget(node, 100);
        store.forget(node, 100);
        assert_eq!(store.len(), 1);
    }

    #[test]
    fn the_root_is_never_forgotten() {
        let store = store();
        let root = store.find(&identity(2, Some(LONG_AGO))).unwrap();
        assert_eq!(root.node(), NodeId::ROOT);
        store.forget(NodeId::ROOT, u64::MAX);
        store.clear();
        assert!(store.get(NodeId::ROOT).is_some());
        assert!(store.find(&identity(2, Some(LONG_AGO))).is_some());
    }

    #[test]
    fn a_reused_number_with_another_birth_is_another_inode() {
        let store = store();
        let old = admit(&store, &identity(10, Some(LONG_AGO)));
        let later = identity(10, Some(LONG_AGO + 1));
        assert!(store.find(&later).is_none());
        let new = admit(&store, &later);
        assert_ne!(new.node(), old.node());
        // The old one is still the guest's, and its end takes nothing from the new one.
        assert!(store.get(old.node()).is_some());
        store.forget(old.node(), 1);
        assert_eq!(store.find(&later).unwrap().node(), new.node());
    }

    #[test]
    fn a_young_inode_is_not_told_by_its_birth_alone() {
        let store = store();
        let who = identity(10, now());
        let inode = admit(&store, &who);
        assert!(store.find(&who).is_none());
        let found = store.admit(&who, hold(b"handle"), |_, _| true);
        assert_eq!(found.node(), inode.node());
    }

    #[test]
    fn an_inode_without_birth_is_not_told_by_its_number_alone() {
        let store = store();
        let who = identity(10, None);
        admit(&store, &who);
        assert!(store.find(&who).is_none());
    }

    #[test]
    fn a_disowned_inode_gives_way_to_the_next_lookup() {
        let store = store();
        let who = identity(10, Some(LONG_AGO));
        let stale = admit(&store, &who);
        store.disown(&stale);
        assert_ne!(admit(&store, &who).node(), stale.node());
    }

    #[test]
    fn clear_leaves_the_root_alone() {
        let store = store();
        for number in 10..1000 {
            admit(&store, &identity(number, Some(LONG_AGO)));
        }
        assert_eq!(store.len(), 991);
        store.clear();
        assert_eq!(store.len(), 1);
        let capacity: usize = store
            .by_node
            .iter()
            .map(|s| s.read().unwrap().capacity())
            .sum();
        assert!(capacity < 64 * SHARDS);
    }

    #[test]
    fn racing_lookups_and_forgets_never_hand_out_a_dead_node_id() {
        let store = store();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for turn in 0..20_000 {
                        let who = identity(10 + turn % 3, Some(LONG_AGO));
                        let inode = store.find(&who).unwrap_or_else(|| admit(&store, &who));
                        // Until given back, a lookup is a right to the node id.
                        assert!(store.get(inode.node()).is_some());
                        store.forget(inode.node(), 1);
                    }
                });
            }
        });
        assert_eq!(store.len(), 1);
        assert_eq!(
            store
                .by_key
                .iter()
                .map(|s| s.lock().unwrap().len())
                .sum::<usize>(),
            1
        );
    }
}
