//! Flags of the protocol.
//!
//! Only values; `init` and `reply` decide which are set.

#![allow(
    dead_code,
    reason = "the flags are the protocol's, also those that nothing uses yet"
)]

use std::fmt;
use std::ops::{BitAnd, BitOr};

/// The flags of INIT, both halves: bits 32 and up are sent in `flags2`.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct InitFlags(u64);

macro_rules! init_flags {
    ($($(#[$doc:meta])* $name:ident = $bit:literal,)*) => {
        impl InitFlags {
            $($(#[$doc])* pub const $name: Self = Self(1 << $bit);)*

            const NAMES: &[(Self, &str)] = &[$((Self::$name, stringify!($name)),)*];
        }
    };
}

init_flags! {
    /// Several reads of one file may run at once.
    ASYNC_READ = 0,
    /// POSIX locks are sent to the server.
    POSIX_LOCKS = 1,
    /// Never used by a kernel.
    FILE_OPS = 2,
    /// OPEN carries `O_TRUNC`, instead of a following SETATTR.
    ATOMIC_O_TRUNC = 3,
    /// LOOKUP of `.` and `..` works on any node.
    EXPORT_SUPPORT = 4,
    /// WRITE may be longer than a page.
    BIG_WRITES = 5,
    /// The server applies the umask.
    DONT_MASK = 6,
    /// Only for `/dev/fuse`.
    SPLICE_WRITE = 7,
    /// Only for `/dev/fuse`.
    SPLICE_MOVE = 8,
    /// Only for `/dev/fuse`.
    SPLICE_READ = 9,
    /// `flock` is sent to the server.
    FLOCK_LOCKS = 10,
    /// IOCTL on directories.
    HAS_IOCTL_DIR = 11,
    /// Cached pages are dropped when size or time of the file changed.
    AUTO_INVAL_DATA = 12,
    /// READDIRPLUS is supported.
    DO_READDIRPLUS = 13,
    /// The guest chooses between READDIR and READDIRPLUS.
    READDIRPLUS_AUTO = 14,
    /// Direct reads and writes may run at once.
    ASYNC_DIO = 15,
    /// The guest caches writes.
    WRITEBACK_CACHE = 16,
    /// ENOSYS to OPEN means that none is needed.
    NO_OPEN_SUPPORT = 17,
    /// LOOKUP and READDIR of one directory may run at once.
    PARALLEL_DIROPS = 18,
    /// The server clears set-user-ID bits.
    HANDLE_KILLPRIV = 19,
    /// POSIX ACLs.
    POSIX_ACL = 20,
    /// Only for `/dev/fuse`.
    ABORT_ERROR = 21,
    /// `max_pages` in the reply is valid.
    MAX_PAGES = 22,
    /// Symbolic links may be cached.
    CACHE_SYMLINKS = 23,
    /// ENOSYS to OPENDIR means that none is needed.
    NO_OPENDIR_SUPPORT = 24,
    /// Cached pages are dropped only when the server says so.
    EXPLICIT_INVAL_DATA = 25,
    /// `map_alignment` in the reply is valid.
    MAP_ALIGNMENT = 26,
    /// The guest mounts submounts by itself.
    SUBMOUNTS = 27,
    /// The server clears set-user-ID bits as the kernel would.
    HANDLE_KILLPRIV_V2 = 28,
    /// SETXATTR has its extended argument.
    SETXATTR_EXT = 29,
    /// `flags2` is valid.
    INIT_EXT = 30,
    /// Requests that create a node carry a security context.
    SECURITY_CTX = 32,
    /// DAX is chosen for each inode.
    HAS_INODE_DAX = 33,
    /// Requests that create a node carry the parent's group.
    CREATE_SUPP_GROUP = 34,
    /// Entries may be expired by notification.
    HAS_EXPIRE_ONLY = 35,
    /// Shared mappings of files opened with direct I/O.
    DIRECT_IO_ALLOW_MMAP = 36,
    /// Reads and writes may be passed through to a file of the guest's own.
    PASSTHROUGH = 37,
    /// No NFS export.
    NO_EXPORT_SUPPORT = 38,
    /// Requests may be sent again.
    HAS_RESEND = 39,
    /// The guest may use idmapped mounts; only creating requests carry the caller's ids.
    ALLOW_IDMAP = 40,
    /// Only for `/dev/fuse`.
    OVER_IO_URING = 41,
    /// `request_timeout` in the reply is valid.
    REQUEST_TIMEOUT = 42,
}

impl InitFlags {
    /// No flag.
    pub const NONE: Self = Self(0);

    /// All flags as one word.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// The flags in a word from [`bits`](Self::bits).
    #[must_use]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// Combines the two halves.
    #[must_use]
    pub fn from_halves(flags: u32, flags2: u32) -> Self {
        Self(u64::from(flags) | u64::from(flags2) << 32)
    }

    /// The halves, as `flags` and `flags2`.
    #[must_use]
    pub fn halves(self) -> (u32, u32) {
        let [a, b, c, d, e, f, g, h] = self.0.to_le_bytes();
        (
            u32::from_le_bytes([a, b, c, d]),
            u32::from_le_bytes([e, f, g, h]),
        )
    }

    /// Whether all flags of `other` are set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The union with `other`.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The flags without those in `other`.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

impl BitOr for InitFlags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        self.with(other)
    }
}

impl BitAnd for InitFlags {
    type Output = Self;

    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl fmt::Debug for InitFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for InitFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = *self;
        let mut separator = "";
        for (flag, name) in Self::NAMES {
            if self.contains(*flag) {
                write!(f, "{separator}{name}")?;
                rest = rest.without(*flag);
                separator = " ";
            }
        }
        if rest != Self::NONE || separator.is_empty() {
            write!(f, "{separator}{:#x}", rest.0)?;
        }
        Ok(())
    }
}

/// Which fields of SETATTR are valid (`FATTR_*`).
pub(crate) mod setattr_valid {
    /// `mode`.
    pub(crate) const MODE: u32 = 1;
    /// `uid`.
    pub(crate) const UID: u32 = 1 << 1;
    /// `gid`.
    pub(crate) const GID: u32 = 1 << 2;
    /// `size`.
    pub(crate) const SIZE: u32 = 1 << 3;
    /// `atime`.
    pub(crate) const ATIME: u32 = 1 << 4;
    /// `mtime`.
    pub(crate) const MTIME: u32 = 1 << 5;
    /// `fh`.
    pub(crate) const FH: u32 = 1 << 6;
    /// The host's current time in place of `atime`.
    pub(crate) const ATIME_NOW: u32 = 1 << 7;
    /// The host's current time in place of `mtime`.
    pub(crate) const MTIME_NOW: u32 = 1 << 8;
    /// `lock_owner`.
    pub(crate) const LOCKOWNER: u32 = 1 << 9;
    /// `ctime`; only from a guest that caches writes.
    pub(crate) const CTIME: u32 = 1 << 10;
    /// Clear set-user-ID bits.
    pub(crate) const KILL_SUIDGID: u32 = 1 << 11;
}

/// Flags in the reply to OPEN, OPENDIR and CREATE (`FOPEN_*`).
pub(crate) mod open_reply_flags {
    /// Don't cache the file.
    pub(crate) const DIRECT_IO: u32 = 1;
    /// Keep what is cached of the file.
    pub(crate) const KEEP_CACHE: u32 = 1 << 1;
    /// The file can't seek.
    pub(crate) const NONSEEKABLE: u32 = 1 << 2;
    /// The directory's entries may be cached.
    pub(crate) const CACHE_DIR: u32 = 1 << 3;
    /// The file has no position.
    pub(crate) const STREAM: u32 = 1 << 4;
    /// No FLUSH when a descriptor is closed.
    pub(crate) const NOFLUSH: u32 = 1 << 5;
    /// Direct writes may run at once.
    pub(crate) const PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
}

/// Flags of GETATTR.
pub(crate) mod getattr_flags {
    /// `fh` is valid.
    pub(crate) const FH: u32 = 1;
}

/// Flags of OPEN and CREATE in addition to those of `open(2)`.
pub(crate) mod open_flags {
    /// Clear set-user-ID bits of a file that is truncated.
    pub(crate) const KILL_SUIDGID: u32 = 1;
}

/// Flags of SETXATTR in its extended form.
pub(crate) mod setxattr_flags {
    /// Clear the set-group-ID bit because an ACL is set.
    pub(crate) const ACL_KILL_SGID: u32 = 1;
}

/// Flags of WRITE.
pub(crate) mod write_flags {
    /// From the page cache; the handle is a guess.
    pub(crate) const CACHE: u32 = 1;
    /// `lock_owner` is valid.
    pub(crate) const LOCKOWNER: u32 = 1 << 1;
    /// Clear set-user-ID bits.
    pub(crate) const KILL_SUIDGID: u32 = 1 << 2;
}

/// Flags of FSYNC and FSYNCDIR.
pub(crate) mod fsync_flags {
    /// Data only.
    pub(crate) const FDATASYNC: u32 = 1;
}

/// Flags of GETLK, SETLK and SETLKW.
pub(crate) mod lk_flags {
    /// A lock of `flock(2)`.
    pub(crate) const FLOCK: u32 = 1;
}

/// Flags of IOCTL.
pub(crate) mod ioctl_flags {
    /// The server may access any memory of the caller; only for CUSE.
    pub(crate) const UNRESTRICTED: u32 = 1 << 1;
}

/// Flags of SETUPMAPPING.
pub(crate) mod setupmapping_flags {
    /// The guest is going to write to the mapping.
    pub(crate) const WRITE: u64 = 1;
    /// The guest is going to read from it.
    pub(crate) const READ: u64 = 1 << 1;
}

/// Flags of attributes.
pub(crate) mod attr_flags {
    /// The root of a submount.
    pub(crate) const SUBMOUNT: u32 = 1;
    /// DAX for this file.
    pub(crate) const DAX: u32 = 1 << 1;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn init_flags_survive_split_into_halves() {
        let flags = InitFlags::MAX_PAGES | InitFlags::HAS_RESEND;
        let (low, high) = flags.halves();
        assert_eq!((low, high), (1 << 22, 1 << 7));
        assert_eq!(InitFlags::from_halves(low, high), flags);
    }

    #[test]
    fn flags_are_shown_by_name_and_unknown_ones_by_number() {
        let flags =
            InitFlags::ASYNC_READ | InitFlags::INIT_EXT | InitFlags::from_halves(0, 1 << 31);
        assert_eq!(flags.to_string(), "ASYNC_READ INIT_EXT 0x8000000000000000");
        assert_eq!(InitFlags::NONE.to_string(), "0x0");
    }
}
