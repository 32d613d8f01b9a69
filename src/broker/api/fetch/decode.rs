//! Decoded responses: batches are replaced by their records, for clients that do not decode batches.

use std::sync::Arc;

use bytes::Bytes;

use super::{
    FetchResponseBuilder, FetchSession,
    memory::{DECODED_BYTES, ResponseMemory},
};
use crate::{
    broker::{CallMemory, Grant, api::errors},
    limits,
    model::{Compression, Offset, PartitionId},
    partition::{Decompressor, INLINE_BYTES},
    proto::{
        error::{ApiError, ErrorCode},
        v1,
    },
    record::{Batch, MalformedBatch, Record},
};

/// Maximum bytes of all records in a decoded response. The first returned record of a partition may exceed
/// [`Decoder::max_bytes`], but not this limit.
const MAX_DECODED_BYTES: usize = limits::MAX_MESSAGE_BYTES - (4 << 20);

/// The first returned record of a partition needs more memory than is reserved. The request is read again with a
/// reservation of `bytes` for this record.
pub(super) struct RecordTooLarge {
    pub(super) bytes: usize,
}

impl FetchSession {
    /// Replaces the batches of a response by their records, and returns the bytes of the records. A partition whose
    /// first returned record cannot be decoded or does not fit gets an error in its entry.
    ///
    /// # Errors
    /// `RecordTooLarge`: the response must be read again with more memory.
    pub(super) async fn decode(&mut self, builder: &mut FetchResponseBuilder) -> Result<usize, RecordTooLarge> {
        self.try_reclaim();
        // The decompressor shares the memory. If the fetch call ends while a batch is being decompressed, the memory
        // stays taken until the decompression ends.
        let grant = Arc::new(self.response_memory.as_mut().map(ResponseMemory::split));
        let mut decoder = Decoder {
            decompressor: self
                .memory
                .decompressor(&self.fetch.decompressor)
                .charged(Arc::<Option<Grant>>::clone(&grant)),
            memory: &self.memory,
            max_bytes: self
                .response_memory
                .as_ref()
                .map_or(DECODED_BYTES, |memory| memory.records / 2 - self.record_bytes),
            record_bytes: self.record_bytes,
            has_used_reservation: false,
            decoded_bytes: 0,
        };
        let mut used_bytes = 0;
        for (fetched, index) in builder.partitions.iter_mut().zip(&builder.session_indexes) {
            let Some(state) = index.map(|index| &self.partitions[index]) else { continue };
            match decoder.decode(fetched, (state.replica.id(), state.from), &mut used_bytes).await {
                Ok(()) => {}
                Err(Undecoded::TooLarge(record)) => return Err(record),
                Err(Undecoded::Refused(error)) => {
                    self.fetch.ctx.metrics.fetch_errors.count(error.code.as_str());
                    fetched.error = Some(error.into());
                }
            }
        }
        drop(decoder);
        if let (Some(memory), Some(grant)) = (&mut self.response_memory, Arc::into_inner(grant).flatten()) {
            memory.end_read(grant);
        }
        Ok(used_bytes)
    }
}

/// Reason why a response has no records of a partition. The reason is an error for the client, or a record for which
/// the response must be read again.
enum Undecoded {
    Refused(ApiError),
    TooLarge(RecordTooLarge),
}

impl<E: Into<ApiError>> From<E> for Undecoded {
    fn from(error: E) -> Self {
        Self::Refused(error.into())
    }
}

/// Decoder for the batches of one response.
struct Decoder<'a> {
    decompressor: Decompressor,
    memory: &'a CallMemory,
    /// Bytes of records in the response after which the response takes no more records.
    max_bytes: usize,
    /// Bytes of the session's reservation for one record that exceeds the space of the response; 0 without one.
    record_bytes: usize,
    /// True once a record of this response used the reservation.
    has_used_reservation: bool,
    /// Bytes of batches and records decoded since the last yield to other tasks.
    decoded_bytes: usize,
}

