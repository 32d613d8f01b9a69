//! Batches: the one format of the wire, the disk, the replicas and the bucket.
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
//! [`Batch`] is a whole batch whose framing and CRC were checked. The broker writes its base offset and leader epoch, which
//! the CRC does not cover ([`Batch::stamp`]); the timestamps' type and the largest of them where the topic says so
//! ([`Batch::set_append_time`]); and the largest timestamp where the producer's is not that of the records
//! ([`Batch::correct_max_timestamp`]). Everything else, compressed records included, passes through unread.
//!
//! ```text
//! producer   BatchBuilder::push … finish ──► Batch ──► wire, disk, replicas, bucket
//! edge       Batch::parse or split_from, check_client, check_first_records, correct_max_timestamp; recompress where the topic sets compression.type
//! leader     Batch::stamp
//! consumer   Batch::records ──► Record …                    slices of the batch, or of what it decompressed to
//! ```
//!
//! # Invariants
//!
//! - A [`Batch`] only exists checked: length, magic, CRC-32C of byte 21 to the end, counts. Its *records* are checked only
//!   by [`Batch::records`] and [`Batch::verify_records`]: a producer may have put anything behind a right CRC. The first of
//!   them are checked at the append ([`Batch::check_first_records`]), so that a faulty producer hears of it.
//! - Nothing allocates by a length that was not compared with the bytes that are there.
//! - Decompression stops at `limits::MAX_DECOMPRESSED_BYTES`. Whoever decompresses strangers' batches at the same time
//!   must count that much for each.
//! - A payload is copied once, into a builder that was given its capacity; without compression nothing copies it again, neither
//!   here nor when it is read.
//! - What any version has written every later one reads: the files under `golden/` never change.
//!
//! Pure: no I/O, no clock, no randomness.

mod batch;
mod builder;
mod chunks;
mod compression;
mod layout;
mod lz4;
mod records;
mod snappy;
#[cfg(test)]
mod tests;
mod varint;

pub use batch::{Batch, Fingerprint, Malformed, ProducerStamp, TimestampRange};
pub use builder::{BatchBuilder, Unbuildable};
pub use chunks::Chunks;
pub use compression::decompress;
pub use layout::HEADER_BYTES;
pub use records::{Header, Record, Records};
