//! Finds and deletes stale partition keys: those that an interrupted creation, extension or deletion of a topic left.

use std::collections::BTreeMap;

use super::Topics;
use crate::{
    cluster::{
        metadata::PartitionEntry,
        store::{Compare, MetaStoreError, TxnOp},
    },
    model::{PartitionId, TopicId},
};

/// A periodic sweep, with minutes between runs. Deletes only stale keys that two consecutive runs found unchanged, so
/// that it rarely deletes the keys of a creation in progress. Such a creation fails without data loss.
#[derive(Debug, Default)]
pub struct StaleKeySweeper {
    /// Stale keys that the last run found, by topic and partition number.
    found: BTreeMap<TopicId, Vec<(u32, PartitionEntry)>>,
}

impl StaleKeySweeper {
    /// Runs once: deletes the stale keys that the previous run found too. Returns the topics whose keys were deleted.
    pub async fn run(&mut self, topics: &Topics) -> Result<Vec<TopicId>, MetaStoreError> {
        let found = topics.metadata.state().stale_partitions();
        let found_before = std::mem::replace(&mut self.found, found.clone());
        let mut swept = Vec::new();
        for (id, strays) in found {
            if found_before.get(&id) == Some(&strays) && topics.sweep_topic(id, &strays).await? {
                tracing::info!(topic = %id, partitions = strays.len(), "deleted stale partition keys of a topic");
                swept.push(id);
            }
        }
        Ok(swept)
    }
}

impl Topics {
    /// Deletes the keys of partitions that do not belong to a topic, the lowest number first. Returns false if the
    /// topic was created or changed meanwhile: some of these partitions may belong to it now.
    pub(super) async fn sweep_topic(
        &self,
        id: TopicId,
        strays: &[(u32, PartitionEntry)],
    ) -> Result<bool, MetaStoreError> {
        let state = self.metadata.state();
        // This check covers changes that the metadata cache shows by now; the compare covers later changes.
        if state.stale_partitions().get(&id).is_none_or(|current| current != strays) {
            return Ok(false);
        }
        let unchanged = match state.name(id).and_then(|name| state.topic(name).map(|topic| (name, topic))) {
            Some((name, topic)) => Compare::ModRevision(self.keys.topic(name), topic.mod_revision),
            // Partition 0 exists exactly while its topic does. If it exists, the topic was created meanwhile, or its
            // value is unreadable.
            None => Compare::Absent(self.keys.partition(PartitionId::new(id, 0))),
        };
        drop(state);
        let mut ops = Vec::new();
        for (number, entry) in strays {
            let id = PartitionId::new(id, *number);
            let partition_key = entry.partition.as_ref().map(|_| self.keys.partition(id));
            let tier_key = entry.tier.as_ref().map(|_| self.keys.tier(id));
            ops.extend(partition_key.into_iter().chain(tier_key).map(|key| TxnOp::Delete { key }));
        }
        self.transact_in_chunks(&[unchanged], ops).await
    }
}
