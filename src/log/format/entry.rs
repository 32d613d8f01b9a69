//! Byte format of the journal: frames of entries.
//!
//! ```text
//! frame, at a multiple of 4096 bytes:
//!   0 magic 8 │ 8 crc u32 of byte 12 to the end of the entry headers │ 12 data directory id 16 │ 28 sequence u64
//!  36 entries u32 │ 40 bytes of the frame u32, padded to 4096 │ 44 the entry headers, 80 bytes each
//!     then the payloads in order, then zeros
//! entry header:
//!   0 kind u8 │ 1 zero 3 │ 4 partition u32 │ 8 topic id 16 │ 24 generation u64 │ 32 base u64 │ 40 end u64
//!  48 segment u64 │ 56 position u64 │ 64 payload bytes u32 │ 68 crc u32 of the batches' headers │ 72 epoch i32
//!  76 zero 4
//! ```
//! The checksum of an entry covers the headers of its batches. The rest of each batch is covered by the batch's own
//! CRC.

use bytes::{Buf, BufMut, Bytes};
use uuid::Uuid;

use crate::{
    log::disk::BLOCK,
    model::{LeaderEpoch, Offset, PartitionId, TopicId},
    record::Batch,
};

const MAGIC: &[u8; 8] = b"STRLJRN1";
/// Position of the first byte that the frame's checksum covers.
const CRC_FROM: usize = 12;
/// Maximum sequence and generation. Each frame and each change adds one, so written values stay far below it and the
/// next value always exists.
pub(in crate::log) const MAX_NUMBER: u64 = i64::MAX.unsigned_abs();
pub(in crate::log) const FRAME_HEADER_BYTES: usize = 44;
pub(in crate::log) const ENTRY_HEADER_BYTES: usize = 80;

/// Operation of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::log) enum EntryKind {
    /// Creation of an empty replica at `base`.
    Create = 1,
    /// Batches `base..end` at `position` of `segment`; the payload is their bytes.
    Append = 2,
    /// All data below `end` is durable: synced in the segments, or in earlier entries.
    Synced = 3,
    /// Start of a truncation to `base`.
    Truncate = 4,
    /// Start of a reset to `base`.
    Reset = 5,
    /// Start of the replica's deletion.
    Delete = 6,
    /// Completion of the preceding truncation, reset or deletion, which is synced. Replay restores no batches from
    /// earlier entries of the replica.
    Completed = 7,
    /// Move of the log start to `base`.
    LogStart = 8,
    /// Eviction of the segments that end at or below `base`.
    LocalStart = 9,
}

impl EntryKind {
    fn from_byte(byte: u8) -> Option<Self> {
        use EntryKind::*;
        let kinds = [Create, Append, Synced, Truncate, Reset, Delete, Completed, LogStart, LocalStart];
        kinds.into_iter().find(|kind| *kind as u8 == byte)
    }
}

/// An entry without its payload. [`EntryKind`] describes the meaning of the offsets and the position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::log) struct EntryHeader {
    pub(in crate::log) kind: EntryKind,
    pub(in crate::log) id: PartitionId,
    /// Generation of the replica when the entry was created. A truncation, reset or deletion with a higher generation
    /// may have removed the data of the entry.
    pub(in crate::log) generation: u64,
    pub(in crate::log) base: Offset,
    pub(in crate::log) end: Offset,
    /// Base offset of the segment that receives the batches; 0 without batches.
    pub(in crate::log) segment: Offset,
    /// Position of the first batch in the file of the segment; 0 without batches.
    pub(in crate::log) position: u64,
    /// Epoch of the last batch; `None` without batches.
    pub(in crate::log) epoch: Option<LeaderEpoch>,
}

/// A decoded entry: its header, and the range of its payload in the frame.
#[derive(Clone, Debug)]
pub(in crate::log) struct DecodedEntry {
    pub(in crate::log) header: EntryHeader,
    pub(in crate::log) payload: std::ops::Range<usize>,
    /// Checksum of the headers of the batches, as stored in the entry header.
    headers_crc: u32,
}

/// A frame whose headers are decoded and verified. Its payloads are not ([`DecodedEntry::is_intact`]).
#[derive(Clone, Debug)]
pub(in crate::log) struct DecodedFrame {
    pub(in crate::log) sequence: u64,
    /// Length of the frame in bytes, padding included.
    pub(in crate::log) bytes: usize,
    pub(in crate::log) entries: Vec<DecodedEntry>,
}

/// Returns the length of a frame with these numbers of entries and payload bytes.
pub(in crate::log) fn frame_len(entries: usize, payload_bytes: usize) -> usize {
    (FRAME_HEADER_BYTES + entries * ENTRY_HEADER_BYTES + payload_bytes).next_multiple_of(BLOCK)
}