impl Decoder<'_> {
    /// Replaces the batches of a partition by their records from the offset `from` on, while there is space in the
    /// response. If records are left out, sets `next_offset` to the first of them. Adds the bytes of the records to
    /// `used_bytes`, the total of all partitions.
    ///
    /// An error means that the partition has no records in the response. If records of the partition precede an
    /// undecodable batch, they are returned without an error, and the next read returns the error.
    async fn decode(
        &mut self,
        fetched: &mut v1::FetchedPartition,
        (id, from): (PartitionId, Offset),
        used_bytes: &mut usize,
    ) -> Result<(), Undecoded> {
        let mut bytes = Bytes::from(std::mem::take(&mut fetched.chunks).concat());
        while !bytes.is_empty() {
            let batch = Batch::split_from(&mut bytes).map_err(errors::malformed_batch_error)?;
            let is_first = fetched.records.is_empty();
            if *used_bytes >= self.max_bytes && !(is_first && batch.compression() == Compression::None) {
                // The space is used up, so the remaining batches are not decompressed. An uncompressed first batch is
                // opened, because its first record may still be returned.
                fetched.next_offset = from.max(batch.base_offset()).as_i64();
                return if is_first { Err(self.response_full_error(fetched)) } else { Ok(()) };
            }
            let mut decoded = self.open((id, &batch), from, self.max_bytes.saturating_sub(*used_bytes)).await;
            if let Ok(DecodedRecords { records, omitted: Some((_, size)), .. }) = &decoded
                && is_first
                && records.is_empty()
                && *used_bytes + *size <= MAX_DECODED_BYTES
            {
                // The first returned record of the partition exceeds the space. It is returned if there is memory for
                // it.
                let size = *size;
                self.reserve_record(size)?;
                decoded = self.open((id, &batch), from, size).await;
            }
            self.decoded_bytes += batch.encoded_len() + decoded.as_ref().map_or(0, |decoded| decoded.bytes);
            if self.decoded_bytes > INLINE_BYTES {
                self.decoded_bytes = 0;
                tokio::task::yield_now().await;
            }
            match decoded {
                Ok(decoded) => {
                    *used_bytes += decoded.bytes;
                    fetched.records.extend(decoded.records);
                    let Some((offset, size)) = decoded.omitted else { continue };
                    fetched.next_offset = offset.as_i64();
                    return match fetched.records.is_empty() {
                        true if size > MAX_DECODED_BYTES => Err(record_too_large_error(fetched, size).into()),
                        // This record does not fit into one message together with the records of other partitions.
                        true => Err(self.response_full_error(fetched)),
                        false => Ok(()),
                    };
                }
                Err(error) => {
                    fetched.next_offset = from.max(batch.base_offset()).as_i64();
                    return if fetched.records.is_empty() {
                        Err(undecodable_error(fetched, &batch, &error).into())
                    } else {
                        Ok(())
                    };
                }
            }
        }
        Ok(())
    }

    /// Returns the error for a partition of which no record fits into the response.
    fn response_full_error(&self, fetched: &v1::FetchedPartition) -> Undecoded {
        response_full_error(fetched, self.max_bytes < DECODED_BYTES).into()
    }

    /// Reserves memory for a record of `bytes`. The caller has found that this record is the first returned one of its
    /// partition and exceeds the remaining space of the response. The first such record of a response that has at most
    /// `record_bytes` uses the session's reservation instead.
    fn reserve_record(&mut self, bytes: usize) -> Result<(), Undecoded> {
        if bytes <= self.record_bytes && !std::mem::replace(&mut self.has_used_reservation, true) {
            return Ok(());
        }
        match self.memory.reserve_more(2 * bytes) {
            // For a record larger than the session's reservation, the response is read again, with a larger reservation
            // that is part of the response's memory.
            Err(_) if bytes > self.record_bytes => Err(Undecoded::TooLarge(RecordTooLarge { bytes })),
            reserved => Ok(reserved?),
        }
    }

    /// Decompresses a batch and takes its records from the offset `from` on, up to `max_bytes`. A connection
    /// decompresses one batch at a time.
    async fn open(
        &self,
        (id, batch): (PartitionId, &Batch),
        from: Offset,
        max_bytes: usize,
    ) -> Result<DecodedRecords, MalformedBatch> {
        let work =
            move |batch: &Batch, decompressed_bytes: usize| take_records(batch, decompressed_bytes, from, max_bytes);
        self.decompressor.open_stored(id, batch, work).await
    }
}

