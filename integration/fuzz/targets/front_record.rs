//! Fuzz target; see `ringfsd_fuzz::front_record`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ringfsd_fuzz::front_record::run(data));
