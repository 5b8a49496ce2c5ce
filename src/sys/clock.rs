//! A monotonic clock that is read once for each request.
//!
//! Where the kernel itself keeps time by the processor's time-stamp counter, the counter is read
//! directly, which costs half as much as `clock_gettime(2)`. The invariant: readings of all threads
//! are on one scale, and differences are nanoseconds once they are converted.

use std::num::NonZeroU64;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// For how long the counter's frequency is measured at least, from the choice to the first conversion.
/// Two readings of the other clock, 25 ns each, are then an error of less than 1 in 1,000.
const CALIBRATION: Duration = Duration::from_micros(200);

/// How far apart two readings that stand for one moment may be, in nanoseconds.
const MAX_APART: u64 = 1000;

/// A reading of a [`Clock`], whose scale begins at 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ticks(NonZeroU64);

impl Ticks {
    #[inline]
    fn new(count: u64) -> Self {
        Self(NonZeroU64::new(count).unwrap_or(NonZeroU64::MIN))
    }

    /// Ticks from `earlier` to this reading. A thread may be moved to a processor whose counter is
    /// a few ticks behind, so the difference is 0 then.
    #[inline]
    fn since(self, earlier: Self) -> u64 {
        self.0.get().saturating_sub(earlier.0.get())
    }
}

/// A clock. Its frequency is measured when it is first converted.
#[derive(Clone, Debug)]
pub(crate) struct Clock {
    counter: bool,
    /// A moment by both clocks.
    start: Instant,
    first: Ticks,
    /// Nanoseconds of 2³² ticks.
    scale: OnceLock<u64>,
}

impl Clock {
    /// Chooses the clock. Reads a file of `/sys`.
    pub(crate) fn choose() -> Self {
        let source = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
        // The kernel uses the counter only if it is the same on all processors and never stops.
        let is_counter = || std::fs::read(source).is_ok_and(|name| name.trim_ascii() == b"tsc");
        Self::new(cfg!(target_arch = "x86_64") && is_counter())
    }

    fn new(counter: bool) -> Self {
        let mut this = Self {
            counter,
            start: Instant::now(),
            first: Ticks::new(0),
            scale: OnceLock::new(),
        };
        // The thread may be preempted between the two readings, so they are repeated.
        for _ in 0..8 {
            (this.start, this.first) = (Instant::now(), this.now());
            if this.since_start() < MAX_APART {
                break;
            }
        }
        this
    }

    /// The time now.
    #[inline]
    pub(crate) fn now(&self) -> Ticks {
        #[cfg(target_arch = "x86_64")]
        if self.counter {
            return Ticks::new(time_stamp());
        }
        Ticks::new(self.since_start())
    }

    /// Measures the frequency, unless that has been done, so that no conversion has to wait for it.
    pub(crate) fn calibrate(&self) {
        self.scale();
    }

    /// Nanoseconds from `earlier` to `later`; 0 if they are the other way round.
    #[inline]
    pub(crate) fn nanoseconds(&self, earlier: Ticks, later: Ticks) -> u64 {
        let ticks = later.since(earlier);
        if !self.counter {
            return ticks;
        }
        let nanoseconds = (u128::from(ticks) * u128::from(self.scale())) >> 32;
        u64::try_from(nanoseconds).unwrap_or(u64::MAX)
    }

    #[inline]
    fn scale(&self) -> u64 {
        *self.scale.get_or_init(|| self.measure())
    }

    fn measure(&self) -> u64 {
        if !self.counter {
            return 1 << 32;
        }
        let least = u64::try_from(CALIBRATION.as_nanos()).unwrap_or(u64::MAX);
        loop {
            let before = self.since_start();
            let now = self.now();
            let apart = self.since_start() - before;
            // Preempted long ago, it matters no more.
            if before >= least && apart < MAX_APART.max(before / 1000) {
                let ticks = u128::from(now.since(self.first).max(1));
                let scale = (u128::from(before) << 32) / ticks;
                return u64::try_from(scale).unwrap_or(u64::MAX).max(1);
            }
        }
    }

    fn since_start(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
fn time_stamp() -> u64 {
    // SAFETY: the instruction accesses no memory, and every x86-64 processor has it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn difference_of_readings_is_the_time_that_has_passed() {
        let clock = Clock::choose();
        for counter in [clock.counter, false] {
            let clock = Clock::new(counter);
            clock.calibrate();
            let (outer, start) = (Instant::now(), clock.now());
            let inner = Instant::now();
            while inner.elapsed() < Duration::from_millis(2) {}
            let least = inner.elapsed().as_nanos();
            let measured = u128::from(clock.nanoseconds(start, clock.now()));
            let most = outer.elapsed().as_nanos();
            assert!(measured * 100 >= least * 98, "{measured} < {least}");
            assert!(measured * 98 <= most * 100, "{measured} > {most}");
            assert_eq!(clock.nanoseconds(clock.now(), start), 0);
        }
    }
}