/// Records taken from a batch.
struct DecodedRecords {
    records: Vec<v1::Record>,
    /// Bytes of the records.
    bytes: usize,
    /// Offset and size of the first record that was left out because it does not fit; `None` if all records fit.
    omitted: Option<(Offset, usize)>,
}

/// Takes the records of a batch from the offset `from` on, up to `max_bytes`. Fails if the batch decompresses to more
/// than `decompressed_bytes`.
fn take_records(
    batch: &Batch,
    decompressed_bytes: usize,
    from: Offset,
    max_bytes: usize,
) -> Result<DecodedRecords, MalformedBatch> {
    // Records of a compressed batch are copied: slices would keep all decompressed bytes in memory until the response
    // is sent.
    let copies = batch.compression() != Compression::None;
    let detach = |bytes: Bytes| if copies { Bytes::copy_from_slice(&bytes) } else { bytes };
    let mut decoded = DecodedRecords { records: Vec::new(), bytes: 0, omitted: None };
    let mut records = batch.records_within(decompressed_bytes)?;
    records.skip_below(from)?;
    for entry in records {
        let (offset, record) = entry?;
        let size = record_bytes(&record);
        if decoded.bytes + size > max_bytes {
            decoded.omitted = Some((offset, size));
            break;
        }
        decoded.bytes += size;
        let headers = record.headers.into_iter();
        let headers = headers.map(|header| v1::Header { key: header.key, value: header.value.map(detach) });
        decoded.records.push(v1::Record {
            key: record.key.map(detach),
            value: record.value.map(detach),
            headers: headers.collect(),
            timestamp_ms: Some(record.timestamp_ms),
            offset: offset.as_i64(),
        });
    }
    Ok(decoded)
}

/// Returns an upper bound of the bytes that a record takes in a response message.
fn record_bytes(record: &Record) -> usize {
    let length = |bytes: &Option<Bytes>| bytes.as_ref().map_or(0, Bytes::len);
    let headers = record.headers.iter().map(|header| header.key.len() + length(&header.value) + 32);
    length(&record.key) + length(&record.value) + headers.sum::<usize>() + 64
}

/// Returns the error for a partition whose records do not fit, because the records of other partitions fill the
/// response. `is_small` is true for a response with little memory: only then may a retry of the same request succeed.
fn response_full_error(fetched: &v1::FetchedPartition, is_small: bool) -> ApiError {
    let message = format!(
        "the response is full before the records of topic {}, partition {}: read this partition again, alone or first",
        fetched.topic, fetched.partition
    );
    ApiError { retryable: is_small, ..ApiError::new(ErrorCode::Overloaded, message) }
}

/// Returns the error for a record that fits into no decoded response, so that the client must read its batch.
fn record_too_large_error(fetched: &v1::FetchedPartition, size: usize) -> ApiError {
    let message = format!(
        "the record at offset {} has {size} bytes, more than a decoded response holds: read its batch without decode",
        fetched.next_offset
    );
    ApiError::new(ErrorCode::RecordTooLarge, message).with("offset", fetched.next_offset)
}

/// Returns the error for a batch whose records cannot be decoded, or have more bytes than may be decompressed. The
/// broker stores batches without decoding all of their records, so a reader may be the first to find such records.
fn undecodable_error(fetched: &v1::FetchedPartition, batch: &Batch, error: &MalformedBatch) -> ApiError {
    let (base, end) = (batch.base_offset(), batch.end_offset());
    if let MalformedBatch::NoMemory { max, setting, .. } = error {
        let message = format!(
            "topic {}, partition {}: the batch at offset {base} has more than {max} bytes of records, the maximum \
             that the broker's setting {setting} allows for one batch: read the batch without decode, or raise the \
             setting",
            fetched.topic, fetched.partition
        );
        return ApiError::new(ErrorCode::RecordTooLarge, message).with("offset", base);
    }
    let message = format!(
        "topic {}, partition {}: the records of the batch at offset {base} cannot be decoded: {error}; read the batch \
         without decode, or continue at offset {end}",
        fetched.topic, fetched.partition
    );
    ApiError::new(ErrorCode::DataCorrupt, message).with("offset", base).with("next", end)
}
