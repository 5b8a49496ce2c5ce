//! Chooses after how many chains a worker publishes replies while it drains a queue.
//!
//! A sleeping guest needs 10–50 µs to wake up, and a running one processes replies and sends new
//! requests. Both should overlap with the rest of the drain, because the worker is idle after it. A
//! guest that falls asleep in between must be called for each batch, which costs a few
//! microseconds, so a drain of slow chains has only two batches. The invariant: a complete reply
//! waits for at most half of the chains that the drain found at its start.

use std::time::Duration;

use crate::metrics::{Recorder, Ticks};

/// The largest batch of fast chains. Measured at 32 in flight: 0.64 million GETATTR a second with
/// two batches for each drain, 0.85 with batches of 4, and 0.73 with batches of 1. At 8 in flight
/// OPEN, READ, RELEASE reach 0.11, 0.14 and 0.21 million.
const MAX_FAST_BATCH: usize = 4;

/// A batch of fast chains is one part in this many of the chains on the ring.
const FRACTION: usize = 4;

/// The largest batch of chains that are neither fast nor slow.
const MAX_BATCH: usize = 8;

/// Such a batch is one part in this many of the chains on the ring. Measured with 8 in flight: CREATE
/// to FORGET takes 6 % less processor time than with batches of fast chains, and LOOKUP to FORGET 3
/// %, as the guest is called half as often. OPEN, READ, RELEASE of cached files, which are fast,
/// would take 20 % more.
const PART: usize = 2;

/// A chain that takes longer is slow: the guest processes the reply and falls asleep meanwhile.
const SLOW: Duration = Duration::from_micros(8);

/// A chain that takes less is fast: the guest is called for small batches, and reading the clock for
/// each would take a hundredth of the time or more.
const FAST: Duration = Duration::from_micros(2);

/// The batches of one queue.
#[derive(Debug, Default)]
pub(super) struct BatchSize {
    /// Moving average of the time that a chain takes.
    chain_time: Duration,
    /// Half of the chains that the drain found at its start.
    half: usize,
    /// Chains of the current batch.
    size: usize,
    /// Chains of it that are still to be served.
    left: usize,
    /// The last reading of the clock. None for the first batch of a drain that finds a single chain,
    /// which saves reading it.
    started: Option<Ticks>,
    /// Chains that were served since then.
    since: usize,
}

impl BatchSize {
    /// Starts a drain that finds `waiting` chains on the ring.
    pub(super) fn begin(&mut self, waiting: usize, clock: &Recorder) {
        self.half = waiting / 2;
        self.started = (waiting > 1).then(|| clock.now());
        self.since = 0;
        self.next(waiting);
    }

    /// Whether it is known that chains take little time.
    pub(super) fn is_fast(&self) -> bool {
        self.chain_time != Duration::ZERO && self.chain_time < FAST
    }

    /// Counts one served chain. Returns whether to publish now. `waiting` returns how many chains
    /// are still on the ring.
    pub(super) fn served(&mut self, waiting: impl FnOnce() -> usize, clock: &Recorder) -> bool {
        self.since += 1;
        if self.left > 1 {
            self.left -= 1;
            return false;
        }
        let waiting = waiting();
        if waiting == 0 {
            // The drain ends and publishes then, or continues with chains that arrive right now.
            return false;
        }
        // The batches of fast chains are measured together when the drain ends.
        if self.started.is_none() || !self.is_fast() {
            self.measure(clock);
        }
        self.next(waiting);
        true
    }

    /// Ends a drain.
    pub(super) fn end(&mut self, clock: &Recorder) {
        if self.started.is_some() && self.since != 0 {
            self.measure(clock);
        }
    }

    /// Reads the clock, and learns how long the chains took that were served since it was read last.
    fn measure(&mut self, clock: &Recorder) {
        let now = clock.now();
        if let Some(started) = self.started.replace(now) {
            self.learn(clock.between(started, now));
        }
        self.since = 0;
    }

    /// Updates the average with the time since the last reading.
    fn learn(&mut self, elapsed: Duration) {
        let chain_time = elapsed / u32::try_from(self.since.max(1)).unwrap_or(u32::MAX);
        self.chain_time = (self.chain_time * 7 + chain_time) / 8;
    }

    /// Starts the next batch.
    fn next(&mut self, waiting: usize) {
        self.size = if self.chain_time > SLOW {
            self.half.max(1)
        } else if self.chain_time > FAST {
            (waiting / PART).clamp(1, MAX_BATCH)
        } else {
            (waiting / FRACTION).clamp(1, MAX_FAST_BATCH)
        };
        self.left = self.size;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{Registry, Shape};

    fn clock() -> Recorder {
        let shape = Shape {
            workers: 1,
            queues: 0,
            operation: |_| None,
        };
        Registry::for_this_process(shape).unwrap().recorder(0)
    }

    const LONG: Duration = Duration::from_secs(1000);

    /// After how many chains a drain of `waiting` chains publishes, if each takes `chain_time`.
    fn published(waiting: usize, chain_time: Duration) -> Vec<usize> {
        let clock = clock();
        let mut batch_size = BatchSize {
            chain_time,
            ..BatchSize::default()
        };
        batch_size.begin(waiting, &clock);
        let mut published = Vec::new();
        for served in 1..=waiting {
            // Ignore the time that the test itself takes.
            batch_size.chain_time = chain_time;
            if batch_size.served(|| waiting - served, &clock) {
                published.push(served);
            }
        }
        published
    }

    #[test]
    fn single_chain_is_published_at_end_of_drain() {
        assert!(published(1, Duration::ZERO).is_empty());
    }

    #[test]
    fn single_chain_is_published_before_chains_that_arrive_meanwhile() {
        let clock = clock();
        let mut batch_size = BatchSize::default();
        batch_size.begin(1, &clock);
        assert!(batch_size.served(|| 1, &clock));
        assert!(!batch_size.served(|| 0, &clock));
        assert!(batch_size.served(|| 2, &clock));
    }

    #[test]
    fn fast_chains_are_published_by_fours_and_the_last_ones_singly() {
        let published = published(32, FAST / 2);
        assert_eq!(published[..4], [4, 8, 12, 16]);
        assert_eq!(published[published.len() - 6..], [26, 27, 28, 29, 30, 31]);
    }

    #[test]
    fn moderate_chains_are_published_by_halves_of_what_is_left() {
        let published = published(32, FAST * 2);
        assert_eq!(published[..4], [8, 16, 24, 28]);
    }

    #[test]
    fn slow_chains_are_published_by_halves() {
        assert_eq!(published(8, LONG), [4]);
        assert_eq!(published(3, LONG), [1, 2]);
    }

    #[test]
    fn chain_time_average_follows_recent_batches() {
        let mut batch_size = BatchSize::default();
        batch_size.begin(8, &clock());
        batch_size.since = batch_size.size;
        batch_size.learn(SLOW * 32);
        batch_size.next(8);
        assert_eq!(batch_size.size, 4, "slow now");
        for _ in 0..32 {
            batch_size.learn(Duration::ZERO);
        }
        batch_size.next(8);
        assert_eq!(batch_size.size, 2, "fast again");
    }
}
