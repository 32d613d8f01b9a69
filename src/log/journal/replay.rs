//! Reading the journal after a crash: the valid frames, and the entries that each replica needs.

use std::{
    collections::BTreeMap,
    io::{self, IoSlice},
    ops::Range,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use uuid::Uuid;

use super::entry::{self, EntryHead, EntryRead, Kind};
use crate::{
    log::{
        disk::{BLOCK, Disk, Mode, PIECE_BYTES},
        segment::name,
        shared::replica_dir,
    },
    model::{Offset, PartitionId},
};

/// Bytes at the front of a file that are read to identify its owner: the entry headers of all but the longest frames.
const OWNER: usize = 64 << 10;

/// Result of reading the journal.
#[derive(Default)]
pub(in crate::log) struct Journaled {
    /// Sequence of the next frame that may be written.
    pub(in crate::log) next_round: u64,
    /// Largest generation in the journal.
    pub(in crate::log) generation: u64,
    pub(in crate::log) replicas: BTreeMap<PartitionId, Story>,
    /// Error for a durable frame that cannot be read. The replicas whose data it held are unknown.
    pub(in crate::log) unknown_loss: Option<String>,
    /// Reason why the journal is not the one that the directory ran with, if so.
    pub(in crate::log) missing: Option<String>,
    rounds: BTreeMap<u64, (PathBuf, u64, Vec<EntryRead>)>,
}

/// State of one replica according to the journal.
#[derive(Clone, Debug, Default)]
pub(in crate::log) struct Story {
    /// Creation of the replica, with its start offset.
    pub(in crate::log) created: Option<EntryHead>,
    /// Generation of the replica's deletion.
    pub(in crate::log) deleted: Option<u64>,
    /// Change that was started and not completed; replay repeats it.
    pub(in crate::log) unsettled: Option<EntryHead>,
    /// Truncations and resets, completed or not, in order.
    pub(in crate::log) cuts: Vec<EntryHead>,
    /// Persisted end according to the entries after the last truncation.
    pub(in crate::log) persisted: Option<Offset>,
    pub(in crate::log) log_start: Option<EntryHead>,
    pub(in crate::log) local_start: Option<EntryHead>,
    /// Error for a corrupt entry of the replica that was durable.
    pub(in crate::log) lost: Option<String>,
    /// Sequence of the frame below which appends no longer matter.
    barrier: u64,
}

/// Returns the id of another data directory whose journal is in `dir`, if any.
pub(in crate::log) fn other_owner(disk: &dyn Disk, dir: &Path, directory: Uuid) -> io::Result<Option<Uuid>> {
    for path in files(disk, dir)?.unwrap_or_default() {
        let owner = entry::owner(&front(disk, &path, OWNER)?);
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
    let read = disk.open(path, Mode::Read)?.read_at(&mut front, 0)?;
    front.truncate(read);
    Ok(front)
}

/// Returns the journal's files in `dir`; `None` if that directory does not exist.
fn files(disk: &dyn Disk, dir: &Path) -> io::Result<Option<Vec<PathBuf>>> {
    match disk.list(dir) {
        Ok(entries) => {
            let ours = entries.iter().filter(|entry| entry.name.ends_with(".journal") && !entry.is_dir);
            Ok(Some(ours.map(|entry| dir.join(&entry.name)).collect()))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Reads the journal in `dir` from the frame `first_round` on.
pub(in crate::log) fn read(disk: &dyn Disk, dir: &Path, directory: Uuid, first_round: u64) -> io::Result<Journaled> {
    let mut journaled = Journaled::nothing(first_round);
    let mut torn: Vec<u64> = Vec::new();
    let Some(paths) = files(disk, dir)? else {
        journaled.missing = Some("there is no such folder".to_owned());
        return Ok(journaled);
    };
    let mut older = None;
    for path in &paths {
        let bytes = Bytes::from(disk.read(path)?);
        let mut at = 0;
        while at < bytes.len() {
            let round = entry::decode(&bytes[at..], directory);
            older = older.max(round.as_ref().map(|round| round.sequence).filter(|sequence| *sequence < first_round));
            let Some(round) = round.filter(|round| round.sequence >= first_round) else {
                at += BLOCK;
                continue;
            };
            let content = bytes.slice(at..at + round.bytes);
            if round.entries.iter().any(|entry| !entry.whole(&content)) {
                torn.push(round.sequence);
            }
            journaled.rounds.insert(round.sequence, (path.clone(), at as u64, round.entries));
            at += round.bytes;
        }
    }
    let last = journaled.rounds.keys().next_back().copied();
    journaled.next_round = last.map_or(first_round, |last| last + 1);
    let gap = last.and_then(|last| (first_round..last).find(|sequence| !journaled.rounds.contains_key(sequence)));
    journaled.unknown_loss = gap.map(|sequence| format!("round {sequence} of the journal cannot be read"));
    if last.is_none() {
        journaled.missing = Some(match (paths.len(), older) {
            (0, _) => "it holds no journal file".to_owned(),
            (files, None) => format!("its {files} files hold no round of this directory"),
            (files, Some(older)) => {
                format!("its {files} files end with round {older}, and round {first_round} is where replay begins")
            }
        });
    }
    // The first frame was durable when the checkpoint named it, so its corruption is no torn end.
    let is_torn = |last: &u64| torn.contains(last) || mutant!(DropLastFrame);
    if let Some(last) = last.filter(|last| is_torn(last) && *last > first_round) {
        // No caller received a result for a frame that was being written.
        tracing::warn!(round = last, "the journal's last round is torn and is left out");
        journaled.rounds.remove(&last);
    }
    journaled.tell(&torn);
    Ok(journaled)
}

impl Journaled {
    /// Returns the result for a journal of which nothing is needed. The next frame is `next_round`.
    pub(in crate::log) fn nothing(next_round: u64) -> Self {
        Self { next_round, ..Self::default() }
    }

    /// Applies the entries of every replica to its state.
    fn tell(&mut self, torn: &[u64]) {
        for (sequence, (path, _, entries)) in &self.rounds {
            let content = torn.contains(sequence).then(|| path.display());
            for EntryRead { head, .. } in entries {
                self.generation = self.generation.max(head.generation);
                let story = self.replicas.entry(head.id).or_default();
                story.follow(head, *sequence);
                if let (Some(path), Kind::Append) = (&content, head.kind) {
                    // `restore` identifies the corrupt entry of the frame.
                    tracing::warn!(%path, round = sequence, "a round of the journal is damaged");
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
        let mut touched: BTreeMap<PathBuf, Range<u64>> = BTreeMap::new();
        let mut dirs: BTreeMap<PathBuf, ()> = BTreeMap::new();
        let mut restored = 0;
        let mut damaged = Vec::new();
        for (sequence, (path, at, entries)) in &self.rounds {
            let needed = |entry: &&EntryRead| {
                let story = self.replicas.get(&entry.head.id);
                entry.head.kind == Kind::Append
                    && wanted(&entry.head.id)
                    && story.is_some_and(|story| *sequence >= story.barrier && story.has(&entry.head))
            };
            if !entries.iter().any(|entry| needed(&entry)) {
                continue;
            }
            let file = disk.open(path, Mode::Read)?;
            let end = entries.iter().map(|entry| entry.payload.end).max().unwrap_or(0);
            let mut bytes = vec![0; end];
            let got = file.read_at(&mut bytes, *at)?;
            bytes.truncate(got);
            let round = Bytes::from(bytes);
            for entry in entries.iter().filter(needed) {
                if round.len() < entry.payload.end || !entry.whole(&round) {
                    let why = format!("round {sequence} of the journal in {} is damaged", path.display());
                    damaged.push((entry.head.id, why));
                    continue;
                }
                let dir = replica_dir(data, entry.head.id);
                disk.create_dir_all(&dir)?;
                let segment = dir.join(name(entry.head.segment, "log"));
                let target = disk.open(&segment, Mode::Write)?;
                let payload = &round[entry.payload.clone()];
                let mut there = vec![0; payload.len()];
                let same = target.read_at(&mut there, entry.head.position)? == payload.len() && there == payload;
                if !same {
                    target.write_at(&[IoSlice::new(payload)], entry.head.position)?;
                    restored += payload.len() as u64;
                }
                // Even bytes that are present may be unsynced.
                let (from, to) = (entry.head.position, entry.head.position + payload.len() as u64);
                let range = touched.entry(segment).or_insert(from..to);
                *range = range.start.min(from)..range.end.max(to);
                dirs.insert(dir, ());
            }
        }
        for (id, why) in damaged {
            self.replicas.entry(id).or_default().lost = Some(why);
        }
        for (path, range) in &touched {
            // Another broker's acknowledgements may wait for this disk, so the bytes are written out in pieces.
            disk.write_out(path, range.clone(), PIECE_BYTES)?;
            disk.open(path, Mode::Write)?.sync()?;
        }
        for dir in dirs.keys() {
            for above in dir.ancestors().take(3) {
                disk.sync_dir(above)?;
            }
        }
        Ok(restored)
    }
}

impl Story {
    /// Returns true if the segment of these batches was not removed since. A removed segment would need disk space that
    /// may not exist. Batches from before a reset would also lie at the start of the log that followed the reset.
    fn has(&self, batches: &EntryHead) -> bool {
        let reset = self.unsettled.filter(|change| change.kind == Kind::Reset);
        reset.is_none_or(|reset| batches.generation >= reset.generation)
            && self.local_start.is_none_or(|start| batches.segment >= start.base)
    }

    fn follow(&mut self, head: &EntryHead, sequence: u64) {
        match head.kind {
            Kind::Create => {
                *self = Self { created: Some(*head), deleted: self.deleted, barrier: sequence, ..Self::default() };
                self.persisted = Some(head.base);
            }
            // The entry was submitted before a truncation and written after it, so it describes truncated data.
            Kind::Append | Kind::Synced if self.cuts.last().is_some_and(|cut| cut.generation > head.generation) => {}
            Kind::Append | Kind::Synced => self.persisted = self.persisted.max(Some(head.end)),
            Kind::Cut | Kind::Reset => {
                self.cuts.push(*head);
                if head.kind == Kind::Reset {
                    (self.log_start, self.local_start) = (None, None);
                }
                self.unsettled = Some(*head);
                // The remaining data may not have been durable either, until the truncation is completed.
                self.persisted = self.persisted.map(|end| end.min(head.base));
            }
            Kind::Delete => {
                *self = Self {
                    deleted: Some(head.generation),
                    unsettled: Some(*head),
                    barrier: sequence,
                    ..Self::default()
                };
            }
            Kind::Settled => {
                self.unsettled = None;
                self.barrier = sequence;
                self.persisted = Some(head.base);
            }
            // Both offsets only grow, except in a reset.
            Kind::LogStart => self.log_start = Some(*head),
            Kind::LocalStart => self.local_start = Some(*head),
        }
    }
}