/// Writes a frame of the data directory `directory` into `out`, which must have exactly the length of the frame
/// ([`frame_len`]).
pub(in crate::log) fn encode<'a>(
    out: &mut [u8],
    directory: Uuid,
    sequence: u64,
    entries: impl ExactSizeIterator<Item = (&'a EntryHeader, &'a [Batch])>,
) {
    let total = out.len();
    let count = entries.len();
    let headers_end = FRAME_HEADER_BYTES + count * ENTRY_HEADER_BYTES;
    let (front, mut payload) = out.split_at_mut(headers_end);
    let mut headers = &mut front[CRC_FROM..];
    headers.put_slice(directory.as_bytes());
    headers.put_u64(sequence);
    headers.put_u32(u32::try_from(count).unwrap_or(u32::MAX));
    headers.put_u32(u32::try_from(total).unwrap_or(u32::MAX));
    for (header, batches) in entries {
        let (mut bytes, mut crc) = (0, 0);
        for batch in batches {
            payload.put_slice(batch.header());
            payload.put_slice(batch.records_bytes());
            bytes += batch.encoded_len();
            crc = crc32c::crc32c_append(crc, batch.header());
        }
        headers.put_u8(header.kind as u8);
        headers.put_bytes(0, 3);
        headers.put_u32(header.id.number);
        headers.put_slice(header.id.topic.as_bytes());
        headers.put_u64(header.generation);
        headers.put_u64(header.base.get());
        headers.put_u64(header.end.get());
        headers.put_u64(header.segment.get());
        headers.put_u64(header.position);
        headers.put_u32(u32::try_from(bytes).unwrap_or(u32::MAX));
        headers.put_u32(crc);
        headers.put_i32(header.epoch.map_or(-1, LeaderEpoch::as_i32));
        headers.put_u32(0);
    }
    payload.fill(0);
    front[..8].copy_from_slice(MAGIC);
    let crc = crc32c::crc32c(&front[CRC_FROM..]);
    front[8..CRC_FROM].copy_from_slice(&crc.to_be_bytes());
}

/// Returns the id of the data directory that wrote the frame at the start of `bytes`; `None` if the headers are
/// incomplete or not intact.
pub(in crate::log) fn owner(bytes: &[u8]) -> Option<Uuid> {
    let mut frame_header = bytes.strip_prefix(MAGIC)?.get(..FRAME_HEADER_BYTES - MAGIC.len())?;
    let crc = frame_header.get_u32();
    let id = Uuid::from_slice(frame_header.get(..16)?).ok()?;
    frame_header.advance(24);
    let end = usize::try_from(frame_header.get_u32())
        .ok()?
        .checked_mul(ENTRY_HEADER_BYTES)?
        .checked_add(FRAME_HEADER_BYTES)?;
    (crc32c::crc32c(bytes.get(CRC_FROM..end)?) == crc).then_some(id)
}

/// Decodes the frame at the start of `bytes`. Returns `None` if the frame is longer than `bytes`. Returns `None` also
/// if its headers are not intact, name another data directory, or contain a value that is never written. The payloads
/// are not read.
pub(in crate::log) fn decode(bytes: &[u8], directory: Uuid) -> Option<DecodedFrame> {
    let mut frame_header = bytes.get(..FRAME_HEADER_BYTES)?;
    if &frame_header[..8] != MAGIC || &frame_header[CRC_FROM..CRC_FROM + 16] != directory.as_bytes() {
        return None;
    }
    frame_header.advance(8);
    let crc = frame_header.get_u32();
    frame_header.advance(16);
    let sequence = Some(frame_header.get_u64()).filter(|sequence| *sequence <= MAX_NUMBER)?;
    let count = usize::try_from(frame_header.get_u32()).ok()?;
    let total = usize::try_from(frame_header.get_u32()).ok()?;
    let headers_end = count.checked_mul(ENTRY_HEADER_BYTES)?.checked_add(FRAME_HEADER_BYTES)?;
    if total > bytes.len() || headers_end > total || !total.is_multiple_of(BLOCK) || total == 0 {
        return None;
    }
    if crc32c::crc32c(&bytes[CRC_FROM..headers_end]) != crc {
        return None;
    }
    let mut entries = Vec::with_capacity(count);
    let mut at = headers_end;
    for mut encoded in bytes[FRAME_HEADER_BYTES..headers_end].chunks_exact(ENTRY_HEADER_BYTES) {
        let kind = EntryKind::from_byte(encoded.get_u8())?;
        encoded.advance(3);
        let number = encoded.get_u32();
        let mut topic = [0; 16];
        encoded.copy_to_slice(&mut topic);
        let id = PartitionId::new(TopicId::from_bytes(topic), number);
        let generation = Some(encoded.get_u64()).filter(|generation| *generation <= MAX_NUMBER)?;
        let (base, end) = (Offset::new(encoded.get_u64())?, Offset::new(encoded.get_u64())?);
        let (segment, position) = (Offset::new(encoded.get_u64())?, encoded.get_u64());
        let payload = at..at.checked_add(usize::try_from(encoded.get_u32()).ok()?)?;
        let headers_crc = encoded.get_u32();
        let epoch = LeaderEpoch::from_i32(encoded.get_i32());
        // Positions in a segment are 32 bits wide.
        let segment_end = position.checked_add(payload.len() as u64)?;
        if payload.end > total || segment_end > u64::from(u32::MAX) {
            return None;
        }
        at = payload.end;
        let header = EntryHeader { kind, id, generation, base, end, segment, position, epoch };
        entries.push(DecodedEntry { header, payload, headers_crc });
    }
    Some(DecodedFrame { sequence, bytes: total, entries })
}

impl DecodedEntry {
    /// Returns true if the payload is intact: complete, contiguous batches whose headers match the checksum. An entry
    /// of another kind than an append is intact if its payload is empty. `frame` holds the frame, at least up to the
    /// end of the payload.
    pub(in crate::log) fn is_intact(&self, frame: &Bytes) -> bool {
        if self.header.kind != EntryKind::Append {
            return self.payload.is_empty();
        }
        let mut rest = frame.slice(self.payload.clone());
        let (mut crc, mut expected) = (0, self.header.base);
        while !rest.is_empty() {
            match Batch::split_from(&mut rest) {
                Ok(batch) if batch.base_offset() == expected => {
                    crc = crc32c::crc32c_append(crc, batch.header());
                    expected = batch.end_offset();
                }
                _ => return false,
            }
        }
        crc == self.headers_crc && expected == self.header.end
    }
}
