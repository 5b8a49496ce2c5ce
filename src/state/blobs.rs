//! Blobs in the state table: names, file handles and lock ranges that records refer to. A blob
//! never changes; a record switches to another blob by one store.
//!
//! The first word of a blob has its length in bytes in the upper 16 bits. The lower bits are 0,
//! except for a name: there they hold the node id of its directory, and a mark if the second word
//! is a print (a digest of the inode's file handle).

use super::slabs::{RecordKind, word_of};
use super::{SlotRef, Table};
use crate::sys::shared::WORD;

/// The longest blob, bytes.
pub(super) const MAX_LEN: usize = 60_000;

const LEN: u32 = 48;
const PRINTED: u64 = 1 << 47;
const PARENT: u64 = PRINTED - 1;

/// A name and its directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    /// The node id of the directory.
    pub parent: u64,
    /// The name, without a NUL.
    pub bytes: Vec<u8>,
    /// A digest of the inode's file handle; 0 for none.
    pub print: u64,
}

/// `bytes` as words, the last one padded with zeros.
fn words_of(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.chunks(WORD).map(|chunk| {
        let mut word = [0; WORD];
        word[..chunk.len()].copy_from_slice(chunk);
        u64::from_le_bytes(word)
    })
}

impl Table {
    /// Writes a blob. `None` if the table is full, or the blob too long.
    pub(super) fn new_blob(&self, bytes: &[u8]) -> Option<SlotRef> {
        self.new_words(bytes.len(), 0, None, bytes)
    }

    /// Writes a name, likewise.
    pub(super) fn new_name(&self, parent: u64, bytes: &[u8], print: u64) -> Option<SlotRef> {
        let print = (print != 0).then_some(print);
        let marked = if print.is_some() { PRINTED } else { 0 };
        if parent > PARENT {
            return None;
        }
        self.new_words(bytes.len(), parent | marked, print, bytes)
    }

    fn new_words(
        &self,
        len: usize,
        low: u64,
        second: Option<u64>,
        bytes: &[u8],
    ) -> Option<SlotRef> {
        if len > MAX_LEN {
            return None;
        }
        let words = 1 + usize::from(second.is_some()) + bytes.len().div_ceil(WORD);
        let slot = self.allocate(RecordKind::blob(words)?)?;
        let first = word_of(slot);
        let head = [(len as u64) << LEN | low].into_iter().chain(second);
        for (n, word) in head.chain(words_of(bytes)).enumerate() {
            self.store(first + n, word);
        }
        Some(slot)
    }

    /// Position of the bytes of the blob at `slot`, their number, and the first word.
    fn blob_at(&self, slot: SlotRef) -> (usize, usize, u64) {
        let first = word_of(slot);
        let head = self.load(first);
        let len = usize::try_from(head >> LEN).unwrap_or(0).min(MAX_LEN);
        let skip = if head & PRINTED == 0 { 1 } else { 2 };
        (first + skip, len, head)
    }

    /// The blob at `slot`.
    pub(super) fn blob(&self, slot: SlotRef) -> Vec<u8> {
        let (first, len, _) = self.blob_at(slot);
        let words = (0..len.div_ceil(WORD)).map(|n| self.load(first + n));
        words.flat_map(u64::to_le_bytes).take(len).collect()
    }

    /// The name at `slot`.
    pub(super) fn name(&self, slot: SlotRef) -> Name {
        Name {
            parent: self.parent_of(slot),
            bytes: self.blob(slot),
            print: self.print_of(slot),
        }
    }

    /// The print of the name at `slot`; 0 for none.
    pub(super) fn print_of(&self, slot: SlotRef) -> u64 {
        let (first, _, head) = self.blob_at(slot);
        if head & PRINTED == 0 {
            0
        } else {
            self.load(first - 1)
        }
    }

    /// The directory of the name at `slot`.
    pub(super) fn parent_of(&self, slot: SlotRef) -> u64 {
        self.load(word_of(slot)) & PARENT
    }

    /// Whether the name at `slot` is `bytes` in `parent`.
    pub(super) fn is_name(&self, slot: SlotRef, parent: u64, bytes: &[u8]) -> bool {
        let (first, len, head) = self.blob_at(slot);
        (head & PARENT, len) == (parent, bytes.len())
            && words_of(bytes)
                .enumerate()
                .all(|(n, word)| self.load(first + n) == word)
    }

    /// Frees a blob that no record refers to any more.
    pub(super) fn free_blob(&self, slot: SlotRef) {
        if slot != 0 {
            self.free(slot);
        }
    }

    /// Claims the blob at `slot` of a table that was opened. False if it is not a valid blob.
    pub(super) fn claim_blob(&self, slot: SlotRef) -> bool {
        let Some(room) = self.slabs.blob_words(slot) else {
            return false;
        };
        let head = self.load(word_of(slot));
        let len = usize::try_from(head >> LEN).unwrap_or(usize::MAX);
        let skip = if head & PRINTED == 0 { 1 } else { 2 };
        let words = skip + len.div_ceil(WORD);
        len <= MAX_LEN && words <= room && self.slabs.claim(slot, words)
    }
}
