//! The tier over stores in memory and in a directory. `tests/it/s3` tests the tier over HTTP, with faults.

mod flow;
mod formats;
mod outage;

use std::{cell::Cell, path::Path, sync::Arc};

use bytes::{Bytes, BytesMut};

use super::*;
use crate::{
    log::{DataDir, DataDirIdentity, Disk as _, EpochHistory, LogOptions, ProducerTable, SimDisk},
    model::{BrokerId, Compression, LeaderEpoch, Offset, PartitionId, TopicId},
    record::{Batch, BatchBuilder, ProducerSequence},
    telemetry::Metrics,
};

fn at(offset: u64) -> Offset {
    Offset::new(offset).unwrap()
}

fn partition() -> PartitionId {
    PartitionId::new(TopicId::from_bytes([7; 16]), 3)
}

/// Returns `count` batches of three records of about `size` bytes, from `base` on, with timestamp = offset × 10.
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
        batch.set_offset_and_epoch(at(first), LeaderEpoch(epoch));
        out.extend_from_slice(&batch.to_bytes());
    }
    out.freeze()
}

/// A source of segments: a data directory with one replica for each segment.
struct Segments {
    disk: SimDisk,
    log: DataDir,
    created: Cell<u32>,
}

impl Segments {
    fn new() -> Self {
        let disk = SimDisk::new();
        let identity = DataDirIdentity { cluster: "test".to_owned(), broker: BrokerId(1) };
        let options = LogOptions {
            journal_bytes: 1 << 20,
            tail_bytes: 1 << 20,
            reserve_bytes: 0,
            step_mode: true,
            ..LogOptions::default()
        };
        let log = DataDir::open(Arc::new(disk.clone()), Path::new("/data"), &identity, options).unwrap();
        Self { disk, log, created: Cell::new(0) }
    }

    /// Returns a segment of [`batches`], in a log that begins with the segment, and its bytes.
    fn source(&self, base: u64, count: u64, size: usize, epoch: u32) -> (SegmentSource, Bytes) {
        let content = batches(base, count, size, epoch);
        self.created.set(self.created.get() + 1);
        let id = PartitionId::new(partition().topic, self.created.get());
        let mut replica = self.log.open_replica(id, at(base)).unwrap();
        replica.set_journaled(false);
        replica.reset_with(at(base), EpochHistory::new(), producers()).unwrap();
        let mut rest = content.clone();
        while !rest.is_empty() {
            replica.append(&[Batch::split_from(&mut rest).unwrap()]).unwrap();
        }
        replica.roll().unwrap();
        (SegmentSource::new(replica.export(at(base)).unwrap()), content)
    }

    /// Replaces the bytes of a segment while the source holds the file open.
    fn corrupt(&self, source: &SegmentSource, bytes: &[u8]) {
        self.disk.write(source.path(), bytes).unwrap();
    }
}

/// Returns the state of one producer that wrote before any of these segments.
fn producers() -> ProducerTable {
    let mut builder = BatchBuilder::new(Compression::None);
    builder.push(0, None, None, &[]).unwrap();
    let mut producers = ProducerTable::new();
    producers.record_batch(&builder.finish(Some(ProducerSequence { id: 9, epoch: 1, base_sequence: 0 })).unwrap());
    producers
}

fn open(options: &ObjectStoreOptions) -> PartitionTier {
    let store = TierStore::open(options, "test").unwrap();
    tier_over(store, TierState::default())
}

fn tier_over(store: TierStore, state: TierState) -> PartitionTier {
    PartitionTier::new(
        store,
        ChunkCache::open(&ChunkCacheOptions::default(), &Metrics::new()).unwrap(),
        partition(),
        state,
    )
}

/// Reads everything from `from` to `end` in reads of `max` bytes, and returns it as one piece.
async fn read_all(tier: &PartitionTier, from: u64, end: u64, max: usize) -> Bytes {
    let (mut out, mut next) = (BytesMut::new(), at(from));
    while next < at(end) {
        let read = tier.read(next, max.into()).await.unwrap();
        assert!(read.next > next, "every read advances");
        assert_eq!(read.bytes, read.chunks.iter().map(Bytes::len).sum::<usize>());
        read.chunks.iter().for_each(|chunk| out.extend_from_slice(chunk));
        next = read.next;
    }
    out.freeze()
}

/// Uploads one segment and writes the manifest that lists it.
async fn stage(
    tier: &PartitionTier,
    source: &SegmentSource,
    epoch: LeaderEpoch,
) -> Result<StagedManifest, UploadError> {
    let mut batch = tier.start_upload_batch(epoch).await?;
    batch.add(source).await?;
    batch.finish().await
}
