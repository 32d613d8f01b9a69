//! Proof of holding: what a broker that starts shows before it takes part, and what it gives up without.
//!
//! # Overview
//!
//! An in-sync replica is believed to hold what it acknowledged. A process that begins anew has no right to that belief: its disk
//! may have been replaced, put back to older days, or have lost what was only in the page cache. So before its registration can
//! be seen, a broker compares itself with what the store knows, and strikes itself from every set that it cannot prove to
//! belong to. It gives up every leadership as well, proven or not: the epoch of it began before this process did.
//!
//! | what is shown | proves |
//! | --- | --- |
//! | the data directory that took part last, with that uptime noted in it | what was synced: `persisted` topics |
//! | the same, closed cleanly after that uptime | all that was written: `replicated` topics too |
//! | the replica, whole | that what is proven of the directory holds for it |
//!
//! # Invariants
//!
//! - It comes after [`Registration::clear`](super::Registration::clear): nobody can add this broker to a set while it proves itself.
//! - The registration compares the record that the proof was judged by, so of two processes with one directory only one gets in.
//! - It ends only when the store was seen to need no more changes. A crash in between leaves fewer memberships and no wrong one.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{
    changes::{Change, Changed, PartitionChanges},
    keys::{DirectoryValue, Key, Keys, TopicValue, Value as _},
    partition_value::{Holds, PartitionValue},
    store::{Entry, MetaStore, Revision, StoreError},
};
use crate::model::{BrokerId, ConfigMap, Durability, PartitionId, TopicConfig, TopicId};

/// What a broker shows when it starts.
#[derive(Clone, Debug)]
pub struct Shown {
    /// The id of its data directory.
    pub directory_id: String,
    /// The uptimes that are noted in it, with this one: the store may hold this one already, when an earlier try to register in this
    /// uptime had an outcome that nobody heard.
    pub uptimes: Vec<String>,
    /// Whether it was closed cleanly.
    pub clean: bool,
    /// The replicas that its files are of, whole or not.
    pub on_disk: BTreeSet<PartitionId>,
    /// Those of them that lost nothing, as far as the disk can tell.
    pub whole: BTreeSet<PartitionId>,
}

/// What a proof was judged by, and what it cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Proof {
    /// The transaction that last wrote the record of this broker's directory; `None` when there is none.
    pub judged: Option<Revision>,
    /// Partitions whose values were changed.
    pub changed: usize,
}

/// Compares what a broker shows with what the store knows, and takes it out of every set and leadership that is not proven. `defaults` are
/// the broker's topic defaults. An error means that the store did not answer: the same call may be made again.
pub async fn prove(
    store: &Arc<dyn MetaStore>,
    keys: &Keys,
    id: BrokerId,
    shown: &Shown,
    defaults: &ConfigMap,
) -> Result<Proof, StoreError> {
    let record = store.get(&keys.directory(id)).await?.entry;
    let same = record.as_ref().is_some_and(|entry| is_same(entry, shown));
    let judged = record.map(|entry| entry.mod_revision);
    if !same && judged.is_some() {
        tracing::warn!(
            broker = %id, directory = shown.directory_id,
            "this data directory is not the one that took part last, or is older than that: its replicas are copied anew"
        );
    }
    let changes = PartitionChanges::new(Arc::clone(store), keys.clone());
    let mut changed = 0;
    loop {
        let durabilities = durabilities(store, keys, defaults).await?;
        let listing = store.list(&format!("{}partitions/", keys.prefix())).await?;
        let needed: Vec<Change> = listing
            .entries
            .iter()
            .filter_map(|entry| {
                let Some(Key::Partition(partition)) = keys.parse(&entry.key) else { return None };
                let value = PartitionValue::decode(&entry.key, &entry.value).ok()?;
                if !value.replicas.contains(&id) {
                    return None;
                }
                let holds = if same {
                    holds(entry, shown, partition, durabilities.get(&partition.topic).copied())
                } else {
                    Holds::Nothing
                };
                let value = value.struck(id, holds)?;
                Some(Change { id: partition, expect: entry.mod_revision, value, also: Vec::new() })
            })
            .collect();
        if needed.is_empty() {
            return Ok(Proof { judged, changed });
        }
        for (partition, outcome) in changes.make(needed, &[]).await {
            match outcome {
                Changed::Done(_) => {
                    changed += 1;
                    tracing::debug!(%partition, "gave up what is not proven, or was led in an earlier uptime");
                }
                // Somebody else was faster, or it may have been made: the next listing tells.
                Changed::Refused(_) | Changed::Barred | Changed::Unknown(_) => {}
                Changed::Failed(error) => return Err(error),
            }
        }
    }
}

/// Whether the directory is the one that took part last, and not an older copy of it.
fn is_same(record: &Entry, shown: &Shown) -> bool {
    let proven =
        |known: DirectoryValue| known.directory_id == shown.directory_id && shown.uptimes.contains(&known.incarnation);
    mutant!(SkipProof) || DirectoryValue::decode(&record.key, &record.value).is_ok_and(proven)
}

/// What is proven of one replica in the directory that took part last.
fn holds(entry: &Entry, shown: &Shown, id: PartitionId, durability: Option<Durability>) -> Holds {
    // One that is not there was made while this broker stopped, if its value never changed since: there was nothing to hold yet. One
    // that is there and damaged did hold something: a value may stay for years as it was made.
    let nothing_yet = entry.create_revision == entry.mod_revision && !shown.on_disk.contains(&id);
    if mutant!(SkipProof) {
        return Holds::All;
    }
    if !shown.whole.contains(&id) && !nothing_yet {
        return Holds::Nothing;
    }
    match durability {
        _ if shown.clean => Holds::All,
        Some(Durability::Persisted) => Holds::All,
        Some(Durability::Replicated) if mutant!(LossTakenForClean) => Holds::All,
        // A topic that cannot be read may be of either kind.
        Some(Durability::Replicated) | None => Holds::Unmarked,
    }
}

async fn durabilities(
    store: &Arc<dyn MetaStore>,
    keys: &Keys,
    defaults: &ConfigMap,
) -> Result<BTreeMap<TopicId, Durability>, StoreError> {
    let listing = store.list(&format!("{}topics/", keys.prefix())).await?;
    let read = listing.entries.iter().filter_map(|entry| {
        let topic = TopicValue::decode(&entry.key, &entry.value).ok()?;
        let config = TopicConfig::resolve(defaults, &topic.config).ok()?;
        Some((topic.id, config.durability))
    });
    Ok(read.collect())
}

#[cfg(test)]
mod tests;
