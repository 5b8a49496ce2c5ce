//! Texts in the table: words that a record refers to. A text never changes; another takes its place,
//! by one store in the record.
//!
//! The first word of a text has its length in bytes in its upper sixteen bits. In the lower ones a name
//! has the node id of its directory, and a mark if its second word is a print; any other text has
//! nothing there.

use super::slabs::{RecordKind, word_of};
use super::{RecordRef, Table};
use crate::sys::shared::WORD;

/// The longest text, bytes.
pub(super) const LONGEST: usize = 60_000;

const LEN: u32 = 48;
const PRINTED: u64 = 1 << 47;
const PARENT: u64 = PRINTED - 1;

/// A name, and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    /// The node id of the directory.
    pub parent: u64,
    /// The name, without a NUL.
    pub bytes: Vec<u8>,
    /// A digest of the inode's file handle; 0 for none.
    pub print: u64,
}

/// `bytes` as words, the last one filled up with zeros.
fn words_of(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.chunks(WORD).map(|chunk| {
        let mut word = [0; WORD];
        word[..chunk.len()].copy_from_slice(chunk);
        u64::from_le_bytes(word)
    })
}

impl Table {
    /// Writes a text down. `None` if the table is full, or the text too long.
    pub(super) fn new_text(&self, bytes: &[u8]) -> Option<RecordRef> {
        self.new_words(bytes.len(), 0, None, bytes)
    }

    /// Writes a name down, likewise.
    pub(super) fn new_name(&self, parent: u64, bytes: &[u8], print: u64) -> Option<RecordRef> {
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
    ) -> Option<RecordRef> {
        if len > LONGEST {
            return None;
        }
        let words = 1 + usize::from(second.is_some()) + bytes.len().div_ceil(WORD);
        let place = self.take(RecordKind::text(words)?)?;
        let first = word_of(place);
        let head = [(len as u64) << LEN | low].into_iter().chain(second);
        for (n, word) in head.chain(words_of(bytes)).enumerate() {
            self.store(first + n, word);
        }
        Some(place)
    }

    /// Where the bytes of the text at `place` begin, how many they are, and its first word.
    fn text_at(&self, place: RecordRef) -> (usize, usize, u64) {
        let first = word_of(place);
        let head = self.load(first);
        let len = usize::try_from(head >> LEN).unwrap_or(0).min(LONGEST);
        let skip = if head & PRINTED == 0 { 1 } else { 2 };
        (first + skip, len, head)
    }

    /// The text at `place`.
    pub(super) fn text(&self, place: RecordRef) -> Vec<u8> {
        let (first, len, _) = self.text_at(place);
        let words = (0..len.div_ceil(WORD)).map(|n| self.load(first + n));
        words.flat_map(u64::to_le_bytes).take(len).collect()
    }

    /// The name at `place`.
    pub(super) fn name(&self, place: RecordRef) -> Name {
        Name {
            parent: self.parent_of(place),
            bytes: self.text(place),
            print: self.print_of(place),
        }
    }

    /// The print of the name at `place`; 0 for none.
    pub(super) fn print_of(&self, place: RecordRef) -> u64 {
        let (first, _, head) = self.text_at(place);
        if head & PRINTED == 0 {
            0
        } else {
            self.load(first - 1)
        }
    }

    /// The directory of the name at `place`.
    pub(super) fn parent_of(&self, place: RecordRef) -> u64 {
        self.load(word_of(place)) & PARENT
    }

    /// Whether the name at `place` is this one.
    pub(super) fn is_name(&self, place: RecordRef, parent: u64, bytes: &[u8]) -> bool {
        let (first, len, head) = self.text_at(place);
        (head & PARENT, len) == (parent, bytes.len())
            && words_of(bytes)
                .enumerate()
                .all(|(n, word)| self.load(first + n) == word)
    }

    /// Gives a text up that no record refers to any more.
    pub(super) fn end_text(&self, place: RecordRef) {
        if place != 0 {
            self.give_back(place);
        }
    }

    /// Takes the text at `place` of a table that was opened. False if it can't be one.
    pub(super) fn claim_text(&self, place: RecordRef) -> bool {
        let Some(room) = self.slabs.text_words(place) else {
            return false;
        };
        let head = self.load(word_of(place));
        let len = usize::try_from(head >> LEN).unwrap_or(usize::MAX);
        let skip = if head & PRINTED == 0 { 1 } else { 2 };
        let words = skip + len.div_ceil(WORD);
        len <= LONGEST && words <= room && self.slabs.claim(place, words)
    }
}
