//! Opening a replica after a crash: its valid files, its log end, and the check of that end against the persisted end.
//!
//! The journal has been replayed before. The scan runs from the recovery point to the first invalid bytes. Invalid
//! bytes above the persisted end are a torn tail. Invalid or missing bytes below the persisted end are lost data, and
//! the segments then stay unchanged.

use std::{collections::BTreeMap, io, path::Path, sync::Arc};

use crate::{
    log::{
        disk::{Disk, OpenMode},
        error::ReplicaError,
        format::{
            ReplicaCheckpoint, SegmentInfo,
            segment::{self, base_of, name, quarantined_name},
            snapshot::{self, record_batch},
        },
        replica::segment_files::{remove_indexes_and_snapshots_above, remove_segment},
    },
    model::Offset,
    task::clock,
};

/// Reconciles a replica's files with its record: scans the files from the recovery point on, and truncates a torn tail.
/// The returned record ends at the log end. Fails with `Lost` if the record has a refusal, or if data below the
/// persisted end is missing.
pub(super) fn recover(
    disk: &dyn Disk,
    dir: &Path,
    record: ReplicaCheckpoint,
) -> Result<ReplicaCheckpoint, ReplicaError> {
    let unverified = record.needs_full_scan();
    let id = record.id;
    let lost = |persisted, reason| ReplicaError::Lost { id, persisted, unverified, reason, dir: dir.to_owned() };
    if let Some(reason) = record.refusal.clone() {
        return Err(lost(record.persisted, reason));
    }
    let io = |source| ReplicaError::Io { id, path: dir.to_owned(), source };
    let persisted = record.persisted;
    let files = clean_and_list(disk, dir, record.segments[0].base).map_err(io)?;
    let recovery = ReplicaRecovery { disk, dir, record, files, unverified };
    match recovery.run() {
        Ok(Ok(record)) => Ok(record),
        Ok(Err(reason)) => Err(lost(persisted, reason)),
        Err(source) => Err(io(source)),
    }
}

/// Returns the lengths of a replica's segment files from `start` on, by base offset. Removes the files below `start`,
/// which were evicted, and the snapshot of a reset that did not reach the journal.
fn clean_and_list(disk: &dyn Disk, dir: &Path, start: Offset) -> io::Result<BTreeMap<Offset, u64>> {
    let entries = match disk.list(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error),
    };
    let mut files = BTreeMap::new();
    for entry in entries {
        match base_of(&entry.name) {
            Some(base) if base < start => remove_segment(disk, dir, base)?,
            Some(base) => drop(files.insert(base, entry.len)),
            // The process crashed after a reset wrote this file, and before the journal entry of the reset.
            None if entry.name.ends_with(snapshot::RESET_EXTENSION) => disk.remove(&dir.join(&entry.name))?,
            None => {}
        }
    }
    Ok(files)
}

/// Quarantines the segment files in the directory of a replica that is about to be created, under names that are never
/// read. The files belong to a replica that is not registered: its deletion was interrupted, or its creation was never
/// acknowledged. An operator may still need the files. Empty files and caches are removed.
pub(super) fn quarantine_segments(disk: &dyn Disk, dir: &Path) -> io::Result<()> {
    let entries = disk.list(dir)?;
    let mut quarantined_files = Vec::new();
    for entry in &entries {
        if entry.name.ends_with(snapshot::RESET_EXTENSION) {
            disk.remove(&dir.join(&entry.name))?;
        }
        let Some(base) = base_of(&entry.name) else { continue };
        if entry.len > 0 {
            let exists = |name: &String| entries.iter().any(|existing| existing.name == *name);
            let names = (1..).map(|number| quarantined_name(&entry.name, number));
            let quarantined = names.into_iter().find(|name| !exists(name)).expect("a directory is finite");
            disk.rename(&dir.join(&entry.name), &dir.join(&quarantined))?;
            quarantined_files.push(quarantined);
        }
        remove_segment(disk, dir, base)?;
    }
    if !quarantined_files.is_empty() {
        tracing::warn!(
            dir = %dir.display(), files = quarantined_files.join(", "),
            "the directory of a new replica held segments that the checkpoint does not list; they are renamed and not \
             served: inspect them with `strandline segment dump`, and delete them if they are not needed"
        );
    }
    remove_indexes_and_snapshots_above(disk, dir, Offset::ZERO)?;
    // A power failure must not restore the old files under the names of new ones. The sync is needed even if nothing
    // was renamed here, because an earlier attempt may have renamed the files.
    disk.sync_dir(dir)
}

/// Recovery of one replica in progress.
struct ReplicaRecovery<'a> {
    disk: &'a dyn Disk,
    dir: &'a Path,
    /// Record of the replica, which the scan extends to the log end.
    record: ReplicaCheckpoint,
    /// Lengths of the segment files by base offset.
    files: BTreeMap<Offset, u64>,
    /// True if the persisted end is not recorded: a torn tail cannot be distinguished from a loss.
    unverified: bool,
}

