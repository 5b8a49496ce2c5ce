//! One token bucket, shared by threads.
//!
//! A bucket is one word: the time up to which its tokens are taken. Tokens that have not been taken
//! since then are there to be taken; a word in the future is a debt. The invariant: each token is
//! taken once, whatever threads do at the same time.

use super::clock::{LONGEST, MILLISECOND, SECOND, Ticks};
use super::settings::Rate;
use super::sync::{AtomicU64, Ordering};

/// The time whose tokens a bucket holds if no burst is set. A worker that gets no processor for
/// longer loses tokens; the tokens of a full bucket are 1 % of what 5 seconds bring.
const DEFAULT_DEPTH: Ticks = 50 * MILLISECOND;

/// The time whose tokens a bucket holds at least. Timers have a resolution of 1 ms, and tokens that
/// come while a worker sleeps must not be lost.
const MIN_DEPTH: Ticks = 5 * MILLISECOND;

#[derive(Debug)]
pub(super) struct Bucket {
    rate: Rate,
    /// The longest time whose tokens the bucket holds.
    depth: Ticks,
    /// The time up to which tokens are taken. Nothing else is ordered by it, so all accesses are
    /// `Relaxed`.
    taken: AtomicU64,
}

impl Bucket {
    /// A bucket of which the tokens up to `taken` are taken; `0` makes a full one.
    pub(super) fn new(rate: Rate, taken: Ticks) -> Self {
        let of = |units| ticks(units, rate);
        let burst = rate.burst.map_or(DEFAULT_DEPTH, |burst| of(burst.get()));
        Self {
            rate,
            depth: burst.max(MIN_DEPTH).max(of(1)),
            taken: AtomicU64::new(taken),
        }
    }

    pub(super) fn rate(&self) -> Rate {
        self.rate
    }

    pub(super) fn taken(&self) -> Ticks {
        self.taken.load(Ordering::Relaxed)
    }

    /// How long `units` tokens take to come.
    pub(super) fn time_for(&self, units: u64) -> Ticks {
        ticks(units, self.rate)
    }

    /// Takes `units` tokens, and returns the time from which they may be used. Those who take from an
    /// empty bucket get its tokens in turn. Whoever takes more than the bucket holds may use them once
    /// it would be full, and the bucket is in debt then.
    pub(super) fn take(&self, units: u64, now: Ticks) -> Ticks {
        let cost = ticks(units, self.rate);
        let oldest = now.saturating_sub(self.depth);
        let from = self.update(|taken| taken.max(oldest).saturating_add(cost));
        from.max(oldest).saturating_add(cost.min(self.depth))
    }

    /// Returns `units` tokens that were taken.
    pub(super) fn put_back(&self, units: u64) {
        let cost = ticks(units, self.rate);
        self.update(|taken| taken.saturating_sub(cost));
    }

    /// Takes `units` tokens more for what was already done.
    pub(super) fn take_late(&self, units: u64) {
        let cost = ticks(units, self.rate);
        self.update(|taken| taken.saturating_add(cost));
    }

    /// Changes the word, and returns its previous value.
    fn update(&self, change: impl Fn(u64) -> u64) -> Ticks {
        let mut taken = self.taken.load(Ordering::Relaxed);
        loop {
            let changed = self.taken.compare_exchange_weak(
                taken,
                change(taken),
                Ordering::Relaxed,
                Ordering::Relaxed,
            );
            match changed {
                Ok(before) => return before,
                Err(newer) => taken = newer,
            }
        }
    }
}

/// How long `units` tokens take to come.
fn ticks(units: u64, rate: Rate) -> Ticks {
    let per_second = u128::from(rate.per_second.get());
    let scaled = u128::from(units) * u128::from(SECOND);
    // To the nearest tick.
    let ticks = (scaled + per_second / 2) / per_second;
    u64::try_from(ticks).unwrap_or(LONGEST).min(LONGEST)
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use super::*;

    fn rate(per_second: u64, burst: u64) -> Rate {
        Rate {
            per_second: NonZeroU64::new(per_second).unwrap(),
            burst: NonZeroU64::new(burst),
        }
    }

    /// Some time after the clock's start.
    const NOW: Ticks = LONGEST + 1000 * SECOND;

    #[test]
    fn full_bucket_gives_its_burst_at_once_and_then_the_rate() {
        let bucket = Bucket::new(rate(10, 5), 0);
        for _ in 0..5 {
            assert!(bucket.take(1, NOW) <= NOW);
        }
        for n in 1..=20 {
            assert_eq!(bucket.take(1, NOW), NOW + n * SECOND / 10);
        }
    }

    #[test]
    fn tokens_beyond_the_burst_are_lost() {
        let bucket = Bucket::new(rate(10, 2), NOW);
        let later = NOW + 100 * SECOND;
        assert!(bucket.take(1, later) <= later);
        assert!(bucket.take(1, later) <= later);
        assert_eq!(bucket.take(1, later), later + SECOND / 10);
    }

    #[test]
    fn more_than_the_burst_makes_a_debt() {
        let bucket = Bucket::new(rate(1000, 100), 0);
        // The bucket is full, so it may be used at once.
        assert_eq!(bucket.take(10_000, NOW), NOW);
        // 9,900 tokens of debt, and one.
        assert_eq!(bucket.take(1, NOW), NOW + 9_901 * SECOND / 1000);
    }

    #[test]
    fn what_was_not_used_is_put_back() {
        let bucket = Bucket::new(rate(1000, 1000), 0);
        bucket.take(1000, NOW);
        bucket.put_back(999);
        assert!(bucket.take(999, NOW) <= NOW);
        bucket.take_late(1000);
        assert_eq!(bucket.take(1, NOW), NOW + 1001 * SECOND / 1000);
    }

    #[test]
    fn rates_are_exact_from_one_to_a_hundred_million() {
        for per_second in [1, 3, 100, 9_999, 100_000, 700_000, 100_000_000] {
            let bucket = Bucket::new(rate(per_second, 0), NOW);
            let mut last = NOW;
            let seconds = 5.max(1000 / per_second);
            for _ in 0..1000 {
                last = bucket.take(per_second * seconds / 1000, NOW);
            }
            let taken = per_second * seconds / 1000 * 1000;
            let exact = u128::from(taken) * u128::from(SECOND) / u128::from(per_second);
            let took = u128::from(bucket.taken() - NOW);
            assert!(took.abs_diff(exact) * 1000 <= exact, "{per_second}: {took}");
            assert!(last <= bucket.taken());
        }
    }

    #[test]
    fn largest_numbers_do_not_overflow() {
        let bucket = Bucket::new(rate(1, u64::MAX), 0);
        bucket.take(u64::MAX, NOW);
        bucket.take(u64::MAX, NOW);
        bucket.take_late(u64::MAX);
        assert!(bucket.take(1, NOW) > NOW);
        let bucket = Bucket::new(rate(u64::MAX, u64::MAX), 0);
        assert!(bucket.take(u64::MAX, NOW) <= NOW + SECOND);
    }
}
