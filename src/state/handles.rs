//! Records of open files and directories.
//!
//! The words of a record: handle; node id; the request that opened it; flags; kind of the lock on
//! the whole file; two unused words; state and descriptor.

use std::sync::Arc;

use super::inodes::{descriptor, with_descriptor};
use super::slabs::{RecordKind, STATE, word_of};
use super::{SlotRef, StateError, Table};

const HANDLE: usize = 0;
const NODE: usize = 1;
const UNIQUE: usize = 2;
const FLAGS: usize = 3;
const LOCK: usize = 4;

const FILE: u64 = 1;
const DIRECTORY: u64 = 2;

/// An open file or directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HandleFields {
    /// The guest's handle.
    pub handle: u64,
    /// The inode.
    pub node: u64,
    /// Whether it is a directory.
    pub directory: bool,
    /// Flags of `open(2)`.
    pub flags: u32,
    /// The number of its descriptor.
    pub fd: i32,
}

/// The record of an open file. Dropping it removes it from the table, unless the table is closed.
#[derive(Debug)]
pub struct HandleRecord {
    table: Arc<Table>,
    slot: SlotRef,
}

impl Table {
    /// Records what the request `unique` has opened. `None` if the table is full.
    pub fn new_handle(
        self: &Arc<Self>,
        fields: &HandleFields,
        unique: u64,
    ) -> Option<HandleRecord> {
        let slot = self.allocate(RecordKind::Handle)?;
        let record = HandleRecord {
            table: Arc::clone(self),
            slot,
        };
        record.set(HANDLE, fields.handle);
        record.set(NODE, fields.node);
        record.set(UNIQUE, unique);
        record.set(FLAGS, u64::from(fields.flags));
        record.set(LOCK, 0);
        let kind = if fields.directory { DIRECTORY } else { FILE };
        record.set(STATE, kind | with_descriptor(Some(fields.fd)));
        Some(record)
    }

    /// The open files of a table that was opened. Must be called only once.
    pub fn take_handles(self: &Arc<Self>) -> Vec<HandleRecord> {
        let mut records = Vec::new();
        self.slabs.for_each(RecordKind::Handle, |slot| {
            records.push(HandleRecord {
                table: Arc::clone(self),
                slot,
            });
        });
        records
    }

    pub(super) fn check_handles(&self) -> Result<(), StateError> {
        let mut fault = None;
        let mut handles = std::collections::HashSet::new();
        let known = self.handles_given_out();
        self.slabs.for_each(RecordKind::Handle, |slot| {
            let at = word_of(slot);
            let handle = self.load(at + HANDLE);
            let what = if !matches!(self.load(at + STATE) & 0xff, FILE | DIRECTORY) {
                "the state of an open file"
            } else if handle == 0 || handle >= known || !handles.insert(handle) {
                "the handle of an open file"
            } else {
                return;
            };
            fault.get_or_insert(StateError::Damaged { what, at });
        });
        fault.map_or(Ok(()), Err)
    }
}

impl HandleRecord {
    fn get(&self, at: usize) -> u64 {
        self.table.load(word_of(self.slot) + at)
    }

    fn set(&self, at: usize, value: u64) {
        self.table.store(word_of(self.slot) + at, value);
    }

    /// The recorded fields.
    #[must_use]
    pub fn fields(&self) -> HandleFields {
        let state = self.get(STATE);
        HandleFields {
            handle: self.get(HANDLE),
            node: self.get(NODE),
            directory: state & 0xff == DIRECTORY,
            flags: u32::try_from(self.get(FLAGS)).unwrap_or(0),
            fd: descriptor(state).unwrap_or(-1),
        }
    }

    /// The request that opened it.
    #[must_use]
    pub fn opened_by(&self) -> u64 {
        self.get(UNIQUE)
    }

    /// The lock on the whole file (`flock(2)`): 0 for none.
    #[must_use]
    pub fn lock(&self) -> u64 {
        self.get(LOCK)
    }

    /// Sets the lock on the whole file.
    pub fn set_lock(&self, kind: u64) {
        self.set(LOCK, kind);
    }

    /// Sets the descriptor, after the file was reopened.
    pub fn set_descriptor(&self, fd: Option<i32>) {
        let kind = self.get(STATE) & 0xff;
        self.set(STATE, kind | with_descriptor(fd));
    }
}

impl Drop for HandleRecord {
    fn drop(&mut self) {
        if self.table.is_closed() {
            return;
        }
        self.set(STATE, 0);
        self.table.free(self.slot);
    }
}
