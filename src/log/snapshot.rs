//! `{base}.snapshot`: the epochs and producers as they were where a segment begins, so that a cut or an upload need not read what lies
//! before. A cache like the indexes, but for that of the first segment: nothing else knows what was before it, and it is durable.

use std::{io, path::Path};

use bytes::{Buf, BufMut, BytesMut};

use super::{disk::Disk, epochs::EpochHistory, producers::ProducerTable, segment::name};
use crate::model::Offset;

const MAGIC: &[u8; 8] = b"STRLSNP2";

/// How the name of a snapshot ends that a reset begins with, until the files of the log before it are gone.
pub(super) const OF_RESET: &str = "reset";

/// Epochs and producers at one offset.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Snapshot {
    pub(super) epochs: EpochHistory,
    pub(super) producers: ProducerTable,
}

impl Snapshot {
    /// The one at `base` in a replica's directory; `None` where there is none. `InvalidData` when it is damaged.
    pub(super) fn read(disk: &dyn Disk, dir: &Path, base: Offset) -> io::Result<Option<Self>> {
        let path = dir.join(name(base, "snapshot"));
        let damaged = || io::Error::new(io::ErrorKind::InvalidData, format!("{} is damaged", path.display()));
        match disk.read(&path) {
            Ok(file) => Self::decode(&file, base).map(Some).ok_or_else(damaged),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The last one that is whole of those at `bases`, and which: what lies between it and the last base has to be read. Where there is none,
    /// not at the first either, nothing was before that. `InvalidData` when the first, which nothing stands in for, is damaged.
    pub(super) fn read_last(disk: &dyn Disk, dir: &Path, bases: &[Offset]) -> io::Result<(usize, Self)> {
        for (number, base) in bases.iter().enumerate().rev() {
            match Self::read(disk, dir, *base) {
                Ok(Some(tables)) => return Ok((number, tables)),
                Err(error) if number == 0 => return Err(error),
                // The segment before it is read as well then.
                Ok(None) | Err(_) => {}
            }
        }
        Ok((0, Self::default()))
    }

    pub(super) fn encode(epochs: &EpochHistory, producers: &ProducerTable, at: Offset) -> BytesMut {
        let mut out = BytesMut::new();
        out.put_slice(MAGIC);
        out.put_u64(at.get());
        epochs.encode(&mut out);
        producers.encode(&mut out);
        let crc = crc32c::crc32c(&out);
        out.put_u32(crc);
        out
    }

    /// The snapshot in a file, if it is whole and of this offset.
    pub(super) fn decode(file: &[u8], at: Offset) -> Option<Self> {
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
        let known = epochs.last().is_none_or(|(_, start)| start <= at);
        (known && content.is_empty()).then_some(Self { epochs, producers })
    }
}
