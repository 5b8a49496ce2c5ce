//! 64-bit words in memory that outlives this process: the front end's, or the state table's.
//!
//! The invariant: each access loads or stores exactly one word within the memory. The process that
//! uses the memory next sees the stores of a thread in program order, up to the one at which the
//! thread was killed.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::guest_memory::Mapping;
use crate::state::QueuePart;

/// A sequence of consecutive words.
#[derive(Clone, Debug)]
pub(super) struct SharedWords {
    memory: Backing,
    first: usize,
    len: usize,
}

#[derive(Clone, Debug)]
enum Backing {
    /// Memory of the front end. If the front end truncates its file, the words read as 0.
    Mapping(Arc<Mapping>),
    /// The state table of the server.
    Table(QueuePart),
}

impl SharedWords {
    /// The `len` words from `first` on in memory of the front end.
    pub(super) fn in_mapping(mapping: Arc<Mapping>, first: usize, len: usize) -> Self {
        Self {
            memory: Backing::Mapping(mapping),
            first,
            len,
        }
    }

    /// The `len` words from `first` on of a queue's part of the state table.
    pub(super) fn in_table(part: QueuePart, first: usize, len: usize) -> Self {
        Self {
            memory: Backing::Table(part),
            first,
            len,
        }
    }

    /// Loads the word at `index`; returns 0 if `index` is out of bounds.
    #[inline]
    pub(super) fn load(&self, index: usize) -> u64 {
        let Some(index) = self.absolute_index(index) else {
            return 0;
        };
        // Relaxed: threads of this process that need each other's words synchronize through a lock
        // or by moving a chain. Other processes use this memory before or after this one, never at
        // the same time.
        match &self.memory {
            Backing::Mapping(mapping) => mapping.load(index, Ordering::Relaxed),
            Backing::Table(part) => part
                .word(index)
                .map_or(0, |word| u64::from_le(word.load(Ordering::Relaxed))),
        }
    }

    /// Stores the word at `index`, after all previous stores. Does nothing if `index` is out of
    /// bounds.
    #[inline]
    pub(super) fn store(&self, index: usize, value: u64) {
        let Some(index) = self.absolute_index(index) else {
            return;
        };
        #[cfg(test)]
        if !crate::guest_memory::crash_injection::store_takes_effect() {
            return;
        }
        // Release: keeps the compiler from moving earlier stores behind this one. A process that
        // uses the memory after a kill sees the stores in the order in which the thread made them.
        match &self.memory {
            Backing::Mapping(mapping) => mapping.store(index, value, Ordering::Release),
            Backing::Table(part) => {
                if let Some(word) = part.word(index) {
                    word.store(value.to_le(), Ordering::Release);
                }
            }
        }
    }

    #[inline]
    fn absolute_index(&self, index: usize) -> Option<usize> {
        if index >= self.len {
            return None;
        }
        self.first.checked_add(index)
    }
}
