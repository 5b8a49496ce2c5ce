//! Which file system is mounted where: read by every request, changed rarely.
//!
//! A request takes the table of its thread's shard and keeps it until it is served, so nobody waits
//! for anybody, and the counters of different threads are in different cache lines. The invariant: once
//! [`Shards::replace`] has returned, no request begins with an earlier table.

use std::cell::Cell;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::io::Errno;

use super::points::{Point, Points};
use crate::fs::{FileSystem, NodeId, Result};

/// A node id has the number of the mount above these bits. Number 0 is that of the points.
pub(super) const MOUNT_SHIFT: u32 = 48;

/// A file system, and where it is mounted.
#[derive(Clone, Debug)]
pub(super) struct Mount {
    pub(super) fs: Arc<dyn FileSystem>,
    pub(super) point: u64,
}

/// What is mounted.
#[derive(Clone, Debug)]
pub(super) struct Table {
    pub(super) points: Arc<Points>,
    /// By number, from 1 on. The number of a mount that was removed is not used again.
    pub(super) mounts: Vec<Option<Mount>>,
}

/// What a node id refers to.
#[derive(Debug)]
pub(super) enum Target<'a> {
    /// A directory that only leads to mount points.
    Point(&'a Point),
    /// A node of a mounted file system.
    Node(At<'a>),
}

/// A node of a mounted file system.
#[derive(Clone, Copy, Debug)]
pub(super) struct At<'a> {
    pub(super) mount: u16,
    pub(super) fs: &'a Arc<dyn FileSystem>,
    pub(super) node: NodeId,
}

impl Table {
    pub(super) fn new() -> Self {
        Self {
            points: Arc::new(Points::new()),
            mounts: Vec::new(),
        }
    }

    pub(super) fn mount(&self, number: u16) -> Option<&Mount> {
        self.mounts
            .get(usize::from(number).checked_sub(1)?)?
            .as_ref()
    }

    /// All mounts.
    pub(super) fn all(&self) -> impl Iterator<Item = &Mount> {
        self.mounts.iter().flatten()
    }

    /// What the guest refers to by `node`; `ESTALE` for what was unmounted.
    pub(super) fn resolve(&self, node: NodeId) -> Result<Target<'_>> {
        let number = u16::try_from(node.0 >> MOUNT_SHIFT).map_err(|_large| Errno::STALE)?;
        let inner = NodeId(node.0 & ((1 << MOUNT_SHIFT) - 1));
        if number != 0 {
            return self.node(number, inner).map(Target::Node);
        }
        let point = self.points.get(inner.0).ok_or(Errno::STALE)?;
        match point.mount {
            // The root, and a directory on which something has been mounted since.
            Some(mount) => self.node(mount, NodeId::ROOT).map(Target::Node),
            None => Ok(Target::Point(point)),
        }
    }

    /// A node of the mount with this number.
    pub(super) fn node(&self, mount: u16, node: NodeId) -> Result<At<'_>> {
        let fs = &self.mount(mount).ok_or(Errno::STALE)?.fs;
        Ok(At { mount, fs, node })
    }

    /// The point at a node, if something is mounted below it.
    pub(super) fn point_at(&self, at: &At<'_>) -> Option<&Point> {
        self.points.at(at.mount, at.node)
    }

    /// What the guest calls the node of a mount. `EOVERFLOW` for a number that leaves no room for the
    /// mount's.
    pub(super) fn outward(&self, mount: u16, node: NodeId) -> Result<NodeId> {
        if node.0 >> MOUNT_SHIFT != 0 {
            return Err(Errno::OVERFLOW);
        }
        let is_root = |mount: &Mount| mount.point == super::points::ROOT;
        if node == NodeId::ROOT && self.mount(mount).is_some_and(is_root) {
            return Ok(NodeId::ROOT);
        }
        Ok(NodeId(u64::from(mount) << MOUNT_SHIFT | node.0))
    }
}

/// As many shards as threads can use at once without sharing, on all but the largest servers.
const SHARDS: usize = 16;

/// The table, once for each shard.
pub(super) struct Shards([Shard; SHARDS]);

/// Pairs of cache lines are fetched together, hence twice the 64 bytes of one.
#[repr(align(128))]
struct Shard(Mutex<Arc<Table>>);

thread_local! {
    static SHARD: Cell<Option<usize>> = const { Cell::new(None) };
}

/// The shard of the calling thread.
fn shard() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    SHARD.with(|shard| {
        shard.get().unwrap_or_else(|| {
            let number = NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS;
            shard.set(Some(number));
            number
        })
    })
}

impl Shards {
    pub(super) fn new(table: &Table) -> Self {
        Self(std::array::from_fn(|_| {
            Shard(Mutex::new(Arc::new(table.clone())))
        }))
    }

    /// The table for the request that the calling thread serves.
    pub(super) fn get(&self) -> Arc<Table> {
        let Shard(shard) = &self.0[shard()];
        Arc::clone(&shard.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Replaces the table for all requests that begin from here on.
    pub(super) fn replace(&self, table: &Table) {
        for Shard(shard) in &self.0 {
            let new = Arc::new(table.clone());
            let mut current = shard.lock().unwrap_or_else(PoisonError::into_inner);
            let old = std::mem::replace(&mut *current, new);
            drop(current);
            drop(old);
        }
    }
}

impl fmt::Debug for Shards {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_id_without_room_for_the_mount_is_refused() {
        let table = Table::new();
        assert_eq!(table.outward(3, NodeId(7)), Ok(NodeId(3 << 48 | 7)));
        let largest = NodeId((1 << 48) - 1);
        assert_eq!(table.outward(u16::MAX, largest), Ok(NodeId(u64::MAX)));
        let larger = NodeId(1 << 48);
        assert_eq!(table.outward(3, larger), Err(Errno::OVERFLOW));
    }

    #[test]
    fn node_of_no_mount_is_stale() {
        let table = Table::new();
        for node in [2, 1 << 48 | 1, u64::MAX, 0] {
            let found = table.resolve(NodeId(node)).map(|_| ());
            assert_eq!(found, Err(Errno::STALE), "{node:#x}");
        }
        assert!(matches!(table.resolve(NodeId::ROOT), Ok(Target::Point(_))));
    }
}
