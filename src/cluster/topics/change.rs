//! Changes of a topic: configuration, replication factor, partition count and deletion. Each takes effect by a
//! compare-and-set of the topic's key.

use super::{BrokerCounts, MAX_ATTEMPTS, TopicInfo, Topics, UnknownTopic, check_config};
use crate::{
    cluster::{
        keys::{TombstoneValue, TopicValue, Value as _},
        metadata::MetadataSnapshot,
        outcome::transact_until_known,
        placement::{Placement, PlacementError, ReplicaLimitExceeded},
        store::{Compare, MetaStoreError, Transaction, TxnOp, TxnOutcome},
    },
    limits,
    model::{BrokerId, ConfigMap, InvalidConfig, PartitionId, TopicConfig, TopicId, TopicName},
};

/// Error of a topic change.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AlterError {
    #[error(transparent)]
    Unknown(#[from] UnknownTopic),
    /// A configuration key or value is not allowed.
    #[error(transparent)]
    Config(#[from] InvalidConfig),
    /// A key is both set and unset.
    #[error("topic configuration {key:?} is both set and unset: choose one")]
    SetAndUnset { key: String },
    /// The replication factor is 0 or exceeds `limits::MAX_REPLICAS`.
    #[error("a topic cannot have a replication factor of {requested}: use 1 to {}", limits::MAX_REPLICAS)]
    Replicas {
        /// Requested replication factor.
        requested: u32,
    },
    /// The replication factor exceeds the number of brokers that accept replicas.
    #[error(
        "a replication factor of {requested} needs as many brokers, and {counts}: request a lower one, or start more"
    )]
    Brokers {
        /// Requested replication factor.
        requested: u32,
        /// Numbers of brokers, by availability for new replicas.
        counts: BrokerCounts,
    },
    /// A broker would exceed its replica limit.
    #[error(transparent)]
    ReplicaLimit(#[from] ReplicaLimitExceeded),
    /// Other writers changed the topic in each of `MAX_ATTEMPTS` attempts.
    #[error("other requests changed topic {:?} during each attempt of this one: try again", name.as_str())]
    Conflict { name: TopicName },
    #[error(transparent)]
    Store(#[from] MetaStoreError),
}

/// Error of an addition of partitions.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddPartitionsError {
    #[error(transparent)]
    Unknown(#[from] UnknownTopic),
    /// The topic already has at least the requested number of partitions.
    #[error(
        "topic {:?} has {} and cannot have {requested}: partitions can only be added", name.as_str(),
        format_partition_count(*.current)
    )]
    NotAnIncrease {
        name: TopicName,
        /// Current number of partitions.
        current: u32,
        /// Requested number of partitions.
        requested: u32,
    },
    /// The requested number of partitions exceeds `limits::MAX_PARTITIONS`.
    #[error("a topic cannot have {requested} partitions: use 1 to {}", limits::MAX_PARTITIONS)]
    TooMany {
        /// Requested number of partitions.
        requested: u32,
    },
    /// The replication factor exceeds the number of brokers that accept replicas.
    #[error("the topic's replication factor of {requested} needs as many brokers, and {counts}: start more")]
    Brokers {
        /// Replication factor of the topic.
        requested: u32,
        /// Numbers of brokers, by availability for new replicas.
        counts: BrokerCounts,
    },
    /// A broker would exceed its replica limit.
    #[error(transparent)]
    ReplicaLimit(#[from] ReplicaLimitExceeded),
    /// In each of `MAX_ATTEMPTS` attempts, another writer changed the topic, or a sweep deleted some of the new keys.
    #[error("other requests changed topic {:?} during each attempt of this one: try again", name.as_str())]
    Conflict { name: TopicName },
    #[error(transparent)]
    Store(#[from] MetaStoreError),
}

/// Error of a topic deletion.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeleteError {
    #[error(transparent)]
    Unknown(#[from] UnknownTopic),
    /// Other writers changed the topic in each of `MAX_ATTEMPTS` attempts.
    #[error("other requests changed topic {:?} during each attempt of this one: try again", name.as_str())]
    Conflict { name: TopicName },
    #[error(transparent)]
    Store(#[from] MetaStoreError),
}

/// Formats a number of partitions with its noun: `1 partition`.
fn format_partition_count(count: u32) -> String {
    if count == 1 { "1 partition".to_owned() } else { format!("{count} partitions") }
}

/// Implements `retryable` for error enums with the variants `Conflict` and `Store`. The braces contain the other
/// variants that are retryable.
macro_rules! retryable {
    ($($error:ident { $($variant:pat),* }),*) => {$(
        impl $error {
            /// Returns true if the same request may succeed later.
            pub const fn retryable(&self) -> bool {
                match self {
                    Self::Conflict { .. } => true,
                    $($variant => true,)*
                    Self::Store(error) => error.retryable(),
                    _ => false,
                }
            }
        }
    )*};
}
retryable!(AlterError { Self::Brokers { .. } }, AddPartitionsError { Self::Brokers { .. } }, DeleteError {});

impl Topics {
    /// Sets the configuration keys in `set`, and resets the keys in `unset` to their defaults; all other keys stay.
    /// With a `replication_factor`, this also stores the new factor, and the controller adds or removes replicas
    /// afterwards. Fails, and writes nothing, unless the resulting configuration is valid for the resulting factor.
    pub async fn alter(
        &self,
        name: &TopicName,
        set: ConfigMap,
        unset: Vec<String>,
        replication_factor: Option<u32>,
    ) -> Result<TopicInfo, AlterError> {
        if let Some(key) = unset.iter().find(|key| set.contains_key(*key)) {
            return Err(AlterError::SetAndUnset { key: key.clone() });
        }
        // `effective_values` contains every valid key, also keys that the topic does not set.
        if let Some(key) =
            unset.iter().find(|key| !TopicConfig::effective_values(&ConfigMap::new(), &set).contains_key(*key))
        {
            return Err(InvalidConfig::UnknownKey { key: key.chars().take(100).collect() }.into());
        }
        for _ in 0..MAX_ATTEMPTS {
            let Some((entry, mut value)) = self.read(name).await? else {
                return Err(UnknownTopic::new(name.as_str()).into());
            };
            value.config.extend(TopicConfig::normalize(set.clone()));
            value.config.retain(|key, _| !unset.contains(key));
            if let Some(requested) = replication_factor {
                self.check_replication_factor(requested, &value).await?;
                value.replication_factor = requested;
            }
            check_config(&self.defaults, &value.config, value.replication_factor)?;
            let transaction = Transaction::new()
                .when(Compare::ModRevision(entry.key.clone(), entry.mod_revision))
                .put(entry.key, value.encode());
            // The compare also fails if this write was applied and its response was lost. The next iteration then
            // writes the same value again.
            if let TxnOutcome::Committed { revision } = transact_until_known(&*self.store, &transaction).await? {
                return Ok(TopicInfo { name: name.clone(), value, revision });
            }
        }
        Err(AlterError::Conflict { name: name.clone() })
    }

    /// Checks that a topic may get a replication factor:
    /// - The factor is within the limits.
    /// - If it grows, as many brokers accept replicas, and the added replicas exceed no broker's replica limit.
    async fn check_replication_factor(&self, requested: u32, topic: &TopicValue) -> Result<(), AlterError> {
        if requested == 0 || requested > limits::MAX_REPLICAS {
            return Err(AlterError::Replicas { requested });
        }
        if requested <= topic.replication_factor {
            return Ok(());
        }
        let counts = BrokerCounts::of(&self.metadata.state());
        let factor = usize::try_from(requested).unwrap_or(usize::MAX);
        if factor > counts.eligible_brokers() {
            return Err(AlterError::Brokers { requested, counts });
        }
        let topic = topic.clone();
        let add_replicas = move |state: &MetadataSnapshot, placement: &mut Placement| {
            place_added_replicas(state, placement, &topic, factor)
        };
        // The reservation is dropped, because the controller places the replicas later and applies the limits again. If
        // there are too few brokers for a partition, the controller adds as many replicas as possible.
        match self.reservations.reserve(&self.metadata, add_replicas).await {
            Ok(_) | Err(PlacementError::TooFewBrokers) => Ok(()),
            Err(PlacementError::LimitExceeded(bound)) => Err(bound.into()),
        }
    }

    /// Extends a topic to `requested` partitions: writes the keys of the new partitions, then the topic's new count.
    pub async fn add_partitions(&self, name: &TopicName, requested: u32) -> Result<TopicInfo, AddPartitionsError> {
        if requested > limits::MAX_PARTITIONS {
            return Err(AddPartitionsError::TooMany { requested });
        }
        // Topic value of the last attempt, which had a failed compare. The value may be stored nevertheless, by a
        // transaction whose response was lost.
        let mut attempted = None;
        for _ in 0..MAX_ATTEMPTS {
            let Some((entry, value)) = self.read(name).await? else {
                return Err(UnknownTopic::new(name.as_str()).into());
            };
            if attempted.as_ref() == Some(&value) {
                return Ok(TopicInfo { name: name.clone(), value, revision: entry.mod_revision });
            }
            if requested <= value.partitions {
                let current = value.partitions;
                return Err(AddPartitionsError::NotAnIncrease { name: name.clone(), current, requested });
            }
            let placed = self.place_partitions(value.id, value.partitions..requested, value.replication_factor).await;
            let (puts, reservation) = placed.map_err(|error| match error {
                PlacementError::LimitExceeded(bound) => bound.into(),
                PlacementError::TooFewBrokers => {
                    let counts = BrokerCounts::of(&self.metadata.state());
                    AddPartitionsError::Brokers { requested: value.replication_factor, counts }
                }
            })?;
            // While the topic is unchanged, no broker uses the keys of these partitions. So keys from an interrupted
            // addition may be overwritten.
            let unchanged = Compare::ModRevision(entry.key.clone(), entry.mod_revision);
            if !self.transact_in_chunks(std::slice::from_ref(&unchanged), puts).await? {
                continue;
            }
            let first = self.keys.partition(PartitionId::new(value.id, value.partitions));
            // A sweep deletes the lowest stale key first, which is `first`. If that key is missing, a sweep has deleted
            // keys of this attempt.
            let value = TopicValue { partitions: requested, ..value };
            let transaction =
                Transaction::new().when(unchanged).when(Compare::Exists(first)).put(entry.key, value.encode());
            if let TxnOutcome::Committed { revision } = transact_until_known(&*self.store, &transaction).await? {
                reservation.mark_written(revision);
                return Ok(TopicInfo { name: name.clone(), value, revision });
            }
            attempted = Some(value);
        }
        Err(AddPartitionsError::Conflict { name: name.clone() })
    }

    /// Deletes a topic and returns its id. One transaction deletes the keys of the topic and of its partition 0, which
    /// frees the name, and writes the tombstone. The other partition and tier keys are deleted afterwards; if that
    /// fails, a sweep deletes them.
    pub async fn delete(&self, name: &TopicName) -> Result<TopicId, DeleteError> {
        // Topic of the last attempt, which had a failed compare. The topic may be deleted nevertheless, by a
        // transaction whose response was lost.
        let mut attempted: Option<TopicValue> = None;
        for _ in 0..MAX_ATTEMPTS {
            let stored = self.read(name).await?;
            let is_deleted = |topic: &TopicValue| stored.as_ref().is_none_or(|(_, stored)| stored.id != topic.id);
            if let Some(value) = attempted.take_if(|topic| is_deleted(topic)) {
                self.delete_rest(name, &value).await;
                return Ok(value.id);
            }
            let Some((entry, value)) = stored else {
                return Err(UnknownTopic::new(name.as_str()).into());
            };
            let transaction = Transaction::new()
                .when(Compare::ModRevision(entry.key.clone(), entry.mod_revision))
                .delete(entry.key)
                .delete(self.keys.partition(PartitionId::new(value.id, 0)))
                .put(
                    self.keys.tombstone(value.id),
                    TombstoneValue { name: name.clone(), purged_since_ms: None }.encode(),
                );
            if let TxnOutcome::Committed { .. } = transact_until_known(&*self.store, &transaction).await? {
                self.delete_rest(name, &value).await;
                return Ok(value.id);
            }
            attempted = Some(value);
        }
        Err(DeleteError::Conflict { name: name.clone() })
    }

    /// Returns true if a topic was deleted on purpose and its tombstone still exists. Reads the store and not the
    /// metadata cache.
    pub async fn was_deleted(&self, id: TopicId) -> Result<bool, MetaStoreError> {
        Ok(self.store.get(&self.keys.tombstone(id)).await?.entry.is_some())
    }

    /// Deletes the remaining partition and tier keys of a deleted topic. An error is only logged, because a sweep
    /// deletes keys that remain.
    async fn delete_rest(&self, name: &TopicName, value: &TopicValue) {
        let ids = (0..value.partitions).map(|number| PartitionId::new(value.id, number));
        let ops = ids.flat_map(|id| [self.keys.partition(id), self.keys.tier(id)]).map(|key| TxnOp::Delete { key });
        if let Err(error) = self.transact_in_chunks(&[], ops).await {
            tracing::info!(
                topic = %name, id = %value.id, %error,
                "keys of a deleted topic remain until the next sweep"
            );
        }
    }
}

/// Adds to the placement the replicas that the partitions of a topic need for a replication factor, chosen as the
/// controller chooses added replicas. Returns `None` if there are too few brokers for a partition.
fn place_added_replicas(
    state: &MetadataSnapshot,
    placement: &mut Placement,
    topic: &TopicValue,
    factor: usize,
) -> Option<()> {
    for (number, entry) in state.partitions_of(topic) {
        let Some(partition) = &entry.partition else { continue };
        let stays = |id: &BrokerId| !partition.value.removing.contains(id);
        let staying: Vec<BrokerId> = partition.value.replicas.iter().copied().filter(stays).collect();
        let staying_count = staying.len();
        let chosen = placement.choose(PartitionId::new(topic.id, number), staying, factor)?;
        placement.add_replica_to_each(&chosen[staying_count..]);
    }
    Some(())
}
