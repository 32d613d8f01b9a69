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
//! - A value that cannot be read cannot be compared, and may be put back as it was: with this broker in its sets, and as its leader, in an
//!   epoch that began before this process. So the broker takes no part in such a partition before [`Unread::prove`] has made up for it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{
    changes::{Change, Changed, PartitionChanges},
    keys::{DirectoryValue, InvalidValue, Key, Keys, TopicValue, Value as _},
    partition_value::{Holds, PartitionValue},
    store::{Entry, MetaStore, Revision, StoreError},
};
use crate::model::{BrokerId, ConfigMap, Durability, PartitionId, TopicConfig, TopicId};

/// What a broker shows when it starts.
#[derive(Clone, Debug, Default)]
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
#[derive(Clone, Debug)]
pub struct Proof {
    /// The transaction that last wrote the record of this broker's directory; `None` when there is none.
    pub judged: Option<Revision>,
    /// Partitions whose values were changed.
    pub changed: usize,
    /// What could not be compared.
    pub unread: Unread,
}

/// Partitions whose values could not be read when this broker showed what it holds, and what it showed.
#[derive(Clone, Debug, Default)]
pub struct Unread {
    judge: Judge,
    partitions: BTreeSet<PartitionId>,
}

/// What a broker showed, and whether its directory is the one that took part last.
#[derive(Clone, Debug, Default)]
struct Judge {
    shown: Shown,
    same: bool,
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
    let judged = record.as_ref().map(|entry| entry.mod_revision);
    let unread = record.as_ref().and_then(|entry| DirectoryValue::decode(&entry.key, &entry.value).err());
    if let Some(error) = unread {
        tracing::warn!(
            broker = %id, %error,
            "what is known of this broker's data directory cannot be read: its replicas are taken for unproven, and copied anew where others have them"
        );
    } else if !same && judged.is_some() {
        tracing::warn!(
            broker = %id, directory = shown.directory_id,
            "this data directory is not the one that took part last, or is older than that: its replicas are copied anew"
        );
    }
    let judge = Judge { shown: shown.clone(), same };
    let changes = PartitionChanges::new(Arc::clone(store), keys.clone());
    let mut changed = 0;
    loop {
        let durabilities = durabilities(store, keys, defaults).await?;
        let listing = store.list(&format!("{}partitions/", keys.prefix())).await?;
        let (mut needed, mut partitions) = (Vec::new(), BTreeSet::new());
        for entry in &listing.entries {
            let Some(Key::Partition(partition)) = keys.parse(&entry.key) else { continue };
            let durability = durabilities.get(&partition.topic).copied();
            match judge.change(id, partition, entry, shown.whole.contains(&partition), durability) {
                Ok(change) => needed.extend(change),
                Err(error) => {
                    tracing::warn!(%partition, %error, "nothing can be shown of a partition before its value is mended");
                    partitions.insert(partition);
                }
            }
        }
        if needed.is_empty() {
            return Ok(Proof { judged, changed, unread: Unread { judge, partitions } });
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

impl Judge {
    /// What has to be written over this value before the broker `id` takes part in the partition; an error when the value cannot be read.
    fn change(
        &self,
        id: BrokerId,
        partition: PartitionId,
        entry: &Entry,
        is_whole: bool,
        durability: Option<Durability>,
    ) -> Result<Option<Change>, InvalidValue> {
        let value = PartitionValue::decode(&entry.key, &entry.value)?;
        if !value.replicas.contains(&id) {
            return Ok(None);
        }
        let holds = if self.same { self.holds(entry, partition, is_whole, durability) } else { Holds::Nothing };
        let struck = value.struck(id, holds);
        Ok(struck.map(|value| Change { id: partition, expect: entry.mod_revision, value, also: Vec::new() }))
    }

    /// What is proven of one replica in the directory that took part last.
    fn holds(&self, entry: &Entry, id: PartitionId, is_whole: bool, durability: Option<Durability>) -> Holds {
        // One that is not there was made while this broker stopped, if its value never changed since: there was nothing to hold yet. One
        // that is there and damaged did hold something: a value may stay for years as it was made.
        let nothing_yet = entry.create_revision == entry.mod_revision && !self.shown.on_disk.contains(&id);
        if mutant!(SkipStartupVerification) {
            return Holds::All;
        }
        if !is_whole && !nothing_yet {
            return Holds::Nothing;
        }
        match durability {
            _ if self.shown.clean => Holds::All,
            Some(Durability::Persisted) => Holds::All,
            Some(Durability::Replicated) if mutant!(TreatUncleanAsClean) => Holds::All,
            // A topic that cannot be read may be of either kind.
            Some(Durability::Replicated) | None => Holds::Unmarked,
        }
    }
}

impl Unread {
    /// Which these are.
    pub fn partitions(&self) -> &BTreeSet<PartitionId> {
        &self.partitions
    }

    /// Shows of one of them what was shown of the others, with whether its replica came up whole. Returns the revision from which on the value
    /// needs no change by this broker; `None` when it is not there, or still cannot be read.
    ///
    /// # Errors
    /// When the store does not answer: the same call may be made again.
    pub async fn prove(
        &self,
        store: &Arc<dyn MetaStore>,
        keys: &Keys,
        id: BrokerId,
        (partition, is_whole): (PartitionId, bool),
        defaults: &ConfigMap,
    ) -> Result<Option<Revision>, StoreError> {
        let changes = PartitionChanges::new(Arc::clone(store), keys.clone());
        loop {
            let durability = durabilities(store, keys, defaults).await?.get(&partition.topic).copied();
            let Some(entry) = store.get(&keys.partition(partition)).await?.entry else { return Ok(None) };
            let change = match self.judge.change(id, partition, &entry, is_whole, durability) {
                Ok(Some(change)) => change,
                Ok(None) => return Ok(Some(entry.mod_revision)),
                Err(_) => return Ok(None),
            };
            // Whatever became of it, the next reading tells.
            if let Some((_, Changed::Failed(error))) = changes.make(vec![change], &[]).await.pop() {
                return Err(error);
            }
        }
    }
}

/// Whether the directory is the one that took part last, and not an older copy of it.
fn is_same(record: &Entry, shown: &Shown) -> bool {
    let proven =
        |known: DirectoryValue| known.directory_id == shown.directory_id && shown.uptimes.contains(&known.incarnation);
    mutant!(SkipStartupVerification) || DirectoryValue::decode(&record.key, &record.value).is_ok_and(proven)
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
