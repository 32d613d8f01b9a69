//! Finds and deletes stale partition keys: those that an interrupted creation, extension or deletion of a topic left.

use std::collections::BTreeMap;

use super::{MAX_OPS_PER_TXN, Topics};
use crate::{
    cluster::{
        metadata::PartitionEntry,
        outcome::transact_until_known,
        store::{Compare, MetaStoreError, Transaction, TxnOutcome},
    },
    model::{PartitionId, TopicId},
};

/// A periodic sweep, with minutes between runs. Deletes the stale keys of a topic only if two consecutive runs found
/// the same ones. So a run rarely deletes the keys of a creation in progress. Such a creation fails without data loss.
#[derive(Debug, Default)]
pub struct StaleKeySweeper {
    /// Stale keys that the last run found, by topic and partition number.
    found: BTreeMap<TopicId, Vec<(u32, PartitionEntry)>>,
}

impl StaleKeySweeper {
    /// Runs once: deletes the stale keys of each topic for which the previous run found exactly the same keys. Returns
    /// the topics whose keys were deleted.
    pub async fn run(&mut self, topics: &Topics) -> Result<Vec<TopicId>, MetaStoreError> {
        let found = topics.metadata.state().stale_partitions();
        let found_before = std::mem::replace(&mut self.found, found.clone());
        let mut swept = Vec::new();
        for (id, stale) in found {
            if found_before.get(&id) == Some(&stale) && topics.sweep_topic(id, &stale).await? {
                tracing::info!(topic = %id, partitions = stale.len(), "deleted stale partition keys of a topic");
                swept.push(id);
            }
        }
        Ok(swept)
    }
}

impl Topics {
    /// Deletes the stale keys `stale` of a topic, the lowest partition number first. Returns false, with possibly some
    /// keys deleted, if the topic or one of these keys was created or changed meanwhile. Some of these partitions may
    /// belong to the topic now.
    pub(super) async fn sweep_topic(
        &self,
        id: TopicId,
        stale: &[(u32, PartitionEntry)],
    ) -> Result<bool, MetaStoreError> {
        let state = self.metadata.state();
        // This check covers changes that the metadata cache shows by now; the compare covers later changes.
        if state.stale_partitions().get(&id).is_none_or(|current| current != stale) {
            return Ok(false);
        }
        let unchanged = match state.name(id).and_then(|name| state.topic(name).map(|topic| (name, topic))) {
            Some((name, topic)) => Compare::ModRevision(self.keys.topic(name), topic.mod_revision),
            // Partition 0 exists exactly while its topic does. If it exists, the topic was created meanwhile, or its
            // value is unreadable.
            None => Compare::Absent(self.keys.partition(PartitionId::new(id, 0))),
        };
        drop(state);
        self.delete_stale_keys(id, stale, &unchanged).await
    }

    /// Deletes the keys of `stale`, each only at the revision that `stale` contains: a repeated addition of partitions
    /// may have written a key again. Returns false, with some keys deleted, if a key or `condition` has changed. A
    /// later sweep deletes the remaining keys. After an unknown outcome, an applied first attempt counts as a change
    /// too.
    pub(super) async fn delete_stale_keys(
        &self,
        id: TopicId,
        stale: &[(u32, PartitionEntry)],
        condition: &Compare,
    ) -> Result<bool, MetaStoreError> {
        let mut keys = Vec::new();
        for (number, entry) in stale {
            let id = PartitionId::new(id, *number);
            keys.extend(entry.partition.as_ref().map(|value| (self.keys.partition(id), value.mod_revision)));
            keys.extend(entry.tier.as_ref().map(|value| (self.keys.tier(id), value.mod_revision)));
        }
        for chunk in keys.chunks(MAX_OPS_PER_TXN) {
            let mut transaction = Transaction::new().when(condition.clone());
            for (key, revision) in chunk {
                transaction = transaction.when(Compare::ModRevision(key.clone(), *revision)).delete(key.as_str());
            }
            if let TxnOutcome::CompareFailed { .. } = transact_until_known(&*self.store, &transaction).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
