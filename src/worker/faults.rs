//! Logs faulty chains of guests at a bounded rate.
//!
//! The invariant: a worker logs at most one line in each interval, and each line counts those that
//! were suppressed.

use std::time::{Duration, Instant};

use crate::virtqueue::{BadChain, QueueIndex};

/// The minimum time between two lines.
const INTERVAL: Duration = Duration::from_secs(1);

/// Counts faulty chains of one worker.
#[derive(Debug, Default)]
pub(super) struct Faults {
    last: Option<Instant>,
    suppressed: u64,
}

impl Faults {
    /// Logs or counts a faulty chain that was returned empty.
    pub(super) fn report(&mut self, queue: QueueIndex, fault: BadChain) {
        let now = Instant::now();
        if self.last.is_some_and(|last| now - last < INTERVAL) {
            self.suppressed = self.suppressed.saturating_add(1);
            return;
        }
        let suppressed = std::mem::take(&mut self.suppressed);
        self.last = Some(now);
        log::warn!(
            "queue {queue}: the guest's driver put {fault} on the ring; the chain is returned empty \
             ({suppressed} similar faults since the last message)"
        );
    }
}
