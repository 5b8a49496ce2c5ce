//! Fuzz target; see `ringfsd_fuzz::migration`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ringfsd_fuzz::migration::run(data));
