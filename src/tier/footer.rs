//! The end of a segment object: what lies before it, and how to find a place in it.
//!
//! ```text
//! batches as they are │ body │ trailer (44 bytes)
//!
//! body     topic id 16 │ partition u32 │ base u64 │ end u64 │ writer's epoch u32 │ data bytes u64
//!          │ largest timestamp i64
//!          │ n u32 │ n × (epoch u32, first offset u64)                           leader epochs up to `end`
//!          │ n u32 │ n × (offset u64, position u64, largest timestamp i64)       one entry for each stretch of batches
//!          │ n u32 │ n bytes                                                     producer state at `end`, opaque here
//! trailer  data bytes u64 │ body bytes u32 │ CRC of data u32 │ CRC of body u32 │ version u16
//!          │ ten zero bytes │ CRC of the trailer so far u32 │ "STRNDSEG"
//! ```
//!
//! Big-endian; every CRC is CRC-32C. One entry serves both indexes: by offset it finds the stretch that holds an
//! offset, by time the first stretch that holds a timestamp at or after a given one. A stretch is at least 4 KiB, and
//! wider where a segment would have more than [`MAX_ENTRIES`] of them, so that a footer stays below a MiB.
//!
//! Pure: no I/O, no clock, no randomness.

use bytes::{BufMut, Bytes, BytesMut};

use super::wire::{Invalid, Reader, put_count, put_partition};
use crate::{
    model::{LeaderEpoch, Offset, PartitionId},
    record::Batch,
};

/// Bytes of the trailer, which ends every segment object.
pub const TRAILER_BYTES: usize = 44;

/// Most index entries of one segment.
pub const MAX_ENTRIES: u64 = 16_384;

const LEAST_STRETCH_BYTES: u64 = 4096;
const MARK: &[u8; 8] = b"STRNDSEG";
const VERSION: u16 = 1;
const KIND: &str = "segment object";
const ENTRY_BYTES: usize = 24;
const EPOCH_BYTES: usize = 12;

/// A stretch of consecutive batches: from this entry's position to the next one's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Base offset of its first batch.
    pub offset: Offset,
    /// Where that batch starts in the object.
    pub position: u64,
    /// Largest timestamp in the stretch, in milliseconds.
    pub max_timestamp_ms: i64,
}

/// What a segment object says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footer {
    /// Whose data it is.
    pub partition: PartitionId,
    /// First offset.
    pub base: Offset,
    /// Offset after the last.
    pub end: Offset,
    /// The leader epoch of the uploader.
    pub writer_epoch: LeaderEpoch,
    /// Bytes of batches, from the object's start.
    pub data_bytes: u64,
    /// CRC-32C of them.
    pub data_crc: u32,
    /// Largest timestamp of its records.
    pub max_timestamp_ms: i64,
    /// Epoch and first offset of each leader up to `end`, both ascending. The first may lie before `base`.
    pub epochs: Vec<(LeaderEpoch, Offset)>,
    /// Ascending in offset and position; the first is (`base`, 0).
    pub stretches: Vec<Stretch>,
    /// Producer state at `end`.
    pub producers: Bytes,
}

/// The part of a trailer that finds and checks the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trailer {
    /// Bytes of batches; the body starts there.
    pub data_bytes: u64,
    /// Bytes of the body.
    pub body_bytes: u32,
    data_crc: u32,
    body_crc: u32,
}

impl Trailer {
    /// Reads the trailer off the end of `tail`, which ends where the object ends.
    pub fn parse(tail: &[u8]) -> Result<Self, Invalid> {
        let Some((_, bytes)) = tail.split_last_chunk::<TRAILER_BYTES>() else {
            return Err(Invalid::Truncated { field: "trailer", missing: TRAILER_BYTES - tail.len() });
        };
        let (fields, end) = bytes.split_at(TRAILER_BYTES - MARK.len() - 4);
        let (crc, mark) = end.split_at(4);
        if mark != MARK {
            return Err(Invalid::Mark { kind: KIND });
        }
        let stored = u32::from_be_bytes(crc.try_into().expect("four bytes"));
        let actual = crc32c::crc32c(fields);
        if stored != actual {
            return Err(Invalid::Crc { what: "trailer", stored, actual });
        }
        let mut fields = Reader(fields);
        let data_bytes = fields.u64("data bytes")?;
        let body_bytes = fields.u32("body bytes")?;
        let (data_crc, body_crc) = (fields.u32("data crc")?, fields.u32("body crc")?);
        let found = fields.u16("version")?;
        if found != VERSION {
            return Err(Invalid::Version { found, known: VERSION });
        }
        Ok(Self { data_bytes, body_bytes, data_crc, body_crc })
    }

