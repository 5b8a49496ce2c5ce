//! A journal for each thread: what it has counted so far for the request that it serves, and which
//! inode it is about to remove.
//!
//! If a process is killed while it serves a request, the next one must know how far the request
//! came. A thread's journal holds its lookup counts as long as it serves that request, with one
//! note before and one after each count. So at most one count is in doubt, and the mark in the
//! inode's record resolves it. The threads of a process write to one half of the space; the notes
//! of the previous process stay in the other half until the process after that. A request that
//! counts nothing leaves the notes of the last one that did. The invariant: a thread's notes belong
//! to one request.
//!
//! The words of a thread: the request; the number of notes; the number of the inode that was seen;
//! then the notes, each a node id and whether lookups of it were dropped.

use std::sync::atomic::Ordering;

use super::header::{THREADS, WORDS};
use super::{InodeRecord, Table};

const UNIQUE: usize = 0;
const COUNT: usize = 1;
const SEEN: usize = 2;
const NOTES: usize = 3;

/// Bit of a note: lookups were dropped.
const DROPPED: u64 = 1;

/// The journal of one thread.
#[derive(Clone, Copy, Debug)]
pub struct JournalEntry<'a> {
    table: &'a Table,
    first: usize,
}

/// The journal of a thread of a previous process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PreviousEntry {
    /// The request.
    pub unique: u64,
    /// The number of the inode that the thread was about to remove or rename; 0 for none.
    pub seen: u64,
    /// Nodes of which it added a lookup, one entry for each.
    pub added: Vec<u64>,
    /// Nodes of which it dropped lookups.
    pub dropped: Vec<u64>,
    /// The last node, if it is in doubt whether its count was changed, and whether lookups were
    /// dropped.
    pub in_doubt: Option<(u64, bool)>,
    first: usize,
}

impl Table {
    /// The journal of the thread with number `index`; `None` beyond the last.
    #[inline]
    #[must_use]
    pub fn journal_entry(&self, index: usize) -> Option<JournalEntry<'_>> {
        let half = self.half.load(Ordering::Relaxed);
        (index < THREADS).then(|| self.entry_at(half * THREADS + index))
    }

    /// The calling thread's journal, for notes of the request `unique`. Most requests count
    /// nothing, and so never need it.
    #[inline]
    #[must_use]
    pub fn own_journal_entry(&self, unique: u64) -> Option<JournalEntry<'_>> {
        let entry = self.journal_entry(thread::number())?;
        if self.load(entry.first + UNIQUE) != unique {
            entry.begin(unique);
        }
        Some(entry)
    }

    /// Discards all notes, because request numbers start over.
    pub fn clear_thread_journals(&self) {
        for index in 0..thread::numbers().min(THREADS) {
            for half in [0, 1] {
                self.store(self.entry_at(half * THREADS + index).first + UNIQUE, 0);
            }
        }
    }

    fn entry_at(&self, index: usize) -> JournalEntry<'_> {
        JournalEntry {
            table: self,
            first: self.layout.journal_entries + index * WORDS,
        }
    }

    /// Returns the journals that threads of previous processes left, for the requests that `wanted`
    /// accepts. The threads of this process use the other half from now on.
    pub fn take_journal_entries(&self, wanted: impl Fn(u64) -> bool) -> Vec<PreviousEntry> {
        let last = self.half_in_use();
        let halves = [last, 1 - last];
        let mut found: Vec<PreviousEntry> = Vec::new();
        for half in halves {
            for index in 0..THREADS {
                let entry = self.entry_at(half * THREADS + index).read();
                let is_new = found.iter().all(|one| one.unique != entry.unique);
                if entry.unique != 0 && wanted(entry.unique) && is_new {
                    found.push(entry);
                }
            }
        }
        self.use_half(1 - last);
        found
    }

    /// Reverts the last lookup in `entry`, which was added to the node of `record`.
    pub fn undo(&self, entry: &mut PreviousEntry, record: &InodeRecord) {
        // In this order a kill in between leaves one lookup too many, which keeps the inode known,
        // and never one too few, which would lose it.
        entry.added.pop();
        self.store(entry.first + COUNT, entry.added.len() as u64);
        record.set_lookups(record.lookups().saturating_sub(1), 0, false);
    }
}

