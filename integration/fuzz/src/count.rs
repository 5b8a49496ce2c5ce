//! Counts requests, and says at the end how many there were.

use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};

static REQUESTS: AtomicU64 = AtomicU64::new(0);

/// Counts `more` requests.
pub fn add(more: usize) {
    static AT_EXIT: Once = Once::new();
    AT_EXIT.call_once(|| {
        // SAFETY: `tell` is a function that takes nothing and does not unwind, as `atexit` wants.
        unsafe { libc::atexit(tell) };
    });
    REQUESTS.fetch_add(more as u64, Ordering::Relaxed);
}

extern "C" fn tell() {
    eprintln!("fuzzed requests: {}", REQUESTS.load(Ordering::Relaxed));
}
