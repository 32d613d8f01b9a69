//! Builds a batch record by record, in one buffer that becomes the batch.

use bytes::Bytes;

use super::{
    batch::{Batch, ProducerSequence},
    compression,
    layout::{self, HEADER_BYTES, set},
    records::Header,
    varint,
};
use crate::{limits, model::Compression};

/// Error of adding a record to a batch, or of finishing a batch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BuildError {
    /// The batch has no record.
    #[error("a batch needs at least one record")]
    Empty,
    /// The batch has the maximum number of records.
    #[error("the batch already holds {limit} records, the maximum: start another batch")]
    TooManyRecords {
        /// Equal to `limits::MAX_BATCH_RECORDS`.
        limit: usize,
    },
    /// A record has too many headers.
    #[error("the record has {headers} headers; at most {limit} are allowed")]
    TooManyHeaders {
        /// Number of headers of the record.
        headers: usize,
        /// Equal to `limits::MAX_RECORD_HEADERS`.
        limit: usize,
    },
    /// The batch would exceed the largest size that a topic can allow. With compression, this is also the error if the
    /// records exceed `limits::MAX_DECOMPRESSED_BYTES`.
    #[error("the batch would have {bytes} bytes, and the maximum is {limit}: send fewer or smaller records")]
    TooLarge {
        /// Size that the batch would have.
        bytes: usize,
        /// Maximum size.
        limit: usize,
    },
}

/// Encodes records into a new batch.
///
/// The builder writes records into one buffer. Without compression this buffer becomes the batch, so that a payload is
/// copied once.
#[derive(Debug)]
pub struct BatchBuilder {
    compression: Compression,
    /// The encoded, uncompressed records so far.
    records: Vec<u8>,
    count: u32,
    base_timestamp: i64,
    max_timestamp: i64,
}

/// Maximum length of the fields of a record before its key: length, attributes, timestamp delta, offset delta, key
/// length.
const MAX_PREFIX_BYTES: usize = 3 * varint::MAX_I32_BYTES + 1 + varint::MAX_I64_BYTES;

impl BatchBuilder {
    /// Creates an empty builder. [`BatchBuilder::finish`] compresses the records with `compression`.
    pub fn new(compression: Compression) -> Self {
        Self::with_capacity(compression, 0)
    }

    /// Creates an empty builder with a buffer of `bytes` for encoded records.
    pub fn with_capacity(compression: Compression, bytes: usize) -> Self {
        Self { compression, records: Vec::with_capacity(bytes), count: 0, base_timestamp: 0, max_timestamp: 0 }
    }

    /// Adds a record. An error leaves the batch unchanged.
    ///
    /// # Errors
    /// The batch or the record would exceed a fixed maximum (`limits`). The caller checks `max.message.bytes` of the
    /// topic.
    pub fn push(
        &mut self,
        timestamp_ms: i64,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
        headers: &[Header],
    ) -> Result<(), BuildError> {
        let base = if self.count == 0 { timestamp_ms } else { self.base_timestamp };
        // The delta wraps if the timestamps differ by more than 2^63. The reader wraps too.
        let delta = timestamp_ms.wrapping_sub(base);
        let body = body_len(delta, self.count, key, value, headers);
        self.check_limits(body, headers.len())?;

        let mut prefix = [0; MAX_PREFIX_BYTES];
        let mut at = varint::write(as_i64(body), &mut prefix);
        at += 1; // The attributes byte stays 0.
        at += varint::write(delta, &mut prefix[at..]);
        at += varint::write(i64::from(self.count), &mut prefix[at..]);
        at += varint::write(nullable_len(key), &mut prefix[at..]);

        self.records.reserve(body + varint::MAX_I32_BYTES);
        self.records.extend_from_slice(&prefix[..at]);
        self.records.extend_from_slice(key.unwrap_or_default());
        self.put_varint(nullable_len(value));
        self.records.extend_from_slice(value.unwrap_or_default());
        self.put_varint(as_i64(headers.len()));
        for header in headers {
            self.put_varint(as_i64(header.key.len()));
            self.records.extend_from_slice(header.key.as_bytes());
            self.put_varint(nullable_len(header.value.as_deref()));
            self.records.extend_from_slice(header.value.as_deref().unwrap_or_default());
        }

        self.max_timestamp = if self.count == 0 { timestamp_ms } else { self.max_timestamp.max(timestamp_ms) };
        self.base_timestamp = base;
        self.count += 1;
        Ok(())
    }

