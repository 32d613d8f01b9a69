//! Byte format of the journal: frames of entries.
//!
//! ```text
//! frame, at a multiple of 4096 bytes:
//!   0 magic 8 │ 8 crc u32 of byte 12 to the end of the directory │ 12 directory id 16 │ 28 sequence u64
//!  36 entries u32 │ 40 bytes of the frame u32, padded to 4096 │ 44 the directory: an 80-byte header per entry
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
const CRC_FROM: usize = 12;
/// Maximum sequence and generation. Each frame and each change adds one, so written values stay far below it and the
/// next value always exists.
pub(in crate::log) const MAX_NUMBER: u64 = i64::MAX.unsigned_abs();
pub(in crate::log) const FRAME_HEADER_BYTES: usize = 44;
pub(in crate::log) const ENTRY_HEADER_BYTES: usize = 80;

/// Operation that an entry records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::log) enum EntryKind {
    /// Creation of an empty replica at `base`.
    Create = 1,
    /// Batches `base..end` at `position` of `segment`; the payload is their bytes.
    Append = 2,
    /// Sync of all data below `end` in the segments.
    Synced = 3,
    /// Start of a truncation to `base`.
    Truncate = 4,
    /// Start of a reset to `base`.
    Reset = 5,
    /// Start of the replica's deletion.
    Delete = 6,
    /// Completion of the preceding truncation, reset or deletion, which is synced. No earlier entry matters for the
    /// replica.
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

/// An entry without its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::log) struct EntryHeader {
    pub(in crate::log) kind: EntryKind,
    pub(in crate::log) id: PartitionId,
    pub(in crate::log) generation: u64,
    pub(in crate::log) base: Offset,
    pub(in crate::log) end: Offset,
    pub(in crate::log) segment: Offset,
    pub(in crate::log) position: u64,
    pub(in crate::log) epoch: Option<LeaderEpoch>,
}

/// A decoded entry: its header, and the range of its payload in the frame.
#[derive(Clone, Debug)]
pub(in crate::log) struct DecodedEntry {
    pub(in crate::log) head: EntryHeader,
    pub(in crate::log) payload: std::ops::Range<usize>,
    headers_crc: u32,
}

/// The decoded and verified directory of a frame.
#[derive(Clone, Debug)]
pub(in crate::log) struct DecodedFrame {
    pub(in crate::log) sequence: u64,
    pub(in crate::log) bytes: usize,
    pub(in crate::log) entries: Vec<DecodedEntry>,
}

/// Returns the length of a frame with these numbers of entries and payload bytes.
pub(in crate::log) fn max_frame_bytes(entries: usize, payload: usize) -> usize {
    (FRAME_HEADER_BYTES + entries * ENTRY_HEADER_BYTES + payload).next_multiple_of(BLOCK)
}

/// Writes a frame into `out`, which must have exactly the length of the frame.
pub(in crate::log) fn encode<'a>(
    out: &mut [u8],
    directory: Uuid,
    sequence: u64,
    entries: impl ExactSizeIterator<Item = (&'a EntryHeader, &'a [Batch])>,
) {
    let total = out.len();
    let count = entries.len();
    let directory_end = FRAME_HEADER_BYTES + count * ENTRY_HEADER_BYTES;
    let (front, mut payload) = out.split_at_mut(directory_end);
    let mut heads = &mut front[CRC_FROM..];
    heads.put_slice(directory.as_bytes());
    heads.put_u64(sequence);
    heads.put_u32(u32::try_from(count).unwrap_or(u32::MAX));
    heads.put_u32(u32::try_from(total).unwrap_or(u32::MAX));
    for (head, batches) in entries {
        let (mut bytes, mut crc) = (0, 0);
        for batch in batches {
            payload.put_slice(batch.header());
            payload.put_slice(batch.records_bytes());
            bytes += batch.encoded_len();
            crc = crc32c::crc32c_append(crc, batch.header());
        }
        heads.put_u8(head.kind as u8);
        heads.put_bytes(0, 3);
        heads.put_u32(head.id.number);
        heads.put_slice(head.id.topic.as_bytes());
        heads.put_u64(head.generation);
        heads.put_u64(head.base.get());
        heads.put_u64(head.end.get());
        heads.put_u64(head.segment.get());
        heads.put_u64(head.position);
        heads.put_u32(u32::try_from(bytes).unwrap_or(u32::MAX));
        heads.put_u32(crc);
        heads.put_i32(head.epoch.map_or(-1, LeaderEpoch::as_i32));
        heads.put_u32(0);
    }
    payload.fill(0);
    front[..8].copy_from_slice(MAGIC);
    let crc = crc32c::crc32c(&front[CRC_FROM..]);
    front[8..CRC_FROM].copy_from_slice(&crc.to_be_bytes());
}

