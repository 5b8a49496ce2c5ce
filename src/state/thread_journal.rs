//! What each thread is doing: of the request that it serves, what has been counted so far, and what was
//! seen before it was removed.
//!
//! Of a request that was under way when its process was killed, the next one has to know how far it
//! came. What a thread has counted stands here as long as it serves that request, one note before and
//! one after each count; so of all counts at most one is in doubt, and of that the mark in the record
//! tells. The threads of a process write to one half of the room, and what the process before has left
//! stays in the other until the next but one. A request that counts nothing leaves the notes of the
//! last one that did. The invariant: a thread's notes are of one request.
//!
//! The words of a thread: the request; how many notes; the number of the inode that was seen; then the
//! notes, a node id and whether lookups of it were given back.

use std::sync::atomic::Ordering;

use super::{InodeRecord, Table};

/// Threads of a process that there is room for.
pub(super) const THREADS: usize = 256;
/// Words of each: as many notes as a listing can need, and a few pages in all.
pub(super) const WORDS: usize = 8192;

const UNIQUE: usize = 0;
const COUNT: usize = 1;
const SEEN: usize = 2;
const NOTES: usize = 3;

/// Of a note: lookups were given back.
const GIVEN_BACK: u64 = 1;

/// A thread's room.
#[derive(Clone, Copy, Debug)]
pub struct JournalEntry<'a> {
    table: &'a Table,
    first: usize,
}

/// What a thread of another process was doing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// The request.
    pub unique: u64,
    /// The number of the inode that it was about to remove or to move; 0 for none.
    pub seen: u64,
    /// Nodes of which it has added a lookup, one for each.
    pub added: Vec<u64>,
    /// Nodes of which it has given lookups back.
    pub given_back: Vec<u64>,
    /// The last node, if it is in doubt whether that was still done, and whether it was given back.
    pub doubtful: Option<(u64, bool)>,
    first: usize,
}

impl Table {
    /// The room of the thread with number `index`; `None` beyond the last.
    #[inline]
    #[must_use]
    pub fn doing(&self, index: usize) -> Option<JournalEntry<'_>> {
        let half = self.half.load(Ordering::Relaxed);
        (index < THREADS).then(|| self.doing_at(half * THREADS + index))
    }

    /// The calling thread's room, for notes of the request `unique`. Most requests count nothing, and
    /// so never ask for it.
    #[inline]
    #[must_use]
    pub fn own_journal_entry(&self, unique: u64) -> Option<JournalEntry<'_>> {
        let entry = self.doing(thread::number())?;
        if self.load(entry.first + UNIQUE) != unique {
            entry.begin(unique);
        }
        Some(entry)
    }

    /// Forgets all notes: the numbers of requests begin anew.
    pub fn clear_thread_journals(&self) {
        for index in 0..thread::numbers().min(THREADS) {
            for half in [0, 1] {
                self.store(self.doing_at(half * THREADS + index).first + UNIQUE, 0);
            }
        }
    }

    fn doing_at(&self, room: usize) -> JournalEntry<'_> {
        JournalEntry {
            table: self,
            first: self.layout.journal_entries + room * WORDS,
        }
    }

    /// What threads of the processes before this one were doing, of the requests for which
    /// `wanted` says so; this one's threads have the other half from now on.
    pub fn take_doings(&self, wanted: impl Fn(u64) -> bool) -> Vec<Done> {
        let last = self.half_in_use();
        let halves = [last, 1 - last];
        let mut found: Vec<Done> = Vec::new();
        for half in halves {
            for index in 0..THREADS {
                let done = self.doing_at(half * THREADS + index).read();
                let is_new = found.iter().all(|one| one.unique != done.unique);
                if done.unique != 0 && wanted(done.unique) && is_new {
                    found.push(done);
                }
            }
        }
        self.use_half(1 - last);
        found
    }

    /// Takes back that a lookup was added to the node of `record`, the last that `done` has noted.
    pub fn undo(&self, done: &mut Done, record: &InodeRecord) {
        // In this order a kill in between leaves one too many, which keeps an inode known, and never
        // one too few, which would lose it.
        done.added.pop();
        self.store(done.first + COUNT, done.added.len() as u64);
        record.set_lookups(record.lookups().saturating_sub(1), 0, false);
    }
}

impl JournalEntry<'_> {
    /// The thread serves the request `unique` from now on.
    pub fn begin(&self, unique: u64) {
        self.table.store(self.first + UNIQUE, 0);
        self.table.store(self.first + COUNT, 0);
        self.table.store(self.first + SEEN, 0);
        self.table.store(self.first + UNIQUE, unique);
    }

    /// It has seen the inode with this number, and is about to remove or to move it.
    pub fn seen(&self, number: u64) {
        self.table.store(self.first + SEEN, number);
    }

    /// It is about to add a lookup of `node`, or to give some back.
    #[inline]
    pub fn before(&self, node: u64, given_back: bool) {
        let count = self.count();
        if NOTES + count + 1 < WORDS {
            let note = node << 1 | u64::from(given_back);
            self.table.store(self.first + NOTES + count + 1, 0);
            self.table.store(self.first + NOTES + count, note);
        }
    }

    /// It has done so.
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

    fn read(&self) -> Done {
        let mut done = Done {
            unique: self.table.load(self.first + UNIQUE),
            seen: self.table.load(self.first + SEEN),
            first: self.first,
            ..Done::default()
        };
        if done.unique == 0 {
            return done;
        }
        let count = self.count().min(WORDS - NOTES - 1);
        for n in 0..count {
            let note = self.table.load(self.first + NOTES + n);
            if note & GIVEN_BACK == 0 {
                done.added.push(note >> 1);
            } else {
                done.given_back.push(note >> 1);
            }
        }
        let last = self.table.load(self.first + NOTES + count);
        let node = last >> 1;
        // A node that was counted before carries the mark of that.
        if last != 0 && !done.added.contains(&node) && !done.given_back.contains(&node) {
            done.doubtful = Some((node, last & GIVEN_BACK != 0));
        }
        done
    }
}

/// The number of the calling thread among those of the process, taken anew by another when the thread
/// has ended.
mod thread {
    use std::cell::OnceCell;
    use std::sync::{Mutex, PoisonError};

    /// Numbers that threads have given back, and the first that was never given out.
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

    /// How many threads have ever had a number at the same time.
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
