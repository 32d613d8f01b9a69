//! The footer at the end of a segment object: a description of the batches before it, and their index.
//!
//! # Format
//!
//! ```text
//! batches as they are │ body │ trailer (44 bytes)
//!
//! body     topic id 16 │ partition u32 │ base u64 │ end u64 │ writer's epoch u32 │ data bytes u64
//!          │ largest timestamp i64
//!          │ n u32 │ n × (epoch u32, start offset u64)                           leader epochs up to `end`
//!          │ n u32 │ n × (offset u64, position u64, largest timestamp i64)       one entry for each index interval
//!          │ n u32 │ n bytes                                                     producer state at `end`, opaque here
//! trailer  data bytes u64 │ body bytes u32 │ CRC of data u32 │ CRC of body u32 │ version u16
//!          │ ten zero bytes │ CRC of the trailer so far u32 │ "STRNDSEG"
//! ```
//!
//! Big-endian; every CRC is CRC-32C. Each index entry serves two indexes. The offset index finds the interval that
//! contains an offset. The time index finds the first interval with a timestamp at or after a given one. Every interval
//! but the last has at least 4 KiB. Intervals are larger if a segment would otherwise have more than [`MAX_ENTRIES`] of
//! them, so that the index stays below 400 KiB.
//!
//! Pure: no I/O, no clock, no randomness.

use bytes::{BufMut, Bytes, BytesMut};

use super::codec::{FieldReader, InvalidObject, put_count, put_partition};
use crate::{
    model::{LeaderEpoch, Offset, PartitionId},
    record::Batch,
};

/// Size of the trailer at the end of every segment object, in bytes.
pub const TRAILER_BYTES: usize = 44;

/// Maximum number of index entries of one segment.
pub const MAX_ENTRIES: u64 = 16_384;

const MIN_INDEX_INTERVAL_BYTES: u64 = 4096;
const MAGIC: &[u8; 8] = b"STRNDSEG";
const VERSION: u16 = 1;
const KIND: &str = "segment object";
const ENTRY_BYTES: usize = 24;
const EPOCH_BYTES: usize = 12;

/// An index interval: the consecutive batches from this entry's position to the next entry's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentIndexEntry {
    /// Base offset of the first batch in the interval.
    pub offset: Offset,
    /// Position of the first batch of the interval in the object.
    pub position: u64,
    /// Largest timestamp in the interval, in milliseconds.
    pub max_timestamp_ms: i64,
}

/// Description of a segment object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footer {
    /// Partition of the segment.
    pub partition: PartitionId,
    /// First offset of the segment.
    pub base: Offset,
    /// Offset after the last record of the segment.
    pub end: Offset,
    /// Leader epoch of the uploader.
    pub writer_epoch: LeaderEpoch,
    /// Bytes of batches, from the object's start.
    pub data_bytes: u64,
    /// CRC-32C of the batches.
    pub data_crc: u32,
    /// Largest timestamp of the records, in milliseconds.
    pub max_timestamp_ms: i64,
    /// Epoch and start offset of each leader up to `end`, both ascending. The first may lie below `base`.
    pub epochs: Vec<(LeaderEpoch, Offset)>,
    /// Index entries, ascending in offset and position. The first is (`base`, 0).
    pub index: Vec<SegmentIndexEntry>,
    /// Producer state at `end`.
    pub producers: Bytes,
}

/// The fields of a trailer that locate and check the body and the batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trailer {
    /// Bytes of batches. The body starts after them.
    pub data_bytes: u64,
    /// Size of the body in bytes.
    pub body_bytes: u32,
    data_crc: u32,
    body_crc: u32,
}

impl Trailer {
    /// Parses the trailer at the end of `tail`, which ends where the object ends.
    pub fn parse(tail: &[u8]) -> Result<Self, InvalidObject> {
        let Some((_, bytes)) = tail.split_last_chunk::<TRAILER_BYTES>() else {
            return Err(InvalidObject::Truncated { field: "trailer", missing: TRAILER_BYTES - tail.len() });
        };
        let (fields, end) = bytes.split_at(TRAILER_BYTES - MAGIC.len() - 4);
        let (crc, magic) = end.split_at(4);
        if magic != MAGIC {
            return Err(InvalidObject::Mark { kind: KIND });
        }
        let stored = u32::from_be_bytes(crc.try_into().expect("four bytes"));
        let actual = crc32c::crc32c(fields);
        if stored != actual {
            return Err(InvalidObject::Crc { what: "trailer", stored, actual });
        }
        let mut fields = FieldReader(fields);
        let data_bytes = fields.u64("data bytes")?;
        let body_bytes = fields.u32("body bytes")?;
        let (data_crc, body_crc) = (fields.u32("data crc")?, fields.u32("body crc")?);
        let found = fields.u16("version")?;
        if found != VERSION {
            return Err(InvalidObject::Version { found, known: VERSION });
        }
        Ok(Self { data_bytes, body_bytes, data_crc, body_crc })
    }

