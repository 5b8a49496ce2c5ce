//! The identity of an inode on the host, as `statx` tells it.
//!
//! The invariant: two inodes that exist at the same time have different keys, and an inode that is
//! settled differs from every later one in its key or its birth time.

use std::os::fd::AsFd;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, FileType, Statx, StatxFlags};
use rustix::time::ClockId;

use crate::fs::Result;

/// The age in nanoseconds from which a birth time tells inodes apart. It is more than a tick of the
/// clock that file systems use for time stamps, and more than the coarsest time stamp (two seconds,
/// FAT).
const SETTLED_AFTER: i64 = 4_000_000_000;

/// As [`SETTLED_AFTER`], by the clock that the file system takes birth times from, for one that
/// stores them to the nanosecond. Any age above 0 would do; this is ten ticks of the slowest clock.
const PRECISE_SETTLED_AFTER: i64 = 100_000_000;

/// Birth times that aren't multiples of this are stored more precisely than the clock ticks.
const PRECISE: i64 = 1_000_000;

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

/// Where birth times come from this host's clock, so that they tell inodes apart early.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct LocalBirths(Option<(u64, u64)>);

impl LocalBirths {
    /// On the file system and mount of `key`.
    pub(crate) fn of(key: &Key) -> Self {
        Self(Some((key.device, key.mount)))
    }

    /// Whether every later inode with the number of `key` has a later birth time than `birth`.
    pub(crate) fn is_settled(self, key: &Key, birth: Option<i64>) -> bool {
        let Some(birth) = birth else {
            return false;
        };
        let is_precise = self.0 == Some((key.device, key.mount)) && birth % PRECISE != 0;
        is_precise && coarse_now().saturating_sub(birth) > PRECISE_SETTLED_AFTER || is_old(birth)
    }
}

/// The time by the clock that file systems take time stamps from.
fn coarse_now() -> i64 {
    let now = rustix::time::clock_gettime(ClockId::RealtimeCoarse);
    let seconds = now.tv_sec.saturating_mul(1_000_000_000);
    let now = seconds.saturating_add(now.tv_nsec);
    // Tests wait for no clock: only one that is set ahead has passed a birth time.
    #[cfg(test)]
    let now = match CLOCK_AHEAD.get() {
        0 => i64::MIN,
        ahead => now.saturating_add(ahead),
    };
    now
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn birth_time_settles_early_only_by_the_clock_of_this_host() {
        const AHEAD: i64 = 1_000_000_000;
        let key = |mount| Key {
            number: 10,
            device: 1,
            mount,
        };
        let local = LocalBirths::of(&key(1));
        let settled = |at, birth| local.is_settled(&key(at), birth);
        let just_now = now().unwrap() / PRECISE * PRECISE + 1;
        assert!(!settled(1, Some(just_now)));
        CLOCK_AHEAD.set(AHEAD);
        assert!(settled(1, Some(just_now)));
        assert!(!settled(1, Some(just_now - 1)), "it has no nanoseconds");
        assert!(!settled(1, Some(just_now + AHEAD)));
        assert!(!settled(1, None));
        assert!(!settled(2, Some(just_now)), "it is in another mount");
        assert!(!LocalBirths::default().is_settled(&key(1), Some(just_now)));
        assert!(settled(2, Some(just_now - SETTLED_AFTER)));
        CLOCK_AHEAD.set(0);
    }
}
