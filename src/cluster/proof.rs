//! Startup verification: a broker compares its local inventory with the metadata before it takes part, and leaves the
//! sets that it cannot verify.
//!
//! # Overview
//!
//! The protocol assumes that an in-sync replica holds what it acknowledged. A new process cannot assume that: its disk
//! may have been replaced, restored from a backup, or have lost what was only in the page cache. So before it
//! registers, a broker compares its inventory with the store and removes itself from every ISR and ELR for which it is
//! unverified. It also resigns every leadership, verified or not: that epoch began before this process.
//!
//! | inventory | verifies |
//! | --- | --- |
//! | the last registered data directory, which records that incarnation | all synced records: `persisted` topics |
//! | the same, with a clean shutdown after that incarnation | all written records: `replicated` topics too |
//! | an intact replica | that the verification of the directory holds for this replica |
//!
//! # Invariants
//!
//! - The verification follows [`Registration::clear`](super::Registration::clear): no other broker can add this broker
//!   to an ISR meanwhile.
//! - The registration compares the directory record that the verification was based on, so only one of two processes
//!   with the same directory can register.
//! - The verification ends only when the store needs no further changes. A crash in between leaves fewer memberships
//!   and no wrong one.
//! - A value that cannot be read cannot be compared. It may be restored as it was: with this broker in its sets, or as
//!   its leader in an epoch before this process. So the broker takes no part in such a partition until
//!   [`Unread::prove`] has verified it.

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

/// Local inventory of a starting broker.
#[derive(Clone, Debug, Default)]
pub struct Shown {
    /// Id of the data directory.
    pub directory_id: String,
    /// Incarnations that the directory records, including this one. The store may hold this one already, after an
    /// earlier attempt to register whose response was lost.
    pub uptimes: Vec<String>,
    /// True after a clean shutdown.
    pub clean: bool,
    /// Replicas with files on disk, intact or not.
    pub on_disk: BTreeSet<PartitionId>,
    /// Replicas among them that lost nothing, as far as the disk can show.
    pub whole: BTreeSet<PartitionId>,
}

/// Result of the startup verification.
#[derive(Clone, Debug)]
pub struct Proof {
    /// Revision of this broker's directory record; `None` if there is none.
    pub judged: Option<Revision>,
    /// Number of partition values that were changed.
    pub changed: usize,
    /// Partitions that could not be compared.
    pub unread: Unread,
}

/// Partitions whose values could not be read at the startup verification, with the inventory of that moment.
#[derive(Clone, Debug, Default)]
pub struct Unread {
    judge: Judge,
    partitions: BTreeSet<PartitionId>,
}

/// Local inventory, and whether its directory is the one that was registered last.
#[derive(Clone, Debug, Default)]
struct Judge {
    shown: Shown,
    same: bool,
}

/// Compares a broker's inventory with the store and removes the broker from every set and leadership that is not
/// verified. `defaults` are the broker's topic defaults. After an error the same call may be repeated.
///
/// # Errors
/// The store does not respond.
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
                // Another writer came first, or the change may have been applied: the next list shows the result.
                Changed::Refused(_) | Changed::Barred | Changed::Unknown(_) => {}
                Changed::Failed(error) => return Err(error),
            }
        }
    }
}

impl Judge {
    /// Returns the change to this value that must precede the broker's part in the partition; `None` if no change is
    /// needed.
    ///
    /// # Errors
    /// The value cannot be read.
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

    /// Returns the integrity of one replica in the directory that was registered last.
    fn holds(&self, entry: &Entry, id: PartitionId, is_whole: bool, durability: Option<Durability>) -> Holds {
        // A missing replica whose value never changed was created while this broker stopped: it held nothing yet. A
        // corrupt replica did hold something: a value may stay unchanged for years after its creation.
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
            // The durability of a topic that cannot be read is unknown: assume the weaker one.
            Some(Durability::Replicated) | None => Holds::Unmarked,
        }
    }
}

impl Unread {
    /// Returns the partitions.
    pub fn partitions(&self) -> &BTreeSet<PartitionId> {
        &self.partitions
    }

    /// Verifies one of these partitions with the same inventory; `is_whole` is true if its replica is intact. Returns
    /// the revision from which on the value needs no change by this broker; `None` if the value does not exist or still
    /// cannot be read.
    ///
    /// # Errors
    /// The store does not respond: the same call may be repeated.
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
            // The next read shows the result, after a failure too.
            if let Some((_, Changed::Failed(error))) = changes.make(vec![change], &[]).await.pop() {
                return Err(error);
            }
        }
    }
}

/// Returns true if the directory is the one that was registered last, and not an older copy of it.
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
