//! Fetching: the `Fetch` stream and the unary `Read` call.
//!
//! # Overview
//!
//! A [`FetchSession`] contains the partitions of one reader and its position in each. A [`WakeSet`] collects the
//! partitions with new records, so idle partitions cost no work. Unless other responses hold too much memory, reads of
//! several partitions run concurrently. So a read from the object store does not delay partitions whose records are in
//! memory.
//!
//! A reader that accepts any replica is also served by an in-sync follower, up to the high watermark that the follower
//! has received. The role of the local replica is checked after each read. The replica may no longer serve the reader,
//! for example as a follower that was removed from the ISR. The reader then gets an error with the leader. Only a
//! leader whose epoch is committed rejects an offset above the high watermark. An offset below the committed log start
//! is out of range on every replica.
//!
//! `max_wait_ms` bounds the wait for records that do not exist yet. A unary read waits for existing records, on disk or
//! in the object store, at most `tier.fetch_max_wait`.

mod decode;
mod handler;
mod memory;
mod response;
mod stream;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use futures::{FutureExt as _, StreamExt as _, stream::FuturesUnordered};
use tokio::time::Instant;

pub(in crate::broker) use self::handler::Fetch;
use self::{
    memory::{MIN_READ_BYTES, ResponseMemory},
    response::FetchResponseBuilder,
};
use super::errors;
use crate::{
    broker::{CallMemory, Grant},
    limits,
    log::ReadLimits,
    model::{Offset, PartitionId},
    partition::{FetchedBatches, Partition, PartitionReader, ReadError, WakeSet},
    proto::{
        error::{ApiError, ErrorCode},
        v1,
    },
    task::clock,
};

/// Maximum number of concurrent reads of one session.
const MAX_CONCURRENT_READS: usize = 8;

/// Maximum time that the response of a unary read, once it has `min_bytes`, waits for reads in progress. The end of the
/// call drops these reads. Without the wait, records in memory would keep the records of partitions on disk out of
/// every response.
const OTHER_READS_DELAY: Duration = Duration::from_millis(100);

/// Maximum bytes of a response if the request sets none.
const DEFAULT_BYTES: usize = 1 << 20;

/// Number of partitions up to which a fetch or read is not charged for their state.
const FEW_PARTITIONS: usize = 16;

/// Memory charged for the state of one partition of a fetch or read, in bytes: with its entry in a response, without
/// the topic name.
const PARTITION_STATE_BYTES: usize = 512;

/// Index of a partition in its session, and the outcome of a read of that partition; `Ok(None)` if there are no records
/// at the position.
type ReadOutcome = (usize, Result<Option<FetchedBatches>, ReadError>);

/// Outcome of a read, and the memory of the read; `None` if blocking work of the read still uses that memory.
type EndedRead = (ReadOutcome, Option<Grant>);

/// One partition of a session.
struct FetchPartitionState {
    replica: Arc<Partition>,
    /// Topic name and partition number of the request.
    topic: String,
    partition: i32,
    /// Reader of the local replica; `None` after an error was returned for the partition. The session then skips the
    /// partition.
    reader: Option<PartitionReader>,
    /// Offset of the first read since the last assignment: the requested offset, or the position at which a partition
    /// of the session continues.
    from: Offset,
    /// Offset of the next read.
    position: Offset,
    /// True while a read from `position` is in progress, or its outcome is deferred. A second read would return the
    /// same records again.
    is_reading: bool,
    /// True if the partition became ready again while `is_reading` was true.
    is_ready_again: bool,
}

impl FetchPartitionState {
    /// Returns true if the local replica has committed records at or above the position, and the session does not skip
    /// the partition.
    fn has_more(&self) -> bool {
        self.reader.as_ref().is_some_and(|reader| self.position < reader.watermarks().high_watermark)
    }
}

/// Limits on the size and delay of one response.
#[derive(Clone, Copy)]
struct FetchLimits {
    min_bytes: usize,
    max_bytes: usize,
    max_wait: Duration,
    /// Maximum bytes of batches in one message. Only the batches of a single read may exceed it.
    message_bytes: usize,
}

