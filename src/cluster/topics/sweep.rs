//! Finding and deleting what half a creation, enlargement or deletion left.

use std::collections::BTreeMap;

use super::Topics;
use crate::{
    cluster::{
        store::{Compare, Op, StoreError},
        view::PartitionEntry,
    },
    model::{PartitionId, TopicId},
};

/// One place that sweeps, at intervals of minutes. Only what two runs found is deleted, so that a creation under way is
/// left in peace; were it not, the creation would be refused and nothing lost.
#[derive(Debug, Default)]
pub struct Sweep {
    found: BTreeMap<TopicId, Vec<(u32, PartitionEntry)>>,
}

impl Sweep {
    /// Looks once, and deletes what the run before found too. Returns the topics of which something was deleted.
    pub async fn run(&mut self, topics: &Topics) -> Result<Vec<TopicId>, StoreError> {
        let found = topics.view.state().strays();
        let before = std::mem::replace(&mut self.found, found.clone());
        let mut swept = Vec::new();
        for (id, strays) in found {
            if before.get(&id) == Some(&strays) && topics.sweep_topic(id, &strays).await? {
                tracing::info!(topic = %id, partitions = strays.len(), "what was left of a topic was deleted");
                swept.push(id);
            }
        }
        Ok(swept)
    }
}

impl Topics {
    /// Deletes partitions that do not count, the lowest first. False when the topic was made or changed meanwhile.
    pub(super) async fn sweep_topic(&self, id: TopicId, strays: &[(u32, PartitionEntry)]) -> Result<bool, StoreError> {
        let state = self.view.state();
        // What was found may count since. This says so, and the comparison that it has not changed after this.
        if state.strays().get(&id).is_none_or(|strayed| strayed != strays) {
            return Ok(false);
        }
        let same = match state.name(id).and_then(|name| state.topic(name).map(|topic| (name, topic))) {
            Some((name, topic)) => Compare::ModRevision(self.keys.topic(name), topic.mod_revision),
            // Partition 0 comes and goes with its topic. If it is there, the topic is too: made since, or not readable.
            None => Compare::Absent(self.keys.partition(PartitionId::new(id, 0))),
        };
        drop(state);
        let mut ops = Vec::new();
        for (number, entry) in strays {
            let id = PartitionId::new(id, *number);
            let partition = entry.partition.as_ref().map(|_| self.keys.partition(id));
            let tier = entry.tier.as_ref().map(|_| self.keys.tier(id));
            ops.extend(partition.into_iter().chain(tier).map(|key| Op::Delete { key }));
        }
        self.in_chunks(&[same], ops).await
    }
}
