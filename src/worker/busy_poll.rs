//! A bounded, adaptive busy poll before a worker sleeps.
//!
//! To sleep and be woken costs a request that comes alone more than to serve it. So a worker
//! whose guest answers quickly looks at the rings for a moment before it sleeps. The invariant:
//! a worker that has nothing to do for long stops looking after a few sleeps, and then uses no
//! processor time at all.

use std::time::{Duration, Instant};

/// Below this, looking is not worth the two clock readings.
const SHORTEST: Duration = Duration::from_micros(2);

/// How long a worker looks before it sleeps.
#[derive(Debug)]
pub(super) struct BusyPoll {
    limit: Duration,
    window: Duration,
    began: Option<Instant>,
}

impl BusyPoll {
    /// Looks for `limit` at most; never, if that is zero.
    pub(super) fn new(limit: Duration) -> Self {
        Self {
            limit,
            window: Duration::ZERO,
            began: None,
        }
    }

    /// Whether looking has paid lately.
    pub(super) fn pays(&self) -> bool {
        !self.window.is_zero()
    }

    /// Looks, by `found`, for as long as has paid lately. True if something was found.
    pub(super) fn look(&mut self, mut found: impl FnMut() -> bool) -> bool {
        if self.limit.is_zero() {
            return false;
        }
        let began = Instant::now();
        self.began = Some(began);
        if self.window.is_zero() {
            return false;
        }
        loop {
            // A look is a load from memory that the guest writes; the clock costs more.
            for _ in 0..16 {
                if found() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if began.elapsed() >= self.window {
                break;
            }
        }
        self.window /= 2;
        if self.window < SHORTEST {
            self.window = Duration::ZERO;
        }
        false
    }

    /// Learns from a sleep that has ended by a kick: had looking for the whole limit found it?
    pub(super) fn woken(&mut self) {
        if let Some(began) = self.began.take()
            && began.elapsed() < self.limit
        {
            self.window = self.limit;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_limit_nothing_is_looked_at() {
        let mut busy_poll = BusyPoll::new(Duration::ZERO);
        busy_poll.woken();
        assert!(!busy_poll.look(|| unreachable!("looked")));
    }

    #[test]
    fn looking_begins_after_a_short_sleep_and_ends_after_a_few_in_vain() {
        let mut busy_poll = BusyPoll::new(Duration::from_secs(1000));
        assert!(!busy_poll.look(|| unreachable!("nothing has shown yet that it pays")));
        busy_poll.woken();
        assert!(
            busy_poll.look(|| true),
            "the sleep was shorter than the limit"
        );

        let mut busy_poll = BusyPoll::new(Duration::from_micros(50));
        busy_poll.window = busy_poll.limit;
        let mut in_vain = 0;
        loop {
            let mut looked = false;
            busy_poll.look(|| {
                looked = true;
                false
            });
            if !looked {
                break;
            }
            in_vain += 1;
        }
        assert_eq!(in_vain, 5, "50, 25, 12.5, 6.25 and 3.1 microseconds");
    }
}