impl FetchLimits {
    fn new(min_bytes: u32, max_bytes: u32, max_wait_ms: u32) -> Self {
        let max_bytes = if max_bytes == 0 { DEFAULT_BYTES } else { max_bytes as usize };
        let max_bytes = max_bytes.min(limits::MAX_FETCH_BYTES);
        Self {
            min_bytes: (min_bytes as usize).clamp(1, max_bytes),
            max_bytes,
            max_wait: Duration::from_millis(max_wait_ms.min(limits::MAX_FETCH_WAIT_MS).into()),
            message_bytes: limits::MAX_BATCH_BYTES,
        }
    }
}

/// State of one client's fetch: its partitions with the position in each, the reads in progress, and the memory for the
/// responses.
struct FetchSession {
    fetch: Arc<Fetch>,
    partitions: Vec<FetchPartitionState>,
    /// Indexes in `partitions` of the partitions that may have records to read.
    ready: Arc<WakeSet>,
    /// Reads in progress.
    reads: FuturesUnordered<Pin<Box<dyn Future<Output = EndedRead> + Send>>>,
    /// Read outcome that did not fit into the last response, or an error of a partition with records in that response.
    /// The next response starts with this outcome, so small batches cannot delay a large batch for ever.
    deferred: Option<ReadOutcome>,
    limits: FetchLimits,
    memory: CallMemory,
    /// Memory for the state of the partitions; `None` for at most [`FEW_PARTITIONS`].
    partitions_grant: Option<Grant>,
    /// Memory for the response being built; `None` until it is reserved.
    response_memory: Option<ResponseMemory>,
    /// Largest `max.message.bytes` of the partitions, but at most [`MIN_READ_BYTES`]: the size for which each read gets
    /// memory at first.
    expected_batch_bytes: usize,
    /// Bytes for which there was not enough memory, rounded up to a power of two, or 0 if none. The bytes are those of
    /// the largest batch, or of the batches of one read.
    max_batch_bytes: usize,
    /// Size of the session's reservation for one decoded record that exceeds the space of a response, in bytes; 0
    /// without one. See [`decode::RecordTooLarge`].
    record_bytes: usize,
    /// True if in-sync followers may serve this session.
    any_replica: bool,
    /// Entries of rejected partitions, each with its error, which the next response returns.
    refused: Vec<v1::FetchedPartition>,
}

impl FetchSession {
    fn new(fetch: Arc<Fetch>, limits: FetchLimits, memory: CallMemory) -> Self {
        let (ready, reads) = (Arc::default(), FuturesUnordered::new());
        Self {
            fetch,
            partitions: Vec::new(),
            ready,
            reads,
            deferred: None,
            limits,
            memory,
            partitions_grant: None,
            response_memory: None,
            expected_batch_bytes: 0,
            max_batch_bytes: 0,
            record_bytes: 0,
            any_replica: false,
            refused: Vec::new(),
        }
    }

