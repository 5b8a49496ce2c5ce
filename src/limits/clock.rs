//! The clock of the buckets: monotonic time in units of a 16th of a nanosecond.
//!
//! The invariant: a time is never less than the longest time that a bucket looks back.

use std::time::{Duration, Instant};

/// A point in time, or a span of it, in sixteenths of a nanosecond.
pub(crate) type Ticks = u64;

/// Ticks of a nanosecond. An operation costs a whole number of ticks; with this many, rounding
/// changes a rate of ten million a second by less than one part in a thousand.
const NANOSECOND: u64 = 16;

/// Ticks of a second.
pub(super) const SECOND: Ticks = 1_000_000_000 * NANOSECOND;

/// Ticks of a millisecond.
pub(super) const MILLISECOND: Ticks = SECOND / 1000;

/// The longest span that is computed with: more than a year.
pub(super) const LONGEST: Ticks = 1 << 59;

/// Converts times of this process.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    start: Instant,
}

impl Default for Clock {
    fn default() -> Self {
        Self {
            start: Instant::now(),
        }
    }
}

impl Clock {
    /// The time of `instant`.
    pub(crate) fn ticks(&self, instant: Instant) -> Ticks {
        let nanoseconds = instant.duration_since(self.start).as_nanos();
        let nanoseconds = u64::try_from(nanoseconds).unwrap_or(u64::MAX);
        nanoseconds
            .saturating_mul(NANOSECOND)
            .saturating_add(LONGEST)
    }

    /// The first instant at which the time is at least `ticks`.
    pub(crate) fn instant(&self, ticks: Ticks) -> Instant {
        let since = ticks.saturating_sub(LONGEST).min(LONGEST);
        self.start + Duration::from_nanos(since.div_ceil(NANOSECOND))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instant_of_a_time_is_not_before_it() {
        let clock = Clock::default();
        let now = Instant::now();
        assert_eq!(clock.instant(clock.ticks(now)), now);
        for ticks in [LONGEST + 1, LONGEST + NANOSECOND, LONGEST + 12_345_678_901] {
            assert!(clock.ticks(clock.instant(ticks)) >= ticks);
        }
        assert!(clock.instant(u64::MAX) > now);
    }
}
