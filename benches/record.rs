//! Benchmarks of batches: parse, build, decode, and each codec. Batches are 64 KiB of 1 KiB records unless the name of
//! a benchmark gives another size.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput};
use rand::{Rng, SeedableRng, rngs::StdRng};
use strandline::{
    model::{Compression, LeaderEpoch, Offset},
    record::{Batch, BatchBuilder, decompress},
};

const BATCH_BYTES: usize = 64 << 10;
const RECORD_BYTES: usize = 1 << 10;

/// Returns incompressible bytes.
fn noise(bytes: usize) -> Vec<u8> {
    let mut noise = vec![0; bytes];
    StdRng::seed_from_u64(1).fill_bytes(&mut noise);
    noise
}

/// Returns lines of a text log, which codecs compress to about a quarter.
fn lines(bytes: usize) -> Vec<u8> {
    let mut rng = StdRng::seed_from_u64(2);
    let line = |_| {
        format!(
            "2025-11-21 13:{:02}:{:02} status installed lib{:x}:amd64 1.{}\n",
            rng.next_u32() % 60,
            rng.next_u32() % 60,
            rng.next_u32(),
            rng.next_u32() % 100
        )
    };
    (0..bytes / 40).map(line).collect::<String>().into_bytes()[..bytes].to_vec()
}

fn build(codec: Compression, payload: &[u8], record_bytes: usize) -> Batch {
    let mut builder = BatchBuilder::with_capacity(codec, payload.len() + payload.len() / 8 + 64);
    for value in payload.chunks(record_bytes) {
        builder.push(1_700_000_000_000, None, Some(value), &[]).expect("the record is below the maximum size");
    }
    builder.finish(None).expect("the batch has records")
}

/// Benchmarks parsing, building, decoding and verifying a batch, and each codec.
pub(crate) fn record(c: &mut Criterion) {
    let payload = noise(BATCH_BYTES);
    let bytes = build(Compression::None, &payload, RECORD_BYTES).to_bytes();
    let batch = Batch::parse(bytes.clone()).expect("the batch is valid");

    let mut group = c.benchmark_group("record");
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    group.bench_function("parse", |b| b.iter(|| Batch::parse(black_box(&bytes).clone())));
    group.bench_function("stamp", |b| {
        b.iter_batched_ref(
            || batch.clone(),
            |batch| batch.set_offset_and_epoch(Offset::MAX, LeaderEpoch(1)),
            BatchSize::SmallInput,
        );
    });
    group.bench_function("build/1KiB", |b| b.iter(|| build(Compression::None, black_box(&payload), RECORD_BYTES)));
    group.bench_function("build/100B", |b| b.iter(|| build(Compression::None, black_box(&payload), 100)));
    for (name, batch) in [("1KiB", batch.clone()), ("100B", build(Compression::None, &payload, 100))] {
        group.bench_function(format!("decode/{name}"), |b| {
            b.iter(|| {
                batch.records().expect("uncompressed").map(|item| item.expect("valid record").0.get()).sum::<u64>()
            });
        });
        group.bench_function(format!("verify/{name}"), |b| b.iter(|| batch.verify_records()));
    }
    let text = lines(BATCH_BYTES);
    for codec in [Compression::Gzip, Compression::Snappy, Compression::Lz4, Compression::Zstd] {
        group.bench_function(format!("compress/{codec}"), |b| b.iter(|| build(codec, black_box(&text), RECORD_BYTES)));
        let stored = build(codec, &text, RECORD_BYTES);
        group.bench_function(format!("decompress/{codec}"), |b| {
            b.iter(|| decompress(codec, black_box(stored.records_bytes()), 1 << 20));
        });
        group.bench_function(format!("first records/{codec}"), |b| b.iter(|| black_box(&stored).check_first_records()));
    }
    group.finish();
}
