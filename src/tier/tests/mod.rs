//! The tier over stores in memory and in a directory. Over HTTP, with faults: `tests/it/s3`.

mod flow;
mod formats;

use std::path::Path;

use bytes::{Bytes, BytesMut};

use super::*;
use crate::telemetry::Metrics;
use crate::{
    model::{Compression, LeaderEpoch, Offset, PartitionId, TopicId},
    record::BatchBuilder,
};

fn at(offset: u64) -> Offset {
    Offset::new(offset).unwrap()
}

fn partition() -> PartitionId {
    PartitionId::new(TopicId::from_bytes([7; 16]), 3)
}

/// `count` batches of three records of about `size` bytes, from `base` on, with timestamp = offset × 10.
fn batches(base: u64, count: u64, size: usize, epoch: u32) -> Bytes {
    let mut out = BytesMut::new();
    for number in 0..count {
        let first = base + number * 3;
        let mut builder = BatchBuilder::new(Compression::None);
        for offset in first..first + 3 {
            let value: Vec<u8> = (0..size as u64).map(|i| ((offset * 31 + i * i) % 251) as u8).collect();
            builder.push(offset as i64 * 10, None, Some(&value), &[]).unwrap();
        }
        let mut batch = builder.finish(None).unwrap();
        batch.stamp(at(first), LeaderEpoch(epoch));
        out.extend_from_slice(&batch.to_bytes());
    }
    out.freeze()
}

/// A file of the batches and its description.
fn source(folder: &Path, base: u64, count: u64, size: usize, epoch: u32) -> (SegmentSource, Bytes) {
    let content = batches(base, count, size, epoch);
    let path = folder.join(format!("{base:020}.log"));
    std::fs::write(&path, &content).unwrap();
    let source = SegmentSource {
        path,
        base: at(base),
        end: at(base + count * 3),
        bytes: content.len() as u64,
        max_timestamp_ms: (base as i64 + count as i64 * 3 - 1) * 10,
        epochs: vec![(LeaderEpoch(0), at(0)), (LeaderEpoch(epoch), at(base))]
            .into_iter()
            .skip((epoch == 0).into())
            .collect(),
        producers: Bytes::from_static(b"producers"),
    };
    (source, content)
}

fn open(options: &StoreOptions) -> PartitionTier {
    let store = Store::open(options, "test").unwrap();
    tier_over(store, TierState::default())
}

fn tier_over(store: Store, state: TierState) -> PartitionTier {
    PartitionTier::new(store, Cache::open(&CacheOptions::default(), &Metrics::new()).unwrap(), partition(), state)
}

/// Everything from `from` to `end`, as one piece, in reads of `max` bytes.
async fn read_all(tier: &PartitionTier, from: u64, end: u64, max: usize) -> Bytes {
    let (mut out, mut next) = (BytesMut::new(), at(from));
    while next < at(end) {
        let read = tier.read(next, max).await.unwrap();
        assert!(read.next > next, "a read goes forward");
        assert_eq!(read.bytes, read.chunks.iter().map(Bytes::len).sum::<usize>());
        read.chunks.iter().for_each(|chunk| out.extend_from_slice(chunk));
        next = read.next;
    }
    out.freeze()
}
