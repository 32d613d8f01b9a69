//! Entry points of the fuzzers: one function per parser. Each accepts any bytes, must not panic, and checks accepted
//! input: a value that is encoded and decoded again is the same value. The targets in `fuzz_targets/` run the functions
//! under libFuzzer and bound their memory (`memory.rs`); `tests/it/fuzz.rs` runs them on a stable compiler.
//!
//! ```text
//! make fuzz                                                  every target, from seeds/ and regressions/ on
//! RUSTC_BOOTSTRAP=1 cargo fuzz run footer fuzz/corpus/footer fuzz/seeds/footer
//! ```
//! Formats with checksums are tried twice: as given, and with corrected checksums. Otherwise no fuzzer would reach the
//! code behind the checksums. Found cases go to `regressions/TARGET/`, and the test runs them from there.

mod config;
mod directory;
mod json;
mod log;
mod proto;
mod record;
mod tier;

/// The fuzz entry of one parser.
#[derive(Clone, Copy)]
pub(crate) struct Entry {
    /// Name of the target and of its folders.
    pub(crate) name: &'static str,
    /// Runs the parser. Returns true if the parser accepted any input; it accepts every seed.
    pub(crate) run: fn(&[u8]) -> bool,
    /// Maximum bytes that the entry holds at once, in addition to [`FACTOR`] times its input.
    #[allow(dead_code, reason = "only the fuzzers count")]
    pub(crate) bytes: usize,
    /// Approximate duration of a run, as a multiple of the fastest entry. The test runs a slow entry less often.
    #[allow(dead_code, reason = "only the test asks")]
    pub(crate) weight: u64,
}

/// Maximum bytes that an entry holds at once for each byte of its input: copies of the input, and the decoded value.
#[allow(dead_code, reason = "only the fuzzers count")]
pub(crate) const FACTOR: usize = 64;

const fn entry(name: &'static str, run: fn(&[u8]) -> bool, bytes: usize, weight: u64) -> Entry {
    Entry { name, run, bytes, weight }
}

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// All entries.
pub(crate) const ENTRIES: &[Entry] = &[
    // Records may decompress to the maximum batch size by design. These bounds are those of the codecs.
    entry("batch_parse", record::batch_parse, 600 * MIB, 1),
    entry("records", record::records, 600 * MIB, 1),
    entry("decompress", record::decompress_any, 16 * MIB, 1),
    entry("journal", log::journal, 16 * KIB, 2),
    entry("checkpoint", log::checkpoint, 16 * KIB, 1),
    entry("index", log::index, 16 * KIB, 1),
    entry("snapshot", log::snapshot, 16 * KIB, 1),
    // The memory of an open directory: a ring of journal files, a tail cache and a read buffer.
    entry("data_directory", directory::data_directory, 32 * MIB, 100),
    entry("footer", tier::footer, 16 * KIB, 1),
    entry("manifest", tier::manifest, 16 * KIB, 1),
    entry("json", json::json, 64 * KIB, 1),
    entry("config", config::config, MIB, 40),
    entry("produce", proto::produce, 64 * KIB, 1),
];

/// Returns the bytes with the last four replaced by the CRC-32C of those before.
fn sealed(input: &[u8]) -> Vec<u8> {
    let content = &input[..input.len().saturating_sub(4)];
    [content, &crc32c::crc32c(content).to_be_bytes()].concat()
}

/// Runs `recode`, which decodes the input and encodes the value. The output must give the same output again and must
/// not be longer than the input. Returns false if `recode` rejects the input.
fn check_recoding(input: &[u8], recode: impl Fn(&[u8]) -> Option<Vec<u8>>) -> bool {
    let Some(encoded) = recode(input) else { return false };
    assert!(encoded.len() <= input.len(), "{} bytes were encoded as {}", input.len(), encoded.len());
    assert_eq!(recode(&encoded).as_ref(), Some(&encoded), "the encoded value decodes to another value");
    true
}
