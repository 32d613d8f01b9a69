//! A sealed segment as the tier uploads it: its bytes, and all that its footer holds.

use std::{io, path::PathBuf, sync::Arc};

use super::{
    disk::{File, Mode},
    epochs::EpochHistory,
    index::{Index, IndexEntry},
    producers::ProducerTable,
    recover::tables_at,
    replica::Replica,
    segment::SegmentInfo,
    snapshot::Snapshot,
};
use crate::model::Offset;

/// A sealed segment and what belongs to it. It can be read to its end whatever is evicted meanwhile.
pub struct SegmentExport {
    /// What is known of it.
    pub info: SegmentInfo,
    /// Where it lies, for messages.
    pub path: PathBuf,
    /// Batches that can be found without reading those before them; also the time index.
    pub index: Vec<IndexEntry>,
    /// The epochs of its batches.
    pub epochs: EpochHistory,
    /// The producers as they were at its end.
    pub producers: ProducerTable,
    file: Arc<dyn File>,
}

impl SegmentExport {
    /// Fills `buffer` with the file's bytes from `position` on; fewer only at its end. Blocks. Neither the batches nor the length are
    /// checked: whoever reads compares with what is known of the segment.
    pub fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<usize> {
        self.file.read_at(buffer, position)
    }
}

impl Replica {
    /// The sealed segment at `base`; `NotFound` where there is none. It is durable here before it leaves: a log that ends below what the
    /// bucket has, after a loss of power, could not be led from. Blocks: it may read the segment, and those before it, where the index
    /// or the snapshot is missing.
    pub fn export(&self, base: Offset) -> io::Result<SegmentExport> {
        let shared = &self.shared;
        let (info, file, epochs, segments) = {
            let state = shared.state();
            let sealed = &state.segments[..state.segments.len() - 1];
            let found = sealed.iter().find(|segment| segment.info.base == base).ok_or(io::ErrorKind::NotFound)?;
            let segments: Vec<SegmentInfo> = state.segments.iter().map(|segment| segment.info).collect();
            (found.info, found.file.clone(), state.epochs.between(base, found.info.end), segments)
        };
        if shared.state().persisted_end < info.end {
            shared.sync().map_err(io::Error::other)?;
        }
        let open = shared.core.files.get(file.serial, &file.path, Mode::Read)?;
        let index: Index = self.reader().load_index(&info, &*open.file)?;
        let snapshot = Snapshot::read(&*shared.core.disk, &shared.dir, info.end);
        let producers = match snapshot.ok().flatten() {
            Some(snapshot) => snapshot.producers,
            None => match tables_at(&shared.core, &shared.dir, &segments, info.end)? {
                (_, tables, None) => tables.producers,
                (.., Some(why)) => return Err(io::Error::new(io::ErrorKind::InvalidData, why)),
            },
        };
        let index = index.entries().to_vec();
        Ok(SegmentExport { info, path: file.path.clone(), index, epochs, producers, file: open.file.clone() })
    }

    /// Where this log begins on this disk, and the epochs and producers of what lies before it: with them a replica elsewhere
    /// can begin there too (`Replica::reset_with`). Blocks. `InvalidData` when what held them is damaged or gone.
    pub fn tables_at_start(&self) -> io::Result<(Offset, EpochHistory, ProducerTable)> {
        let shared = &self.shared;
        let (start, before) = {
            let state = shared.state();
            let start = state.local_start();
            (start, state.epochs.between(Offset::ZERO, start))
        };
        // Whatever moved the start here wrote the snapshot before; a log that begins with nothing before it has none.
        match Snapshot::read(&*shared.core.disk, &shared.dir, start)? {
            Some(Snapshot { epochs, producers }) => Ok((start, epochs, producers)),
            None if before.last().is_none() => Ok((start, EpochHistory::new(), ProducerTable::new())),
            None => Err(io::Error::new(io::ErrorKind::InvalidData, format!("the snapshot at {start} is gone"))),
        }
    }
}
