//! Cold reads: complete, checked batches from an offset on, through the chunk cache.
//!
//! Every served bit is checked. Neither the CRC nor the structural checks of a batch cover the base offset and the
//! leader epoch. The base offset must continue from the index entry or the batch before it, and the leader epoch must
//! match the footer. A chunk that fails a check is evicted and fetched again. The object is reported as corrupt only if
//! the check still fails after [`CORRUPTION_RETRIES`] further fetches.

use std::{collections::BTreeMap, ops::Range};

use bytes::{Bytes, BytesMut};
use futures::{StreamExt, TryStreamExt, stream};

use super::{
    chunk_cache::CHUNK_BYTES,
    error::TierReadError,
    footer::Footer,
    manifest::{ManifestRoot, SegmentEntry},
    partition::{CORRUPTION_RETRIES, PartitionTier},
    read_ahead,
};
use crate::{limits, log::ReadLimits, model::Offset, record::Batch};

/// Maximum number of chunks that one read fetches at the same time.
const MAX_CONCURRENT_CHUNKS: usize = 8;

/// Result of one read.
#[derive(Clone, Debug)]
pub struct TierRead {
    /// Complete batches in order. Each piece holds one or more.
    pub chunks: Vec<Bytes>,
    /// Offset after the last batch.
    pub next: Offset,
    /// Bytes of the batches.
    pub bytes: usize,
}

/// Position at which a read ended.
struct ReadCursor {
    /// Position after the last batch.
    position: u64,
    /// First chunk that was neither in memory nor in flight when the read needed it; `None` if there was no such chunk.
    first_miss: Option<u64>,
}

/// A failed check, and the chunks that it concerns.
struct Corruption {
    chunks: Range<u64>,
    reason: String,
}

enum ReadFailure {
    Corrupt(Corruption),
    Read(TierReadError),
}

impl From<TierReadError> for ReadFailure {
    fn from(error: TierReadError) -> Self {
        Self::Read(error)
    }
}

impl PartitionTier {
    /// Returns batches from the one that contains `from`, which may begin below `from`. Ends at `max_bytes` or at the
    /// end of a segment, but returns at least one batch. If the first batch exceeds both `max_bytes` and
    /// `max_batch_bytes`, the error is `BatchTooLarge`, and the batch is not read. Starts to fetch the next chunks if
    /// the read continues an earlier one.
    pub async fn read(&self, from: Offset, limits: ReadLimits) -> Result<TierRead, TierReadError> {
        let state = self.state();
        let (offset, start, end) = (from, state.log_start, state.tiered_end);
        let outside = || TierReadError::OutOfRange { offset, start, end };
        if from < start || from >= end {
            return Err(outside());
        }
        let root = self.root(&state).await?;
        let entry = self.segment_of(&root, from).await?.ok_or_else(outside)?;
        let footer = self.footer(&entry).await?;
        let mut reader = self.with_readers(|readers| readers.arrive(from));
        let read = self.read_segment(&entry, &footer, from, limits).await;
        if let Err(TierReadError::BatchTooLarge { .. }) = read {
            // The reader reads the same batch again, so this read must not widen its window.
            reader.window /= 2;
            self.with_readers(|readers| readers.leave(reader, from));
        }
        let (read, cursor) = read?;
        // A chunk that was requested before the reader's last read was neither in memory nor in flight now.
        if cursor.first_miss.is_some_and(|chunk| (entry.stamp.base, chunk + 1) <= reader.requested_before) {
            reader.shrink_window((entry.stamp.base, cursor.position.div_ceil(CHUNK_BYTES)));
        }
        reader.requested_before = reader.requested;
        if reader.window > 0 {
            reader.requested = self.fetch_ahead(&root, entry, cursor.position, &reader).await;
        }
        self.with_readers(|readers| readers.leave(reader, read.next));
        Ok(read)
    }

