//! Fuzz target; what it does is said in `ringfsd_fuzz::front_record`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ringfsd_fuzz::front_record::run(data));
