//! Record batches: one format for the protocol, the disk, replication and the object store.
//!
//! # Overview
//!
//! A batch is a Kafka `RecordBatch` v2 (KIP-98), byte for byte:
//!
//! ```text
//!  0 baseOffset i64 │  8 batchLength i32 │ 12 partitionLeaderEpoch i32 │ 16 magic i8 = 2
//! 17 crc u32        │ 21 attributes i16  │ 23 lastOffsetDelta i32      │ 27 baseTimestamp i64
//! 35 maxTimestamp i64 │ 43 producerId i64 │ 51 producerEpoch i16 │ 53 baseSequence i32
//! 57 recordsCount i32 │ 61 records …
//! ```
//!
//! A [`Batch`] is complete, and its length, header and CRC are checked. The broker changes the fields of this table and
//! no others. Compressed records stay as they are unless the topic sets `compression.type`:
//!
//! | fields | function | condition |
//! | --- | --- | --- |
//! | base offset, leader epoch (the CRC does not cover them) | [`Batch::set_offset_and_epoch`] | always, by the leader |
//! | timestamp type, largest timestamp | [`Batch::set_append_time`] | the topic has `message.timestamp.type=LogAppendTime` |
//! | timestamp type | [`Batch::set_create_time`] | the topic has `message.timestamp.type=CreateTime` |
//! | largest timestamp | [`Batch::correct_max_timestamp`] | the producer's value is not that of the records |
//! | codec, records, largest timestamp | [`Batch::recompress`] | the topic sets `compression.type` to another codec |
//!
//! ```text
//! producer   BatchBuilder::push … finish ──► Batch ──► protocol, disk, replicas, object store
//! API        Batch::parse or split_from, check_client, check_first_records, correct_max_timestamp, recompress
//! leader     Batch::set_offset_and_epoch
//! consumer   Batch::records ──► Record …                    slices of the batch, or of its decompressed bytes
//! ```
//!
//! # Invariants
//!
//! - Every [`Batch`] value has passed the checks of length, magic, CRC-32C (byte 21 to the end) and counts. Its
//!   *records* may still be malformed, because a producer can send any bytes with a correct CRC. An append checks all
//!   uncompressed records ([`Batch::correct_max_timestamp`]) and the first compressed ones
//!   ([`Batch::check_first_records`]), so that a faulty producer gets an error. [`Batch::records`] and
//!   [`Batch::verify_records`] check all records.
//! - No allocation uses a length before that length is compared with the bytes present.
//! - Decompression stops at `limits::MAX_DECOMPRESSED_BYTES`, or at a lower maximum of the caller. A broker bounds the
//!   memory of concurrent decompressions by a budget (`partition::read`).
//! - A payload is copied once, into a builder that was given its capacity. Without compression, neither building nor
//!   decoding a batch copies the payload again.
//! - Every version reads what all earlier versions wrote: the files under `golden/` never change.
//!
//! Pure: no I/O, no clock, no randomness.

mod batch;
mod builder;
mod chunks;
mod compression;
mod error;
mod layout;
mod lz4;
mod records;
mod snappy;
#[cfg(test)]
mod tests;
mod varint;

pub use batch::{Batch, Fingerprint, ProducerSequence, TimestampRange};
pub use builder::{BatchBuilder, BuildError};
pub use chunks::ChunkedBatches;
pub use compression::decompress;
pub use error::MalformedBatch;
pub use layout::HEADER_BYTES;
pub use records::{Header, Record, Records};
