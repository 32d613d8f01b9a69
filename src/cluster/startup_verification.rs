//! Startup verification: a broker compares its local inventory with the metadata before it becomes active, and
//! leaves the sets that it cannot verify.
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
//! - The verification follows [`RegistrationRequest::clear`](super::RegistrationRequest::clear): no other
//!   broker can add this broker to an ISR meanwhile.
//! - The registration compares the directory record that the verification was based on, so only one of two processes
//!   with the same directory can register.
//! - The verification ends only when the store needs no further changes. A crash in between leaves fewer memberships
//!   and no wrong one.
//! - A value that cannot be read cannot be compared. It may be restored as it was: with this broker in its sets, or as
//!   its leader in an epoch before this process. So the broker is not active in such a partition until its next start,
//!   or until it is in none of the sets.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{
    keys::{DirectoryValue, InvalidValue, Key, Keys, TopicValue, Value as _},
    partition_updates::{PartitionUpdate, PartitionUpdater, UpdateOutcome},
    partition_value::{PartitionValue, ReplicaIntegrity},
    store::{KeyValue, MetaStore, MetaStoreError, Revision},
};
use crate::model::{BrokerId, ConfigMap, Durability, PartitionId, TopicConfig, TopicId};

/// Local inventory of a starting broker.
#[derive(Clone, Debug, Default)]
pub struct LocalInventory {
    /// Id of the data directory.
    pub directory_id: String,
    /// Incarnations that the directory records, including this one. The store may hold this one already, after an
    /// earlier attempt to register whose response was lost.
    pub incarnations: Vec<String>,
    /// True after a clean shutdown.
    pub clean: bool,
    /// Replicas with files on disk, intact or not.
    pub on_disk: BTreeSet<PartitionId>,
    /// Replicas among them that lost nothing, as far as the disk can show.
    pub intact: BTreeSet<PartitionId>,
}

/// Result of the startup verification.
#[derive(Clone, Debug)]
pub struct VerificationResult {
    /// Revision of this broker's directory record; `None` if there is none.
    pub directory_revision: Option<Revision>,
    /// Number of partition values that were changed.
    pub changed: usize,
    /// Partitions whose values could not be read, with the revisions of those values.
    pub unverified: BTreeMap<PartitionId, Revision>,
}

/// Local inventory, and whether its directory is the one that was registered last.
struct InventoryVerifier<'a> {
    inventory: &'a LocalInventory,
    is_registered_directory: bool,
}

/// Compares a broker's inventory with the store and removes the broker from every set and leadership that is not
/// verified. `defaults` are the broker's topic defaults. After an error the same call may be repeated.
///
/// # Errors
/// The store does not respond.
pub async fn verify_inventory(
    store: &Arc<dyn MetaStore>,
    keys: &Keys,
    id: BrokerId,
    inventory: &LocalInventory,
    defaults: &ConfigMap,
) -> Result<VerificationResult, MetaStoreError> {
    let record = store.get(&keys.directory(id)).await?.entry;
    let same = record.as_ref().is_some_and(|entry| is_same(entry, inventory));
    let directory_revision = record.as_ref().map(|entry| entry.mod_revision);
    let record_error = record.as_ref().and_then(|entry| DirectoryValue::decode(&entry.key, &entry.value).err());
    if let Some(error) = record_error {
        tracing::warn!(
            broker = %id, %error,
            "the directory record of this broker cannot be read: its replicas count as unverified, and are copied \
             again where other brokers hold them"
        );
    } else if !same && directory_revision.is_some() {
        tracing::warn!(
            broker = %id, directory = inventory.directory_id,
            "this data directory is not the last registered one, or is an older copy of it: its replicas are copied \
             again"
        );
    }
    let verifier = InventoryVerifier { inventory, is_registered_directory: same };
    let updater = PartitionUpdater::new(Arc::clone(store), keys.clone());
    let mut changed = 0;
    loop {
        let durabilities = load_durabilities(store, keys, defaults).await?;
        let list = store.list(&format!("{}partitions/", keys.prefix())).await?;
        let (mut needed, mut unverified) = (Vec::new(), BTreeMap::new());
        for entry in &list.entries {
            let Some(Key::Partition(partition)) = keys.parse(&entry.key) else { continue };
            let durability = durabilities.get(&partition.topic).copied();
            match verifier.change(id, partition, entry, inventory.intact.contains(&partition), durability) {
                Ok(change) => needed.extend(change),
                Err(error) => {
                    tracing::warn!(
                        %partition, %error,
                        "the value of a partition cannot be read: repair the value, and restart this broker if \
                         `cluster health` then names an offline replica"
                    );
                    unverified.insert(partition, entry.mod_revision);
                }
            }
        }
        if needed.is_empty() {
            return Ok(VerificationResult { directory_revision, changed, unverified });
        }
        for (partition, outcome) in updater.apply(needed, &[]).await {
            match outcome {
                UpdateOutcome::Done(_) => {
                    changed += 1;
                    tracing::debug!(
                        %partition, "left the sets of an unverified replica, or resigned an earlier leadership"
                    );
                }
                // Another writer came first, or the change may have been applied: the next list shows the result.
                UpdateOutcome::Conflict(_) | UpdateOutcome::GuardFailed | UpdateOutcome::Unknown(_) => {}
                UpdateOutcome::Failed(error) => return Err(error),
            }
        }
    }
}

