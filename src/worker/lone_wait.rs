//! Waits for the disk without looking at the rings, for a guest that has one request in flight.
//!
//! A worker that waits for the disk asks for kicks and sleeps until either comes. A guest whose only
//! request is the one that waits sends no kick, and for it a single call that waits for the ring of
//! operations alone is cheaper. What another program of the guest sends meanwhile has to wait for
//! the same operation, so this is done only after several operations in a row during which nothing
//! came, and for a short time. The invariant: a request waits for at most [`LIMIT`] for another's
//! operation, and for none of the next [`STREAK`] operations.

use std::time::{Duration, Instant};

/// The longest wait.
pub(super) const LIMIT: Duration = Duration::from_micros(200);

/// So many operations in a row have to be alone and short.
const STREAK: u32 = 8;

/// Decides whether to wait for the disk alone.
#[derive(Debug, Default)]
pub(super) struct LoneWait {
    streak: u32,
    began: Option<Instant>,
}

impl LoneWait {
    /// Whether to wait for the disk alone, now that `in_flight` operations are.
    pub(super) fn pays(&self, in_flight: usize) -> bool {
        in_flight == 1 && self.streak >= STREAK
    }

    /// Records that the worker goes to sleep, or waits for the disk alone.
    pub(super) fn begins(&mut self, in_flight: usize) {
        self.began = (in_flight == 1).then(Instant::now);
    }

    /// Records that the wait has ended; `alone` says that the operation has completed and that
    /// nothing came meanwhile.
    pub(super) fn ended(&mut self, alone: bool) {
        if let Some(began) = self.began.take() {
            if alone && began.elapsed() < LIMIT {
                self.streak = self.streak.saturating_add(1);
            } else {
                self.streak = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waits(wait: &mut LoneWait, count: u32) {
        for _ in 0..count {
            wait.begins(1);
            wait.ended(true);
        }
    }

    #[test]
    fn waits_alone_after_operations_in_a_row_that_were_alone() {
        let mut wait = LoneWait::default();
        waits(&mut wait, STREAK - 1);
        assert!(!wait.pays(1));
        waits(&mut wait, 1);
        assert!(wait.pays(1));
        assert!(!wait.pays(2));
        wait.begins(1);
        wait.ended(false);
        assert!(!wait.pays(1), "a request came");
        waits(&mut wait, STREAK);
        assert!(wait.pays(1));
    }

    #[test]
    fn long_operation_ends_the_streak() {
        let mut wait = LoneWait::default();
        waits(&mut wait, STREAK);
        wait.began = Instant::now().checked_sub(LIMIT);
        wait.ended(true);
        assert!(!wait.pays(1));
    }
}