    /// Replaces the partitions of the session, and drops its reads and its deferred outcome. Unless `restart` is set, a
    /// partition that was already in the session, without an error, continues at its position, not at the requested
    /// offset. A partition that this broker does not serve is not an error: the next response reports it. Fails on too
    /// many or duplicate partitions, on a negative offset, or without memory for the state of the partitions.
    fn assign(&mut self, requests: Vec<v1::FetchPartition>, restart: bool, any_replica: bool) -> Result<(), ApiError> {
        self.any_replica = any_replica;
        if requests.len() > limits::MAX_FETCH_PARTITIONS {
            return Err(errors::invalid_request(format!(
                "{} partitions in one fetch, at most {} are allowed: send several requests",
                requests.len(),
                limits::MAX_FETCH_PARTITIONS
            )));
        }
        let mut seen = BTreeSet::new();
        if let Some(duplicate) =
            requests.iter().find(|requested| !seen.insert((requested.topic.as_str(), requested.partition)))
        {
            let shown: String = duplicate.topic.chars().take(100).collect();
            return Err(errors::invalid_request(format!(
                "topic {shown:?}, partition {} is named twice in one fetch: name each partition once",
                duplicate.partition
            )));
        }
        self.partitions_grant = None;
        if requests.len() > FEW_PARTITIONS {
            let names = requests.iter().map(|requested| requested.topic.len()).sum::<usize>();
            self.partitions_grant = Some(self.memory.session(requests.len() * PARTITION_STATE_BYTES + 4 * names)?);
        }
        self.drop_reads();
        let before = std::mem::take(&mut self.partitions);
        (self.ready, self.deferred) = (Arc::default(), None);
        let continued = before.iter().filter(|state| !restart && state.reader.is_some());
        let positions: BTreeMap<PartitionId, Offset> =
            continued.map(|state| (state.replica.id(), state.position)).collect();
        (self.expected_batch_bytes, self.max_batch_bytes) = (0, 0);
        for requested in requests {
            match self.fetch.readable(&requested, any_replica) {
                Ok(replica) => {
                    // The position is found by partition id and not by name, because a recreated topic is another
                    // topic.
                    let from = match positions.get(&replica.id()) {
                        Some(position) => *position,
                        None => errors::parse_offset(requested.offset)?,
                    };
                    let max_batch_bytes = replica.config().max_message_bytes.min(MIN_READ_BYTES);
                    self.expected_batch_bytes = self.expected_batch_bytes.max(max_batch_bytes);
                    let reader = replica.reader().clone();
                    reader.add_listener(&self.ready, self.partitions.len());
                    self.partitions.push(FetchPartitionState {
                        replica,
                        topic: requested.topic,
                        partition: requested.partition,
                        reader: Some(reader),
                        from,
                        position: from,
                        is_reading: false,
                        is_ready_again: false,
                    });
                }
                Err(error) => {
                    self.fetch.ctx.metrics.fetch_errors.count(error.code.as_str());
                    self.refused.push(self.fetch.refused_partition(requested, error));
                }
            }
        }
        Ok(())
    }

    /// Starts reads of ready partitions, each of at most `max_bytes`, up to the maximum number of concurrent reads.
    /// Starts none without memory for the response.
    fn begin_reads(&mut self, max_bytes: usize) {
        while self.may_begin_read()
            && let Some(memory) = &mut self.response_memory
            && let Some(index) = self.ready.take()
        {
            let state = &mut self.partitions[index];
            if state.is_reading {
                state.is_ready_again = true;
                continue;
            }
            let Some(reader) = &state.reader else { continue };
            state.is_reading = true;
            let (position, limits) = (state.position, ReadLimits { max_bytes, max_batch_bytes: memory.batch_bytes });
            let charge = Arc::new(memory.begin_read());
            let reader = reader.charged(Arc::<Grant>::clone(&charge));
            self.reads.push(Box::pin(async move {
                let outcome = reader.read(position, limits).await;
                drop(reader);
                ((index, outcome), Arc::into_inner(charge))
            }));
        }
    }

    /// Adds the outcome of a read to the response, and returns the memory of the read to the memory of the response.
    fn add_ended_read(&mut self, (outcome, charge): EndedRead, builder: &mut FetchResponseBuilder) {
        if let (Some(memory), Some(charge)) = (&mut self.response_memory, charge) {
            memory.end_read(charge);
        }
        self.add_outcome(outcome, builder);
    }

