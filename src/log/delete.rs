//! Deleting replicas with their files, many at a time.
//!
//! The journal says that a replica is to go before its first file does, and once more when its directory is gone, durably. A crash in between
//! leaves the first of the two: the next start goes on. Replicas that are deleted together share the journal's rounds and the syncs of
//! their topics' directories.

use std::sync::{Arc, atomic::Ordering};

use super::{
    Log,
    directory::Inner,
    error::ReplicaError,
    journal::entry::Kind,
    shared::{Shared, replica_dir},
};
use crate::model::{Offset, PartitionId};

/// Replicas that could not be deleted, and the reason.
type Failures = Vec<(PartitionId, ReplicaError)>;

impl Log {
    /// As [`Self::delete_replicas`], for one.
    pub fn delete_replica(&self, id: PartitionId) -> Result<(), ReplicaError> {
        self.delete_replicas(&[id]).pop().map_or(Ok(()), |(_, error)| Err(error))
    }

    /// Deletes replicas and their files, or what an earlier try of this process left of them; nothing happens where one is not known. Their
    /// [`Replica`](super::Replica)s were dropped before. Waits for two rounds of the journal; none comes back once this returned without an
    /// error for it.
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

    /// Deletes what is on the disk of replicas that are not known: only the metadata's word that nobody needs them is a licence. Nothing
    /// happens where one is known.
    pub fn delete_unclaimed(&self, ids: &[PartitionId]) -> Vec<(PartitionId, ReplicaError)> {
        let ids: Vec<_> = ids.iter().copied().filter(|id| !self.holds(*id)).collect();
        self.inner.unclaimed.remove(&self.inner.core, &ids)
    }
}

impl Inner {
    /// Takes a replica that nobody has open out of those that are known.
    fn take_known(&self, id: PartitionId) -> Result<Option<Arc<Shared>>, ReplicaError> {
        let mut registry = self.registry();
        if registry.open.get(&id).is_some_and(|open| open.taken.load(Ordering::Acquire)) {
            return Err(ReplicaError::Open { id });
        }
        let (open, dormant) = (registry.open.remove(&id), registry.dormant.remove(&id));
        let shared = |record| Shared::new(&self.core, replica_dir(&self.core.dir, id), record);
        Ok(open.or_else(|| dormant.map(|dormant| shared(dormant.record))))
    }

    /// Puts an entry of each replica into the journal and waits until all are durable; the replicas of which that holds.
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
