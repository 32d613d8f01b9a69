//! Runs the entries of the fuzzers with a stable compiler. The inputs are those of known regressions, seeds, and a
//! bounded number of mutated seeds.
//!
//! `FUZZ_ITERATIONS` is the number of mutated inputs of each entry, which is divided by the weight of the entry.
//! `FUZZ_SEED` is the seed of the mutations. A failure prints its input.

#![allow(clippy::unwrap_used, reason = "in a test it is an assertion")]

use std::path::Path;

use rand::{RngExt, SeedableRng, rngs::StdRng};

#[path = "../../fuzz/entries/mod.rs"]
mod entries;
mod seeds;

/// Default of `FUZZ_ITERATIONS`. A debug build runs these inputs in some seconds.
const ITERATIONS: u64 = 20_000;

/// Guard with the name of an entry and its input, which it prints if the entry panics.
struct PanicReport<'a>(&'a str, &'a [u8]);

impl Drop for PanicReport<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let hex: String = self.1.iter().map(|byte| format!("{byte:02x}")).collect();
            eprintln!("{} failed on {} bytes (keep them in fuzz/regressions/{0}): {hex}", self.0, self.1.len());
        }
    }
}

/// Runs an entry. Returns true if its parser accepted any input.
fn run(entry: &entries::Entry, input: &[u8]) -> bool {
    let _report = PanicReport(entry.name, input);
    (entry.run)(input)
}

/// Returns the names and contents of a folder's files, sorted by name. Returns an empty list if the folder does not
/// exist.
fn files(folder: &str) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    if !folder.exists() {
        return Vec::new();
    }
    let mut paths: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.is_file());
    paths.sort();
    let name = |path: &Path| path.file_name().unwrap().to_string_lossy().into_owned();
    paths.iter().map(|path| (name(path), std::fs::read(path).unwrap())).collect()
}

/// Returns one of the seeds with one to eight random changes that parsers often handle wrongly.
fn mutate(rng: &mut StdRng, seeds: &[Vec<u8>]) -> Vec<u8> {
    const NUMBERS: [&[u8]; 8] = [
        &[0],
        &[0x7f],
        &[0x80],
        &[0xff; 4],
        &[0x7f, 0xff, 0xff, 0xff],
        &[0x80, 0, 0, 0],
        &[0xfe, 0xff, 0xff, 0xff, 0x0f],
        &[0; 8],
    ];
    let pick = |rng: &mut StdRng, len: usize| rng.random_range(0..len.max(1));
    let mut input = seeds[pick(rng, seeds.len())].clone();
    for _ in 0..rng.random_range(1..=8) {
        let at = pick(rng, input.len());
        let end = (at + rng.random_range(1..=64)).min(input.len());
        match rng.random_range(0..7) {
            0 if !input.is_empty() => input[at] ^= 1 << rng.random_range(0..8),
            1 if !input.is_empty() => input[at] = rng.random(),
            2 => drop(input.drain(at.min(end)..end)),
            3 => input.extend_from_within(at.min(end)..end),
            4 => input.truncate(at),
            5 => {
                let other = &seeds[pick(rng, seeds.len())];
                let from = pick(rng, other.len());
                input.splice(at.min(end)..end, other[from..].iter().copied().take(64));
            }
            _ => {
                for (to, from) in input[at.min(end)..].iter_mut().zip(NUMBERS[pick(rng, NUMBERS.len())]) {
                    *to = *from;
                }
            }
        }
    }
    input
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |value| value.parse().expect("a number"))
}

#[test]
fn known_regressions_stay_fixed() {
    let mut cases = 0;
    for entry in entries::ENTRIES {
        for (_, case) in files(&format!("fuzz/regressions/{}", entry.name)) {
            run(entry, &case);
            cases += 1;
        }
    }
    assert!(cases > 15, "cases were found: {cases}");
}

/// The seeds are files that earlier versions wrote, which must stay readable. A format that changes gets a new version
/// and keeps its old seeds.
#[test]
fn every_seed_is_accepted() {
    for entry in entries::ENTRIES {
        let seeds = files(&format!("fuzz/seeds/{}", entry.name));
        assert!(!seeds.is_empty(), "{} has no seeds", entry.name);
        for (name, seed) in seeds {
            assert!(run(entry, &seed), "fuzz/seeds/{}/{name} is refused", entry.name);
        }
    }
}

/// The entries accept the output that this version writes, which may not be in `fuzz/seeds`.
#[test]
fn output_of_this_version_is_accepted() {
    for (target, name, seed) in seeds::all() {
        let entry = entries::ENTRIES.iter().find(|entry| entry.name == target).unwrap();
        assert!(run(entry, &seed), "{target}: {name} is refused");
    }
}

#[test]
fn every_entry_is_a_fuzz_target() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let mut targets: Vec<_> = files("fuzz/fuzz_targets").into_iter().map(|(name, _)| name).collect();
    let mut entries: Vec<_> = entries::ENTRIES.iter().map(|entry| format!("{}.rs", entry.name)).collect();
    targets.sort();
    entries.sort();
    assert_eq!(targets, entries);
    let manifest = std::fs::read_to_string(root.join("Cargo.toml")).unwrap();
    for target in targets {
        assert!(manifest.contains(&format!("path = \"fuzz_targets/{target}\"")), "{target} is not in fuzz/Cargo.toml");
    }
}

#[test]
fn mutated_inputs_break_no_parser() {
    let (seed, iterations) = (number("FUZZ_SEED", 1), number("FUZZ_ITERATIONS", ITERATIONS));
    for entry in entries::ENTRIES {
        let mut rng = StdRng::seed_from_u64(seed);
        let seeds: Vec<_> = files(&format!("fuzz/seeds/{}", entry.name)).into_iter().map(|(_, seed)| seed).collect();
        for _ in 0..iterations / entry.weight {
            let input = mutate(&mut rng, &seeds);
            run(entry, &input);
        }
    }
}

/// Writes seeds for `make fuzz-seeds`. An existing seed is never overwritten, because an earlier version may have
/// written it.
#[test]
#[ignore = "writes into the source tree: make fuzz-seeds"]
fn write_missing_seeds() {
    for (target, name, seed) in seeds::all() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(target);
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join(name);
        if !path.exists() {
            std::fs::write(path, seed).unwrap();
        }
    }
}
