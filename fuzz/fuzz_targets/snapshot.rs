//! See `entries/mod.rs`.
#![no_main]

#[path = "../harness.rs"]
mod harness;

libfuzzer_sys::fuzz_target!(|input: &[u8]| harness::run(env!("CARGO_BIN_NAME"), input));