    /// Adds the outcome of a read to the response. An outcome that does not fit is deferred to the next response, and
    /// so is an error of a partition with records in this response. Without memory for the records, the partition is
    /// read again later. If the read failed or this broker no longer serves the partition, its entry gets an error, and
    /// the session skips it.
    fn add_outcome(&mut self, (index, outcome): ReadOutcome, builder: &mut FetchResponseBuilder) {
        if let Ok(Some(fetched)) = &outcome
            && builder.bytes > 0
            && builder.bytes + fetched.bytes > self.limits.message_bytes
        {
            // One message cannot contain the gathered batches and these.
            builder.full = true;
            self.deferred = Some((index, outcome));
            return;
        }
        if let Some(bytes) = self.bytes_without_memory(&outcome, builder) {
            return self.read_later(index, bytes, builder);
        }
        let state = &mut self.partitions[index];
        let status = state.replica.status();
        let is_not_served = match &outcome {
            // The records are committed, but a removed follower must not serve them. The client reads them from a
            // replica that serves it.
            Ok(_) => !status.role.serves(self.any_replica),
            Err(ReadError::OutOfRange { offset, .. }) => {
                !status.role.leads() && *offset >= state.replica.committed_log_start()
            }
            Err(_) => false,
        };
        if (is_not_served || outcome.is_err()) && builder.has_records(index) {
            // The response with the records before the error is sent first, without the error.
            builder.full = true;
            self.deferred = Some((index, outcome));
            return;
        }
        state.is_reading = false;
        let is_ready_again = std::mem::take(&mut state.is_ready_again);
        let Some(reader) = &state.reader else { return };
        if is_not_served {
            state.reader = None;
            builder.failed = true;
            let error = self.fetch.lookup.not_leader_error(&state.topic, state.partition, state.replica.id());
            self.fetch.ctx.metrics.fetch_errors.count(error.code.as_str());
            return builder.entry(index, state).error = Some(error.into());
        }
        match outcome {
            Ok(None) if is_ready_again => self.ready.mark(index),
            Ok(None) => {}
            Ok(Some(fetched)) => {
                let high_watermark = reader.watermarks().high_watermark;
                state.position = fetched.next;
                self.fetch.count_bytes(fetched.source, fetched.bytes, status.role.leads());
                let next = fetched.next;
                builder.add(index, state, fetched);
                if next < high_watermark {
                    self.ready.mark(index);
                }
            }
            Err(error) => {
                state.reader = None;
                builder.failed = true;
                let error = self.fetch.convert_read_error(state.replica.id(), error);
                self.fetch.ctx.metrics.fetch_errors.count(error.code.as_str());
                builder.entry(index, state).error = Some(error.into());
            }
        }
    }

    /// Adds to the response everything that is available without waiting: rejected partitions and the deferred outcome.
    /// Then starts reads, and adds the outcomes of reads that complete at once. If the response has no batches and no
    /// read is in progress, frees its memory.
    fn gather_now(&mut self, builder: &mut FetchResponseBuilder) {
        builder.failed |= !self.refused.is_empty();
        self.refused.drain(..).for_each(|refused| builder.add_refused(refused));
        if let Some(deferred) = self.deferred.take() {
            self.add_outcome(deferred, builder);
        }
        self.reclaim_if_ready(builder);
        let Some(max_bytes) = self.response_memory.as_ref().map(|memory| memory.max_bytes) else { return };
        while builder.bytes < max_bytes && !builder.full && self.response_memory.is_some() {
            self.begin_reads(self.read_bytes(max_bytes - builder.bytes));
            match self.reads.next().now_or_never() {
                Some(Some(ended)) => self.add_ended_read(ended, builder),
                // No read is in progress, or none has ended.
                Some(None) | None => break,
            }
        }
        if builder.bytes == 0 && self.reads.is_empty() {
            // There is nothing to return and no read in progress. While the response waits for records, it needs no
            // memory.
            self.response_memory = None;
        }
    }

    /// Adds an error to the response for each partition with a read in progress, because `tier.fetch_max_wait` has
    /// passed.
    fn add_timeout_errors(&self, builder: &mut FetchResponseBuilder) {
        let states = self.partitions.iter().enumerate();
        for (index, state) in states.filter(|(_, state)| state.is_reading && state.reader.is_some()) {
            let (offset, bound) = (state.position, self.fetch.ctx.config.tier.fetch_max_wait);
            let (code, source) = if offset < state.replica.watermarks().local_start {
                (ErrorCode::ObjectStoreUnavailable, "the object store")
            } else {
                (ErrorCode::Timeout, "this broker's disk")
            };
            let message = format!(
                "{source} has not served offset {offset} within {bound:?} (tier.fetch_max_wait), and the read \
                 continues: retry"
            );
            self.fetch.ctx.metrics.fetch_errors.count(code.as_str());
            builder.entry(index, state).error = Some(ApiError::new(code, message).with("offset", offset).into());
        }
    }