impl ReplicaRecovery<'_> {
    /// Runs the recovery. The outer error is a disk error; the inner error describes the lost data.
    fn run(mut self) -> io::Result<Result<ReplicaCheckpoint, String>> {
        if let Some(reason) = self.find_missing() {
            return Ok(Err(reason));
        }
        // Data before the recovery point is synced and is not read again.
        let mut last = self.record.segments.pop().expect("a record has a segment");
        let mut corruption = None;
        loop {
            let len = self.files.get(&last.base).copied().unwrap_or(0);
            let from = last.bytes;
            corruption = self.scan(&mut last, len)?.map(|reason| (last.base, last.bytes, reason)).or(corruption);
            self.record.segments.push(last);
            let has_next = self.files.contains_key(&last.end) && last.end > last.base;
            if corruption.is_some() || !has_next {
                break;
            }
            tracing::debug!(partition = %self.record.id, base = %last.base, from, to = last.bytes, "segment scanned");
            last = SegmentInfo::empty(last.end, clock::wall_ms());
        }
        let end = last.end;
        let persisted = self.record.persisted;
        let surplus_bytes: u64 =
            self.files.range(last.base..).map(|(_, len)| *len).sum::<u64>().saturating_sub(last.bytes);
        if end < persisted || (self.unverified && surplus_bytes > 0) {
            let reason = corruption.map_or_else(
                || format!("its files end at offset {end}"),
                |(base, position, reason)| {
                    format!("segment {base} is corrupt at byte {position}, offset {end}: {reason}")
                },
            );
            return Ok(Err(reason));
        }
        self.truncate(&last, surplus_bytes)?;
        Ok(Ok(self.record))
    }

    /// Returns an error text if a file is missing, or shorter than its synced length.
    fn find_missing(&self) -> Option<String> {
        for info in &self.record.segments {
            let len = self.files.get(&info.base).copied();
            if info.bytes > len.unwrap_or(0) {
                let path = self.dir.join(name(info.base, "log"));
                let error = len.map_or("is missing".to_owned(), |len| format!("has {len} of {} bytes", info.bytes));
                return Some(format!("{} {error}", path.display()));
            }
        }
        None
    }

    /// Reads a segment from the end of `info` on. Adds the batches to `info` and to the epoch history and producer
    /// state of the record. Returns the error in the first invalid bytes, if any.
    fn scan(&mut self, info: &mut SegmentInfo, len: u64) -> io::Result<Option<String>> {
        if len <= info.bytes {
            return Ok(None);
        }
        let file = self.disk.open(&self.dir.join(name(info.base, "log")), OpenMode::Read)?;
        let ReplicaCheckpoint { epochs, producers, .. } = &mut self.record;
        let producers = Arc::make_mut(producers);
        let epoch = epochs.last().map(|(epoch, _)| epoch);
        // The write times of the scanned batches were lost. The modification time of the file replaces them. It is that
        // of the last append, or of a replay that wrote missing bytes.
        let modified_ms = file.modified_ms()?.min(clock::wall_ms());
        let end = segment::scan(&*file, len, info.bytes, info.end, epoch, |_, batch| {
            info.record_write(modified_ms);
            record_batch(epochs, producers, batch);
            info.extend(batch);
        })?;
        Ok(end.corruption)
    }

    /// Truncates the file of the segment `last` at the end of the segment, and removes later files and their caches.
    /// The removed `surplus_bytes` were never acknowledged as durable.
    fn truncate(&self, last: &SegmentInfo, surplus_bytes: u64) -> io::Result<()> {
        if surplus_bytes > 0 {
            tracing::warn!(
                partition = %self.record.id, bytes = surplus_bytes, end = %last.end,
                "removed incomplete writes at the end of the log, as after a crash: none of them was acknowledged as \
                 persisted, and no action is needed"
            );
        }
        for base in self.files.range(last.base..).map(|(base, _)| *base).filter(|base| *base > last.base) {
            remove_segment(self.disk, self.dir, base)?;
        }
        if self.files.get(&last.base).is_some_and(|len| *len > last.bytes) {
            let file = self.disk.open(&self.dir.join(name(last.base, "log")), OpenMode::Write)?;
            file.truncate(last.bytes)?;
            // Later appends may become durable before this segment is synced again.
            file.sync()?;
        }
        let removed_files =
            !self.files.is_empty() && remove_indexes_and_snapshots_above(self.disk, self.dir, last.end)?;
        if surplus_bytes > 0 || removed_files {
            self.disk.sync_dir(self.dir)?;
        }
        Ok(())
    }
}
