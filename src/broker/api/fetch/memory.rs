//! Memory of a reader's responses. The memory of a response is taken before anything is read for the response, and
//! freed when the response has been sent.

use futures::stream::FuturesUnordered;

use super::{FetchResponseBuilder, FetchSession, MAX_CONCURRENT_READS};
use crate::{
    broker::budget::{Grant, ResponseGrant},
    limits,
    partition::{FetchedBatches, ReadError},
};

/// Minimum limit of each concurrent read for a response, in bytes, if the response has space for that many.
pub(super) const MIN_READ_BYTES: usize = 1 << 20;

/// Maximum bytes of batches in a small response. A response is small if there is not enough memory for a full one.
pub(super) const SMALL_RESPONSE_BYTES: usize = 64 << 10;

/// Bytes of records after which a decoded response takes no more records. Compressed records can grow a thousandfold,
/// but a response must fit into one message, and into memory until it is sent.
pub(super) const DECODED_BYTES: usize = limits::MAX_FETCH_BYTES;

/// Bytes of records after which a small decoded response takes no more.
const SMALL_DECODED_BYTES: usize = DECODED_BYTES / 16;

/// Maximum bytes of one partition's entry in a response, without its batches and records.
const PARTITION_BYTES: usize = 512;

/// Memory taken for a response, and the limits that follow from its size.
pub(super) struct ResponseMemory {
    grant: ResponseGrant,
    /// Bytes of memory for batches, and for the message that is built from them.
    bytes: usize,
    /// Bytes of memory for decoded records, and for the message that is built from them; 0 without `decode`.
    pub(super) records: usize,
    /// Maximum bytes of batches in the response.
    pub(super) max_bytes: usize,
    /// Maximum bytes of a batch that one read may return.
    pub(super) batch_bytes: usize,
    /// True for a small response, whose reads run one at a time.
    is_small: bool,
    /// Values of `bytes` and `records` before a part of the memory was freed or left to dropped reads; `None` if all
    /// memory is there.
    released: Option<(usize, usize)>,
    /// True if the missing memory could not be taken back. Nothing more is read for this response then.
    is_used_up: bool,
}

impl ResponseMemory {
    /// Splits off the memory of one read. The read holds this memory until it ends, also if it ends after the response
    /// was built or after the call.
    pub(super) fn begin_read(&mut self) -> Grant {
        self.grant.split(self.batch_bytes)
    }

    /// Merges the memory of an ended read, and frees what exceeds the memory of this response. The excess comes from
    /// reads that were started for an earlier response.
    pub(super) fn end_read(&mut self, charge: Grant) {
        self.grant.merge(charge);
        self.grant.shrink(self.bytes + self.records);
    }

    /// Splits off all memory of the response, for decoding. A decompression may hold a part of it after the call has
    /// ended.
    pub(super) fn split(&mut self) -> Grant {
        self.grant.split(self.bytes + self.records)
    }
}

impl FetchSession {
    /// Returns true if memory must be reserved for the next response. The response then has none, and there is a
    /// deferred outcome, a read in progress or a ready partition.
    pub(super) fn needs_memory(&self) -> bool {
        self.response_memory.is_none() && (self.deferred.is_some() || !self.reads.is_empty() || self.ready.is_marked())
    }

    /// Takes memory for a response, and waits for it. Called before any read for the response. The memory is for the
    /// batches and for the message that is built from them. With `decode`, more memory is taken for the records. If
    /// other responses hold too much memory, the response is small. Before a wait, the reads in progress are dropped.
    /// Batches above the expected size get memory only after a read has failed because of their size.
    pub(super) async fn reserve(&mut self, decode: bool) {
        let max_bytes = self.limits.max_bytes;
        let reads = self.partitions.len().clamp(1, MAX_CONCURRENT_READS);
        let record_bytes = self.record_bytes;
        let record_memory = |decoded_bytes: usize| if decode { 2 * (decoded_bytes + record_bytes) } else { 0 };
        let batch_bytes = self.expected_batch_bytes.max(self.max_batch_bytes);
        let bytes = max_bytes + reads * self.read_bytes(max_bytes).max(batch_bytes);
        let bytes = bytes.max(2 * self.max_batch_bytes);
        let small_bytes = 2 * (SMALL_RESPONSE_BYTES + self.max_batch_bytes);
        let wanted_bytes = bytes + record_memory(DECODED_BYTES);
        let min_bytes = small_bytes + record_memory(SMALL_DECODED_BYTES);
        let (grant, granted_bytes) = match self.memory.try_response(wanted_bytes, min_bytes) {
            Some(granted) => granted,
            None => {
                // Ended reads keep their memory until their outcomes are taken, which does not happen during the wait.
                // So the reads are dropped.
                self.drop_reads();
                self.memory.response(wanted_bytes, min_bytes).await
            }
        };
        let (released, is_used_up, is_small) = (None, false, granted_bytes != wanted_bytes);
        self.response_memory = Some(if is_small {
            let (records, max_bytes) = (record_memory(SMALL_DECODED_BYTES), max_bytes.min(SMALL_RESPONSE_BYTES));
            let batch_bytes = SMALL_RESPONSE_BYTES.max(self.max_batch_bytes);
            ResponseMemory {
                grant,
                bytes: small_bytes,
                records,
                max_bytes,
                batch_bytes,
                is_small,
                released,
                is_used_up,
            }
        } else {
            let (records, batch_bytes) = (record_memory(DECODED_BYTES), self.read_bytes(max_bytes).max(batch_bytes));
            ResponseMemory { grant, bytes, records, max_bytes, batch_bytes, is_small, released, is_used_up }
        });
    }