    /// If the response has neither records nor errors, marks each partition with unread records as ready. Returns true
    /// if it marked any.
    fn mark_unread(&self, builder: &FetchResponseBuilder) -> bool {
        if builder.bytes > 0 || builder.failed {
            return false;
        }
        let unread = self.partitions.iter().enumerate().filter(|(_, state)| state.has_more());
        unread.map(|(index, _)| self.ready.mark(index)).count() > 0
    }

    /// Adds an entry with watermarks for each partition that has no entry in the response.
    fn add_missing_entries(&self, builder: &mut FetchResponseBuilder) {
        for (index, state) in self.partitions.iter().enumerate() {
            if !builder.entries.contains_key(&index) {
                builder.entry(index, state);
            }
        }
    }

    /// Gathers the response of a unary read: until the response has `min_bytes` or an error, or is full, or until the
    /// deadline. While the response is empty and reads are in progress, waits for the reads up to
    /// `tier.fetch_max_wait` instead of the deadline. Fails if no memory becomes free within `tier.fetch_max_wait`.
    async fn gather(&mut self, decode: bool, deadline: Instant) -> Result<FetchResponseBuilder, ApiError> {
        let max_wait = self.fetch.ctx.config.tier.fetch_max_wait;
        let mut builder = FetchResponseBuilder::default();
        let (mut reading_since, mut enough_since, mut has_rechecked) = (None, None, false);
        loop {
            if self.needs_memory() {
                let reserved = tokio::time::timeout(max_wait, self.reserve(decode)).await;
                reserved.map_err(|_| self.memory.no_response_memory_error())?;
                // The time until now was spent on waiting for memory, so the bound on reads starts again.
                reading_since = None;
            }
            self.gather_now(&mut builder);
            if builder.is_enough(self.min_bytes()) {
                let until = *enough_since.get_or_insert_with(clock::monotonic) + OTHER_READS_DELAY;
                let takes_more = !builder.failed && !builder.full && builder.bytes < self.limits.max_bytes;
                if !takes_more || tokio::time::timeout_at(until, self.add_next_read(&mut builder)).await != Ok(true) {
                    break;
                }
                continue;
            }
            // The response is empty and reads are in progress, so records probably exist, and the wait for them has a
            // separate bound.
            let awaits_records = builder.bytes == 0 && !self.reads.is_empty();
            let until = if awaits_records {
                *reading_since.get_or_insert_with(clock::monotonic) + max_wait
            } else {
                reading_since = None;
                deadline
            };
            if tokio::time::timeout_at(until, self.wait_for_data(&mut builder)).await.is_ok() {
                continue;
            }
            if awaits_records {
                self.add_timeout_errors(&mut builder);
            }
            // At the deadline, an empty response is checked once more: records that arrived since the last check still
            // go into it.
            if awaits_records || std::mem::replace(&mut has_rechecked, true) || !self.mark_unread(&builder) {
                break;
            }
        }
        self.add_missing_entries(&mut builder);
        Ok(builder)
    }

    /// Waits for one more read outcome and adds it to the response. Returns false if no read is in progress.
    async fn add_next_read(&mut self, builder: &mut FetchResponseBuilder) -> bool {
        let ended = self.reads.next().await;
        ended.map(|ended| self.add_ended_read(ended, builder)).is_some()
    }

    /// Waits for one more read outcome and adds it to the response, or waits until a partition becomes ready. Frees
    /// unused memory of the response first.
    async fn wait_for_data(&mut self, builder: &mut FetchResponseBuilder) {
        self.release_unused(builder);
        let (ready, awaits_ready_partitions) = (Arc::clone(&self.ready), self.awaits_ready_partitions());
        let ended = tokio::select! {
            biased;
            Some(ended) = self.reads.next(), if !self.reads.is_empty() => Some(ended),
            () = ready.wait_for_mark(), if awaits_ready_partitions => None,
        };
        if let Some(ended) = ended {
            self.add_ended_read(ended, builder);
        }
    }
}
