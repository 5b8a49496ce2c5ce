//! Waiting for completions: asleep on the call eventfd, or spinning.

use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use super::{AVAIL_NO_INTERRUPT, Queue, RingError};

impl Queue {
    /// Sleeps until there is a completion to pop.
    ///
    /// # Errors
    /// [`RingError::TimedOut`] after `timeout`; [`RingError::UsedIndex`]; [`RingError::Event`].
    pub fn wait(&mut self, timeout: Duration) -> Result<(), RingError> {
        self.wait_for(1, timeout)
    }

    /// Sleeps until there are `count` completions to pop. With EVENT_IDX the device is asked for
    /// one call only, at the last of them.
    ///
    /// # Errors
    /// As [`Queue::wait`].
    pub fn wait_for(&mut self, count: u16, timeout: Duration) -> Result<(), RingError> {
        let deadline = Instant::now() + timeout;
        loop {
            if self.has(count)? {
                return Ok(());
            }
            self.ask_for_call(count);
            if self.has(count)? {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if !self.call.wait(left).map_err(RingError::Event)? {
                let in_flight = self.in_flight;
                return Err(RingError::TimedOut { in_flight });
            }
            self.call.take().map_err(RingError::Event)?;
        }
    }

    /// Spins until there is a completion to pop. Call [`Queue::suppress_calls`] first, once.
    ///
    /// # Errors
    /// [`RingError::TimedOut`] after `timeout`; [`RingError::UsedIndex`].
    pub fn spin(&mut self, timeout: Duration) -> Result<(), RingError> {
        let deadline = Instant::now() + timeout;
        loop {
            // The clock costs more than a look at the ring.
            for _ in 0..64 {
                if self.ready()? > 0 {
                    return Ok(());
                }
                std::hint::spin_loop();
            }
            if Instant::now() >= deadline {
                let in_flight = self.in_flight;
                return Err(RingError::TimedOut { in_flight });
            }
        }
    }

    /// Asks the device for a call when `count` completions are there. The caller has to look
    /// again before it sleeps.
    pub fn ask_for_call(&mut self, count: u16) {
        // Relaxed: ordered by the fence below.
        if self.event_idx {
            let event = self.taken.wrapping_add(count.max(1)).wrapping_sub(1);
            self.areas.used_event().store(event, Ordering::Relaxed);
        } else {
            self.areas.avail_flags().store(0, Ordering::Relaxed);
        }
        // Pairs with the device's fence between its store of the used index and its load of
        // used_event (or of the flag): either it sees what is asked, or we see the index.
        fence(Ordering::SeqCst);
    }

    /// Asks the device for no calls. It is a hint: calls may come all the same.
    pub fn suppress_calls(&mut self) {
        // Relaxed: nothing depends on when the device sees it.
        if self.event_idx {
            let behind = self.taken.wrapping_sub(1);
            self.areas.used_event().store(behind, Ordering::Relaxed);
        } else {
            let flags = self.areas.avail_flags();
            flags.store(AVAIL_NO_INTERRUPT, Ordering::Relaxed);
        }
    }

    fn has(&mut self, count: u16) -> Result<bool, RingError> {
        if self.seen.wrapping_sub(self.taken) < count {
            self.refresh()?;
        }
        Ok(self.seen.wrapping_sub(self.taken) >= count)
    }
}
