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
//! Order of locks: the shard by identity, then the shard by node id, then the inode's way.

#![allow(
    clippy::mutable_key_type,
    reason = "inodes are found by their node id and their key, which never change"
)]

#[cfg(test)]
mod tests;

use std::borrow::Borrow;
use std::collections::HashSet;
use std::ffi::CStr;
use std::hash::{BuildHasher, BuildHasherDefault, Hash, Hasher};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::FileType;

use super::changes::{Changes, Changing, Moment};
use super::clock::Clock;
use super::holds::{Identity, Key, Place, Way};
use crate::fs::NodeId;
use crate::sys::slot::{Borrowed, Slot};

/// An inode that the guest knows.
#[derive(Debug)]
pub(super) struct Inode {
    key: Key,
    node: NodeId,
    /// Lookups that the guest has not given back. Changed under the shard's lock only, which
    /// is what orders it.
    lookups: AtomicU64,
    /// Inodes whose way leads through this one. Changed as the lookups are.
    children: AtomicU32,
    /// Nanoseconds since 1970; `NO_BIRTH` where the file system doesn't tell.
    birth: AtomicI64,
    /// Its descriptor, while it has one. Filled and emptied under the lock of the way.
    slot: Slot,
    way: Mutex<Way>,
    kind: FileType,
    /// Whether another inode of the same number must have a later birth. See [`Self::settle`].
    settled: AtomicBool,
}

const NO_BIRTH: i64 = i64::MIN;

/// How much older than now a birth must be to tell inodes apart: more than a tick of the clock
/// that file systems stamp with, and than the coarsest stamp (two seconds, FAT).
const SETTLED_AFTER: i64 = 4_000_000_000;

impl Inode {
    fn new(identity: &Identity, node: NodeId, slot: Slot, way: Way) -> Self {
        let inode = Self {
            key: identity.key,
            node,
            lookups: AtomicU64::new(1),
            children: AtomicU32::new(0),
            birth: AtomicI64::new(NO_BIRTH),
            slot,
            way: Mutex::new(way),
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

    /// Its descriptor.
    pub(super) fn slot(&self) -> &Slot {
        &self.slot
    }

    /// How to reach it without. For short: whoever looks the inode up waits.
    pub(super) fn way(&self) -> MutexGuard<'_, Way> {
        self.way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether somebody still counts on it. Asked under the shard's lock.
    fn is_counted(&self) -> bool {
        self.node == NodeId::ROOT
            || self.lookups.load(Ordering::Relaxed) > 0
            || self.children.load(Ordering::Relaxed) > 0
    }

    fn parent(&self) -> Option<NodeId> {
        match &*self.way() {
            Way::Name(place) => Some(place.parent),
            _ => None,
        }
    }

    /// What sort of file it is: never changes.
    pub(super) fn kind(&self) -> FileType {
        self.kind
    }

    /// Whether `identity`, which has this inode's key, is this inode beyond doubt.
    fn is(&self, identity: &Identity) -> bool {
        // A descriptor keeps the number from being given to another. A birth that differs all
        // the same is either a file system that moves it (overlayfs when it copies up) or a
        // `statx` from before the inode was there.
        self.has_birth_of(identity) && (self.slot.is_full() || self.is_settled())
    }

    /// Whether `identity` may be this inode, and is if [`is_settled`](Self::is_settled).
    pub(super) fn may_be(&self, identity: &Identity) -> bool {
        self.key == identity.key && self.has_birth_of(identity)
    }

    fn has_birth_of(&self, identity: &Identity) -> bool {
        self.birth.load(Ordering::Relaxed) == birth_of(identity)
    }

    /// Whether number and birth are enough to tell it from all that come later.
    pub(super) fn is_settled(&self) -> bool {
        self.settled.load(Ordering::Relaxed)
    }

    /// Takes over what is now known for sure to describe this inode.
    ///
    /// Inode numbers are reused, and births come from a clock with ticks of milliseconds: a
    /// file made, removed and made again within one tick may agree in both. But once the clock
    /// is past the birth of an inode that is still there, whatever takes its number later is
    /// born later. From then on number and birth are enough; before, handles are compared.
    pub(super) fn settle(&self, identity: &Identity) {
        let birth = birth_of(identity);
        self.birth.store(birth, Ordering::Relaxed);
        self.settled.store(identity.is_settled(), Ordering::Relaxed);
    }
}

impl Identity {
    /// Whether whatever takes this number later is born later. See [`Inode::settle`].
    pub(super) fn is_settled(&self) -> bool {
        let age = |birth| now().map(|now| now.saturating_sub(birth));
        self.birth
            .and_then(age)
            .is_some_and(|age| age > SETTLED_AFTER)
    }
}

fn birth_of(identity: &Identity) -> i64 {
    identity.birth.unwrap_or(NO_BIRTH)
}

fn now() -> Option<i64> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
    i64::try_from(since.as_nanos()).ok()
}

/// What a new inode begins with.
#[derive(Debug)]
pub(super) struct New {
    pub(super) fd: Option<OwnedFd>,
    pub(super) way: Way,
}

impl New {
    /// With a descriptor; the way is learned when its name is seen.
    pub(super) fn open(fd: OwnedFd) -> Self {
        Self {
            fd: Some(fd),
            way: Way::None,
        }
    }
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

/// How deep a directory may lie for its names to be followed: a circle ends here.
pub(super) const DEEPEST: usize = 1 << 17;

/// All inodes that the guest knows.
#[derive(Debug)]
pub(super) struct Store {
    by_key: Box<[Mutex<Keys>]>,
    by_node: Box<[RwLock<Nodes>]>,
    root: Arc<Inode>,
    /// The next node id. 64 bits are not used up.
    next: AtomicU64,
    /// Inodes in the store that have a descriptor. Orders nothing; a budget goes by it.
    descriptors: AtomicUsize,
    /// Inodes in the store, the root included. Orders nothing; a bound goes by it.
    count: AtomicUsize,
    clock: Clock,
    changes: Changes,
}

impl Store {
    /// A store that knows the root alone, open as `fd` for ever.
    pub(super) fn new(identity: &Identity, fd: OwnedFd) -> Self {
        let inode = Inode::new(identity, NodeId::ROOT, Slot::full(fd), Way::None);
        let root = Arc::new(inode);
        let store = Self {
            by_key: (0..SHARDS).map(|_| Mutex::default()).collect(),
            by_node: (0..SHARDS).map(|_| RwLock::default()).collect(),
            root,
            next: AtomicU64::new(NodeId::ROOT.0 + 1),
            descriptors: AtomicUsize::new(0),
            count: AtomicUsize::new(0),
            clock: Clock::new(),
            changes: Changes::new(),
        };
        store.insert(&mut store.keys(&identity.key), Arc::clone(&store.root));
        store
    }

