//! What the fuzzers call: one function per parser. Each takes any bytes, must not panic, and checks what must hold when
//! the bytes are accepted: what was understood and written again is understood the same way. The targets under
//! `fuzz_targets/` hand them to libFuzzer, which also bounds their memory (`memory.rs`); `tests/it/fuzz.rs` runs the same
//! functions on a stable compiler.
//!
//! ```text
//! make fuzz                                                  every target, from seeds/ and regressions/ on
//! RUSTC_BOOTSTRAP=1 cargo fuzz run footer fuzz/corpus/footer fuzz/seeds/footer
//! ```
//! Formats with checksums are tried twice: as they come, and with the checksums made right, or no fuzzer would ever see what
//! lies behind them. A case that was found goes to `regressions/TARGET/`, from where the test keeps running it.

mod config;
mod directory;
mod json;
mod log;
mod proto;
mod record;
mod tier;

/// One parser.
#[derive(Clone, Copy)]
pub(crate) struct Entry {
    /// The target's name, and that of its folders.
    pub(crate) name: &'static str,
    /// Runs it. True when something was accepted, which every seed is.
    pub(crate) run: fn(&[u8]) -> bool,
    /// Bytes that it may hold at once beside [`FACTOR`] times its input.
    #[allow(dead_code, reason = "only the fuzzers count")]
    pub(crate) bytes: usize,
    /// How many runs take as long as one of the quickest entry, about: the test does fewer of them.
    #[allow(dead_code, reason = "only the test asks")]
    pub(crate) weight: u64,
}

/// Bytes that an entry may hold at once for each byte of its input: the input's copies, and what was understood of it.
#[allow(dead_code, reason = "only the fuzzers count")]
pub(crate) const FACTOR: usize = 64;

const fn entry(name: &'static str, run: fn(&[u8]) -> bool, bytes: usize, weight: u64) -> Entry {
    Entry { name, run, bytes, weight }
}

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// Every entry.
pub(crate) const ENTRIES: &[Entry] = &[
    // Records may grow to what a batch may hold, by design: these bounds are those of the codecs.
    entry("batch_parse", record::batch_parse, 600 * MIB, 1),
    entry("records", record::records, 600 * MIB, 1),
    entry("decompress", record::decompress_any, 16 * MIB, 1),
    entry("journal", log::journal, 16 * KIB, 2),
    entry("checkpoint", log::checkpoint, 16 * KIB, 1),
    entry("index", log::index, 16 * KIB, 1),
    entry("snapshot", log::snapshot, 16 * KIB, 1),
    // A ring of journal files, a tail buffer, a window for reading: what an open directory costs.
    entry("data_directory", directory::data_directory, 32 * MIB, 100),
    entry("footer", tier::footer, 16 * KIB, 1),
    entry("manifest", tier::manifest, 16 * KIB, 1),
    entry("json", json::json, 64 * KIB, 1),
    entry("config", config::config, MIB, 40),
    entry("produce", proto::produce, 64 * KIB, 1),
];

/// The bytes with their last four made the CRC-32C of those before.
fn sealed(input: &[u8]) -> Vec<u8> {
    let content = &input[..input.len().saturating_sub(4)];
    [content, &crc32c::crc32c(content).to_be_bytes()].concat()
}

/// Runs a door that writes again what it understood. That must be understood too, as the same, and be no longer.
fn understood(input: &[u8], door: impl Fn(&[u8]) -> Option<Vec<u8>>) -> bool {
    let Some(again) = door(input) else { return false };
    assert!(again.len() <= input.len(), "{} bytes became {}", input.len(), again.len());
    assert_eq!(door(&again).as_ref(), Some(&again), "what was written again is understood otherwise");
    true
}
