//! What one thread of the workers reports.
//!
//! A thread adds to counters of its own ([`Block`]), so nothing is locked, allocated or shared with
//! another thread. The invariant: each block has one recorder at a time.

use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

use super::Registry;
use super::block::Block;
use super::layout::{Count, Gauge, OPCODES, POWERS, Section};
use super::timing::{SHORT_ROW, Timing};
use crate::sys::clock::Ticks;

/// Counts what one thread does.
#[derive(Debug)]
pub(crate) struct Recorder {
    registry: Arc<Registry>,
    block: Block,
    /// The opcodes that exist.
    known: u64,
    /// Requests that wait for the host.
    waiting: Cell<u64>,
    timing: Timing,
}

/// A request that is being served: when it has begun, if it is timed.
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

/// Requests that are served one after the other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    /// How many there are.
    pub(crate) requests: usize,
    /// One takes so little time that measuring each would be felt.
    pub(crate) is_fast: bool,
}

impl Row {
    /// Requests that are all timed.
    pub(crate) const SLOW: Self = Self {
        requests: 1,
        is_fast: false,
    };
}

impl RequestStart {
    /// Whether the request is timed.
    #[cfg(test)]
    pub(super) fn is_timed(self) -> bool {
        self.0.is_some()
    }
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
        let this = Self {
            block: registry.block(thread),
            known: registry.known(),
            timing: Timing::new(registry.clock().clone()),
            waiting: Cell::new(0),
            registry,
        };
        // What a thread that was killed had in flight.
        this.set_in_flight(0);
        this
    }

    /// The thread serves requests from now on, one after the other.
    #[inline]
    pub(crate) fn begin_row(&self, row: Row) {
        let is_sampled = row.is_fast && row.requests > SHORT_ROW;
        self.timing
            .begin_row(&self.block, self.registry.is_timed(), is_sampled);
        self.set_in_flight(1);
    }

    /// The next request of the row hasn't waited for what was done since the last one.
    #[inline]
    pub(crate) fn interrupt_row(&self) {
        self.timing.interrupt_row();
    }

    /// The thread has served the last request of a row.
    #[inline]
    pub(crate) fn end_row(&self) {
        self.timing.settle(&self.block, self.waiting.get() != 0);
        self.set_in_flight(0);
    }

    /// A request of the row waits for the host from now on.
    pub(crate) fn begin_wait(&self) {
        self.waiting.set(self.waiting.get() + 1);
        self.count(Count::Deferred, 1);
        self.set_in_flight(1);
        self.interrupt_row();
    }

    /// A request that has waited has ended.
    pub(crate) fn end_wait(&self) {
        self.waiting.set(self.waiting.get().saturating_sub(1));
        self.end_row_if_idle();
    }

    fn end_row_if_idle(&self) {
        if self.waiting.get() == 0 {
            self.timing.settle(&self.block, false);
        }
        self.set_in_flight(0);
    }

    /// Besides the requests that wait, so many are being served.
    #[inline]
    fn set_in_flight(&self, served: u64) {
        let in_flight = self.waiting.get() + served;
        self.block
            .store(Section::Gauges, Gauge::InFlight as usize, in_flight);
    }

    /// A request begins.
    #[inline]
    pub(crate) fn begin(&self) -> RequestStart {
        RequestStart(self.timing.begin())
    }

    /// A request has ended.
    #[inline]
    pub(crate) fn end(&self, begun: RequestStart, ended: &Ended) {
        let mut opcode = ended.opcode as usize;
        // One branch for the many requests that have none of these.
        if ended.read | ended.written | u64::from(ended.errno) != 0 {
            self.count(Count::BytesRead, ended.read);
            self.count(Count::BytesWritten, ended.written);
            if ended.errno != 0 {
                // Only a request that has failed may have an unknown opcode.
                opcode = self.row_of(ended.opcode);
                self.block.count_error(opcode, ended.errno);
            }
        }
        if opcode >= OPCODES {
            return;
        }
        self.block.add(Section::Requests, opcode, 1);
        if let Some(start) = begun.0 {
            let queue = usize::from(ended.queue);
            self.timing.end(&self.block, start, opcode, queue);
        }
    }

    /// Adds to a counter.
    #[inline]
    pub(crate) fn count(&self, count: Count, more: u64) {
        self.block.add(Section::Counts, count as usize, more);
    }

    /// So many `chains` were published together, and the guest was `called` for them or not.
    #[inline]
    pub(crate) fn published(&self, chains: u16, called: bool) {
        if chains != 0 {
            self.count(Count::PublishedChains, chains.into());
            self.block
                .add(Section::Batches, power_of(u64::from(chains)), 1);
        }
        if called {
            self.count(Count::Calls, 1);
        }
    }

    /// A look at a ring has found so many chains.
    #[inline]
    pub(crate) fn found(&self, chains: usize) {
        self.count(Count::FoundChains, chains as u64);
        self.block.add(Section::Depths, power_of(chains as u64), 1);
    }

    /// The time now: the end of the last request, if that was timed.
    #[inline]
    pub(crate) fn now(&self) -> Ticks {
        self.timing.now()
    }

    /// The time between two readings.
    #[inline]
    pub(crate) fn between(&self, earlier: Ticks, later: Ticks) -> Duration {
        Duration::from_nanos(self.timing.nanoseconds(earlier, later))
    }

    /// The row of an opcode: 0 if there is no such opcode.
    #[inline]
    fn row_of(&self, opcode: u32) -> usize {
        let row = opcode as usize;
        if row < OPCODES && self.known >> row & 1 != 0 {
            row
        } else {
            0
        }
    }
}

/// The bucket of a number of chains: 0, 1, 2–3, 4–7, ….
#[inline]
fn power_of(number: u64) -> usize {
    let bits = (u64::BITS - number.leading_zeros()) as usize;
    bits.min(POWERS - 1)
}
