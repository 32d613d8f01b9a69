//! State of a data directory at its opening: the checkpoint, and the journal entries after it. Also removes the
//! directories of deleted replicas.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use uuid::Uuid;

use super::registry::UnopenedReplica;
use crate::{
    log::{
        disk::{Disk, File, OpenMode, STEP_BYTES},
        error::{DataDirError, io_error},
        format::{
            Checkpoint, CheckpointKind, EntryKind, MAX_NUMBER, ReplicaCheckpoint, SegmentInfo, Snapshot, replica_dir,
            segment::{base_of, is_quarantined, name},
            snapshot,
        },
        journal::replay::{self, ReplayResult, ReplicaReplayState},
        options::LogOptions,
    },
    model::{Offset, PartitionId, TopicId},
    task::clock,
};

/// State of the data directory after replay.
pub(super) struct LoadedState {
    /// Sequence of the next frame to write.
    pub(super) first_frame: u64,
    /// Largest generation assigned so far.
    pub(super) generation: u64,
    /// True after a clean shutdown: nothing was replayed, and the records describe the files.
    pub(super) clean: bool,
    pub(super) replicas: BTreeMap<PartitionId, UnopenedReplica>,
}

/// Reads the checkpoint and replays the journal into the segments. Then writes a checkpoint that needs nothing in the
/// journal, so that the caller may overwrite the journal's files. After a clean shutdown nothing is replayed or
/// written. Fails with `JournalForeign` if a journal file belongs to another data directory, and with `JournalLost` as
/// [`recover_without_journal`] does.
pub(super) fn load(
    disk: &Arc<dyn Disk>,
    dir: &Path,
    directory: Uuid,
    options: &LogOptions,
) -> Result<LoadedState, DataDirError> {
    let disk = &**disk;
    let journal_dir = options.journal_in(dir);
    let owner =
        replay::other_owner(disk, &journal_dir, directory).map_err(io_error(&journal_dir, "read the journal"))?;
    if let Some(owner) = owner {
        return Err(DataDirError::JournalForeign { dir: dir.to_owned(), journal_dir, owner });
    }
    let read = Checkpoint::read(disk, dir, directory).map_err(io_error(dir, "read the checkpoint"))?;
    let has_checkpoint = read.is_some();
    let checkpoint = match read {
        Some(checkpoint) => checkpoint,
        // The scan finds no replica if the first checkpoint was never written.
        None => {
            let replicas = scan_replicas(disk, dir).map_err(io_error(dir, "list"))?;
            if !replicas.is_empty() {
                tracing::error!(
                    dir = %dir.display(),
                    "the checkpoint is missing or corrupt: every segment is read again"
                );
            }
            Checkpoint { replicas, ..Checkpoint::default() }
        }
    };
    // Without a checkpoint and without replicas the directory is new, and has no journal yet.
    let expects_journal = has_checkpoint || !checkpoint.replicas.is_empty();
    let Checkpoint { first_frame, generation, kind, replicas } = checkpoint;
    if kind == CheckpointKind::CleanShutdown {
        let unopened = |record: ReplicaCheckpoint| (record.id, UnopenedReplica { record, clean: true });
        let replicas = replicas.into_iter().map(unopened).collect();
        return Ok(LoadedState { first_frame, generation, clean: true, replicas });
    }
    let (journaled, records) = if kind == CheckpointKind::Replayed {
        (ReplayResult::empty(first_frame), replicas)
    } else {
        let replayed = replay::read(disk, &journal_dir, directory, first_frame);
        let mut journaled = replayed.map_err(io_error(&journal_dir, "read the journal"))?;
        if !has_checkpoint {
            // The start of the replay is unknown, and older ring files were reused, so a gap proves no loss.
            journaled.unknown_loss = None;
        }
        match &journaled.missing {
            Some(reason) if expects_journal => {
                recover_without_journal(disk, dir, first_frame, replicas, options, reason)?
            }
            _ => (journaled, replicas),
        }
    };
    let first_frame = journaled.next_frame;
    let generation = generation.max(journaled.generation);
    let replicas = apply_journal(disk, dir, records, journaled).map_err(io_error(dir, "replay the journal"))?;
    let mut records: Vec<_> = replicas.values().map(|unopened| unopened.record.clone()).collect();
    records.sort_by_key(|record| record.id);
    let replayed = Checkpoint { first_frame, generation, kind: CheckpointKind::Replayed, replicas: records };
    replayed.write(disk, dir, directory).map_err(io_error(dir, "write the checkpoint"))?;
    Ok(LoadedState { first_frame, generation, clean: false, replicas })
}

