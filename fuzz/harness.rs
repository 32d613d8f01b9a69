//! Runs one entry for libFuzzer, and limits its memory.

#[path = "entries/mod.rs"]
mod entries;
#[path = "memory.rs"]
mod memory;

/// Runs the entry of this name.
pub(crate) fn run(name: &str, input: &[u8]) {
    let entry = entries::ENTRIES.iter().find(|entry| entry.name == name).expect("every target has an entry");
    let max_bytes = entry.bytes + entries::FACTOR * input.len();
    let allocated = memory::max_allocated(|| {
        (entry.run)(input);
    });
    assert!(
        allocated <= max_bytes,
        "{allocated} bytes were allocated for {} bytes of input, at most {max_bytes} are allowed",
        input.len()
    );
}
