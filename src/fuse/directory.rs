//! Replies to READDIR and READDIRPLUS.
//!
//! Encodes the entries that a file system passes as the records that the guest reads. The
//! invariant: the records never exceed the limit given at the start, and none is partial.

use std::cell::Cell;
use std::ffi::CStr;

use zerocopy::IntoBytes;

use super::abi::{DIRENT_ALIGN, Dirent, EntryOut};
use super::dax_marks::DaxMarks;
use super::reply::entry_out;
use crate::fs::{DirEntry, DirSink, Entry};

/// Directory entries, as many as fit.
#[derive(Debug)]
pub(super) struct Records<'a> {
    bytes: Vec<u8>,
    limit: usize,
    plus: bool,
    refused: Cell<bool>,
    submounts: bool,
    marks: DaxMarks<'a>,
}

impl<'a> Records<'a> {
    /// Reserves `limit` bytes for records, those of READDIRPLUS if `plus`.
    pub(super) fn new(limit: usize, plus: bool, marks: DaxMarks<'a>) -> Self {
        Self {
            bytes: Vec::with_capacity(limit),
            limit,
            plus,
            refused: Cell::new(false),
            submounts: false,
            marks,
        }
    }

    /// Whether not even the first entry fit.
    pub(super) fn is_too_small(&self) -> bool {
        self.refused.get() && self.bytes.is_empty()
    }

    /// Whether a submount is among them.
    pub(super) fn has_submounts(&self) -> bool {
        self.submounts
    }

    /// Whether there is no entry.
    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The records.
    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    fn fits(&self, name: &CStr) -> bool {
        let header = if self.plus {
            const { size_of::<EntryOut>() + size_of::<Dirent>() }
        } else {
            size_of::<Dirent>()
        };
        header
            .checked_add(name.count_bytes())
            .and_then(|len| len.checked_next_multiple_of(DIRENT_ALIGN))
            .and_then(|len| len.checked_add(self.bytes.len()))
            .is_some_and(|len| len <= self.limit)
    }
}

impl DirSink for Records<'_> {
    fn room(&self) -> usize {
        self.limit.saturating_sub(self.bytes.len())
    }

    fn has_room(&self, name: &CStr) -> bool {
        let fits = self.fits(name);
        if !fits {
            self.refused.set(true);
        }
        fits
    }

    fn add(&mut self, dir_entry: DirEntry<'_>, entry: Option<&Entry>) {
        let name = dir_entry.name.to_bytes();
        let Ok(namelen) = u32::try_from(name.len()) else {
            return;
        };
        if !self.fits(dir_entry.name) {
            return;
        }
        if self.plus {
            // Node id 0 means that nothing was looked up.
            self.submounts |= entry.is_some_and(|entry| entry.submount);
            let out = entry
                .map(|entry| entry_out(entry, self.marks.of_entry(entry, dir_entry.name)))
                .unwrap_or_default();
            self.bytes.extend_from_slice(out.as_bytes());
        }
        let dirent = Dirent {
            ino: dir_entry.inode,
            off: dir_entry.next_offset,
            namelen,
            kind: u32::from(dir_entry.kind),
        };
        self.bytes.extend_from_slice(dirent.as_bytes());
        self.bytes.extend_from_slice(name);
        self.bytes
            .resize(self.bytes.len().next_multiple_of(DIRENT_ALIGN), 0);
    }
}
