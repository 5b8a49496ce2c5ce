//! Construction of a [`Passthrough`]: opens and checks the shared directory, and builds the parts.
//!
//! The invariant: a construction that fails leaves the state table as it was.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags};

use super::descriptors::{Descriptors, GuestLimits, ReopenPolicy};
use super::handover::{Handover, Records, inherited_fd, key_of};
use super::ids::{Ids, overrides};
use super::inode_table::{
    IDENTITY, Identity, Inode, InodeTable, LocalBirths, new_generation, stat_fd,
};
use super::open_files::{LocalMount, OpenFiles};
use super::ops::Operations;
use super::xattr::Xattrs;
use super::{Options, Passthrough, PassthroughError, PreviousProcess, Restored, Shared};
use crate::state::Table;

impl Passthrough {
    /// Shares `shared_dir`. Call it in the process that serves the directory, before that process
    /// gives up its view of `/proc`. The server may change its root or its mounts afterwards.
    ///
    /// # Errors
    ///
    /// See [`PassthroughError`].
    pub fn new(shared_dir: &Path, options: Options) -> Result<Self, PassthroughError> {
        let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let proc_fds = rustix::fs::open(c"/proc/self/fd", directory, Mode::empty())
            .map_err(|source| PassthroughError::OpenProc { source })?;
        let root = open_shared(shared_dir)?;
        let table = Table::in_memory(&options.limits(1)).map_err(PassthroughError::State)?;
        let shared = Shared {
            root,
            proc_fds,
            path: shared_dir.to_path_buf(),
        };
        Self::with_table(shared, options, &table, None).map(|(fs, _)| fs)
    }

    /// Shares `shared` with the guest's state in `table`: as a new session, or resuming the session
    /// described by `past`.
    ///
    /// # Errors
    ///
    /// See [`PassthroughError`].
    pub(crate) fn with_table(
        shared: Shared,
        options: Options,
        table: &Arc<Table>,
        past: Option<&PreviousProcess>,
    ) -> Result<(Self, Restored), PassthroughError> {
        let Shared {
            root,
            proc_fds,
            path,
        } = shared;
        // Without `past`, taking the records discards them.
        let records = Records::of(table).filter(|_| past.is_some());
        if records.is_some() {
            // If construction fails from here on, the records stay in the table.
            table.close();
        }
        let root = match (&records, past) {
            (Some(records), Some(past)) if past.inherited_fds => {
                inherited_fd(records.root.descriptor(), &records.root).unwrap_or(root)
            }
            _ => root,
        };
        let identity = identity_of_shared(&root, &path)?;
        if identity.kind != FileType::Directory {
            return Err(PassthroughError::NotADirectory { path });
        }
        let of_share = |source| PassthroughError::StatShared {
            path: path.clone(),
            source,
        };
        let ids = Ids::new(options.users.clone(), options.groups.clone(), &root);
        let ids = ids.map_err(of_share)?;
        let limits = GuestLimits::new(&options);
        let closed = if overrides().map_err(of_share)? {
            options.max_closed_files.min(limits.soft / 4)
        } else {
            0
        };
        let local = LocalMount::of(&root, (identity.key.device, identity.key.mount));
        let local = local.map_err(of_share)?;
        let files = OpenFiles::new(table, local, closed, limits.soft);
        let mode = (options.inode_file_handles, options.may_open_handles);
        let reopen_policy =
            ReopenPolicy::new(mode, root.as_fd(), &identity, &proc_fds).map_err(|source| {
                PassthroughError::FileHandles {
                    path: path.clone(),
                    source,
                }
            })?;
        let (inodes, rest) = match records {
            None => {
                let inodes = InodeTable::new(&identity, root, table, options.remember_inodes);
                (inodes.ok_or(PassthroughError::NoRoom)?, None)
            }
            Some(Records {
                root: record,
                others,
            }) => {
                let old = key_of(&record);
                let root = Inode::restore_root(record, &identity, root)
                    .ok_or(PassthroughError::AnotherShare { path })?;
                let inodes = InodeTable::with_root(root, table, options.remember_inodes);
                (inodes, Some((old, others)))
            }
        };
        let inodes = if local.exists() {
            inodes.with_local_births(LocalBirths::of(&identity.key))
        } else {
            inodes
        };
        if table.generation() == 0 || rest.is_none() {
            table.set_generation(new_generation());
        }
        let readonly = options.readonly;
        let mut fds = Descriptors::new(proc_fds, inodes, reopen_policy, files, limits, readonly);
        table.reopen();
        let (handover, restored) = match (rest, past) {
            (Some((old, records)), Some(past)) => {
                Handover::resume(options.migration, &mut fds, records, old, past)
            }
            _ => (Handover::new(options.migration), Restored::default()),
        };
        let xattrs = Xattrs::new(options.xattr, options.xattr_map.clone());
        let ops = Operations::new(options, fds, ids, xattrs);
        Ok((Self { ops, handover }, restored))
    }
}

/// Checks early that `shared_dir`, a directory or a single file, exists and can be shared.
///
/// # Errors
///
/// See [`PassthroughError`].
pub fn check_shared(shared_dir: &Path) -> Result<(), PassthroughError> {
    let root = open_shared(shared_dir)?;
    identity_of_shared(&root, shared_dir).map(|_| ())
}

fn open_shared(shared_dir: &Path) -> Result<OwnedFd, PassthroughError> {
    let root = rustix::fs::open(shared_dir, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    root.map_err(|source| PassthroughError::OpenShared {
        path: shared_dir.to_path_buf(),
        source,
    })
}

fn identity_of_shared(root: &OwnedFd, shared_dir: &Path) -> Result<Identity, PassthroughError> {
    let path = shared_dir.to_path_buf();
    let identity = match stat_fd(root, IDENTITY) {
        Ok(stat) => Identity::of(&stat),
        Err(source) => return Err(PassthroughError::StatShared { path, source }),
    };
    match identity.kind {
        FileType::Directory | FileType::RegularFile => Ok(identity),
        _ => Err(PassthroughError::NeitherFileNorDirectory { path }),
    }
}
