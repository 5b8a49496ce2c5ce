//! A bounded, adaptive busy poll before a worker sleeps.
//!
//! For a single request, sleeping and waking up cost more than serving it. So a worker whose guest
//! sends the next request soon polls its rings for a short time before it sleeps. The invariant: a
//! worker that stays idle stops polling after a few sleeps, and then uses no processor time.

use std::time::{Duration, Instant};

/// A shorter poll isn't worth its two readings of the clock.
const MIN_WINDOW: Duration = Duration::from_micros(2);

/// Decides how long a worker polls before it sleeps.
#[derive(Debug)]
pub(super) struct BusyPoll {
    limit: Duration,
    /// How long the next poll takes; zero while polling doesn't pay.
    window: Duration,
    started: Option<Instant>,
}

impl BusyPoll {
    /// Polls for at most `limit`; zero disables polling.
    pub(super) fn new(limit: Duration) -> Self {
        Self {
            limit,
            window: Duration::ZERO,
            started: None,
        }
    }

    /// Whether polling has found something lately.
    pub(super) fn pays(&self) -> bool {
        !self.window.is_zero()
    }

    /// Calls `found` until it returns true or the window is over. Returns whether it returned true.
    pub(super) fn poll(&mut self, mut found: impl FnMut() -> bool) -> bool {
        if self.limit.is_zero() {
            return false;
        }
        let started = Instant::now();
        self.started = Some(started);
        if self.window.is_zero() {
            return false;
        }
        loop {
            // `found` loads from memory that the guest writes, which is cheaper than reading the
            // clock.
            for _ in 0..16 {
                if found() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if started.elapsed() >= self.window {
                break;
            }
        }
        self.window /= 2;
        if self.window < MIN_WINDOW {
            self.window = Duration::ZERO;
        }
        false
    }

    /// Learns from a sleep that a kick has ended: enables polling if a poll of the whole limit
    /// would have found the request.
    pub(super) fn woken(&mut self) {
        if let Some(started) = self.started.take()
            && started.elapsed() < self.limit
        {
            self.window = self.limit;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn poll_with_zero_limit_looks_at_nothing() {
        let mut busy_poll = BusyPoll::new(Duration::ZERO);
        busy_poll.woken();
        assert!(!busy_poll.poll(|| unreachable!("polled")));
    }

    #[test]
    fn poll_starts_after_short_sleep_and_stops_after_few_failures() {
        let mut busy_poll = BusyPoll::new(Duration::from_secs(1000));
        assert!(!busy_poll.poll(|| unreachable!("polled before it has paid")));
        busy_poll.woken();
        assert!(
            busy_poll.poll(|| true),
            "the sleep was shorter than the limit"
        );

        let mut busy_poll = BusyPoll::new(Duration::from_micros(50));
        busy_poll.window = busy_poll.limit;
        let mut failures = 0;
        loop {
            let mut polled = false;
            busy_poll.poll(|| {
                polled = true;
                false
            });
            if !polled {
                break;
            }
            failures += 1;
        }
        assert_eq!(failures, 5, "50, 25, 12.5, 6.25 and 3.1 microseconds");
    }
}
