//! What guests do wrong, counted, and told at a bounded rate.

use std::time::{Duration, Instant};

use crate::virtqueue::{BadChain, QueueIndex};

/// The least time between two lines.
const INTERVAL: Duration = Duration::from_secs(1);

/// Counts faulty chains of one worker.
#[derive(Debug, Default)]
pub(super) struct Faults {
    last: Option<Instant>,
    silent: u64,
}

impl Faults {
    /// Counts a chain that came with a fault and was returned empty.
    pub(super) fn report(&mut self, queue: QueueIndex, fault: BadChain) {
        let now = Instant::now();
        if self.last.is_some_and(|last| now - last < INTERVAL) {
            self.silent = self.silent.saturating_add(1);
            return;
        }
        let silent = std::mem::take(&mut self.silent);
        self.last = Some(now);
        log::warn!(
            "queue {queue}: the guest's driver put {fault} on the ring; returned empty \
             ({silent} more such since the last line)"
        );
    }
}