impl JournalEntry<'_> {
    /// Starts the journal of the request `unique`.
    pub fn begin(&self, unique: u64) {
        self.table.store(self.first + UNIQUE, 0);
        self.table.store(self.first + COUNT, 0);
        self.table.store(self.first + SEEN, 0);
        self.table.store(self.first + UNIQUE, unique);
    }

    /// Records the number of the inode that is about to be removed or renamed.
    pub fn seen(&self, number: u64) {
        self.table.store(self.first + SEEN, number);
    }

    /// Records that a lookup of `node` is about to be added, or lookups to be dropped.
    #[inline]
    pub fn before(&self, node: u64, dropped: bool) {
        let count = self.count();
        if NOTES + count + 1 < WORDS {
            let note = node << 1 | u64::from(dropped);
            self.table.store(self.first + NOTES + count + 1, 0);
            self.table.store(self.first + NOTES + count, note);
        }
    }

    /// Records that this has been done.
    #[inline]
    pub fn after(&self) {
        let count = self.count();
        if NOTES + count + 1 < WORDS {
            self.table.store(self.first + COUNT, count as u64 + 1);
        }
    }

    fn count(&self) -> usize {
        let count = self.table.load(self.first + COUNT);
        usize::try_from(count).map_or(WORDS, |count| count.min(WORDS))
    }

    fn read(&self) -> PreviousEntry {
        let mut entry = PreviousEntry {
            unique: self.table.load(self.first + UNIQUE),
            seen: self.table.load(self.first + SEEN),
            first: self.first,
            ..PreviousEntry::default()
        };
        if entry.unique == 0 {
            return entry;
        }
        let count = self.count().min(WORDS - NOTES - 1);
        for n in 0..count {
            let note = self.table.load(self.first + NOTES + n);
            if note & DROPPED == 0 {
                entry.added.push(note >> 1);
            } else {
                entry.dropped.push(note >> 1);
            }
        }
        let last = self.table.load(self.first + NOTES + count);
        let node = last >> 1;
        // A node that was counted before carries the mark of that count.
        if last != 0 && !entry.added.contains(&node) && !entry.dropped.contains(&node) {
            entry.in_doubt = Some((node, last & DROPPED != 0));
        }
        entry
    }
}

/// Numbers of the process's threads. The number of a thread that has ended is reused.
mod thread {
    use std::cell::OnceCell;
    use std::sync::{Mutex, PoisonError};

    /// Numbers that ended threads have returned, and the first number that was never used.
    static NUMBERS: Mutex<(Vec<usize>, usize)> = Mutex::new((Vec::new(), 0));

    struct Number(usize);

    impl Number {
        fn new() -> Self {
            let mut numbers = NUMBERS.lock().unwrap_or_else(PoisonError::into_inner);
            Self(numbers.0.pop().unwrap_or_else(|| {
                numbers.1 += 1;
                numbers.1 - 1
            }))
        }
    }

    impl Drop for Number {
        fn drop(&mut self) {
            let mut numbers = NUMBERS.lock().unwrap_or_else(PoisonError::into_inner);
            numbers.0.push(self.0);
        }
    }

    /// The maximum number of threads that have had a number at the same time.
    pub(super) fn numbers() -> usize {
        NUMBERS.lock().unwrap_or_else(PoisonError::into_inner).1
    }

    thread_local! {
        static NUMBER: OnceCell<Number> = const { OnceCell::new() };
    }

    /// The calling thread's number.
    #[inline]
    #[must_use]
    pub(super) fn number() -> usize {
        NUMBER.with(|number| number.get_or_init(Number::new).0)
    }
}
