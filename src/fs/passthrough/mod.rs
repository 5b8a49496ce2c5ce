//! The passthrough file system: a directory of the host.
//!
//! Composition and options, and the operations too small for a file of their own. Inodes are
//! held within reach by `holds`, known to the guest by `inodes`, found by `lookup`; open
//! files are `handles`; `credentials` says who creates. The invariant: nothing is reached
//! but by a descriptor or a file handle that began at the shared directory, one name at a time.

mod attributes;
mod closed_fd_cache;
mod closing;
mod construct;
mod credentials;
mod current_request;
mod dir_seqcount;
mod directory;
mod error;
mod extended_ops;
mod fd_evictor;
mod file_system;
mod forget;
mod handleless_open;
mod handles;
mod id_map;
mod inode;
mod inode_ref;
mod inodes;
mod limits;
mod locks;
mod lookup;
mod migration;
mod names;
mod opening;
mod options;
mod reopen;
mod replay;
mod restore;
mod retries;
mod revalidate;
mod security_labels;
mod sharing;
#[cfg(test)]
mod tests;
mod xattr;
mod xattr_map;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;

pub use self::construct::check_shared;
pub use self::error::PassthroughError;
pub use self::id_map::{IdMap, IdOverlap, IdRule, IdRuleError};
pub use self::inode_ref::InodeFileHandles;
pub use self::migration::{MigrationMode, MigrationOptions, OnMigrationError};
pub use self::options::{Cache, Options, raise_descriptor_limit, set_descriptor_limit};
pub use self::restore::{Past, Restored};
pub use self::security_labels::label_that_needs_privilege;
pub use self::xattr_map::{XattrMap, XattrMapError};

use self::closed_fd_cache::ClosedFdCache;
use self::closing::Closer;
use self::credentials::CredentialPolicy;
use self::directory::DirentCache;
use self::handleless_open::HandlelessOpens;
use self::handles::Handles;
use self::inode_ref::ReopenPolicy;
use self::inodes::InodeStore;
use self::limits::FdLimits;
use self::locks::Locks;
use self::opening::CurrentTerms;
use self::restore::PreviousAttempts;
use self::revalidate::Paths;
use self::sharing::Sharing;
use super::{NegotiatedTerms, Result};
use crate::state::Table;

/// A directory that is about to be shared.
#[derive(Debug)]
pub struct Shared {
    /// What is open on it, `O_PATH`.
    pub root: OwnedFd,
    /// What was `/proc/self/fd`, `O_PATH`, where there may be no `/proc` any more.
    pub proc_fds: OwnedFd,
    /// What messages call it.
    pub path: PathBuf,
}

/// A directory of the host, as a file system for a guest.
#[derive(Debug)]
pub struct Passthrough {
    options: Options,
    /// `/proc/self/fd`, `O_PATH`.
    proc_fds: OwnedFd,
    inodes: InodeStore,
    reopen_policy: ReopenPolicy,
    /// What the root was made for, if it is a directory for a single file.
    single_file: Option<OwnedFd>,
    handles: Handles,
    handleless: HandlelessOpens,
    closed_fds: ClosedFdCache,
    closer: Closer,
    terms: CurrentTerms,
    fd_limits: FdLimits,
    sharing: Sharing,
    /// DirentCache of directories that are kept.
    dirent_cache: DirentCache,
    locks: Locks,
    credential_policy: CredentialPolicy,
    /// Labels of SELinux are this host's business.
    selinux: bool,
    /// Locks were given up for another server to have them; see `moving`.
    locks_released: AtomicBool,
    /// The session is one that another process has begun.
    inherited: AtomicBool,
    /// What the guest holds, as it outlives this process.
    table: Arc<Table>,
    /// What is known of requests that another process had begun.
    previous_attempts: PreviousAttempts,
    paths: Paths,
}

impl Passthrough {
    /// The table of what the guest holds.
    #[must_use]
    pub fn table(&self) -> &Arc<Table> {
        &self.table
    }

    /// Says that the root is a directory that was made for `file`, `O_PATH`, which is on another
    /// file system: to sync the root is to sync that.
    pub fn is_for(&mut self, file: OwnedFd) {
        self.single_file = Some(file);
    }

    /// How many inodes the guest has looked up and not forgotten, the root included, and how many
    /// are remembered beside them.
    #[must_use]
    pub fn known_inodes(&self) -> usize {
        self.inodes.len()
    }

    /// How many of those the guest has given back, and may find again by a file handle.
    #[must_use]
    pub fn remembered_inodes(&self) -> usize {
        self.inodes.forgotten()
    }

    /// How many of those have a descriptor at this moment.
    #[must_use]
    pub fn inode_descriptors(&self) -> usize {
        self.inodes.descriptors()
    }

    /// How many files and directories the guest has open.
    #[must_use]
    pub fn open_handles(&self) -> usize {
        self.handles.len()
    }

    /// Prepares the calling thread, if it isn't.
    fn prepare(&self) -> Result<()> {
        credentials::prepare_thread(&self.proc_fds)
    }

    /// What handles of this run are told from those of another by.
    fn generation(&self) -> u64 {
        self.table().generation()
    }

    /// Ends all that belongs to a session of the guest but its inodes.
    fn end_session(&self) {
        self.locks_released.store(false, Ordering::Relaxed);
        self.locks.clear();
        self.handles.clear();
        self.handleless.clear();
        self.closed_fds.clear();
        self.terms.set(&NegotiatedTerms::default());
    }

    /// Asked by each operation that changes something, before it does.
    fn writable(&self) -> Result<()> {
        if self.options.readonly {
            Err(Errno::ROFS)
        } else {
            Ok(())
        }
    }
}
