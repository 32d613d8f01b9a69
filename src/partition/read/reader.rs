//! Reads of a partition: from memory, then disk, then object store, without a difference to the caller.
//!
//! A reader sends no request to the partition's task. It reads from the log start to the high watermark that the task
//! published. The caller may have received a higher high watermark from another replica. So only a leader of a
//! committed epoch returns an error for a read above its high watermark. On any other replica, such a read returns
//! nothing yet. A segment may be evicted during a read: the read then tries again, because the object store has the
//! records or they are deleted.

use std::sync::Arc;

use bytes::Bytes;

use super::{decompressor::Decompressor, memory_budget::Charge};
use crate::{
    log::{self, ReadLimits},
    model::{LeaderEpoch, Offset, PartitionId, Watermarks},
    partition::{
        published::PublishedState,
        role::{ReplicaRole, WatermarkKind},
        wake::WakeSet,
    },
    record::{Batch, ChunkedBatches, MalformedBatch},
    task,
    tier::{self, PartitionTier},
};

/// Tier that served a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReadSource {
    /// The tail cache.
    Memory,
    /// A segment file.
    Disk,
    /// The object store, or its cache.
    ObjectStore,
}

/// Result of a read.
#[derive(Clone, Debug)]
pub struct FetchedBatches {
    /// Bytes of complete batches, in order; a batch may continue in the next chunk. The first batch may begin before
    /// the requested offset.
    pub chunks: Vec<Bytes>,
    /// Bytes of all chunks.
    pub bytes: usize,
    /// Offset of the next read.
    pub next: Offset,
    pub source: ReadSource,
}

/// Error of a read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The offset is below `start` or above `end`. A [`PartitionReader`] returns this error for an offset above `end`
    /// only on a leader whose epoch is committed.
    #[error("offset {offset} is out of range: the partition holds {start} to {end}")]
    OutOfRange {
        /// Requested offset.
        offset: Offset,
        /// First offset that can be read.
        start: Offset,
        /// First offset that cannot be read yet.
        end: Offset,
    },
    /// The partition is closed on this broker. For a [`TailReader`](super::TailReader), also: this broker no longer
    /// leads in the reader's epoch.
    #[error("the partition is closed on this broker")]
    Closed,
    /// The bytes at this offset, on the disk or in the object store, are not those that were written, or their object
    /// is missing.
    #[error(
        "the data at offset {offset} cannot be served: {reason}; until the data is restored, a consumer can only \
         continue at a later offset"
    )]
    Corrupt {
        offset: Offset,
        /// Kind and position of the corruption.
        reason: String,
    },
    /// The disk could not be read, or segments were evicted during each of several attempts.
    #[error("reading from this broker's disk failed: {reason}")]
    Disk {
        /// Description of the error.
        reason: String,
    },
    /// The first batch of the read exceeds the memory that the caller has for it.
    #[error("the batch has {bytes} bytes, more than the memory of this read")]
    BatchTooLarge {
        /// Bytes of the batch.
        bytes: usize,
    },
    /// The object store could not be read, or this broker has none. The caller may try again.
    #[error("reading from the object store failed: {reason}")]
    ObjectStore {
        /// Error of the object store.
        reason: String,
    },
}

/// Reader of one partition. Clones are cheap.
#[derive(Clone)]
pub struct PartitionReader {
    id: PartitionId,
    published: Arc<PublishedState>,
    log: log::LogReader,
    tier: Option<PartitionTier>,
    /// Memory that the caller holds for results; see [`PartitionReader::charged`].
    charge: Option<Charge>,
}

/// Maximum number of batches that a search by time opens. A batch may hold no record with the time in its header.
const MAX_SEARCHED_BATCHES: usize = 64;

/// Maximum number of attempts of a read, or of a search by time, whose segment is removed during each attempt.
const MAX_READ_ATTEMPTS: usize = 8;

impl PartitionReader {
    pub(in crate::partition) fn new(
        id: PartitionId,
        published: Arc<PublishedState>,
        log: log::LogReader,
        tier: Option<PartitionTier>,
    ) -> Self {
        Self { id, published, log, tier, charge: None }
    }

