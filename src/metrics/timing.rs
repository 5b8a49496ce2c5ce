//! Measures how long the requests of one thread take.
//!
//! Reading the clock takes as long as a fiftieth of a fast request. So all requests are timed where
//! they are few or slow, and a random part of them in a long row of fast ones. A request that was
//! timed stands for those of the same opcode that have ended untimed since the last one that was,
//! so a histogram's sum and count are those of all requests. The invariant: when no request of a
//! thread is in flight, each opcode's histogram has as many entries as requests have ended since
//! timing began, once it has any.

use std::cell::Cell;

use super::block::Block;
use super::buckets::bucket_of;
use super::layout::{Gauge, MAX_QUEUES, OPCODES, ROW, Section};
use crate::sys::clock::{Clock, Ticks};

/// A row of at most so many requests is timed completely.
pub(super) const SHORT_ROW: usize = 4;

/// One in 2 to this power of the requests of a long row is timed on average.
const RARITY: u32 = 3;

/// The lowest bit of each group of `RARITY` bits.
const LOWEST: u64 = 0x1249_2492_4924_9249;

/// A request that was timed, which stands for others.
#[derive(Clone, Copy, Debug)]
struct Sample {
    nanoseconds: u64,
    queue: usize,
    /// The count of requests of its opcode that are in the histogram.
    counted: u64,
}

/// Which requests of a thread are timed, and the last timed one of each opcode.
#[derive(Debug)]
pub(super) struct Timing {
    clock: Clock,
    /// Requests are timed.
    is_on: Cell<bool>,
    /// The row is long and fast.
    is_sampled: Cell<bool>,
    /// Requests of the row that aren't timed before the next one is.
    skipped: Cell<u32>,
    /// The state of the random numbers.
    random: Cell<u64>,
    /// The end of the last request, or the start of the row, if that is when the next request
    /// starts.
    last: Cell<Option<Ticks>>,
    /// Requests may have ended that no sample stands for yet.
    is_owing: Cell<bool>,
    /// The opcodes that have a sample, one bit each.
    sampled: Cell<u64>,
    samples: [Cell<Sample>; OPCODES],
}

impl Timing {
    pub(super) fn new(clock: Clock) -> Self {
        Self {
            clock,
            is_on: Cell::new(false),
            is_sampled: Cell::new(false),
            skipped: Cell::new(0),
            // Any number but 0 will do.
            random: Cell::new(LOWEST),
            last: Cell::new(None),
            is_owing: Cell::new(false),
            sampled: Cell::new(0),
            samples: [const { Cell::new(Sample::NONE) }; OPCODES],
        }
    }

    /// Begins a row of requests, `timed` or not, of which a part is timed if it is `sampled`.
    #[inline]
    pub(super) fn begin_row(&self, block: &Block, timed: bool, sampled: bool) {
        if timed != self.is_on.get() {
            self.switch(block, timed);
        }
        self.last.set(None);
        if timed {
            self.is_sampled.set(sampled);
            self.skipped.set(if sampled { self.draw() } else { 0 });
            if sampled {
                self.is_owing.set(true);
            }
        }
    }

    /// Something else was done since the last request.
    #[inline]
    pub(super) fn interrupt_row(&self) {
        self.last.set(None);
    }

    /// Credits what no sample stands for yet. `waiting` says that requests are in flight, which may
    /// end untimed.
    #[inline]
    pub(super) fn settle(&self, block: &Block, waiting: bool) {
        if self.is_owing.get() {
            self.is_owing.set(waiting);
            self.credit_rest(block);
        }
    }

    /// When the request that begins now has begun, if it is timed.
    #[inline]
    pub(super) fn begin(&self) -> Option<Ticks> {
        if !self.is_on.get() {
            return None;
        }
        if let Some(skipped) = self.skipped.get().checked_sub(1) {
            self.skipped.set(skipped);
            self.last.set(None);
            return None;
        }
        if self.is_sampled.get() {
            self.skipped.set(self.draw());
        }
        Some(self.now())
    }

