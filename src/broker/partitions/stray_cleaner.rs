//! Stray replicas: files on disk that the metadata assigns to other brokers, or to none. The metadata store must
//! confirm each deletion, because the metadata cache may be stale, or of a restored store. Before a deletion, the key
//! of the partition or the tombstone of the topic is read. Only a readable partition key with other replicas, or the
//! tombstone, permits the deletion. If the store does not respond, the files stay, and the read is retried.

use std::{collections::BTreeSet, path::PathBuf, sync::Arc, time::Duration};

use futures::{StreamExt as _, stream};
use tokio::time::Instant;

use super::table::PartitionTable;
use crate::{
    broker::node_context::NodeContext,
    cluster::{MetadataCache, MetadataSnapshot, PartitionUpdater, Topics},
    log::DataDir,
    model::{BrokerId, PartitionId, TopicId},
    task::{self, clock},
};

/// Pause before the metadata store is read again.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// Timeout of a read from the metadata store. The reconciler task, which waits for it, has other work.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);

/// Maximum number of replicas that are checked together.
const MAX_CHECKED_PER_BATCH: usize = 64;

/// Maximum number of replicas that are deleted together, with two journal frames and one sync of the topic's directory.
const MAX_DELETED_PER_BATCH: usize = 64;

/// Maximum number of such batches that are deleted concurrently. On a file system that discards freed blocks, the
/// removal of each file waits for the device.
const MAX_CONCURRENT_DELETIONS: usize = 16;

/// Checks and deletes stray replicas.
pub(in crate::broker) struct StrayCleaner {
    id: BrokerId,
    /// Path of the data directory, for log lines.
    data_dir: PathBuf,
    log: DataDir,
    metadata: MetadataCache,
    updater: PartitionUpdater,
    tombstones: Topics,
    partitions: Arc<PartitionTable>,
    /// Stray replicas whose partition keys must be read.
    waiting: BTreeSet<PartitionId>,
    /// Removed topics whose tombstone could not be read, because the store did not respond.
    topics: BTreeSet<TopicId>,
    /// Earliest time of the next check, set when the store did not respond to the last one.
    not_before: Option<Instant>,
}

impl StrayCleaner {
    /// Creates a cleaner without replicas or topics to check. `topics` reads the tombstones.
    pub(in crate::broker) fn new(ctx: &NodeContext, topics: Topics, partitions: Arc<PartitionTable>) -> Self {
        Self {
            id: ctx.id,
            data_dir: ctx.config.broker.data_dir.clone(),
            log: ctx.log.clone(),
            metadata: ctx.metadata.clone(),
            updater: PartitionUpdater::new(Arc::clone(&ctx.store), ctx.keys.clone()),
            tombstones: topics,
            partitions,
            waiting: BTreeSet::new(),
            topics: BTreeSet::new(),
            not_before: None,
        }
    }

    /// Adds a replica on disk that the metadata cache does not assign to this broker.
    pub(super) fn add(&mut self, id: PartitionId) {
        self.waiting.insert(id);
    }

    /// Waits until there is a replica or topic to check and the pause after a failed read has passed. Never returns if
    /// there is nothing to check.
    pub(super) async fn due(&self) {
        if self.waiting.is_empty() && self.topics.is_empty() {
            return std::future::pending().await;
        }
        if let Some(moment) = self.not_before {
            tokio::time::sleep_until(moment).await;
        }
    }

    /// Checks the removed topics, and at most [`MAX_CHECKED_PER_BATCH`] waiting replicas. Deletes the replicas of
    /// topics with a tombstone, and the replicas that the metadata store assigns to other brokers only. A replica that
    /// is open stays. A waiting replica with a missing or unreadable key keeps its files and is not checked again.
    /// Failed reads are retried after a pause.
    pub(super) async fn check_and_delete(&mut self) {
        self.not_before = None;
        for topic in std::mem::take(&mut self.topics) {
            // A topic that is in the metadata again is not removed: the reconciler opens its partitions.
            if self.metadata.state().name(topic).is_none() && self.delete_removed_topic(topic).await {
                tracing::info!(
                    %topic,
                    "deleted the files of a topic that was deleted during an outage of the metadata store"
                );
            }
        }
        if !self.topics.is_empty() {
            self.not_before = Some(clock::monotonic() + RETRY_INTERVAL);
        }
        let batch: Vec<PartitionId> = self.waiting.iter().take(MAX_CHECKED_PER_BATCH).copied().collect();
        let updater = &self.updater;
        let reads = stream::iter(batch).map(|id| async move {
            let response = tokio::time::timeout(REQUEST_TIMEOUT, updater.read_back(id)).await;
            (id, response)
        });
        let responses: Vec<_> = reads.buffer_unordered(MAX_CHECKED_PER_BATCH).collect().await;
        let mut moved = Vec::new();
        for (id, response) in responses {
            let value = match response {
                Ok(Ok(stored)) => stored.map(|(value, _)| value),
                Ok(Err(_)) | Err(_) => {
                    self.not_before = Some(clock::monotonic() + RETRY_INTERVAL);
                    continue;
                }
            };
            self.waiting.remove(&id);
            // A replica that the store assigns to this broker again, or that is open, stays. The reconciler opens an
            // assigned replica.
            let has_moved = value.is_some_and(|value| !value.replicas.contains(&self.id));
            if has_moved && self.partitions.by_id(id).is_none() {
                moved.push(id);
            }
        }
        self.delete_replicas(moved.clone()).await;
        for id in moved {
            tracing::info!(partition = %id, "deleted the files of a replica that moved to other brokers");
        }
    }

