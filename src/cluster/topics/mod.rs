//! Topic administration: creates, alters, extends and deletes topics in the store, and looks topics up in the metadata
//! cache.
//!
//! # Overview
//!
//! A topic is created in this order: first the partition keys 1, 2, … in transactions of at most 100. Then one
//! transaction, which compares the name's absence, writes the topic's key with that of partition 0. So a topic exists
//! completely or not at all. A deletion runs in reverse: the topic's key with partition 0's, then the other keys. It
//! also writes a [`Tombstone`], which is deleted long after the last data of the topic, and never without an object
//! store. An addition of partitions writes their keys first, and then the topic's new count.
//!
//! # Invariants
//!
//! - The keys of the topic and of its partition 0 are created and deleted in one transaction.
//! - The placements of this broker together exceed no replica limit. Concurrent placements of other brokers are not
//!   counted.
//! - Brokers ignore a partition whose number is not below the count of its topic. So the keys of an incomplete creation
//!   or addition may be overwritten or deleted.
//!
//! # Crash
//!
//! A crash leaves partition keys that no topic counts. [`StaleKeySweeper`] deletes them. If the sweeper deletes keys of
//! a creation in progress, the creation's last transaction fails with a retryable error.

use std::{ops::Range, sync::Arc};

use super::{
    keys::{Keys, PRODUCER_ID_COUNTER_END, ProducerIdsValue, TopicValue, Value},
    metadata::{MetadataCache, MetadataSnapshot, Versioned},
    outcome::transact_until_known,
    partition_value::PartitionValue,
    placement::{Placement, PlacementError},
    producer_ids::ProducerIdKey,
    store::{Compare, KeyValue, MetaStore, MetaStoreError, Revision, Transaction, TxnOp, TxnOutcome},
};
use crate::model::{ConfigMap, InvalidConfig, LeaderEpoch, PartitionId, TopicConfig, TopicId, TopicName};

mod change;
mod create;
mod reservations;
mod sweep;
mod tombstones;

use self::reservations::{ReplicaReservation, ReplicaReservations};
pub use change::{AddPartitionsError, AlterError, DeleteError};
pub use create::{BrokerCounts, CreateError, TopicSpec};
pub use sweep::StaleKeySweeper;
pub use tombstones::Tombstone;

/// Maximum number of operations of one transaction, if a change needs several transactions. Below
/// `limits::MAX_TRANSACTION_OPS`, which limits operations and compares separately.
const MAX_OPS_PER_TXN: usize = 100;

/// Maximum number of attempts of a change of a topic, or of a reservation of producer ids, while other writers come
/// first.
const MAX_ATTEMPTS: usize = 10;

/// Number of producer id counters per reserved block.
const PRODUCER_ID_BLOCK: i64 = 1000;

/// Topic administration. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Topics {
    store: Arc<dyn MetaStore>,
    keys: Keys,
    metadata: MetadataCache,
    defaults: Arc<ConfigMap>,
    reservations: ReplicaReservations,
}

/// A topic as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopicInfo {
    pub name: TopicName,
    /// Stored value.
    pub value: TopicValue,
    /// Revision of the write: wait until the metadata cache reaches it. Zero if nothing was written.
    pub revision: Revision,
}

/// Error: no topic has this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("topic {name:?} does not exist")]
pub struct UnknownTopic {
    /// The requested name, shortened to the maximum length.
    pub name: String,
}

impl UnknownTopic {
    pub fn new(name: &str) -> Self {
        Self { name: name.chars().take(TopicName::MAX_BYTES).collect() }
    }
}

impl Topics {
    /// Returns the administration of a cluster's topics. `defaults` are the broker's `[topic_defaults]`.
    pub fn new(store: Arc<dyn MetaStore>, keys: Keys, metadata: MetadataCache, defaults: ConfigMap) -> Self {
        Self { store, keys, metadata, defaults: Arc::new(defaults), reservations: ReplicaReservations::default() }
    }

    /// Returns the topic with this name from the metadata cache.
    pub fn find(&self, name: &TopicName) -> Result<Arc<Versioned<TopicValue>>, UnknownTopic> {
        self.metadata.state().topic(name).cloned().ok_or_else(|| UnknownTopic::new(name.as_str()))
    }

    /// Returns the key that signs the cluster's producer ids, from the metadata cache or else from the store. If
    /// neither contains a key, stores a random one.
    pub async fn producer_id_key(&self) -> Result<ProducerIdKey, MetaStoreError> {
        if let Some(key) = self.metadata.state().producer_id_key() {
            return Ok(key.clone());
        }
        let (path, new_key) = (self.keys.producer_id_key(), ProducerIdKey::draw());
        let transaction = Transaction::new()
            .when(Compare::unchanged(&path, None))
            .put(path.as_str(), new_key.encode())
            .else_get(path.as_str());
        match self.store.transact(transaction).await? {
            TxnOutcome::Committed { .. } => Ok(new_key),
            // Another broker has created the key.
            TxnOutcome::CompareFailed { mut found, .. } => {
                let entry = found
                    .pop()
                    .flatten()
                    .ok_or_else(|| MetaStoreError::unavailable("the key that signs producer ids was deleted"))?;
                ProducerIdKey::decode(&entry.key, &entry.value).map_err(MetaStoreError::unavailable)
            }
        }
    }

