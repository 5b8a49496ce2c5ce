//! An open descriptor and the known properties of its file.
//!
//! Running operations share it with the [`File`](super::File)s that were cloned from one another.
//! The invariant: a property is looked up once and never changes afterwards.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::fs::{FileType, OFlags};

/// `ramfs` of `statfs(2)`.
const RAMFS_MAGIC: libc::c_long = 0x8584_58f6;

/// A descriptor with the facts that decide how operations on it are performed. It is closed with
/// the last file and the last operation that shares it.
#[derive(Debug)]
pub(super) struct Descriptor {
    fd: OwnedFd,
    /// The [`Facts`] known so far. Each bit is set once, its meaning doesn't depend on which thread
    /// set it, and no other memory is reached through it: all accesses are `Relaxed`.
    facts: AtomicU8,
}

/// Known properties of a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Facts(u8);

impl Facts {
    /// The other bits have been looked up.
    const KNOWN: u8 = 1;
    /// A regular file or a block device: it has offsets, and operations wait only for the disk.
    pub(super) const SEEKABLE: u8 = 1 << 1;
    /// A regular file.
    pub(super) const REGULAR: u8 = 1 << 2;
    /// `O_DIRECT`: bypasses the page cache.
    pub(super) const DIRECT: u8 = 1 << 3;
    /// `O_SYNC` or `O_DSYNC`: a write waits for the disk.
    pub(super) const SYNCED: u8 = 1 << 4;
    /// The file system doesn't support `RWF_NOWAIT`.
    pub(super) const NO_NOWAIT: u8 = 1 << 5;
    /// A file on a file system in memory, which doesn't support `RWF_NOWAIT` either: there is no
    /// disk to wait for.
    pub(super) const IN_MEMORY: u8 = 1 << 6;
    /// A file on a file system of this host's own: operations wait for its disks only.
    pub(super) const LOCAL: u8 = 1 << 7;

    fn of(kind: FileType, flags: OFlags) -> u8 {
        let mut facts = match kind {
            FileType::RegularFile => Self::SEEKABLE | Self::REGULAR,
            FileType::BlockDevice => Self::SEEKABLE,
            _ => 0,
        };
        if flags.contains(OFlags::DIRECT) {
            facts |= Self::DIRECT;
        }
        // O_SYNC includes the bit of O_DSYNC; rustix has one name too many for O_SYNC.
        if flags.bits() & libc::O_DSYNC.cast_unsigned() != 0 {
            facts |= Self::SYNCED;
        }
        facts
    }

    /// Whether one of `bits` holds.
    pub(super) fn has(self, bits: u8) -> bool {
        self.0 & bits != 0
    }
}

impl Descriptor {
    /// A descriptor without known facts.
    pub(super) fn new(fd: OwnedFd) -> Self {
        Self {
            fd,
            facts: AtomicU8::new(0),
        }
    }

    /// A descriptor that was opened with `flags` on a file of this `kind`.
    pub(super) fn opened(fd: OwnedFd, kind: FileType, flags: OFlags) -> Self {
        Self {
            fd,
            facts: AtomicU8::new(Facts::KNOWN | Facts::of(kind, flags)),
        }
    }

    /// Returns the descriptor.
    pub(super) fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// The facts, looked up by the first call. If that fails, the descriptor is treated as one that
    /// may wait forever.
    pub(super) fn facts(&self) -> Facts {
        let known = self.facts.load(Ordering::Relaxed);
        if known & Facts::KNOWN != 0 {
            return Facts(known);
        }
        let learned = Facts::KNOWN | self.look_up().unwrap_or_default();
        Facts(learned | self.facts.fetch_or(learned, Ordering::Relaxed))
    }

    /// Adds a fact that an operation has found out.
    pub(super) fn learn(&self, bit: u8) {
        self.facts.fetch_or(bit, Ordering::Relaxed);
    }

    fn look_up(&self) -> rustix::io::Result<u8> {
        let flags = rustix::fs::fcntl_getfl(self)?;
        let mode = rustix::fs::fstat(self)?.st_mode;
        Ok(Facts::of(FileType::from_raw_mode(mode), flags))
    }

    /// Whether the file is on a file system in memory.
    pub(super) fn is_in_memory(&self) -> bool {
        rustix::fs::fstatfs(self)
            .is_ok_and(|statistics| [libc::TMPFS_MAGIC, RAMFS_MAGIC].contains(&statistics.f_type))
    }

    /// Whether a short `O_DIRECT` read that ended at `offset` has reached the end of the file.
    /// Reading on from there would fail, because the end of a file need not be aligned.
    pub(super) fn is_direct_at_end(&self, offset: u64) -> bool {
        self.facts().has(Facts::DIRECT)
            && rustix::fs::fstat(self)
                .is_ok_and(|stat| offset >= u64::try_from(stat.st_size).unwrap_or(0))
    }
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// The position in the file of byte `done` of a buffer that begins at `offset`. Fails for what
/// doesn't fit `off_t`, where −1 would mean the descriptor's own position.
pub(super) fn position(offset: u64, done: usize) -> io::Result<i64> {
    offset
        .checked_add(done as u64)
        .and_then(|position| i64::try_from(position).ok())
        .ok_or_else(|| rustix::io::Errno::INVAL.into())
}
