//! Reading a partition: memory, then disk, then bucket, without the caller noticing which.
//!
//! A reader never asks the partition's task anything. What it may see ends at the high watermark that the task published; what it
//! may not see any more ends at the log start. A follower, and a leader who does not know yet what was committed before it, may
//! know less than its caller saw elsewhere: there an offset above the high watermark is one to wait for. Segments may be evicted
//! or deleted while a read looks for them: the read then looks again, one tier further down.

use std::sync::Arc;

use bytes::Bytes;

use super::{Charge, On, Opener, Ready, Role, shared::Shared};
use crate::{
    log::{self, ReadLimits},
    model::{LeaderEpoch, Offset, PartitionId, Watermarks},
    record::{Batch, Chunks, Malformed},
    task,
    tier::{self, PartitionTier},
};

/// Where records came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// The tail buffer.
    Memory,
    /// A segment file.
    Disk,
    /// The object store, or its cache.
    Bucket,
}

/// What a read found.
#[derive(Clone, Debug)]
pub struct Fetched {
    /// Put one after another: whole batches. The first may begin before the offset asked for.
    pub chunks: Vec<Bytes>,
    /// Their bytes.
    pub bytes: usize,
    /// Where the next read goes on.
    pub next: Offset,
    /// Where it came from.
    pub source: Source,
}

/// Why a read failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The offset is not one that can be read.
    #[error("offset {offset} is out of range: the partition holds {start} to {end}")]
    OutOfRange {
        /// What was asked for.
        offset: Offset,
        /// First offset that can be read.
        start: Offset,
        /// First offset that cannot be read yet.
        end: Offset,
    },
    /// The partition is not on this broker any more.
    #[error("the partition is closed on this broker")]
    Closed,
    /// What the disk or the bucket holds there is not what was written.
    #[error("the data at offset {offset} is damaged and is not served: {why}")]
    Damaged {
        /// The offset.
        offset: Offset,
        /// What was found, and where.
        why: String,
    },
    /// The disk could not be read.
    #[error("reading from this broker's disk failed: {why}")]
    Disk {
        /// What the system said.
        why: String,
    },
    /// The batch is larger than the reader has memory for.
    #[error("the batch has {bytes} bytes, and there is memory for fewer")]
    BatchTooLarge {
        /// Its bytes.
        bytes: usize,
    },
    /// The object store could not be read; it is asked again when the caller does.
    #[error("reading from the object store failed: {why}")]
    ObjectStore {
        /// What the store said.
        why: String,
    },
}

/// One partition's reader. Clones are cheap.
#[derive(Clone)]
pub struct Reader {
    id: PartitionId,
    shared: Arc<Shared>,
    log: log::Reader,
    tier: Option<PartitionTier>,
    charge: Option<Charge>,
}

/// How many batches a search by time opens whose header claimed a time that none of their records has.
const CLAIMS: usize = 64;

/// How often a read looks again when what it found was taken away meanwhile.
const TRIES: usize = 8;

impl Reader {
    pub(super) fn new(id: PartitionId, shared: Arc<Shared>, log: log::Reader, tier: Option<PartitionTier>) -> Self {
        Self { id, shared, log, tier, charge: None }
    }

    /// The same for a caller who took this memory for what is read: reads of the log hold it until they have ended.
    pub fn charged(&self, charge: Charge) -> Self {
        Self { charge: Some(charge), ..self.clone() }
    }

    /// The partition's marks.
    pub fn marks(&self) -> Watermarks {
        self.shared.marks()
    }

    /// Marks `index` in `ready` whenever there is more to read, and once at first.
    pub fn follow(&self, ready: &Arc<Ready>, index: usize) {
        self.shared.follow(ready, index, On::Committed);
    }

    /// Reads committed records from `from`: at least one batch when there is one, beyond that as many as the limits allow. What is in memory
    /// is shared and takes none: its first batch may have any size.
    /// `None` when there is nothing yet: `from` is the high watermark, or above it where that is not the last word.
    pub async fn read(&self, from: Offset, limits: ReadLimits) -> Result<Option<Fetched>, ReadError> {
        let read = self.look(from, limits).await;
        #[cfg(feature = "sim")]
        if let Ok(Some(fetched)) = &read {
            self.tell_served(fetched);
        }
        read
    }

