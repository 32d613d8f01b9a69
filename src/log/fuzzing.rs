//! Entry points of the fuzzers (`fuzz/entries`) to the private decoders of this module.
//!
//! Each function decodes the bytes of a file and encodes the result again; `None` means that the bytes are invalid. A
//! decoder compares a file with expected values: the id of the data directory, or the base and length of a segment.
//! Here the expected values come from the file itself. Otherwise no input would be accepted.

use bytes::{Buf, Bytes};
use uuid::Uuid;

use super::format::{Checkpoint, Index, Snapshot, entry};
use crate::{model::Offset, record::Batch};

/// Decodes the journal frame at the start of `bytes` with the batches of its entries, and encodes it again. Returns
/// `None` also if the payload of an entry is not intact.
pub fn frame(bytes: &Bytes) -> Option<Vec<u8>> {
    let directory = Uuid::from_slice(bytes.get(12..28)?).ok()?;
    let frame = entry::decode(bytes, directory)?;
    let mut entries = Vec::new();
    let mut payload_bytes = 0;
    for entry in &frame.entries {
        if !entry.is_intact(bytes) {
            return None;
        }
        let mut payload = bytes.slice(entry.payload.clone());
        let mut batches = Vec::new();
        while payload.has_remaining() {
            batches.push(Batch::split_from(&mut payload).ok()?);
        }
        payload_bytes += entry.payload.len();
        entries.push((entry.header, batches));
    }
    let mut out = vec![0; entry::frame_len(entries.len(), payload_bytes)];
    let entries = entries.iter().map(|(header, batches)| (header, batches.as_slice()));
    entry::encode(&mut out, directory, frame.sequence, entries);
    Some(out)
}

/// Decodes a checkpoint and encodes it again.
pub fn checkpoint(file: &[u8]) -> Option<Vec<u8>> {
    let directory = Uuid::from_slice(file.get(8..24)?).ok()?;
    Some(Checkpoint::decode(file, directory)?.encode(directory).to_vec())
}

/// Decodes the offset index and the time index of a segment, and encodes both again.
pub fn index(offsets: &[u8], times: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let mut header = offsets.get(8..24)?;
    let (base, segment_bytes) = (Offset::new(header.get_u64())?, header.get_u64());
    let (offsets, times) = Index::decode(offsets, times, base, segment_bytes)?.encode(base, segment_bytes);
    Some((offsets.to_vec(), times.to_vec()))
}

/// Decodes the snapshot of a segment and encodes it again.
pub fn snapshot(file: &[u8]) -> Option<Vec<u8>> {
    let at = Offset::new(file.get(8..16)?.get_u64())?;
    let Snapshot { epochs, producers } = Snapshot::decode(file, at)?;
    Some(Snapshot::encode(&epochs, &producers, at).to_vec())
}
