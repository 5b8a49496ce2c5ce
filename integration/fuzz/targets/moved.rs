//! Fuzz target; see `ringfsd_fuzz::moved`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ringfsd_fuzz::moved::run(data));
