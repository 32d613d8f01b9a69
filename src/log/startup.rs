//! State of a data directory at its opening: the checkpoint, and the journal entries after it.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use uuid::Uuid;

use super::{
    checkpoint::{Checkpoint, ReplicaRecord, Standing},
    core::Options,
    disk::{Disk, File, Mode, STEP_BYTES},
    error::OpenError,
    identity::io_error,
    journal::{
        entry::{Kind, MAX_NUMBER},
        replay::{self, Journaled, Story},
    },
    recover::Dormant,
    segment::{SegmentInfo, base_of, name},
    shared::replica_dir,
    snapshot::{self, Snapshot},
};
use crate::{
    model::{Offset, PartitionId, TopicId},
    task::clock,
};

/// State found at the opening.
pub(super) struct Found {
    pub(super) first_round: u64,
    pub(super) generation: u64,
    pub(super) clean: bool,
    pub(super) replicas: BTreeMap<PartitionId, Dormant>,
}

/// Reads the checkpoint and replays the journal into the segments. Afterwards nothing in the journal is needed, and a
/// checkpoint records that, so the caller may write to the journal's files.
pub(super) fn load(disk: &Arc<dyn Disk>, dir: &Path, directory: Uuid, options: &Options) -> Result<Found, OpenError> {
    let disk = &**disk;
    let journal_dir = options.journal_in(dir);
    let other =
        replay::other_owner(disk, &journal_dir, directory).map_err(io_error(&journal_dir, "read the journal"))?;
    if let Some(other) = other {
        return Err(OpenError::JournalForeign { dir: dir.to_owned(), journal_dir, other });
    }
    let read = Checkpoint::read(disk, dir, directory).map_err(io_error(dir, "read the checkpoint"))?;
    let known = read.is_some();
    let checkpoint = match read {
        Some(checkpoint) => checkpoint,
        // A directory whose first checkpoint was never written has no replica either.
        None => {
            let replicas = without_checkpoint(disk, dir).map_err(io_error(dir, "list"))?;
            if !replicas.is_empty() {
                tracing::error!(dir = %dir.display(), "the checkpoint is missing or damaged: every segment is read again");
            }
            Checkpoint { replicas, ..Checkpoint::default() }
        }
    };
    // A directory without any content needs no journal.
    let expected = known || !checkpoint.replicas.is_empty();
    let Checkpoint { first_round, generation, standing, replicas } = checkpoint;
    if standing == Standing::Clean {
        let dormant = |record: ReplicaRecord| (record.id, Dormant { record, clean: true });
        let replicas = replicas.into_iter().map(dormant).collect();
        return Ok(Found { first_round, generation, clean: true, replicas });
    }
    let (journaled, records) = if standing == Standing::Settled {
        (Journaled::nothing(first_round), replicas)
    } else {
        let read = replay::read(disk, &journal_dir, directory, first_round);
        let mut journaled = read.map_err(io_error(&journal_dir, "read the journal"))?;
        if !known {
            // The start of the replay is unknown, and older ring files were reused, so a gap proves no loss.
            journaled.unknown_loss = None;
        }
        match &journaled.missing {
            Some(why) if expected => without_journal(disk, dir, first_round, replicas, options, why)?,
            _ => (journaled, replicas),
        }
    };
    let first_round = journaled.next_round;
    let generation = generation.max(journaled.generation);
    let replicas = merge(disk, dir, records, journaled).map_err(io_error(dir, "replay the journal"))?;
    let mut records: Vec<_> = replicas.values().map(|dormant| dormant.record.clone()).collect();
    records.sort_by_key(|record| record.id);
    let settled = Checkpoint { first_round, generation, standing: Standing::Settled, replicas: records };
    settled.write(disk, dir, directory).map_err(io_error(dir, "write the checkpoint"))?;
    Ok(Found { first_round, generation, clean: false, replicas })
}

/// Returns the state that remains without the journal. Fails unless the options accept the loss of the journal.
fn without_journal(
    disk: &dyn Disk,
    dir: &Path,
    first_round: u64,
    mut records: Vec<ReplicaRecord>,
    options: &Options,
    why: &str,
) -> Result<(Journaled, Vec<ReplicaRecord>), OpenError> {
    let journal_dir = options.journal_in(dir);
    if !options.accept_journal_loss {
        return Err(OpenError::JournalLost { dir: dir.to_owned(), journal_dir, why: why.to_owned() });
    }
    tracing::error!(
        dir = %dir.display(), journal_dir = %journal_dir.display(), why,
        "the journal is gone, and log.accept_journal_loss says to go on: what was in it alone is lost"
    );
    for record in without_checkpoint(disk, dir).map_err(io_error(dir, "list"))? {
        // The journal may have held the creation of this replica.
        if records.iter().all(|known| known.id != record.id) {
            records.push(record);
        }
    }
    for record in &mut records {
        record.generation = record.generation.max(1);
        record.persisted = record.segments.last().map_or(record.log_start, |recovered| recovered.end);
    }
    // If the lost journal reappears, none of its frames may be taken for a frame of the new one.
    let next_round = Some(first_round + (1 << 32)).filter(|round| *round <= MAX_NUMBER).unwrap_or(first_round);
    let mut journaled = Journaled::nothing(next_round);
    journaled.generation = 1;
    Ok((journaled, records))
}