    /// Returns true if one more read may start: the response has all of its memory, and not the maximum number of reads
    /// in progress.
    pub(super) fn may_begin_read(&self) -> bool {
        let Some(ResponseMemory { is_small, released: None, .. }) = self.response_memory else { return false };
        self.reads.len() < if is_small { 1 } else { MAX_CONCURRENT_READS }
    }

    /// Returns true if a partition that becomes ready must end a wait, because its read could start beside the reads in
    /// progress.
    pub(super) fn awaits_ready_partitions(&self) -> bool {
        match self.response_memory {
            Some(ResponseMemory { is_used_up: true, .. }) => false,
            Some(ResponseMemory { is_small: true, .. }) => self.reads.is_empty(),
            Some(ResponseMemory { .. }) | None => self.reads.len() < MAX_CONCURRENT_READS,
        }
    }

    /// Frees memory of a response that waits for more records, except the memory for its batches and for the reads in
    /// progress. Does nothing if a partition is ready.
    pub(super) fn release_unused(&mut self, builder: &FetchResponseBuilder) {
        let Some(memory) = &mut self.response_memory else { return };
        if self.ready.is_marked() {
            return;
        }
        let reading_bytes = self.reads.len() * memory.batch_bytes;
        let bytes = memory.bytes.min(2 * (builder.bytes + reading_bytes));
        let records = memory.records.min(2 * (SMALL_DECODED_BYTES + self.record_bytes));
        let before = (memory.bytes, memory.records);
        if before != (bytes, records) {
            memory.released.get_or_insert(before);
            (memory.bytes, memory.records) = (bytes, records);
            memory.grant.shrink((bytes + records).saturating_sub(reading_bytes));
        }
    }

    /// Takes freed memory back if a partition is ready. If there is not enough memory, a response with records becomes
    /// full and is sent.
    pub(super) fn reclaim_if_ready(&mut self, builder: &mut FetchResponseBuilder) {
        if self.ready.is_marked() && !self.try_reclaim() {
            builder.full |= builder.bytes > 0;
        }
    }

    /// Takes memory again that this response freed or left to dropped reads, without waiting. Returns true if the
    /// response has all of its memory, or no memory was reserved. After a failure, nothing more is read for this
    /// response.
    pub(super) fn try_reclaim(&mut self) -> bool {
        let Some(memory) = &mut self.response_memory else { return true };
        let Some((bytes, records)) = memory.released else { return true };
        let reading_bytes = self.reads.len() * memory.batch_bytes;
        memory.is_used_up = !self.memory.try_grow(&mut memory.grant, (bytes + records).saturating_sub(reading_bytes));
        if !memory.is_used_up {
            (memory.bytes, memory.records, memory.released) = (bytes, records, None);
        }
        !memory.is_used_up
    }

    /// Restarts a unary read at its first offsets, with a reservation for one record of `record_bytes`. The entries of
    /// rejected partitions in `builder` are kept for the next response.
    pub(super) fn read_again(&mut self, record_bytes: usize, builder: FetchResponseBuilder) {
        self.record_bytes = record_bytes;
        (self.response_memory, self.deferred, self.reads) = (None, None, FuturesUnordered::new());
        let entries = builder.partitions.into_iter().zip(builder.session_indexes);
        self.refused.extend(entries.filter(|(_, index)| index.is_none()).map(|(refused, _)| refused));
        for (index, state) in self.partitions.iter_mut().enumerate() {
            state.reader = Some(state.replica.reader().clone());
            (state.position, state.is_reading, state.is_ready_again) = (state.from, false, false);
            self.ready.mark(index);
        }
    }

