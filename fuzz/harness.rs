//! Runs one entry for libFuzzer, and bounds the memory that it takes.

#[path = "entries/mod.rs"]
mod entries;
#[path = "memory.rs"]
mod memory;

/// Runs the entry of this name.
pub(crate) fn run(name: &str, input: &[u8]) {
    let entry = entries::ENTRIES.iter().find(|entry| entry.name == name).expect("every target has an entry");
    let most = entry.bytes + entries::FACTOR * input.len();
    let held = memory::most_held(|| {
        (entry.run)(input);
    });
    assert!(held <= most, "{held} bytes were held for {} bytes of input; {most} are allowed", input.len());
}