/// Returns true if the replica was not read since its record was lost. A torn tail cannot be distinguished from a loss
/// then.
pub(super) fn unread(record: &ReplicaRecord) -> bool {
    record.generation == 0
}

/// Merges the records of the checkpoint with the state in the journal.
fn merge(
    disk: &dyn Disk,
    dir: &Path,
    records: Vec<ReplicaRecord>,
    mut journaled: Journaled,
) -> io::Result<BTreeMap<PartitionId, Dormant>> {
    let mut known: BTreeMap<PartitionId, ReplicaRecord> =
        records.into_iter().map(|record| (record.id, record)).collect();
    let mut deleted = Vec::new();
    for (id, story) in &journaled.replicas {
        let older = |generation: u64| known.get(id).is_none_or(|record| record.generation < generation);
        if story.deleted.is_some_and(older) {
            known.remove(id);
        }
        if let Some(created) = story.created
            && known.get(id).is_none_or(|record| record.generation < created.generation)
        {
            let record = ReplicaRecord::empty(*id, created.generation, created.base, clock::wall_ms());
            known.insert(*id, record);
        }
        if story.unsettled.is_some_and(|head| matches!(head.kind, Kind::Delete)) && !known.contains_key(id) {
            deleted.push(replica_dir(dir, *id));
        }
        if let Some(reset) = story.unsettled.filter(|head| head.kind == Kind::Reset) {
            let left = known.get(id).map_or(Offset::ZERO, |record| record.segments[0].base);
            tracing::debug!(partition = %id, %left, at = %reset.base, "a reset is done again");
            reset_again(disk, &replica_dir(dir, *id), reset.base)?;
        }
    }
    let outcomes = remove_replicas(disk, deleted.iter().map(PathBuf::as_path), &mut drop);
    outcomes.into_iter().collect::<io::Result<()>>()?;
    if journaled.unknown_loss.is_some() {
        // The unreadable frame may have created a replica. A replica that is only on the disk is therefore recorded,
        // and reported as lost.
        for record in without_checkpoint(disk, dir)? {
            known.entry(record.id).or_insert(record);
        }
    }
    let restored = journaled.restore(disk, dir, |id| known.contains_key(id))?;
    if restored > 0 {
        tracing::info!(bytes = restored, "restored from the journal");
    }
    let mut replicas = BTreeMap::new();
    for (id, mut record) in known {
        let unread = unread(&record);
        if let Some(story) = journaled.replicas.get(&id) {
            apply(disk, dir, &mut record, story)?;
            record.lost = record.lost.or_else(|| story.lost.clone());
        }
        record.lost = record.lost.or_else(|| journaled.unknown_loss.clone());
        if unread {
            record.generation = 0;
        }
        replicas.insert(id, Dormant { record, clean: false });
    }
    Ok(replicas)
}

/// Applies the journal's state of one replica to its record.
fn apply(disk: &dyn Disk, dir: &Path, record: &mut ReplicaRecord, story: &Story) -> io::Result<()> {
    let dir = replica_dir(dir, record.id);
    let known = record.generation;
    for cut in story.cuts.iter().filter(|cut| cut.generation > known) {
        record.generation = cut.generation;
        if cut.kind == Kind::Reset {
            *record = ReplicaRecord::empty(record.id, cut.generation, cut.base, clock::wall_ms());
            let is_passed = story.local_start.is_some_and(|moved| moved.generation >= known && moved.base > cut.base);
            match Snapshot::read(disk, &dir, cut.base) {
                Ok(Some(tables)) => (record.epochs, record.producers) = (tables.epochs, tables.producers.into()),
                // The snapshot was removed with the segments before a later start.
                _ if is_passed => {}
                Ok(None) => record.lost = Some(format!("the snapshot at {}, which a reset wrote, is gone", cut.base)),
                Err(error) => record.lost = Some(error.to_string()),
            }
        } else if record.segments.last().is_some_and(|last| last.end > cut.base) {
            let base = record.segments.iter().rfind(|info| info.base <= cut.base).map(|info| info.base);
            rebase(disk, &dir, record, base.unwrap_or(cut.base));
        }
        record.persisted = record.persisted.min(cut.base);
    }
    record.persisted = record.persisted.max(story.persisted.unwrap_or(Offset::ZERO));
    if let Some(moved) = story.log_start.filter(|head| head.generation >= known) {
        record.log_start = record.log_start.max(moved.base);
    }
    if let Some(moved) = story.local_start.filter(|head| head.generation >= known) {
        let start = moved.base;
        record.segments.retain(|info| info.base >= start);
        if record.segments.is_empty() {
            rebase(disk, &dir, record, start);
        }
        record.persisted = record.persisted.max(start);
    }
    Ok(())
}

