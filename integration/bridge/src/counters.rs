//! Counts what happens on a mount: for the closing line, and for tests that must see no fault of
//! the server.
//!
//! All accesses are relaxed: the numbers order nothing.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counts of one mount.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    requests: AtomicU64,
    faults: AtomicU64,
}

impl Counters {
    /// A request was passed on.
    pub(crate) fn count_request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    /// The server has broken the protocol; prints how, the first few times and then less and less
    /// often.
    pub(crate) fn count_fault(&self, what: fmt::Arguments<'_>) {
        let count = self.faults.fetch_add(1, Ordering::Relaxed) + 1;
        if count <= 16 || count.is_power_of_two() {
            eprintln!("bridge: the server's fault no. {count}: {what}");
        }
    }
}

impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let requests = self.requests.load(Ordering::Relaxed);
        let faults = self.faults.load(Ordering::Relaxed);
        write!(f, "{requests} requests, {faults} faults of the server")
    }
}