    /// Returns the number of bytes of body and trailer. To parse the footer, that many bytes at the object's end must
    /// be read.
    pub fn footer_bytes(&self) -> u64 {
        u64::from(self.body_bytes) + TRAILER_BYTES as u64
    }
}

impl Footer {
    /// Encodes body and trailer, which follow the batches in the object.
    pub fn encode(&self) -> Bytes {
        let capacity = 128 + self.epochs.len() * EPOCH_BYTES + self.index.len() * ENTRY_BYTES + self.producers.len();
        let mut out = BytesMut::with_capacity(capacity);
        put_partition(&mut out, self.partition);
        out.put_u64(self.base.get());
        out.put_u64(self.end.get());
        out.put_u32(self.writer_epoch.0);
        out.put_u64(self.data_bytes);
        out.put_i64(self.max_timestamp_ms);
        put_count(&mut out, self.epochs.len());
        for (epoch, start) in &self.epochs {
            out.put_u32(epoch.0);
            out.put_u64(start.get());
        }
        put_count(&mut out, self.index.len());
        for entry in &self.index {
            out.put_u64(entry.offset.get());
            out.put_u64(entry.position);
            out.put_i64(entry.max_timestamp_ms);
        }
        put_count(&mut out, self.producers.len());
        out.put_slice(&self.producers);

        let body_crc = crc32c::crc32c(&out);
        let body_bytes = out.len();
        out.put_u64(self.data_bytes);
        put_count(&mut out, body_bytes);
        out.put_u32(self.data_crc);
        out.put_u32(body_crc);
        out.put_u16(VERSION);
        out.put_bytes(0, 6);
        out.put_u32(0);
        let crc = crc32c::crc32c(&out[body_bytes..]);
        out.put_u32(crc);
        out.put_slice(MAGIC);
        debug_assert_eq!(out.len() - body_bytes, TRAILER_BYTES);
        out.freeze()
    }

    /// Parses body and trailer at the end of `tail`, which ends where the object ends.
    ///
    /// # Errors
    /// `Truncated` if `tail` begins after the start of the body ([`Trailer::footer_bytes`] returns the needed length).
    /// Any [`InvalidObject`] if body or trailer is invalid.
    pub fn parse(tail: &[u8]) -> Result<Self, InvalidObject> {
        let trailer = Trailer::parse(tail)?;
        let before_trailer = &tail[..tail.len() - TRAILER_BYTES];
        let body_bytes = trailer.body_bytes as usize;
        let start = before_trailer
            .len()
            .checked_sub(body_bytes)
            .ok_or_else(|| InvalidObject::Truncated { field: "body", missing: body_bytes - before_trailer.len() })?;
        let body = &before_trailer[start..];
        let actual = crc32c::crc32c(body);
        if actual != trailer.body_crc {
            return Err(InvalidObject::Crc { what: "footer", stored: trailer.body_crc, actual });
        }
        let footer = Self::parse_body(&mut FieldReader(body), &trailer)?;
        footer.check()?;
        Ok(footer)
    }

    /// Parses the body. The CRC of the data is in the trailer, not in the body.
    fn parse_body(body: &mut FieldReader<'_>, trailer: &Trailer) -> Result<Self, InvalidObject> {
        let partition = body.partition()?;
        let (base, end) = (body.offset("base")?, body.offset("end")?);
        let writer_epoch = body.epoch("writer's epoch")?;
        let data_bytes = body.u64("data bytes")?;
        if data_bytes != trailer.data_bytes {
            return Err(InvalidObject::Contradiction { reason: "body and trailer contain different data lengths" });
        }
        let max_timestamp_ms = body.i64("largest timestamp")?;
        let epochs = (0..body.count(EPOCH_BYTES, "epochs")?)
            .map(|_| Ok((body.epoch("epoch")?, body.offset("epoch start")?)))
            .collect::<Result<_, _>>()?;
        let index = (0..body.count(ENTRY_BYTES, "index")?)
            .map(|_| {
                Ok(SegmentIndexEntry {
                    offset: body.offset("index offset")?,
                    position: body.u64("index position")?,
                    max_timestamp_ms: body.i64("index timestamp")?,
                })
            })
            .collect::<Result<_, _>>()?;
        let count = body.count(1, "producer state")?;
        let producers = Bytes::copy_from_slice(body.bytes(count, "producer state")?);
        body.done()?;
        Ok(Self {
            partition,
            base,
            end,
            writer_epoch,
            data_bytes,
            data_crc: trailer.data_crc,
            max_timestamp_ms,
            epochs,
            index,
            producers,
        })
    }

