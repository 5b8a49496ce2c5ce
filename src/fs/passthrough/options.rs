//! The options of a share, and how many descriptors there are for it.
//!
//! The invariant: the defaults suit every guest and stay within the limits of the process.

use std::num::NonZeroUsize;
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit};

use super::ids::IdMap;
use super::xattr::XattrMap;
use crate::state::Limits;

/// The default number of inodes that a guest may know. One costs the server 200 to 400 bytes, and
/// the guest, whose kernel has an inode and a name for it, about four times that.
const DEFAULT_MAX_INODES: usize = 1 << 24;

/// What the guest may cache of the files it opens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cache {
    /// Nothing.
    Never,
    /// Names, attributes and directory entries, but not the data of files.
    Metadata,
    /// Data too, until the file's attributes show a change.
    #[default]
    Auto,
    /// Everything, even across close and open.
    Always,
}

impl Cache {
    /// How long names and attributes stay valid.
    #[must_use]
    pub fn ttl(self) -> Duration {
        Duration::from_secs(match self {
            Self::Never => 0,
            Self::Auto => 1,
            Self::Metadata | Self::Always => 24 * 60 * 60,
        })
    }
}

/// When inodes are referred to by file handle instead of by descriptor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InodeFileHandles {
    /// Descriptors, up to [`Options::max_open_inodes`]. Beyond that, file handles
    /// where they work, and names elsewhere.
    #[default]
    Never,
    /// File handles where they work, elsewhere as with `Never`.
    Prefer,
    /// File handles only. Lookups on a file system without file handles fail with `EOPNOTSUPP`.
    Mandatory,
}

/// How the source describes inodes to the destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MigrationMode {
    /// By their paths in the shared directory.
    #[default]
    FindPaths,
    /// By their file handles: both servers share the same file system.
    FileHandles,
}

/// What the destination does if it can't find an inode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnMigrationError {
    /// Refuse the guest, which continues at the source.
    #[default]
    Abort,
    /// Accept the guest, which gets errors for that inode.
    GuestError,
}

/// How a session is migrated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MigrationOptions {
    /// How the source describes inodes.
    pub mode: MigrationMode,
    /// What the destination does if an inode is not found.
    pub on_error: OnMigrationError,
    /// Send file handles along with paths, so that the destination can verify what it finds.
    pub verify_handles: bool,
    /// Check at the source that each path leads to its inode before sending it.
    pub confirm_paths: bool,
}

/// How a directory is shared.
#[derive(Clone, Debug)]
pub struct Options {
    /// When inodes are referred to by file handle.
    pub inode_file_handles: InodeFileHandles,
    /// Whether opening a file by its handle may be tried. Without, handles are never used: a filter
    /// of system calls may end the process for the attempt.
    pub may_open_handles: bool,
    /// How many descriptors inodes and open files may have in total before unused inodes give up
    /// theirs. `None` means three quarters of `RLIMIT_NOFILE` at construction, or less if that
    /// would leave fewer than `reserved_descriptors`; this is also the maximum. See
    /// [`raise_descriptor_limit`].
    pub max_open_inodes: Option<usize>,
    /// How many descriptors the guest never gets, however few there are, as the server needs them
    /// itself. At most half of all.
    pub reserved_descriptors: usize,
    /// How many descriptors the process may have; `None` for what `RLIMIT_NOFILE` is at construction.
    pub descriptor_limit: Option<usize>,
    /// How many file systems share the process's descriptors in equal parts.
    pub descriptor_parts: NonZeroUsize,
    /// How many inodes the guest may know at the same time, besides the root. A lookup beyond that
    /// fails with `ENFILE`. This limits the host's memory.
    pub max_inodes: usize,
    /// How many forgotten inodes are kept, so that the guest's file handles of them stay valid. The
    /// longest forgotten is dropped first, and all are dropped before an inode that the guest knows
    /// is refused. 0 for none.
    pub remember_inodes: usize,
    /// How many files and directories the guest may have open, including those needed for locks.
    /// Beyond that, opening fails with `ENFILE` and locking with `ENOLCK`. `None` means three
    /// quarters of `RLIMIT_NOFILE`, which is also the maximum.
    pub max_handles: Option<usize>,
    /// How many files that the guest has closed may stay open in case it opens them again, at most
    /// a quarter of all descriptors; 0 for none.
    pub max_closed_files: usize,
    /// What the guest may cache of open files and directories.
    pub cache: Cache,
    /// How long attributes stay valid in the guest.
    pub attribute_ttl: Duration,
    /// How long names stay valid in the guest.
    pub entry_ttl: Duration,
    /// How user ids are mapped between guest and host.
    pub users: IdMap,
    /// How group ids are mapped.
    pub groups: IdMap,
    /// Whether extended attributes are served. If not, requests fail with `ENOSYS`. On by
    /// default: programs report their absence as data loss (`cp -a`, `rsync -X`, package managers).
    pub xattr: bool,
    /// How the names of extended attributes are mapped.
    pub xattr_map: Option<XattrMap>,
    /// Whether the guest's `O_DIRECT` is passed on to the host. If not, the host's page cache is
    /// used.
    pub allow_direct_io: bool,
    /// Whether the guest's `O_NOATIME` is passed on to the host, which may refuse it.
    pub preserve_noatime: bool,
    /// Whether every change is refused with `EROFS`.
    pub readonly: bool,
    /// Whether entries say that another file system is mounted there.
    pub announce_submounts: bool,
    /// How the session is migrated.
    pub migration: MigrationOptions,
}

