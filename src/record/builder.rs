//! Building a batch record by record, in one buffer that becomes the batch.

use bytes::Bytes;

use super::{
    batch::{Batch, ProducerStamp},
    compression,
    layout::{self, HEADER_BYTES, set},
    records::Header,
    varint,
};
use crate::{limits, model::Compression};

/// Why a record cannot join a batch, or a batch cannot be finished.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unbuildable {
    /// A batch has at least one record.
    #[error("a batch needs at least one record")]
    Empty,
    /// The batch is full by count.
    #[error("the batch already holds {limit} records, the most that one may; start another")]
    TooManyRecords {
        /// `limits::MAX_BATCH_RECORDS`
        limit: usize,
    },
    /// One record has too many headers.
    #[error("the record has {headers} headers; at most {limit} are allowed")]
    TooManyHeaders {
        /// How many it has.
        headers: usize,
        /// `limits::MAX_RECORD_HEADERS`
        limit: usize,
    },
    /// The batch would pass the largest size that any topic may allow.
    #[error("the batch would be {bytes} bytes; at most {limit} are allowed, send fewer or smaller records")]
    TooLarge {
        /// What it would be.
        bytes: usize,
        /// What it may be.
        limit: usize,
    },
}

/// Encodes records into a new batch.
///
/// Records are written straight into one buffer. Without compression that buffer becomes the batch, so that a payload
/// is copied once, into it.
#[derive(Debug)]
pub struct BatchBuilder {
    compression: Compression,
    /// The framed records so far, not compressed.
    records: Vec<u8>,
    count: u32,
    base_timestamp: i64,
    max_timestamp: i64,
}

/// Bytes of a record's fields before its key: length, attributes, timestamp, offset, the key's length.
const MAX_PREFIX_BYTES: usize = 3 * varint::MAX_I32_BYTES + 1 + varint::MAX_I64_BYTES;

impl BatchBuilder {
    /// An empty batch whose records will be compressed with `compression` when it is finished.
    pub fn new(compression: Compression) -> Self {
        Self::with_capacity(compression, 0)
    }

    /// As [`BatchBuilder::new`], with room for `bytes` of encoded records, so that the buffer need not grow.
    pub fn with_capacity(compression: Compression, bytes: usize) -> Self {
        Self { compression, records: Vec::with_capacity(bytes), count: 0, base_timestamp: 0, max_timestamp: 0 }
    }

