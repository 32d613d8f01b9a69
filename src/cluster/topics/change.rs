//! Changes of a topic: configuration, partition count and deletion. Each is a compare-and-set of the topic's key.

use super::{BrokerCounts, MAX_ATTEMPTS, TopicInfo, Topics, UnknownTopic, check_config};
use crate::{
    cluster::{
        keys::{TombstoneValue, TopicValue, Value as _},
        metadata::MetadataSnapshot,
        outcome::known_outcome,
        placement::{Placement, ReplicaBound},
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
    Both { key: String },
    /// The replication factor exceeds the limit of any cluster.
    #[error("a topic cannot have a replication factor of {requested}: 1 to {}", limits::MAX_REPLICAS)]
    Replicas {
        /// Requested replication factor.
        requested: u32,
    },
    /// Fewer brokers than replicas.
    #[error(
        "a replication factor of {requested} needs as many brokers, and {counts}: request a lower one, or start more"
    )]
    Brokers {
        /// Requested replication factor.
        requested: u32,
        /// Available brokers.
        counts: BrokerCounts,
    },
    /// A broker would exceed its replica limit.
    #[error(transparent)]
    Bound(#[from] ReplicaBound),
    /// Other writers kept changing the topic.
    #[error("other writers keep changing topic {:?}: try again", name.as_str())]
    Conflict { name: TopicName },
    #[error(transparent)]
    Store(#[from] MetaStoreError),
}

/// Error of an addition of partitions.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddPartitionsError {
    #[error(transparent)]
    Unknown(#[from] UnknownTopic),
    /// The topic already has as many partitions or more.
    #[error("topic {:?} has {} and cannot have {to}: partitions can only be added", name.as_str(), partitions(*.has))]
    NotMore {
        name: TopicName,
        /// Current number of partitions.
        has: u32,
        /// Requested number of partitions.
        to: u32,
    },
    /// The requested number exceeds the limit of any topic.
    #[error("a topic cannot have {to} partitions: 1 to {}", limits::MAX_PARTITIONS)]
    TooMany {
        /// Requested number of partitions.
        to: u32,
    },
    /// Fewer brokers than replicas.
    #[error("the topic's replication factor of {requested} needs as many brokers, and {counts}: start more")]
    Brokers {
        /// Replication factor of the topic.
        requested: u32,
        /// Available brokers.
        counts: BrokerCounts,
    },
    /// A broker would exceed its replica limit.
    #[error(transparent)]
    Bound(#[from] ReplicaBound),
    /// Other writers kept changing the topic.
    #[error("other writers keep changing topic {:?}: try again", name.as_str())]
    Conflict { name: TopicName },
    #[error(transparent)]
    Store(#[from] MetaStoreError),
}

/// Error of a topic deletion.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeleteError {
    #[error(transparent)]
    Unknown(#[from] UnknownTopic),
    /// Other writers kept changing the topic.
    #[error("other writers keep changing topic {:?}: try again", name.as_str())]
    Conflict { name: TopicName },
    #[error(transparent)]
    Store(#[from] MetaStoreError),
}

fn partitions(count: u32) -> String {
    if count == 1 { "1 partition".to_owned() } else { format!("{count} partitions") }
}

macro_rules! retryable {
    ($($kind:ident { $($also:pat),* }),*) => {$(
        impl $kind {
            /// Returns true if the same request may succeed later.
            pub const fn retryable(&self) -> bool {
                match self {
                    Self::Conflict { .. } => true,
                    $($also => true,)*
                    Self::Store(error) => error.retryable(),
                    _ => false,
                }
            }
        }
    )*};
}
retryable!(AlterError { Self::Brokers { .. } }, AddPartitionsError { Self::Brokers { .. } }, DeleteError {});

impl Topics {
    /// Sets some configuration keys of a topic and resets others to their defaults; the other keys stay. With a
    /// `replication_factor`, the controller adds or removes replicas afterwards.
    pub async fn alter(
        &self,
        name: &TopicName,
        set: ConfigMap,
        unset: Vec<String>,
        replication_factor: Option<u32>,
    ) -> Result<TopicInfo, AlterError> {
        if let Some(key) = unset.iter().find(|key| set.contains_key(*key)) {
            return Err(AlterError::Both { key: key.clone() });
        }
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
                self.check_capacity(requested, &value).await?;
                value.replication_factor = requested;
            }
            check_config(&self.defaults, &value.config, value.replication_factor)?;
            let transaction = Transaction::new()
                .when(Compare::ModRevision(entry.key.clone(), entry.mod_revision))
                .put(entry.key, value.encode());
            // If an earlier attempt was applied without a response, the next iteration writes the same value again.
            if let TxnOutcome::Committed { revision } = known_outcome(&*self.store, &transaction).await? {
                return Ok(TopicInfo { name: name.clone(), value, revision });
            }
        }
        Err(AlterError::Conflict { name: name.clone() })
    }

    /// Checks that the brokers have capacity for a replication factor. One that does not grow needs no capacity.
    async fn check_capacity(&self, requested: u32, topic: &TopicValue) -> Result<(), AlterError> {
        if requested == 0 || requested > limits::MAX_REPLICAS {
            return Err(AlterError::Replicas { requested });
        }
        if requested <= topic.replication_factor {
            return Ok(());
        }
        let (counts, replicas) =
            (BrokerCounts::of(&self.metadata.state()), usize::try_from(requested).unwrap_or(usize::MAX));
        if replicas > counts.eligible_brokers() {
            return Err(AlterError::Brokers { requested, counts });
        }
        let topic = topic.clone();
        let place = move |state: &MetadataSnapshot, placement: &mut Placement| {
            for (number, entry) in state.partitions_of(&topic) {
                let Some(partition) = &entry.partition else { continue };
                let stays = |id: &BrokerId| !partition.value.removing.contains(id);
                let stay: Vec<BrokerId> = partition.value.replicas.iter().copied().filter(stays).collect();
                let kept = stay.len();
                let chosen = placement.choose(PartitionId::new(topic.id, number), stay, replicas)?;
                placement.add_load(&chosen[kept..]);
            }
            Some(())
        };
        // The controller places the replicas and applies the limits again. With too few brokers it places as many as
        // possible.
        match self.reservations.place(&self.metadata, place).await {
            Err(Some(bound)) => Err(bound.into()),
            Ok(_) | Err(None) => Ok(()),
        }
    }

    /// Extends a topic to this number of partitions.
    pub async fn add_partitions(&self, name: &TopicName, to: u32) -> Result<TopicInfo, AddPartitionsError> {
        if to > limits::MAX_PARTITIONS {
            return Err(AddPartitionsError::TooMany { to });
        }
        let mut tried = None;
        for _ in 0..MAX_ATTEMPTS {
            let Some((entry, value)) = self.read(name).await? else {
                return Err(UnknownTopic::new(name.as_str()).into());
            };
            if tried.as_ref() == Some(&value) {
                return Ok(TopicInfo { name: name.clone(), value, revision: entry.mod_revision });
            }
            if to <= value.partitions {
                return Err(AddPartitionsError::NotMore { name: name.clone(), has: value.partitions, to });
            }
            let placed = self.place_partitions(value.id, value.partitions..to, value.replication_factor).await;
            let (puts, reservation) = placed.map_err(|bound| match bound {
                Some(bound) => bound.into(),
                None => {
                    let counts = BrokerCounts::of(&self.metadata.state());
                    AddPartitionsError::Brokers { requested: value.replication_factor, counts }
                }
            })?;
            // While the topic is unchanged, these partitions do not count, so existing keys may be overwritten.
            let same = Compare::ModRevision(entry.key.clone(), entry.mod_revision);
            if !self.transact_in_chunks(std::slice::from_ref(&same), puts).await? {
                continue;
            }
            let first = self.keys.partition(PartitionId::new(value.id, value.partitions));
            let value = TopicValue { partitions: to, ..value };
            let transaction = Transaction::new().when(same).when(Compare::Exists(first)).put(entry.key, value.encode());
            if let TxnOutcome::Committed { revision } = known_outcome(&*self.store, &transaction).await? {
                reservation.mark_written(revision);
                return Ok(TopicInfo { name: name.clone(), value, revision });
            }
            tried = Some(value);
        }
        Err(AddPartitionsError::Conflict { name: name.clone() })
    }

    /// Deletes a topic. Returns when the name is free; the remaining partition keys are deleted afterwards, here or by
    /// a sweep.
    pub async fn delete(&self, name: &TopicName) -> Result<TopicId, DeleteError> {
        let mut tried: Option<TopicValue> = None;
        for _ in 0..MAX_ATTEMPTS {
            let stored = self.read(name).await?;
            if let Some(value) = tried.take_if(|tried| stored.as_ref().is_none_or(|(_, stored)| stored.id != tried.id))
            {
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
            if let TxnOutcome::Committed { .. } = known_outcome(&*self.store, &transaction).await? {
                self.delete_rest(name, &value).await;
                return Ok(value.id);
            }
            tried = Some(value);
        }
        Err(DeleteError::Conflict { name: name.clone() })
    }

    /// Returns true if a topic was deleted on purpose. Reads the store and not the metadata cache.
    pub async fn was_deleted(&self, id: TopicId) -> Result<bool, MetaStoreError> {
        Ok(self.store.get(&self.keys.tombstone(id)).await?.entry.is_some())
    }

    /// Deletes the partition keys of a deleted topic. The sweep deletes the keys that remain after an error.
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
