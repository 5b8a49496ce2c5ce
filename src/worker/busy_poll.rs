//! A bounded, adaptive busy poll before a worker sleeps.
//!
//! For a single request, sleeping and waking up cost more than serving it. So a worker whose guest
//! sends the next request soon polls its rings for a short time before it sleeps. Polling takes
//! processor time that others may need, the guest's own processors first of all, and that the
//! scheduler subtracts from what the worker gets later. So it pauses where it doesn't pay:
//!
//! - A poll that was interrupted for long shows that somebody else needs the processor: another
//!   process, the hypervisor, or a control group whose quota is used up.
//! - Polls that fail, one after the other, although the next request comes soon after the worker
//!   has fallen asleep, show that the guest waits for the processor that polls.
//!
//! Each pause is twice as long as the one before, until polling goes well for as long as the pause
//! took, and ten times as long as the interruption. The invariants: a worker that stays idle stops polling after a few sleeps, and then uses
//! no processor time; where polling always disturbs, it takes less than a hundredth of the time.

use std::time::{Duration, Instant};

/// A shorter poll isn't worth its two readings of the clock.
const MIN_WINDOW: Duration = Duration::from_micros(2);

/// An interruption of a poll that is longer is no interrupt or short-lived thread of the kernel's.
const INTERRUPTION: Duration = Duration::from_micros(500);

/// So many polls in a row have to fail for a pause.
const MAX_FAILURES: u32 = 3;

/// The shortest pause, about the scheduler's time slice.
const MIN_PAUSE: Duration = Duration::from_millis(4);

/// The longest pause because polls were interrupted.
const MAX_PAUSE: Duration = Duration::from_secs(1);

/// The longest pause because polls failed, which costs their own time only.
const MAX_FAILURE_PAUSE: Duration = Duration::from_millis(32);

/// Decides how long a worker polls before it sleeps.
#[derive(Debug)]
pub(super) struct BusyPoll {
    limit: Duration,
    /// How long the next poll takes; zero while polling doesn't pay.
    window: Duration,
    started: Option<Instant>,
    /// Polls in a row that have failed.
    failures: u32,
    /// How long the last pause was.
    pause: Duration,
    /// When the last pause ends, or has ended.
    paused_until: Option<Instant>,
}

impl BusyPoll {
    /// Polls for at most `limit`; zero disables polling.
    pub(super) fn new(limit: Duration) -> Self {
        Self {
            limit,
            window: Duration::ZERO,
            started: None,
            failures: 0,
            pause: Duration::ZERO,
            paused_until: None,
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
        let mut last = started;
        loop {
            // `found` loads from memory that the guest writes, which is cheaper than reading the
            // clock.
            let succeeded = (0..16).any(|_| {
                let found = found();
                if !found {
                    std::hint::spin_loop();
                }
                found
            });
            let now = Instant::now();
            if now - last > INTERRUPTION {
                self.interrupted(now, now - last);
                return succeeded;
            }
            if succeeded {
                self.failures = 0;
                return true;
            }
            if now - started >= self.window {
                self.failed(now);
                return false;
            }
            last = now;
        }
    }

    /// Learns from a sleep that a kick has ended: enables polling if a poll of the whole limit
    /// would have found the request.
    pub(super) fn woken(&mut self) {
        if let Some(started) = self.started.take() {
            let now = Instant::now();
            if now - started < self.limit && self.paused_until.is_none_or(|end| now >= end) {
                self.window = self.limit;
            }
        }
    }

    fn failed(&mut self, now: Instant) {
        self.failures += 1;
        self.window /= 2;
        if self.window < MIN_WINDOW {
            self.window = Duration::ZERO;
        }
        if self.failures >= MAX_FAILURES {
            self.pause(now, MIN_PAUSE, MAX_FAILURE_PAUSE);
        }
    }

    fn interrupted(&mut self, now: Instant, length: Duration) {
        self.pause(now, (length * 10).min(MAX_PAUSE), MAX_PAUSE);
    }

    /// Stops polling for at least `least`, and at most `limit` unless the last pause was longer.
    fn pause(&mut self, now: Instant, least: Duration, limit: Duration) {
        let went_well = self.paused_until.map_or(MAX_PAUSE, |end| now - end);
        self.pause = if went_well < self.pause {
            (self.pause * 2).min(self.pause.max(limit))
        } else {
            self.pause / 2
        }
        .max(least);
        self.paused_until = Some(now + self.pause);
        self.window = Duration::ZERO;
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A poll that has paid.
    fn active(limit: Duration) -> BusyPoll {
        let mut busy_poll = BusyPoll::new(limit);
        busy_poll.window = limit;
        busy_poll
    }

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

        let mut busy_poll = active(Duration::from_micros(50));
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
        assert!(failures <= 3, "{failures}");
    }

    #[test]
    fn poll_pauses_after_failures_although_sleeps_are_short() {
        let mut busy_poll = active(Duration::from_secs(1000));
        let now = Instant::now();
        for _ in 0..MAX_FAILURES {
            assert!(busy_poll.pays());
            busy_poll.failed(now);
            busy_poll.started = Some(now);
            busy_poll.woken();
        }
        assert!(!busy_poll.pays());
        busy_poll.paused_until = Some(now);
        busy_poll.started = Some(now);
        busy_poll.woken();
        assert!(busy_poll.pays(), "the pause is over");
    }

    #[test]
    fn interruption_ends_poll_and_success_counts() {
        let mut busy_poll = active(Duration::from_secs(1000));
        let mut calls = 0;
        let found = busy_poll.poll(|| {
            calls += 1;
            if calls == 20 {
                std::thread::sleep(INTERRUPTION * 2);
            }
            calls == 25
        });
        assert!(found, "the request that came meanwhile is served");
        assert!(!busy_poll.pays());
        assert!(busy_poll.pause >= INTERRUPTION * 20);
    }

    #[test]
    fn pauses_grow_while_polling_disturbs_and_shrink_when_it_goes_well() {
        let mut busy_poll = active(Duration::from_micros(50));
        let mut now = Instant::now();
        let mut polled = Duration::ZERO;
        let mut paused = Duration::ZERO;
        for _ in 0..20 {
            now += Duration::from_millis(2);
            polled += Duration::from_millis(2);
            busy_poll.interrupted(now, INTERRUPTION);
            now += busy_poll.pause;
            paused += busy_poll.pause;
        }
        assert_eq!(busy_poll.pause, MAX_PAUSE);
        assert!(polled * 100 < paused);
        now += MAX_PAUSE;
        busy_poll.interrupted(now, INTERRUPTION);
        assert_eq!(busy_poll.pause, MAX_PAUSE / 2);
    }

    #[test]
    fn failures_pause_for_shorter_than_interruptions() {
        let mut busy_poll = active(Duration::from_micros(50));
        let mut now = Instant::now();
        for _ in 0..20 {
            now += Duration::from_millis(1);
            busy_poll.pause(now, MIN_PAUSE, MAX_FAILURE_PAUSE);
            now += busy_poll.pause;
        }
        assert_eq!(busy_poll.pause, MAX_FAILURE_PAUSE);
    }
}