    /// A request has ended that is timed and counted.
    #[inline]
    pub(super) fn end(&self, block: &Block, start: Ticks, opcode: usize, queue: usize) {
        let now = self.clock.now();
        self.last.set(Some(now));
        let requests = block.load(Section::Requests, opcode);
        let Some(last) = self.samples.get(opcode) else {
            return;
        };
        let weight = match self.is_on.get() {
            true => requests.wrapping_sub(last.get().counted),
            false => 1,
        };
        let sample = Sample {
            nanoseconds: self.clock.nanoseconds(start, now),
            queue,
            counted: requests,
        };
        last.set(sample);
        if self.sampled.get() >> opcode & 1 == 0 {
            self.sampled.set(self.sampled.get() | 1 << opcode);
            // Reading a histogram that isn't in use would allocate its memory.
            mark(block, Gauge::Opcodes, opcode);
        }
        credit(block, opcode, sample, weight);
    }

    /// The time now: that of the last reading, if nothing but the end of a request was since.
    #[inline]
    pub(super) fn now(&self) -> Ticks {
        if let Some(last) = self.last.get() {
            return last;
        }
        let now = self.clock.now();
        if self.is_on.get() {
            self.last.set(Some(now));
        }
        now
    }

    /// Nanoseconds between two readings.
    #[inline]
    pub(super) fn nanoseconds(&self, earlier: Ticks, later: Ticks) -> u64 {
        self.clock.nanoseconds(earlier, later)
    }

    /// How many requests to leave out. Each is the next one to be timed with the same probability,
    /// so it makes no difference where in a row a request is.
    #[inline]
    fn draw(&self) -> u32 {
        let mut skipped = 0;
        loop {
            let mut bits = self.random.get();
            bits ^= bits << 13;
            bits ^= bits >> 7;
            bits ^= bits << 17;
            self.random.set(bits);
            // The first group of bits that are all 0.
            let zeros = !(bits | bits >> 1 | bits >> 2) & LOWEST;
            if zeros != 0 {
                return skipped + zeros.trailing_zeros() / RARITY;
            }
            skipped += LOWEST.count_ones();
        }
    }

    /// Begins or ends timing. What ended before it began is no debt.
    #[cold]
    fn switch(&self, block: &Block, timed: bool) {
        self.settle(block, false);
        self.is_on.set(timed);
        for (opcode, sample) in self.samples.iter().enumerate() {
            sample.set(Sample {
                counted: block.load(Section::Requests, opcode),
                ..sample.get()
            });
        }
    }

    fn credit_rest(&self, block: &Block) {
        let mut sampled = self.sampled.get();
        while sampled != 0 {
            let opcode = sampled.trailing_zeros() as usize;
            sampled &= sampled - 1;
            let Some(last) = self.samples.get(opcode) else {
                continue;
            };
            let requests = block.load(Section::Requests, opcode);
            let sample = last.get();
            if sample.counted != requests {
                last.set(Sample {
                    counted: requests,
                    ..sample
                });
                credit(block, opcode, sample, requests.wrapping_sub(sample.counted));
            }
        }
    }
}

impl Sample {
    const NONE: Self = Self {
        nanoseconds: 0,
        queue: 0,
        counted: 0,
    };
}

/// Adds so many requests like `sample` to the histograms.
#[inline]
fn credit(block: &Block, opcode: usize, sample: Sample, weight: u64) {
    let bucket = bucket_of(sample.nanoseconds);
    let sum = sample.nanoseconds.wrapping_mul(weight);
    let row = opcode * ROW;
    block.add(Section::OpcodeLatency, row, sum);
    block.add(Section::OpcodeLatency, row + 1 + bucket, weight);
    if block.queue_count != 0 {
        let queue = sample.queue.min(block.queue_count - 1);
        mark(block, Gauge::Queues, queue.min(MAX_QUEUES - 1));
        let row = queue * ROW;
        block.add_of_queues(row, sum);
        block.add_of_queues(row + 1 + bucket, weight);
    }
}

/// Marks a histogram as in use.
#[inline]
fn mark(block: &Block, gauge: Gauge, number: usize) {
    let bit = 1 << (number % 64);
    let at = gauge as usize + number / 64;
    let known = block.load(Section::Gauges, at);
    if known & bit == 0 {
        block.store(Section::Gauges, at, known | bit);
    }
}
