//! The identity of an inode on the host, as `statx` tells it.
//!
//! The invariant: two inodes that exist at the same time have different keys, and an inode that is
//! settled differs from every later one in its key or its birth time.

use std::os::fd::AsFd;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, FileType, Statx, StatxFlags};

use crate::fs::Result;

/// The age in nanoseconds from which a birth time tells inodes apart. It is more than a tick of the
/// clock that file systems use for time stamps, and more than the coarsest time stamp (two seconds,
/// FAT).
const SETTLED_AFTER: i64 = 4_000_000_000;

/// Identifies an inode among all that exist on the host at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) number: u64,
    /// The major number is in the upper half, the minor number in the lower.
    pub(crate) device: u64,
    /// The mount: one inode in two mounts is two inodes to the guest, as different file systems may
    /// be mounted below it.
    pub(crate) mount: u64,
}

/// What a `statx` tells about the identity of an inode.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Identity {
    pub(crate) key: Key,
    /// The birth time in nanoseconds since 1970, if the file system has it. It tells an inode from
    /// an earlier one with the same number.
    pub(crate) birth: Option<i64>,
    pub(crate) kind: FileType,
}

/// The fields that [`Identity`] and a LOOKUP reply need.
pub(crate) const IDENTITY: StatxFlags = StatxFlags::BASIC_STATS
    .union(StatxFlags::BTIME)
    .union(StatxFlags::MNT_ID);

impl Identity {
    pub(crate) fn of(stat: &Statx) -> Self {
        let knows = |what: StatxFlags| stat.stx_mask & what.bits() != 0;
        let birth = knows(StatxFlags::BTIME)
            .then_some(stat.stx_btime)
            .and_then(|at| {
                at.tv_sec
                    .checked_mul(1_000_000_000)?
                    .checked_add(i64::from(at.tv_nsec))
            });
        Self {
            key: Key {
                number: stat.stx_ino,
                device: u64::from(stat.stx_dev_major) << 32 | u64::from(stat.stx_dev_minor),
                mount: if knows(StatxFlags::MNT_ID) {
                    stat.stx_mnt_id
                } else {
                    0
                },
            },
            birth,
            kind: FileType::from_raw_mode(u32::from(stat.stx_mode)),
        }
    }
}

/// Calls `statx` on the inode that `fd` is open on.
pub(crate) fn stat_fd(fd: impl AsFd, mask: StatxFlags) -> Result<Statx> {
    rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH | AtFlags::NO_AUTOMOUNT, mask)
}

impl Identity {
    /// Whether every later inode with this number has a later birth time. See `Inode::settle`.
    pub(crate) fn is_settled(&self) -> bool {
        self.birth.is_some_and(is_old)
    }
}

pub(super) fn is_old(birth: i64) -> bool {
    now().is_some_and(|now| now.saturating_sub(birth) > SETTLED_AFTER)
}

pub(crate) fn now() -> Option<i64> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
    let now = i64::try_from(since.as_nanos()).ok();
    #[cfg(test)]
    let now = now.and_then(|now| now.checked_add(CLOCK_AHEAD.get()));
    now
}

#[cfg(test)]
thread_local! {
    /// How far the calling thread's clock is ahead of the host's, in nanoseconds.
    pub(crate) static CLOCK_AHEAD: std::cell::Cell<i64> = const { std::cell::Cell::new(0) };
}
