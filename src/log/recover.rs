//! Opening a replica after a crash: its valid files, its log end, and the check of that end against the persisted end.
//!
//! The journal has been replayed before. The scan runs from the recovery point to the first invalid bytes. Bytes
//! missing above the persisted end are a torn tail. Bytes missing below it are lost, and the files then stay unchanged.

use std::{collections::BTreeMap, io, path::Path, sync::Arc};

use super::{
    checkpoint::ReplicaRecord,
    core::Core,
    disk::Mode,
    epochs::EpochHistory,
    error::ReplicaError,
    producers::ProducerTable,
    segment::{self, SegmentInfo, base_of, name},
    snapshot::{self, Snapshot},
    startup,
};
use crate::{model::Offset, record::Batch, task::clock};

/// A replica that was not opened yet.
#[derive(Clone)]
pub(super) struct Dormant {
    pub(super) record: ReplicaRecord,
    /// True if the record describes the files exactly, because a clean shutdown wrote it.
    pub(super) clean: bool,
}

/// Reconciles a replica's files with its record. The returned record ends at the log end.
pub(super) fn recover(core: &Arc<Core>, dir: &Path, dormant: Dormant) -> Result<ReplicaRecord, ReplicaError> {
    let Dormant { record, clean } = dormant;
    let unproven = startup::unread(&record);
    if clean && record.lost.is_none() {
        return Ok(record);
    }
    let id = record.id;
    let refuse = |persisted, why| ReplicaError::Lost { id, persisted, why, dir: dir.to_owned() };
    if let Some(why) = record.lost.clone() {
        return Err(refuse(record.persisted, why));
    }
    let io = |source| ReplicaError::Io { id, path: dir.to_owned(), source };
    let persisted = record.persisted;
    let files = list(core, dir, record.segments[0].base).map_err(io)?;
    let recovery = Recovery { core, dir, record, files, unproven };
    match recovery.run() {
        Ok(Ok(record)) => Ok(record),
        Ok(Err(why)) => Err(refuse(persisted, why)),
        Err(source) => Err(io(source)),
    }
}

/// Returns the lengths of a replica's segment files from `start` on, by base offset. Files below `start` were evicted
/// and are removed.
fn list(core: &Core, dir: &Path, start: Offset) -> io::Result<BTreeMap<Offset, u64>> {
    let entries = match core.disk.list(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error),
    };
    let mut files = BTreeMap::new();
    for entry in entries {
        match base_of(&entry.name) {
            Some(base) if base < start => remove_segment(core, dir, base)?,
            Some(base) => drop(files.insert(base, entry.len)),
            // Left by a reset that has no journal entry.
            None if entry.name.ends_with(snapshot::OF_RESET) => core.disk.remove(&dir.join(&entry.name))?,
            None => {}
        }
    }
    Ok(files)
}

/// Removes the indexes and snapshots of a replica above `end`, and returns true if there were any. They describe a log
/// that was truncated since. A log that grows to the same offset again would use their epochs and producers as its own.
pub(super) fn remove_caches_above(core: &Core, dir: &Path, end: Offset) -> io::Result<bool> {
    remove_caches(core, dir, |base| base > end)
}

/// Removes the indexes and snapshots below `start`: those of removed segments, and those at the log ends of earlier
/// shutdowns.
pub(super) fn remove_caches_below(core: &Core, dir: &Path, start: Offset) -> io::Result<bool> {
    remove_caches(core, dir, |base| base < start)
}

fn remove_caches(core: &Core, dir: &Path, which: impl Fn(Offset) -> bool) -> io::Result<bool> {
    let mut any = false;
    for entry in core.disk.list(dir)? {
        if segment::cache_base_of(&entry.name).is_some_and(&which) {
            core.disk.remove(&dir.join(&entry.name))?;
            any = true;
        }
    }
    Ok(any)
}

