//! A sealed segment for the upload to the object store: its bytes, and the content of its footer.

use std::{io, path::PathBuf, sync::Arc};

use super::{segment_files::snapshot_at, writer::ReplicaLog};
use crate::{
    log::{
        disk::{File, OpenMode},
        format::{EpochHistory, Index, IndexEntry, ProducerTable, SegmentInfo, Snapshot},
    },
    model::Offset,
};

/// A sealed segment with its metadata. Its bytes can be read even after an eviction has removed the segment.
pub struct SegmentExport {
    /// Description of the segment.
    pub info: SegmentInfo,
    /// Path of the file, for messages.
    pub path: PathBuf,
    /// Entries of the offset index and of the time index.
    pub index: Vec<IndexEntry>,
    /// Epoch history of the batches.
    pub epochs: EpochHistory,
    /// Producer state at the end of the segment.
    pub producers: ProducerTable,
    file: Arc<dyn File>,
}

impl SegmentExport {
    /// Fills `buffer` with the bytes of the file from `position` on; returns fewer bytes only at the end. Blocks.
    /// Neither the batches nor the length are checked: the caller compares them with the description of the segment.
    pub fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<usize> {
        self.file.read_at(buffer, position)
    }
}

impl ReplicaLog {
    /// Exports the sealed segment at `base`; fails with `NotFound` if there is none. The segment is made durable on
    /// this disk first. Otherwise a power failure could leave this replica's log end below the tiered end, and the
    /// replica could not lead. Blocks. If the index or the snapshot is missing, the segment is read, and possibly
    /// earlier ones. Fails with `InvalidData` if batches that the missing snapshot needs are corrupt.
    pub fn export(&self, base: Offset) -> io::Result<SegmentExport> {
        let inner = &self.inner;
        let (info, file, epochs, segments) = {
            let state = inner.state();
            let sealed = &state.segments[..state.segments.len() - 1];
            let segment = sealed.iter().find(|segment| segment.info.base == base).ok_or(io::ErrorKind::NotFound)?;
            let segments: Vec<SegmentInfo> = state.segments.iter().map(|segment| segment.info).collect();
            (segment.info, segment.file.clone(), state.epochs.between(base, segment.info.end), segments)
        };
        if inner.state().persisted_end < info.end {
            inner.sync().map_err(io::Error::other)?;
        }
        let open = inner.ctx.files.get(file.serial, &file.path, OpenMode::Read)?;
        let index: Index = self.reader().load_index(&info, &*open.file)?;
        let snapshot = Snapshot::read(&*inner.ctx.disk, &inner.dir, info.end);
        let producers = match snapshot.ok().flatten() {
            Some(snapshot) => snapshot.producers,
            None => match snapshot_at(&*inner.ctx.disk, &inner.dir, &segments, info.end)? {
                (_, snapshot, None) => snapshot.producers,
                (.., Some(reason)) => return Err(io::Error::new(io::ErrorKind::InvalidData, reason)),
            },
        };
        let index = index.entries().to_vec();
        Ok(SegmentExport { info, path: file.path.clone(), index, epochs, producers, file: open.file.clone() })
    }

    /// Returns the local start, and the epoch history and producer state before that offset. Another replica can start
    /// at the same offset with them ([`ReplicaLog::reset_with`]). Blocks. Fails with `InvalidData` if the snapshot at
    /// the local start is corrupt, or missing although the log has earlier epochs.
    pub fn tables_at_start(&self) -> io::Result<(Offset, EpochHistory, ProducerTable)> {
        let inner = &self.inner;
        let (start, earlier_epochs) = {
            let state = inner.state();
            let start = state.local_start();
            (start, state.epochs.between(Offset::ZERO, start))
        };
        // An eviction or a reset writes a snapshot at the new local start before the local start moves. Only a log
        // without earlier data has no snapshot there.
        match Snapshot::read(&*inner.ctx.disk, &inner.dir, start)? {
            Some(Snapshot { epochs, producers }) => Ok((start, epochs, producers)),
            None if earlier_epochs.last().is_none() => Ok((start, EpochHistory::new(), ProducerTable::new())),
            None => Err(io::Error::new(io::ErrorKind::InvalidData, format!("the snapshot at {start} is missing"))),
        }
    }
}