    /// Returns the first batch that ends above `from` and the log start, and whose header has a largest timestamp of
    /// `timestamp_ms` or later. Returns `None` if the object store contains none. If a producer set the largest
    /// timestamp too high, the batch has no such record: the caller then continues at the batch's end. A batch above
    /// both `max_batch_bytes` and `SEARCH_BYTES` is an error and is not read.
    pub async fn batch_for_time(
        &self,
        timestamp_ms: i64,
        from: Offset,
        max_batch_bytes: usize,
    ) -> Result<Option<Batch>, TierReadError> {
        let limits = ReadLimits { max_bytes: limits::SEARCH_BYTES, max_batch_bytes };
        let state = self.state();
        let root = self.root(&state).await?;
        let mut from = from.max(state.log_start);
        while let Some(entry) = self.segment_at_time(&root, timestamp_ms, from).await? {
            let footer = self.footer(&entry).await?;
            if let Some(interval) = footer.interval_at_time(timestamp_ms) {
                let mut next = interval.offset.max(from);
                while next < entry.stamp.end {
                    let (read, _) = self.read_segment(&entry, &footer, next, limits).await?;
                    next = read.next;
                    if let Some(batch) = first_at(&read, timestamp_ms, from) {
                        return Ok(Some(batch));
                    }
                }
            }
            from = entry.stamp.end;
        }
        Ok(None)
    }

    /// Reads as [`PartitionTier::read`] does, in a segment that is known to contain `from`, without read-ahead. Also
    /// returns the position at which the read ended.
    async fn read_segment(
        &self,
        entry: &SegmentEntry,
        footer: &Footer,
        from: Offset,
        limits: ReadLimits,
    ) -> Result<(TierRead, ReadCursor), TierReadError> {
        let mut tries = 0;
        loop {
            let mut scan = SegmentScan::new(self, entry, footer, from);
            match scan.scan_batches(limits).await {
                Ok(()) => return Ok(scan.finish()),
                Err(ReadFailure::Read(error)) => return Err(error),
                Err(ReadFailure::Corrupt(corruption)) => {
                    self.cache().evict(entry, corruption.chunks).await;
                    if tries == CORRUPTION_RETRIES {
                        let object = self.object(&entry.stamp.segment());
                        if let Some(count) = self.count_corruption() {
                            tracing::error!(
                                object, base = %entry.stamp.base, end = %entry.stamp.end,
                                reason = corruption.reason, count,
                                "an object in the object store is corrupt, so reads of some of its records fail: \
                                 restore it, for example from an older version in the bucket"
                            );
                        }
                        return Err(TierReadError::Corrupt { object, reason: corruption.reason });
                    }
                    tries += 1;
                }
            }
        }
    }

    /// Requests chunks ahead of a sequential reader, which is at `position` of the segment `entry`: several per
    /// request, also beyond the end of the segment. Returns the position up to which chunks were requested.
    async fn fetch_ahead(
        &self,
        root: &ManifestRoot,
        entry: SegmentEntry,
        position: u64,
        reader: &read_ahead::SequentialReader,
    ) -> read_ahead::ReadPosition {
        let mut requested = reader.requested;
        let (mut entry, mut index, mut remaining) = (entry, position.div_ceil(CHUNK_BYTES), reader.window);
        // Chunks per request. Half of the window is in flight while the reader reads the other half.
        let request_chunks = (reader.window / 2).clamp(1, self.cache().max_request_chunks());
        while remaining > 0 {
            let chunks = entry.data_bytes.div_ceil(CHUNK_BYTES);
            if index >= chunks {
                // An error is not reported here: the read that needs the chunk receives it.
                let Ok(Some(next)) = self.segment_of(root, entry.stamp.end).await else { break };
                (entry, index) = (next, 0);
                continue;
            }
            let mut end = index + 1;
            if (entry.stamp.base, end) > requested {
                // Requests end at the same positions for all readers, so that readers of the same chunks share
                // requests.
                end = chunks.min((index / request_chunks + 1) * request_chunks).min(index + remaining);
                let is_full_request = end % request_chunks == 0 || end == chunks;
                let object = self.object(&entry.stamp.segment());
                // A request that would be shorter is sent by a later read, when the window has space for a complete
                // request.
                if !is_full_request || !self.cache().read_ahead(self.store(), &object, entry, index..end) {
                    break;
                }
                requested = (entry.stamp.base, end);
            }
            (index, remaining) = (end, remaining - (end - index));
        }
        requested
    }
}