impl Options {
    /// The size of the state table for all that a guest may have, on a device with `queues` queues.
    #[must_use]
    pub(crate) fn limits(&self, queues: u16) -> Limits {
        let all = self.guest_descriptors();
        let handles = self.max_handles.unwrap_or(all);
        Limits {
            inodes: self.max_inodes,
            handles: handles.min(1 << 24),
            queues,
        }
    }

    /// These options for each of several file systems, which share in equal parts what is limited.
    #[must_use]
    pub fn divided_by(self, parts: NonZeroUsize) -> Self {
        let part = |all: usize| (all / parts).max(1);
        Self {
            descriptor_parts: parts,
            max_open_inodes: self.max_open_inodes.map(part),
            max_inodes: part(self.max_inodes),
            remember_inodes: self.remember_inodes / parts,
            max_handles: self.max_handles.map(part),
            max_closed_files: self.max_closed_files / parts,
            ..self
        }
    }

    /// How many descriptors may be open for the guest. The others are for queues, rings, sockets,
    /// the front end's messages, and running operations.
    pub(super) fn guest_descriptors(&self) -> usize {
        let limit = self.process_descriptors();
        let reserved = (limit / 4).max(self.reserved_descriptors.min(limit / 2));
        (limit - reserved) / self.descriptor_parts
    }

    /// How many descriptors the process may have.
    pub(super) fn process_descriptors(&self) -> usize {
        self.descriptor_limit.unwrap_or_else(descriptor_limit)
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            inode_file_handles: InodeFileHandles::default(),
            may_open_handles: true,
            max_open_inodes: None,
            reserved_descriptors: 64,
            descriptor_limit: None,
            descriptor_parts: NonZeroUsize::MIN,
            max_inodes: DEFAULT_MAX_INODES,
            remember_inodes: 0,
            max_handles: None,
            max_closed_files: 1024,
            cache: Cache::default(),
            attribute_ttl: Cache::default().ttl(),
            entry_ttl: Cache::default().ttl(),
            users: IdMap::default(),
            groups: IdMap::default(),
            xattr: true,
            xattr_map: None,
            allow_direct_io: false,
            preserve_noatime: false,
            readonly: false,
            announce_submounts: true,
            migration: MigrationOptions::default(),
        }
    }
}

/// Raises the soft limit of open descriptors (`RLIMIT_NOFILE`) to the hard limit. Returns the new
/// limit, or `None` if there is none. Called at the start of the server.
pub fn raise_descriptor_limit() -> Option<u64> {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if raised.current == limit.current {
        return limit.current;
    }
    match rustix::process::setrlimit(Resource::Nofile, raised) {
        Ok(()) => raised.current,
        // Only a seccomp filter forbids this. The limit is read again where it matters.
        Err(error) => {
            log::warn!("can't raise the limit of open descriptors to its maximum: {error}");
            limit.current
        }
    }
}

/// Sets the limit of open descriptors. Raises the hard limit as well if needed.
///
/// # Errors
///
/// `EPERM` if the hard limit is lower and the process may not raise it, or if the kernel allows no
/// process so many.
pub fn set_descriptor_limit(limit: u64) -> Result<(), Errno> {
    let maximum = rustix::process::getrlimit(Resource::Nofile).maximum;
    let wanted = Rlimit {
        current: Some(limit),
        maximum: maximum.map(|maximum| maximum.max(limit)),
    };
    rustix::process::setrlimit(Resource::Nofile, wanted)
}

/// How many descriptors this process may have open.
#[must_use]
pub fn descriptor_limit() -> usize {
    let limit = rustix::process::getrlimit(Resource::Nofile).current;
    limit.map_or(usize::MAX, |limit| {
        usize::try_from(limit).unwrap_or(usize::MAX)
    })
}
