//! Topic administration: functions over the store and the view that the broker's admin face calls.
//!
//! # Overview
//!
//! A topic is made in this order: partition keys 1, 2, … in transactions of at most 100; then, in one transaction that
//! compares the name's absence, the topic's key with partition 0's. So a topic exists whole or not at all. It is deleted the
//! other way round: the topic's key with partition 0's, then the rest. It grows by new partition keys first and then its
//! count.
//!
//! # Invariants
//!
//! - Partition 0's key and the topic's come and go in one transaction.
//! - No replica is placed on a broker that holds as many as it takes, with what this broker is placing at the same time.
//! - Nobody acts on a partition that its topic does not count. So what is half made may be written again or taken away.
//!
//! # What a crash leaves
//!
//! Partition keys that no topic counts. [`Sweep`] deletes them; a maker whose keys it takes away meanwhile is refused in
//! its last transaction, with a retryable error. A deleted topic leaves a [`Mark`], until long after the last of it is gone.

use std::{
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use super::{
    keys::{Keys, ProducerIdsValue, TopicValue, Value},
    outcome::known_outcome,
    partition_value::PartitionValue,
    placement::{Placement, ReplicaBound},
    producer_ids::{COUNTER_END, ProducerIdKey},
    store::{Compare, Entry, MetaStore, Op, Outcome, Revision, StoreError, Transaction},
    view::{Known, View, ViewState},
};
use crate::{
    model::{ConfigMap, InvalidConfig, LeaderEpoch, PartitionId, TopicConfig, TopicId, TopicName, near},
    task::clock,
};

mod change;
mod claims;
mod create;
mod marks;
mod sweep;

use self::claims::{Claim, Claims};
pub use change::{AddPartitionsError, AlterError, DeleteError};
pub use create::{CreateError, NewTopic, There};
pub use marks::Mark;
pub use sweep::Sweep;

/// Operations in one transaction of many: below `limits::MAX_TRANSACTION_OPS`, with room for what goes with them.
const CHUNK: usize = 100;

/// How often a compare-and-set is tried again when somebody else was faster.
const ATTEMPTS: usize = 10;

/// How many counters of producer ids are taken at once.
const PRODUCER_ID_BLOCK: i64 = 1000;

/// How many near names an error lists.
const NEAR_NAMES: usize = 3;

/// How many errors list near names in a period.
const HINTS: u32 = 20;
const HINTS_PERIOD: Duration = Duration::from_secs(1);

/// Topic administration. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Topics {
    store: Arc<dyn MetaStore>,
    keys: Keys,
    view: View,
    defaults: Arc<ConfigMap>,
    hints: Arc<Hints>,
    claims: Claims,
}

/// A topic as the store has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopicInfo {
    /// Its name.
    pub name: TopicName,
    /// Its value.
    pub value: TopicValue,
    /// The transaction that wrote it: wait for the view to reach it. Zero when nothing was written.
    pub revision: Revision,
}

/// No topic has this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("topic {name:?} does not exist{}", hint(near))]
pub struct UnknownTopic {
    /// What was asked for.
    pub name: String,
    /// Names that look like it, the nearest first.
    pub near: Vec<TopicName>,
}

fn hint(near: &[TopicName]) -> String {
    if near.is_empty() {
        return String::new();
    }
    let names: Vec<_> = near.iter().map(|name| format!("{:?}", name.as_str())).collect();
    format!("; did you mean {}?", names.join(" or "))
}

impl UnknownTopic {
    /// The error for a name that no topic of this view has.
    pub(super) fn of(state: &ViewState, name: &str) -> Self {
        let Self { name, .. } = Self::plain(name);
        let near = near::nearest(&name, state.topics().keys(), |known| known.as_str(), NEAR_NAMES);
        let near = near.into_iter().cloned().collect();
        Self { name, near }
    }

    /// The error without a look at the names that there are.
    fn plain(name: &str) -> Self {
        Self { name: name.chars().take(TopicName::MAX_BYTES).collect(), near: Vec::new() }
    }
}

/// How many may be hinted at near names still, in this second.
#[derive(Debug, Default)]
struct Hints(Mutex<Option<(Instant, u32)>>);

impl Hints {
    /// False when that were enough for now.
    fn take(&self) -> bool {
        let now = clock::monotonic();
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (since, given) = state.filter(|(since, _)| now.duration_since(*since) < HINTS_PERIOD).unwrap_or((now, 0));
        *state = Some((since, given + u32::from(given < HINTS)));
        given < HINTS
    }
}

impl Topics {
    /// Administration of a cluster's topics. `defaults` are the broker's `[topic_defaults]`.
    pub fn new(store: Arc<dyn MetaStore>, keys: Keys, view: View, defaults: ConfigMap) -> Self {
        Self { store, keys, view, defaults: Arc::new(defaults), hints: Arc::default(), claims: Claims::default() }
    }

    /// The topic of this name, from the view.
    pub fn find(&self, name: &TopicName) -> Result<Arc<Known<TopicValue>>, UnknownTopic> {
        self.view.state().topic(name).cloned().ok_or_else(|| self.unknown(name.as_str()))
    }

