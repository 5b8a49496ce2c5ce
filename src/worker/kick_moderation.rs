//! Moderates the kicks of a queue whose requests no program waits for.
//!
//! A guest often sends FORGETs in quick succession, each with a kick. A wake-up for each costs more
//! than serving it, in the server and in the guest. So a worker that is woken twice in a short time
//! sleeps for a fixed delay before it enables kicks again, and then finds several requests at once.
//! A ring that fills up ends the delay. The invariant: a delay during which nothing arrived is
//! followed by an unlimited sleep, so an idle queue costs one delay.

use std::time::{Duration, Instant};

/// Length of a delay. Nothing waits for a FORGET, and this much delay doesn't matter to an
/// INTERRUPT.
pub(super) const DELAY: Duration = Duration::from_millis(1);

/// A wake-up within this time after falling asleep enables moderation.
const FREQUENT: Duration = Duration::from_micros(500);

/// Decides whether to delay enabling kicks.
#[derive(Debug)]
pub(super) struct KickModeration {
    allowed: bool,
    active: bool,
    sleep_started: Option<Instant>,
}

impl KickModeration {
    /// Never delays unless `allowed`.
    pub(super) fn new(allowed: bool) -> Self {
        Self {
            allowed,
            active: false,
            sleep_started: None,
        }
    }

    /// Whether to delay now.
    pub(super) fn is_active(&self) -> bool {
        self.active
    }

    /// Records a delay that has ended; `found` says whether requests arrived meanwhile.
    pub(super) fn delay_ended(&mut self, found: bool) {
        self.active = found;
    }

    /// Records the start of a sleep that a kick ends.
    pub(super) fn sleep_starts(&mut self) {
        if self.allowed {
            self.sleep_started = Some(Instant::now());
        }
    }

    /// Records that a kick ended the sleep.
    pub(super) fn woken(&mut self) {
        self.active = self
            .sleep_started
            .take()
            .is_some_and(|started| started.elapsed() < FREQUENT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moderation_is_active_while_kicks_are_frequent() {
        let mut moderation = KickModeration::new(true);
        assert!(!moderation.is_active());
        moderation.sleep_starts();
        moderation.sleep_started = moderation
            .sleep_started
            .map(|started| started + Duration::from_secs(1000));
        moderation.woken();
        assert!(moderation.is_active(), "woken at once");
        moderation.delay_ended(true);
        assert!(moderation.is_active());
        moderation.delay_ended(false);
        assert!(!moderation.is_active());
        moderation.sleep_starts();
        moderation.sleep_started = moderation
            .sleep_started
            .and_then(|started| started.checked_sub(FREQUENT));
        moderation.woken();
        assert!(!moderation.is_active(), "woken late");
    }

    #[test]
    fn moderation_is_never_active_where_not_allowed() {
        let mut moderation = KickModeration::new(false);
        moderation.sleep_starts();
        moderation.woken();
        assert!(!moderation.is_active());
    }
}