    /// Reserves the next block of producer id counters, at `min_counter` or above, and returns it. After a restore of
    /// the store to an older state, counters below `min_counter` may have been issued even if the stored counter is
    /// lower. After an error with an unknown outcome, at most one block stays unused.
    pub async fn reserve_producer_ids(&self, min_counter: i64) -> Result<Range<i64>, MetaStoreError> {
        let key = self.keys.producer_ids();
        let mut entry = self.store.get(&key).await?.entry;
        for _ in 0..MAX_ATTEMPTS {
            let next = match &entry {
                None => 0,
                Some(entry) => {
                    ProducerIdsValue::decode(&entry.key, &entry.value).map_err(MetaStoreError::unavailable)?.next
                }
            };
            let next = next.max(min_counter);
            let end = next.saturating_add(PRODUCER_ID_BLOCK);
            if end > PRODUCER_ID_COUNTER_END {
                return Err(MetaStoreError::unavailable("all producer ids are used"));
            }
            let transaction = Transaction::new()
                .when(Compare::unchanged(&key, entry.as_ref()))
                .put(key.as_str(), ProducerIdsValue { next: end }.encode())
                .else_get(key.as_str());
            match self.store.transact(transaction).await? {
                TxnOutcome::Committed { .. } => return Ok(next..end),
                TxnOutcome::CompareFailed { mut found, .. } => entry = found.pop().flatten(),
            }
        }
        Err(MetaStoreError::unavailable("other brokers reserve producer ids at the same time"))
    }

    /// Reads a topic from the store, not from the metadata cache. Returns `None` if the topic does not exist.
    async fn read(&self, name: &TopicName) -> Result<Option<(KeyValue, TopicValue)>, MetaStoreError> {
        let Some(entry) = self.store.get(&self.keys.topic(name)).await?.entry else { return Ok(None) };
        let value = TopicValue::decode(&entry.key, &entry.value).map_err(MetaStoreError::unavailable)?;
        Ok(Some((entry, value)))
    }

    /// Applies operations in transactions of at most `MAX_OPS_PER_TXN`, each with the compares in `conditions`. Returns
    /// false if a compare failed; the earlier transactions are applied then. The operations must be idempotent, because
    /// a transaction with an unknown outcome is repeated.
    async fn transact_in_chunks(
        &self,
        conditions: &[Compare],
        ops: impl IntoIterator<Item = TxnOp, IntoIter: Send>,
    ) -> Result<bool, MetaStoreError> {
        let mut ops = ops.into_iter();
        loop {
            let chunk: Vec<TxnOp> = ops.by_ref().take(MAX_OPS_PER_TXN).collect();
            if chunk.is_empty() {
                return Ok(true);
            }
            let transaction = Transaction { compares: conditions.to_vec(), ops: chunk, else_get: Vec::new() };
            if let TxnOutcome::CompareFailed { .. } = transact_until_known(&*self.store, &transaction).await? {
                return Ok(false);
            }
        }
    }

    /// Chooses the brokers of new partitions, within the replica limits. Returns the operations that write the first
    /// values of these partitions, and a reservation of their replicas. Writes nothing.
    async fn place_partitions(
        &self,
        topic: TopicId,
        numbers: Range<u32>,
        replicas: u32,
    ) -> Result<(Vec<TxnOp>, ReplicaReservation), PlacementError> {
        let replicas = usize::try_from(replicas).map_err(|_| PlacementError::TooFewBrokers)?;
        let keys = self.keys.clone();
        let place_partitions = move |_: &MetadataSnapshot, placement: &mut Placement| {
            let puts = numbers.clone().map(|number| {
                let id = PartitionId::new(topic, number);
                let value = PartitionValue::new(placement.place(id, replicas)?, LeaderEpoch(0));
                Some(TxnOp::Put { key: keys.partition(id), value: value.encode(), lease: None })
            });
            puts.collect()
        };
        self.reservations.reserve(&self.metadata, place_partitions).await
    }
}

/// Checks that a topic's configuration is valid together with the broker's defaults, and that the min ISR is at most
/// this number of replicas.
fn check_config(defaults: &ConfigMap, config: &ConfigMap, replicas: u32) -> Result<(), InvalidConfig> {
    TopicConfig::resolve(defaults, config)?.check_replicas(replicas)
}

#[cfg(test)]
mod tests;
