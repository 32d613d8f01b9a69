//! The registry of a data directory: its replicas, opened or not, by partition. It opens and creates them, and leaves
//! their content to `recovery` and to the replicas.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    DataDir, DataDirInner,
    recovery::{quarantine_segments, recover},
};
use crate::{
    log::{
        error::ReplicaError,
        format::{EntryKind, ReplicaCheckpoint, replica_dir},
        replica::{ReplicaInner, ReplicaLog},
    },
    model::{Offset, PartitionId, TopicId},
    task::clock,
};

/// A replica that was not opened yet.
#[derive(Clone)]
pub(super) struct UnopenedReplica {
    pub(super) record: ReplicaCheckpoint,
    /// True if the record describes the files exactly, because a clean shutdown wrote it.
    pub(super) clean: bool,
}

/// All replicas of a data directory. A replica is in one of the two maps.
pub(super) struct ReplicaRegistry {
    open: BTreeMap<PartitionId, Arc<ReplicaInner>>,
    /// Replicas that the last start found and that were not opened since.
    unopened: BTreeMap<PartitionId, UnopenedReplica>,
}

impl ReplicaRegistry {
    pub(super) fn new(unopened: BTreeMap<PartitionId, UnopenedReplica>) -> Self {
        Self { open: BTreeMap::new(), unopened }
    }

    pub(super) fn len(&self) -> usize {
        self.open.len() + self.unopened.len()
    }

    pub(super) fn open_replicas(&self) -> Vec<Arc<ReplicaInner>> {
        self.open.values().cloned().collect()
    }

    /// Returns true if a replica was not opened since a crash. Its record may not describe its files.
    pub(super) fn has_unscanned(&self) -> bool {
        self.unopened.values().any(|unopened| !unopened.clean)
    }

    /// Returns the records of all replicas for a checkpoint, in order.
    pub(super) fn checkpoint_records(&self) -> Vec<ReplicaCheckpoint> {
        let mut records: Vec<_> = self.unopened.values().map(|unopened| unopened.record.clone()).collect();
        records.extend(self.open.values().map(|replica| replica.checkpoint_record()));
        records.sort_by_key(|record| record.id);
        records
    }

    #[cfg(test)]
    pub(super) fn remove(&mut self, id: PartitionId) {
        self.open.remove(&id);
    }
}

impl DataDir {
    /// Returns the replicas of this directory, in order.
    pub fn partitions(&self) -> Vec<PartitionId> {
        let registry = self.inner.registry.lock();
        let mut ids: Vec<_> = registry.open.keys().chain(registry.unopened.keys()).copied().collect();
        ids.sort_unstable();
        ids
    }

    /// Returns the replicas of a topic, in order.
    pub fn partitions_of(&self, topic: TopicId) -> Vec<PartitionId> {
        let registry = self.inner.registry.lock();
        let of_topic = PartitionId::new(topic, 0)..=PartitionId::new(topic, u32::MAX);
        let open = registry.open.range(of_topic.clone()).map(|(id, _)| *id);
        let mut ids: Vec<_> = open.chain(registry.unopened.range(of_topic).map(|(id, _)| *id)).collect();
        ids.sort_unstable();
        ids
    }

    /// Returns true if this directory has the replica.
    pub fn holds(&self, id: PartitionId) -> bool {
        let registry = self.inner.registry.lock();
        registry.open.contains_key(&id) || registry.unopened.contains_key(&id)
    }