/// Moves the recovery point, back or forward, to the start of the segment at `base`, with the tables of the snapshot
/// there. If that snapshot is not intact, an earlier segment with an intact one is used.
fn rebase(disk: &dyn Disk, dir: &Path, record: &mut ReplicaRecord, base: Offset) {
    record.segments.retain(|info| info.base < base && info.end <= base);
    let bases: Vec<Offset> = record.segments.iter().map(|info| info.base).chain([base]).collect();
    let (last, tables) = Snapshot::read_last(disk, dir, &bases).unwrap_or_else(|error| {
        record.lost = Some(error.to_string());
        (0, Snapshot::default())
    });
    record.segments.truncate(last);
    record.segments.push(SegmentInfo::empty(bases[last], clock::wall_ms()));
    (record.epochs, record.producers) = (tables.epochs, tables.producers.into());
}

/// Returns a record for each replica whose directory exists, from the names of its files and its first snapshot.
fn without_checkpoint(disk: &dyn Disk, dir: &Path) -> io::Result<Vec<ReplicaRecord>> {
    let mut records = Vec::new();
    for topic in disk.list(dir)?.into_iter().filter(|entry| entry.is_dir) {
        let Ok(topic_id) = topic.name.parse::<TopicId>() else { continue };
        for partition in disk.list(&dir.join(&topic.name))?.into_iter().filter(|entry| entry.is_dir) {
            let Ok(number) = partition.name.parse() else { continue };
            let id = PartitionId::new(topic_id, number);
            let files = disk.list(&replica_dir(dir, id))?;
            let Some(start) = files.iter().filter_map(|entry| base_of(&entry.name)).min() else { continue };
            let mut record = ReplicaRecord::empty(id, 0, start, clock::wall_ms());
            match Snapshot::read(disk, &replica_dir(dir, id), start) {
                Ok(found) => {
                    (record.epochs, record.producers) =
                        found.map(|found| (found.epochs, found.producers.into())).unwrap_or_default()
                }
                Err(error) => record.lost = Some(error.to_string()),
            }
            records.push(record);
        }
    }
    Ok(records)
}

/// Removes all files except the snapshot with which a reset to `at` starts. The reset may have stopped at any step, and
/// more than once. While that snapshot has its own name, a snapshot at `at` belongs to the old log.
fn reset_again(disk: &dyn Disk, dir: &Path, at: Offset) -> io::Result<()> {
    let (beside, snapshot) = (name(at, snapshot::OF_RESET), name(at, "snapshot"));
    let entries = match disk.list(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        listed => listed?,
    };
    let is_beside = entries.iter().any(|entry| entry.name == beside);
    let kept = if is_beside { &beside } else { &snapshot };
    for entry in entries.iter().rev().filter(|entry| entry.name != *kept) {
        disk.remove(&dir.join(&entry.name))?;
    }
    if is_beside {
        disk.rename(&dir.join(&beside), &dir.join(&snapshot))?;
    }
    disk.sync_dir(dir)
}

/// Minimum size in bytes of a file whose disk space is freed in steps, if its deletion keeps the file open.
const LARGE_FILE_BYTES: u64 = STEP_BYTES;

/// Removes the files in a directory. `keep` receives the large files, which are still open.
fn remove_files(disk: &dyn Disk, dir: &Path, keep: &mut dyn FnMut(Arc<dyn File>)) -> io::Result<()> {
    let entries = match disk.list(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        listed => listed?,
    };
    for entry in entries.iter().rev() {
        let path = dir.join(&entry.name);
        let open = if entry.len >= LARGE_FILE_BYTES { disk.open(&path, Mode::Write).ok() } else { None };
        disk.remove(&path)?;
        open.into_iter().for_each(&mut *keep);
    }
    Ok(())
}

/// Removes the directories of replicas, and topic directories that become empty. The removal is durable and costs one
/// sync per topic. Returns one result per replica.
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
    for (topic, places) in topics {
        if let Err(error) = sync_removed(disk, topic) {
            for place in places.into_iter().filter(|place| outcomes[*place].is_ok()).collect::<Vec<_>>() {
                outcomes[place] = Err(io::Error::new(error.kind(), error.to_string()));
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

/// Treats the absence of a file to remove as success.
fn unless_absent(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