    /// Checks the invariants on which reads rely: a non-empty range, an ascending index from the base, and ascending
    /// leader epochs that cover the segment.
    fn check(&self) -> Result<(), InvalidObject> {
        let refuse = |reason| Err(InvalidObject::Contradiction { reason });
        if self.base >= self.end {
            return refuse("the range of offsets is empty or reversed");
        }
        let first = self.index.first();
        if first.is_none_or(|first| first.offset != self.base || first.position != 0) {
            return refuse("the index does not start at the segment's base");
        }
        let ascending =
            |pair: &[SegmentIndexEntry]| pair[0].offset < pair[1].offset && pair[0].position < pair[1].position;
        let inside = |last: &SegmentIndexEntry| last.offset < self.end && last.position < self.data_bytes;
        if !self.index.windows(2).all(ascending) || !self.index.last().is_some_and(inside) {
            return refuse("the index is not ascending, or extends beyond the segment");
        }
        if !self.epochs.windows(2).all(|pair| pair[0].0 < pair[1].0 && pair[0].1 <= pair[1].1) {
            return refuse("the leader epochs are not ascending");
        }
        if self.epochs.first().is_none_or(|first| first.1 > self.base) {
            return refuse("the leader epochs do not cover the segment");
        }
        Ok(())
    }

    /// Returns the index interval that contains `offset`, and the position of the interval's end. The segment must
    /// contain `offset`.
    pub fn interval_of(&self, offset: Offset) -> (SegmentIndexEntry, u64) {
        let index = self.index.partition_point(|entry| entry.offset <= offset).saturating_sub(1);
        (self.index[index], self.index.get(index + 1).map_or(self.data_bytes, |next| next.position))
    }

    /// Returns the first index interval whose largest timestamp is `timestamp_ms` or later.
    pub fn interval_at_time(&self, timestamp_ms: i64) -> Option<SegmentIndexEntry> {
        self.index.iter().find(|entry| entry.max_timestamp_ms >= timestamp_ms).copied()
    }

    /// Returns the leader epoch in which `offset` was written; `None` below the first epoch.
    pub fn epoch_of(&self, offset: Offset) -> Option<LeaderEpoch> {
        epoch_of(&self.epochs, offset)
    }
}

/// Returns the leader epoch in which `offset` was written, from an ascending list of (epoch, start offset); `None`
/// below the first start offset.
pub fn epoch_of(epochs: &[(LeaderEpoch, Offset)], offset: Offset) -> Option<LeaderEpoch> {
    let after = epochs.partition_point(|(_, start)| *start <= offset);
    after.checked_sub(1).map(|index| epochs[index].0)
}

/// Builds a footer from the batches of a segment.
#[derive(Clone, Debug)]
pub struct FooterBuilder {
    footer: Footer,
    /// Minimum size of an index interval, in bytes.
    interval_bytes: u64,
}

impl FooterBuilder {
    /// Creates a builder for a segment that starts at `base`. `data_bytes` is the expected size of its batches, which
    /// determines the size of the index intervals.
    pub fn new(
        partition: PartitionId,
        base: Offset,
        data_bytes: u64,
        writer_epoch: LeaderEpoch,
        epochs: Vec<(LeaderEpoch, Offset)>,
    ) -> Self {
        Self {
            footer: Footer {
                partition,
                base,
                end: base,
                writer_epoch,
                data_bytes: 0,
                data_crc: 0,
                max_timestamp_ms: i64::MIN,
                epochs,
                index: Vec::new(),
                producers: Bytes::new(),
            },
            interval_bytes: MIN_INDEX_INTERVAL_BYTES.max(data_bytes.div_ceil(MAX_ENTRIES)),
        }
    }

    /// Returns the offset of the first batch.
    pub fn base(&self) -> Offset {
        self.footer.base
    }

    /// Returns the offset after the last batch.
    pub fn end(&self) -> Offset {
        self.footer.end
    }

    /// Adds the next batch. The caller has checked that the batch starts at [`FooterBuilder::end`].
    pub fn push(&mut self, batch: &Batch) {
        debug_assert_eq!(batch.base_offset(), self.footer.end, "batches are contiguous");
        let footer = &mut self.footer;
        let max_timestamp_ms = batch.max_timestamp();
        let position = footer.data_bytes;
        match footer.index.last_mut() {
            Some(last) if position - last.position < self.interval_bytes => {
                last.max_timestamp_ms = last.max_timestamp_ms.max(max_timestamp_ms);
            }
            _ => footer.index.push(SegmentIndexEntry { offset: batch.base_offset(), position, max_timestamp_ms }),
        }
        footer.max_timestamp_ms = footer.max_timestamp_ms.max(max_timestamp_ms);
        footer.data_crc = crc32c::crc32c_append(footer.data_crc, batch.header());
        footer.data_crc = crc32c::crc32c_append(footer.data_crc, batch.records_bytes());
        footer.data_bytes += batch.encoded_len() as u64;
        footer.end = batch.end_offset();
    }

    /// Returns the footer with this producer state. Leaves out the epochs that begin at or after the end, in which no
    /// batch of this segment was written.
    ///
    /// # Panics
    /// If no batch was added.
    pub fn finish(self, producers: Bytes) -> Footer {
        let mut footer = Footer { producers, ..self.footer };
        footer.epochs.retain(|(_, start)| *start < footer.end);
        debug_assert_eq!(footer.check(), Ok(()), "a built footer is valid");
        assert!(!footer.index.is_empty(), "a segment object holds at least one batch");
        footer
    }
}
