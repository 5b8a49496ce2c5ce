//! Construction of a [`Passthrough`]: opens and checks the shared directory, and builds the parts.
//!
//! The invariant: a construction that fails leaves the state table as it was.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::fs::{FileType, Mode, OFlags};

use super::descriptors::limits::FdLimits;
use super::descriptors::reopen_policy::ReopenPolicy;
use super::descriptors::sharing::Sharing;
use super::handover::resume;
use super::handover::resume::{PreviousAttempts, Records};
use super::ids::credentials::CredentialPolicy;
use super::inode_table::identity::{IDENTITY, Identity, stat_fd};
use super::inode_table::inode::Inode;
use super::inode_table::{InodeStore, new_generation};
use super::open_files::closed_fd_cache::ClosedFdCache;
use super::open_files::closer::Closer;
use super::open_files::handleless::HandlelessOpens;
use super::open_files::handles::Handles;
use super::open_files::record_locks::Locks;
use super::ops::labels;
use super::ops::open::CurrentTerms;
use super::ops::path_checks::Paths;
use super::ops::readdir::DirentCache;
use super::{Options, Passthrough, PassthroughError, Past, Restored, Shared};
use crate::fs::Result;
use crate::state::Table;

impl Passthrough {
    /// Shares `shared_dir`. Call it in the process that serves the directory, before that process
    /// gives up its view of `/proc`. The server may change its root or its mounts afterwards.
    ///
    /// # Errors
    ///
    /// See [`PassthroughError`].
    pub fn new(shared_dir: &Path, options: Options) -> std::result::Result<Self, PassthroughError> {
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
        Self::of(shared, options, &table, None).map(|(fs, _)| fs)
    }

    /// Shares `shared` with the guest's state in `table`: as a new session, or resuming the session
    /// described by `past`.
    ///
    /// # Errors
    ///
    /// See [`PassthroughError`].
    pub fn of(
        shared: Shared,
        options: Options,
        table: &Arc<Table>,
        past: Option<&Past>,
    ) -> std::result::Result<(Self, Restored), PassthroughError> {
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
                resume::inherited_fd(records.root.descriptor(), &records.root).unwrap_or(root)
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
        let credential_policy = credential_policy_for(&root).map_err(of_share)?;

        let fd_limits = FdLimits::new(&options);
        let closed_fds = options.max_spare_files.min(fd_limits.soft / 4);
        let closed_fds = ClosedFdCache::new(&root, &identity.key, closed_fds).map_err(of_share)?;
        let mode = options.inode_file_handles;
        let reopen_policy =
            ReopenPolicy::new(mode, root.as_fd(), &identity, &proc_fds).map_err(|source| {
                PassthroughError::FileHandles {
                    path: path.clone(),
                    source,
                }
            })?;
        let (store, rest) = match records {
            None => {
                let store = InodeStore::new(&identity, root, table, options.remember_inodes);
                (store.ok_or(PassthroughError::NoRoom)?, None)
            }
            Some(Records {
                root: record,
                others,
            }) => {
                let old = resume::key_of(&record);
                let root = Inode::restore_root(record, &identity, root)
                    .ok_or(PassthroughError::AnotherShare { path })?;
                let store = InodeStore::of(root, table, options.remember_inodes);
                (store, Some((old, others)))
            }
        };
        if table.generation() == 0 || rest.is_none() {
            table.set_generation(new_generation());
        }
        let mut fs = Self {
            options,
            proc_fds,
            // The root is pinned by its descriptor and is never removed from the store.
            inodes: store,
            reopen_policy,
            single_file: None,
            handles: Handles::new(table),
            handleless: HandlelessOpens::new(fd_limits.soft),
            closed_fds,
            closer: Closer::default(),
            terms: CurrentTerms::default(),
            fd_limits,
            sharing: Sharing::default(),
            dirent_cache: DirentCache::default(),
            locks: Locks::new(table),
            credential_policy,
            selinux: labels::host_has_selinux(),
            locks_released: AtomicBool::new(false),
            inherited: AtomicBool::new(rest.is_some()),
            table: Arc::clone(table),
            previous_attempts: PreviousAttempts::default(),
            paths: Paths::new(),
        };
        table.reopen();
        let restored = match (rest, past) {
            (Some((old, records)), Some(past)) => fs.restore(records, old, past),
            _ => Restored::default(),
        };
        Ok((fs, restored))
    }
}

/// Checks early that `shared_dir`, a directory or a single file, exists and can be shared.
///
/// # Errors
///
/// See [`PassthroughError`].
pub fn check_shared(shared_dir: &Path) -> std::result::Result<(), PassthroughError> {
    let root = open_shared(shared_dir)?;
    identity_of_shared(&root, shared_dir).map(|_| ())
}

fn open_shared(shared_dir: &Path) -> std::result::Result<OwnedFd, PassthroughError> {
    let root = rustix::fs::open(shared_dir, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    root.map_err(|source| PassthroughError::OpenShared {
        path: shared_dir.to_path_buf(),
        source,
    })
}

fn identity_of_shared(
    root: &OwnedFd,
    shared_dir: &Path,
) -> std::result::Result<Identity, PassthroughError> {
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

/// Whether file system ids may stay on a thread between two requests. They may not if another
/// machine or process decides by them what is allowed.
fn credential_policy_for(root: &OwnedFd) -> Result<CredentialPolicy> {
    /// Magic numbers of uapi `linux/magic.h`: NFS, SMB, CIFS, SMB 2, FUSE (virtio-fs too), 9P,
    /// Ceph, AFS (two), Coda; and Lustre.
    const REMOTE: [u32; 11] = [
        0x6969,
        0x517b,
        0xff53_4d42,
        0xfe53_4d42,
        0x6573_5546,
        0x0102_1997,
        0x00c3_6400,
        0x5346_414f,
        0x6b41_4653,
        0x7375_7245,
        0x0bd0_0bd0,
    ];
    let kind = rustix::fs::fstatfs(root)?.f_type;
    let is_remote = REMOTE
        .iter()
        .any(|&magic| i64::from(magic) == kind & 0xffff_ffff);
    Ok(if is_remote {
        CredentialPolicy::restored_each_time()
    } else {
        CredentialPolicy::left_in_place()
    })
}