    /// Adds a record. On an error the batch is as it was.
    ///
    /// # Errors
    /// When the batch or the record would pass a hard bound (`limits`). A topic's `max.message.bytes` is the caller's.
    pub fn push(
        &mut self,
        timestamp_ms: i64,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
        headers: &[Header],
    ) -> Result<(), Unbuildable> {
        let base = if self.count == 0 { timestamp_ms } else { self.base_timestamp };
        // Wraps where the two are more than 2^63 apart, and so does the reader.
        let delta = timestamp_ms.wrapping_sub(base);
        let body = body_len(delta, self.count, key, value, headers);
        self.check_room(body, headers.len())?;

        let mut prefix = [0; MAX_PREFIX_BYTES];
        let mut at = varint::write(as_i64(body), &mut prefix);
        at += 1; // The attributes byte, which stays 0.
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

    fn check_room(&self, body: usize, headers: usize) -> Result<(), Unbuildable> {
        if self.count as usize >= limits::MAX_BATCH_RECORDS {
            return Err(Unbuildable::TooManyRecords { limit: limits::MAX_BATCH_RECORDS });
        }
        if headers > limits::MAX_RECORD_HEADERS {
            return Err(Unbuildable::TooManyHeaders { headers, limit: limits::MAX_RECORD_HEADERS });
        }
        let limit = match self.compression {
            Compression::None => limits::MAX_BATCH_BYTES,
            _ => limits::MAX_DECOMPRESSED_BYTES,
        };
        let bytes = self.encoded_len().saturating_add(body).saturating_add(varint::MAX_I32_BYTES);
        if bytes > limit { Err(Unbuildable::TooLarge { bytes, limit }) } else { Ok(()) }
    }

    fn put_varint(&mut self, value: i64) {
        let mut bytes = [0; varint::MAX_I64_BYTES];
        let len = varint::write(value, &mut bytes);
        self.records.extend_from_slice(&bytes[..len]);
    }

    /// The most bytes that a record of these parts adds to [`BatchBuilder::encoded_len`], whatever its timestamp.
    pub fn record_len(key: Option<&[u8]>, value: Option<&[u8]>, headers: &[Header]) -> usize {
        body_len(i64::MIN, u32::MAX >> 1, key, value, headers).saturating_add(varint::MAX_I32_BYTES)
    }

    /// Bytes of the batch so far, its header included, before compression.
    pub fn encoded_len(&self) -> usize {
        HEADER_BYTES + self.records.len()
    }

    #[cfg(test)]
    pub(super) fn records_ptr(&self) -> *const u8 {
        self.records.as_ptr()
    }

    /// How many records it holds.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Whether it holds no record yet.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The batch: base offset 0 and no leader epoch, which the leader stamps.
    ///
    /// # Errors
    /// When it holds no record, or is larger than `limits::MAX_BATCH_BYTES` once compressed.
    pub fn finish(self, producer: Option<ProducerStamp>) -> Result<Batch, Unbuildable> {
        let Some(last) = self.count.checked_sub(1) else { return Err(Unbuildable::Empty) };
        let records = match self.compression {
            Compression::None => Bytes::from(self.records),
            codec => compression::compress(codec, &self.records),
        };
        let (bytes, limit) = (HEADER_BYTES + records.len(), limits::MAX_BATCH_BYTES);
        if bytes > limit {
            return Err(Unbuildable::TooLarge { bytes, limit });
        }
        let producer = producer.unwrap_or(ProducerStamp { id: -1, epoch: -1, base_sequence: -1 });
        let mut head = [0; HEADER_BYTES];
        set(&mut head, layout::LEADER_EPOCH, (-1_i32).to_be_bytes());
        set(&mut head, layout::MAGIC_AT, [layout::MAGIC]);
        set(&mut head, layout::ATTRIBUTES, (self.compression as u16).to_be_bytes());
        set(&mut head, layout::LAST_OFFSET_DELTA, last.to_be_bytes());
        set(&mut head, layout::BASE_TIMESTAMP, self.base_timestamp.to_be_bytes());
        set(&mut head, layout::MAX_TIMESTAMP, self.max_timestamp.to_be_bytes());
        set(&mut head, layout::PRODUCER_ID, producer.id.to_be_bytes());
        set(&mut head, layout::PRODUCER_EPOCH, producer.epoch.to_be_bytes());
        set(&mut head, layout::BASE_SEQUENCE, producer.base_sequence.to_be_bytes());
        set(&mut head, layout::RECORDS_COUNT, self.count.to_be_bytes());
        Ok(Batch::seal(head, records))
    }
}

/// Bytes of a record after its own length.
fn body_len(delta: i64, index: u32, key: Option<&[u8]>, value: Option<&[u8]>, headers: &[Header]) -> usize {
    let part = |bytes: Option<&[u8]>| varint::len(nullable_len(bytes)) + bytes.map_or(0, <[u8]>::len);
    let headers_len: usize =
        headers.iter().map(|header| part(Some(header.key.as_bytes())) + part(header.value.as_deref())).sum();
    1 + varint::len(delta)
        + varint::len(i64::from(index))
        + part(key)
        + part(value)
        + varint::len(as_i64(headers.len()))
        + headers_len
}

fn nullable_len(bytes: Option<&[u8]>) -> i64 {
    bytes.map_or(-1, |bytes| as_i64(bytes.len()))
}

fn as_i64(len: usize) -> i64 {
    i64::try_from(len).expect("memory is smaller than 2^63 bytes")
}
