//! Stray replicas: files on the disk of replicas that are not registered. The deletion of such a replica failed or was
//! interrupted, or its creation never became durable.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use super::{registry::UnopenedReplica, startup::remove_replicas};
use crate::{
    log::{
        disk::{DirEntry, Disk},
        error::ReplicaError,
        format::{replica_dir, segment::base_of},
        replica::context::LogContext,
    },
    model::{PartitionId, TopicId},
    task::lock::Mutex,
};

/// Origin of a stray replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StrayState {
    /// Found by a start. The start cannot determine whether the files are still needed.
    Found,
    /// Left by a deletion that has started.
    Deleted,
}

/// Directories of a data directory that hold segments of stray replicas. Quarantined segments do not count, because
/// they have names of their own.
pub(super) struct StrayReplicas {
    dir: PathBuf,
    entries: Mutex<BTreeMap<PartitionId, StrayState>>,
}

impl StrayReplicas {
    /// Finds the stray replicas, which are those on the disk and not in `replicas`, and logs each at WARN.
    pub(super) fn find(disk: &dyn Disk, dir: &Path, replicas: &BTreeMap<PartitionId, UnopenedReplica>) -> Self {
        let mut strays = BTreeMap::new();
        for topic in subdirectories(disk, dir) {
            let Ok(topic_id) = topic.parse::<TopicId>() else { continue };
            for partition in subdirectories(disk, &dir.join(&topic)) {
                let Ok(number) = partition.parse::<u32>() else { continue };
                let id = PartitionId::new(topic_id, number);
                if !replicas.contains_key(&id) && has_segments(disk, &replica_dir(dir, id)) {
                    tracing::warn!(
                        dir = %replica_dir(dir, id).display(),
                        "these segments belong to no known replica, possibly because a deletion failed or was \
                         interrupted; they are not served, and are deleted when the metadata shows that their topic \
                         was deleted or that the partition is assigned to other brokers"
                    );
                    strays.insert(id, StrayState::Found);
                }
            }
        }
        Self { dir: dir.to_owned(), entries: Mutex::new(strays) }
    }

    pub(super) fn ids(&self) -> Vec<PartitionId> {
        self.entries.lock().keys().copied().collect()
    }

    /// Adds a replica whose deletion has started and whose files still exist.
    pub(super) fn add(&self, id: PartitionId) {
        self.entries.lock().insert(id, StrayState::Deleted);
    }

    /// Removes the entry of a replica that has no files left, or that is registered again.
    pub(super) fn remove(&self, id: PartitionId) {
        self.entries.lock().remove(&id);
    }

    /// Returns true if the deletion of the replica has started and has left files.
    pub(super) fn is_deleting(&self, id: PartitionId) -> bool {
        self.entries.lock().get(&id) == Some(&StrayState::Deleted)
    }

    /// Removes the files and the entries of the stray replicas among `ids`. Returns the replicas whose files could not
    /// be removed durably, each with the error. The disk space of large files is freed later, in steps.
    pub(super) fn delete(&self, ctx: &LogContext, ids: &[PartitionId]) -> Vec<(PartitionId, ReplicaError)> {
        let present: Vec<_> = {
            let entries = self.entries.lock();
            let present = ids.iter().filter(|id| entries.contains_key(id));
            present.map(|id| (*id, replica_dir(&self.dir, *id))).collect()
        };
        let mut keep_open = |file| ctx.removed.keep_file(file);
        let outcomes = remove_replicas(&*ctx.disk, present.iter().map(|(_, dir)| dir.as_path()), &mut keep_open);
        let mut failures = Vec::new();
        for ((id, path), outcome) in present.into_iter().zip(outcomes) {
            match outcome {
                Ok(()) => self.remove(id),
                Err(source) => failures.push((id, ReplicaError::Io { id, path, source })),
            }
        }
        failures
    }
}

/// Returns true if a replica's directory holds a segment file with content.
fn has_segments(disk: &dyn Disk, dir: &Path) -> bool {
    let files = list(disk, dir);
    files.iter().any(|entry| entry.len > 0 && base_of(&entry.name).is_some())
}

/// Returns the names of the directories in `dir`.
fn subdirectories(disk: &dyn Disk, dir: &Path) -> impl Iterator<Item = String> {
    list(disk, dir).into_iter().filter(|entry| entry.is_dir).map(|entry| entry.name)
}

/// Lists a directory. An error is only logged, because the result is informational and must not prevent a start.
fn list(disk: &dyn Disk, dir: &Path) -> Vec<DirEntry> {
    disk.list(dir).unwrap_or_else(|error| {
        tracing::warn!(dir = %dir.display(), %error, "cannot list this directory: its stray replicas are not found");
        Vec::new()
    })
}
