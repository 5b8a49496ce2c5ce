//! Fuzz target; what it does is said in `ringfsd_fuzz::request`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ringfsd_fuzz::request::run(data));
