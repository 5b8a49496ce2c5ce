//! The passthrough file system: serves a directory of the host to a guest.
//!
//! [`Passthrough`] joins the operations with what is needed to continue a session elsewhere. Each
//! folder is a room with a struct of its own; `docs/architecture.md` has their order. `construct`
//! builds them, `file_system` and `recovery` implement the traits of [`crate::fs`]. The invariant:
//! every access starts from a descriptor or a file handle that was derived from the shared
//! directory, one path component at a time.

mod construct;
mod current_request;
mod descriptors;
mod error;
mod file_system;
mod handover;
mod ids;
mod inode_table;
mod inspect;
mod open_files;
mod ops;
mod options;
mod recovery;
#[cfg(test)]
mod tests;
mod xattr;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

pub use self::construct::check_shared;
pub use self::error::PassthroughError;
pub use self::handover::{PreviousProcess, Restored};
pub use self::ids::{IdMap, IdOverlap, IdRule, IdRuleError};
pub use self::options::{
    Cache, InodeFileHandles, MigrationMode, MigrationOptions, OnMigrationError, Options,
    descriptor_limit, raise_descriptor_limit, set_descriptor_limit,
};
pub use self::xattr::{XattrMap, XattrMapError, label_that_needs_privilege};

use self::descriptors::Descriptors;
use self::handover::Handover;
use self::ops::Operations;
use super::NegotiatedTerms;
use crate::state::Table;

/// A directory that is about to be shared.
#[derive(Debug)]
pub struct Shared {
    /// An `O_PATH` descriptor of the directory.
    pub root: OwnedFd,
    /// An `O_PATH` descriptor of `/proc/self/fd`. It stays usable after `/proc` has been unmounted.
    pub proc_fds: OwnedFd,
    /// The path to show in messages.
    pub path: PathBuf,
}

/// A host directory, served as a file system to a guest.
#[derive(Debug)]
pub struct Passthrough {
    ops: Operations,
    handover: Handover,
}

impl Passthrough {
    /// The table of the guest's state, which outlives this process.
    #[must_use]
    pub(crate) fn table(&self) -> &Arc<Table> {
        self.fds().inodes().table()
    }

    /// Declares that the root is a directory made for `file`, an `O_PATH` descriptor of a file on
    /// another file system. SYNCFS of the root then syncs the file system of `file`.
    pub fn set_single_file(&mut self, file: OwnedFd) {
        self.ops.set_single_file(file);
    }

    /// The number of inodes in the table: those that the guest has looked up and not forgotten, the
    /// root, and the forgotten ones that are kept.
    #[must_use]
    pub fn known_inodes(&self) -> usize {
        self.fds().inodes().len()
    }

    /// The number of inodes that the guest has forgotten and can still find by a file handle.
    #[must_use]
    pub fn forgotten_inodes(&self) -> usize {
        self.fds().inodes().forgotten()
    }

    /// The number of known inodes that have a descriptor at this moment.
    #[must_use]
    pub fn inode_descriptors(&self) -> usize {
        self.fds().inodes().descriptors()
    }

    /// The number of files and directories that the guest has open.
    #[must_use]
    pub fn open_handles(&self) -> usize {
        self.fds().files().handles().len()
    }

    fn fds(&self) -> &Descriptors {
        self.ops.fds()
    }

    /// Ends everything that belongs to the guest's session except its inodes.
    fn end_session(&self) {
        self.handover.end_session();
        self.fds().files().clear();
        self.ops.terms().set(&NegotiatedTerms::default());
    }
}

/// The guest's state doesn't end with the server. It ends with FORGET, RELEASE, or the guest's
/// session ([`reset`](crate::fs::FileSystem::reset)); otherwise the next server process resumes it.
impl Drop for Passthrough {
    fn drop(&mut self) {
        self.table().close();
    }
}
