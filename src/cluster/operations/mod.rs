//! Operations of an operator: drains, reassignments and elections.
//!
//! # Overview
//!
//! An operation only writes to the metadata store. `drain` writes a key of its own, and the controller moves the
//! replicas. `reassign` starts a reassignment or queues it for the controller. `cancel` and `elect` take effect by
//! their write. The progress is visible in the values of the partitions.
//!
//! # Invariants
//!
//! - Every change of a partition is a compare-and-set of the value that it is based on. After a conflict, the change is
//!   computed again from the new value.
//! - An operation checks all its partitions in the metadata cache before its first write. Writes to several partitions
//!   are not one transaction: after a failure some partitions may be changed, and the operation may be repeated.
//! - New values come from [`PartitionValue`] alone: an operation cannot create a set that the protocol does not allow.
//!
//! # Crash
//!
//! An interrupted operation has changed some of its partitions. Each change is valid by itself.

mod cancel;
mod drain;
mod elect;
mod reassign;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
    time::Duration,
};

pub use self::{
    cancel::CancelError,
    drain::{BrokerDrain, DrainError},
    elect::{ElectError, LostOffsets, PreferredLeaderIssue, ReplicaPosition, UncleanCandidate, best_unclean_candidate},
    reassign::ReassignError,
};
use super::{
    keys::{Keys, TopicValue},
    metadata::{MetadataCache, MetadataSnapshot, Versioned},
    partition_updates::{PartitionUpdate, PartitionUpdater, UpdateOutcome},
    partition_value::PartitionValue,
    stats::ClusterStats,
    store::{Compare, MetaStore, MetaStoreError, Revision},
    topics::UnknownTopic,
};
use crate::model::{BrokerId, ConfigMap, PartitionId, TopicConfig, TopicId, TopicName};

/// Maximum number of attempts of one operation. Each attempt after the first one repeats the partitions that had a
/// conflict or an unknown outcome in the attempt before.
const MAX_ATTEMPTS: usize = 10;

/// Maximum number of partitions of one operation that are decided between two yields of the task.
const MAX_DECISIONS_BEFORE_YIELD: usize = 256;

/// Maximum time to wait until the metadata cache shows a write.
const CACHE_WAIT: Duration = Duration::from_secs(5);

/// Operations of an operator on one cluster. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ClusterOperations {
    store: Arc<dyn MetaStore>,
    keys: Keys,
    metadata: MetadataCache,
    defaults: Arc<ConfigMap>,
    updater: PartitionUpdater,
}

/// A partition after an operation, or as listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OperationResult {
    /// Id of the partition.
    pub id: PartitionId,
    /// Value of the partition.
    pub value: PartitionValue,
    /// Revision of the value.
    pub revision: Revision,
    /// True if the operation changed the value. Also true if an attempt with an unknown outcome may have changed it,
    /// and no further change is needed.
    pub changed: bool,
}

/// Error: the cluster does not have these brokers.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the cluster has no {}: it has {}", BrokerList(ids), IdList(known))]
pub struct UnknownBrokers {
    /// Unknown broker ids.
    pub ids: Vec<BrokerId>,
    /// Broker ids of the cluster.
    pub known: Vec<BrokerId>,
}

/// Error: the topic has no partition with this number.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("topic {:?} has no partition {number}: it has {count}, numbered from 0", topic.as_str())]
pub struct UnknownPartition {
    pub topic: TopicName,
    /// Requested partition number.
    pub number: u32,
    /// Number of partitions of the topic.
    pub count: u32,
}

