//! Reading the journal after a crash: the valid frames, and the entries that each replica needs.

use std::{
    collections::{BTreeMap, BTreeSet},
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

/// Bytes at the start of a file that are read to identify its owner. They include all headers of the first frame,
/// unless that frame has more than 800 entries.
const OWNER_SCAN_BYTES: usize = 64 << 10;

/// Result of reading the journal.
#[derive(Default)]
pub(in crate::log) struct ReplayResult {
    /// Sequence of the next frame that may be written.
    pub(in crate::log) next_frame: u64,
    /// Largest generation in the journal.
    pub(in crate::log) generation: u64,
    /// State of each replica that has an entry in the journal.
    pub(in crate::log) replicas: BTreeMap<PartitionId, ReplicaReplayState>,
    /// Error for a durable frame that cannot be read. The replicas whose data it held are unknown.
    pub(in crate::log) unknown_loss: Option<String>,
    /// Reason why no frame to replay was found; `None` if one was found. The journal of a running directory has one, so
    /// without it that journal is missing.
    pub(in crate::log) missing: Option<String>,
    /// Frames to replay, by sequence.
    frames: BTreeMap<u64, JournaledFrame>,
}

/// A frame and its location in the journal. The payloads are read again when they are needed.
struct JournaledFrame {
    path: PathBuf,
    position: u64,
    entries: Vec<DecodedEntry>,
}

/// State of one replica according to the journal.
#[derive(Clone, Debug, Default)]
pub(in crate::log) struct ReplicaReplayState {
    /// Creation of the replica, at the start offset `base`.
    pub(in crate::log) created: Option<EntryHeader>,
    /// Generation of the replica's last deletion; `None` if it was not deleted.
    pub(in crate::log) deleted: Option<u64>,
    /// Change that was started and not completed. Replay repeats a reset or deletion; a truncation only lowers the
    /// persisted end.
    pub(in crate::log) incomplete_change: Option<EntryHeader>,
    /// Truncations and resets, completed or not, in order.
    pub(in crate::log) truncations: Vec<EntryHeader>,
    /// Persisted end according to the entries; a truncation or reset lowers it.
    pub(in crate::log) persisted: Option<Offset>,
    /// Last move of the log start, to `base`.
    pub(in crate::log) log_start: Option<EntryHeader>,
    /// Last eviction, of the segments below `base`.
    pub(in crate::log) local_start: Option<EntryHeader>,
    /// Error for a corrupt entry of the replica that was durable.
    pub(in crate::log) lost: Option<String>,
    /// Sequence of the first frame whose appends may have to be restored.
    barrier: u64,
}

/// Returns the id of another data directory whose journal is in `dir`; `None` if no file there names another directory.
pub(in crate::log) fn other_owner(disk: &dyn Disk, dir: &Path, directory: Uuid) -> io::Result<Option<Uuid>> {
    for path in files(disk, dir)?.unwrap_or_default() {
        let owner = entry::owner(&read_front(disk, &path, OWNER_SCAN_BYTES)?);
        if owner.is_some_and(|owner| owner != directory) {
            return Ok(owner);
        }
    }
    Ok(None)
}

/// Returns true if a frame was ever written to a journal file in `dir`. The files of an unused journal hold only zeros.
pub(in crate::log) fn was_written(disk: &dyn Disk, dir: &Path) -> io::Result<bool> {
    for path in files(disk, dir)?.unwrap_or_default() {
        if read_front(disk, &path, BLOCK)?.iter().any(|byte| *byte != 0) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Returns the first `bytes` bytes of a file, or all bytes of a shorter file.
fn read_front(disk: &dyn Disk, path: &Path, bytes: usize) -> io::Result<Vec<u8>> {
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

/// Reads the journal in `dir` from the frame `first_frame` on. A torn last frame is dropped, unless it is the frame
/// `first_frame`. Earlier frames that are missing or corrupt are part of the result. Only an error of the disk fails
/// the call.
pub(in crate::log) fn read(disk: &dyn Disk, dir: &Path, directory: Uuid, first_frame: u64) -> io::Result<ReplayResult> {
    let mut journaled = ReplayResult::empty(first_frame);
    let mut corrupt_frames: Vec<u64> = Vec::new();
    let Some(paths) = files(disk, dir)? else {
        journaled.missing = Some("the directory does not exist".to_owned());
        return Ok(journaled);
    };
    // Last frame below `first_frame`, for the error message only.
    let mut last_older = None;
    for path in &paths {
        let bytes = Bytes::from(disk.read(path)?);
        let mut at = 0;
        while at < bytes.len() {
            let frame = entry::decode(&bytes[at..], directory);
            let sequence = frame.as_ref().map(|frame| frame.sequence);
            last_older = last_older.max(sequence.filter(|sequence| *sequence < first_frame));
            let Some(frame) = frame.filter(|frame| frame.sequence >= first_frame) else {
                at += BLOCK;
                continue;
            };
            let content = bytes.slice(at..at + frame.bytes);
            if frame.entries.iter().any(|entry| !entry.is_intact(&content)) {
                corrupt_frames.push(frame.sequence);
            }
            let located = JournaledFrame { path: path.clone(), position: at as u64, entries: frame.entries };
            journaled.frames.insert(frame.sequence, located);
            at += frame.bytes;
        }
    }
    let last = journaled.frames.keys().next_back().copied();
    journaled.next_frame = last.map_or(first_frame, |last| last + 1);
    let gap = last.and_then(|last| (first_frame..last).find(|sequence| !journaled.frames.contains_key(sequence)));
    journaled.unknown_loss = gap.map(|sequence| format!("frame {sequence} of the journal cannot be read"));
    if last.is_none() {
        journaled.missing = Some(match (paths.len(), last_older) {
            (0, _) => "the directory holds no journal file".to_owned(),
            (files, None) => format!("its {files} journal files hold no frame of this data directory"),
            (files, Some(older)) => {
                format!("its {files} journal files end with frame {older}, and replay starts at frame {first_frame}")
            }
        });
    }
    // The first frame was durable when the checkpoint named it, so a corrupt first frame is not a torn one.
    let is_torn = |last: &u64| corrupt_frames.contains(last) || mutant!(DropLastFrame);
    if let Some(last) = last.filter(|last| is_torn(last) && *last > first_frame) {
        // The write of this frame did not complete, so no caller received a result for its entries.
        tracing::warn!(
            frame = last,
            "dropped the last write to the journal, which is incomplete, as after a crash: none of it was acknowledged \
             as persisted, and no action is needed"
        );
        journaled.frames.remove(&last);
    }
    journaled.apply_all(&corrupt_frames);
    Ok(journaled)
}

impl ReplayResult {
    /// Returns a result without entries: no replica has a state to replay, and the generation is 0. Used if the journal
    /// was already replayed or is lost, and as the start value of [`read`]. The next frame to write is `next_frame`.
    pub(in crate::log) fn empty(next_frame: u64) -> Self {
        Self { next_frame, ..Self::default() }
    }

    /// Applies the entries of every replica to its state, in the order of the frames. Corrupt frames are only logged
    /// here: their headers are intact, and [`Self::restore`] identifies the replicas whose data is lost.
    fn apply_all(&mut self, corrupt_frames: &[u64]) {
        for (sequence, JournaledFrame { path, entries, .. }) in &self.frames {
            let corrupt_path = corrupt_frames.contains(sequence).then(|| path.display());
            for DecodedEntry { header, .. } in entries {
                self.generation = self.generation.max(header.generation);
                let state = self.replicas.entry(header.id).or_default();
                state.apply(header, *sequence);
                if let (Some(path), EntryKind::Append) = (&corrupt_path, header.kind) {
                    tracing::warn!(
                        %path, frame = sequence,
                        "a write in the journal is corrupt: check the disk; a replica that needs this write does not \
                         open, and logs its own error"
                    );
                }
            }
        }
    }

    /// Writes the journaled batches into the segments again, in order: the same bytes at the same positions. Then it
    /// syncs the files, and returns the number of bytes written. `wanted` selects the replicas. Batches before a
    /// completed change, and batches that an incomplete reset or an eviction removed, are skipped. A replica with
    /// corrupt batches is marked as lost.
    pub(in crate::log) fn restore(
        &mut self,
        disk: &dyn Disk,
        data: &Path,
        wanted: impl Fn(&PartitionId) -> bool,
    ) -> io::Result<u64> {
        let mut written: BTreeMap<PathBuf, Range<u64>> = BTreeMap::new();
        let mut dirs: BTreeSet<PathBuf> = BTreeSet::new();
        let mut restored = 0;
        let mut corrupt = Vec::new();
        for (sequence, JournaledFrame { path, position, entries }) in &self.frames {
            let needed = |entry: &&DecodedEntry| {
                let state = self.replicas.get(&entry.header.id);
                entry.header.kind == EntryKind::Append
                    && wanted(&entry.header.id)
                    && state.is_some_and(|state| *sequence >= state.barrier && state.needs_batches(&entry.header))
            };
            if !entries.iter().any(|entry| needed(&entry)) {
                continue;
            }
            let file = disk.open(path, OpenMode::Read)?;
            let end = entries.iter().map(|entry| entry.payload.end).max().unwrap_or(0);
            let mut bytes = vec![0; end];
            let read = file.read_at(&mut bytes, *position)?;
            bytes.truncate(read);
            let frame = Bytes::from(bytes);
            for entry in entries.iter().filter(needed) {
                if frame.len() < entry.payload.end || !entry.is_intact(&frame) {
                    let reason = format!("frame {sequence} of the journal in {} is corrupt", path.display());
                    corrupt.push((entry.header.id, reason));
                    continue;
                }
                let dir = replica_dir(data, entry.header.id);
                disk.create_dir_all(&dir)?;
                let segment = dir.join(name(entry.header.segment, "log"));
                let target = disk.open(&segment, OpenMode::Write)?;
                let payload = &frame[entry.payload.clone()];
                let mut present = vec![0; payload.len()];
                let present_bytes = target.read_at(&mut present, entry.header.position)?;
                if present_bytes < payload.len() || present != payload {
                    target.write_at(&[IoSlice::new(payload)], entry.header.position)?;
                    restored += payload.len() as u64;
                }
                // Even bytes that are present may be unsynced.
                let (from, to) = (entry.header.position, entry.header.position + payload.len() as u64);
                let range = written.entry(segment).or_insert(from..to);
                *range = range.start.min(from)..range.end.max(to);
                dirs.insert(dir);
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
        for dir in &dirs {
            // The directory of the replica, that of its topic, and the data directory.
            for ancestor in dir.ancestors().take(3) {
                disk.sync_dir(ancestor)?;
            }
        }
        Ok(restored)
    }
}

impl ReplicaReplayState {
    /// Returns true if the log still contains these batches: neither an eviction nor an incomplete reset has removed
    /// their segment. Removed batches must not be restored. The disk may have no space for them, and the log after a
    /// reset may have other batches at the same offsets.
    fn needs_batches(&self, batches: &EntryHeader) -> bool {
        let reset = self.incomplete_change.filter(|change| change.kind == EntryKind::Reset);
        reset.is_none_or(|reset| batches.generation >= reset.generation)
            && self.local_start.is_none_or(|start| batches.segment >= start.base)
    }

    /// Applies the next entry of the replica, from the frame `sequence`.
    fn apply(&mut self, header: &EntryHeader, sequence: u64) {
        match header.kind {
            EntryKind::Create => {
                *self = Self { created: Some(*header), deleted: self.deleted, barrier: sequence, ..Self::default() };
                self.persisted = Some(header.base);
            }
            // The entry was submitted before a truncation and written after it, so it describes truncated data.
            EntryKind::Append | EntryKind::Synced
                if self.truncations.last().is_some_and(|change| change.generation > header.generation) => {}
            EntryKind::Append | EntryKind::Synced => self.persisted = self.persisted.max(Some(header.end)),
            EntryKind::Truncate | EntryKind::Reset => {
                self.truncations.push(*header);
                if header.kind == EntryKind::Reset {
                    (self.log_start, self.local_start) = (None, None);
                }
                self.incomplete_change = Some(*header);
                // The remaining data may not have been durable either, until the truncation is completed.
                self.persisted = self.persisted.map(|end| end.min(header.base));
            }
            EntryKind::Delete => {
                *self = Self {
                    deleted: Some(header.generation),
                    incomplete_change: Some(*header),
                    barrier: sequence,
                    ..Self::default()
                };
            }
            EntryKind::Completed => {
                self.incomplete_change = None;
                self.barrier = sequence;
                self.persisted = Some(header.base);
            }
            // The log start and the local start only grow, except in a reset.
            EntryKind::LogStart => self.log_start = Some(*header),
            EntryKind::LocalStart => self.local_start = Some(*header),
        }
    }
}
