//! Fuzz target; see `ringfsd_fuzz::decode`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ringfsd_fuzz::decode::run(data));
