//! What one thread of the workers reports.
//!
//! A thread adds to counters of its own, by a load and a store, so nothing is locked, allocated or
//! shared with another thread. The invariant: each block has one recorder at a time.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::Registry;
use super::buckets::bucket_of;
use super::layout::{
    Count, ERRORS, Gauge, MAX_QUEUES, OTHERS, POWERS, ROW, Section, error_key, offset_of,
};
use crate::sys::clock::{Clock, Ticks};
use crate::sys::shared::WordRow;

/// Counts what one thread does.
#[derive(Debug)]
pub(crate) struct Recorder {
    registry: Arc<Registry>,
    /// The thread's block; `None` if the registry has none, which no caller asks for.
    block: Option<WordRow>,
    queues: usize,
    /// The opcodes that exist.
    known: u64,
    clock: Clock,
    /// The histograms that are marked as in use: those of opcodes, and of the first 64 queues.
    marked: [Cell<u64>; 2],
    /// Requests that wait for the host.
    waiting: Cell<u64>,
    /// The end of the last request, which is the start of the next one; `None` if requests aren't
    /// timed.
    last: Cell<Option<Ticks>>,
}

/// A request that is being served.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RequestStart(Option<Ticks>);

/// How a request ended.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Ended {
    /// Its opcode, as the guest has sent it.
    pub(crate) opcode: u32,
    /// The queue that it came from.
    pub(crate) queue: u16,
    /// The error that was returned; 0 for none.
    pub(crate) errno: u32,
    /// Bytes that a READ has returned.
    pub(crate) read: u64,
    /// Bytes that a WRITE has written.
    pub(crate) written: u64,
}

impl Registry {
    /// The recorder of a thread: 0 is that of the high-priority queue, the workers follow. There must
    /// be only one of each number at a time, or counts are lost.
    pub(crate) fn recorder(self: &Arc<Self>, thread: usize) -> Recorder {
        Recorder::new(Arc::clone(self), thread)
    }
}

impl Recorder {
    fn new(registry: Arc<Registry>, thread: usize) -> Self {
        let layout = registry.layout();
        let thread = thread.min(layout.threads.saturating_sub(1));
        let first = layout.header + thread * layout.block;
        let this = Self {
            block: WordRow::new(registry.words(), first, layout.block),
            known: registry.known(),
            clock: registry.clock().clone(),
            marked: [Cell::new(0), Cell::new(0)],
            waiting: Cell::new(0),
            queues: layout.part(Section::QueueLatency).words / ROW,
            last: Cell::new(None),
            registry,
        };
        // What a thread that was killed had in flight.
        this.store(Section::Gauges, Gauge::InFlight as usize, 0);
        this
    }

    /// Begins a row of requests that are served one after the other.
    #[inline]
    pub(crate) fn begin_row(&self) {
        let is_timed = self.registry.is_timed();
        self.last.set(is_timed.then(|| self.clock.now()));
    }

    /// The thread serves requests now, one after the other, or has served the last one of a row.
    #[inline]
    pub(crate) fn set_serving(&self, serving: bool) {
        let in_flight = self.waiting.get() + u64::from(serving);
        self.store(Section::Gauges, Gauge::InFlight as usize, in_flight);
    }

    /// A request of the row waits for the host from now on.
    pub(crate) fn begin_wait(&self) {
        self.waiting.set(self.waiting.get() + 1);
        self.count(Count::Deferred, 1);
        self.set_serving(true);
    }

    /// A request that has waited has ended.
    pub(crate) fn end_wait(&self) {
        self.waiting.set(self.waiting.get().saturating_sub(1));
        self.set_serving(false);
    }

    /// A request begins.
    #[inline]
    pub(crate) fn begin(&self) -> RequestStart {
        RequestStart(self.last.get())
    }

    /// A request has ended.
    #[inline]
    pub(crate) fn end(&self, begun: RequestStart, ended: &Ended) {
        let opcode = self.row_of(ended.opcode);
        self.add(Section::Requests, opcode, 1);
        if ended.read != 0 {
            self.count(Count::BytesRead, ended.read);
        }
        if ended.written != 0 {
            self.count(Count::BytesWritten, ended.written);
        }
        if ended.errno != 0 {
            self.count_error(opcode, ended.errno);
        }
        if let Some(start) = begun.0 {
            self.time(start, opcode, usize::from(ended.queue));
        }
    }