/// Error: the target of an operation does not exist.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    #[error(transparent)]
    Topic(#[from] UnknownTopic),
    /// The partition does not exist.
    #[error(transparent)]
    Partition(#[from] UnknownPartition),
}

/// Error of a write of partition values.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// A value is missing or unreadable.
    #[error("the metadata of partition {partition} is missing or cannot be used: see `strandline cluster describe`")]
    Unreadable {
        /// The partition, as `topic/number`.
        partition: String,
    },
    /// After `MAX_ATTEMPTS` attempts, at least one partition still had a conflict or an unknown outcome.
    #[error("other writers keep changing partition {partition}: try again{}", format_done(*.done))]
    Conflict {
        /// The first of these partitions, as `topic/number`.
        partition: String,
        /// Number of partitions that the operation has changed.
        done: usize,
    },
    #[error("{source}{}", format_done(*.done))]
    Store {
        /// The store's error.
        source: MetaStoreError,
        /// Number of partitions that the operation has changed.
        done: usize,
    },
}

impl WriteError {
    /// Returns true if the same operation may succeed later.
    pub const fn retryable(&self) -> bool {
        match self {
            Self::Unreadable { .. } => false,
            Self::Conflict { .. } => true,
            Self::Store { source, .. } => source.retryable(),
        }
    }
}

/// Returns the end of an error message: the number of partitions that the operation has changed, if any.
fn format_done(done: usize) -> String {
    match done {
        0 => String::new(),
        1 => "; 1 partition was changed before: repeat the operation for the rest".to_owned(),
        done => format!("; {done} partitions were changed before: repeat the operation for the rest"),
    }
}

/// Formats broker ids in a sentence: `1, 2 and 3`, or `none`.
struct IdList<'a>(&'a [BrokerId]);

impl fmt::Display for IdList<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            [] => f.write_str("none"),
            [id] => id.fmt(f),
            [first @ .., last] => {
                let first: Vec<String> = first.iter().map(ToString::to_string).collect();
                write!(f, "{} and {last}", first.join(", "))
            }
        }
    }
}

/// Formats broker ids with their noun: `broker 1`, or `brokers 1 and 2`.
struct BrokerList<'a>(&'a [BrokerId]);

impl fmt::Display for BrokerList<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "broker{} {}", if self.0.len() == 1 { "" } else { "s" }, IdList(self.0))
    }
}

/// Target topic of an operation.
#[derive(Clone, Debug)]
struct TargetTopic {
    name: TopicName,
    /// The topic's value in the metadata cache.
    cached: Arc<Versioned<TopicValue>>,
}

/// A partition whose value an operation is to replace.
struct PartitionEdit {
    id: PartitionId,
    /// Value that the decision is based on.
    value: PartitionValue,
    /// Revision of the value.
    revision: Revision,
    /// True if this value may be the result of an earlier attempt, whose outcome was unknown.
    may_be_applied: bool,
}

/// Reason why the write of a partition ends the whole operation.
enum FailedWrite {
    /// The stored value is missing or unreadable after a conflict or an unknown outcome.
    Unreadable(PartitionId),
    /// A request to the store failed, and the change was not applied, or the value could not be read back.
    Store(MetaStoreError),
}

impl ClusterOperations {
    /// Returns the operations on a cluster. `defaults` are this broker's topic configuration defaults.
    pub fn new(store: Arc<dyn MetaStore>, keys: Keys, metadata: MetadataCache, defaults: ConfigMap) -> Self {
        let updater = PartitionUpdater::new(Arc::clone(&store), keys.clone());
        Self { store, keys, metadata, defaults: Arc::new(defaults), updater }
    }

    /// Waits at most `CACHE_WAIT` until this broker's metadata cache shows the written values.
    pub async fn wait_until_cached(&self, results: &[OperationResult]) {
        if let Some(newest) = results.iter().map(|result| result.revision).max() {
            self.wait_for_cache(newest).await;
        }
    }

    /// Waits at most `CACHE_WAIT` until this broker's metadata cache has the revision.
    async fn wait_for_cache(&self, revision: Revision) {
        let _late = tokio::time::timeout(CACHE_WAIT, self.metadata.wait_for_revision(revision)).await;
    }

    /// Returns the counts of brokers and partitions, from the metadata cache.
    pub fn stats(&self) -> ClusterStats {
        ClusterStats::of(&self.metadata.state(), &self.defaults)
    }