impl InventoryVerifier<'_> {
    /// Returns the change to this value that must precede the broker's activity in the partition; `None` if no change
    /// is needed.
    ///
    /// # Errors
    /// The value cannot be read.
    fn change(
        &self,
        id: BrokerId,
        partition: PartitionId,
        entry: &KeyValue,
        is_intact: bool,
        durability: Option<Durability>,
    ) -> Result<Option<PartitionUpdate>, InvalidValue> {
        let value = PartitionValue::decode(&entry.key, &entry.value)?;
        if !value.replicas.contains(&id) {
            return Ok(None);
        }
        let integrity = if self.is_registered_directory {
            self.integrity(entry, partition, is_intact, durability)
        } else {
            ReplicaIntegrity::Unverified
        };
        let updated = value.after_restart(id, integrity);
        Ok(updated.map(|value| PartitionUpdate {
            id: partition,
            expected_revision: entry.mod_revision,
            value,
            guards: Vec::new(),
        }))
    }

    /// Returns the integrity of one replica in the directory that was registered last.
    fn integrity(
        &self,
        entry: &KeyValue,
        id: PartitionId,
        is_intact: bool,
        durability: Option<Durability>,
    ) -> ReplicaIntegrity {
        // A missing replica whose value never changed was created while this broker stopped: it held nothing yet. A
        // corrupt replica did hold something: a value may stay unchanged for years after its creation.
        let is_new = entry.create_revision == entry.mod_revision && !self.inventory.on_disk.contains(&id);
        if mutant!(SkipStartupVerification) {
            return ReplicaIntegrity::Intact;
        }
        if !is_intact && !is_new {
            return ReplicaIntegrity::Unverified;
        }
        match durability {
            _ if self.inventory.clean => ReplicaIntegrity::Intact,
            Some(Durability::Persisted) => ReplicaIntegrity::Intact,
            Some(Durability::Replicated) if mutant!(TreatUncleanAsClean) => ReplicaIntegrity::Intact,
            // The durability of a topic that cannot be read is unknown: assume the weaker one.
            Some(Durability::Replicated) | None => ReplicaIntegrity::UncleanShutdown,
        }
    }
}

/// Returns true if the directory is the one that was registered last, and not an older copy of it.
fn is_same(record: &KeyValue, inventory: &LocalInventory) -> bool {
    let is_last = |last: DirectoryValue| {
        last.directory_id == inventory.directory_id && inventory.incarnations.contains(&last.incarnation)
    };
    mutant!(SkipStartupVerification) || DirectoryValue::decode(&record.key, &record.value).is_ok_and(is_last)
}

async fn load_durabilities(
    store: &Arc<dyn MetaStore>,
    keys: &Keys,
    defaults: &ConfigMap,
) -> Result<BTreeMap<TopicId, Durability>, MetaStoreError> {
    let list = store.list(&format!("{}topics/", keys.prefix())).await?;
    let durabilities = list.entries.iter().filter_map(|entry| {
        let topic = TopicValue::decode(&entry.key, &entry.value).ok()?;
        let config = TopicConfig::resolve(defaults, &topic.config).ok()?;
        Some((topic.id, config.durability))
    });
    Ok(durabilities.collect())
}

#[cfg(test)]
mod tests;
