//! Reading the journal after a crash: the valid frames, and the entries that each replica needs.

use std::{
    collections::BTreeMap,
    io::{self, IoSlice},
    ops::Range,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use uuid::Uuid;

use crate::{
    log::{
        disk::{BLOCK, Disk, OpenMode, PIECE_BYTES},
        format::{DecodedEntry, EntryHeader, EntryKind, entry, replica_dir, segment::name},
    },
    model::{Offset, PartitionId},
};

/// Bytes at the front of a file that are read to identify its owner: the entry headers of all but the longest frames.
const OWNER_SCAN_BYTES: usize = 64 << 10;

/// Result of reading the journal.
#[derive(Default)]
pub(in crate::log) struct ReplayResult {
    /// Sequence of the next frame that may be written.
    pub(in crate::log) next_frame: u64,
    /// Largest generation in the journal.
    pub(in crate::log) generation: u64,
    pub(in crate::log) replicas: BTreeMap<PartitionId, ReplicaReplayState>,
    /// Error for a durable frame that cannot be read. The replicas whose data it held are unknown.
    pub(in crate::log) unknown_loss: Option<String>,
    /// Reason why the journal is not the one that the directory ran with, if so.
    pub(in crate::log) missing: Option<String>,
    frames: BTreeMap<u64, (PathBuf, u64, Vec<DecodedEntry>)>,
}

/// State of one replica according to the journal.
#[derive(Clone, Debug, Default)]
pub(in crate::log) struct ReplicaReplayState {
    /// Creation of the replica, with its start offset.
    pub(in crate::log) created: Option<EntryHeader>,
    /// Generation of the replica's deletion.
    pub(in crate::log) deleted: Option<u64>,
    /// Change that was started and not completed; replay repeats it.
    pub(in crate::log) incomplete_change: Option<EntryHeader>,
    /// Truncations and resets, completed or not, in order.
    pub(in crate::log) truncations: Vec<EntryHeader>,
    /// Persisted end according to the entries after the last truncation.
    pub(in crate::log) persisted: Option<Offset>,
    pub(in crate::log) log_start: Option<EntryHeader>,
    pub(in crate::log) local_start: Option<EntryHeader>,
    /// Error for a corrupt entry of the replica that was durable.
    pub(in crate::log) lost: Option<String>,
    /// Sequence of the frame below which appends no longer matter.
    barrier: u64,
}

/// Returns the id of another data directory whose journal is in `dir`, if any.
pub(in crate::log) fn other_owner(disk: &dyn Disk, dir: &Path, directory: Uuid) -> io::Result<Option<Uuid>> {
    for path in files(disk, dir)?.unwrap_or_default() {
        let owner = entry::owner(&front(disk, &path, OWNER_SCAN_BYTES)?);
        if owner.is_some_and(|owner| owner != directory) {
            return Ok(owner);
        }
    }
    Ok(None)
}

/// Returns true if a journal in `dir` was ever written. Until then its files are zeros.
pub(in crate::log) fn was_written(disk: &dyn Disk, dir: &Path) -> io::Result<bool> {
    for path in files(disk, dir)?.unwrap_or_default() {
        if front(disk, &path, BLOCK)?.iter().any(|byte| *byte != 0) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn front(disk: &dyn Disk, path: &Path, bytes: usize) -> io::Result<Vec<u8>> {
    let mut front = vec![0; bytes];
    let read = disk.open(path, OpenMode::Read)?.read_at(&mut front, 0)?;
    front.truncate(read);
    Ok(front)
}

/// Returns the journal's files in `dir`; `None` if that directory does not exist.
fn files(disk: &dyn Disk, dir: &Path) -> io::Result<Option<Vec<PathBuf>>> {
    match disk.list(dir) {
        Ok(entries) => {
            let journal_files = entries.iter().filter(|entry| entry.name.ends_with(".journal") && !entry.is_dir);
            Ok(Some(journal_files.map(|entry| dir.join(&entry.name)).collect()))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Reads the journal in `dir` from the frame `first_frame` on.
pub(in crate::log) fn read(disk: &dyn Disk, dir: &Path, directory: Uuid, first_frame: u64) -> io::Result<ReplayResult> {
    let mut journaled = ReplayResult::nothing(first_frame);
    let mut torn: Vec<u64> = Vec::new();
    let Some(paths) = files(disk, dir)? else {
        journaled.missing = Some("the directory does not exist".to_owned());
        return Ok(journaled);
    };
    let mut older = None;
    for path in &paths {
        let bytes = Bytes::from(disk.read(path)?);
        let mut at = 0;
        while at < bytes.len() {
            let frame = entry::decode(&bytes[at..], directory);
            older = older.max(frame.as_ref().map(|frame| frame.sequence).filter(|sequence| *sequence < first_frame));
            let Some(frame) = frame.filter(|frame| frame.sequence >= first_frame) else {
                at += BLOCK;
                continue;
            };
            let content = bytes.slice(at..at + frame.bytes);
            if frame.entries.iter().any(|entry| !entry.is_intact(&content)) {
                torn.push(frame.sequence);
            }
            journaled.frames.insert(frame.sequence, (path.clone(), at as u64, frame.entries));
            at += frame.bytes;
        }
    }
    let last = journaled.frames.keys().next_back().copied();
    journaled.next_frame = last.map_or(first_frame, |last| last + 1);
    let gap = last.and_then(|last| (first_frame..last).find(|sequence| !journaled.frames.contains_key(sequence)));
    journaled.unknown_loss = gap.map(|sequence| format!("frame {sequence} of the journal cannot be read"));
    if last.is_none() {
        journaled.missing = Some(match (paths.len(), older) {
            (0, _) => "the directory holds no journal file".to_owned(),
            (files, None) => format!("its {files} journal files hold no frame of this data directory"),
            (files, Some(older)) => {
                format!("its {files} journal files end with frame {older}, and replay starts at frame {first_frame}")
            }
        });
    }
    // The first frame was durable when the checkpoint named it, so its corruption is no torn end.
    let is_torn = |last: &u64| torn.contains(last) || mutant!(DropLastFrame);
    if let Some(last) = last.filter(|last| is_torn(last) && *last > first_frame) {
        // No caller received a result for a frame that was being written.
        tracing::warn!(frame = last, "the journal's last frame is torn and is dropped");
        journaled.frames.remove(&last);
    }
    journaled.apply_all(&torn);
    Ok(journaled)
}

impl ReplayResult {
    /// Returns the result for a journal of which nothing is needed. The next frame is `next_frame`.
    pub(in crate::log) fn nothing(next_frame: u64) -> Self {
        Self { next_frame, ..Self::default() }
    }

    /// Applies the entries of every replica to its state.
    fn apply_all(&mut self, torn: &[u64]) {
        for (sequence, (path, _, entries)) in &self.frames {
            let torn_path = torn.contains(sequence).then(|| path.display());
            for DecodedEntry { head, .. } in entries {
                self.generation = self.generation.max(head.generation);
                let state = self.replicas.entry(head.id).or_default();
                state.apply(head, *sequence);
                if let (Some(path), EntryKind::Append) = (&torn_path, head.kind) {
                    // `restore` identifies the corrupt entry of the frame.
                    tracing::warn!(%path, frame = sequence, "a frame of the journal is corrupt");
                }
            }
        }
    }

    /// Writes the journaled batches into the segments again, in order: the same bytes at the same positions. Then it
    /// syncs the files, and returns the number of bytes written. `wanted` selects the replicas.
    pub(in crate::log) fn restore(
        &mut self,
        disk: &dyn Disk,
        data: &Path,
        wanted: impl Fn(&PartitionId) -> bool,
    ) -> io::Result<u64> {
        let mut written: BTreeMap<PathBuf, Range<u64>> = BTreeMap::new();
        let mut dirs: BTreeMap<PathBuf, ()> = BTreeMap::new();
        let mut restored = 0;
        let mut corrupt = Vec::new();
        for (sequence, (path, at, entries)) in &self.frames {
            let needed = |entry: &&DecodedEntry| {
                let state = self.replicas.get(&entry.head.id);
                entry.head.kind == EntryKind::Append
                    && wanted(&entry.head.id)
                    && state.is_some_and(|state| *sequence >= state.barrier && state.has(&entry.head))
            };
            if !entries.iter().any(|entry| needed(&entry)) {
                continue;
            }
            let file = disk.open(path, OpenMode::Read)?;
            let end = entries.iter().map(|entry| entry.payload.end).max().unwrap_or(0);
            let mut bytes = vec![0; end];
            let got = file.read_at(&mut bytes, *at)?;
            bytes.truncate(got);
            let frame = Bytes::from(bytes);
            for entry in entries.iter().filter(needed) {
                if frame.len() < entry.payload.end || !entry.is_intact(&frame) {
                    let reason = format!("frame {sequence} of the journal in {} is corrupt", path.display());
                    corrupt.push((entry.head.id, reason));
                    continue;
                }
                let dir = replica_dir(data, entry.head.id);
                disk.create_dir_all(&dir)?;
                let segment = dir.join(name(entry.head.segment, "log"));
                let target = disk.open(&segment, OpenMode::Write)?;
                let payload = &frame[entry.payload.clone()];
                let mut present = vec![0; payload.len()];
                let same = target.read_at(&mut present, entry.head.position)? == payload.len() && present == payload;
                if !same {
                    target.write_at(&[IoSlice::new(payload)], entry.head.position)?;
                    restored += payload.len() as u64;
                }
                // Even bytes that are present may be unsynced.
                let (from, to) = (entry.head.position, entry.head.position + payload.len() as u64);
                let range = written.entry(segment).or_insert(from..to);
                *range = range.start.min(from)..range.end.max(to);
                dirs.insert(dir, ());
            }
        }
        for (id, reason) in corrupt {
            self.replicas.entry(id).or_default().lost = Some(reason);
        }
        for (path, range) in &written {
            // Another broker's acknowledgements may wait for this disk, so the bytes are written out in pieces.
            disk.write_out(path, range.clone(), PIECE_BYTES)?;
            disk.open(path, OpenMode::Write)?.sync()?;
        }
        for dir in dirs.keys() {
            for above in dir.ancestors().take(3) {
                disk.sync_dir(above)?;
            }
        }
        Ok(restored)
    }
}

impl ReplicaReplayState {
    /// Returns true if the segment of these batches was not removed since. A removed segment would need disk space that
    /// may not exist. Batches from before a reset would also lie at the start of the log that followed the reset.
    fn has(&self, batches: &EntryHeader) -> bool {
        let reset = self.incomplete_change.filter(|change| change.kind == EntryKind::Reset);
        reset.is_none_or(|reset| batches.generation >= reset.generation)
            && self.local_start.is_none_or(|start| batches.segment >= start.base)
    }

    fn apply(&mut self, head: &EntryHeader, sequence: u64) {
        match head.kind {
            EntryKind::Create => {
                *self = Self { created: Some(*head), deleted: self.deleted, barrier: sequence, ..Self::default() };
                self.persisted = Some(head.base);
            }
            // The entry was submitted before a truncation and written after it, so it describes truncated data.
            EntryKind::Append | EntryKind::Synced
                if self.truncations.last().is_some_and(|change| change.generation > head.generation) => {}
            EntryKind::Append | EntryKind::Synced => self.persisted = self.persisted.max(Some(head.end)),
            EntryKind::Truncate | EntryKind::Reset => {
                self.truncations.push(*head);
                if head.kind == EntryKind::Reset {
                    (self.log_start, self.local_start) = (None, None);
                }
                self.incomplete_change = Some(*head);
                // The remaining data may not have been durable either, until the truncation is completed.
                self.persisted = self.persisted.map(|end| end.min(head.base));
            }
            EntryKind::Delete => {
                *self = Self {
                    deleted: Some(head.generation),
                    incomplete_change: Some(*head),
                    barrier: sequence,
                    ..Self::default()
                };
            }
            EntryKind::Completed => {
                self.incomplete_change = None;
                self.barrier = sequence;
                self.persisted = Some(head.base);
            }
            // Both offsets only grow, except in a reset.
            EntryKind::LogStart => self.log_start = Some(*head),
            EntryKind::LocalStart => self.local_start = Some(*head),
        }
    }
}