    /// Tells the simulator's judge what is served.
    #[cfg(feature = "sim")]
    fn tell_served(&self, fetched: &Fetched) {
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

    /// Looks in one tier after the other.
    async fn look(&self, from: Offset, limits: ReadLimits) -> Result<Option<Fetched>, ReadError> {
        for _ in 0..TRIES {
            let Some(marks) = self.readable(from)? else { return Ok(None) };
            let bound = marks.high_watermark;
            if let Some(read) = self.log.read_memory(from, bound, limits.max_bytes) {
                return Ok(Some(fetched(read, Source::Memory)));
            }
            // The log moves its start before the task publishes it.
            if from >= marks.local_start.max(self.log.local_start()) {
                match self.read_disk(from, bound, limits).await? {
                    Some(read) => return Ok(Some(read)),
                    // Evicted since the marks were read.
                    None => continue,
                }
            }
            return self.read_bucket(from, bound, limits).await;
        }
        Err(ReadError::Disk { why: format!("offset {from} moved away {TRIES} times while it was looked for") })
    }

    /// The marks when there is something to read at `from`, `None` when it is the end.
    fn readable(&self, from: Offset) -> Result<Option<Watermarks>, ReadError> {
        if self.shared.is_closed() {
            return Err(ReadError::Closed);
        }
        // In this order: a leader publishes its marks before it says that it is settled.
        let role = self.shared.standing().role;
        let marks = self.shared.marks();
        let keeps = role.leads() || !mutant!(FollowerServesUncommitted);
        let end = if keeps && !mutant!(ReadUncommitted) { marks.high_watermark } else { marks.log_end };
        let start = marks.log_start;
        if from < start || from > end && role == (Role::Leader { settled: true }) {
            return Err(ReadError::OutOfRange { offset: from, start, end });
        }
        #[cfg(feature = "sim")]
        if from < end {
            sim_event!(ReadableEndMoved { partition: self.id, end });
        }
        Ok((from < end).then_some(Watermarks { high_watermark: end, ..marks }))
    }

    /// Reads the log on another thread, in turn. The turn is over when the read is, also where its caller has gone, and so is the charge.
    async fn on_disk<T: Send + 'static>(&self, read: impl FnOnce(&log::Reader) -> T + Send + 'static) -> T {
        let (log, charge, turn) = (self.log.clone(), self.charge.clone(), self.log.disk_turn().await);
        task::run_blocking(move || (read(&log), turn, charge).0).await
    }

    async fn read_disk(&self, from: Offset, bound: Offset, limits: ReadLimits) -> Result<Option<Fetched>, ReadError> {
        match self.on_disk(move |log| log.read_disk(from, bound, limits)).await {
            Ok(read) => Ok(Some(fetched(read, Source::Disk))),
            Err(log::ReadError::OutOfRange { .. }) => Ok(None),
            Err(log::ReadError::BatchTooLarge { bytes }) => Err(ReadError::BatchTooLarge { bytes }),
            Err(error) => self.other_tier(from, bound, limits, error).await.map(Some),
        }
    }

    /// A local copy that cannot be read is no loss while the bucket has the same bytes.
    async fn other_tier(
        &self,
        from: Offset,
        bound: Offset,
        limits: ReadLimits,
        error: log::ReadError,
    ) -> Result<Fetched, ReadError> {
        if let Some(count) = self.shared.count_unreadable() {
            tracing::error!(
                partition = %self.id, offset = %from, %error, count,
                "the local copy cannot be read; serving from the bucket where it has these records"
            );
        }
        if from < self.shared.marks().tiered_end {
            match self.read_bucket(from, bound, limits).await {
                Ok(Some(fetched)) => return Ok(fetched),
                Err(too_large @ ReadError::BatchTooLarge { .. }) => return Err(too_large),
                Ok(None) | Err(_) => {}
            }
        }
        Err(match error {
            log::ReadError::Damaged { offset, .. } => ReadError::Damaged { offset, why: error.to_string() },
            other => ReadError::Disk { why: other.to_string() },
        })
    }

