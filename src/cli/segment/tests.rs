//! Tests of dumps of intact, corrupt and other files.

use std::{fs, path::Path};

use super::*;
use crate::{
    model::{Compression, LeaderEpoch, PartitionId, TopicId},
    record::{BatchBuilder, HEADER_BYTES},
    tier::footer::FooterBuilder,
};

/// Returns one batch of two records for each epoch.
fn batches(epochs: &[u32]) -> Vec<Batch> {
    let batch = |(base, epoch): (usize, &u32)| {
        let mut builder = BatchBuilder::new(Compression::None);
        for value in [b"one", b"two"] {
            builder.push(5, Some(b"k"), Some(value), &[]).expect("fits");
        }
        let mut batch = builder.finish(None).expect("not empty");
        batch.set_offset_and_epoch(Offset::new(2 * base as u64).expect("small"), LeaderEpoch(*epoch));
        batch
    };
    epochs.iter().enumerate().map(batch).collect()
}

fn log(epochs: &[u32]) -> Vec<u8> {
    batches(epochs).iter().flat_map(|batch| batch.to_bytes().to_vec()).collect()
}

fn object(epochs: &[u32]) -> Vec<u8> {
    let partition = PartitionId::new(TopicId::from_bytes([7; 16]), 0);
    let list = vec![(LeaderEpoch(3), Offset::ZERO)];
    let mut footer = FooterBuilder::new(partition, Offset::ZERO, 1000, LeaderEpoch(3), list);
    let batches = batches(epochs);
    batches.iter().for_each(|batch| footer.push(batch));
    [log(epochs), footer.finish(bytes::Bytes::new()).encode().to_vec()].concat()
}

fn dumped(bytes: &[u8], records: bool, output: OutputFormat) -> (String, Result<(), String>) {
    let dump = DumpArgs { file: "f.log".into(), records };
    let mut out = Vec::new();
    let batches = FileBatches::new(bytes, Some(Offset::ZERO));
    let result = print_batches(batches, None, &dump, output, &mut out).map_err(|error| error.to_string());
    (String::from_utf8(out).expect("text"), result)
}

/// Returns the output of the command for a file with this name.
fn dumped_as(name: &str, bytes: &[u8]) -> (String, Result<(), String>) {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join(name);
    fs::write(&file, bytes).expect("written");
    let mut out = Vec::new();
    let result = file::open(&file).and_then(|(batches, footer)| {
        let dump = DumpArgs { file: Path::new(name).to_owned(), records: false };
        print_batches(batches, footer.as_ref(), &dump, OutputFormat::Text, &mut out)
    });
    (String::from_utf8(out).expect("text"), result.map_err(|error| format!("{error:#}")))
}

const LOG: &str = "00000000000000000000.log";
const OBJECT: &str =
    "00000000000000000000-00000000000000000004-0000000003-5f0c0000-0000-4000-8000-000000000000.segment";

#[test]
fn dump_prints_one_line_per_batch_and_record() {
    let (text, result) = dumped(&log(&[3, 3]), false, OutputFormat::Text);
    assert_eq!(result, Ok(()));
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 2);
    assert!(lines[1].contains("offsets 2..4 epoch 3 count 2") && lines[1].ends_with("ok"), "{text}");
    let (text, _) = dumped(&log(&[3, 3]), true, OutputFormat::Text);
    assert_eq!(text.lines().count(), 6);
    assert!(text.contains("offset 3 timestamp 5 key \"k\" value \"two\""), "{text}");
    let (text, _) = dumped(&log(&[3, 3]), true, OutputFormat::Json);
    for line in text.lines() {
        serde_json::from_str::<serde_json::Value>(line).expect("one JSON value per line");
    }
}

