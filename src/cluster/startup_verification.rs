//! Startup verification: a broker compares its local inventory with the metadata before it becomes active. The broker
//! removes each unverified replica from the ISR and the ELR of its partition.
//!
//! # Overview
//!
//! The replication protocol assumes that an in-sync replica holds all records that it acknowledged. A new process
//! cannot assume that: its disk may have been replaced, restored from a backup, or have lost the content of the page
//! cache. So before a broker registers, it compares its inventory with the store. It removes itself from every ISR and
//! ELR for which its replica is unverified. One exception: after an unclean shutdown, the only member of ISR and ELR
//! stays, and the value gets an `unclean_epoch`. The broker also resigns every leadership, verified or not, because the
//! leader epoch began before this process.
//!
//! | inventory | verified records of an intact replica |
//! | --- | --- |
//! | the last registered data directory, and no older copy of it | all synced records, enough for `persisted` topics |
//! | the same directory after a clean shutdown | all written records, enough for `replicated` topics too |
//! | any other directory | none |
//!
//! # Invariants
//!
//! - The verification follows [`RegistrationRequest::clear`](super::RegistrationRequest::clear): no other
//!   broker can add this broker to an ISR meanwhile.
//! - The registration compares the directory record that the verification was based on, so only one of two processes
//!   with the same directory can register.
//! - The verification succeeds only when a list shows that no value needs a change. A crash before the end leaves some
//!   unverified replicas removed; the next start removes the rest.
//! - A partition value that cannot be read is not changed. An operator may restore an old value, with this broker in
//!   the ISR or ELR, or as leader in an epoch before this process. So the broker is not active in such a partition
//!   until its next start. The broker becomes active earlier if a readable value has it in neither ISR nor ELR.

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
    /// Incarnations that the directory lists, including that of this process. The store may hold this incarnation
    /// already, if the response to an earlier attempt to register was lost.
    pub incarnations: Vec<String>,
    /// True if the previous process that used the directory shut down cleanly.
    pub clean: bool,
    /// Replicas with files on disk, intact or not.
    pub on_disk: BTreeSet<PartitionId>,
    /// The replicas of `on_disk` without a detected loss of records.
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

/// Verifies replicas against a local inventory.
struct InventoryVerifier<'a> {
    inventory: &'a LocalInventory,
    /// True if the inventory is of the last registered data directory; otherwise every replica is unverified.
    is_registered_directory: bool,
}

/// Compares a broker's inventory with the store. Removes the broker from the ISR and ELR of each partition whose local
/// replica is unverified, and resigns its leaderships (see [`PartitionValue::after_restart`]). `defaults` are the
/// broker's topic defaults. After an error the call may be repeated.
///
/// # Errors
/// A request to the store failed.
pub async fn verify_inventory(
    store: &Arc<dyn MetaStore>,
    keys: &Keys,
    id: BrokerId,
    inventory: &LocalInventory,
    defaults: &ConfigMap,
) -> Result<VerificationResult, MetaStoreError> {
    let record = store.get(&keys.directory(id)).await?.entry;
    let is_registered_directory = record.as_ref().is_some_and(|entry| is_last_registered(entry, inventory));
    let directory_revision = record.as_ref().map(|entry| entry.mod_revision);
    if let Some(entry) = record.filter(|_| !is_registered_directory) {
        log_unverified_directory(id, &entry, inventory);
    }
    let verifier = InventoryVerifier { inventory, is_registered_directory };
    let updater = PartitionUpdater::new(Arc::clone(store), keys.clone());
    let mut changed = 0;
    // Repeats until a list shows that no value needs a change.
    loop {
        let durabilities = load_durabilities(store, keys, defaults).await?;
        let list = store.list(&format!("{}partitions/", keys.prefix())).await?;
        let (mut needed, mut unverified) = (Vec::new(), BTreeMap::new());
        for entry in &list.entries {
            let Some(Key::Partition(partition)) = keys.parse(&entry.key) else { continue };
            let durability = durabilities.get(&partition.topic).copied();
            match verifier.needed_change(id, partition, entry, inventory.intact.contains(&partition), durability) {
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
                        %partition, "removed an unverified replica from ISR and ELR, or resigned an earlier leadership"
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
    /// Returns the change of a partition's value, read as `entry`, that is needed before broker `id` is active in the
    /// partition. `None` if no change is needed. `is_intact` is true if the local replica has no detected loss.
    /// `durability` is the topic's; `None` if the topic cannot be read.
    ///
    /// # Errors
    /// The value cannot be read.
    fn needed_change(
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

    /// Returns the integrity of one replica in the last registered directory. `entry` is the partition's value.
    fn integrity(
        &self,
        entry: &KeyValue,
        id: PartitionId,
        is_intact: bool,
        durability: Option<Durability>,
    ) -> ReplicaIntegrity {
        // If the value never changed and the replica is not on disk, the broker has not opened the replica since the
        // partition was created. So the replica held no records. A corrupt replica is on disk, so it is never new, even
        // if the value stays unchanged for years.
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

/// Returns true if the inventory's directory is the last registered one, and not an older copy of it. An older copy
/// does not list the incarnation that registered last.
fn is_last_registered(record: &KeyValue, inventory: &LocalInventory) -> bool {
    let is_last = |registered: DirectoryValue| {
        registered.directory_id == inventory.directory_id && inventory.incarnations.contains(&registered.incarnation)
    };
    mutant!(SkipStartupVerification) || DirectoryValue::decode(&record.key, &record.value).is_ok_and(is_last)
}

/// Logs that no replica of this directory can be verified, and why: the directory record is of another directory or
/// cannot be read.
fn log_unverified_directory(id: BrokerId, record: &KeyValue, inventory: &LocalInventory) {
    match DirectoryValue::decode(&record.key, &record.value) {
        Ok(registered) => tracing::warn!(
            broker = %id, directory = inventory.directory_id, registered_directory = registered.directory_id,
            "this broker last ran with another data directory, or with a newer copy of this one, so its replicas are \
             copied again where other brokers hold them: if that is a mistake, stop the broker and correct \
             broker.data_dir"
        ),
        Err(error) => tracing::warn!(
            broker = %id, reason = error.reason,
            "the directory record of this broker cannot be read: its replicas count as unverified, and are copied \
             again where other brokers hold them"
        ),
    }
}

/// Returns the durability of each topic whose value and configuration can be read.
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
