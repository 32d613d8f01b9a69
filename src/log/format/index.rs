//! Offset and time index of a segment: the position at which a read for an offset or a timestamp starts. The index is a
//! cache, and is rebuilt from the segment if one of its files is missing, short or invalid.

use bytes::{Buf, BufMut, BytesMut};

use crate::model::Offset;

/// Minimum distance between two index entries, in bytes of the segment.
pub(in crate::log) const MIN_INTERVAL_BYTES: u64 = 4096;

/// Magic bytes of the offset index file and of the time index file.
const OFFSETS: &[u8; 8] = b"STRLOIX1";
const TIMES: &[u8; 8] = b"STRLTIX1";
/// Bytes of the header: magic 8, base 8, segment bytes 8, count 4.
const HEADER_BYTES: usize = 28;
/// Bytes of an entry: offset or timestamp 8, position 4.
const ENTRY_BYTES: usize = 12;

/// A batch that can be found without reading the batches before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexEntry {
    /// Base offset of the batch.
    pub offset: Offset,
    /// Position of the batch in the file.
    pub position: u32,
    /// Largest timestamp of the earlier batches of the segment; `i64::MIN` if there are none.
    pub max_before: i64,
}

/// Entries of one segment, beginning with its first batch. Positions, offsets and times never decrease.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::log) struct Index {
    entries: Vec<IndexEntry>,
}

impl Index {
    /// Adds an entry for a batch if it is the first one, or starts at least [`MIN_INTERVAL_BYTES`] after the last
    /// entry. `max_before` is the largest timestamp of the batches before it.
    pub(in crate::log) fn add_batch(&mut self, offset: Offset, position: u64, max_before: i64) {
        let due = self.entries.last().is_none_or(|last| position >= u64::from(last.position) + MIN_INTERVAL_BYTES);
        if let (true, Ok(position)) = (due, u32::try_from(position)) {
            self.entries.push(IndexEntry { offset, position, max_before });
        }
    }

    pub(in crate::log) fn entries(&self) -> &[IndexEntry] {
        &self.entries
    }

    /// Returns the last entry at or before `offset`, where a read of that offset starts.
    pub(in crate::log) fn at(&self, offset: Offset) -> Option<IndexEntry> {
        let after = self.entries.partition_point(|entry| entry.offset <= offset);
        after.checked_sub(1).map(|i| self.entries[i])
    }

    /// Returns the last entry before which every timestamp of the segment is below `timestamp`.
    pub(in crate::log) fn before_time(&self, timestamp: i64) -> Option<IndexEntry> {
        let after = self.entries.partition_point(|entry| entry.max_before < timestamp);
        after.checked_sub(1).map(|i| self.entries[i])
    }

    /// Returns the content of the offset index and of the time index, for a segment of `segment_bytes`.
    pub(in crate::log) fn encode(&self, base: Offset, segment_bytes: u64) -> (BytesMut, BytesMut) {
        let header = |magic: &[u8; 8]| {
            let mut out = BytesMut::with_capacity(HEADER_BYTES + self.entries.len() * ENTRY_BYTES + 4);
            out.put_slice(magic);
            out.put_u64(base.get());
            out.put_u64(segment_bytes);
            out.put_u32(u32::try_from(self.entries.len()).unwrap_or(u32::MAX));
            out
        };
        let (mut offsets, mut times) = (header(OFFSETS), header(TIMES));
        for entry in &self.entries {
            offsets.put_u64(entry.offset.get());
            offsets.put_u32(entry.position);
            times.put_i64(entry.max_before);
            times.put_u32(entry.position);
        }
        for file in [&mut offsets, &mut times] {
            let crc = crc32c::crc32c(file);
            file.put_u32(crc);
        }
        (offsets, times)
    }

    /// Decodes an index from its two files, if both are intact and describe this segment at its current length.
    pub(in crate::log) fn decode(offsets: &[u8], times: &[u8], base: Offset, segment_bytes: u64) -> Option<Self> {
        let mut offsets = verified_entries(offsets, OFFSETS, base, segment_bytes)?;
        let mut times = verified_entries(times, TIMES, base, segment_bytes)?;
        if offsets.len() != times.len() {
            return None;
        }
        let mut entries = Vec::with_capacity(offsets.len() / ENTRY_BYTES);
        while offsets.has_remaining() {
            let (offset, position) = (Offset::new(offsets.get_u64())?, offsets.get_u32());
            let (max_before, time_position) = (times.get_i64(), times.get_u32());
            if position != time_position || u64::from(position) >= segment_bytes || offset < base {
                return None;
            }
            entries.push(IndexEntry { offset, position, max_before });
        }
        let is_ordered =
            entries.is_sorted_by(|a, b| a.position < b.position && a.offset < b.offset && a.max_before <= b.max_before);
        let is_complete = match entries.first() {
            Some(first) => first.offset == base && first.position == 0,
            None => segment_bytes == 0,
        };
        (is_ordered && is_complete).then_some(Self { entries })
    }
}

/// Returns the encoded entries of one file. Returns `None` if the file is corrupt, or describes another segment or
/// length.
fn verified_entries<'a>(file: &'a [u8], magic: &[u8; 8], base: Offset, segment_bytes: u64) -> Option<&'a [u8]> {
    let (content, crc) = file.split_at_checked(file.len().checked_sub(4)?)?;
    if crc32c::crc32c(content).to_be_bytes() != crc {
        return None;
    }
    let mut header = content.get(..HEADER_BYTES)?;
    let is_match = header.get(..8)? == magic;
    header.advance(8);
    let is_match = is_match && header.get_u64() == base.get() && header.get_u64() == segment_bytes;
    let count = usize::try_from(header.get_u32()).ok()?;
    let entries = &content[HEADER_BYTES..];
    (is_match && entries.len().is_multiple_of(ENTRY_BYTES) && entries.len() / ENTRY_BYTES == count).then_some(entries)
}