/// Removes a segment and its caches.
pub(super) fn remove_segment(core: &Core, dir: &Path, base: Offset) -> io::Result<()> {
    for extension in ["log", "index", "timeindex", "snapshot"] {
        match core.disk.remove(&dir.join(name(base, extension))) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Quarantines the segment files in the directory of a replica that is about to be created, under names that are never
/// read. They belong to a replica that is not registered: its deletion was interrupted, or its creation was never
/// acknowledged. The checkpoint does not list them, yet they may be wanted. Empty files and caches are removed.
pub(super) fn set_aside(core: &Core, dir: &Path) -> io::Result<()> {
    let entries = core.disk.list(dir)?;
    let mut kept = Vec::new();
    for entry in &entries {
        if entry.name.ends_with(snapshot::OF_RESET) {
            core.disk.remove(&dir.join(&entry.name))?;
        }
        let Some(base) = base_of(&entry.name) else { continue };
        if entry.len > 0 {
            let taken = |name: &String| entries.iter().any(|other| other.name == *name);
            let names = (1..).map(|n| format!("{}.aside-{n}", entry.name));
            let aside = names.into_iter().find(|name| !taken(name)).expect("a folder has an end");
            core.disk.rename(&dir.join(&entry.name), &dir.join(&aside))?;
            kept.push(aside);
        }
        remove_segment(core, dir, base)?;
    }
    if !kept.is_empty() {
        tracing::warn!(
            dir = %dir.display(), files = kept.join(", "),
            "a new replica's folder held segments that the checkpoint does not know; they are kept under other names and not served: \
             look into them with `strandline segment dump`, and delete them when they are not wanted"
        );
    }
    remove_caches_above(core, dir, Offset::ZERO)?;
    // A power failure must not restore the old records in place of the new ones. An earlier attempt may have renamed
    // the files.
    core.disk.sync_dir(dir)
}

struct Recovery<'a> {
    core: &'a Core,
    dir: &'a Path,
    record: ReplicaRecord,
    files: BTreeMap<Offset, u64>,
    /// True if the persisted end is not recorded: a torn tail cannot be distinguished from a loss.
    unproven: bool,
}

impl Recovery<'_> {
    /// Runs the recovery. The outer error is a disk error; the inner error describes the lost data.
    fn run(mut self) -> io::Result<Result<ReplicaRecord, String>> {
        if let Some(why) = self.missing() {
            return Ok(Err(why));
        }
        // Data before the recovery point is synced and is not read again.
        let mut at = self.record.segments.pop().expect("a record has a segment");
        let mut damage = None;
        loop {
            let len = self.files.get(&at.base).copied().unwrap_or(0);
            let from = at.bytes;
            damage = self.scan(&mut at, len)?.map(|why| (at.base, at.bytes, why)).or(damage);
            self.record.segments.push(at);
            let following = self.files.contains_key(&at.end) && at.end > at.base;
            if damage.is_some() || !following {
                break;
            }
            tracing::debug!(partition = %self.record.id, base = %at.base, from, to = at.bytes, "segment scanned");
            at = SegmentInfo::empty(at.end, clock::wall_ms());
        }
        let end = at.end;
        let persisted = self.record.persisted;
        let beyond: u64 = self.files.range(at.base..).map(|(_, len)| *len).sum::<u64>().saturating_sub(at.bytes);
        if end < persisted || (self.unproven && beyond > 0) {
            let why = damage.map_or_else(
                || format!("its files end at offset {end}"),
                |(base, position, why)| format!("segment {base} is damaged at byte {position}, offset {end}: {why}"),
            );
            return Ok(Err(why));
        }
        self.cut(&at, beyond)?;
        Ok(Ok(self.record))
    }

    /// Returns an error text if a file is missing, or shorter than its synced length.
    fn missing(&self) -> Option<String> {
        for info in &self.record.segments {
            let len = self.files.get(&info.base).copied();
            if info.bytes > len.unwrap_or(0) {
                let path = self.dir.join(name(info.base, "log"));
                let found = len.map_or("is missing".to_owned(), |len| format!("has {len} of {} bytes", info.bytes));
                return Some(format!("{} {found}", path.display()));
            }
        }
        None
    }

    /// Reads a segment from the end of `info` on, and extends `info`. Returns the error in the first invalid bytes, if
    /// any.
    fn scan(&mut self, info: &mut SegmentInfo, len: u64) -> io::Result<Option<String>> {
        if len <= info.bytes {
            return Ok(None);
        }
        let file = self.core.disk.open(&self.dir.join(name(info.base, "log")), Mode::Read)?;
        let ReplicaRecord { epochs, producers, .. } = &mut self.record;
        let producers = Arc::make_mut(producers);
        let epoch = epochs.last().map(|(epoch, _)| epoch);
        // No checkpoint describes these appends. A replay of the journal writes only missing bytes, so the file's time
        // is that of the last append or later.
        let modified_ms = file.modified_ms()?.min(clock::wall_ms());
        let end = segment::scan(&*file, len, info.bytes, info.end, epoch, |_, batch| {
            info.note_write(modified_ms);
            note(epochs, producers, batch);
            info.note(batch);
        })?;
        Ok(end.damage)
    }

    /// Truncates the files at the log end. The removed data was never acknowledged as durable.
    fn cut(&self, last: &SegmentInfo, beyond: u64) -> io::Result<()> {
        if beyond > 0 {
            tracing::warn!(partition = %self.record.id, bytes = beyond, end = %last.end, "a torn tail was cut");
        }
        for base in self.files.range(last.base..).map(|(base, _)| *base).filter(|base| *base > last.base) {
            remove_segment(self.core, self.dir, base)?;
        }
        if self.files.get(&last.base).is_some_and(|len| *len > last.bytes) {
            let file = self.core.disk.open(&self.dir.join(name(last.base, "log")), Mode::Write)?;
            file.truncate(last.bytes)?;
            // Later appends may become durable before this segment is synced again.
            file.sync()?;
        }
        let caches = !self.files.is_empty() && remove_caches_above(self.core, self.dir, last.end)?;
        if beyond > 0 || caches {
            self.core.disk.sync_dir(self.dir)?;
        }
        Ok(())
    }
}

