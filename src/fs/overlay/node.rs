//! Nodes: what a guest knows of a file or directory, and which inodes of the layers are behind it.
//!
//! A node keeps its id, and the inode number that it reports, when it is copied up. The invariant:
//! each [`Real`] in a node's [`Backing`] counts as one lookup in its layer, which the node gives back
//! when it is dropped from the table.

use std::ffi::{CStr, CString};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use smallvec::SmallVec;

use super::UPPER;
use crate::fs::NodeId;

/// An inode of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Real {
    /// Index of the layer, 0 being the topmost one.
    pub(super) layer: usize,
    /// The inode within it.
    pub(super) node: NodeId,
}

/// The inodes that a directory is merged from, topmost first; one for anything else.
pub(super) type Stack = SmallVec<[Real; 2]>;

/// The inodes behind a node.
#[derive(Debug)]
pub(super) struct Backing {
    pub(super) stack: Stack,
    /// What a copied-up file was copied from, to which handles from before may still refer, and its
    /// inode number in the upper layer.
    pub(super) origin: Option<(Real, u64)>,
}

/// Where a node is in the tree.
#[derive(Clone, Debug)]
pub(super) struct Location {
    pub(super) parent: Arc<Node>,
    pub(super) name: CString,
}

/// A file or directory of the overlay.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) id: NodeId,
    pub(super) is_dir: bool,
    /// The inode number that the guest sees.
    number: AtomicU64,
    /// The guest's lookups, one for each operation that uses the node by name, and one for each node
    /// whose location has this one as its parent.
    pub(super) refs: AtomicU64,
    /// The guest has removed its name, or its only name if it is not in the upper layer.
    removed: AtomicBool,
    /// Whether `backing` has changed since the node is known, in a file.
    copied_up: AtomicBool,
    backing: RwLock<Backing>,
    /// `None` for the root, for removed nodes, and for files of the upper layer, which may have
    /// several names and need none.
    location: Mutex<Option<Location>>,
    /// Held while names in this directory change, or are about to be looked at and changed.
    names: Mutex<()>,
    /// Held while the node is copied up.
    copying: Mutex<()>,
}

impl Node {
    pub(super) fn new(
        id: NodeId,
        is_dir: bool,
        number: u64,
        stack: Stack,
        location: Option<Location>,
    ) -> Self {
        Self {
            id,
            is_dir,
            number: number.into(),
            refs: AtomicU64::new(1),
            removed: AtomicBool::new(false),
            copied_up: AtomicBool::new(false),
            backing: RwLock::new(Backing {
                stack,
                origin: None,
            }),
            location: Mutex::new(location),
            names: Mutex::default(),
            copying: Mutex::default(),
        }
    }

    /// The inode number that the guest sees.
    pub(super) fn number(&self) -> u64 {
        self.number.load(Ordering::Relaxed)
    }

    /// The topmost inode behind the node, which has its attributes and its data.
    pub(super) fn top(&self) -> Real {
        let backing = self.backing.read().unwrap_or_else(PoisonError::into_inner);
        // A node is created with at least one inode, and none is removed.
        backing.stack.first().copied().unwrap_or(Real {
            layer: usize::MAX,
            node: NodeId(0),
        })
    }

    /// Whether `real`, once the topmost inode behind a file, still is. Of a file that was copied up,
    /// only an inode of the upper layer is.
    pub(super) fn is_still_top(&self, real: Real) -> bool {
        real.layer == UPPER || !self.copied_up.load(Ordering::Acquire)
    }

    /// All inodes behind the node, topmost first.
    pub(super) fn stack(&self) -> Stack {
        let backing = self.backing.read().unwrap_or_else(PoisonError::into_inner);
        backing.stack.clone()
    }

    /// Whether a directory has several inodes behind it.
    pub(super) fn is_merged(&self) -> bool {
        let backing = self.backing.read().unwrap_or_else(PoisonError::into_inner);
        backing.stack.len() > 1
    }

    /// What a copied-up file was copied from, and its inode number in the upper layer.
    pub(super) fn origin(&self) -> Option<(Real, u64)> {
        let backing = self.backing.read().unwrap_or_else(PoisonError::into_inner);
        backing.origin
    }

    /// The node has been copied up to `upper`, whose inode number there is `number`. Of a directory,
    /// the layers below still count. A file that `is_separated` from other names gets a number of its
    /// own.
    pub(super) fn set_upper(&self, upper: Real, number: u64, is_separated: bool) {
        let mut backing = self.backing.write().unwrap_or_else(PoisonError::into_inner);
        if self.is_dir {
            backing.stack.insert(0, upper);
        } else {
            if is_separated {
                self.number.store(number, Ordering::Relaxed);
            }
            backing.origin = backing.stack.first().map(|lower| (*lower, number));
            backing.stack = Stack::from_slice(&[upper]);
            // Pairs with `is_still_top`: who sees it sees the stack, too.
            self.copied_up.store(true, Ordering::Release);
        }
    }

    /// Everything that counts as a lookup in a layer.
    pub(super) fn all(&self) -> Stack {
        let backing = self.backing.read().unwrap_or_else(PoisonError::into_inner);
        let origin = backing.origin.map(|(lower, _)| lower);
        backing.stack.iter().copied().chain(origin).collect()
    }

    pub(super) fn location(&self) -> Option<Location> {
        self.lock_location().clone()
    }

    /// Whether the node is `name` in `parent`.
    pub(super) fn is_at(&self, parent: &Self, name: &CStr) -> bool {
        self.lock_location()
            .as_ref()
            .is_some_and(|at| at.parent.id == parent.id && at.name.as_c_str() == name)
    }

    pub(super) fn set_location(&self, location: Option<Location>) -> Option<Location> {
        std::mem::replace(&mut *self.lock_location(), location)
    }

    fn lock_location(&self) -> MutexGuard<'_, Option<Location>> {
        self.location.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_removed(&self) -> bool {
        self.removed.load(Ordering::Acquire)
    }

    pub(super) fn set_removed(&self) {
        self.removed.store(true, Ordering::Release);
    }

    /// Keeps the names of this directory as they are.
    pub(super) fn lock_names(&self) -> MutexGuard<'_, ()> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets one thread at a time copy the node up.
    pub(super) fn lock_copying(&self) -> MutexGuard<'_, ()> {
        self.copying.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