    /// The inode that `node` stands for, if the guest has it.
    pub(super) fn get(&self, node: NodeId) -> Option<Arc<Inode>> {
        let known = self.any(node)?;
        // Those that are here for their children alone are not the guest's.
        let had = known.node == NodeId::ROOT || known.lookups.load(Ordering::Relaxed) > 0;
        had.then_some(known)
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

    /// The inode that goes by `identity`'s key, if it may be it.
    pub(super) fn peek(&self, identity: &Identity) -> Option<Arc<Inode>> {
        let keys = self.keys(&identity.key);
        let ByKey(inode) = keys.get(&identity.key)?;
        inode.may_be(identity).then(|| Arc::clone(inode))
    }

    /// Finds or adds an inode without opening it, and counts one lookup of it. `None` if it may
    /// be known, and it takes more than `identity` to tell. A new one can't be reached before
    /// [`see_new`](Self::see_new).
    pub(super) fn add_unopened(&self, identity: &Identity) -> Option<Arc<Inode>> {
        let mut keys = self.keys(&identity.key);
        if let Some(ByKey(known)) = keys.get(&identity.key) {
            let known = known.is(identity).then_some(known)?;
            count_up(&keys, known);
            return Some(Arc::clone(known));
        }
        Some(self.add(&mut keys, identity, None, Way::None))
    }

    /// Finds or adds an inode that is open at this moment, and counts one lookup of it. Where a
    /// known inode goes by the same key, `same` tells by system calls whether it is the one.
    pub(super) fn admit(
        &self,
        identity: &Identity,
        new: New,
        same: impl FnOnce(&Inode, &New) -> bool,
    ) -> Arc<Inode> {
        let mut keys = self.keys(&identity.key);
        if let Some(ByKey(known)) = keys.get(&identity.key) {
            if known.is(identity) || same(known, &new) {
                count_up(&keys, known);
                known.settle(identity);
                let known = Arc::clone(known);
                drop(keys);
                return known;
            }
            // What had this number before is no more. Its node id stays with who has it.
            keys.remove(&identity.key);
        }
        self.add(&mut keys, identity, new.fd, new.way)
    }

    fn add(
        &self,
        keys: &mut Keys,
        identity: &Identity,
        fd: Option<OwnedFd>,
        way: Way,
    ) -> Arc<Inode> {
        let node = NodeId(self.next.fetch_add(1, Ordering::Relaxed));
        let slot = fd.map_or_else(Slot::empty, Slot::full);
        let inode = Arc::new(Inode::new(identity, node, slot, way));
        self.insert(keys, Arc::clone(&inode));
        inode
    }

    /// Takes note that `inode`, which the guest has, went by `name` in `parent` since `moment`,
    /// unless names in `parent` have changed meanwhile.
    pub(super) fn see(&self, inode: &Inode, parent: &Inode, name: &CStr, moment: Moment) {
        self.see_if(inode, parent, name, 0, || moment.lasts(&self.changes));
    }

    /// As [`see`](Self::see), for an inode that was just added without being opened; `print` is
    /// as in [`Place`]. Answers whether it can be reached now.
    pub(super) fn see_new(
        &self,
        inode: &Inode,
        parent: &Inode,
        name: &CStr,
        print: u64,
        moment: Moment,
    ) -> bool {
        self.see_if(inode, parent, name, print, || moment.lasts(&self.changes));
        inode.slot.is_full() || !matches!(&*inode.way(), Way::None)
    }

    /// As [`see`](Self::see), for who changes the name.
    pub(super) fn rename(&self, inode: &Inode, parent: &Inode, name: &CStr, _: &Changing<'_>) {
        self.see_if(inode, parent, name, 0, || true);
    }

    fn see_if(
        &self,
        inode: &Inode,
        parent: &Inode,
        name: &CStr,
        print: u64,
        valid: impl FnOnce() -> bool,
    ) {
        let settled = match &*inode.way() {
            Way::Name(place) => place.parent == parent.node && *place.name == *name,
            Way::None => inode.node == NodeId::ROOT || inode.node == parent.node,
            Way::Handle { .. } | Way::Forgotten => true,
        };
        if settled || !self.adopt(parent) {
            return;
        }
        let place = Place {
            parent: parent.node,
            name: name.into(),
            print,
        };
        if let Some(left) = self.put(inode, place, valid) {
            self.leave(left);
        }
        if inode.children.load(Ordering::Relaxed) > 0 {
            self.unwind(inode.node, parent.node);
        }
    }

    /// Makes `place` the way to `inode`; answers which parent has a child less now.
    fn put(&self, inode: &Inode, place: Place, valid: impl FnOnce() -> bool) -> Option<NodeId> {
        let mut way = inode.way();
        // Asked under the lock: who changes the name says so before he comes here.
        if !valid() {
            return Some(place.parent);
        }
        let left = match &mut *way {
            Way::Handle { .. } | Way::Forgotten => return Some(place.parent),
            Way::Name(old) => {
                let print = old.print;
                Some(std::mem::replace(old, Place { print, ..place }).parent)
            }
            Way::None => {
                *way = Way::Name(place);
                None
            }
        };
        if inode.slot.is_full() {
            self.clock.add(inode);
        }
        left
    }

    /// Takes note that `inode` has lost `name` in `parent`. If that was the way to it, its
    /// descriptor, which the caller uses, stays from now on.
    pub(super) fn lose(&self, inode: &Inode, parent: &Inode, name: &CStr, _: &Changing<'_>) {
        let left = {
            let mut way = inode.way();
            match &*way {
                Way::Name(place) if place.parent == parent.node && *place.name == *name => {
                    *way = Way::None;
                    parent.node
                }
                _ => return,
            }
        };
        self.leave(left);
    }

    /// Which changes of names were known when this was called: before the name is looked at.
    pub(super) fn moment(&self, parent: &Inode) -> Moment {
        self.changes.moment(parent.node)
    }

    /// Announces that names in two directories change, until the answer is dropped. To be called
    /// while the descriptors of the inodes concerned are in use.
    pub(super) fn changing(&self, parents: [&Inode; 2]) -> Changing<'_> {
        self.changes.begin(parents.map(|parent| parent.node))
    }

