//! Stray replicas: files on disk that the metadata assigns to other brokers, or to none. The metadata store must confirm each deletion,
//! because the metadata cache may be stale, or of a restored store. A partition's key is read at that moment, and only a readable key with
//! other replicas permits the deletion. For a removed topic, only its tombstone does. If the store does not respond, the files stay, and
//! the read is retried.

use std::{collections::BTreeSet, time::Duration};

use futures::{StreamExt as _, stream};
use tokio::time::Instant;

use super::Broker;
use crate::{
    cluster::ViewState,
    model::{PartitionId, TopicId},
    task::{self, clock},
};

/// Pause before the metadata store is read again.
const AGAIN: Duration = Duration::from_secs(5);

/// Timeout of a read from the metadata store. The waiting task has other work.
const ANSWER: Duration = Duration::from_secs(2);

/// Maximum number of replicas that are checked together.
const TOGETHER: usize = 64;

/// Number of replicas deleted together, with two journal frames and one sync of the topic's directory, and number of such groups deleted
/// concurrently. On a file system that discards freed blocks, each removed file waits for the device.
const DELETED_TOGETHER: usize = 64;
const DELETIONS: usize = 16;

/// Stray replicas that are to be checked.
#[derive(Debug, Default)]
pub(super) struct Leftovers {
    waiting: BTreeSet<PartitionId>,
    /// Removed topics whose tombstone could not be looked up yet.
    topics: BTreeSet<TopicId>,
    /// Earliest time of the next check, set when the store did not respond.
    not_before: Option<Instant>,
}

impl Leftovers {
    /// Adds a replica that the metadata does not assign to this broker.
    pub(super) fn add(&mut self, id: PartitionId) {
        self.waiting.insert(id);
    }

    /// Resolves when there is something to check.
    pub(super) async fn due(&self) {
        if self.waiting.is_empty() && self.topics.is_empty() {
            return std::future::pending().await;
        }
        if let Some(moment) = self.not_before {
            tokio::time::sleep_until(moment).await;
        }
    }

    /// Deletes the waiting replicas that the metadata store assigns to other brokers, and those of deleted topics.
    pub(super) async fn see_to(&mut self, broker: &Broker) {
        self.not_before = None;
        for topic in std::mem::take(&mut self.topics) {
            // A topic that reappeared meanwhile is served, or will be.
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
            // A replica that was assigned again meanwhile is open, or will be opened when the metadata cache shows that.
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

    /// Checks the replicas on disk that belong to no topic. Replicas of deleted topics are deleted, and all other topics are logged.
    pub(super) async fn see_to_strays(&mut self, broker: &Broker, state: &ViewState) {
        let topics: BTreeSet<TopicId> =
            broker.log.partitions().into_iter().chain(broker.log.unclaimed()).map(|id| id.topic).collect();
        for topic in topics.into_iter().filter(|topic| state.name(*topic).is_none()) {
            if self.see_to_topic(broker, topic).await {
                tracing::info!(%topic, "deleted what a stop had left of a deleted topic");
            }
        }
    }

    /// Deletes the files of topics whose tombstone has just appeared.
    pub(super) async fn see_to_deleted(&mut self, broker: &Broker, topics: Vec<TopicId>) {
        for topic in topics {
            let held = held_of(broker, topic);
            if !held.is_empty() && self.delete_held(broker, topic, held).await {
                tracing::info!(%topic, "a topic that this broker did not serve was deleted; its files here were deleted");
            }
        }
    }

    /// Deletes the files of a removed topic if there is a tombstone. Logs a warning if the files are kept. Returns true if they are
    /// deleted.
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

/// Returns all partitions of a topic that have files in the data directory.
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