/// Returns the state that remains without the journal: an empty replay result, and records whose persisted end is their
/// recovery point. A replica without a record gets one from its files. Fails with `JournalLost` unless the options
/// accept the loss of the journal. `reason` describes the content of the journal's directory.
fn recover_without_journal(
    disk: &dyn Disk,
    dir: &Path,
    first_frame: u64,
    mut records: Vec<ReplicaCheckpoint>,
    options: &LogOptions,
    reason: &str,
) -> Result<(ReplayResult, Vec<ReplicaCheckpoint>), DataDirError> {
    let journal_dir = options.journal_in(dir);
    if !options.accept_journal_loss {
        return Err(DataDirError::JournalLost { dir: dir.to_owned(), journal_dir, reason: reason.to_owned() });
    }
    tracing::error!(
        dir = %dir.display(), journal_dir = %journal_dir.display(), reason,
        "the journal is missing, and log.accept_journal_loss allows the start: data that only the journal held is lost"
    );
    for record in scan_replicas(disk, dir).map_err(io_error(dir, "list"))? {
        // The journal may have held the creation of this replica.
        if records.iter().all(|existing| existing.id != record.id) {
            records.push(record);
        }
    }
    for record in &mut records {
        record.generation = record.generation.max(1);
        record.persisted = record.segments.last().map_or(record.log_start, |segment| segment.end);
    }
    // The lost journal may reappear. With a large gap, its frames and those of the new journal have different
    // sequences.
    let next_frame = Some(first_frame + (1 << 32)).filter(|sequence| *sequence <= MAX_NUMBER).unwrap_or(first_frame);
    let mut journaled = ReplayResult::empty(next_frame);
    journaled.generation = 1;
    Ok((journaled, records))
}

/// Returns all replicas: the records of the checkpoint, changed by the operations in the journal. Also repeats
/// incomplete deletions and resets on the disk, and restores journaled batches in the segments.
fn apply_journal(
    disk: &dyn Disk,
    dir: &Path,
    records: Vec<ReplicaCheckpoint>,
    mut journaled: ReplayResult,
) -> io::Result<BTreeMap<PartitionId, UnopenedReplica>> {
    let mut by_id: BTreeMap<PartitionId, ReplicaCheckpoint> =
        records.into_iter().map(|record| (record.id, record)).collect();
    let mut deleted = Vec::new();
    for (id, state) in &journaled.replicas {
        let is_newer = |generation: u64| by_id.get(id).is_none_or(|record| record.generation < generation);
        if state.deleted.is_some_and(is_newer) {
            by_id.remove(id);
        }
        if let Some(created) = state.created
            && by_id.get(id).is_none_or(|record| record.generation < created.generation)
        {
            let record = ReplicaCheckpoint::empty(*id, created.generation, created.base, clock::wall_ms());
            by_id.insert(*id, record);
        }
        let is_deletion = state.incomplete_change.is_some_and(|change| change.kind == EntryKind::Delete);
        if is_deletion && !by_id.contains_key(id) {
            deleted.push(replica_dir(dir, *id));
        }
        if let Some(reset) = state.incomplete_change.filter(|change| change.kind == EntryKind::Reset) {
            let old_start = by_id.get(id).map_or(Offset::ZERO, |record| record.segments[0].base);
            tracing::debug!(partition = %id, %old_start, at = %reset.base, "repeating a reset");
            reset_again(disk, &replica_dir(dir, *id), reset.base)?;
        }
    }
    let outcomes = remove_replicas(disk, deleted.iter().map(PathBuf::as_path), &mut drop);
    outcomes.into_iter().collect::<io::Result<()>>()?;
    if journaled.unknown_loss.is_some() {
        // The unreadable frame may have created a replica. So a replica that is only on the disk gets a record too, and
        // is refused as lost.
        for record in scan_replicas(disk, dir)? {
            by_id.entry(record.id).or_insert(record);
        }
    }
    let restored = journaled.restore(disk, dir, |id| by_id.contains_key(id))?;
    if restored > 0 {
        tracing::info!(bytes = restored, "restored from the journal");
    }
    let mut replicas = BTreeMap::new();
    for (id, mut record) in by_id {
        let needs_scan = record.needs_full_scan();
        if let Some(state) = journaled.replicas.get(&id) {
            apply(disk, dir, &mut record, state)?;
            record.refusal = record.refusal.or_else(|| state.lost.clone());
        }
        record.refusal = record.refusal.or_else(|| journaled.unknown_loss.clone());
        if needs_scan {
            // Applying the journal's state may have set a generation. The replica must still be scanned completely.
            record.generation = 0;
        }
        replicas.insert(id, UnopenedReplica { record, clean: false });
    }
    Ok(replicas)
}

