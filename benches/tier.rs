//! Benchmarks of the tiering code without I/O: the footer of a full segment, and the lookup of an offset in a long
//! manifest.

use std::hint::black_box;

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput};
use strandline::{
    model::{Compression, LeaderEpoch, Offset, PartitionId, TopicId},
    record::{Batch, BatchBuilder},
    tier::{
        Footer, SegmentEntry,
        footer::FooterBuilder,
        manifest::{ManifestRoot, PAGE_SEGMENTS},
        name::ObjectId,
    },
};

const EPOCH: LeaderEpoch = LeaderEpoch(1);
const SEGMENT_BYTES: u64 = 64 << 20;
const BATCH_BYTES: usize = 64 << 10;

fn partition() -> PartitionId {
    PartitionId::new(TopicId::from_bytes([1; 16]), 0)
}

fn at(offset: u64) -> Offset {
    Offset::new(offset).expect("the offset is below the maximum")
}

fn batch(offset: u64) -> Batch {
    let mut builder = BatchBuilder::new(Compression::None);
    builder.push(0, None, Some(&vec![7; BATCH_BYTES]), &[]).expect("the record is below the maximum size");
    let mut batch = builder.finish(None).expect("the batch has a record");
    batch.set_offset_and_epoch(at(offset), EPOCH);
    batch
}

fn footer(batches: &[Batch]) -> Footer {
    let mut builder = FooterBuilder::new(partition(), at(0), SEGMENT_BYTES, EPOCH, vec![(EPOCH, at(0))]);
    batches.iter().for_each(|batch| builder.push(batch));
    builder.finish(Bytes::new())
}

/// Returns a manifest of `segments` segments with a thousand offsets each.
fn manifest(segments: u64) -> ManifestRoot {
    (0..segments).fold(ManifestRoot::empty(partition(), at(0)), |root, number| {
        let attempt = uuid::Uuid::from_u128(number.into());
        let id = ObjectId { base: at(number * 1000), end: at(number * 1000 + 1000), epoch: EPOCH, attempt };
        let entry = SegmentEntry {
            stamp: id,
            data_bytes: SEGMENT_BYTES,
            footer_bytes: 1000,
            crc: 0,
            max_timestamp_ms: 0,
            created_ms: 0,
        };
        root.extend(entry, EPOCH, attempt).0
    })
}

/// Benchmarks writing and parsing a footer, and finding an offset in and parsing a manifest.
pub(crate) fn tier(c: &mut Criterion) {
    let mut group = c.benchmark_group("tier");
    let batches: Vec<_> = (0..SEGMENT_BYTES / BATCH_BYTES as u64).map(batch).collect();
    group.throughput(Throughput::Bytes(SEGMENT_BYTES));
    group.bench_function("footer of 64 MiB", |b| b.iter(|| footer(black_box(&batches)).encode()));
    let encoded = footer(&batches).encode();
    group.throughput(Throughput::Bytes(encoded.len() as u64));
    group.bench_function("open a footer", |b| b.iter(|| Footer::parse(black_box(&encoded))));
    for segments in [100, 20 * PAGE_SEGMENTS as u64 + 100] {
        let root = manifest(segments);
        let encoded = root.encode();
        group.throughput(Throughput::Elements(1));
        group.bench_with_input(BenchmarkId::new("find an offset", segments), &root, |b, root| {
            b.iter(|| root.find(black_box(at(segments * 500))));
        });
        group.throughput(Throughput::Bytes(encoded.len() as u64));
        group.bench_with_input(BenchmarkId::new("open a manifest", segments), &encoded, |b, encoded| {
            b.iter(|| ManifestRoot::parse(black_box(encoded)));
        });
    }
    group.finish();
}