/// One pass over a segment's batches, from the index interval that contains an offset.
struct SegmentScan<'a> {
    tier: &'a PartitionTier,
    entry: &'a SegmentEntry,
    footer: &'a Footer,
    object: String,
    from: Offset,
    /// Position of the next batch; `next` is its offset.
    position: u64,
    next: Offset,
    /// Fetched chunks by index.
    chunks: BTreeMap<u64, Bytes>,
    /// First of `chunks` that was neither in memory nor in flight when it was needed.
    first_miss: Option<u64>,
    /// Result of the scan: pieces of complete batches, and their bytes in total.
    pieces: Vec<Bytes>,
    bytes: usize,
    /// Byte positions, in the object, of the batches of the next piece: consecutive batches in one chunk, or one batch
    /// that crosses chunks. `None` between two pieces.
    piece: Option<Range<u64>>,
}

impl<'a> SegmentScan<'a> {
    fn new(tier: &'a PartitionTier, entry: &'a SegmentEntry, footer: &'a Footer, from: Offset) -> Self {
        let (interval, _) = footer.interval_of(from);
        Self {
            tier,
            entry,
            footer,
            object: tier.object(&entry.stamp.segment()),
            from,
            position: interval.position,
            next: interval.offset,
            chunks: BTreeMap::new(),
            first_miss: None,
            pieces: Vec::new(),
            bytes: 0,
            piece: None,
        }
    }

    /// Reads batches until `max_bytes` or the end of the segment. The first batch that ends above `from` may exceed
    /// `max_bytes`. A batch above both limits is an error.
    async fn scan_batches(&mut self, ReadLimits { max_bytes, max_batch_bytes }: ReadLimits) -> Result<(), ReadFailure> {
        let max_bytes = max_bytes.min(limits::MAX_FETCH_BYTES);
        let header_bytes = limits::BATCH_HEADER_BYTES as u64;
        self.fetch(self.position + (max_bytes as u64).max(header_bytes)).await?;
        while self.position < self.entry.data_bytes {
            self.fetch(self.position + header_bytes).await?;
            let length = Batch::framed_len(&self.slice(self.position..self.position + header_bytes));
            let length = length.map_err(|error| self.corruption_failure(header_bytes, &error.to_string()))?;
            let has_batch = self.bytes > 0;
            if has_batch && self.bytes + length > max_bytes {
                break;
            }
            let end = self.position + length as u64;
            if end > self.entry.data_bytes {
                return Err(self.corruption_failure(header_bytes, "a batch extends beyond the data"));
            }
            if length > max_batch_bytes.max(max_bytes) {
                return Err(TierReadError::BatchTooLarge { bytes: length }.into());
            }
            self.fetch(end).await?;
            self.check_batch(self.position..end)?;
        }
        if self.position == self.entry.data_bytes && self.next != self.entry.stamp.end {
            return Err(self.corruption_failure(0, "the batches end before the end of the segment"));
        }
        self.end_piece();
        Ok(())
    }

    /// Checks the batch at `range`, sets the position to its end, and adds it to the result if it ends above the
    /// requested offset.
    fn check_batch(&mut self, range: Range<u64>) -> Result<(), ReadFailure> {
        let length = range.end - range.start;
        let batch = Batch::parse(self.slice(range.clone()))
            .map_err(|error| self.corruption_failure(length, &error.to_string()))?;
        if batch.base_offset() != self.next || batch.end_offset() > self.entry.stamp.end {
            return Err(self.corruption_failure(length, "a batch is not at its offset"));
        }
        if batch.leader_epoch().is_none() || batch.leader_epoch() != self.footer.epoch_of(self.next) {
            return Err(self.corruption_failure(length, "a batch has a leader epoch that differs from the footer"));
        }
        self.next = batch.end_offset();
        self.position = range.end;
        if self.next <= self.from {
            return Ok(());
        }
        self.bytes += batch.encoded_len();
        let crosses_chunks = range.start / CHUNK_BYTES != (range.end - 1) / CHUNK_BYTES;
        match &mut self.piece {
            Some(piece) if !crosses_chunks && piece.start / CHUNK_BYTES == range.start / CHUNK_BYTES => {
                piece.end = range.end;
            }
            _ => {
                self.end_piece();
                self.piece = Some(range);
                if crosses_chunks {
                    self.end_piece();
                }
            }
        }
        Ok(())
    }