#[test]
fn corrupt_batch_is_reported_with_its_position() {
    let good = log(&[3, 3]);
    let second = good.len() / 2;
    let mut flipped = good.clone();
    flipped[second + 70] ^= 4;
    let (text, result) = dumped(&flipped, false, OutputFormat::Text);
    assert_eq!(text.lines().count(), 1, "the intact batch is printed");
    let error = result.expect_err("corrupt");
    assert!(error.contains(&format!("f.log is corrupt at byte {second}")) && error.contains("CRC"), "{error}");
    let error = dumped(&good[..good.len() - 1], false, OutputFormat::Text).1.expect_err("truncated");
    assert!(error.contains(&second.to_string()) && error.contains("truncated"), "{error}");
    let twice = [&good[..second], &good[..second]].concat();
    let error = dumped(&twice, false, OutputFormat::Text).1.expect_err("offsets go back");
    assert!(error.contains("offset 0 instead of 2"), "{error}");
}

/// Regression: a file with a flipped bit in the first batch's offset passed, because no checksum covers that offset.
#[test]
fn corrupt_first_offset_is_detected_by_the_file_name() {
    let good = log(&[3]);
    assert_eq!(dumped_as(LOG, &good).1, Ok(()));
    for byte in 0..8 {
        let mut flipped = good.clone();
        flipped[byte] ^= 1;
        let (text, result) = dumped_as(LOG, &flipped);
        assert_eq!(text, "");
        assert!(result.expect_err("corrupt").contains("corrupt at byte 0"), "byte {byte}");
    }
    // The name of a copy contains no offset to compare with, so the same batch passes.
    assert_eq!(dumped_as("copy", &good).1, Ok(()));
}

/// Of two batches with decreasing epochs, the error names the one whose epoch does not fit the batches around both.
/// Regression: the error always named the second batch.
#[test]
fn epoch_decrease_is_reported_at_the_outlier() {
    let bytes = log(&[3]).len() as u64;
    for (epochs, at, message) in [
        (&[65536, 0][..], 0, "decreases from 65536 to 0 at offset 2"),
        (&[3, 259, 3, 3], bytes, "decreases from 259 to 3 at offset 4"),
        (&[3, 3, 1, 3], 2 * bytes, "decreases from 3 to 1 at offset 4"),
    ] {
        let (text, result) = dumped_as(LOG, &log(epochs));
        let error = result.expect_err("corrupt");
        assert!(error.contains(&format!("corrupt at byte {at}: ")) && error.contains(message), "{epochs:?}: {error}");
        assert_eq!(text.lines().count() as u64 * bytes, at, "{epochs:?}: batches before the outlier are printed");
    }
}

#[test]
fn any_flipped_byte_of_a_segment_object_is_detected() {
    let good = object(&[3, 3]);
    let (text, result) = dumped_as(OBJECT, &good);
    assert_eq!((text.lines().count(), result), (2, Ok(())));
    assert_eq!(dumped_as("copy", &good).1, Ok(()));
    for byte in 0..good.len() {
        let mut flipped = good.clone();
        flipped[byte] ^= 1;
        let (_, result) = dumped_as(OBJECT, &flipped);
        assert!(result.is_err(), "byte {byte}");
    }
    let error = dumped_as(OBJECT, &log(&[3, 3])).1.expect_err("corrupt");
    assert!(error.contains("has no footer"), "{error}");
}

#[test]
fn other_file_is_not_reported_as_corrupt() {
    for (name, bytes, message) in [
        ("README.md", &b"# Strandline\n"[..], "is not a segment file"),
        ("long.txt", &[b'x'; 500], "is not a segment file"),
        ("checkpoint", b"STRLCKP3 and more", "is a checkpoint, not a segment file"),
        ("00000000000000000000.index", b"STRLOIX1", "is an index, not a segment file"),
    ] {
        let error = dumped_as(name, bytes).1.expect_err("refused");
        assert!(error.contains(message) && !error.contains("corrupt"), "{error}");
    }
    let error = dumped_as(LOG, &[b'x'; 500]).1.expect_err("corrupt");
    assert!(error.contains("corrupt at byte 0"), "the name is that of a segment: {error}");
}

#[test]
fn hostile_length_does_not_allocate() {
    let mut bytes = log(&[3]);
    bytes.truncate(HEADER_BYTES);
    bytes[8..12].copy_from_slice(&(60_i32 << 20).to_be_bytes());
    let error = dumped(&bytes, false, OutputFormat::Text).1.expect_err("truncated");
    assert!(error.contains("truncated"), "{error}");
}