    /// Bytes of body and trailer: what has to be read off the object's end to open it.
    pub fn footer_bytes(&self) -> u64 {
        u64::from(self.body_bytes) + TRAILER_BYTES as u64
    }
}

impl Footer {
    /// Body and trailer, to be put behind the batches.
    pub fn encode(&self) -> Bytes {
        let capacity =
            128 + self.epochs.len() * EPOCH_BYTES + self.stretches.len() * ENTRY_BYTES + self.producers.len();
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
        put_count(&mut out, self.stretches.len());
        for stretch in &self.stretches {
            out.put_u64(stretch.offset.get());
            out.put_u64(stretch.position);
            out.put_i64(stretch.max_timestamp_ms);
        }
        put_count(&mut out, self.producers.len());
        out.put_slice(&self.producers);

        let body_crc = crc32c::crc32c(&out);
        let body = out.len();
        out.put_u64(self.data_bytes);
        put_count(&mut out, body);
        out.put_u32(self.data_crc);
        out.put_u32(body_crc);
        out.put_u16(VERSION);
        out.put_bytes(0, 6);
        out.put_u32(0);
        let crc = crc32c::crc32c(&out[body..]);
        out.put_u32(crc);
        out.put_slice(MARK);
        debug_assert_eq!(out.len() - body, TRAILER_BYTES);
        out.freeze()
    }

    /// Reads body and trailer off the end of `tail`, which ends where the object ends.
    ///
    /// # Errors
    /// `Truncated` when `tail` begins after the body: [`Trailer::footer_bytes`] says how much is needed.
    pub fn parse(tail: &[u8]) -> Result<Self, Invalid> {
        let trailer = Trailer::parse(tail)?;
        let before = &tail[..tail.len() - TRAILER_BYTES];
        let start = before
            .len()
            .checked_sub(trailer.body_bytes as usize)
            .ok_or_else(|| Invalid::Truncated { field: "body", missing: trailer.body_bytes as usize - before.len() })?;
        let body = &before[start..];
        let actual = crc32c::crc32c(body);
        if actual != trailer.body_crc {
            return Err(Invalid::Crc { what: "footer", stored: trailer.body_crc, actual });
        }
        let footer = Self::parse_body(&mut Reader(body), &trailer)?;
        footer.check()?;
        Ok(footer)
    }

