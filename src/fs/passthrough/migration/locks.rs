//! Migrates locks.
//!
//! On the host only one server can hold a lock at a time. So the source releases its locks once the
//! snapshot is on its way, and the destination acquires them. If the migration fails, the source
//! acquires them again. In between, another process on the host can take a lock. The invariant: a
//! lock that isn't acquired is reported: the destination refuses the guest, the source logs a
//! warning.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::Ordering;

use rustix::io::Errno;

use super::super::Passthrough;
use crate::fs::{Handle, HandleKind, MoveError, NodeId};
use crate::io::{File, Lock, LockKind, RecordLock};
use crate::migration::stream::{self, Flock, Locks, Snapshot};
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

fn whole(flock: Flock) -> Option<Lock> {
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
fn take(file: &File, ranges: &[Range]) -> Result<(), Errno> {
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

fn set(file: &File, lock: Lock) -> Result<(), Errno> {
    file.try_lock(lock)
        .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

impl Passthrough {
    /// Acquires the locks that the guest had at the source.
    pub(super) fn import_locks(
        &self,
        snapshot: &Snapshot,
        lost: &mut usize,
    ) -> Result<(), MoveError> {
        for open in &snapshot.opens {
            let Some(lock) = whole(open.flock) else {
                continue;
            };
            let (node, handle) = (NodeId(open.node), Handle(open.handle));
            let file = self.handles.file(node, handle, HandleKind::File);
            if let Err(source) = file.and_then(|file| set(&file, lock)) {
                let node = open.node;
                self.count_loss(MoveError::Lock { node, source }, lost)?;
                self.handles.note_lock(NodeId(node), handle, 0);
            }
        }
        for locks in &snapshot.locks {
            if let Err(source) = self.import_owner(locks) {
                let node = locks.node;
                self.count_loss(MoveError::Lock { node, source }, lost)?;
            }
        }
        Ok(())
    }

    fn import_owner(&self, locks: &Locks) -> Result<(), Errno> {
        let inode = self.inodes.any(NodeId(locks.node)).ok_or(Errno::STALE)?;
        let ranges: Vec<Range> = locks
            .ranges
            .iter()
            .map(|range| Range {
                start: range.start,
                end: range.end,
                exclusive: range.exclusive,
            })
            .collect();
        let file = File::from_fd(self.open_to_lock(&inode)?);
        take(&file, &ranges)?;
        let fields = LockFields {
            owner: locks.owner,
            node: locks.node,
            handle: locks.handle,
            fd: file.as_fd().as_raw_fd(),
        };
        self.locks.import(&fields, &ranges, file)
    }

    /// Releases all locks on the host. The records of them stay.
    pub(in super::super) fn release_locks_for_migration(&self) {
        self.locks_released.store(true, Ordering::Relaxed);
        let release = |file: &File, lock| {
            if let Err(error) = set(file, lock) {
                log::warn!("migration: can't release a lock: {error}");
            }
        };
        self.handles.each(|_, lock, file| {
            if flock_of(lock) != Flock::None {
                release(file, Lock::Whole(LockKind::Unlock));
            }
        });
        self.locks.each(|_, ranges, file| {
            if !ranges.is_empty() {
                release(file, EVERYTHING);
            }
        });
    }

    /// Acquires the locks again, if they were released.
    pub(in super::super) fn reacquire_locks(&self) {
        if !self.locks_released.swap(false, Ordering::Relaxed) {
            return;
        }
        let lost = |node: u64, error: Errno| {
            log::warn!(
                "migration: another process has taken a lock on node {node} that the guest believes \
                 to hold: {error}"
            );
        };
        self.handles.each(|fields, lock, file| {
            let taken = whole(flock_of(lock)).map_or(Ok(()), |lock| set(file, lock));
            if let Err(error) = taken {
                lost(fields.node, error);
            }
        });
        self.locks.each(|fields, ranges, file| {
            if let Err(error) = take(file, &ranges) {
                lost(fields.node, error);
            }
        });
    }
}
