//! Serves any file system that is written for fuse-backend-rs.
//!
//! [`Adapter`] is a [`FileSystem`](super::FileSystem) over a
//! [`fuse_backend_rs::api::filesystem::FileSystem`]: it translates node ids, handles, attributes
//! and errors, and lets file data go straight between the file system's file and the guest's pages
//! (`transfer`). What the guest holds is counted here (`lookups`, `handles`), so that nothing stays
//! in the file system when the session ends, and no guest can forget or release what it doesn't
//! have.
//!
//! The invariant: neither a call that blocks nor one that panics stops a worker.

mod convert;
mod core;
mod directory;
mod file_system;
mod forgets;
mod handles;
mod lookups;
mod open_object;
mod transfer;

#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;

use fuse_backend_rs::api::filesystem::{FileSystem as Trait, ROOT_ID};

use self::core::Core;

/// A file system of fuse-backend-rs that can be served.
pub trait Backend: Trait + Send + Sync + 'static {}

impl<F: Trait + Send + Sync + 'static> Backend for F {}

/// How an [`Adapter`] uses its file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// The file system's number of its root. Where that isn't 1, as in a RAFS v6 image, the file
    /// system's node 1 and the root exchange their numbers for the guest.
    pub root: u64,
    /// Whether calls of the file system may block, for a network, a disk or another process. They
    /// then run on threads that may wait, which costs two wake-ups a call. Without it they run on
    /// the worker, and delay all its other requests.
    pub may_block: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            root: ROOT_ID,
            may_block: true,
        }
    }
}

/// Serves a file system of fuse-backend-rs.
///
/// What that trait doesn't have, or this one, fails as for a file system that doesn't know the
/// operation: COPY_FILE_RANGE (the guest reads and writes instead), STATX (it uses GETATTR),
/// TMPFILE, SYNCFS; POLL, BMAP and DAX mappings, and commands of IOCTL other than those for flags
/// of inodes. SETLKW becomes SETLK, tried until it succeeds or is interrupted.
///
/// There is neither [`Replay`](super::Replay) nor [`Migrate`](super::Migrate): a file system of
/// fuse-backend-rs can't say what another process would need.
///
/// ```no_run
/// use std::sync::Arc;
///
/// use ringfsd::fs::fuse_backend::Adapter;
/// use ringfsd::service::{Service, ServiceOptions};
///
/// # fn serve(options: ServiceOptions) -> Result<(), Box<dyn std::error::Error>> {
/// /// A file system without a single file.
/// struct Empty;
///
/// impl fuse_backend_rs::api::filesystem::FileSystem for Empty {
///     type Inode = u64;
///     type Handle = u64;
/// }
///
/// let service = Service::new(Arc::new(Adapter::new(Empty)), options)?;
/// # drop(service);
/// # Ok(())
/// # }
/// ```
pub struct Adapter<F: Backend> {
    core: Arc<Core<F>>,
}

impl<F: Backend> Adapter<F> {
    /// An adapter for a file system whose root has number 1 and whose calls may block.
    #[must_use]
    pub fn new(fs: F) -> Self {
        Self::with_options(fs, Options::default())
    }

    /// An adapter that uses `fs` as `options` say.
    #[must_use]
    pub fn with_options(fs: F, options: Options) -> Self {
        Self {
            core: Arc::new(Core::new(fs, options)),
        }
    }

    /// The file system.
    #[must_use]
    pub fn file_system(&self) -> &F {
        self.core.fs()
    }

    /// How many lookups the guest holds, of all nodes but the root.
    #[must_use]
    pub fn lookups(&self) -> u64 {
        self.core.lookups().total()
    }

    /// How many files and directories the guest has open.
    #[must_use]
    pub fn open_files(&self) -> usize {
        self.core.handles().count()
    }
}

impl<F: Backend> Drop for Adapter<F> {
    fn drop(&mut self) {
        self.core.forgets().finish();
    }
}

impl<F: Backend> fmt::Debug for Adapter<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Adapter")
            .field("options", self.core.options())
            .field("lookups", self.core.lookups())
            .field("handles", self.core.handles())
            .finish_non_exhaustive()
    }
}