    fn parse_body(body: &mut Reader<'_>, trailer: &Trailer) -> Result<Self, Invalid> {
        let partition = body.partition()?;
        let (base, end) = (body.offset("base")?, body.offset("end")?);
        let writer_epoch = body.epoch("writer's epoch")?;
        let data_bytes = body.u64("data bytes")?;
        if data_bytes != trailer.data_bytes {
            return Err(Invalid::Contradiction { reason: "body and trailer disagree about the data's length" });
        }
        let max_timestamp_ms = body.i64("largest timestamp")?;
        let epochs = (0..body.count(EPOCH_BYTES, "epochs")?)
            .map(|_| Ok((body.epoch("epoch")?, body.offset("epoch start")?)))
            .collect::<Result<_, _>>()?;
        let stretches = (0..body.count(ENTRY_BYTES, "index")?)
            .map(|_| {
                Ok(Stretch {
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
            stretches,
            producers,
        })
    }

    /// What reading relies on, whoever wrote it.
    fn check(&self) -> Result<(), Invalid> {
        let refuse = |reason| Err(Invalid::Contradiction { reason });
        if self.base >= self.end {
            return refuse("the range of offsets is empty or reversed");
        }
        let first = self.stretches.first();
        if first.is_none_or(|first| first.offset != self.base || first.position != 0) {
            return refuse("the index does not begin at the segment's base");
        }
        let ascending = |pair: &[Stretch]| pair[0].offset < pair[1].offset && pair[0].position < pair[1].position;
        let inside = |last: &Stretch| last.offset < self.end && last.position < self.data_bytes;
        if !self.stretches.windows(2).all(ascending) || !self.stretches.last().is_some_and(inside) {
            return refuse("the index is not ascending, or leaves the segment");
        }
        if !self.epochs.windows(2).all(|pair| pair[0].0 < pair[1].0 && pair[0].1 <= pair[1].1) {
            return refuse("the leader epochs are not ascending");
        }
        if self.epochs.first().is_none_or(|first| first.1 > self.base) {
            return refuse("the leader epochs do not cover the segment");
        }
        Ok(())
    }

    /// The stretch that holds `offset`, and where it ends.
    pub fn stretch_of(&self, offset: Offset) -> (Stretch, u64) {
        let at = self.stretches.partition_point(|stretch| stretch.offset <= offset).saturating_sub(1);
        (self.stretches[at], self.stretches.get(at + 1).map_or(self.data_bytes, |next| next.position))
    }

    /// The first stretch that holds a timestamp at or after `timestamp_ms`.
    pub fn stretch_at_time(&self, timestamp_ms: i64) -> Option<Stretch> {
        self.stretches.iter().find(|stretch| stretch.max_timestamp_ms >= timestamp_ms).copied()
    }

    /// The leader epoch that wrote `offset`.
    pub fn epoch_of(&self, offset: Offset) -> Option<LeaderEpoch> {
        epoch_of(&self.epochs, offset)
    }
}

/// The leader epoch that wrote `offset`, by a list of (epoch, first offset).
pub fn epoch_of(epochs: &[(LeaderEpoch, Offset)], offset: Offset) -> Option<LeaderEpoch> {
    let after = epochs.partition_point(|(_, start)| *start <= offset);
    after.checked_sub(1).map(|at| epochs[at].0)
}

/// Gathers a footer while the batches go by.
#[derive(Clone, Debug)]
pub struct FooterBuilder {
    footer: Footer,
    stretch_bytes: u64,
}

impl FooterBuilder {
    /// For a segment that starts at `base` and has about `data_bytes` bytes of batches.
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
                stretches: Vec::new(),
                producers: Bytes::new(),
            },
            stretch_bytes: LEAST_STRETCH_BYTES.max(data_bytes.div_ceil(MAX_ENTRIES)),
        }
    }

    /// Offset of the first batch.
    pub fn base(&self) -> Offset {
        self.footer.base
    }

    /// Offset after the last batch.
    pub fn end(&self) -> Offset {
        self.footer.end
    }

    /// Notes the next batch. The caller has checked that it starts at [`FooterBuilder::end`].
    pub fn push(&mut self, batch: &Batch) {
        debug_assert_eq!(batch.base_offset(), self.footer.end, "batches are contiguous");
        let footer = &mut self.footer;
        let max_timestamp_ms = batch.max_timestamp();
        let position = footer.data_bytes;
        match footer.stretches.last_mut() {
            Some(last) if position - last.position < self.stretch_bytes => {
                last.max_timestamp_ms = last.max_timestamp_ms.max(max_timestamp_ms);
            }
            _ => footer.stretches.push(Stretch { offset: batch.base_offset(), position, max_timestamp_ms }),
        }
        footer.max_timestamp_ms = footer.max_timestamp_ms.max(max_timestamp_ms);
        footer.data_crc = crc32c::crc32c_append(footer.data_crc, batch.head());
        footer.data_crc = crc32c::crc32c_append(footer.data_crc, batch.records_bytes());
        footer.data_bytes += batch.encoded_len() as u64;
        footer.end = batch.end_offset();
    }

    /// The footer. Epochs that begin at or after the end say nothing about this data and are left out.
    ///
    /// # Panics
    /// When no batch was pushed.
    pub fn finish(self, producers: Bytes) -> Footer {
        let mut footer = Footer { producers, ..self.footer };
        footer.epochs.retain(|(_, start)| *start < footer.end);
        debug_assert_eq!(footer.check(), Ok(()), "a built footer is valid");
        assert!(!footer.stretches.is_empty(), "a segment object holds at least one batch");
        footer
    }
}
