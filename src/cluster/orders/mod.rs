//! An operator's orders: who is to be emptied, where replicas are to be, who is to lead.
//!
//! # Overview
//!
//! An order only writes what is wanted where all brokers see it: `drain` a key of its own, `reassign` and `elect` the values of
//! partitions. The controller carries it out, step by step; whoever is asked how far it is looks at the same values.
//!
//! # Invariants
//!
//! - Every change is a compare-and-set of the value that it was decided on. Where another one was faster, it is decided anew.
//! - An order is checked whole before anything of it is written. What it writes to several partitions is not one transaction:
//!   who is told of a failure is told how many were changed, and may give the same order again.
//! - New values come from [`PartitionValue`] alone: an order cannot make a set that the protocol does not allow.
//!
//! # What a crash leaves
//!
//! An order of which the first partitions are changed. Each by itself is right.

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

/// How often a compare-and-set is tried again when somebody else was faster.
const ATTEMPTS: usize = 10;

/// Partitions of one order that are decided on before other tasks have their turn.
const DECISIONS_TOGETHER: usize = 256;

/// How long the mirror may take to show what was written.
const CATCH_UP: Duration = Duration::from_secs(5);

/// An operator's orders. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Orders {
    store: Arc<dyn MetaStore>,
    keys: Keys,
    view: View,
    defaults: Arc<ConfigMap>,
    changes: PartitionChanges,
}

/// A partition as it is after an order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ordered {
    /// Which.
    pub id: PartitionId,
    /// Its value.
    pub value: PartitionValue,
    /// The transaction that wrote it.
    pub revision: Revision,
    /// Whether the order changed it.
    pub changed: bool,
}

/// The cluster has no such broker.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the cluster has no {}: it has {}", Brokers(ids), List(known))]
pub struct UnknownBrokers {
    /// Those that are unknown.
    pub ids: Vec<BrokerId>,
    /// Those that it has.
    pub known: Vec<BrokerId>,
}

/// The topic has no partition of this number.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("topic {:?} has no partition {number}: it has {count}, numbered from 0", topic.as_str())]
pub struct UnknownPartition {
    /// The topic.
    pub topic: TopicName,
    /// What was asked for.
    pub number: u32,
    /// How many it has.
    pub count: u32,
}

/// What an order names is not there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FindError {
    /// No such topic.
    #[error(transparent)]
    Topic(#[from] UnknownTopic),
    /// No such partition.
    #[error(transparent)]
    Partition(#[from] UnknownPartition),
}

/// Why values could not be written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// A value that cannot be read, or that is not there yet, or not any more.
    #[error(
        "the metadata of partition {partition} is not there or cannot be used: `strandline cluster describe` tells"
    )]
    Unreadable {
        /// The partition, as `topic/number`.
        partition: String,
    },
    /// Others kept changing it.
    #[error("partition {partition} is being changed by others at the same time: try again{}", so_far(*.done))]
    Conflict {
        /// The partition, as `topic/number`.
        partition: String,
        /// Partitions that were changed before.
        done: usize,
    },
    /// The metadata store failed.
    #[error("{source}{}", so_far(*.done))]
    Store {
        /// What it said.
        source: StoreError,
        /// Partitions that were changed before.
        done: usize,
    },
}

impl WriteError {
    /// Whether the same order may succeed later.
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

/// Brokers in a sentence: `1, 2 and 3`.
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

/// `broker 1`, or `brokers 1 and 2`.
struct Brokers<'a>(&'a [BrokerId]);

impl fmt::Display for Brokers<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "broker{} {}", if self.0.len() == 1 { "" } else { "s" }, List(self.0))
    }
}

/// A topic that an order names.
#[derive(Clone, Debug)]
struct Chosen {
    name: TopicName,
    known: Arc<Known<TopicValue>>,
}

/// A partition whose value is being replaced.
struct Editing {
    id: PartitionId,
    /// What was decided on.
    value: PartitionValue,
    revision: Revision,
    /// Whether an earlier try may have been made.
    tried: bool,
}

impl Orders {
    /// Orders to a cluster. `defaults` are what topics have that set nothing else.
    pub fn new(store: Arc<dyn MetaStore>, keys: Keys, view: View, defaults: ConfigMap) -> Self {
        let changes = PartitionChanges::new(Arc::clone(&store), keys.clone());
        Self { store, keys, view, defaults: Arc::new(defaults), changes }
    }

    /// Waits until this broker's mirror has what was written, for a while: it is written.
    pub async fn seen(&self, ordered: &[Ordered]) {
        if let Some(newest) = ordered.iter().map(|one| one.revision).max() {
            self.reached(newest).await;
        }
    }

    async fn reached(&self, revision: Revision) {
        let _late = tokio::time::timeout(CATCH_UP, self.view.reached(revision)).await;
    }

    /// The cluster in numbers.
    pub fn census(&self) -> Census {
        Census::of(&self.view.state(), &self.defaults)
    }

    /// Paths whose values cannot be used, and why.
    pub fn unreadable(&self) -> Vec<(String, String)> {
        let state = self.view.state();
        state.unreadable().iter().map(|(key, why)| (self.keys.path(key), why.clone())).collect()
    }

    /// Partitions of a topic: one, or all.
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

    /// The name of a partition as people write it.
    fn spoken(&self, id: PartitionId) -> String {
        match self.view.state().name(id.topic) {
            Some(name) => format!("{name}/{}", id.number),
            None => id.to_string(),
        }
    }

    /// How many in-sync replicas a commit needs, as the controller reckons: all of them where the topic's configuration cannot be read.
    fn min_insync(&self, topic: TopicId) -> usize {
        let state = self.view.state();
        let known = state.name(topic).and_then(|name| state.topic(name));
        let config = known.and_then(|known| TopicConfig::resolve(&self.defaults, &known.value.config).ok());
        config.map_or(usize::MAX, |config| config.min_insync_replicas)
    }

    /// Replaces values of partitions by what `decide` makes of them; `None` says that one is as it should be. Nothing is written
    /// when one of them is refused at first sight.
    async fn edit<E: From<WriteError>>(
        &self,
        ids: &[PartitionId],
        decide: impl Fn(PartitionId, &PartitionValue, Revision) -> Result<Option<PartitionValue>, E>,
    ) -> Result<Vec<Ordered>, E> {
        self.edit_while(ids, |_| Vec::new(), decide).await
    }

    /// As [`Orders::edit`], where something else must hold as well when a value takes the place of another one.
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

    /// What the mirror knows of partitions.
    fn look(&self, ids: &[PartitionId]) -> Result<Vec<Editing>, WriteError> {
        let state = self.view.state();
        let found = ids.iter().map(|id| {
            let known = state.partition(*id).and_then(|entry| entry.partition.as_ref());
            let known = known.ok_or_else(|| WriteError::Unreadable { partition: self.spoken(*id) })?;
            Ok(Editing { id: *id, value: known.value.clone(), revision: known.mod_revision, tried: false })
        });
        found.collect()
    }

    /// Makes changes. What was refused, or is not known to have been made, comes back as it stands in the store.
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
                // Only with a condition that all of them share, and there is none.
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

/// How many were changed.
fn changed(done: &[Ordered]) -> usize {
    done.iter().filter(|one| one.changed).count()
}

impl Chosen {
    /// Its partitions: one, or all.
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

/// Every broker that the metadata names: those that are alive, that hold replicas, or that are to be drained.
fn known(state: &ViewState) -> BTreeSet<BrokerId> {
    state.brokers().keys().chain(state.drains().keys()).copied().chain(state.holders()).collect()
}

#[cfg(test)]
mod tests;
