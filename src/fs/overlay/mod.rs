//! The overlay: several file systems seen as one, of which only the topmost is written.
//!
//! An overlay is stacked on its layers, which are file systems themselves: a file that lies in one
//! layer is read and written by that layer's own [`OpenFile`](crate::fs::OpenFile), so the engine
//! transfers a host's file as if there were no overlay. A lower file is copied to the upper layer
//! before it is changed. The format of the layers is that of the kernel's overlayfs.
//!
//! Locks, in the order in which they are taken:
//!
//! 1. a node's `copying`, while it is copied up; never two at once, as its parents come first;
//! 2. `renames`, by a rename between two directories;
//! 3. a directory's `names`, two of them in the order of their ids;
//! 4. the index of the node table, and then one of its shards; no call of a layer is made under
//!    either.
//!
//! The invariant: the lower layers are never changed, and a file appears in the upper layer only
//! when it is complete.

mod attributes;
mod construct;
mod copy_data;
mod copy_up;
mod create;
mod error;
mod file_system;
mod handles;
mod inspect;
mod layer;
mod listing;
mod lookup;
mod node;
mod open_files;
mod readdir;
mod remove;
mod rename;
mod table;
#[cfg(test)]
mod tests;
mod work;
mod xattrs;

use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

pub use self::construct::check;
pub use self::error::OverlayError;
pub use self::layer::XattrPrefix;

use self::handles::Handles;
use self::layer::Layer;
use self::node::{Real, Stack};
use self::table::NodeTable;
use super::{FileSystem, NodeId};
use crate::io::File;

/// A lower layer.
#[derive(Debug)]
pub struct Lower {
    /// Its file system; never written.
    pub fs: Arc<dyn FileSystem>,
    /// Identifies the host's file system that it is on (`st_dev`), or is `None` if it is none of the
    /// host's. Inode numbers of different ones are told apart.
    pub device: Option<u64>,
}

/// The upper layer: one file system that has both directories, so that what is complete can be
/// renamed from one to the other.
#[derive(Debug)]
pub struct Upper {
    /// The file system.
    pub fs: Arc<dyn FileSystem>,
    /// Identifies the host's file system that it is on (`st_dev`).
    pub device: Option<u64>,
    /// The path of the upper directory from the root of `fs`.
    pub directory: PathBuf,
    /// The path of the work directory from the root of `fs`.
    pub work: PathBuf,
}

/// The options of an overlay.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The prefix of the extended attributes that describe layers.
    pub xattr_prefix: XattrPrefix,
    /// Directories that lie in a lower layer can be renamed: the upper layer says where they lie. If
    /// not, renaming one fails with `EXDEV`, as with the kernel's overlayfs by default.
    pub redirect_dirs: bool,
    /// Copied data are made durable before they appear under their name.
    pub sync_copies: bool,
    /// Whether the guest gets extended attributes.
    pub xattr: bool,
    /// How many nodes the guest may know at the same time.
    pub max_inodes: usize,
    /// How long names stay valid in the guest.
    pub entry_ttl: Duration,
}

/// Layers, seen as one file system.
#[derive(Debug)]
pub struct Overlay {
    options: Options,
    /// The layers, topmost first. With an upper layer, that is the first.
    layers: Vec<Layer>,
    upper: Option<UpperLayer>,
    nodes: NodeTable,
    handles: Handles,
    /// Held during a rename between directories.
    renames: Mutex<()>,
}

/// What is known of the upper layer besides its file system.
#[derive(Debug)]
struct UpperLayer {
    directory: PathBuf,
    work: PathBuf,
    /// Where new inodes are prepared, while the layers can be reached.
    work_node: RwLock<Option<NodeId>>,
    /// For names in the work directory.
    next_name: AtomicU64,
    /// Keeps the lock on the work directory.
    _lock: Option<File>,
}

/// The index of the upper layer, if there is one.
const UPPER: usize = 0;

impl Overlay {
    fn layer(&self, real: Real) -> &dyn FileSystem {
        &*self.layers[real.layer.min(self.layers.len() - 1)].fs
    }

    /// Whether `real` is in the upper layer.
    fn is_upper(&self, real: Real) -> bool {
        real.layer == UPPER && self.upper.is_some()
    }

    /// Gives back lookups of inodes of the layers.
    fn forget_reals(&self, reals: Stack) {
        for real in reals {
            if real.node != NodeId::ROOT {
                self.layer(real).forget(real.node, 1);
            }
        }
    }
}