    /// The error for a name that no topic has. With near names while not many ask: a program that asks on and on reads none, and looking for
    /// them costs more than all else that it asks.
    pub fn unknown(&self, name: &str) -> UnknownTopic {
        if self.hints.take() { UnknownTopic::of(&self.view.state(), name) } else { UnknownTopic::plain(name) }
    }

    /// The key of the cluster's producer ids, which the first broker that wants it makes.
    pub async fn producer_id_key(&self) -> Result<ProducerIdKey, StoreError> {
        if let Some(key) = self.view.state().producer_id_key() {
            return Ok(key.clone());
        }
        let (path, drawn) = (self.keys.producer_id_key(), ProducerIdKey::draw());
        let transaction = Transaction::new()
            .when(Compare::unchanged(&path, None))
            .put(path.as_str(), drawn.encode())
            .else_get(path.as_str());
        match self.store.transact(transaction).await? {
            Outcome::Done { .. } => Ok(drawn),
            Outcome::Refused { mut found, .. } => {
                let entry =
                    found.pop().flatten().ok_or_else(|| StoreError::unavailable("the key of producer ids is gone"))?;
                ProducerIdKey::decode(&entry.key, &entry.value).map_err(StoreError::unavailable)
            }
        }
    }

    /// Takes the next block of counters for producer ids, at `least` or above: a store that was restored to an older state counts on from
    /// where this broker knows it to have been. An unknown outcome costs a block and no more.
    pub async fn producer_ids(&self, least: i64) -> Result<Range<i64>, StoreError> {
        let key = self.keys.producer_ids();
        let mut entry = self.store.get(&key).await?.entry;
        for _ in 0..ATTEMPTS {
            let next = match &entry {
                None => 0,
                Some(entry) => {
                    ProducerIdsValue::decode(&entry.key, &entry.value).map_err(StoreError::unavailable)?.next
                }
            };
            let next = next.max(least);
            let end = next.saturating_add(PRODUCER_ID_BLOCK);
            if end > COUNTER_END {
                return Err(StoreError::unavailable("every producer id has been given"));
            }
            let transaction = Transaction::new()
                .when(Compare::unchanged(&key, entry.as_ref()))
                .put(key.as_str(), ProducerIdsValue { next: end }.encode())
                .else_get(key.as_str());
            match self.store.transact(transaction).await? {
                Outcome::Done { .. } => return Ok(next..end),
                Outcome::Refused { mut found, .. } => entry = found.pop().flatten(),
            }
        }
        Err(StoreError::unavailable("other brokers take producer ids at the same time"))
    }

    /// The topic as the store has it now.
    async fn read(&self, name: &TopicName) -> Result<Option<(Entry, TopicValue)>, StoreError> {
        let Some(entry) = self.store.get(&self.keys.topic(name)).await?.entry else { return Ok(None) };
        let value = TopicValue::decode(&entry.key, &entry.value).map_err(StoreError::unavailable)?;
        Ok(Some((entry, value)))
    }

    /// Does many operations in transactions of at most `CHUNK`, each only under these conditions. False when one of
    /// them was refused: those before it are done. An operation that is done twice must do no harm.
    async fn in_chunks(
        &self,
        conditions: &[Compare],
        ops: impl IntoIterator<Item = Op, IntoIter: Send>,
    ) -> Result<bool, StoreError> {
        let mut ops = ops.into_iter();
        loop {
            let chunk: Vec<Op> = ops.by_ref().take(CHUNK).collect();
            if chunk.is_empty() {
                return Ok(true);
            }
            let transaction = Transaction { compares: conditions.to_vec(), ops: chunk, else_get: Vec::new() };
            if let Outcome::Refused { .. } = known_outcome(&*self.store, &transaction).await? {
                return Ok(false);
            }
        }
    }

    /// First values for new partitions, and the claim on room for them. The error is `None` when fewer brokers are alive than there are
    /// to be replicas.
    async fn first_values(
        &self,
        topic: TopicId,
        numbers: Range<u32>,
        replicas: u32,
    ) -> Result<(Vec<Op>, Claim), Option<ReplicaBound>> {
        let replicas = usize::try_from(replicas).map_err(|_| None)?;
        let keys = self.keys.clone();
        let place = move |_: &ViewState, placement: &mut Placement| {
            let puts = numbers.clone().map(|number| {
                let id = PartitionId::new(topic, number);
                let value = PartitionValue::new(placement.place(id, replicas)?, LeaderEpoch(0));
                Some(Op::Put { key: keys.partition(id), value: value.encode(), lease: None })
            });
            puts.collect()
        };
        self.claims.place(&self.view, place).await
    }
}

/// What a topic's configuration must be: valid over the broker's defaults, and possible with so many replicas.
fn checked(defaults: &ConfigMap, config: &ConfigMap, replicas: u32) -> Result<(), InvalidConfig> {
    TopicConfig::resolve(defaults, config)?.check_replicas(replicas)
}

#[cfg(test)]
mod tests;