    /// Returns a reader for a caller that has taken memory for the results. Each disk read holds `charge` until the
    /// read has ended, even if the caller was dropped.
    pub fn charged(&self, charge: Charge) -> Self {
        Self { charge: Some(charge), ..self.clone() }
    }

    pub fn watermarks(&self) -> Watermarks {
        self.published.watermarks()
    }

    /// Marks `index` in `wake_set` now, and whenever the next read may have another result. The cause is that the high
    /// watermark moved, the replica status changed, or the partition was closed.
    pub fn add_listener(&self, wake_set: &Arc<WakeSet>, index: usize) {
        self.published.add_listener(wake_set, index, WatermarkKind::HighWatermark);
    }

    /// Reads committed records from `from` on: at least one batch if there is one, and further batches within the
    /// limits. Batches in memory are shared and take no memory of the caller, so the first one may have any size.
    /// Returns `None` if there is nothing to read yet, in these cases:
    /// - `from` is the high watermark.
    /// - `from` lies above the high watermark on a replica that does not lead in a committed epoch.
    /// - The batch at `from` is in the object store and ends above the high watermark.
    ///
    /// # Errors
    /// [`ReadError::OutOfRange`] if `from` is below the log start, or above the high watermark of a leader whose epoch
    /// is committed. [`ReadError::BatchTooLarge`] if the first batch on the disk or in the object store exceeds the
    /// limits. [`ReadError::Closed`] after the partition was closed. The other errors are those of the disk and of the
    /// object store.
    pub async fn read(&self, from: Offset, limits: ReadLimits) -> Result<Option<FetchedBatches>, ReadError> {
        let read = self.read_tiers(from, limits).await;
        #[cfg(feature = "sim")]
        if let Ok(Some(fetched)) = &read {
            self.report_served(fetched);
        }
        read
    }

    /// Reports the served batches to the simulator's checker.
    #[cfg(feature = "sim")]
    fn report_served(&self, fetched: &FetchedBatches) {
        let mut bytes = bytes::Bytes::from(fetched.chunks.concat());
        while let Ok(batch) = Batch::split_from(&mut bytes) {
            sim_event!(BatchServed {
                partition: self.id,
                base: batch.base_offset(),
                end: batch.end_offset(),
                epoch: batch.leader_epoch().unwrap_or_default(),
                crc: batch.crc()
            });
        }
    }

    /// Reads from the first tier that has `from`: memory, then disk, then object store. Makes up to
    /// [`MAX_READ_ATTEMPTS`] attempts if the segment is evicted during each. Returns `None` if there is nothing to read
    /// yet.
    async fn read_tiers(&self, from: Offset, limits: ReadLimits) -> Result<Option<FetchedBatches>, ReadError> {
        for _ in 0..MAX_READ_ATTEMPTS {
            let Some(watermarks) = self.readable_watermarks(from)? else { return Ok(None) };
            let bound = watermarks.high_watermark;
            if let Some(read) = self.log.read_memory(from, bound, limits.max_bytes) {
                return Ok(Some(into_fetched(read, ReadSource::Memory)));
            }
            // The log's own local start may be above the published one: the task publishes it later.
            if from >= watermarks.local_start.max(self.log.local_start()) {
                match self.read_disk(from, bound, limits).await? {
                    Some(read) => return Ok(Some(read)),
                    // The segment was evicted after the watermarks were read.
                    None => continue,
                }
            }
            return self.read_object_store(from, bound, limits).await;
        }
        Err(ReadError::Disk { reason: format!("offset {from} was evicted {MAX_READ_ATTEMPTS} times during the read") })
    }

    /// Returns the watermarks if the record at `from` can be read; `None` if the read has to wait for a higher high
    /// watermark.
    ///
    /// # Errors
    /// [`ReadError::Closed`] after the partition was closed. [`ReadError::OutOfRange`] below the log start, and above
    /// the high watermark of a leader whose epoch is committed.
    fn readable_watermarks(&self, from: Offset) -> Result<Option<Watermarks>, ReadError> {
        if self.published.is_closed() {
            return Err(ReadError::Closed);
        }
        // The role is read before the watermarks, because a leader publishes its watermarks before the status of a
        // committed epoch.
        let role = self.published.status().role;
        let watermarks = self.published.watermarks();
        let hides_uncommitted = role.leads() || !mutant!(FollowerServesUncommitted);
        let end =
            if hides_uncommitted && !mutant!(ReadUncommitted) { watermarks.high_watermark } else { watermarks.log_end };
        let start = watermarks.log_start;
        if from < start || from > end && role == (ReplicaRole::Leader { epoch_committed: true }) {
            return Err(ReadError::OutOfRange { offset: from, start, end });
        }
        #[cfg(feature = "sim")]
        if from < end {
            sim_event!(ReadableEndMoved { partition: self.id, end });
        }
        Ok((from < end).then_some(Watermarks { high_watermark: end, ..watermarks }))
    }

