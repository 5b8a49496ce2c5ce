//! Fuzz target; what it does is said in `ringfsd_fuzz::ring`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ringfsd_fuzz::ring::run(data));
