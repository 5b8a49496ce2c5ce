//! Fuzz target; see `ringfsd_fuzz::ring`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ringfsd_fuzz::ring::run(data));
