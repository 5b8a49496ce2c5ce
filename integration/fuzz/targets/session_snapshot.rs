//! Fuzz target; see `ringfsd_fuzz::session_snapshot`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ringfsd_fuzz::session_snapshot::run(data));
