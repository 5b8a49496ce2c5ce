//! Records of mappings in the DAX window of the guest.
//!
//! The words of a record: offset in the window; length; offset in the file; node id; whether the
//! guest may write; two unused words; state. Unlike other records, these stay in the table until
//! they are removed: the VMM has the mappings, not this process.

use std::sync::Arc;

use super::slabs::{RecordKind, STATE, word_of};
use super::{SlotRef, StateError, Table};

const OFFSET: usize = 0;
const LEN: usize = 1;
const FILE_OFFSET: usize = 2;
const NODE: usize = 3;
const WRITABLE: usize = 4;

/// What is known of a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MappingState {
    /// The VMM was asked to make it or to remove it, and the outcome is unknown.
    Unsure,
    /// The VMM has made it.
    Made,
    /// No guest's session has a use for it any more.
    Stale,
}

/// A mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappingFields {
    /// Where it begins in the window.
    pub offset: u64,
    /// Its length, bytes.
    pub len: u64,
    /// Where it begins in the file.
    pub file_offset: u64,
    /// The file's inode.
    pub node: u64,
    /// Whether the guest may write to it.
    pub writable: bool,
}

/// The record of a mapping.
#[derive(Clone, Debug)]
pub struct MappingRecord {
    table: Arc<Table>,
    slot: SlotRef,
}

impl Table {
    /// Records a mapping whose state is [`MappingState::Unsure`]. `None` if the table is full.
    pub fn new_mapping(self: &Arc<Self>, fields: &MappingFields) -> Option<MappingRecord> {
        let record = MappingRecord {
            table: Arc::clone(self),
            slot: self.allocate(RecordKind::Mapping)?,
        };
        record.set_fields(fields);
        Some(record)
    }

    /// All mappings.
    pub fn mappings(self: &Arc<Self>) -> Vec<MappingRecord> {
        let mut records = Vec::new();
        self.slabs.for_each(RecordKind::Mapping, |slot| {
            records.push(MappingRecord {
                table: Arc::clone(self),
                slot,
            });
        });
        records
    }

    pub(super) fn check_mappings(&self) -> Result<(), StateError> {
        let mut fault = None;
        self.slabs.for_each(RecordKind::Mapping, |slot| {
            let at = word_of(slot);
            let (offset, len) = (self.load(at + OFFSET), self.load(at + LEN));
            let what = if MappingState::from_word(self.load(at + STATE)).is_none() {
                "the state of a mapping"
            } else if len == 0 || offset.checked_add(len).is_none() {
                "the range of a mapping"
            } else {
                return;
            };
            fault.get_or_insert(StateError::Damaged { what, at });
        });
        fault.map_or(Ok(()), Err)
    }
}

impl MappingState {
    fn word(self) -> u64 {
        match self {
            Self::Unsure => 1,
            Self::Made => 2,
            Self::Stale => 3,
        }
    }

    fn from_word(word: u64) -> Option<Self> {
        [Self::Unsure, Self::Made, Self::Stale]
            .into_iter()
            .find(|state| state.word() == word)
    }
}

impl MappingRecord {
    fn get(&self, at: usize) -> u64 {
        self.table.load(word_of(self.slot) + at)
    }

    fn set(&self, at: usize, value: u64) {
        self.table.store(word_of(self.slot) + at, value);
    }

    /// The mapping. Its offset and length are those that were last asked for; the other fields
    /// count if it is made.
    #[must_use]
    pub fn fields(&self) -> MappingFields {
        MappingFields {
            offset: self.get(OFFSET),
            len: self.get(LEN),
            file_offset: self.get(FILE_OFFSET),
            node: self.get(NODE),
            writable: self.get(WRITABLE) != 0,
        }
    }

    /// What is known of it.
    #[must_use]
    pub fn state(&self) -> MappingState {
        MappingState::from_word(self.get(STATE)).unwrap_or(MappingState::Unsure)
    }

    /// Sets what is known of it.
    pub fn set_state(&self, state: MappingState) {
        self.set(STATE, state.word());
    }

    /// Replaces the mapping by one of the same range. Its state is [`MappingState::Unsure`] before
    /// any field changes.
    pub fn set_fields(&self, fields: &MappingFields) {
        let is_new = self.get(STATE) == 0;
        if !is_new {
            self.set_state(MappingState::Unsure);
        }
        self.set(OFFSET, fields.offset);
        self.set(LEN, fields.len);
        self.set(FILE_OFFSET, fields.file_offset);
        self.set(NODE, fields.node);
        self.set(WRITABLE, u64::from(fields.writable));
        if is_new {
            self.set_state(MappingState::Unsure);
        }
    }

    /// Removes the record.
    pub fn remove(self) {
        self.set(STATE, 0);
        self.table.free(self.slot);
    }
}
