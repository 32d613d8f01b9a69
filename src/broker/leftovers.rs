//! Replicas on the disk that the metadata gives to other brokers, or to nobody: they are deleted, once the store itself has said so.
//!
//! What the mirror shows is no licence to delete: it may be old, or of a store that was put back. So a partition's key is read at
//! that moment, and only one that can be read and names others lets the files go; of a topic that is gone, only the mark that its deletion
//! left. Where the store does not answer they stay, and it is asked again.

use std::{collections::BTreeSet, time::Duration};

use futures::{StreamExt as _, stream};
use tokio::time::Instant;

use super::Broker;
use crate::{
    cluster::ViewState,
    model::{PartitionId, TopicId},
    task::{self, clock},
};

/// Pause before the store is asked again.
const AGAIN: Duration = Duration::from_secs(5);

/// How long an answer of the store is waited for: the task that waits has other things to do.
const ANSWER: Duration = Duration::from_secs(2);

/// How many are looked at together.
const TOGETHER: usize = 64;

/// Replicas that are deleted together, with two rounds of the journal and one sync of their topic's folder, and how many such parts are
/// deleted side by side: a file system that discards what it frees has each removed file wait for the device.
const DELETED_TOGETHER: usize = 64;
const DELETIONS: usize = 16;

/// Those that are to be looked at.
#[derive(Debug, Default)]
pub(super) struct Leftovers {
    waiting: BTreeSet<PartitionId>,
    /// Topics that are gone, and of which the store has not said whether they were deleted.
    topics: BTreeSet<TopicId>,
    /// Not before this moment: the store did not answer.
    not_before: Option<Instant>,
}

impl Leftovers {
    /// A replica that the metadata gives to others.
    pub(super) fn add(&mut self, id: PartitionId) {
        self.waiting.insert(id);
    }

    /// Resolves when there is something to look at.
    pub(super) async fn due(&self) {
        if self.waiting.is_empty() && self.topics.is_empty() {
            return std::future::pending().await;
        }
        if let Some(moment) = self.not_before {
            tokio::time::sleep_until(moment).await;
        }
    }

    /// Deletes those of which the store says that they are others', or nobody's.
    pub(super) async fn see_to(&mut self, broker: &Broker) {
        self.not_before = None;
        for topic in std::mem::take(&mut self.topics) {
            // One that came back meanwhile is served, or will be.
            if broker.view.state().name(topic).is_none() && self.see_to_topic(broker, topic).await {
                tracing::info!(%topic, "the topic was deleted while the metadata store did not answer; its files here were deleted");
            }
        }
        if !self.topics.is_empty() {
            self.not_before = Some(clock::monotonic() + AGAIN);
        }
        let some: Vec<PartitionId> = self.waiting.iter().take(TOGETHER).copied().collect();
        let asked = stream::iter(some).map(|id| async move {
            let answer = tokio::time::timeout(ANSWER, broker.changes.read_back(id)).await;
            (id, answer)
        });
        let answers: Vec<_> = asked.buffer_unordered(TOGETHER).collect().await;
        let mut moved = Vec::new();
        for (id, answer) in answers {
            let value = match answer {
                Ok(Ok(found)) => found.map(|(value, _)| value),
                Ok(Err(_)) | Err(_) => {
                    self.not_before = Some(clock::monotonic() + AGAIN);
                    continue;
                }
            };
            self.waiting.remove(&id);
            // One that came back meanwhile is open, or will be: the mirror brings it.
            let is_others = value.is_some_and(|value| !value.replicas.contains(&broker.settings.id));
            if is_others && broker.hosted.by_id(id).is_none() {
                moved.push(id);
            }
        }
        broker.delete_replicas(moved.clone()).await;
        for id in moved {
            tracing::info!(partition = %id, "the replica moved to other brokers; its files here were deleted");
        }
    }

    /// Sees to the replicas on the disk that no topic has: those of a topic that was deleted go, others are named.
    pub(super) async fn see_to_strays(&mut self, broker: &Broker, state: &ViewState) {
        let topics: BTreeSet<TopicId> =
            broker.log.partitions().into_iter().chain(broker.log.unclaimed()).map(|id| id.topic).collect();
        for topic in topics.into_iter().filter(|topic| state.name(*topic).is_none()) {
            if self.see_to_topic(broker, topic).await {
                tracing::info!(%topic, "deleted what a stop had left of a deleted topic");
            }
        }
    }

    /// Sees to what the disk holds of topics whose deletion left a mark just now.
    pub(super) async fn see_to_deleted(&mut self, broker: &Broker, topics: Vec<TopicId>) {
        for topic in topics {
            let held = held_of(broker, topic);
            if !held.is_empty() && self.delete_held(broker, topic, held).await {
                tracing::info!(%topic, "a topic that this broker did not serve was deleted; its files here were deleted");
            }
        }
    }

    /// Deletes what the disk holds of a topic that is gone, when its deletion left a mark; says so when it is kept.
    pub(super) async fn see_to_topic(&mut self, broker: &Broker, topic: TopicId) -> bool {
        let held = held_of(broker, topic);
        self.delete_held(broker, topic, held).await
    }

    async fn delete_held(&mut self, broker: &Broker, topic: TopicId, held: Vec<PartitionId>) -> bool {
        match tokio::time::timeout(ANSWER, broker.topics.was_deleted(topic)).await {
            Ok(Ok(true)) => {
                let parts = stream::iter(held.chunks(DELETED_TOGETHER));
                parts.for_each_concurrent(DELETIONS, |ids| broker.delete_replicas(ids.to_vec())).await;
                return true;
            }
            Ok(Ok(false)) if held.is_empty() => {}
            Ok(Ok(false)) => tracing::warn!(
                %topic,
                "the data directory holds partitions of a topic that the metadata does not know; they are kept and not served: \
                 if the topic was deleted, remove its folder while the broker is stopped"
            ),
            Ok(Err(_)) | Err(_) => {
                self.topics.insert(topic);
            }
        }
        false
    }
}

/// All of a topic that the data directory has files of.
fn held_of(broker: &Broker, topic: TopicId) -> Vec<PartitionId> {
    let unclaimed = broker.log.unclaimed().into_iter().filter(|id| id.topic == topic);
    broker.log.partitions_of(topic).into_iter().chain(unclaimed).collect()
}

impl Broker {
    async fn delete_replicas(&self, ids: Vec<PartitionId>) {
        if ids.is_empty() {
            return;
        }
        let log = self.log.clone();
        let delete = move || {
            let mut failures = log.delete_replicas(&ids);
            let failed = |id: &PartitionId| failures.iter().any(|(failed, _)| failed == id);
            let unclaimed: Vec<_> = ids.iter().copied().filter(|id| !failed(id)).collect();
            failures.extend(log.delete_unclaimed(&unclaimed));
            failures
        };
        let failures = task::run_blocking(delete).await;
        for (id, error) in failures {
            tracing::warn!(partition = %id, %error, "could not delete all of the partition's files; what is left is looked at again at the next start");
        }
    }
}
