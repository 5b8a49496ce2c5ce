//! Fuzz target; see `ringfsd_fuzz::control`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ringfsd_fuzz::control::run(data));
