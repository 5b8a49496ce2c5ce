//! A short sleep without being woken, where nobody waits for answers.
//!
//! FORGETs come one by one, each with a kick, and often: to wake up for each costs more than to
//! serve it, here and in the guest. So who has been woken twice in a short time sleeps for a while
//! before it asks for each kick again, and finds several at once; a ring that fills up meanwhile wakes
//! it. The invariant: a nap that was in vain is followed by a sleep without end, so idleness costs one nap.

use std::time::{Duration, Instant};

/// How long. Nothing waits for a FORGET, and an INTERRUPT may well be so late.
pub(super) const LENGTH: Duration = Duration::from_millis(1);

/// Being woken again within this time is often.
const OFTEN: Duration = Duration::from_micros(500);

/// Whether to take a nap.
#[derive(Debug)]
pub(super) struct KickModeration {
    allowed: bool,
    pays: bool,
    began: Option<Instant>,
}

impl KickModeration {
    /// For who may be so late, or not.
    pub(super) fn new(allowed: bool) -> Self {
        Self {
            allowed,
            pays: false,
            began: None,
        }
    }

    /// Whether to take one now.
    pub(super) fn pays(&self) -> bool {
        self.pays
    }

    /// One was taken, and something had come meanwhile or not.
    pub(super) fn taken(&mut self, found: bool) {
        self.pays = found;
    }

    /// A sleep begins that ends with a kick.
    pub(super) fn sleeps(&mut self) {
        if self.allowed {
            self.began = Some(Instant::now());
        }
    }

    /// It has ended by one.
    pub(super) fn woken(&mut self) {
        self.pays = self
            .began
            .take()
            .is_some_and(|began| began.elapsed() < OFTEN);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_taken_while_kicks_come_often() {
        let mut nap = KickModeration::new(true);
        assert!(!nap.pays());
        nap.sleeps();
        nap.began = nap.began.map(|began| began + Duration::from_secs(1000));
        nap.woken();
        assert!(nap.pays(), "woken at once");
        nap.taken(true);
        assert!(nap.pays());
        nap.taken(false);
        assert!(!nap.pays());
        nap.sleeps();
        nap.began = nap.began.and_then(|began| began.checked_sub(OFTEN));
        nap.woken();
        assert!(!nap.pays(), "woken late");
    }

    #[test]
    fn it_is_never_taken_where_somebody_waits() {
        let mut nap = KickModeration::new(false);
        nap.sleeps();
        nap.woken();
        assert!(!nap.pays());
    }
}
