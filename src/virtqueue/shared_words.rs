//! Words of 64 bits in memory that outlives this process: the front end's, or the state table's.
//!
//! The invariant: each access is one load or store of one word, and none lies outside of the
//! memory; whoever has the memory next sees the stores of one thread in their order, up to where
//! it was killed.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::memory::Mapping;
use crate::state::QueuePart;

/// Some words that follow one another.
#[derive(Clone, Debug)]
pub(super) struct Words {
    memory: Where,
    first: usize,
    len: usize,
}

#[derive(Clone, Debug)]
enum Where {
    /// Of the front end, which may take it away: what is gone is 0.
    Handed(Arc<Mapping>),
    /// Of the server.
    Kept(QueuePart),
}

impl Words {
    /// `len` words from `first` on of what the front end has handed over.
    pub(super) fn handed(mapping: Arc<Mapping>, first: usize, len: usize) -> Self {
        Self {
            memory: Where::Handed(mapping),
            first,
            len,
        }
    }

    /// `len` words from `first` on of what is kept of a queue.
    pub(super) fn kept(part: QueuePart, first: usize, len: usize) -> Self {
        Self {
            memory: Where::Kept(part),
            first,
            len,
        }
    }

    /// The word at `index`, 0 where there is none.
    #[inline]
    pub(super) fn load(&self, index: usize) -> u64 {
        let Some(index) = self.place(index) else {
            return 0;
        };
        // Relaxed: threads of this process that have to see each other's words meet at a lock or
        // hand a chain over; other processes have this memory before and after, not meanwhile.
        match &self.memory {
            Where::Handed(mapping) => mapping.load(index, Ordering::Relaxed),
            Where::Kept(part) => part
                .word(index)
                .map_or(0, |word| u64::from_le(word.load(Ordering::Relaxed))),
        }
    }

    /// Stores the word at `index`, if there is one, after all that was stored before.
    #[inline]
    pub(super) fn store(&self, index: usize, value: u64) {
        let Some(index) = self.place(index) else {
            return;
        };
        #[cfg(test)]
        if !super::crash_injection::is_alive() {
            return;
        }
        // Release: the compiler may not move what comes before behind it. To a process that has
        // the memory after a kill, stores have come in the order in which the thread made them.
        match &self.memory {
            Where::Handed(mapping) => mapping.store(index, value, Ordering::Release),
            Where::Kept(part) => {
                if let Some(word) = part.word(index) {
                    word.store(value.to_le(), Ordering::Release);
                }
            }
        }
    }

    #[inline]
    fn place(&self, index: usize) -> Option<usize> {
        if index >= self.len {
            return None;
        }
        self.first.checked_add(index)
    }
}
