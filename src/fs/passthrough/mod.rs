//! The passthrough file system: serves a directory of the host to a guest.
//!
//! This file has the composition: the parts that [`Passthrough`] owns, and the list of modules.
//! `construct` builds it and `file_system` implements the FUSE operations. `inodes` maps node ids
//! to inodes, `inode_ref` and `reopen` turn an inode into a descriptor, `lookup` turns names into
//! inodes, `handles` has the open files, and `credentials` sets the owner of new files. The
//! invariant: every access starts from a descriptor or a file handle that was derived from the
//! shared directory, one path component at a time.

mod acl;
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
    options: Options,
    /// `/proc/self/fd`, `O_PATH`.
    proc_fds: OwnedFd,
    inodes: InodeStore,
    reopen_policy: ReopenPolicy,
    /// The shared file, if the share is a single file and the root is a directory made for it.
    single_file: Option<OwnedFd>,
    handles: Handles,
    handleless: HandlelessOpens,
    closed_fds: ClosedFdCache,
    closer: Closer,
    terms: CurrentTerms,
    fd_limits: FdLimits,
    sharing: Sharing,
    /// Limits how many open directories keep their entry buffers.
    dirent_cache: DirentCache,
    locks: Locks,
    credential_policy: CredentialPolicy,
    /// The host uses SELinux, so it handles SELinux labels itself.
    selinux: bool,
    /// Locks were released so that the destination of a migration can take them. See `migration`.
    locks_released: AtomicBool,
    /// Another process started this session.
    inherited: AtomicBool,
    /// The guest's state, which outlives this process.
    table: Arc<Table>,
    /// What earlier server processes recorded about requests that are replayed.
    previous_attempts: PreviousAttempts,
    paths: Paths,
}

impl Passthrough {
    /// The table of the guest's state.
    #[must_use]
    pub fn table(&self) -> &Arc<Table> {
        &self.table
    }

    /// Declares that the root is a directory made for `file`, an `O_PATH` descriptor of a file on
    /// another file system. SYNCFS of the root then syncs the file system of `file`.
    pub fn is_for(&mut self, file: OwnedFd) {
        self.single_file = Some(file);
    }

    /// The number of inodes in the store: those that the guest has looked up and not forgotten, the
    /// root, and the forgotten ones that are kept.
    #[must_use]
    pub fn known_inodes(&self) -> usize {
        self.inodes.len()
    }

    /// The number of inodes that the guest has forgotten and can still find by a file handle.
    #[must_use]
    pub fn forgotten_inodes(&self) -> usize {
        self.inodes.forgotten()
    }

    /// The number of known inodes that have a descriptor at this moment.
    #[must_use]
    pub fn inode_descriptors(&self) -> usize {
        self.inodes.descriptors()
    }

    /// The number of files and directories that the guest has open.
    #[must_use]
    pub fn open_handles(&self) -> usize {
        self.handles.len()
    }

    /// Prepares the calling thread if that has not been done.
    fn prepare(&self) -> Result<()> {
        credentials::prepare_thread(&self.proc_fds)
    }

    /// The generation number that tells this session's node ids from those of other sessions.
    fn generation(&self) -> u64 {
        self.table().generation()
    }

    /// Ends everything that belongs to the guest's session except its inodes.
    fn end_session(&self) {
        self.locks_released.store(false, Ordering::Relaxed);
        self.locks.clear();
        self.handles.clear();
        self.handleless.clear();
        self.closed_fds.clear();
        self.terms.set(&NegotiatedTerms::default());
    }

    /// Fails with `EROFS` if the share is read-only. Every operation that changes something calls
    /// it first.
    fn writable(&self) -> Result<()> {
        if self.options.readonly {
            Err(Errno::ROFS)
        } else {
            Ok(())
        }
    }
}
