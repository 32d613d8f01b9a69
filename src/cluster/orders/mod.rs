//! Operations of an operator: drains, reassignments and elections.
//!
//! # Overview
//!
//! An operation only writes the desired state where all brokers see it: `drain` a key of its own, `reassign` and
//! `elect` the values of partitions. The controller applies that state step by step. The progress is visible in the
//! same values.
//!
//! # Invariants
//!
//! - Every change is a compare-and-set of the value that it is based on. After a conflict it is decided again on the
//!   new value.
//! - An operation is checked completely before its first write. Writes to several partitions are not one transaction: a
//!   failure reports the number of changed partitions, and the operation may be repeated.
//! - New values come from [`PartitionValue`] alone: an operation cannot create a set that the protocol does not allow.
//!
//! # Crash
//!
//! An interrupted operation has changed its first partitions. Each change is valid by itself.

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
    drain::{DrainError, Drained},
    elect::{ElectError, Held, Loss, Successor, Unfit, successor},
    reassign::ReassignError,
};
use super::{
    census::Census,
    changes::{Change, Changed, PartitionChanges},
    keys::{Keys, TopicValue},
    partition_value::PartitionValue,
    store::{Compare, MetaStore, Revision, StoreError},
    topics::UnknownTopic,
    view::{Known, View, ViewState},
};
use crate::model::{BrokerId, ConfigMap, PartitionId, TopicConfig, TopicId, TopicName};

/// Maximum number of attempts of a compare-and-set while other writers come first.
const ATTEMPTS: usize = 10;

/// Number of partitions of one operation that are decided before the task yields.
const DECISIONS_TOGETHER: usize = 256;

/// Maximum time to wait until the metadata cache shows a write.
const CATCH_UP: Duration = Duration::from_secs(5);

/// Operations of an operator. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Orders {
    store: Arc<dyn MetaStore>,
    keys: Keys,
    view: View,
    defaults: Arc<ConfigMap>,
    changes: PartitionChanges,
}

/// A partition after an operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ordered {
    /// Id of the partition.
    pub id: PartitionId,
    /// Value of the partition.
    pub value: PartitionValue,
    /// Revision of the value.
    pub revision: Revision,
    /// True if the operation changed the value.
    pub changed: bool,
}

/// Error: the cluster does not have these brokers.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the cluster has no {}: it has {}", Brokers(ids), List(known))]
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
    /// Name of the topic.
    pub topic: TopicName,
    /// Requested partition number.
    pub number: u32,
    /// Number of partitions of the topic.
    pub count: u32,
}

/// Error: the target of an operation does not exist.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FindError {
    /// The topic does not exist.
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
    #[error(
        "the metadata of partition {partition} is not there or cannot be used: `strandline cluster describe` tells"
    )]
    Unreadable {
        /// The partition, as `topic/number`.
        partition: String,
    },
    /// Other writers kept changing the partition.
    #[error("partition {partition} is being changed by others at the same time: try again{}", so_far(*.done))]
    Conflict {
        /// The partition, as `topic/number`.
        partition: String,
        /// Number of partitions that were changed before.
        done: usize,
    },
    /// The metadata store failed.
    #[error("{source}{}", so_far(*.done))]
    Store {
        /// The store's error.
        source: StoreError,
        /// Number of partitions that were changed before.
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

fn so_far(done: usize) -> String {
    match done {
        0 => String::new(),
        1 => "; 1 partition was changed before: give the same order again for the rest".to_owned(),
        done => format!("; {done} partitions were changed before: give the same order again for the rest"),
    }
}

/// Broker ids in a sentence: `1, 2 and 3`.
struct List<'a>(&'a [BrokerId]);

impl fmt::Display for List<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            [] => f.write_str("none"),
            [one] => one.fmt(f),
            [most @ .., last] => {
                let most: Vec<String> = most.iter().map(ToString::to_string).collect();
                write!(f, "{} and {last}", most.join(", "))
            }
        }
    }
}

