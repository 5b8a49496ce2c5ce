//! Records of open files and directories.
//!
//! The words of a record: handle; node id; the request that opened it; flags; what the
//! whole file is locked for; two that are spare; state and descriptor.

use std::sync::Arc;

use super::inodes::{descriptor, with_descriptor};
use super::slabs::{RecordKind, STATE, word_of};
use super::{RecordRef, StateError, Table};

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
    /// What the guest calls it.
    pub handle: u64,
    /// The inode.
    pub node: u64,
    /// It is a directory.
    pub directory: bool,
    /// What it was opened with: flags of `open(2)`.
    pub flags: u32,
    /// The number of its descriptor.
    pub fd: i32,
}

/// The record of an open file; dropping it ends it, unless the table is closed.
#[derive(Debug)]
pub struct HandleRecord {
    table: Arc<Table>,
    place: RecordRef,
}

impl Table {
    /// Writes down what the request `unique` has opened. `None` if the table is full.
    pub fn new_handle(
        self: &Arc<Self>,
        fields: &HandleFields,
        unique: u64,
    ) -> Option<HandleRecord> {
        let place = self.take(RecordKind::Handle)?;
        let record = HandleRecord {
            table: Arc::clone(self),
            place,
        };
        record.set(HANDLE, fields.handle);
        record.set(NODE, fields.node);
        record.set(UNIQUE, unique);
        record.set(FLAGS, u64::from(fields.flags));
        record.set(LOCK, 0);
        let sort = if fields.directory { DIRECTORY } else { FILE };
        record.set(STATE, sort | with_descriptor(Some(fields.fd)));
        Some(record)
    }

    /// The open files of a table that was opened. To be called once.
    pub fn take_handles(self: &Arc<Self>) -> Vec<HandleRecord> {
        let mut records = Vec::new();
        self.slabs.each(RecordKind::Handle, |place| {
            records.push(HandleRecord {
                table: Arc::clone(self),
                place,
            });
        });
        records
    }

    pub(super) fn check_handles(&self) -> Result<(), StateError> {
        let mut fault = None;
        let mut handles = std::collections::HashSet::new();
        let known = self.handles_given_out();
        self.slabs.each(RecordKind::Handle, |place| {
            let at = word_of(place);
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
        self.table.load(word_of(self.place) + at)
    }

    fn set(&self, at: usize, value: u64) {
        self.table.store(word_of(self.place) + at, value);
    }

    /// What was written down.
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

    /// What the whole file is locked for (`flock(2)`): 0 for nothing.
    #[must_use]
    pub fn lock(&self) -> u64 {
        self.get(LOCK)
    }

    /// Sets it.
    pub fn set_lock(&self, kind: u64) {
        self.set(LOCK, kind);
    }

    /// Sets its descriptor, where it was opened anew.
    pub fn set_descriptor(&self, fd: Option<i32>) {
        let sort = self.get(STATE) & 0xff;
        self.set(STATE, sort | with_descriptor(fd));
    }
}

impl Drop for HandleRecord {
    fn drop(&mut self) {
        if self.table.is_closed() {
            return;
        }
        self.set(STATE, 0);
        self.table.give_back(self.place);
    }
}
