//! One queue, and the slots that keep requests in flight on it.
//!
//! A [`Lane`] takes completions, resumes the programs of their slots, and counts. It waits for
//! nothing; its thread does. The invariant: as many requests are in flight as there are slots,
//! until the lane is told to stop, and no turn allocates.

use std::time::Instant;

use vmm::Queue;
use vmm::fuse::Prepared;

use crate::forgets::Forgets;
use crate::histogram::Histogram;
use crate::program::{Failure, Program, Returned};

/// The phase of a measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Requests are sent and not counted.
    WarmUp,
    /// Requests are counted.
    Measure,
    /// No new operation begins.
    Stop,
}

/// Nanoseconds since a fixed moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock(Instant);

impl Clock {
    /// A clock that starts now.
    pub(crate) fn start() -> Self {
        Self(Instant::now())
    }

    /// The nanoseconds since it started.
    pub(crate) fn now(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// One program and the request that it has in flight.
struct Slot {
    program: Box<dyn Program>,
    /// When its operation began.
    began: u64,
    /// Requests that it has sent.
    sent: u64,
}

/// One queue and its slots.
pub(crate) struct Lane {
    queue: Queue,
    slots: Box<[Slot]>,
    /// The number of the first slot; no other lane's slots have the same numbers.
    first: u64,
    /// How many operations are still to be counted, if that is limited.
    budget: Option<u64>,
    /// The operations' latencies.
    latencies: Histogram,
    /// When the last counted operation was done.
    last: u64,
}

/// A lane's result.
pub(crate) struct Remains {
    pub(crate) queue: Queue,
    /// The number of its first slot.
    pub(crate) first: u64,
    pub(crate) latencies: Histogram,
    pub(crate) last: u64,
}

impl Lane {
    /// A lane whose slots run these programs.
    pub(crate) fn new(
        queue: Queue,
        programs: Vec<Box<dyn Program>>,
        first: u64,
        budget: Option<u64>,
    ) -> Self {
        let slot = |program| Slot {
            program,
            began: 0,
            sent: 0,
        };
        Self {
            queue,
            slots: programs.into_iter().map(slot).collect(),
            first,
            budget,
            latencies: Histogram::new(),
            last: 0,
        }
    }

    /// The queue, to wait for.
    pub(crate) fn queue(&mut self) -> &mut Queue {
        &mut self.queue
    }

    /// Whether nothing is in flight.
    pub(crate) fn is_idle(&self) -> bool {
        self.queue.in_flight() == 0
    }

    /// Begins an operation in each slot.
    pub(crate) fn start(&mut self, clock: &Clock) -> Result<(), Failure> {
        let now = clock.now();
        for (number, slot) in (self.first..).zip(&mut self.slots) {
            slot.begin(&mut self.queue, number, now)?;
        }
        Ok(())
    }

    /// Takes completions, and sends the next requests. False if there were no completions.
    pub(crate) fn turn(
        &mut self,
        clock: &Clock,
        phase: Phase,
        forgets: &Forgets,
    ) -> Result<bool, Failure> {
        let ready = self.queue.ready()?;
        if ready == 0 {
            return Ok(false);
        }
        let now = clock.now();
        for _ in 0..ready {
            let Some(used) = self.queue.pop()? else {
                break;
            };
            let number = (used.token & 0xffff) >> 1;
            let index = number.checked_sub(self.first);
            let index = index.and_then(|index| usize::try_from(index).ok());
            let Some(slot) = index.and_then(|index| self.slots.get_mut(index)) else {
                return Err(Failure::Stray(used.token));
            };
            let returned = Returned {
                unique: used.token,
                used: used.len,
            };
            if let Some(next) = slot.program.reply(returned, forgets)? {
                slot.sent += 1;
                send(next, &mut self.queue, number, slot.sent)?;
                continue;
            }
            if phase == Phase::Measure && self.budget != Some(0) {
                self.latencies.record(now - slot.began);
                self.budget = self.budget.map(|left| left - 1);
                self.last = now;
            }
            if phase != Phase::Stop && self.budget != Some(0) {
                slot.begin(&mut self.queue, number, now)?;
            }
        }
        forgets.kick()?;
        Ok(true)
    }

    /// Ends the lane.
    pub(crate) fn finish(self) -> Remains {
        Remains {
            queue: self.queue,
            first: self.first,
            latencies: self.latencies,
            last: self.last,
        }
    }
}

impl Slot {
    fn begin(&mut self, queue: &mut Queue, number: u64, now: u64) -> Result<(), Failure> {
        self.began = now;
        self.sent += 1;
        let sent = self.sent;
        send(self.program.begin()?, queue, number, sent)
    }
}

/// Sends a request, with a kick of its own as in Linux, if the server wants one.
fn send(request: &Prepared, queue: &mut Queue, number: u64, sent: u64) -> Result<(), Failure> {
    request.stage(queue, sent << 16 | number << 1)?;
    queue.kick()?;
    Ok(())
}