fn note(epochs: &mut EpochHistory, producers: &mut ProducerTable, batch: &Batch) {
    if let Some(epoch) = batch.leader_epoch()
        && !epochs.note(epoch, batch.base_offset())
    {
        debug_assert!(false, "the scan refuses epochs that fall");
    }
    producers.note(batch);
}

/// Returns the description of the segment that contains `to`, ending there, and the epoch history and producer state at
/// `to`. Reads intact segments from a snapshot on: that of the segment that contains `to`, or of an earlier one.
pub(super) fn tables_at(
    core: &Core,
    dir: &Path,
    segments: &[SegmentInfo],
    to: Offset,
) -> io::Result<(SegmentInfo, Snapshot, Option<String>)> {
    let holding = segments.iter().rposition(|info| info.base <= to).unwrap_or(0);
    let bases: Vec<Offset> = segments[..=holding].iter().map(|info| info.base).collect();
    let (start, mut tables) = Snapshot::read_last(&*core.disk, dir, &bases)?;
    let mut last = segments[holding].emptied();
    for info in &segments[start..=holding] {
        last = info.emptied();
        if info.bytes == 0 || last.base >= to {
            continue;
        }
        let file = core.disk.open(&dir.join(name(info.base, "log")), Mode::Read)?;
        let epoch = tables.epochs.last().map(|(epoch, _)| epoch);
        let mut whole = true;
        let end = segment::scan(&*file, info.bytes, 0, info.base, epoch, |_, batch| {
            whole &= batch.end_offset() <= to;
            if whole {
                note(&mut tables.epochs, &mut tables.producers, batch);
                last.note(batch);
            }
        })?;
        if end.damage.is_some() && last.end < to {
            return Ok((last, tables, end.damage));
        }
    }
    Ok((last, tables, None))
}
