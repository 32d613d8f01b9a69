//! Deleting replicas with their files, many at a time. Replicas that are deleted together share the journal's frames
//! and the syncs of their topics' directories.
//!
//! # Crash
//!
//! The journal holds an entry for the deletion of a replica before its first file is removed. When the removal of its
//! directory is durable, the journal holds a completion entry. After a crash between the two entries, the next start
//! continues the deletion.

use std::sync::Arc;

use super::{DataDir, DataDirInner};
use crate::{
    log::{error::ReplicaError, format::EntryKind, replica::ReplicaInner},
    model::{Offset, PartitionId},
};

/// Replicas that could not be deleted, each with the error.
type Failures = Vec<(PartitionId, ReplicaError)>;

impl DataDir {
    /// Deletes one replica, as [`Self::delete_replicas`] does.
    pub fn delete_replica(&self, id: PartitionId) -> Result<(), ReplicaError> {
        self.delete_replicas(&[id]).pop().map_or(Ok(()), |(_, error)| Err(error))
    }

    /// Deletes replicas and their files, or the files that an earlier attempt of this process left. An unknown replica
    /// is ignored. A replica with an open [`ReplicaLog`](crate::log::ReplicaLog) is not deleted and fails with
    /// [`ReplicaError::Open`]. Waits for two frames of the journal, or more for many replicas. Returns the replicas
    /// that could not be deleted completely, each with the error. A deleted replica never reappears.
    pub fn delete_replicas(&self, ids: &[PartitionId]) -> Vec<(PartitionId, ReplicaError)> {
        let inner = &self.inner;
        // `with_files` also names replicas whose earlier deletion is durable and has left files.
        let (mut failures, mut replicas, mut with_files) = (Failures::new(), Vec::new(), Vec::new());
        for id in ids {
            match inner.take_replica(*id) {
                Ok(Some(replica)) => replicas.push(replica),
                Ok(None) if inner.strays.is_deleting(*id) => with_files.push(*id),
                Ok(None) => {}
                Err(error) => failures.push((*id, error)),
            }
        }
        for replica in &replicas {
            replica.begin_delete();
        }
        let mut started = inner.commit_all(replicas, EntryKind::Delete, &mut failures);
        for replica in &started {
            replica.close_files();
            inner.strays.add(replica.id());
            with_files.push(replica.id());
        }
        let undeleted = inner.strays.delete(&inner.ctx, &with_files);
        started.retain(|replica| undeleted.iter().all(|(id, _)| *id != replica.id()));
        failures.extend(undeleted);
        let completed = inner.commit_all(started, EntryKind::Completed, &mut failures);
        for _replica in &completed {
            sim_event!(LogChangeCompleted { partition: _replica.id() });
        }
        failures
    }

    /// Deletes the files of stray replicas. The caller must have metadata that proves these files unnecessary. A
    /// registered replica is ignored. Returns the replicas whose files could not be removed durably, each with the
    /// error.
    pub fn delete_stray(&self, ids: &[PartitionId]) -> Vec<(PartitionId, ReplicaError)> {
        let ids: Vec<_> = ids.iter().copied().filter(|id| !self.holds(*id)).collect();
        self.inner.strays.delete(&self.inner.ctx, &ids)
    }
}

impl DataDirInner {
    /// Submits an entry of this kind for each replica to the journal, and waits until all are durable or failed.
    /// Returns the replicas whose entry is durable. Adds the replicas whose entry failed to `failures`.
    fn commit_all(
        &self,
        replicas: Vec<Arc<ReplicaInner>>,
        kind: EntryKind,
        failures: &mut Failures,
    ) -> Vec<Arc<ReplicaInner>> {
        let entries = replicas.iter().map(|replica| (replica, replica.marker(kind, Offset::ZERO)));
        let outcomes = self.ctx.commit_all(entries);
        let mut durable = Vec::new();
        for (replica, outcome) in replicas.into_iter().zip(outcomes) {
            match outcome {
                Ok(()) => durable.push(replica),
                Err(error) => failures.push((replica.id(), ReplicaError::Failed { reason: error.to_string() })),
            }
        }
        durable
    }
}
