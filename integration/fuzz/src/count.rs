//! Counts requests, and prints the number at the end.
//!
//! With `RINGFSD_FUZZ_COUNT` in the environment the number is also written to the file of that name
//! from time to time: a fuzzer that is killed or interrupted prints nothing.

use std::ffi::OsString;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Once, OnceLock};

static REQUESTS: AtomicU64 = AtomicU64::new(0);

/// After so many requests the file is written again.
const NOW_AND_THEN: u64 = 1 << 16;

/// Counts `more` requests.
pub fn add(more: usize) {
    static AT_EXIT: Once = Once::new();
    AT_EXIT.call_once(|| {
        // SAFETY: `tell` is a function that takes nothing and does not unwind, as `atexit` wants.
        unsafe { libc::atexit(tell) };
    });
    let more = more as u64;
    let before = REQUESTS.fetch_add(more, Ordering::Relaxed);
    if before / NOW_AND_THEN != (before + more) / NOW_AND_THEN {
        keep(before + more);
    }
}

extern "C" fn tell() {
    let requests = REQUESTS.load(Ordering::Relaxed);
    eprintln!("fuzzed requests: {requests}");
    keep(requests);
}

fn keep(requests: u64) {
    static FILE: OnceLock<Option<OsString>> = OnceLock::new();
    if let Some(file) = FILE.get_or_init(|| std::env::var_os("RINGFSD_FUZZ_COUNT")) {
        // A failure to write can't be reported.
        let _ = std::fs::write(file, format!("{requests}\n"));
    }
}
