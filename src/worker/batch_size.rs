//! In how many portions the replies of one pass are shown to the guest.
//!
//! A guest that sleeps needs 10–50 µs to wake up, and one that is awake takes what it is shown and
//! sends more: both better happen while the rest of a pass is served than after it, when the worker
//! has nothing else to do. A guest that falls asleep in between has to be called for each portion, which
//! costs a few microseconds; so where chains take long there are two portions only. The invariant:
//! nothing that is complete waits for more than half of what the pass had found.

use std::time::{Duration, Instant};

/// No portion is larger where chains are served quickly. Measured at 32 in flight: GETATTR 0.64
/// million a second with two portions to a pass, 0.85 with portions of 4, 0.73 with portions of 1;
/// at 8 in flight OPEN, READ, RELEASE 0.11, 0.14 and 0.21 million.
const MOST: usize = 4;

/// How much of what waits on the ring is one portion.
const PART: usize = 4;

/// A chain that takes longer than this takes longer than the guest does to answer and fall asleep.
const SLOW: Duration = Duration::from_micros(8);

/// The portions of one queue.
#[derive(Debug, Default)]
pub(super) struct BatchSize {
    /// What a chain has taken lately, on average.
    each: Duration,
    /// Half of what the pass has found.
    half: usize,
    /// Chains of this portion, and how many of them are still to be served.
    size: usize,
    left: usize,
    /// When it began; unknown where a pass has begun with a lone chain, which costs no clock.
    began: Option<Instant>,
}

impl BatchSize {
    /// A pass begins, with `there` chains on the ring.
    pub(super) fn begin(&mut self, there: usize) {
        self.half = there / 2;
        self.began = (there > 1).then(Instant::now);
        self.next(there);
    }

    /// One chain has been served. True if what is complete is to be shown now; `waiting` tells how
    /// many are still on the ring.
    pub(super) fn served(&mut self, waiting: impl FnOnce() -> usize) -> bool {
        if self.left > 1 {
            self.left -= 1;
            return false;
        }
        let waiting = waiting();
        if waiting == 0 {
            // The pass ends, or goes on with what comes just now.
            return false;
        }
        let now = Instant::now();
        if let Some(began) = self.began.replace(now) {
            self.learn(now.duration_since(began));
        }
        self.next(waiting);
        true
    }

    /// A portion has taken so long.
    fn learn(&mut self, took: Duration) {
        let each = took / u32::try_from(self.size).unwrap_or(u32::MAX);
        self.each = (self.each * 7 + each) / 8;
    }

    /// Another portion begins.
    fn next(&mut self, waiting: usize) {
        self.size = if self.each > SLOW {
            self.half.max(1)
        } else {
            (waiting / PART).clamp(1, MOST)
        };
        self.left = self.size;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(1000);

    /// After how many chains something is shown, in a pass over `there` that take `each`.
    fn shown(there: usize, each: Duration) -> Vec<usize> {
        let mut batch_size = BatchSize {
            each,
            ..BatchSize::default()
        };
        batch_size.begin(there);
        let mut shown = Vec::new();
        for served in 1..=there {
            // Whatever this machine takes to run the test.
            batch_size.each = each;
            if batch_size.served(|| there - served) {
                shown.push(served);
            }
        }
        shown
    }

    #[test]
    fn a_lone_chain_is_left_to_the_end_of_the_pass() {
        assert!(shown(1, Duration::ZERO).is_empty());
    }

    #[test]
    fn what_comes_while_a_lone_chain_is_served_does_not_hold_it_back() {
        let mut batch_size = BatchSize::default();
        batch_size.begin(1);
        assert!(batch_size.served(|| 1));
        assert!(!batch_size.served(|| 0));
        assert!(batch_size.served(|| 2));
    }

    #[test]
    fn few_chains_are_shown_one_by_one_and_many_by_fours() {
        let shown = shown(32, Duration::ZERO);
        assert_eq!(shown[..4], [4, 8, 12, 16]);
        assert_eq!(shown[shown.len() - 6..], [26, 27, 28, 29, 30, 31]);
    }

    #[test]
    fn slow_chains_are_shown_by_halves() {
        assert_eq!(shown(8, LONG), [4]);
        assert_eq!(shown(3, LONG), [1, 2]);
    }

    #[test]
    fn what_a_chain_takes_is_learned_and_forgotten() {
        let mut batch_size = BatchSize::default();
        batch_size.begin(8);
        batch_size.learn(SLOW * 32);
        batch_size.next(8);
        assert_eq!(batch_size.size, 4, "slow now");
        for _ in 0..32 {
            batch_size.learn(Duration::ZERO);
        }
        batch_size.next(8);
        assert_eq!(batch_size.size, 2, "quick again");
    }
}
