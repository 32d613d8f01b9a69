//! Segment files in the directory of a replica: their removal with their caches, and the epoch history and producer
//! state that are read from them. The callers decide which segments belong to the log.

use std::{io, path::Path};

use crate::{
    log::{
        disk::{Disk, OpenMode},
        format::{
            SegmentInfo, Snapshot,
            segment::{self, index_or_snapshot_base, name},
            snapshot::record_batch,
        },
    },
    model::Offset,
};

/// Removes the indexes and snapshots of a replica above `end`, and returns true if there were any. These files describe
/// a log that was truncated since. If the log grew to the same offset again, it would use their epochs and producers.
pub(in crate::log) fn remove_indexes_and_snapshots_above(disk: &dyn Disk, dir: &Path, end: Offset) -> io::Result<bool> {
    remove_indexes_and_snapshots(disk, dir, |base| base > end)
}

/// Removes the indexes and snapshots below `start`, and returns true if there were any. They belong to removed
/// segments, or to the log ends of earlier shutdowns.
pub(in crate::log) fn remove_indexes_and_snapshots_below(
    disk: &dyn Disk,
    dir: &Path,
    start: Offset,
) -> io::Result<bool> {
    remove_indexes_and_snapshots(disk, dir, |base| base < start)
}

/// Removes the indexes and snapshots whose base offset `is_obsolete` selects, and returns true if there were any.
fn remove_indexes_and_snapshots(disk: &dyn Disk, dir: &Path, is_obsolete: impl Fn(Offset) -> bool) -> io::Result<bool> {
    let mut has_removed = false;
    for entry in disk.list(dir)? {
        if index_or_snapshot_base(&entry.name).is_some_and(&is_obsolete) {
            disk.remove(&dir.join(&entry.name))?;
            has_removed = true;
        }
    }
    Ok(has_removed)
}

/// Removes the file, the indexes and the snapshot of the segment at `base`. Absent files are no error.
pub(in crate::log) fn remove_segment(disk: &dyn Disk, dir: &Path, base: Offset) -> io::Result<()> {
    for extension in ["log", "index", "timeindex", "snapshot"] {
        match disk.remove(&dir.join(name(base, extension))) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Returns the description of the segment that contains `to`, as if it ended there, and the epoch history and producer
/// state at `to`. If `to` lies inside a batch, all three are those at the base of that batch. Reads the segments from
/// the last intact snapshot at or below `to`. The text describes corruption below `to`; all three then end at the
/// corruption.
pub(in crate::log) fn snapshot_at(
    disk: &dyn Disk,
    dir: &Path,
    segments: &[SegmentInfo],
    to: Offset,
) -> io::Result<(SegmentInfo, Snapshot, Option<String>)> {
    let containing = segments.iter().rposition(|info| info.base <= to).unwrap_or(0);
    let bases: Vec<Offset> = segments[..=containing].iter().map(|info| info.base).collect();
    let (start, mut snapshot) = Snapshot::read_last(disk, dir, &bases)?;
    let mut last = segments[containing].emptied();
    for info in &segments[start..=containing] {
        last = info.emptied();
        if info.bytes == 0 || last.base >= to {
            continue;
        }
        let file = disk.open(&dir.join(name(info.base, "log")), OpenMode::Read)?;
        let epoch = snapshot.epochs.last().map(|(epoch, _)| epoch);
        let mut is_below = true;
        let end = segment::scan(&*file, info.bytes, 0, info.base, epoch, |_, batch| {
            is_below &= batch.end_offset() <= to;
            if is_below {
                record_batch(&mut snapshot.epochs, &mut snapshot.producers, batch);
                last.extend(batch);
            }
        })?;
        if end.corruption.is_some() && last.end < to {
            return Ok((last, snapshot, end.corruption));
        }
    }
    Ok((last, snapshot, None))
}