    /// Checks that one more record with a body of `body` bytes and this number of headers stays within the maximums.
    fn check_limits(&self, body: usize, headers: usize) -> Result<(), BuildError> {
        if self.count as usize >= limits::MAX_BATCH_RECORDS {
            return Err(BuildError::TooManyRecords { limit: limits::MAX_BATCH_RECORDS });
        }
        if headers > limits::MAX_RECORD_HEADERS {
            return Err(BuildError::TooManyHeaders { headers, limit: limits::MAX_RECORD_HEADERS });
        }
        let limit = match self.compression {
            Compression::None => limits::MAX_BATCH_BYTES,
            _ => limits::MAX_DECOMPRESSED_BYTES,
        };
        let bytes = self.encoded_len().saturating_add(body).saturating_add(varint::MAX_I32_BYTES);
        if bytes > limit { Err(BuildError::TooLarge { bytes, limit }) } else { Ok(()) }
    }

    fn put_varint(&mut self, value: i64) {
        let mut bytes = [0; varint::MAX_I64_BYTES];
        let len = varint::write(value, &mut bytes);
        self.records.extend_from_slice(&bytes[..len]);
    }

    /// Returns the maximum number of bytes that a record with this content adds to [`BatchBuilder::encoded_len`], for
    /// any timestamp.
    pub fn record_len(key: Option<&[u8]>, value: Option<&[u8]>, headers: &[Header]) -> usize {
        body_len(i64::MIN, u32::MAX >> 1, key, value, headers).saturating_add(varint::MAX_I32_BYTES)
    }

    /// Returns the length of the batch so far before compression, with its header.
    pub fn encoded_len(&self) -> usize {
        HEADER_BYTES + self.records.len()
    }

    #[cfg(test)]
    pub(super) fn records_ptr(&self) -> *const u8 {
        self.records.as_ptr()
    }

    /// Returns the number of records.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Returns true if the batch has no record.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Compresses the records and returns the batch, with base offset 0 and without a leader epoch. The leader sets
    /// both.
    ///
    /// # Errors
    /// The batch has no record, or it is larger than `limits::MAX_BATCH_BYTES` after compression.
    pub fn finish(self, producer: Option<ProducerSequence>) -> Result<Batch, BuildError> {
        let Some(last) = self.count.checked_sub(1) else { return Err(BuildError::Empty) };
        let records = match self.compression {
            Compression::None => Bytes::from(self.records),
            codec => compression::compress(codec, &self.records),
        };
        let (bytes, limit) = (HEADER_BYTES + records.len(), limits::MAX_BATCH_BYTES);
        if bytes > limit {
            return Err(BuildError::TooLarge { bytes, limit });
        }
        let producer = producer.unwrap_or(ProducerSequence { id: -1, epoch: -1, base_sequence: -1 });
        let mut header = [0; HEADER_BYTES];
        set(&mut header, layout::LEADER_EPOCH, (-1_i32).to_be_bytes());
        set(&mut header, layout::MAGIC_AT, [layout::MAGIC]);
        set(&mut header, layout::ATTRIBUTES, (self.compression as u16).to_be_bytes());
        set(&mut header, layout::LAST_OFFSET_DELTA, last.to_be_bytes());
        set(&mut header, layout::BASE_TIMESTAMP, self.base_timestamp.to_be_bytes());
        set(&mut header, layout::MAX_TIMESTAMP, self.max_timestamp.to_be_bytes());
        set(&mut header, layout::PRODUCER_ID, producer.id.to_be_bytes());
        set(&mut header, layout::PRODUCER_EPOCH, producer.epoch.to_be_bytes());
        set(&mut header, layout::BASE_SEQUENCE, producer.base_sequence.to_be_bytes());
        set(&mut header, layout::RECORDS_COUNT, self.count.to_be_bytes());
        Ok(Batch::seal(header, records))
    }
}

/// Returns the length of a record without its length field.
fn body_len(delta: i64, index: u32, key: Option<&[u8]>, value: Option<&[u8]>, headers: &[Header]) -> usize {
    let field_len = |bytes: Option<&[u8]>| varint::len(nullable_len(bytes)) + bytes.map_or(0, <[u8]>::len);
    let headers_len: usize =
        headers.iter().map(|header| field_len(Some(header.key.as_bytes())) + field_len(header.value.as_deref())).sum();
    1 + varint::len(delta)
        + varint::len(i64::from(index))
        + field_len(key)
        + field_len(value)
        + varint::len(as_i64(headers.len()))
        + headers_len
}

/// Returns the length field of a key or value: -1 if it is absent.
fn nullable_len(bytes: Option<&[u8]>) -> i64 {
    bytes.map_or(-1, |bytes| as_i64(bytes.len()))
}

fn as_i64(len: usize) -> i64 {
    i64::try_from(len).expect("memory is smaller than 2^63 bytes")
}
