//! Opens inodes, and keeps the number of all descriptors of the guest within its limits.
//!
//! This room joins inodes and open files: which of them have descriptors, how an inode without one
//! is opened, and what is closed when there are too many. The invariant: an operation that would
//! exceed a limit fails before it takes effect, and what is closed can be opened again, except for
//! what the host has removed and no program of the guest has open.

mod closing;
mod drop_caches;
mod eviction;
mod forget;
mod limits;
mod lost_inodes;
mod open_by_name;
mod opening;
mod paths;
mod removed_inodes;
mod reopen;
mod reopen_policy;
mod search;
mod sharing;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;

pub(crate) use self::limits::GuestLimits;
#[cfg(test)]
pub(crate) use self::open_by_name::MAX_USES_BY_NAME;
pub(crate) use self::opening::regular_file;
pub(crate) use self::reopen_policy::ReopenPolicy;

use self::lost_inodes::LostInodes;
use self::open_by_name::mount_without_devices;
use self::removed_inodes::RemovedInodes;
use self::sharing::Sharing;
use crate::fs::passthrough::inode_table::{Inode, InodeTable};
use crate::fs::passthrough::open_files::OpenFiles;
use crate::fs::{NodeId, Result};

/// The descriptors of inodes and open files.
#[derive(Debug)]
pub(crate) struct Descriptors {
    /// `/proc/self/fd`, `O_PATH`.
    proc_fds: OwnedFd,
    inodes: InodeTable,
    reopen_policy: ReopenPolicy,
    files: OpenFiles,
    limits: GuestLimits,
    sharing: Sharing,
    lost_inodes: LostInodes,
    removed_inodes: RemovedInodes,
    /// Whether the share is read-only.
    readonly: bool,
    /// The mount of the shared directory, if no device can be opened in it.
    mount_without_devices: Option<u64>,
}

impl Descriptors {
    /// Joins `inodes` and `files`.
    pub(crate) fn new(
        proc_fds: OwnedFd,
        inodes: InodeTable,
        reopen_policy: ReopenPolicy,
        files: OpenFiles,
        limits: GuestLimits,
        readonly: bool,
    ) -> Self {
        let mount_without_devices = mount_without_devices(&inodes);
        Self {
            proc_fds,
            mount_without_devices,
            inodes,
            reopen_policy,
            files,
            limits,
            sharing: Sharing::default(),
            lost_inodes: LostInodes::default(),
            removed_inodes: RemovedInodes::default(),
            readonly,
        }
    }

    pub(crate) fn inodes(&self) -> &InodeTable {
        &self.inodes
    }

    pub(crate) fn files(&self) -> &OpenFiles {
        &self.files
    }

    pub(crate) fn limits(&self) -> &GuestLimits {
        &self.limits
    }

    /// `/proc/self/fd`, `O_PATH`.
    pub(crate) fn proc_fds(&self) -> &OwnedFd {
        &self.proc_fds
    }

    pub(crate) fn reopen_policy(&self) -> &ReopenPolicy {
        &self.reopen_policy
    }

    /// The inode that the guest refers to by `node`.
    pub(crate) fn inode(&self, node: NodeId) -> Result<Arc<Inode>> {
        self.inodes.get(node).ok_or(Errno::STALE)
    }

    /// Records which opens the guest doesn't report: those of files, and those of directories.
    pub(crate) fn set_unreported_opens(&self, files: bool, directories: bool) {
        self.removed_inodes.set_unreported(files, directories);
    }

    /// Lets inodes with smaller node ids than `below` be searched for: they belong to a process
    /// whose descriptors this one doesn't have.
    pub(crate) fn search_below(&mut self, below: u64) {
        self.lost_inodes = LostInodes::from(below);
    }
}
