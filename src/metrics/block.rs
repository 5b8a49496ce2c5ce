//! The counters of one thread.
//!
//! A thread adds to counters of its own by a load and a store. All sections but the histograms of
//! queues are at constant offsets, so a counter is one address. The invariant: each block has one
//! writer at a time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::layout::{BLOCK, ERRORS, Layout, OTHERS, ROW, Section, error_key, offset_of};
use crate::sys::shared::{MappedWords, WordArray, WordRow};

/// The counters of one thread.
#[derive(Debug)]
pub(super) struct Block {
    words: WordArray<BLOCK>,
    /// The histograms of queues.
    queues: WordRow,
    /// How many queues have one.
    pub(super) queue_count: usize,
}

impl Block {
    /// The block of a thread; `None` if it isn't within `words`.
    pub(super) fn new(words: &Arc<MappedWords>, layout: &Layout, thread: usize) -> Option<Self> {
        let first = layout.header + thread * layout.block;
        let queues = layout.part(Section::QueueLatency);
        Some(Self {
            words: WordArray::new(words, first)?,
            queues: WordRow::new(words, first + queues.first, queues.words)?,
            queue_count: queues.words / ROW,
        })
    }

    /// Counts an error. Once the thread has seen more kinds than there is room for, further ones
    /// are counted without their errno.
    #[cold]
    pub(super) fn count_error(&self, opcode: usize, errno: u32) {
        let key = error_key(opcode, errno);
        let first = usize::try_from(errno).unwrap_or(0).wrapping_mul(31) + opcode * 7;
        for slot in (first..first + ERRORS).map(|slot| slot % (ERRORS - 1)) {
            let known = self.load(Section::Errors, 2 * slot);
            if known == 0 {
                self.store(Section::Errors, 2 * slot, key);
            }
            if known == 0 || known == key {
                return self.add(Section::Errors, 2 * slot + 1, 1);
            }
        }
        self.store(Section::Errors, 2 * (ERRORS - 1), OTHERS);
        self.add(Section::Errors, 2 * ERRORS - 1, 1);
    }

    #[inline]
    fn word(&self, section: Section, at: usize) -> Option<&AtomicU64> {
        self.words.words().get(offset_of(section) + at)
    }

    #[inline]
    pub(super) fn add(&self, section: Section, at: usize, more: u64) {
        if let Some(word) = self.word(section, at) {
            add(word, more);
        }
    }

    /// Adds to a word of the histograms of queues.
    #[inline]
    pub(super) fn add_of_queues(&self, at: usize, more: u64) {
        if let Some(word) = self.queues.get(at) {
            add(word, more);
        }
    }

    #[inline]
    pub(super) fn load(&self, section: Section, at: usize) -> u64 {
        let word = self.word(section, at);
        word.map_or(0, |word| word.load(Ordering::Relaxed))
    }

    #[inline]
    pub(super) fn store(&self, section: Section, at: usize, value: u64) {
        if let Some(word) = self.word(section, at) {
            word.store(value, Ordering::Relaxed);
        }
    }
}

// Relaxed throughout: the counters order nothing, and only this thread writes them.
#[inline]
fn add(word: &AtomicU64, more: u64) {
    let sum = word.load(Ordering::Relaxed).wrapping_add(more);
    word.store(sum, Ordering::Relaxed);
}