/// Applies the journal's state of one replica to its record. Changes that the record already contains are skipped by
/// their generation.
fn apply(disk: &dyn Disk, dir: &Path, record: &mut ReplicaCheckpoint, state: &ReplicaReplayState) -> io::Result<()> {
    let dir = replica_dir(dir, record.id);
    let old_generation = record.generation;
    for change in state.truncations.iter().filter(|change| change.generation > old_generation) {
        record.generation = change.generation;
        if change.kind == EntryKind::Reset {
            *record = ReplicaCheckpoint::empty(record.id, change.generation, change.base, clock::wall_ms());
            let was_evicted =
                state.local_start.is_some_and(|moved| moved.generation >= old_generation && moved.base > change.base);
            match Snapshot::read(disk, &dir, change.base) {
                Ok(Some(snapshot)) => (record.epochs, record.producers) = (snapshot.epochs, snapshot.producers.into()),
                // A later eviction removed the snapshot together with the first segments.
                _ if was_evicted => {}
                Ok(None) => {
                    record.refusal = Some(format!("the snapshot at {}, which a reset wrote, is missing", change.base))
                }
                Err(error) => record.refusal = Some(error.to_string()),
            }
        } else if record.segments.last().is_some_and(|last| last.end > change.base) {
            let base = record.segments.iter().rfind(|info| info.base <= change.base).map(|info| info.base);
            rebase(disk, &dir, record, base.unwrap_or(change.base));
        }
        record.persisted = record.persisted.min(change.base);
    }
    record.persisted = record.persisted.max(state.persisted.unwrap_or(Offset::ZERO));
    if let Some(moved) = state.log_start.filter(|moved| moved.generation >= old_generation) {
        record.log_start = record.log_start.max(moved.base);
    }
    if let Some(moved) = state.local_start.filter(|moved| moved.generation >= old_generation) {
        let start = moved.base;
        record.segments.retain(|info| info.base >= start);
        if record.segments.is_empty() {
            rebase(disk, &dir, record, start);
        }
        record.persisted = record.persisted.max(start);
    }
    Ok(())
}

/// Moves the recovery point, back or forward, to the start of the segment at `base`. The epoch history and producer
/// state become those of the snapshot there. If that snapshot is not intact, an earlier segment with an intact one is
/// used. If the snapshot at the first segment is corrupt, sets the refusal of the record.
fn rebase(disk: &dyn Disk, dir: &Path, record: &mut ReplicaCheckpoint, base: Offset) {
    record.segments.retain(|info| info.base < base && info.end <= base);
    let bases: Vec<Offset> = record.segments.iter().map(|info| info.base).chain([base]).collect();
    let (last, snapshot) = Snapshot::read_last(disk, dir, &bases).unwrap_or_else(|error| {
        record.refusal = Some(error.to_string());
        (0, Snapshot::default())
    });
    record.segments.truncate(last);
    record.segments.push(SegmentInfo::empty(bases[last], clock::wall_ms()));
    (record.epochs, record.producers) = (snapshot.epochs, snapshot.producers.into());
}

