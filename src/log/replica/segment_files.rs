//! Segment files in the directory of a replica: their removal with their caches, and the tables that are read from
//! them. Formats are those of `format`; the callers decide which segments belong to the log.

use std::{io, path::Path};

use crate::{
    log::{
        disk::{Disk, OpenMode},
        format::{
            SegmentInfo, Snapshot,
            segment::{self, cache_base_of, name},
            snapshot::record_batch,
        },
    },
    model::Offset,
};

/// Removes the indexes and snapshots of a replica above `end`, and returns true if there were any. They describe a log
/// that was truncated since. A log that grows to the same offset again would use their epochs and producers as its own.
pub(in crate::log) fn remove_caches_above(disk: &dyn Disk, dir: &Path, end: Offset) -> io::Result<bool> {
    remove_caches(disk, dir, |base| base > end)
}

/// Removes the indexes and snapshots below `start`: those of removed segments, and those at the log ends of earlier
/// shutdowns.
pub(in crate::log) fn remove_caches_below(disk: &dyn Disk, dir: &Path, start: Offset) -> io::Result<bool> {
    remove_caches(disk, dir, |base| base < start)
}

fn remove_caches(disk: &dyn Disk, dir: &Path, which: impl Fn(Offset) -> bool) -> io::Result<bool> {
    let mut any = false;
    for entry in disk.list(dir)? {
        if cache_base_of(&entry.name).is_some_and(&which) {
            disk.remove(&dir.join(&entry.name))?;
            any = true;
        }
    }
    Ok(any)
}

/// Removes a segment and its caches.
pub(in crate::log) fn remove_segment(disk: &dyn Disk, dir: &Path, base: Offset) -> io::Result<()> {
    for extension in ["log", "index", "timeindex", "snapshot"] {
        match disk.remove(&dir.join(name(base, extension))) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
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
        if end.corruption.is_some() && last.end < to {
            return Ok((last, tables, end.corruption));
        }
    }
    Ok((last, tables, None))
}
