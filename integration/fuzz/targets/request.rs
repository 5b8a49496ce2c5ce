//! Fuzz target; see `ringfsd_fuzz::request`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ringfsd_fuzz::request::run(data));