/// Returns a record for each replica that has segment files, from the names of these files and the snapshot at the
/// first segment. A snapshot that cannot be read is the refusal of the record. The generation 0 in these records
/// requests a scan of all segments.
fn scan_replicas(disk: &dyn Disk, dir: &Path) -> io::Result<Vec<ReplicaCheckpoint>> {
    let mut records = Vec::new();
    for topic in disk.list(dir)?.into_iter().filter(|entry| entry.is_dir) {
        let Ok(topic_id) = topic.name.parse::<TopicId>() else { continue };
        for partition in disk.list(&dir.join(&topic.name))?.into_iter().filter(|entry| entry.is_dir) {
            let Ok(number) = partition.name.parse() else { continue };
            let id = PartitionId::new(topic_id, number);
            let files = disk.list(&replica_dir(dir, id))?;
            let Some(start) = files.iter().filter_map(|entry| base_of(&entry.name)).min() else { continue };
            let mut record = ReplicaCheckpoint::empty(id, 0, start, clock::wall_ms());
            match Snapshot::read(disk, &replica_dir(dir, id), start) {
                Ok(found) => {
                    (record.epochs, record.producers) =
                        found.map(|found| (found.epochs, found.producers.into())).unwrap_or_default()
                }
                Err(error) => record.refusal = Some(error.to_string()),
            }
            records.push(record);
        }
    }
    Ok(records)
}

/// Repeats a reset to `at`, which may have stopped at any step. Removes all files except quarantined ones and the
/// snapshot with which the new log starts, and gives this snapshot its final name. While the snapshot has its temporary
/// name, the file with its final name belongs to the old log. Does nothing if the directory does not exist.
fn reset_again(disk: &dyn Disk, dir: &Path, at: Offset) -> io::Result<()> {
    let (reset_name, snapshot) = (name(at, snapshot::RESET_EXTENSION), name(at, "snapshot"));
    let entries = match disk.list(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        listed => listed?,
    };
    let has_reset_file = entries.iter().any(|entry| entry.name == reset_name);
    let kept_name = if has_reset_file { &reset_name } else { &snapshot };
    let is_kept = |name: &String| name == kept_name || is_quarantined(name);
    for entry in entries.iter().rev().filter(|entry| !is_kept(&entry.name)) {
        disk.remove(&dir.join(&entry.name))?;
    }
    if has_reset_file {
        disk.rename(&dir.join(&reset_name), &dir.join(&snapshot))?;
    }
    disk.sync_dir(dir)
}

/// Minimum size in bytes of a file that [`remove_files`] passes to `keep`, so that its disk space is freed in steps.
const LARGE_FILE_BYTES: u64 = STEP_BYTES;

/// Removes the files in a directory, if the directory exists. `keep` receives the large files, which are still open,
/// and decides when their disk space is freed.
fn remove_files(disk: &dyn Disk, dir: &Path, keep: &mut dyn FnMut(Arc<dyn File>)) -> io::Result<()> {
    let entries = match disk.list(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        listed => listed?,
    };
    for entry in entries.iter().rev() {
        let path = dir.join(&entry.name);
        let large_file = if entry.len >= LARGE_FILE_BYTES { disk.open(&path, OpenMode::Write).ok() } else { None };
        disk.remove(&path)?;
        large_file.into_iter().for_each(&mut *keep);
    }
    Ok(())
}

/// Removes the directories of replicas, and topic directories that become empty. The removal is durable. The replicas
/// of a topic share the syncs. Returns one result per replica, in the order of `dirs`. `keep` receives the large files,
/// as in [`remove_files`].
pub(super) fn remove_replicas<'a>(
    disk: &dyn Disk,
    dirs: impl Iterator<Item = &'a Path>,
    keep: &mut dyn FnMut(Arc<dyn File>),
) -> Vec<io::Result<()>> {
    let (mut outcomes, mut topics) = (Vec::new(), BTreeMap::<&Path, Vec<usize>>::new());
    for dir in dirs {
        topics.entry(dir.parent().unwrap_or(dir)).or_default().push(outcomes.len());
        outcomes.push(remove_files(disk, dir, keep).and_then(|()| unless_absent(disk.remove_dir(dir))));
    }
    for (topic, indexes) in topics {
        if let Err(error) = sync_removed(disk, topic) {
            for index in indexes.into_iter().filter(|index| outcomes[*index].is_ok()).collect::<Vec<_>>() {
                outcomes[index] = Err(io::Error::new(error.kind(), error.to_string()));
            }
        }
    }
    outcomes
}

/// Makes the removal of a topic's replica directories durable, and removes the topic's directory if it is empty.
fn sync_removed(disk: &dyn Disk, topic: &Path) -> io::Result<()> {
    unless_absent(disk.sync_dir(topic))?;
    if disk.remove_dir(topic).is_ok() {
        disk.sync_dir(topic.parent().unwrap_or(topic))?;
    }
    Ok(())
}

/// Treats the absence of a file or directory as the success of its removal or sync.
fn unless_absent(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