    /// Calls [`Self::delete_removed_topic`] for all topics that have files on disk and are not in the metadata. Called
    /// once, at the activation.
    pub(super) async fn delete_removed_topics(&mut self, state: &MetadataSnapshot) {
        let topics: BTreeSet<TopicId> =
            self.log.partitions().into_iter().chain(self.log.stray_partitions()).map(|id| id.topic).collect();
        for topic in topics.into_iter().filter(|topic| state.name(*topic).is_none()) {
            if self.delete_removed_topic(topic).await {
                tracing::info!(%topic, "deleted the remaining files of a deleted topic");
            }
        }
    }

    /// Handles changed tombstone keys of topics that are not in the metadata: deletes the files of each topic whose
    /// tombstone is in the store.
    pub(super) async fn on_tombstones_changed(&mut self, topics: Vec<TopicId>) {
        for topic in topics {
            let ids = self.partitions_on_disk(topic);
            if !ids.is_empty() && self.delete_if_tombstoned(topic, ids).await {
                tracing::info!(%topic, "deleted the files of a deleted topic that this broker did not serve");
            }
        }
    }

    /// Deletes the files of a removed topic if the store has its tombstone, and returns true then, also without files.
    /// Logs a warning if there is no tombstone and the topic has files. If the store does not respond, returns false,
    /// and the topic is checked again later.
    pub(super) async fn delete_removed_topic(&mut self, topic: TopicId) -> bool {
        let ids = self.partitions_on_disk(topic);
        self.delete_if_tombstoned(topic, ids).await
    }

    /// Deletes the files of the replicas `ids`, all of one removed topic, if the store has the tombstone of this topic.
    /// Returns true if it has; failed deletions are logged. Without a tombstone, logs a warning if `ids` is not empty.
    /// If the store does not respond, the topic is checked again later.
    async fn delete_if_tombstoned(&mut self, topic: TopicId, ids: Vec<PartitionId>) -> bool {
        match tokio::time::timeout(REQUEST_TIMEOUT, self.tombstones.was_deleted(topic)).await {
            Ok(Ok(true)) => {
                let batches = stream::iter(ids.chunks(MAX_DELETED_PER_BATCH));
                let this = &*self;
                batches.for_each_concurrent(MAX_CONCURRENT_DELETIONS, |ids| this.delete_replicas(ids.to_vec())).await;
                return true;
            }
            Ok(Ok(false)) if ids.is_empty() => {}
            Ok(Ok(false)) => tracing::warn!(
                %topic,
                dir = %self.data_dir.join(topic.to_string()).display(),
                "the data directory contains partitions of a topic that is not in the metadata; they are kept and not \
                 served: if the topic was deleted, remove the folder in \"dir\" while the broker is stopped"
            ),
            Ok(Err(_)) | Err(_) => {
                self.topics.insert(topic);
            }
        }
        false
    }

    /// Returns all partitions of a topic that have files in the data directory, as replicas or as stray replicas.
    fn partitions_on_disk(&self, topic: TopicId) -> Vec<PartitionId> {
        let strays = self.log.stray_partitions().into_iter().filter(|id| id.topic == topic);
        self.log.partitions_of(topic).into_iter().chain(strays).collect()
    }

    /// Deletes the files of these replicas, and logs each failure.
    async fn delete_replicas(&self, ids: Vec<PartitionId>) {
        if ids.is_empty() {
            return;
        }
        let log = self.log.clone();
        let delete = move || {
            let mut failures = log.delete_replicas(&ids);
            let failed = |id: &PartitionId| failures.iter().any(|(failed, _)| failed == id);
            let strays: Vec<_> = ids.iter().copied().filter(|id| !failed(id)).collect();
            failures.extend(log.delete_stray(&strays));
            failures
        };
        let failures = task::run_blocking(delete).await;
        for (id, error) in failures {
            tracing::warn!(
                partition = %id, %error,
                "could not delete all files of the partition: the remaining files are checked at the next start"
            );
        }
    }
}
