//! Records of lock owners: the ranges of a file that an owner has locked, and the descriptor that
//! holds the locks.
//!
//! The words of a record: owner; node id; the handle used for the last lock; the blob of its
//! ranges; three unused words; state and descriptor.

use std::sync::Arc;

use super::blobs::MAX_LEN;
use super::inodes::{descriptor, with_descriptor};
use super::slabs::{RecordKind, STATE, word_of};
use super::{SlotRef, StateError, Table};

const OWNER: usize = 0;
const NODE: usize = 1;
const HANDLE: usize = 2;
const RANGES: usize = 3;

const LIVE: u64 = 1;

/// Bytes of a range.
const RANGE: usize = 24;

/// A lock owner of one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockFields {
    /// The guest's number for the owner.
    pub owner: u64,
    /// The inode.
    pub node: u64,
    /// The handle used for the last lock.
    pub handle: u64,
    /// The number of the descriptor that holds the locks.
    pub fd: i32,
}

/// A locked part of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Whether the lock is exclusive; otherwise it is shared.
    pub exclusive: bool,
    /// The first byte.
    pub start: u64,
    /// The last byte.
    pub end: u64,
}

/// The record of a lock owner. Dropping it removes it from the table, unless the table is closed.
#[derive(Debug)]
pub struct LockRecord {
    table: Arc<Table>,
    slot: SlotRef,
}

impl Table {
    /// Records a lock owner that has no ranges yet. `None` if the table is full.
    pub fn new_lock(self: &Arc<Self>, fields: &LockFields) -> Option<LockRecord> {
        let slot = self.allocate(RecordKind::Lock)?;
        let record = LockRecord {
            table: Arc::clone(self),
            slot,
        };
        record.set(OWNER, fields.owner);
        record.set(NODE, fields.node);
        record.set(HANDLE, fields.handle);
        record.set(RANGES, 0);
        record.set(STATE, LIVE | with_descriptor(Some(fields.fd)));
        Some(record)
    }

    /// The lock owners of a table that was opened. Must be called only once.
    pub fn take_locks(self: &Arc<Self>) -> Vec<LockRecord> {
        let mut records = Vec::new();
        self.slabs.for_each(RecordKind::Lock, |slot| {
            records.push(LockRecord {
                table: Arc::clone(self),
                slot,
            });
        });
        records
    }

    pub(super) fn check_locks(&self) -> Result<(), StateError> {
        let mut fault = None;
        self.slabs.for_each(RecordKind::Lock, |slot| {
            let at = word_of(slot);
            let ranges = self.load(at + RANGES);
            let what = if self.load(at + STATE) & 0xff != LIVE {
                "the state of a lock owner"
            } else if ranges != 0
                && !SlotRef::try_from(ranges).is_ok_and(|slot| self.claim_blob(slot))
            {
                "the ranges of a lock owner"
            } else {
                return;
            };
            fault.get_or_insert(StateError::Damaged { what, at });
        });
        fault.map_or(Ok(()), Err)
    }
}

impl LockRecord {
    fn get(&self, at: usize) -> u64 {
        self.table.load(word_of(self.slot) + at)
    }

    fn set(&self, at: usize, value: u64) {
        self.table.store(word_of(self.slot) + at, value);
    }

    /// The recorded fields.
    #[must_use]
    pub fn fields(&self) -> LockFields {
        LockFields {
            owner: self.get(OWNER),
            node: self.get(NODE),
            handle: self.get(HANDLE),
            fd: descriptor(self.get(STATE)).unwrap_or(-1),
        }
    }

    /// Sets the handle used for the last lock.
    pub fn set_handle(&self, handle: u64) {
        self.set(HANDLE, handle);
    }

    /// Sets the descriptor, after the file was reopened.
    pub fn set_descriptor(&self, fd: Option<i32>) {
        self.set(STATE, LIVE | with_descriptor(fd));
    }

    /// The locked ranges.
    #[must_use]
    pub fn ranges(&self) -> Vec<Range> {
        let Some(slot) = SlotRef::try_from(self.get(RANGES))
            .ok()
            .filter(|it| *it != 0)
        else {
            return Vec::new();
        };
        let bytes = self.table.blob(slot);
        let word = |bytes: &[u8], at: usize| {
            let word = bytes
                .get(at..at + 8)
                .and_then(|bytes| bytes.try_into().ok());
            word.map_or(0, u64::from_le_bytes)
        };
        let ranges = bytes.chunks_exact(RANGE);
        ranges
            .map(|bytes| Range {
                exclusive: word(bytes, 0) != 0,
                start: word(bytes, 8),
                end: word(bytes, 16),
            })
            .collect()
    }

    /// Sets the locked ranges. False if they can't be recorded because there are too many.
    pub fn set_ranges(&self, ranges: &[Range]) -> bool {
        if ranges.len() > MAX_LEN / RANGE {
            return false;
        }
        let bytes: Vec<u8> = ranges
            .iter()
            .flat_map(|range| [u64::from(range.exclusive), range.start, range.end])
            .flat_map(u64::to_le_bytes)
            .collect();
        let new = if ranges.is_empty() {
            Some(0)
        } else {
            self.table.new_blob(&bytes)
        };
        let Some(new) = new else {
            return false;
        };
        let old = SlotRef::try_from(self.get(RANGES)).unwrap_or(0);
        self.set(RANGES, u64::from(new));
        self.table.free_blob(old);
        true
    }
}

impl Drop for LockRecord {
    fn drop(&mut self) {
        if self.table.is_closed() {
            return;
        }
        let ranges = SlotRef::try_from(self.get(RANGES)).unwrap_or(0);
        self.set(STATE, 0);
        self.table.free_blob(ranges);
        self.table.free(self.slot);
    }
}
