//! Fuzz target; see `ringfsd_fuzz::back_channel`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ringfsd_fuzz::back_channel::run(data));
