//! The mount of the shared directory, if its file system is one of this host's own.
//!
//! On these an open file stays the one that its name opens, and `close(2)` neither waits for
//! earlier writes nor reports their errors. This excludes overlayfs (after copy-up another file has
//! the name) and whatever another machine or process serves. The invariant: a file counts as local
//! only if it is on the file system and mount of the shared directory.

use std::os::fd::AsFd;

use crate::fs::Result;

/// Magic numbers of uapi `linux/magic.h`: ext2 to ext4, XFS, Btrfs, tmpfs, F2FS, ZFS, bcachefs.
const LOCAL: [u32; 7] = [
    0xef53,
    0x5846_5342,
    0x9123_683e,
    IN_MEMORY,
    0xf2f5_2010,
    0x2fc1_2fc1,
    0xca45_1a4e,
];

/// tmpfs.
const IN_MEMORY: u32 = 0x0102_1994;

/// Where local files are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LocalMount {
    /// The device and mount, if there are any.
    location: Option<(u64, u64)>,
    in_memory: bool,
}

impl LocalMount {
    /// The mount `location`, by device and mount, that contains `root`.
    pub(crate) fn of(root: impl AsFd, location: (u64, u64)) -> Result<Self> {
        let kind = rustix::fs::fstatfs(root)?.f_type;
        let is = |magic: &u32| i64::from(*magic) == kind & 0xffff_ffff;
        Ok(Self {
            location: LOCAL.iter().any(is).then_some(location),
            in_memory: is(&IN_MEMORY),
        })
    }

    /// Whether there are local files.
    pub(crate) fn exists(self) -> bool {
        self.location.is_some()
    }

    /// Whether files at `location`, by device and mount, are local.
    pub(crate) fn contains(self, location: (u64, u64)) -> bool {
        self.location == Some(location)
    }

    /// Whether files at `location` are local and have no disk.
    pub(crate) fn is_in_memory(self, location: (u64, u64)) -> bool {
        self.in_memory && self.contains(location)
    }
}