    /// How many changes of names there have been.
    pub(super) fn changes(&self) -> u64 {
        self.changes.count()
    }

    /// Makes `way`, which `inode`'s guard is for, the way to it.
    pub(super) fn change_way(&self, mut guard: MutexGuard<'_, Way>, way: Way) {
        let old = std::mem::replace(&mut *guard, way);
        drop(guard);
        if let Way::Name(place) = old {
            self.leave(place.parent);
        }
    }

    /// Breaks a circle of names, which can only come of names that are outdated: directories
    /// that the host moved about. `node` is now known to be in `parent`.
    fn unwind(&self, node: NodeId, parent: NodeId) {
        let mut at = self.any(parent);
        for _ in 0..DEEPEST {
            let Some(inode) = at else {
                return;
            };
            let Some(up) = inode.parent() else {
                return;
            };
            if up == node {
                let way = inode.way();
                if matches!(&*way, Way::Name(place) if place.parent == node) {
                    self.change_way(way, Way::None);
                }
                return;
            }
            at = self.any(up);
        }
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
        let way = inode.way();
        if matches!(*way, Way::Forgotten) {
            return Err(fd);
        }
        match inode.slot.fill(fd) {
            Ok(borrowed) => {
                self.descriptors.fetch_add(1, Ordering::Relaxed);
                if !matches!(*way, Way::None) {
                    self.clock.add(inode);
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
        _way: &MutexGuard<'_, Way>,
        fd: Borrowed<'_>,
    ) -> Option<OwnedFd> {
        let taken = fd.take();
        if taken.is_some() {
            self.descriptors.fetch_sub(1, Ordering::Relaxed);
        }
        taken
    }

    /// Puts `inode` at the end of those that may be closed, if it has a descriptor and a way.
    pub(super) fn line_up(&self, inode: &Inode) {
        let way = inode.way();
        if inode.slot.is_full() && !matches!(*way, Way::None | Way::Forgotten) {
            self.clock.add(inode);
        }
    }

    /// Which descriptors go first.
    pub(super) fn clock(&self) -> &Clock {
        &self.clock
    }

    /// Counts one child more of `parent`; answers whether that is still in the store.
    fn adopt(&self, parent: &Inode) -> bool {
        let _keys = self.keys(&parent.key);
        let here = parent.is_counted();
        if here {
            parent.children.fetch_add(1, Ordering::Relaxed);
        }
        here
    }

    /// Counts one child less of `node`, and if that ends it, of what it was a child of.
    fn leave(&self, node: NodeId) {
        let mut next = Some(node);
        while let Some(parent) = next.and_then(|node| self.any(node)) {
            let mut keys = self.keys(&parent.key);
            let before = parent.children.load(Ordering::Relaxed);
            if before == 0 {
                return;
            }
            parent.children.store(before - 1, Ordering::Relaxed);
            next = None;
            if !parent.is_counted() {
                let removed = self.remove(&mut keys, &parent);
                drop(keys);
                next = self.bury(&parent);
                drop(removed);
            }
        }
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
        self.forget_inode(&inode, count);
    }

    fn forget_inode(&self, inode: &Arc<Inode>, count: u64) {
        let mut keys = self.keys(&inode.key);
        let before = inode.lookups.load(Ordering::Relaxed);
        let left = before.saturating_sub(count);
        inode.lookups.store(left, Ordering::Relaxed);
        // `before` is 0 if another thread has removed it since `get`.
        if before == 0 || inode.is_counted() {
            return;
        }
        let removed = self.remove(&mut keys, inode);
        drop(keys);
        if let Some(parent) = self.bury(inode) {
            self.leave(parent);
        }
        // Descriptors are closed outside of the locks.
        drop(removed);
    }

    /// Ends what an inode that was removed still has; answers whose child it was.
    fn bury(&self, inode: &Inode) -> Option<NodeId> {
        let mut way = inode.way();
        let old = std::mem::replace(&mut *way, Way::Forgotten);
        if inode.slot.is_full() {
            self.descriptors.fetch_sub(1, Ordering::Relaxed);
        }
        drop(way);
        if inode.slot.mark(false) {
            self.clock.one_is_gone(inode.node, |node| self.any(node));
        }
        match old {
            Way::Name(place) => Some(place.parent),
            _ => None,
        }
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
                if let Some(inode) = self.any(node).filter(|_| node != NodeId::ROOT) {
                    let keys = self.keys(&inode.key);
                    inode.children.store(0, Ordering::Relaxed);
                    // One that is here for its children alone has no lookup to give back.
                    inode.lookups.fetch_max(1, Ordering::Relaxed);
                    drop(keys);
                    self.forget_inode(&inode, u64::MAX);
                }
            }
        }
    }

    /// How many inodes the guest has, the root included.
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
        self.count.fetch_add(1, Ordering::Relaxed);
        if inode.slot.is_full() {
            self.descriptors.fetch_add(1, Ordering::Relaxed);
        }
        self.nodes(inode.node)
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(ByNode(Arc::clone(&inode)));
        keys.insert(ByKey(inode));
    }

    fn remove(&self, keys: &mut Keys, inode: &Inode) -> Option<ByNode> {
        remove_key(keys, inode);
        let mut nodes = self
            .nodes(inode.node)
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let removed = nodes.take(&inode.node);
        if removed.is_some() {
            self.count.fetch_sub(1, Ordering::Relaxed);
        }
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
