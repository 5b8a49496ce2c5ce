//! The open files of an overlay, by the guest's handles.
//!
//! A READ or WRITE finds the host's file here, as it would in the layer itself: by one search, and
//! without looking for the node. A file that was opened in a lower layer and copied up afterwards is
//! opened again in the upper layer, and found as that from then on. The invariant: what is found for
//! a handle is open in the layer that has the file's data.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use rustc_hash::FxHashMap;
use rustix::io::Errno;

use super::node::{Node, Real};
use crate::fs::{Handle, NodeId, Result};
use crate::io::File;

/// A file that is open in a layer.
#[derive(Clone, Debug)]
pub(super) struct InLayer {
    pub(super) real: Real,
    /// The layer's handle.
    pub(super) handle: Handle,
    /// The file of the host behind the handle, if it is one.
    pub(super) file: Option<File>,
    /// The same for a WRITE.
    pub(super) file_to_change: Option<File>,
}

/// What a handle stands for.
#[derive(Debug)]
pub(super) struct Open {
    pub(super) node: Arc<Node>,
    pub(super) first: InLayer,
    /// The file in the upper layer, if it was copied up and used after that.
    pub(super) reopened: Option<Box<InLayer>>,
}

impl Open {
    /// The open file in the layer that has the data, if it is open there.
    fn current(&self) -> Option<&InLayer> {
        if self.node.is_still_top(self.first.real) {
            Some(&self.first)
        } else {
            self.reopened.as_deref()
        }
    }
}

/// Where the file of a handle is open.
#[derive(Debug)]
pub(super) enum Current {
    /// As this inode, by this handle, of the layer that has the data.
    Open(Real, Handle),
    /// In a lower layer only. The node has been copied up since.
    CopiedUp(Arc<Node>),
}

/// Enough for a handful of workers to collide rarely.
const SHARDS: u64 = 32;

type Shard = RwLock<FxHashMap<u64, Open>>;

/// All files that the guest has open.
#[derive(Debug)]
pub(super) struct OpenFiles {
    shards: Box<[Shard]>,
}

impl Default for OpenFiles {
    fn default() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Shard::default()).collect(),
        }
    }
}

impl OpenFiles {
    pub(super) fn add(&self, handle: Handle, open: Open) {
        let mut shard = self
            .shard(handle)
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        shard.insert(handle.0, open);
    }

    /// The host's file behind a handle, if it is one and is known.
    pub(super) fn host_file(&self, node: NodeId, handle: Handle) -> Option<File> {
        self.with(node, handle, |open| open.current()?.file.clone())
            .ok()?
    }

    /// As [`host_file`](Self::host_file), to be changed.
    pub(super) fn host_file_to_change(&self, node: NodeId, handle: Handle) -> Option<File> {
        self.with(node, handle, |open| open.current()?.file_to_change.clone())
            .ok()?
    }

    /// Where the file of a handle is open.
    pub(super) fn current(&self, node: NodeId, handle: Handle) -> Result<Current> {
        self.with(node, handle, |open| match open.current() {
            Some(current) => Current::Open(current.real, current.handle),
            None => Current::CopiedUp(Arc::clone(&open.node)),
        })
    }

    /// Records that the file of a handle is open in the upper layer too. Returns false if the handle
    /// is unknown, or another thread was first.
    pub(super) fn set_reopened(&self, handle: Handle, opened: InLayer) -> bool {
        let mut shard = self
            .shard(handle)
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let open = shard.get_mut(&handle.0);
        let Some(open) = open.filter(|open| open.reopened.is_none()) else {
            return false;
        };
        open.reopened = Some(Box::new(opened));
        true
    }

    pub(super) fn remove(&self, node: NodeId, handle: Handle) -> Result<Open> {
        let mut shard = self
            .shard(handle)
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if shard.get(&handle.0).is_none_or(|open| open.node.id != node) {
            return Err(Errno::BADF);
        }
        let open = shard.remove(&handle.0).ok_or(Errno::BADF)?;
        if shard.capacity() > 64 && shard.len() < shard.capacity() / 4 {
            shard.shrink_to_fit();
        }
        Ok(open)
    }

    /// How many files are open.
    pub(super) fn count(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).len()).sum()
    }

    /// Calls `each` with all handles.
    pub(super) fn each_handle(&self, each: &mut dyn FnMut(Handle)) {
        for shard in &self.shards {
            lock(shard).keys().for_each(|handle| each(Handle(*handle)));
        }
    }

    /// The node of a handle, and the inode and handle of the layer that it is open as.
    pub(super) fn open_in(&self, handle: Handle) -> Option<(Arc<Node>, Real, Handle)> {
        let shard = lock(self.shard(handle));
        let open = shard.get(&handle.0)?;
        let current = open.current().unwrap_or(&open.first);
        Some((Arc::clone(&open.node), current.real, current.handle))
    }

    pub(super) fn clear(&self) {
        for shard in &self.shards {
            let mut shard = shard.write().unwrap_or_else(PoisonError::into_inner);
            let open = std::mem::take(&mut *shard);
            drop(shard);
            drop(open);
        }
    }

    fn with<T>(&self, node: NodeId, handle: Handle, read: impl FnOnce(&Open) -> T) -> Result<T> {
        let shard = lock(self.shard(handle));
        match shard.get(&handle.0) {
            Some(open) if open.node.id == node => Ok(read(open)),
            _ => Err(Errno::BADF),
        }
    }

    fn shard(&self, handle: Handle) -> &Shard {
        &self.shards[usize::try_from(handle.0 % SHARDS).unwrap_or_default()]
    }
}

fn lock(shard: &Shard) -> RwLockReadGuard<'_, FxHashMap<u64, Open>> {
    shard.read().unwrap_or_else(PoisonError::into_inner)
}
