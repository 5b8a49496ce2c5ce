//! Counters of events in a session that are logged ever more rarely.
//!
//! What is shown to an operator is counted elsewhere, by the transport. The invariant: a counter never
//! decreases.

use std::sync::atomic::{AtomicU64, Ordering};

/// The counters of a session. They order nothing, so all accesses are `Relaxed`.
#[derive(Debug, Default)]
pub struct Counters {
    inits: AtomicU64,
    malformed: AtomicU64,
}

impl Counters {
    /// Requests that could not be decoded.
    pub fn malformed(&self) -> u64 {
        self.malformed.load(Ordering::Relaxed)
    }

    /// Counts an INIT, and returns the new total.
    pub(super) fn count_init(&self) -> u64 {
        add_one(&self.inits)
    }

    /// Counts a malformed request, and returns the new total.
    pub(super) fn count_malformed(&self) -> u64 {
        add_one(&self.malformed)
    }
}

fn add_one(counter: &AtomicU64) -> u64 {
    counter.fetch_add(1, Ordering::Relaxed).saturating_add(1)
}