/// Returns the data directory that wrote the frame at the front of `bytes`, if the frame's own directory is intact.
pub(in crate::log) fn owner(bytes: &[u8]) -> Option<Uuid> {
    let mut head = bytes.strip_prefix(MAGIC)?.get(..FRAME_HEADER_BYTES - MAGIC.len())?;
    let crc = head.get_u32();
    let id = Uuid::from_slice(head.get(..16)?).ok()?;
    head.advance(24);
    let end = usize::try_from(head.get_u32()).ok()?.checked_mul(ENTRY_HEADER_BYTES)?.checked_add(FRAME_HEADER_BYTES)?;
    (crc32c::crc32c(bytes.get(CRC_FROM..end)?) == crc).then_some(id)
}

/// Decodes the frame at the front of `bytes`. Returns `None` if its directory is not intact, belongs to another data
/// directory, or contains a value that is never written.
pub(in crate::log) fn decode(bytes: &[u8], directory: Uuid) -> Option<DecodedFrame> {
    let mut head = bytes.get(..FRAME_HEADER_BYTES)?;
    if &head[..8] != MAGIC || &head[CRC_FROM..CRC_FROM + 16] != directory.as_bytes() {
        return None;
    }
    head.advance(8);
    let crc = head.get_u32();
    head.advance(16);
    let sequence = Some(head.get_u64()).filter(|sequence| *sequence <= MAX_NUMBER)?;
    let count = usize::try_from(head.get_u32()).ok()?;
    let total = usize::try_from(head.get_u32()).ok()?;
    let directory_end = count.checked_mul(ENTRY_HEADER_BYTES)?.checked_add(FRAME_HEADER_BYTES)?;
    if total > bytes.len() || directory_end > total || !total.is_multiple_of(BLOCK) || total == 0 {
        return None;
    }
    if crc32c::crc32c(&bytes[CRC_FROM..directory_end]) != crc {
        return None;
    }
    let mut entries = Vec::with_capacity(count);
    let mut at = directory_end;
    for mut header in bytes[FRAME_HEADER_BYTES..directory_end].chunks_exact(ENTRY_HEADER_BYTES) {
        let kind = EntryKind::from_byte(header.get_u8())?;
        header.advance(3);
        let number = header.get_u32();
        let mut topic = [0; 16];
        header.copy_to_slice(&mut topic);
        let id = PartitionId::new(TopicId::from_bytes(topic), number);
        let generation = Some(header.get_u64()).filter(|generation| *generation <= MAX_NUMBER)?;
        let (base, end) = (Offset::new(header.get_u64())?, Offset::new(header.get_u64())?);
        let (segment, position) = (Offset::new(header.get_u64())?, header.get_u64());
        let payload = at..at.checked_add(usize::try_from(header.get_u32()).ok()?)?;
        let headers_crc = header.get_u32();
        let epoch = LeaderEpoch::from_i32(header.get_i32());
        // Positions in a segment are 32 bits wide.
        let segment_end = position.checked_add(payload.len() as u64)?;
        if payload.end > total || segment_end > u64::from(u32::MAX) {
            return None;
        }
        at = payload.end;
        let head = EntryHeader { kind, id, generation, base, end, segment, position, epoch };
        entries.push(DecodedEntry { head, payload, headers_crc });
    }
    Some(DecodedFrame { sequence, bytes: total, entries })
}

impl DecodedEntry {
    /// Returns true if the payload is intact: complete, contiguous batches with the headers that the entry covers.
    pub(in crate::log) fn is_intact(&self, frame: &Bytes) -> bool {
        if self.head.kind != EntryKind::Append {
            return self.payload.is_empty();
        }
        let mut rest = frame.slice(self.payload.clone());
        let (mut crc, mut expected) = (0, self.head.base);
        while !rest.is_empty() {
            match Batch::split_from(&mut rest) {
                Ok(batch) if batch.base_offset() == expected => {
                    crc = crc32c::crc32c_append(crc, batch.header());
                    expected = batch.end_offset();
                }
                _ => return false,
            }
        }
        crc == self.headers_crc && expected == self.head.end
    }
}
