//! The fuzzers' entries on a stable compiler: cases that were found once, then a bounded run of mutations of good inputs.
//!
//! `FUZZ_ITERATIONS` and `FUZZ_SEED` make a run longer or another one. A failure prints its input.

#![allow(clippy::unwrap_used, reason = "in a test it is an assertion")]

use std::path::Path;

use rand::{RngExt, SeedableRng, rngs::StdRng};

#[path = "../../fuzz/entries.rs"]
mod entries;

/// Mutated inputs of each entry: some seconds of a debug build.
const ITERATIONS: u64 = 30_000;

/// Prints the input when the entry panics.
struct Running<'a>(&'a str, &'a [u8]);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let hex: String = self.1.iter().map(|byte| format!("{byte:02x}")).collect();
            eprintln!("{} failed on {} bytes (keep them in fuzz/regressions/{0}): {hex}", self.0, self.1.len());
        }
    }
}

fn run((name, entry): entries::Entry, input: &[u8]) {
    let _running = Running(name, input);
    entry(input);
}

/// The files of a folder in the order of their names.
fn files(folder: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let mut paths: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.is_file());
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

/// Good inputs of an entry, made from the golden batches.
fn seeds(name: &str) -> Vec<Vec<u8>> {
    let batches: Vec<_> = ["src/record/golden", "src/record/golden/kafka"]
        .into_iter()
        .flat_map(files)
        .filter(|file| file.starts_with(&[0, 0, 1]))
        .collect();
    assert_eq!(batches.len(), 10);
    let (codec, count) = (|batch: &[u8]| batch[22], |batch: &[u8]| [batch[59], batch[60]]);
    let seed = |batch: Vec<u8>| match name {
        "records" => [&[codec(&batch)][..], &count(&batch), &batch[61..]].concat(),
        "decompress" => [&[codec(&batch)], &batch[61..]].concat(),
        _ => batch,
    };
    batches.into_iter().map(seed).collect()
}

/// One to eight changes of the kinds that parsers stumble over.
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
fn cases_that_were_found_once_stay_fixed() {
    for entry in entries::ENTRIES {
        let cases = files(&format!("fuzz/regressions/{}", entry.0));
        assert!(!cases.is_empty(), "{} has none", entry.0);
        for case in cases {
            run(*entry, &case);
        }
    }
}

#[test]
fn mutated_inputs_break_no_parser() {
    let (seed, iterations) = (number("FUZZ_SEED", 1), number("FUZZ_ITERATIONS", ITERATIONS));
    for entry in entries::ENTRIES {
        let mut rng = StdRng::seed_from_u64(seed);
        let seeds = seeds(entry.0);
        for seed in &seeds {
            run(*entry, seed);
        }
        for _ in 0..iterations {
            let input = mutate(&mut rng, &seeds);
            run(*entry, &input);
        }
    }
}
