//! `{base}.snapshot`: epoch history and producer state at the start of a segment. With it a truncation or an upload
//! reads no earlier segment. A snapshot is a cache like the indexes, except that of the first segment. That snapshot is
//! durable, because no other file holds the state before it.

use std::{io, path::Path};

use bytes::{Buf, BufMut, BytesMut};

use super::{
    epochs::EpochHistory,
    producers::ProducerTable,
    segment::{self, SegmentInfo, name},
};
use crate::{
    log::disk::{Disk, OpenMode},
    model::Offset,
    record::Batch,
};

const MAGIC: &[u8; 8] = b"STRLSNP2";

/// File name extension of the snapshot with which a reset starts, until the files of the old log are removed.
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

    /// Returns the last intact snapshot at one of `bases`, and the index of its base. The data between it and the last
    /// base must be read. If no base has one, not even the first, nothing precedes the log. Fails with `InvalidData` if
    /// the snapshot at the first base is corrupt, because nothing replaces it.
    pub(in crate::log) fn read_last(disk: &dyn Disk, dir: &Path, bases: &[Offset]) -> io::Result<(usize, Self)> {
        for (number, base) in bases.iter().enumerate().rev() {
            match Self::read(disk, dir, *base) {
                Ok(Some(tables)) => return Ok((number, tables)),
                Err(error) if number == 0 => return Err(error),
                // The caller then reads the previous segment as well.
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

/// Adds a batch to the tables.
pub(in crate::log) fn record_batch(epochs: &mut EpochHistory, producers: &mut ProducerTable, batch: &Batch) {
    if let Some(epoch) = batch.leader_epoch()
        && !epochs.record(epoch, batch.base_offset())
    {
        debug_assert!(false, "the scan rejects epochs that decrease");
    }
    producers.record_batch(batch);
}

/// Returns the description of the segment that contains `to`, ending there, and the epoch history and producer state at
/// `to`. Reads intact segments from a snapshot on: that of the segment that contains `to`, or of an earlier one.
pub(in crate::log) fn tables_at(
    disk: &dyn Disk,
    dir: &Path,
    segments: &[SegmentInfo],
    to: Offset,
) -> io::Result<(SegmentInfo, Snapshot, Option<String>)> {
    let holding = segments.iter().rposition(|info| info.base <= to).unwrap_or(0);
    let bases: Vec<Offset> = segments[..=holding].iter().map(|info| info.base).collect();
    let (start, mut tables) = Snapshot::read_last(disk, dir, &bases)?;
    let mut last = segments[holding].emptied();
    for info in &segments[start..=holding] {
        last = info.emptied();
        if info.bytes == 0 || last.base >= to {
            continue;
        }
        let file = disk.open(&dir.join(name(info.base, "log")), OpenMode::Read)?;
        let epoch = tables.epochs.last().map(|(epoch, _)| epoch);
        let mut is_below = true;
        let end = segment::scan(&*file, info.bytes, 0, info.base, epoch, |_, batch| {
            is_below &= batch.end_offset() <= to;
            if is_below {
                record_batch(&mut tables.epochs, &mut tables.producers, batch);
                last.extend(batch);
            }
        })?;
        if end.damage.is_some() && last.end < to {
            return Ok((last, tables, end.damage));
        }
    }
    Ok((last, tables, None))
}