    async fn read_bucket(&self, from: Offset, bound: Offset, limits: ReadLimits) -> Result<Option<Fetched>, ReadError> {
        let Some(tier) = &self.tier else {
            let why = format!("offset {from} is in the object store, and this broker has none configured");
            // Retention may have moved on meanwhile: then it is nowhere.
            return self.readable(from).and(Err(ReadError::ObjectStore { why }));
        };
        match tier.read(from, limits).await {
            Ok(read) => {
                let (chunks, bytes, next) = (read.chunks, read.bytes, read.next);
                Ok(below(Fetched { chunks, bytes, next, source: Source::Bucket }, bound))
            }
            // Retention may have moved on while the bucket was asked.
            Err(error) => self.readable(from).and(Err(self.bucket_error(from, &error))),
        }
    }

    fn bucket_error(&self, offset: Offset, error: &tier::ReadError) -> ReadError {
        match error {
            // The tier's state is newer than the marks: the log start has moved, and nothing is wrong with the store.
            tier::ReadError::OutOfRange { start, .. } if offset < *start => {
                ReadError::OutOfRange { offset, start: *start, end: self.shared.marks().high_watermark.max(*start) }
            }
            tier::ReadError::Damaged { .. } | tier::ReadError::Missing { .. } => {
                ReadError::Damaged { offset, why: error.to_string() }
            }
            tier::ReadError::BatchTooLarge { bytes } => ReadError::BatchTooLarge { bytes: *bytes },
            _ => ReadError::ObjectStore { why: error.to_string() },
        }
    }

    /// The first committed record whose timestamp is at least `timestamp_ms`: its offset, timestamp and epoch. `None` when
    /// there is none that young.
    ///
    /// Headers only lead to batches: what is in them counts, because of compressed ones a producer may claim any time. After
    /// 64 batches whose claim no record bears out it gives up, and answers the offset that it came to with -1 for the
    /// timestamp: no earlier record is that young, so reading from there misses none.
    ///
    /// # Errors
    /// [`ReadError::BatchTooLarge`] where it has to look into a batch above `max_batch_bytes`.
    pub async fn offset_for_time(
        &self,
        timestamp_ms: i64,
        max_batch_bytes: usize,
        opener: &Opener,
    ) -> Result<Option<(Offset, i64, LeaderEpoch)>, ReadError> {
        let mut from = self.shared.marks().log_start;
        let mut epoch = LeaderEpoch::default();
        for _ in 0..CLAIMS {
            let Some(batch) = self.batch_for_time(timestamp_ms, from, max_batch_bytes).await? else { return Ok(None) };
            epoch = batch.leader_epoch().unwrap_or_default();
            let find = move |batch: &Batch, most: usize| first_at(batch, most, timestamp_ms, from);
            match opener.open_stored(self.id, &batch, find).await {
                Ok(Some((offset, timestamp_ms))) => return Ok(Some((offset, timestamp_ms, epoch))),
                Ok(None) => {}
                // Others can decode it, and its records may be that young.
                Err(Malformed::NoMemory { .. }) => return Ok(Some((from.max(batch.base_offset()), -1, epoch))),
                // What nobody can decode holds no record that anybody could read.
                Err(error) => {
                    tracing::debug!(partition = %self.id, offset = %batch.base_offset(), %error, "passed over")
                }
            }
            from = batch.end_offset();
        }
        Ok(Some((from, -1, epoch)))
    }