/// Broker ids with their noun: `broker 1`, or `brokers 1 and 2`.
struct Brokers<'a>(&'a [BrokerId]);

impl fmt::Display for Brokers<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "broker{} {}", if self.0.len() == 1 { "" } else { "s" }, List(self.0))
    }
}

/// Target topic of an operation.
#[derive(Clone, Debug)]
struct Chosen {
    name: TopicName,
    known: Arc<Known<TopicValue>>,
}

/// A partition whose value is being replaced.
struct Editing {
    id: PartitionId,
    /// Value that the decision is based on.
    value: PartitionValue,
    revision: Revision,
    /// True if an earlier attempt may have been applied.
    tried: bool,
}

impl Orders {
    /// Returns the operations on a cluster. `defaults` are the topic configuration defaults.
    pub fn new(store: Arc<dyn MetaStore>, keys: Keys, view: View, defaults: ConfigMap) -> Self {
        let changes = PartitionChanges::new(Arc::clone(&store), keys.clone());
        Self { store, keys, view, defaults: Arc::new(defaults), changes }
    }

    /// Waits for a bounded time until this broker's metadata cache shows the written values.
    pub async fn seen(&self, ordered: &[Ordered]) {
        if let Some(newest) = ordered.iter().map(|one| one.revision).max() {
            self.reached(newest).await;
        }
    }

    async fn reached(&self, revision: Revision) {
        let _late = tokio::time::timeout(CATCH_UP, self.view.reached(revision)).await;
    }

    /// Returns the counts of the cluster.
    pub fn census(&self) -> Census {
        Census::of(&self.view.state(), &self.defaults)
    }

    /// Returns the paths with unusable values, and the errors.
    pub fn unreadable(&self) -> Vec<(String, String)> {
        let state = self.view.state();
        state.unreadable().iter().map(|(key, why)| (self.keys.path(key), why.clone())).collect()
    }

    /// Returns one partition of a topic, or all.
    fn find(&self, topic: &TopicName, partition: Option<u32>) -> Result<(Chosen, Vec<PartitionId>), FindError> {
        let topic = self.topic(topic)?;
        let ids = topic.partitions(partition)?;
        Ok((topic, ids))
    }

    fn topic(&self, name: &TopicName) -> Result<Chosen, UnknownTopic> {
        let state = self.view.state();
        match state.topic(name) {
            Some(known) => Ok(Chosen { name: name.clone(), known: Arc::clone(known) }),
            None => Err(UnknownTopic::of(&state, name.as_str())),
        }
    }

    /// Returns the display name of a partition, as `topic/number`.
    fn spoken(&self, id: PartitionId) -> String {
        match self.view.state().name(id.topic) {
            Some(name) => format!("{name}/{}", id.number),
            None => id.to_string(),
        }
    }

    /// Returns the min ISR of a topic as the controller computes it. If the configuration is unreadable, the result
    /// exceeds any ISR.
    fn min_insync(&self, topic: TopicId) -> usize {
        let state = self.view.state();
        let known = state.name(topic).and_then(|name| state.topic(name));
        let config = known.and_then(|known| TopicConfig::resolve(&self.defaults, &known.value.config).ok());
        config.map_or(usize::MAX, |config| config.min_insync_replicas)
    }

    /// Replaces the values of partitions by the result of `decide`; `None` leaves a value as it is. Writes nothing if
    /// `decide` fails for a value in the metadata cache.
    async fn edit<E: From<WriteError>>(
        &self,
        ids: &[PartitionId],
        decide: impl Fn(PartitionId, &PartitionValue, Revision) -> Result<Option<PartitionValue>, E>,
    ) -> Result<Vec<Ordered>, E> {
        self.edit_while(ids, |_| Vec::new(), decide).await
    }