    /// Opens a replica. A replica that does not exist is created, empty, at `start`. Blocks. The first opening after a
    /// crash scans the unsynced part of the segments. Fails with one of these errors:
    /// - `Open` if the replica has a writer
    /// - `Lost` if acknowledged data is missing
    /// - `Failed` if the directory accepts no writes
    /// - `Io` for an error of the disk
    pub fn open_replica(&self, id: PartitionId, start: Offset) -> Result<ReplicaLog, ReplicaError> {
        let inner = &self.inner;
        if let Some(reason) = inner.ctx.refusal() {
            return Err(ReplicaError::Failed { reason });
        }
        let (replica, unopened) = {
            let registry = inner.registry.lock();
            (registry.open.get(&id).cloned(), registry.unopened.get(&id).cloned())
        };
        let replica = match (replica, unopened) {
            (Some(replica), _) => replica,
            (None, Some(unopened)) => {
                let dir = replica_dir(&inner.ctx.dir, id);
                let UnopenedReplica { record, clean } = unopened;
                let io = |source| ReplicaError::Io { id, path: dir.clone(), source };
                // After a power failure the journal may hold the creation of a replica whose directory the file system
                // has lost. The directory is created again.
                let is_empty = record.segments.iter().all(|segment| segment.bytes == 0);
                let is_created = is_empty && inner.ensure_dir(&dir).map_err(io)?;
                let is_exact = clean && record.refusal.is_none();
                let record = if is_exact { record } else { recover(&*inner.ctx.disk, &dir, record)? };
                let replica = inner.register_recovered(id, dir, record, clean);
                if is_created {
                    replica.on_names_changed();
                }
                replica
            }
            (None, None) => inner.create(id, start)?,
        };
        ReplicaLog::open(replica).ok_or(ReplicaError::Open { id })
    }
}

impl DataDirInner {
    /// Registers a recovered replica as open. If another thread has registered it first, that replica is returned.
    /// After a crash (`clean` is false) the recovery point stays at that of the checkpoint until the scanned data is
    /// synced.
    fn register_recovered(
        &self,
        id: PartitionId,
        dir: PathBuf,
        mut record: ReplicaCheckpoint,
        clean: bool,
    ) -> Arc<ReplicaInner> {
        let mut registry = self.registry.lock();
        if let Some(replica) = registry.open.get(&id) {
            return replica.clone();
        }
        let synced = registry.unopened.remove(&id).map(|unopened| unopened.record).filter(|_| !clean);
        if record.needs_full_scan() {
            // The scan has read the complete replica. A generation above 0 marks its next record as valid.
            record.generation = self.ctx.next_generation();
        }
        let replica = ReplicaInner::new(&self.ctx, dir, record);
        let is_dirty = synced.is_some();
        // A checkpoint that is written before the next sync must not describe the scanned data as synced.
        synced.into_iter().for_each(|synced| replica.move_recovery_point(synced));
        registry.open.insert(id, replica.clone());
        drop(registry);
        if is_dirty {
            replica.mark_dirty(0);
        }
        replica
    }

    /// Creates the directory of a replica if it is absent. Returns true if it was created.
    fn ensure_dir(&self, dir: &Path) -> io::Result<bool> {
        match self.ctx.disk.list(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.ctx.disk.create_dir_all(dir).map(|()| true),
            listed => listed.map(|_| false),
        }
    }

    /// Creates and registers an empty replica at `start`. Does not wait for the journal entry of the creation. Segments
    /// that are already in its directory are quarantined.
    fn create(&self, id: PartitionId, start: Offset) -> Result<Arc<ReplicaInner>, ReplicaError> {
        let dir = replica_dir(&self.ctx.dir, id);
        let io = |source| ReplicaError::Io { id, path: dir.clone(), source };
        if !self.ensure_dir(&dir).map_err(io)? {
            quarantine_segments(&*self.ctx.disk, &dir).map_err(io)?;
            self.strays.remove(id);
        }
        let record = ReplicaCheckpoint::empty(id, self.ctx.next_generation(), start, clock::wall_ms());
        let replica = ReplicaInner::new(&self.ctx, dir.clone(), record);
        replica.create_file().map_err(io)?;
        self.registry.lock().open.insert(id, replica.clone());
        self.ctx.submit_unacked(&replica, replica.marker(EntryKind::Create, start));
        replica.mark_dirty(0);
        Ok(replica)
    }

    /// Removes a replica from the registry, and returns it, also if it was not opened; `None` if the directory does not
    /// hold it. Fails with [`ReplicaError::Open`] if the replica has a writer.
    pub(super) fn take_replica(&self, id: PartitionId) -> Result<Option<Arc<ReplicaInner>>, ReplicaError> {
        let mut registry = self.registry.lock();
        if registry.open.get(&id).is_some_and(|open| open.has_writer()) {
            return Err(ReplicaError::Open { id });
        }
        let (open, unopened) = (registry.open.remove(&id), registry.unopened.remove(&id));
        let from_record = |record| ReplicaInner::new(&self.ctx, replica_dir(&self.ctx.dir, id), record);
        Ok(open.or_else(|| unopened.map(|unopened| from_record(unopened.record))))
    }
}