    /// Returns the bytes of batches for which there is no memory. These are the batches that a read returned, or a
    /// batch above the limit of the read. Returns `None` if there is memory for the returned batches, or if the read
    /// found nothing or failed otherwise. May reserve more memory.
    pub(super) fn bytes_without_memory(
        &self,
        outcome: &Result<Option<FetchedBatches>, ReadError>,
        builder: &FetchResponseBuilder,
    ) -> Option<usize> {
        match outcome {
            Ok(Some(fetched)) if !self.has_memory_for(fetched.bytes, builder) => Some(fetched.bytes),
            Err(ReadError::BatchTooLarge { bytes }) => Some(*bytes),
            _ => None,
        }
    }

    /// Marks a partition for another read, whose memory must suffice for a batch of `batch_bytes`. A response with
    /// records becomes full, and is sent first. An empty response frees its memory and drops its reads in progress, so
    /// that the caller reserves memory again.
    pub(super) fn read_later(&mut self, index: usize, batch_bytes: usize, builder: &mut FetchResponseBuilder) {
        // The size is rounded up. Otherwise, batches that grow byte by byte would cause another read each time.
        self.max_batch_bytes = self.max_batch_bytes.max(batch_bytes.next_power_of_two());
        self.partitions[index].is_reading = false;
        self.ready.mark(index);
        builder.full = builder.bytes > 0;
        if builder.full {
            return;
        }
        self.response_memory = None;
        self.drop_reads();
    }

    /// Drops the reads in progress, and marks their partitions as ready. Blocking work of a dropped read continues, and
    /// holds the read's memory until it ends.
    pub(super) fn drop_reads(&mut self) {
        if let Some(memory) = &mut self.response_memory
            && !self.reads.is_empty()
        {
            memory.released.get_or_insert((memory.bytes, memory.records));
            memory.bytes = memory.bytes.saturating_sub(self.reads.len() * memory.batch_bytes);
        }
        self.reads = FuturesUnordered::new();
        let deferred = self.deferred.as_ref().map(|(index, _)| *index);
        for (index, state) in self.partitions.iter_mut().enumerate() {
            if state.is_reading && deferred != Some(index) {
                state.is_reading = false;
                // This partition is read before all other ready partitions. Otherwise, partitions with new records
                // could delay it for ever.
                self.ready.put_back(index);
            }
        }
    }

    /// Returns true if there is memory for batches of `batch_bytes` that were read, in addition to the response. If the
    /// memory of the response does not suffice, because a batch was larger than expected, reserves more.
    fn has_memory_for(&self, batch_bytes: usize, builder: &FetchResponseBuilder) -> bool {
        let Some(ResponseMemory { bytes, .. }) = self.response_memory else { return true };
        let needed = 2 * (builder.bytes + batch_bytes);
        needed <= bytes || self.memory.reserve_more((needed - bytes).min(2 * batch_bytes)).is_ok()
    }

    /// Returns the maximum bytes of one read, if the response has space for `remaining_bytes`. Each concurrent read
    /// gets an equal part, but at least [`MIN_READ_BYTES`] if there is space for that many.
    pub(super) fn read_bytes(&self, remaining_bytes: usize) -> usize {
        let reads = self.partitions.len().clamp(1, MAX_CONCURRENT_READS);
        (remaining_bytes / reads).max(remaining_bytes.min(MIN_READ_BYTES))
    }

    /// Passes the memory of a built response to its call, which frees the memory when the response has been sent.
    /// Memory that the response does not need is freed now. Reads in progress have their own memory. A deferred outcome
    /// keeps a part of the memory of this response until the response has been sent.
    pub(super) fn on_response_built(&mut self, batch_bytes: usize, partitions: usize) {
        if let Some(memory) = self.response_memory.take() {
            let deferred_bytes = match &self.deferred {
                Some((_, Ok(Some(fetched)))) => fetched.bytes,
                Some((_, Ok(None) | Err(_))) | None => 0,
            };
            let bytes = 2 * batch_bytes + deferred_bytes + partitions * PARTITION_BYTES;
            self.memory.complete_response(memory.grant, bytes);
        }
    }

    /// Returns the bytes of batches from which the response waits no longer: `min_bytes` of the request, but at most
    /// the maximum of this response.
    pub(super) fn min_bytes(&self) -> usize {
        let min_bytes = self.limits.min_bytes;
        self.response_memory.as_ref().map_or(min_bytes, |memory| min_bytes.min(memory.max_bytes))
    }
}