    /// Like [`Orders::edit`], with further compares that must hold when a value is replaced.
    async fn edit_while<E: From<WriteError>>(
        &self,
        ids: &[PartitionId],
        also: impl Fn(&PartitionValue) -> Vec<Compare>,
        decide: impl Fn(PartitionId, &PartitionValue, Revision) -> Result<Option<PartitionValue>, E>,
    ) -> Result<Vec<Ordered>, E> {
        let mut left = self.look(ids)?;
        let mut done = Vec::with_capacity(left.len());
        for _ in 0..ATTEMPTS {
            let mut changes = Vec::new();
            for (number, Editing { id, value, revision, tried }) in (1..).zip(left.drain(..)) {
                if number % DECISIONS_TOGETHER == 0 {
                    tokio::task::yield_now().await;
                }
                match decide(id, &value, revision)? {
                    None => done.push(Ordered { id, value, revision, changed: tried }),
                    Some(new) => changes.push(Change { id, expect: revision, value: new, also: also(&value) }),
                }
            }
            left = self.write(changes, &mut done).await?;
            if left.is_empty() {
                done.sort_by_key(|one| one.id);
                return Ok(done);
            }
        }
        Err(WriteError::Conflict { partition: self.spoken(left[0].id), done: changed(&done) }.into())
    }

    /// Returns the partitions as the metadata cache shows them.
    fn look(&self, ids: &[PartitionId]) -> Result<Vec<Editing>, WriteError> {
        let state = self.view.state();
        let found = ids.iter().map(|id| {
            let known = state.partition(*id).and_then(|entry| entry.partition.as_ref());
            let known = known.ok_or_else(|| WriteError::Unreadable { partition: self.spoken(*id) })?;
            Ok(Editing { id: *id, value: known.value.clone(), revision: known.mod_revision, tried: false })
        });
        found.collect()
    }

    /// Writes changes. Returns the partitions with a conflict or an unknown outcome, with their stored values.
    async fn write(&self, changes: Vec<Change>, done: &mut Vec<Ordered>) -> Result<Vec<Editing>, WriteError> {
        if changes.is_empty() {
            return Ok(Vec::new());
        }
        let values: BTreeMap<PartitionId, PartitionValue> =
            changes.iter().map(|change| (change.id, change.value.clone())).collect();
        let (mut left, mut failed) = (Vec::new(), None);
        for (id, outcome) in self.changes.make(changes, &[]).await {
            let (stands, tried) = match outcome {
                Changed::Done(revision) => {
                    done.push(Ordered { id, value: values[&id].clone(), revision, changed: true });
                    continue;
                }
                Changed::Refused(stands) => (Ok(stands), false),
                Changed::Unknown(_) => (self.changes.read_back(id).await, true),
                Changed::Failed(source) => (Err(source), false),
                // Requires a compare that all changes share, and there is none.
                Changed::Barred => (Ok(None), false),
            };
            match stands {
                Ok(Some((value, revision))) => left.push(Editing { id, value, revision, tried }),
                Ok(None) => failed = Some((id, None)),
                Err(source) => failed = Some((id, Some(source))),
            }
        }
        match failed {
            None => Ok(left),
            Some((id, None)) => Err(WriteError::Unreadable { partition: self.spoken(id) }),
            Some((_, Some(source))) => Err(WriteError::Store { source, done: changed(done) }),
        }
    }
}

/// Returns the number of changed partitions.
fn changed(done: &[Ordered]) -> usize {
    done.iter().filter(|one| one.changed).count()
}

impl Chosen {
    /// Returns one partition of the topic, or all.
    fn partitions(&self, partition: Option<u32>) -> Result<Vec<PartitionId>, UnknownPartition> {
        let count = self.known.value.partitions;
        let numbers = match partition {
            None => 0..count,
            Some(number) if number < count => number..number + 1,
            Some(number) => return Err(UnknownPartition { topic: self.name.clone(), number, count }),
        };
        Ok(numbers.map(|number| PartitionId::new(self.known.value.id, number)).collect())
    }
}

/// Returns every broker that the metadata names: live brokers, holders of replicas, and brokers to be drained.
fn known(state: &ViewState) -> BTreeSet<BrokerId> {
    state.brokers().keys().chain(state.drains().keys()).copied().chain(state.holders()).collect()
}

#[cfg(test)]
mod tests;
