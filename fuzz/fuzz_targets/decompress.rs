//! See `entries.rs`.
#![no_main]

#[path = "../entries.rs"]
#[allow(dead_code, reason = "each target runs one entry")]
mod entries;

libfuzzer_sys::fuzz_target!(|input: &[u8]| entries::decompress_any(input));