    /// Returns the path of each key in the metadata cache whose value cannot be used, with the reason.
    pub fn unreadable(&self) -> Vec<(String, String)> {
        let state = self.metadata.state();
        state.unreadable().iter().map(|(key, reason)| (self.keys.path(key), reason.clone())).collect()
    }

    /// Returns a topic from the metadata cache, with the ids of the requested partitions: one, or all if `partition` is
    /// `None`.
    fn find(&self, topic: &TopicName, partition: Option<u32>) -> Result<(TargetTopic, Vec<PartitionId>), TargetError> {
        let topic = self.topic(topic)?;
        let ids = topic.partitions(partition)?;
        Ok((topic, ids))
    }

    /// Returns the topic with this name from the metadata cache.
    fn topic(&self, name: &TopicName) -> Result<TargetTopic, UnknownTopic> {
        let state = self.metadata.state();
        match state.topic(name) {
            Some(cached) => Ok(TargetTopic { name: name.clone(), cached: Arc::clone(cached) }),
            None => Err(UnknownTopic::new(name.as_str())),
        }
    }

    /// Returns the display name of a partition, as `topic/number`; its id if the topic is not in the metadata cache.
    fn display_name(&self, id: PartitionId) -> String {
        match self.metadata.state().name(id.topic) {
            Some(name) => format!("{name}/{}", id.number),
            None => id.to_string(),
        }
    }

    /// Returns the min ISR of a topic as the controller computes it. For a deleted topic or an unreadable
    /// configuration, the result exceeds any ISR.
    fn min_insync(&self, topic: TopicId) -> usize {
        let state = self.metadata.state();
        let entry = state.name(topic).and_then(|name| state.topic(name));
        let config = entry.and_then(|entry| TopicConfig::resolve(&self.defaults, &entry.value.config).ok());
        config.map_or(usize::MAX, |config| config.min_insync_replicas)
    }

    /// Replaces the values of partitions by the results of `decide`; `None` leaves a value as it is. `decide` first
    /// gets the values in the metadata cache; if it fails for one of them, nothing is written. After a conflict or an
    /// unknown outcome, `decide` is called again with the stored value, in at most `MAX_ATTEMPTS` attempts in total.
    /// Returns the results ordered by partition.
    async fn edit<E: From<WriteError>>(
        &self,
        ids: &[PartitionId],
        decide: impl Fn(PartitionId, &PartitionValue, Revision) -> Result<Option<PartitionValue>, E>,
    ) -> Result<Vec<OperationResult>, E> {
        self.edit_with_guards(ids, |_| Vec::new(), decide).await
    }

    /// Like [`ClusterOperations::edit`]. `guards` gets the old value of a partition and returns further compares, which
    /// must hold when that value is replaced.
    async fn edit_with_guards<E: From<WriteError>>(
        &self,
        ids: &[PartitionId],
        guards: impl Fn(&PartitionValue) -> Vec<Compare>,
        decide: impl Fn(PartitionId, &PartitionValue, Revision) -> Result<Option<PartitionValue>, E>,
    ) -> Result<Vec<OperationResult>, E> {
        let mut remaining = self.load_partitions(ids)?;
        let mut done = Vec::with_capacity(remaining.len());
        for _ in 0..MAX_ATTEMPTS {
            let mut changes = Vec::new();
            for (number, PartitionEdit { id, value, revision, may_be_applied }) in (1..).zip(remaining.drain(..)) {
                if number % MAX_DECISIONS_BEFORE_YIELD == 0 {
                    tokio::task::yield_now().await;
                }
                match decide(id, &value, revision)? {
                    None => done.push(OperationResult { id, value, revision, changed: may_be_applied }),
                    Some(new) => changes.push(PartitionUpdate {
                        id,
                        expected_revision: revision,
                        value: new,
                        guards: guards(&value),
                    }),
                }
            }
            remaining = self.write(changes, &mut done).await?;
            if remaining.is_empty() {
                done.sort_by_key(|result| result.id);
                return Ok(done);
            }
        }
        Err(WriteError::Conflict { partition: self.display_name(remaining[0].id), done: count_changed(&done) }.into())
    }

