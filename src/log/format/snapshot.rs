//! `{base}.snapshot`: epoch history and producer state at the start of a segment. With it a truncation or an upload
//! reads no earlier segment. A snapshot is a cache like the indexes, except the one at the base of the first segment.
//! That snapshot is durable, because no other file holds the state before the local start.

use std::{io, path::Path};

use bytes::{Buf, BufMut, BytesMut};

use super::{epochs::EpochHistory, producers::ProducerTable, segment::name};
use crate::{log::disk::Disk, model::Offset, record::Batch};

const MAGIC: &[u8; 8] = b"STRLSNP2";

/// File name extension of the snapshot that a reset writes first, until the files of the old log are removed.
pub(in crate::log) const RESET_EXTENSION: &str = "reset";

/// Epoch history and producer state at one offset.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::log) struct Snapshot {
    pub(in crate::log) epochs: EpochHistory,
    pub(in crate::log) producers: ProducerTable,
}

impl Snapshot {
    /// Reads the snapshot at `base` in a replica's directory; `None` if it is missing. Fails with `InvalidData` if it
    /// is corrupt.
    pub(in crate::log) fn read(disk: &dyn Disk, dir: &Path, base: Offset) -> io::Result<Option<Self>> {
        let path = dir.join(name(base, "snapshot"));
        let corrupt = || io::Error::new(io::ErrorKind::InvalidData, format!("{} is corrupt", path.display()));
        match disk.read(&path) {
            Ok(file) => Self::decode(&file, base).map(Some).ok_or_else(corrupt),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Returns the last intact snapshot at one of `bases`, and the index of its base. The caller must read the segments
    /// from that base on. If no later snapshot is intact and the first base has none, nothing precedes the log. The
    /// result is then an empty snapshot at the first base. If no later snapshot is intact and that at the first base is
    /// corrupt, fails with `InvalidData`, because nothing replaces it.
    pub(in crate::log) fn read_last(disk: &dyn Disk, dir: &Path, bases: &[Offset]) -> io::Result<(usize, Self)> {
        for (index, base) in bases.iter().enumerate().rev() {
            match Self::read(disk, dir, *base) {
                Ok(Some(snapshot)) => return Ok((index, snapshot)),
                Err(error) if index == 0 => return Err(error),
                // An earlier snapshot is used, and the caller then reads one more segment.
                Ok(None) | Err(_) => {}
            }
        }
        Ok((0, Self::default()))
    }

    pub(in crate::log) fn encode(epochs: &EpochHistory, producers: &ProducerTable, at: Offset) -> BytesMut {
        let mut out = BytesMut::new();
        out.put_slice(MAGIC);
        out.put_u64(at.get());
        epochs.encode(&mut out);
        producers.encode(&mut out);
        let crc = crc32c::crc32c(&out);
        out.put_u32(crc);
        out
    }

    /// Decodes a snapshot, if it is intact and at this offset.
    pub(in crate::log) fn decode(file: &[u8], at: Offset) -> Option<Self> {
        let (mut content, crc) = file.split_at_checked(file.len().checked_sub(4)?)?;
        if crc32c::crc32c(content).to_be_bytes() != crc || content.get(..8)? != MAGIC {
            return None;
        }
        content.advance(8);
        if content.try_get_u64().ok()? != at.get() {
            return None;
        }
        let epochs = EpochHistory::decode(&mut content)?;
        let producers = ProducerTable::decode(&mut content)?;
        let is_valid = epochs.last().is_none_or(|(_, start)| start <= at);
        (is_valid && content.is_empty()).then_some(Self { epochs, producers })
    }
}

/// Adds the next batch of the log to its epoch history and producer state.
pub(in crate::log) fn record_batch(epochs: &mut EpochHistory, producers: &mut ProducerTable, batch: &Batch) {
    if let Some(epoch) = batch.leader_epoch()
        && !epochs.record(epoch, batch.base_offset())
    {
        debug_assert!(false, "the scan rejects epochs that decrease");
    }
    producers.record_batch(batch);
}