    /// Runs `read` with the log on another thread, with a disk permit. The permit and the charge are held until `read`
    /// returns, even if the caller was dropped.
    async fn run_on_disk<T: Send + 'static>(&self, read: impl FnOnce(&log::LogReader) -> T + Send + 'static) -> T {
        let (log, charge, permit) = (self.log.clone(), self.charge.clone(), self.log.acquire_disk_permit().await);
        task::run_blocking(move || (read(&log), permit, charge).0).await
    }

    /// Reads the local segments, or the object store if they cannot be read. Returns `None` if the segment was evicted
    /// meanwhile.
    async fn read_disk(
        &self,
        from: Offset,
        bound: Offset,
        limits: ReadLimits,
    ) -> Result<Option<FetchedBatches>, ReadError> {
        match self.run_on_disk(move |log| log.read_disk(from, bound, limits)).await {
            Ok(read) => Ok(Some(into_fetched(read, ReadSource::Disk))),
            Err(log::LogReadError::OutOfRange { .. }) => Ok(None),
            Err(log::LogReadError::BatchTooLarge { bytes }) => Err(ReadError::BatchTooLarge { bytes }),
            Err(error) => self.fall_back_to_object_store(from, bound, limits, error).await.map(Some),
        }
    }

    /// Reads from the object store after the local read failed with `error`. Logs that error, throttled, and returns it
    /// if the object store does not have the records or cannot be read. A batch above the limits is reported as such.
    async fn fall_back_to_object_store(
        &self,
        from: Offset,
        bound: Offset,
        limits: ReadLimits,
        error: log::LogReadError,
    ) -> Result<FetchedBatches, ReadError> {
        if let Some(count) = self.published.count_client_read_error() {
            tracing::error!(
                partition = %self.id, offset = %from, %error, count,
                "cannot read records from this broker's disk: clients receive those that are also in the object store, \
                 and an error for all others; check the disk, and see \"A broker's disk fails\" in docs/operations.md"
            );
        }
        if from < self.published.watermarks().tiered_end {
            match self.read_object_store(from, bound, limits).await {
                Ok(Some(fetched)) => return Ok(fetched),
                Err(too_large @ ReadError::BatchTooLarge { .. }) => return Err(too_large),
                Ok(None) | Err(_) => {}
            }
        }
        Err(match error {
            log::LogReadError::Corrupt { offset, .. } => ReadError::Corrupt { offset, reason: error.to_string() },
            other => ReadError::Disk { reason: other.to_string() },
        })
    }

    /// Reads batches that end at or below `bound` from the object store. Returns `None` if the first batch ends above
    /// `bound`. If retention deleted the records during a failed read, the error is [`ReadError::OutOfRange`].
    async fn read_object_store(
        &self,
        from: Offset,
        bound: Offset,
        limits: ReadLimits,
    ) -> Result<Option<FetchedBatches>, ReadError> {
        let Some(tier) = &self.tier else {
            let reason =
                format!("offset {from} is in the object store, and this broker has none: set object_store.url");
            // If the log start has moved above `from` meanwhile, no tier has the offset.
            return self.readable_watermarks(from).and(Err(ReadError::ObjectStore { reason }));
        };
        match tier.read(from, limits).await {
            Ok(read) => {
                let (chunks, bytes, next) = (read.chunks, read.bytes, read.next);
                Ok(batches_below(FetchedBatches { chunks, bytes, next, source: ReadSource::ObjectStore }, bound))
            }
            // The log start may have moved above `from` during the read.
            Err(error) => self.readable_watermarks(from).and(Err(self.object_store_error(from, &error))),
        }
    }

    /// Converts an error of the object store for a read at `offset`. A missing object counts as corruption.
    fn object_store_error(&self, offset: Offset, error: &tier::TierReadError) -> ReadError {
        match error {
            // The tier state is newer than the published watermarks. The log start has moved, and the object store has
            // no fault.
            tier::TierReadError::OutOfRange { start, .. } if offset < *start => ReadError::OutOfRange {
                offset,
                start: *start,
                end: self.published.watermarks().high_watermark.max(*start),
            },
            tier::TierReadError::Corrupt { .. } | tier::TierReadError::Missing { .. } => {
                ReadError::Corrupt { offset, reason: error.to_string() }
            }
            tier::TierReadError::BatchTooLarge { bytes } => ReadError::BatchTooLarge { bytes: *bytes },
            _ => ReadError::ObjectStore { reason: error.to_string() },
        }
    }

    /// Returns the offset, timestamp and epoch of the first committed record whose timestamp is at least
    /// `timestamp_ms`; `None` if there is no such record.
    ///
    /// The search selects batches by their headers and then compares the records in them. A producer may set any time
    /// in the header of a compressed batch. After 64 batches without a matching record, the search ends and returns its
    /// current offset with the timestamp -1. It ends in the same way at a batch for which this broker has no memory. No
    /// earlier record that can be read has such a timestamp, so a read from the returned offset misses none.
    ///
    /// # Errors
    /// [`ReadError::BatchTooLarge`] if the search has to open a batch above `max_batch_bytes`. [`ReadError::Disk`] if
    /// the local copy cannot be read or is corrupt. The other errors are those of reads from the object store.
    pub async fn offset_for_time(
        &self,
        timestamp_ms: i64,
        max_batch_bytes: usize,
        decompressor: &Decompressor,
    ) -> Result<Option<(Offset, i64, LeaderEpoch)>, ReadError> {
        let mut from = self.published.watermarks().log_start;
        let mut epoch = LeaderEpoch::default();
        for _ in 0..MAX_SEARCHED_BATCHES {
            let Some(batch) = self.batch_for_time(timestamp_ms, from, max_batch_bytes).await? else { return Ok(None) };
            epoch = batch.leader_epoch().unwrap_or_default();
            let find = move |batch: &Batch, max_bytes: usize| first_record_at(batch, max_bytes, timestamp_ms, from);
            match decompressor.open_stored(self.id, &batch, find).await {
                Ok(Some((offset, timestamp_ms))) => return Ok(Some((offset, timestamp_ms, epoch))),
                Ok(None) => {}
                // This broker has too little memory for the batch. Consumers can decode it, and one of its records may
                // have such a timestamp.
                Err(MalformedBatch::NoMemory { .. }) => return Ok(Some((from.max(batch.base_offset()), -1, epoch))),
                // A batch that cannot be decoded holds no record that can be read.
                Err(error) => {
                    tracing::debug!(
                        partition = %self.id, offset = %batch.base_offset(), %error,
                        "skipped a batch that cannot be decoded"
                    )
                }
            }
            from = batch.end_offset();
        }
        Ok(Some((from, -1, epoch)))
    }

    /// Returns the first committed batch that ends above `from` and above the log start, and whose header has a maximum
    /// timestamp of at least `timestamp_ms`. Returns `None` if there is no such batch.
    async fn batch_for_time(
        &self,
        timestamp_ms: i64,
        from: Offset,
        max_batch_bytes: usize,
    ) -> Result<Option<Batch>, ReadError> {
        for _ in 0..MAX_READ_ATTEMPTS {
            let watermarks = self.published.watermarks();
            let from = from.max(watermarks.log_start);
            if let Some(tier) = self.tier.as_ref().filter(|_| from < watermarks.tiered_end) {
                let found = tier.batch_for_time(timestamp_ms, from, max_batch_bytes).await;
                let found = found.map_err(|error| self.object_store_error(from, &error))?;
                if found.is_some() {
                    return Ok(found);
                }
            }
            let bound = watermarks.high_watermark;
            match self.run_on_disk(move |log| log.batch_for_time(timestamp_ms, from, bound, max_batch_bytes)).await {
                // A segment was evicted during the search.
                Err(log::LogReadError::OutOfRange { .. }) => {}
                Err(log::LogReadError::BatchTooLarge { bytes }) => return Err(ReadError::BatchTooLarge { bytes }),
                Err(error) => {
                    if let Some(count) = self.published.count_client_read_error() {
                        tracing::error!(
                            partition = %self.id, %error, count,
                            "cannot read this broker's disk in a search for a timestamp, so the search fails: check \
                             the disk, and see \"A broker's disk fails\" in docs/operations.md"
                        );
                    }
                    return Err(ReadError::Disk { reason: error.to_string() });
                }
                Ok(found) => return Ok(found),
            }
        }
        Err(ReadError::Disk {
            reason: format!("segments were evicted {MAX_READ_ATTEMPTS} times during the search for a timestamp"),
        })
    }
}

