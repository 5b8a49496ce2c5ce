//! How a directory is shared: the options, and how many descriptors there are for it.
//!
//! The invariant: the default suits every guest, and takes no more than the limits that the process
//! has.

use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit};

use super::id_map::IdMap;
use super::inode_ref::InodeFileHandles;
use super::migration::MigrationOptions;
use super::xattr_map::XattrMap;
use crate::state::Limits;

/// Inodes that a guest may know unless the options say otherwise. One costs the server 200 to
/// 400 bytes, and the guest, whose kernel has an inode and a name for it, about four times that.
const MOST_INODES: usize = 1 << 24;

/// What the guest may keep of the files it has opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cache {
    /// Nothing.
    Never,
    /// Names, attributes and lists of names; not the data of files.
    Metadata,
    /// Data until the file has changed, as its attributes tell.
    #[default]
    Auto,
    /// Everything, also across close and open.
    Always,
}

impl Cache {
    /// How long names and attributes hold.
    #[must_use]
    pub fn ttl(self) -> Duration {
        Duration::from_secs(match self {
            Self::Never => 0,
            Self::Auto => 1,
            Self::Metadata | Self::Always => 24 * 60 * 60,
        })
    }
}

/// How a directory is shared.
#[derive(Clone, Debug)]
pub struct Options {
    /// When inodes are held by file handle.
    pub inode_file_handles: InodeFileHandles,
    /// How many descriptors inodes and open files may have together before inodes that are not
    /// in use give up theirs; `None` for three quarters of what `RLIMIT_NOFILE` allows when the
    /// file system is made, which is also the most, unless that leaves fewer than
    /// `reserved_descriptors`. See [`raise_descriptor_limit`].
    pub max_open_inodes: Option<usize>,
    /// How many descriptors the guest never gets, however few there are: for whoever serves it.
    /// At most half of them.
    pub reserved_descriptors: usize,
    /// How many inodes the guest may know at the same time, besides the root; beyond that what
    /// would make one known is `ENFILE`. The host's memory is what this is about.
    pub max_inodes: usize,
    /// How many inodes that the guest has given back are remembered, so that its file handles of
    /// them stay good; the longest given back goes first, and all give way to what it knows. 0
    /// for none.
    pub remember_inodes: usize,
    /// How many files and directories it may have open, those included that locks need; beyond
    /// that opening is `ENFILE`, and locking `ENOLCK`. `None` for three quarters of what
    /// `RLIMIT_NOFILE` allows, which is also the most.
    pub max_handles: Option<usize>,
    /// How many files that the guest has closed may be kept open for when it opens them again, a
    /// quarter of all descriptors at most; 0 for none.
    pub max_spare_files: usize,
    /// What the guest may keep of open files and directories.
    pub cache: Cache,
    /// How long the guest may rely on attributes.
    pub attribute_ttl: Duration,
    /// How long the guest may rely on names.
    pub entry_ttl: Duration,
    /// How user ids are translated between guest and host.
    pub users: IdMap,
    /// How group ids are.
    pub groups: IdMap,
    /// Extended attributes are served; else they answer `EOPNOTSUPP`. On unless switched off:
    /// programs take their absence for data loss (`cp -a`, `rsync -X`, package managers).
    pub xattr: bool,
    /// Under which names.
    pub xattr_map: Option<XattrMap>,
    /// `O_DIRECT` of the guest is passed on to the host; else the host's cache stays in use.
    pub allow_direct_io: bool,
    /// `O_NOATIME` of the guest is passed on to the host, which may refuse it.
    pub preserve_noatime: bool,
    /// Whatever would change something is refused with `EROFS`.
    pub readonly: bool,
    /// Entries say where another file system begins.
    pub announce_submounts: bool,
    /// How a guest is moved to another server, or comes from one.
    pub migration: MigrationOptions,
}

impl Options {
    /// How large a table has to be for all that a guest may hold, of a device with so many queues.
    #[must_use]
    pub fn limits(&self, queues: u16) -> Limits {
        let all = guest_descriptors(self.reserved_descriptors);
        let handles = self.max_handles.unwrap_or(all);
        Limits {
            inodes: self.max_inodes,
            handles: handles.min(1 << 24),
            queues,
        }
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            inode_file_handles: InodeFileHandles::default(),
            max_open_inodes: None,
            reserved_descriptors: 64,
            max_inodes: MOST_INODES,
            remember_inodes: 0,
            max_handles: None,
            max_spare_files: 1024,
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

/// Raises the limit of open descriptors (`RLIMIT_NOFILE`) as far as it goes without privilege,
/// and answers what it is then; `None` for no limit. For the server's start.
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
        // Only a seccomp filter forbids this. What depends on the limit goes by what it is.
        Err(error) => {
            log::warn!("can't raise the limit of open descriptors to its maximum: {error}");
            limit.current
        }
    }
}

/// Sets the limit of open descriptors, and raises the hard limit too if need be.
///
/// # Errors
///
/// `EPERM`: the hard limit is lower, and the process has no privilege to raise it, or nobody has.
pub fn set_descriptor_limit(limit: u64) -> Result<(), Errno> {
    let maximum = rustix::process::getrlimit(Resource::Nofile).maximum;
    let wanted = Rlimit {
        current: Some(limit),
        maximum: maximum.map(|maximum| maximum.max(limit)),
    };
    rustix::process::setrlimit(Resource::Nofile, wanted)
}

/// How many descriptors this process may have open.
pub(super) fn descriptor_limit() -> usize {
    let limit = rustix::process::getrlimit(Resource::Nofile).current;
    limit.map_or(usize::MAX, |limit| {
        usize::try_from(limit).unwrap_or(usize::MAX)
    })
}

/// How many of them may be open for the guest; the others are for queues, rings, sockets, the front
/// end's messages and operations that run.
pub(super) fn guest_descriptors(reserved: usize) -> usize {
    let limit = descriptor_limit();
    limit - (limit / 4).max(reserved.min(limit / 2))
}
