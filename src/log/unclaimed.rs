//! What the disk has of replicas that are not known: their deletion failed or was cut short, or the journal never heard of them.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{
    core::Core,
    disk::{Disk, Entry},
    error::ReplicaError,
    files::OpenFile,
    recover::Dormant,
    segment::base_of,
    shared::replica_dir,
    startup::remove_replicas,
};
use crate::model::{PartitionId, TopicId};

/// Why they are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stray {
    /// A start found them: it cannot tell whose they are.
    Found,
    /// Their deletion has begun.
    Deleted,
}

/// Folders of a data directory with segments of replicas that are not known. What a new replica sets aside is not meant: it has names of
/// its own.
pub(super) struct Unclaimed {
    dir: PathBuf,
    known: Mutex<BTreeMap<PartitionId, Stray>>,
}

impl Unclaimed {
    /// Looks for them, and names each at WARN.
    pub(super) fn find(disk: &dyn Disk, dir: &Path, replicas: &BTreeMap<PartitionId, Dormant>) -> Self {
        let mut found = BTreeMap::new();
        for topic in folders(disk, dir) {
            let Ok(id) = topic.parse::<TopicId>() else { continue };
            for partition in folders(disk, &dir.join(&topic)) {
                let Ok(number) = partition.parse::<u32>() else { continue };
                let id = PartitionId::new(id, number);
                if !replicas.contains_key(&id) && has_segments(disk, &replica_dir(dir, id)) {
                    tracing::warn!(
                        dir = %replica_dir(dir, id).display(),
                        "no replica is known that these segments belong to, as where a deletion failed or was cut short; they are not served, \
                         and go by themselves where the metadata says that their topic was deleted or that the partition is others'"
                    );
                    found.insert(id, Stray::Found);
                }
            }
        }
        Self { dir: dir.to_owned(), known: Mutex::new(found) }
    }

    pub(super) fn ids(&self) -> Vec<PartitionId> {
        self.lock().keys().copied().collect()
    }

    /// The replica's deletion has begun.
    pub(super) fn begin(&self, id: PartitionId) {
        self.lock().insert(id, Stray::Deleted);
    }

    /// Nothing of it is left, or it is known again.
    pub(super) fn forget(&self, id: PartitionId) {
        self.lock().remove(&id);
    }

    /// Whether the replica's deletion has begun and left something.
    pub(super) fn has_begun(&self, id: PartitionId) -> bool {
        self.lock().get(&id) == Some(&Stray::Deleted)
    }

    /// Removes what there is of replicas. Returns those of which something is left, and why.
    pub(super) fn remove(&self, core: &Core, ids: &[PartitionId]) -> Vec<(PartitionId, ReplicaError)> {
        let there: Vec<_> = {
            let known = self.lock();
            let there = ids.iter().filter(|id| known.contains_key(id));
            there.map(|id| (*id, replica_dir(&self.dir, *id))).collect()
        };
        let mut keep = |file| core.removed.keep(Arc::new(OpenFile { file, index: Mutex::default() }));
        let outcomes = remove_replicas(&*core.disk, there.iter().map(|(_, dir)| dir.as_path()), &mut keep);
        let mut left = Vec::new();
        for ((id, path), outcome) in there.into_iter().zip(outcomes) {
            match outcome {
                Ok(()) => self.forget(id),
                Err(source) => left.push((id, ReplicaError::Io { id, path, source })),
            }
        }
        left
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<PartitionId, Stray>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn has_segments(disk: &dyn Disk, dir: &Path) -> bool {
    let files = list(disk, dir);
    files.iter().any(|entry| entry.len > 0 && base_of(&entry.name).is_some())
}

fn folders(disk: &dyn Disk, dir: &Path) -> impl Iterator<Item = String> {
    list(disk, dir).into_iter().filter(|entry| entry.is_dir).map(|entry| entry.name)
}

/// What cannot be listed keeps no broker from starting: this is good to know and no more.
fn list(disk: &dyn Disk, dir: &Path) -> Vec<Entry> {
    disk.list(dir).unwrap_or_else(|error| {
        tracing::warn!(dir = %dir.display(), %error, "cannot list what is in this folder; it is passed over");
        Vec::new()
    })
}
