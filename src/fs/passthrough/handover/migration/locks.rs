//! Migrates locks.
//!
//! On the host only one server can hold a lock at a time. So the source releases its locks once the
//! snapshot is on its way, and the destination acquires them. If the migration fails, the source
//! acquires them again. In between, another process on the host can take a lock. The invariant: a
//! lock that isn't acquired is reported: the destination refuses the guest, the source logs a
//! warning.

use rustix::io::Errno;

use crate::fs::passthrough::descriptors::Descriptors;
use crate::io::{File, Lock, LockKind, RecordLock};
use crate::migration::stream::{self, Flock, Locks};
use crate::state::{LockFields, Range};

/// The whole range of a file.
const EVERYTHING: Lock = Lock::Record(RecordLock {
    kind: LockKind::Unlock,
    start: 0,
    end: i64::MAX.cast_unsigned(),
});

/// The lock on the whole file that a handle's record says.
pub(super) fn flock_of(record: u64) -> Flock {
    match record {
        1 => Flock::Shared,
        2 => Flock::Exclusive,
        _ => Flock::None,
    }
}

/// The reverse, for a record.
pub(super) fn record_of(flock: Flock) -> u64 {
    match flock {
        Flock::None => 0,
        Flock::Shared => 1,
        Flock::Exclusive => 2,
    }
}

pub(super) fn whole(flock: Flock) -> Option<Lock> {
    match flock {
        Flock::None => None,
        Flock::Shared => Some(Lock::Whole(LockKind::Shared)),
        Flock::Exclusive => Some(Lock::Whole(LockKind::Exclusive)),
    }
}

pub(super) fn locks_of(fields: &LockFields, ranges: &[Range]) -> Locks {
    Locks {
        node: fields.node,
        owner: fields.owner,
        handle: fields.handle,
        ranges: ranges
            .iter()
            .map(|range| stream::Range {
                start: range.start,
                end: range.end,
                exclusive: range.exclusive,
            })
            .collect(),
    }
}

/// Acquires record locks.
pub(super) fn acquire(file: &File, ranges: &[Range]) -> Result<(), Errno> {
    ranges.iter().try_for_each(|range| {
        let kind = if range.exclusive {
            LockKind::Exclusive
        } else {
            LockKind::Shared
        };
        set(
            file,
            Lock::Record(RecordLock {
                kind,
                start: range.start,
                end: range.end,
            }),
        )
    })
}

pub(super) fn set(file: &File, lock: Lock) -> Result<(), Errno> {
    file.try_lock(lock)
        .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

/// Releases all locks on the host. The records of them stay.
pub(super) fn release_locks(fds: &Descriptors) {
    let release = |file: &File, lock| {
        if let Err(error) = set(file, lock) {
            log::warn!("migration: can't release a lock: {error}");
        }
    };
    fds.files().handles().each(|_, lock, file| {
        if flock_of(lock) != Flock::None {
            release(file, Lock::Whole(LockKind::Unlock));
        }
    });
    fds.files().record_locks().each(|_, ranges, file| {
        if !ranges.is_empty() {
            release(file, EVERYTHING);
        }
    });
}

/// Acquires the locks again.
pub(super) fn reacquire_locks(fds: &Descriptors) {
    let lost = |node: u64, error: Errno| {
        log::warn!(
            "migration: another process has taken a lock on node {node} that the guest believes \
             to hold: {error}"
        );
    };
    fds.files().handles().each(|fields, lock, file| {
        let taken = whole(flock_of(lock)).map_or(Ok(()), |lock| set(file, lock));
        if let Err(error) = taken {
            lost(fields.node, error);
        }
    });
    fds.files().record_locks().each(|fields, ranges, file| {
        if let Err(error) = acquire(file, &ranges) {
            lost(fields.node, error);
        }
    });
}
