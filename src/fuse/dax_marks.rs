//! Which files are marked for DAX (`FUSE_ATTR_DAX`): by their size, and by their name.
//!
//! Linux decides by the mark in the first reply about a node, and drops the node from its caches as
//! soon as another reply has another mark. GETATTR names no file, so what the name of a node has
//! decided is remembered while the guest knows the node. The invariant: the first name of a node
//! decides until the guest has forgotten the node, or its session ends.

use std::ffi::CStr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustc_hash::FxHashMap;

use crate::dax::DaxOptions;
use crate::fs::{Attributes, Entry, NodeId};

/// Parts of the table, each with a lock of its own.
const SHARDS: usize = 16;

/// A node whose name has decided.
#[derive(Clone, Copy, Debug)]
struct Known {
    /// How many replies about it the guest has to forget.
    lookups: u64,
    matches: bool,
}

/// The nodes whose names have decided. Empty without patterns of names.
#[derive(Debug, Default)]
pub(super) struct KnownNames([Mutex<FxHashMap<u64, Known>>; SHARDS]);

impl KnownNames {
    /// Counts a reply about `node`. Returns whether its first name matches.
    fn look_up(&self, node: NodeId, matches: impl FnOnce() -> bool) -> bool {
        let mut shard = self.shard(node);
        let known = shard.entry(node.0).or_insert_with(|| Known {
            lookups: 0,
            matches: matches(),
        });
        known.lookups = known.lookups.saturating_add(1);
        known.matches
    }

    fn get(&self, node: NodeId) -> Option<bool> {
        self.shard(node).get(&node.0).map(|known| known.matches)
    }

    /// The guest forgets `count` replies about `node`.
    pub(super) fn forget(&self, node: NodeId, count: u64) {
        let mut shard = self.shard(node);
        let Some(known) = shard.get_mut(&node.0) else {
            return;
        };
        known.lookups = known.lookups.saturating_sub(count);
        if known.lookups == 0 {
            shard.remove(&node.0);
        }
    }

    /// The guest has forgotten all.
    pub(super) fn clear(&self) {
        for shard in &self.0 {
            *lock(shard) = FxHashMap::default();
        }
    }

    fn shard(&self, node: NodeId) -> MutexGuard<'_, FxHashMap<u64, Known>> {
        let at = usize::try_from(node.0).unwrap_or(0) % SHARDS;
        lock(self.0.get(at).unwrap_or(&self.0[0]))
    }
}

fn lock(shard: &Mutex<FxHashMap<u64, Known>>) -> MutexGuard<'_, FxHashMap<u64, Known>> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Decides about files that replies describe.
#[derive(Clone, Copy, Debug)]
pub(super) struct DaxMarks<'a> {
    /// `None` if no file is marked.
    policy: Option<&'a DaxOptions>,
    known: &'a KnownNames,
}

impl<'a> DaxMarks<'a> {
    pub(super) fn new(policy: Option<&'a DaxOptions>, known: &'a KnownNames) -> Self {
        Self { policy, known }
    }

    /// Whether an inode that was looked up as `name`, or created, is marked. To be called once for
    /// each reply that the guest has to forget.
    pub(super) fn of_entry(self, entry: &Entry, name: &CStr) -> bool {
        self.decide(&entry.attributes, |policy| {
            let matches = || policy.names.matches(name);
            self.known.look_up(entry.node, matches)
        })
    }

    /// Whether `node`, which has these attributes, is marked.
    pub(super) fn of_attributes(self, node: NodeId, attributes: &Attributes) -> bool {
        self.decide(attributes, |policy| {
            // A node that a previous process has looked up counts as one without a name.
            let known = self.known.get(node);
            known.unwrap_or_else(|| policy.names.matches(c""))
        })
    }

    fn decide(self, attributes: &Attributes, by_name: impl FnOnce(&DaxOptions) -> bool) -> bool {
        let Some(policy) = self.policy else {
            return false;
        };
        if attributes.mode & libc::S_IFMT != libc::S_IFREG {
            return false;
        }
        // The name decides even while the file is small, as it may grow.
        let has_name = policy.names.are_all() || by_name(policy);
        has_name && attributes.size >= policy.marked_from
    }
}
