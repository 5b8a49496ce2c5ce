//! Fuzz target; see `ringfsd_fuzz::state`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ringfsd_fuzz::state::run(data));
