//! Texts in the table: bytes of any length that a record refers to. A text never changes; another
//! takes its place, by one store in the record.

use super::slabs::{Kind, word_of};
use super::{Place, Table};
use crate::sys::shared::WORD;

/// The longest text, bytes.
pub(super) const LONGEST: usize = 60_000;

impl Table {
    /// Writes a text down: its length, `head`, and its bytes. `None` if the table is full, or the
    /// text too long.
    pub(super) fn new_text<const N: usize>(&self, head: [u64; N], bytes: &[u8]) -> Option<Place> {
        if bytes.len() > LONGEST {
            return None;
        }
        let words = 1 + N + bytes.len().div_ceil(WORD);
        let place = self.take(Kind::text(words)?)?;
        let first = word_of(place);
        self.store(first, bytes.len() as u64);
        for (n, word) in head.into_iter().enumerate() {
            self.store(first + 1 + n, word);
        }
        for (n, chunk) in bytes.chunks(WORD).enumerate() {
            let mut word = [0; WORD];
            word[..chunk.len()].copy_from_slice(chunk);
            self.store(first + 1 + N + n, u64::from_le_bytes(word));
        }
        Some(place)
    }

    /// The text at `place`, which was written with a head of as many words.
    pub(super) fn text<const N: usize>(&self, place: Place) -> ([u64; N], Vec<u8>) {
        let first = word_of(place);
        let len = usize::try_from(self.load(first)).unwrap_or(0).min(LONGEST);
        let head = std::array::from_fn(|n| self.load(first + 1 + n));
        let words = (0..len.div_ceil(WORD)).map(|n| self.load(first + 1 + N + n));
        (head, words.flat_map(u64::to_le_bytes).take(len).collect())
    }

    /// Gives a text up that no record refers to any more.
    pub(super) fn end_text(&self, place: Place) {
        if place != 0 {
            self.give_back(place);
        }
    }

    /// Takes the text at `place` of a table that was opened. False if it can't be one.
    pub(super) fn claim_text<const N: usize>(&self, place: Place) -> bool {
        let Some(room) = self.slabs.text_words(place) else {
            return false;
        };
        let len = self.load(word_of(place));
        let words = usize::try_from(len)
            .ok()
            .filter(|len| *len <= LONGEST)
            .map(|len| 1 + N + len.div_ceil(WORD));
        words.is_some_and(|words| words <= room && self.slabs.claim(place, words))
    }
}
