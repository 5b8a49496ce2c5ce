//! Decides whether a worker waits for the host itself in a request that is alone.
//!
//! That is faster as long as the request stays alone, and slower if the guest sends another one
//! meanwhile: a second worker has to wake up for it, while this one could have begun both. A guest
//! that keeps several requests in flight shows itself by that. The invariant: where requests never
//! stay alone, less than one in a hundred is waited for.

/// How many requests are not waited for after one that didn't stay alone, at first.
const FIRST_PAUSE: u32 = 16;

/// The same, if it happens again and again.
const LONGEST_PAUSE: u32 = 1024;

/// What has become of the requests that were waited for.
#[derive(Debug, Default)]
pub(super) struct LoneWaits {
    /// So many requests are not waited for now.
    left: u32,
    /// How long the last pause was, less what went well since.
    pause: u32,
}

impl LoneWaits {
    /// Whether to wait for the request that is alone now.
    pub(super) fn pay(&mut self) -> bool {
        if self.left == 0 {
            return true;
        }
        self.left -= 1;
        false
    }

    /// A request that was waited for has ended, and `stayed_alone` or not.
    pub(super) fn ended(&mut self, stayed_alone: bool) {
        if stayed_alone {
            self.pause = self.pause.saturating_sub(1);
        } else {
            self.pause = (self.pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
            self.left = self.pause;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of `requests` are waited for, if they stay alone or don't.
    fn waited(waits: &mut LoneWaits, requests: u32, stay_alone: bool) -> u32 {
        let mut waited = 0;
        for _ in 0..requests {
            if waits.pay() {
                waited += 1;
                waits.ended(stay_alone);
            }
        }
        waited
    }

    #[test]
    fn requests_that_stay_alone_are_all_waited_for() {
        assert_eq!(waited(&mut LoneWaits::default(), 1000, true), 1000);
    }

    #[test]
    fn few_are_waited_for_where_none_stays_alone() {
        assert!(waited(&mut LoneWaits::default(), 10_000, false) < 100);
    }

    #[test]
    fn guest_that_changes_its_ways_is_waited_for_again() {
        let mut waits = LoneWaits::default();
        waited(&mut waits, 10_000, false);
        let requests = LONGEST_PAUSE * 4;
        assert!(waited(&mut waits, requests, true) > requests / 2);
        assert_eq!(waits.pause, 0);
    }
}