    /// Adds the collected range of batches to the result as one piece.
    fn end_piece(&mut self) {
        if let Some(piece) = self.piece.take() {
            self.pieces.push(self.slice(piece));
        }
    }

    /// Fetches the missing chunks from the current position to `end`, or to the end of the batches.
    async fn fetch(&mut self, end: u64) -> Result<(), TierReadError> {
        let end = end.min(self.entry.data_bytes);
        let missing: Vec<_> = (self.position / CHUNK_BYTES..end.div_ceil(CHUNK_BYTES))
            .filter(|index| !self.chunks.contains_key(index))
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        let (tier, object, entry) = (self.tier, &self.object, self.entry);
        let fetched: Vec<_> = stream::iter(missing)
            .map(|index| async move {
                tier.cache().chunk(tier.store(), object, entry, index).await.map(|chunk| (index, chunk))
            })
            .buffered(MAX_CONCURRENT_CHUNKS)
            .try_collect()
            .await?;
        for (index, (chunk, was_cached)) in fetched {
            if !was_cached {
                self.first_miss = self.first_miss.or(Some(index));
            }
            self.chunks.insert(index, chunk);
        }
        Ok(())
    }

    /// Returns fetched bytes, without a copy if they lie in one chunk. The result is shorter than `range` if `range`
    /// extends beyond the batches.
    fn slice(&self, range: Range<u64>) -> Bytes {
        let end = range.end.min(self.entry.data_bytes);
        let first = range.start / CHUNK_BYTES;
        let within =
            |index: u64, position: u64| usize::try_from(position - index * CHUNK_BYTES).expect("inside a chunk");
        if end <= (first + 1) * CHUNK_BYTES {
            return self.chunks[&first].slice(within(first, range.start)..within(first, end));
        }
        let mut bytes = BytesMut::with_capacity(usize::try_from(end - range.start).expect("at most one batch"));
        for index in first..end.div_ceil(CHUNK_BYTES) {
            let start = within(index, range.start.max(index * CHUNK_BYTES));
            let stop = within(index, end.min((index + 1) * CHUNK_BYTES));
            bytes.extend_from_slice(&self.chunks[&index][start..stop]);
        }
        bytes.freeze()
    }

    /// Returns the failure of a check on `length` bytes at the current position.
    fn corruption_failure(&self, length: u64, reason: &str) -> ReadFailure {
        let chunks = self.position / CHUNK_BYTES..(self.position + length.max(1)).div_ceil(CHUNK_BYTES);
        ReadFailure::Corrupt(Corruption { chunks, reason: format!("at byte {}: {reason}", self.position) })
    }

    fn finish(self) -> (TierRead, ReadCursor) {
        let cursor = ReadCursor { position: self.position, first_miss: self.first_miss };
        (TierRead { chunks: self.pieces, next: self.next, bytes: self.bytes }, cursor)
    }
}

/// Returns the first batch of `read` that ends above `from` and has a largest timestamp of `timestamp_ms` or later.
fn first_at(read: &TierRead, timestamp_ms: i64, from: Offset) -> Option<Batch> {
    let batches = read.chunks.iter().flat_map(|chunk| {
        let mut chunk = chunk.clone();
        std::iter::from_fn(move || Batch::split_from(&mut chunk).ok())
    });
    batches.into_iter().find(|batch| batch.max_timestamp() >= timestamp_ms && batch.end_offset() > from)
}
