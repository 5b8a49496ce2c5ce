//! Records of lock owners: which ranges of a file one has, and the descriptor that they belong to.
//!
//! The words of a record: owner; node id; the handle that was locked with last; the text of its
//! ranges; three that are spare; state and descriptor.

use std::sync::Arc;

use super::blobs::LONGEST;
use super::inodes::{descriptor, with_descriptor};
use super::slabs::{RecordKind, STATE, word_of};
use super::{RecordRef, StateError, Table};

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
    /// What the guest calls the owner.
    pub owner: u64,
    /// The inode.
    pub node: u64,
    /// What was locked with last.
    pub handle: u64,
    /// The number of the descriptor that the locks belong to.
    pub fd: i32,
}

/// Part of a file that is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// For one alone; else shared with others of its kind.
    pub exclusive: bool,
    /// The first byte.
    pub start: u64,
    /// The last one.
    pub end: u64,
}

/// The record of a lock owner; dropping it ends it, unless the table is closed.
#[derive(Debug)]
pub struct LockRecord {
    table: Arc<Table>,
    place: RecordRef,
}

impl Table {
    /// Writes a lock owner down that has no range yet. `None` if the table is full.
    pub fn new_lock(self: &Arc<Self>, fields: &LockFields) -> Option<LockRecord> {
        let place = self.take(RecordKind::Lock)?;
        let record = LockRecord {
            table: Arc::clone(self),
            place,
        };
        record.set(OWNER, fields.owner);
        record.set(NODE, fields.node);
        record.set(HANDLE, fields.handle);
        record.set(RANGES, 0);
        record.set(STATE, LIVE | with_descriptor(Some(fields.fd)));
        Some(record)
    }

    /// The lock owners of a table that was opened. To be called once.
    pub fn take_locks(self: &Arc<Self>) -> Vec<LockRecord> {
        let mut records = Vec::new();
        self.slabs.each(RecordKind::Lock, |place| {
            records.push(LockRecord {
                table: Arc::clone(self),
                place,
            });
        });
        records
    }

    pub(super) fn check_locks(&self) -> Result<(), StateError> {
        let mut fault = None;
        self.slabs.each(RecordKind::Lock, |place| {
            let at = word_of(place);
            let ranges = self.load(at + RANGES);
            let what = if self.load(at + STATE) & 0xff != LIVE {
                "the state of a lock owner"
            } else if ranges != 0
                && !RecordRef::try_from(ranges).is_ok_and(|place| self.claim_text(place))
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
        self.table.load(word_of(self.place) + at)
    }

    fn set(&self, at: usize, value: u64) {
        self.table.store(word_of(self.place) + at, value);
    }

    /// What was written down.
    #[must_use]
    pub fn fields(&self) -> LockFields {
        LockFields {
            owner: self.get(OWNER),
            node: self.get(NODE),
            handle: self.get(HANDLE),
            fd: descriptor(self.get(STATE)).unwrap_or(-1),
        }
    }

    /// Sets what was locked with last.
    pub fn set_handle(&self, handle: u64) {
        self.set(HANDLE, handle);
    }

    /// Sets its descriptor, where it was opened anew.
    pub fn set_descriptor(&self, fd: Option<i32>) {
        self.set(STATE, LIVE | with_descriptor(fd));
    }

    /// What is locked.
    #[must_use]
    pub fn ranges(&self) -> Vec<Range> {
        let Some(place) = RecordRef::try_from(self.get(RANGES))
            .ok()
            .filter(|it| *it != 0)
        else {
            return Vec::new();
        };
        let bytes = self.table.text(place);
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

    /// Sets what is locked. False if that can't be written down: the ranges are too many.
    pub fn set_ranges(&self, ranges: &[Range]) -> bool {
        if ranges.len() > LONGEST / RANGE {
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
            self.table.new_text(&bytes)
        };
        let Some(new) = new else {
            return false;
        };
        let old = RecordRef::try_from(self.get(RANGES)).unwrap_or(0);
        self.set(RANGES, u64::from(new));
        self.table.end_text(old);
        true
    }
}

impl Drop for LockRecord {
    fn drop(&mut self) {
        if self.table.is_closed() {
            return;
        }
        let ranges = RecordRef::try_from(self.get(RANGES)).unwrap_or(0);
        self.set(STATE, 0);
        self.table.end_text(ranges);
        self.table.give_back(self.place);
    }
}