/// Returns offset and timestamp of the first record of a batch, from `from` on, whose timestamp is at least
/// `timestamp_ms`. Returns `None` if there is no such record. Fails if the records exceed `max_bytes` or cannot be
/// decoded.
fn first_record_at(
    batch: &Batch,
    max_bytes: usize,
    timestamp_ms: i64,
    from: Offset,
) -> Result<Option<(Offset, i64)>, MalformedBatch> {
    for entry in batch.records_within(max_bytes)? {
        let (offset, record) = entry?;
        if offset >= from && record.timestamp_ms >= timestamp_ms {
            return Ok(Some((offset, record.timestamp_ms)));
        }
    }
    Ok(None)
}

/// Converts batches that were read from the local log.
pub(super) fn into_fetched(read: log::ReadBatches, source: ReadSource) -> FetchedBatches {
    FetchedBatches { chunks: read.chunks, bytes: read.bytes, next: read.next, source }
}

/// Returns the batches that end at or below `bound`; `None` if there are none. A follower may receive the tier state of
/// records before its leader sends the high watermark above them.
fn batches_below(fetched: FetchedBatches, bound: Offset) -> Option<FetchedBatches> {
    if fetched.next <= bound {
        return Some(fetched);
    }
    let mut committed = FetchedBatches { chunks: Vec::new(), bytes: 0, ..fetched };
    // A corrupt batch ends the result; a later read starts at that batch.
    let batches = ChunkedBatches::new(fetched.chunks).map_while(Result::ok);
    for batch in batches.take_while(|batch| batch.end_offset() <= bound) {
        (committed.next, committed.bytes) = (batch.end_offset(), committed.bytes + batch.encoded_len());
        committed.chunks.push(batch.to_bytes());
    }
    (committed.bytes > 0).then_some(committed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{model::Compression, record::BatchBuilder};

    #[test]
    fn tiered_batches_above_high_watermark_are_left_out() {
        let at = |offset| Offset::new(offset).expect("small");
        let batch = |base: u64| {
            let mut builder = BatchBuilder::new(Compression::None);
            builder.push(0, None, Some(b"a"), &[]).expect("fits");
            builder.push(0, None, Some(b"b"), &[]).expect("fits");
            let mut batch = builder.finish(None).expect("not empty");
            batch.set_offset_and_epoch(at(base), LeaderEpoch(0));
            batch.to_bytes()
        };
        let encoded = [batch(0), batch(2), batch(4)].concat();
        let fetched = |split_at: usize| {
            let chunks =
                vec![Bytes::copy_from_slice(&encoded[..split_at]), Bytes::copy_from_slice(&encoded[split_at..])];
            FetchedBatches { chunks, bytes: encoded.len(), next: at(6), source: ReadSource::ObjectStore }
        };
        for split_at in 0..encoded.len() {
            for (bound, batches) in [(9, 3), (6, 3), (5, 2), (4, 2), (3, 1), (2, 1)] {
                let result = batches_below(fetched(split_at), at(bound)).expect("some batches lie below the bound");
                assert_eq!(
                    (result.next, result.bytes),
                    (at(2 * batches), encoded.len() / 3 * usize::try_from(batches).expect("few"))
                );
                assert_eq!(result.chunks.concat(), encoded[..result.bytes]);
            }
            assert!(batches_below(fetched(split_at), at(1)).is_none());
        }
    }
}