    /// The first batch that reaches above `from` and claims a record of that time.
    async fn batch_for_time(
        &self,
        timestamp_ms: i64,
        from: Offset,
        max_batch_bytes: usize,
    ) -> Result<Option<Batch>, ReadError> {
        for _ in 0..TRIES {
            let marks = self.shared.marks();
            let from = from.max(marks.log_start);
            if let Some(tier) = self.tier.as_ref().filter(|_| from < marks.tiered_end) {
                let found = tier.batch_for_time(timestamp_ms, from, max_batch_bytes).await;
                let found = found.map_err(|error| self.bucket_error(from, &error))?;
                if found.is_some() {
                    return Ok(found);
                }
            }
            let bound = marks.high_watermark;
            match self.on_disk(move |log| log.batch_for_time(timestamp_ms, from, bound, max_batch_bytes)).await {
                // A segment left the disk while it was looked at.
                Err(log::ReadError::OutOfRange { .. }) => {}
                Err(log::ReadError::BatchTooLarge { bytes }) => return Err(ReadError::BatchTooLarge { bytes }),
                Err(error) => {
                    if let Some(count) = self.shared.count_unreadable() {
                        tracing::error!(partition = %self.id, %error, count, "the local copy cannot be searched for a time");
                    }
                    return Err(ReadError::Disk { why: error.to_string() });
                }
                Ok(found) => return Ok(found),
            }
        }
        Err(ReadError::Disk { why: format!("segments left the disk {TRIES} times while a time was looked for") })
    }
}

/// The first record of a batch from `from` on that is that young.
fn first_at(batch: &Batch, most: usize, timestamp_ms: i64, from: Offset) -> Result<Option<(Offset, i64)>, Malformed> {
    for entry in batch.records_within(most)? {
        let (offset, record) = entry?;
        if offset >= from && record.timestamp_ms >= timestamp_ms {
            return Ok(Some((offset, record.timestamp_ms)));
        }
    }
    Ok(None)
}

pub(super) fn fetched(read: log::Read, source: Source) -> Fetched {
    Fetched { chunks: read.chunks, bytes: read.bytes, next: read.next, source }
}

/// What of it lies below `bound`: a follower may hear of what is in the bucket before its leader tells it that it is committed.
fn below(fetched: Fetched, bound: Offset) -> Option<Fetched> {
    if fetched.next <= bound {
        return Some(fetched);
    }
    let mut kept = Fetched { chunks: Vec::new(), bytes: 0, ..fetched };
    // What is damaged is the caller's to find.
    let batches = Chunks::new(fetched.chunks).map_while(Result::ok);
    for batch in batches.take_while(|batch| batch.end_offset() <= bound) {
        (kept.next, kept.bytes) = (batch.end_offset(), kept.bytes + batch.encoded_len());
        kept.chunks.push(batch.to_bytes());
    }
    (kept.bytes > 0).then_some(kept)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{model::Compression, record::BatchBuilder};

    #[test]
    fn what_the_bucket_has_above_the_mark_is_left_out() {
        let at = |offset| Offset::new(offset).expect("small");
        let batch = |base: u64| {
            let mut builder = BatchBuilder::new(Compression::None);
            builder.push(0, None, Some(b"a"), &[]).expect("fits");
            builder.push(0, None, Some(b"b"), &[]).expect("fits");
            let mut batch = builder.finish(None).expect("not empty");
            batch.stamp(at(base), LeaderEpoch(0));
            batch.to_bytes()
        };
        let all = [batch(0), batch(2), batch(4)].concat();
        let fetched = |cut: usize| {
            let chunks = vec![Bytes::copy_from_slice(&all[..cut]), Bytes::copy_from_slice(&all[cut..])];
            Fetched { chunks, bytes: all.len(), next: at(6), source: Source::Bucket }
        };
        for cut in 0..all.len() {
            for (bound, kept) in [(9, 3), (6, 3), (5, 2), (4, 2), (3, 1), (2, 1)] {
                let some = below(fetched(cut), at(bound)).expect("some lie below");
                assert_eq!(
                    (some.next, some.bytes),
                    (at(2 * kept), all.len() / 3 * usize::try_from(kept).expect("few"))
                );
                assert_eq!(some.chunks.concat(), all[..some.bytes]);
            }
            assert!(below(fetched(cut), at(1)).is_none());
        }
    }
}