    /// Returns the partitions with their values from the metadata cache. Fails if a value is missing or unreadable.
    fn load_partitions(&self, ids: &[PartitionId]) -> Result<Vec<PartitionEdit>, WriteError> {
        let state = self.metadata.state();
        let edits = ids.iter().map(|id| {
            let partition = state.partition(*id).and_then(|entry| entry.partition.as_ref());
            let partition = partition.ok_or_else(|| WriteError::Unreadable { partition: self.display_name(*id) })?;
            Ok(PartitionEdit {
                id: *id,
                value: partition.value.clone(),
                revision: partition.mod_revision,
                may_be_applied: false,
            })
        });
        edits.collect()
    }

    /// Writes changes, and appends the applied ones to `done`. Returns the partitions with a conflict or an unknown
    /// outcome, with their stored values: the caller decides them again. Fails if a request fails, or if a value is
    /// missing, unreadable or cannot be read back; other changes may be applied then.
    async fn write(
        &self,
        changes: Vec<PartitionUpdate>,
        done: &mut Vec<OperationResult>,
    ) -> Result<Vec<PartitionEdit>, WriteError> {
        if changes.is_empty() {
            return Ok(Vec::new());
        }
        let values: BTreeMap<PartitionId, PartitionValue> =
            changes.iter().map(|change| (change.id, change.value.clone())).collect();
        let (mut remaining, mut failure) = (Vec::new(), None);
        for (id, outcome) in self.updater.apply(changes, &[]).await {
            let (stored, may_be_applied) = match outcome {
                UpdateOutcome::Done(revision) => {
                    done.push(OperationResult { id, value: values[&id].clone(), revision, changed: true });
                    continue;
                }
                UpdateOutcome::Conflict(stored) => (Ok(stored), false),
                UpdateOutcome::Unknown(_) => (self.updater.read_back(id).await, true),
                UpdateOutcome::Failed(source) => (Err(source), false),
                // Cannot occur: this outcome requires shared compares, and `apply` got none.
                UpdateOutcome::GuardFailed => (Ok(None), false),
            };
            match stored {
                Ok(Some((value, revision))) => remaining.push(PartitionEdit { id, value, revision, may_be_applied }),
                Ok(None) => failure = Some(FailedWrite::Unreadable(id)),
                Err(source) => failure = Some(FailedWrite::Store(source)),
            }
        }
        match failure {
            None => Ok(remaining),
            Some(FailedWrite::Unreadable(id)) => Err(WriteError::Unreadable { partition: self.display_name(id) }),
            Some(FailedWrite::Store(source)) => Err(WriteError::Store { source, done: count_changed(done) }),
        }
    }
}

/// Returns the number of results whose partition was changed.
fn count_changed(done: &[OperationResult]) -> usize {
    done.iter().filter(|result| result.changed).count()
}

impl TargetTopic {
    /// Returns the id of one partition of the topic, or those of all if `partition` is `None`.
    fn partitions(&self, partition: Option<u32>) -> Result<Vec<PartitionId>, UnknownPartition> {
        let count = self.cached.value.partitions;
        let numbers = match partition {
            None => 0..count,
            Some(number) if number < count => number..number + 1,
            Some(number) => return Err(UnknownPartition { topic: self.name.clone(), number, count }),
        };
        Ok(numbers.map(|number| PartitionId::new(self.cached.value.id, number)).collect())
    }
}

/// Returns every broker that the metadata names: live brokers, holders of replicas, and drained brokers.
fn known_brokers(state: &MetadataSnapshot) -> BTreeSet<BrokerId> {
    state.brokers().keys().chain(state.drains().keys()).copied().chain(state.holders()).collect()
}

#[cfg(test)]
mod tests;
