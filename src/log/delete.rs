//! Deleting replicas with their files, many at a time. Replicas that are deleted together share the journal's frames
//! and the syncs of their topics' directories.
//!
//! # Crash
//!
//! The journal records the deletion of a replica before its first file is removed, and its completion when the removal
//! of the directory is durable. A crash between the two leaves the first entry, and the next start continues the
//! deletion.

use std::sync::{Arc, atomic::Ordering};

use super::{
    Log,
    directory::Inner,
    error::ReplicaError,
    journal::entry::Kind,
    shared::{Shared, replica_dir},
};
use crate::model::{Offset, PartitionId};

/// Replicas that could not be deleted, each with the error.
type Failures = Vec<(PartitionId, ReplicaError)>;

impl Log {
    /// Deletes one replica, as [`Self::delete_replicas`] does.
    pub fn delete_replica(&self, id: PartitionId) -> Result<(), ReplicaError> {
        self.delete_replicas(&[id]).pop().map_or(Ok(()), |(_, error)| Err(error))
    }

    /// Deletes replicas and their files, or the files that an earlier attempt of this process left. An unknown replica
    /// is ignored. The [`Replica`](super::Replica)s must have been dropped before. Waits for two frames of the journal.
    /// A replica without an error in the result never reappears.
    pub fn delete_replicas(&self, ids: &[PartitionId]) -> Vec<(PartitionId, ReplicaError)> {
        let inner = &self.inner;
        let (mut failures, mut known, mut left) = (Failures::new(), Vec::new(), Vec::new());
        for id in ids {
            match inner.take_known(*id) {
                Ok(Some(shared)) => known.push(shared),
                Ok(None) if inner.unclaimed.has_begun(*id) => left.push(*id),
                Ok(None) => {}
                Err(error) => failures.push((*id, error)),
            }
        }
        for shared in &known {
            drop(shared.failed.set("the replica was deleted".to_owned()));
            shared.core.tail.truncate(&shared.tail, Offset::ZERO);
            sim_event!(LogChangeStarted { partition: shared.id, to: Offset::ZERO, emptied: true });
            shared.state().generation = inner.core.next_generation();
        }
        let mut begun = inner.commit_all(known, Kind::Delete, &mut failures);
        for shared in &begun {
            for segment in &shared.state().segments {
                inner.core.files.forget(segment.file.serial);
            }
            inner.unclaimed.begin(shared.id);
            left.push(shared.id);
        }
        let kept = inner.unclaimed.remove(&inner.core, &left);
        begun.retain(|shared| kept.iter().all(|(id, _)| *id != shared.id));
        failures.extend(kept);
        let settled = inner.commit_all(begun, Kind::Settled, &mut failures);
        for _shared in &settled {
            sim_event!(LogChangeCompleted { partition: _shared.id });
        }
        failures
    }

    /// Deletes the files of replicas that are not registered. Only metadata that proves them unnecessary permits this
    /// call. A registered replica is ignored.
    pub fn delete_unclaimed(&self, ids: &[PartitionId]) -> Vec<(PartitionId, ReplicaError)> {
        let ids: Vec<_> = ids.iter().copied().filter(|id| !self.holds(*id)).collect();
        self.inner.unclaimed.remove(&self.inner.core, &ids)
    }
}

impl Inner {
    /// Removes a replica without a writer from the registry, and returns it.
    fn take_known(&self, id: PartitionId) -> Result<Option<Arc<Shared>>, ReplicaError> {
        let mut registry = self.registry();
        if registry.open.get(&id).is_some_and(|open| open.taken.load(Ordering::Acquire)) {
            return Err(ReplicaError::Open { id });
        }
        let (open, dormant) = (registry.open.remove(&id), registry.dormant.remove(&id));
        let shared = |record| Shared::new(&self.core, replica_dir(&self.core.dir, id), record);
        Ok(open.or_else(|| dormant.map(|dormant| shared(dormant.record))))
    }

    /// Submits an entry of each replica to the journal and waits for the results. Returns the replicas whose entry is
    /// durable.
    fn commit_all(&self, replicas: Vec<Arc<Shared>>, kind: Kind, failures: &mut Failures) -> Vec<Arc<Shared>> {
        let heads = replicas.iter().map(|shared| {
            let generation = shared.state().generation;
            (shared, shared.head(kind, generation, Offset::ZERO, Offset::ZERO))
        });
        let outcomes = self.core.commit_all(heads);
        let mut done = Vec::new();
        for (shared, outcome) in replicas.into_iter().zip(outcomes) {
            match outcome {
                Ok(()) => done.push(shared),
                Err(error) => failures.push((shared.id, ReplicaError::Failed { reason: error.to_string() })),
            }
        }
        done
    }
}