    #[inline]
    fn time(&self, start: Ticks, opcode: usize, queue: usize) {
        let now = self.clock.now();
        self.last.set(Some(now));
        let nanoseconds = self.clock.nanoseconds(start, now);
        let bucket = bucket_of(nanoseconds);
        self.mark(Gauge::Opcodes, opcode);
        let row = opcode * ROW;
        self.add(Section::OpcodeLatency, row, nanoseconds);
        self.add(Section::OpcodeLatency, row + 1 + bucket, 1);
        if self.queues != 0 {
            let queue = queue.min(self.queues - 1);
            self.mark(Gauge::Queues, queue.min(MAX_QUEUES - 1));
            let row = queue * ROW;
            self.add(Section::QueueLatency, row, nanoseconds);
            self.add(Section::QueueLatency, row + 1 + bucket, 1);
        }
    }

    /// Counts an error. Once the thread has seen more kinds than there is room for, further ones are
    /// counted without their errno.
    #[cold]
    fn count_error(&self, opcode: usize, errno: u32) {
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

    /// Adds to a counter.
    #[inline]
    pub(crate) fn count(&self, count: Count, more: u64) {
        self.add(Section::Counts, count as usize, more);
    }

    /// So many `chains` were published together, and the guest was `called` for them or not.
    #[inline]
    pub(crate) fn published(&self, chains: u16, called: bool) {
        if chains != 0 {
            self.count(Count::Batches, 1);
            self.count(Count::PublishedChains, chains.into());
            self.add(Section::Batches, power_of(u64::from(chains)), 1);
        }
        if called {
            self.count(Count::Calls, 1);
        }
    }

    /// A look at a ring has found so many chains.
    #[inline]
    pub(crate) fn found(&self, chains: usize) {
        self.count(Count::FoundChains, chains as u64);
        self.add(Section::Depths, power_of(chains as u64), 1);
    }

    /// The time now: the end of the last request, if requests are timed.
    #[inline]
    pub(crate) fn now(&self) -> Ticks {
        let last = self.last.get();
        last.unwrap_or_else(|| self.clock.now())
    }

    /// The time since then.
    #[inline]
    pub(crate) fn since(&self, start: Ticks) -> Duration {
        Duration::from_nanos(self.clock.nanoseconds(start, self.now()))
    }

    /// Marks a histogram as in use. Reading one that isn't would allocate its memory.
    #[inline]
    fn mark(&self, gauge: Gauge, number: usize) {
        let bit = 1 << (number % 64);
        let known = &self.marked[usize::from(matches!(gauge, Gauge::Queues))];
        if number >= 64 || known.get() & bit == 0 {
            known.set(known.get() | if number < 64 { bit } else { 0 });
            let at = gauge as usize + number / 64;
            self.store(Section::Gauges, at, self.load(Section::Gauges, at) | bit);
        }
    }

    /// The row of an opcode: 0 if there is no such opcode.
    #[inline]
    fn row_of(&self, opcode: u32) -> usize {
        if opcode < u64::BITS && self.known >> opcode & 1 != 0 {
            opcode as usize
        } else {
            0
        }
    }

    #[inline]
    fn word(&self, section: Section, at: usize) -> Option<&AtomicU64> {
        self.block.as_ref()?.get(offset_of(section) + at)
    }

    // Relaxed throughout: the counters order nothing, and only this thread writes them.
    #[inline]
    fn add(&self, section: Section, at: usize, more: u64) {
        if let Some(word) = self.word(section, at) {
            word.store(
                word.load(Ordering::Relaxed).wrapping_add(more),
                Ordering::Relaxed,
            );
        }
    }

    #[inline]
    fn load(&self, section: Section, at: usize) -> u64 {
        let word = self.word(section, at);
        word.map_or(0, |word| word.load(Ordering::Relaxed))
    }

    #[inline]
    fn store(&self, section: Section, at: usize, value: u64) {
        if let Some(word) = self.word(section, at) {
            word.store(value, Ordering::Relaxed);
        }
    }
}

/// The bucket of a number of chains: 0, 1, 2–3, 4–7, ….
#[inline]
fn power_of(number: u64) -> usize {
    let bits = usize::try_from(u64::BITS - number.leading_zeros()).unwrap_or(0);
    bits.min(POWERS - 1)
}
