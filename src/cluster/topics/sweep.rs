//! Finds and deletes the remains of an interrupted creation, extension or deletion of a topic.

use std::collections::BTreeMap;

use super::Topics;
use crate::{
    cluster::{
        metadata::PartitionEntry,
        store::{Compare, MetaStoreError, TxnOp},
    },
    model::{PartitionId, TopicId},
};

/// A periodic sweep, with minutes between runs. Only remains that two consecutive runs found are deleted, so that a
/// creation in progress is not disturbed. Otherwise the creation would fail, without data loss.
#[derive(Debug, Default)]
pub struct StaleKeySweeper {
    found: BTreeMap<TopicId, Vec<(u32, PartitionEntry)>>,
}

impl StaleKeySweeper {
    /// Runs once and deletes the remains that the previous run found too. Returns the topics with deleted keys.
    pub async fn run(&mut self, topics: &Topics) -> Result<Vec<TopicId>, MetaStoreError> {
        let found = topics.metadata.state().stale_partitions();
        let before = std::mem::replace(&mut self.found, found.clone());
        let mut swept = Vec::new();
        for (id, strays) in found {
            if before.get(&id) == Some(&strays) && topics.sweep_topic(id, &strays).await? {
                tracing::info!(topic = %id, partitions = strays.len(), "deleted stale partition keys of a topic");
                swept.push(id);
            }
        }
        Ok(swept)
    }
}

impl Topics {
    /// Deletes partitions that do not count, the lowest first. Returns false if the topic was created or changed
    /// meanwhile.
    pub(super) async fn sweep_topic(
        &self,
        id: TopicId,
        strays: &[(u32, PartitionEntry)],
    ) -> Result<bool, MetaStoreError> {
        let state = self.metadata.state();
        // The partitions may count by now. This check covers changes until here; the compare covers later ones.
        if state.stale_partitions().get(&id).is_none_or(|strayed| strayed != strays) {
            return Ok(false);
        }
        let same = match state.name(id).and_then(|name| state.topic(name).map(|topic| (name, topic))) {
            Some((name, topic)) => Compare::ModRevision(self.keys.topic(name), topic.mod_revision),
            // Partition 0 exists exactly if its topic does. If it exists, the topic was created meanwhile or is
            // unreadable.
            None => Compare::Absent(self.keys.partition(PartitionId::new(id, 0))),
        };
        drop(state);
        let mut ops = Vec::new();
        for (number, entry) in strays {
            let id = PartitionId::new(id, *number);
            let partition = entry.partition.as_ref().map(|_| self.keys.partition(id));
            let tier = entry.tier.as_ref().map(|_| self.keys.tier(id));
            ops.extend(partition.into_iter().chain(tier).map(|key| TxnOp::Delete { key }));
        }
        self.transact_in_chunks(&[same], ops).await
    }
}
