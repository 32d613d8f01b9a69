//! Creation of topics.

use std::fmt;

use super::{MAX_OPS_PER_TXN, TopicInfo, Topics, check_config};
use crate::{
    cluster::{
        keys::{TopicValue, Value as _},
        metadata::MetadataSnapshot,
        outcome::transact_until_known,
        placement::{PlacementError, ReplicaLimitExceeded, is_leaving, is_unreachable},
        store::{Compare, MetaStoreError, Revision, Transaction, TxnOp, TxnOutcome},
    },
    limits,
    model::{ConfigMap, InvalidConfig, TopicConfig, TopicId, TopicName},
    task::random,
};

/// Specification of a new topic.
#[derive(Clone, Debug)]
pub struct TopicSpec {
    pub name: TopicName,
    /// Number of partitions, at least 1.
    pub partitions: u32,
    /// Number of replicas per partition: from 1 to the number of brokers that accept replicas, and at most
    /// `limits::MAX_REPLICAS`.
    pub replication_factor: u32,
    /// Configuration keys that the topic sets; the others have their defaults.
    pub config: ConfigMap,
    /// If true, checks everything and creates nothing.
    pub validate_only: bool,
}

/// Error of a topic creation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CreateError {
    #[error("topic {:?} exists already", name.as_str())]
    Exists { name: TopicName },
    /// The number of partitions is 0 or exceeds `limits::MAX_PARTITIONS`.
    #[error("a topic cannot have {requested} partitions: use 1 to {}", limits::MAX_PARTITIONS)]
    Partitions {
        /// Requested number of partitions.
        requested: u32,
    },
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
    /// The cluster has the maximum number of topics.
    #[error("the cluster has {} topics, which is the maximum: delete some", limits::MAX_TOPICS)]
    TooManyTopics,
    /// A configuration key or value is not allowed.
    #[error(transparent)]
    Config(#[from] InvalidConfig),
    /// A sweep of stale keys deleted some of the new keys during the creation, or the new topic was deleted before its
    /// creation was confirmed.
    #[error("topic {:?} could not be created because of a concurrent change: try again", name.as_str())]
    Conflict { name: TopicName },
    #[error(transparent)]
    Store(#[from] MetaStoreError),
}

/// Numbers of brokers, by availability for new replicas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BrokerCounts {
    /// Number of live brokers.
    pub live: usize,
    /// Number of live brokers that are stopping or drained, which get no replicas.
    pub leaving: usize,
    /// Number of the other live brokers under disk pressure, which get no replicas either.
    pub full: usize,
    /// Number of the remaining live brokers without a registered address for other brokers, which get no replicas
    /// either.
    pub unreachable: usize,
}

impl BrokerCounts {
    /// Counts the brokers of a metadata snapshot.
    pub fn of(state: &MetadataSnapshot) -> Self {
        let mut counts = Self { live: 0, leaving: 0, full: 0, unreachable: 0 };
        for (id, broker) in state.brokers() {
            let leaving = is_leaving(state, *id, &broker.value);
            counts.live += 1;
            counts.leaving += usize::from(leaving);
            let full = !leaving && broker.value.disk_pressure;
            counts.full += usize::from(full);
            counts.unreachable += usize::from(!leaving && !full && is_unreachable(state, &broker.value));
        }
        counts
    }

    /// Returns the number of brokers that accept replicas.
    pub const fn eligible_brokers(self) -> usize {
        self.live - self.leaving - self.full - self.unreachable
    }
}

impl fmt::Display for BrokerCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count_with_verb = |count: usize| if count == 1 { "1 is".to_owned() } else { format!("{count} are") };
        write!(f, "{} online", count_with_verb(self.live))?;
        let mut unavailable = Vec::new();
        if self.leaving > 0 {
            unavailable.push(format!("{} stopping or drained", count_with_verb(self.leaving)));
        }
        if self.full > 0 {
            unavailable
                .push(format!("{} under disk pressure (broker.disk_pressure_percent)", count_with_verb(self.full)));
        }
        if self.unreachable > 0 {
            unavailable
                .push(format!("{} registered without an address for other brokers", count_with_verb(self.unreachable)));
        }
        if unavailable.is_empty() { Ok(()) } else { write!(f, ", of which {}", unavailable.join(" and ")) }
    }
}

impl CreateError {
    /// Returns true if the same request may succeed later.
    pub const fn retryable(&self) -> bool {
        match self {
            Self::Conflict { .. } | Self::Brokers { .. } => true,
            Self::Store(error) => error.retryable(),
            _ => false,
        }
    }
}

impl Topics {
    /// Creates a topic, or only checks the specification with `validate_only`. Returns when the topic exists in the
    /// store; the metadata caches follow.
    pub async fn create(&self, new: TopicSpec) -> Result<TopicInfo, CreateError> {
        self.check_spec(&new)?;
        if self.read(&new.name).await?.is_some() {
            return Err(CreateError::Exists { name: new.name });
        }
        let TopicSpec { name, partitions, replication_factor, config, validate_only } = new;
        let id = TopicId::new(random::uuid());
        let value = TopicValue { id, partitions, replication_factor, config: TopicConfig::normalize(config) };
        let placed = self.place_partitions(id, 0..partitions, replication_factor).await;
        let (mut puts, reservation) = placed.map_err(|error| match error {
            PlacementError::LimitExceeded(bound) => bound.into(),
            PlacementError::TooFewBrokers => {
                CreateError::Brokers { requested: replication_factor, counts: BrokerCounts::of(&self.metadata.state()) }
            }
        })?;
        if validate_only {
            return Ok(TopicInfo { name, value, revision: Revision::ZERO });
        }
        // Partition 0 stays in `puts`: its key is written together with the topic's.
        let other_puts = puts.split_off(1);
        let first_key = self.put_new(&name, other_puts).await?;
        let key = self.keys.topic(&name);
        // An earlier attempt may have created the topic, and another client may have deleted it. The tombstone then
        // makes this attempt fail.
        let mut transaction = Transaction::new()
            .when(Compare::Absent(key.clone()))
            .when(Compare::Absent(self.keys.tombstone(id)))
            .put(key.as_str(), value.encode())
            .else_get(key);
        transaction.ops.extend(puts);
        if let Some((first, created)) = first_key {
            // A sweep deletes `first`, the lowest key, before the others. If `first` has its original create revision,
            // no sweep has deleted a key, and after this transaction none will.
            transaction = transaction.when(Compare::CreateRevision(first, created));
        }
        let revision = match transact_until_known(&*self.store, &transaction).await? {
            TxnOutcome::Committed { revision } => revision,
            TxnOutcome::CompareFailed { mut found, .. } => {
                // If the topic's key does not exist, the compare of the tombstone or of the first partition key failed.
                let Some(entry) = found.pop().flatten() else { return Err(CreateError::Conflict { name }) };
                // If the id differs, another creation of this name came first. Otherwise an earlier attempt of this
                // transaction was applied.
                if !TopicValue::decode(&entry.key, &entry.value).is_ok_and(|stored| stored.id == id) {
                    return Err(CreateError::Exists { name });
                }
                entry.mod_revision
            }
        };
        reservation.mark_written(revision);
        Ok(TopicInfo { name, value, revision })
    }

    /// Writes partition keys of a new topic id: only this creation can write them, and brokers ignore them until the
    /// topic exists. Returns the first key and its create revision; `None` if `puts` is empty. Fails with a conflict if
    /// a sweep deleted a key before its write was confirmed.
    async fn put_new(&self, name: &TopicName, puts: Vec<TxnOp>) -> Result<Option<(String, Revision)>, CreateError> {
        let mut first_key = None;
        for chunk in puts.chunks(MAX_OPS_PER_TXN) {
            let absent = chunk.iter().map(|op| Compare::Absent(op.key().to_owned())).collect();
            let first = chunk[0].key().to_owned();
            let transaction = Transaction { compares: absent, ops: chunk.to_vec(), else_get: vec![first.clone()] };
            let created = match transact_until_known(&*self.store, &transaction).await? {
                TxnOutcome::Committed { revision } => revision,
                TxnOutcome::CompareFailed { mut found, .. } => match found.pop().flatten() {
                    // An earlier attempt created the key.
                    Some(entry) => entry.create_revision,
                    // An earlier attempt created the key, and a sweep deleted it.
                    None => return Err(CreateError::Conflict { name: name.clone() }),
                },
            };
            first_key.get_or_insert((first, created));
        }
        Ok(first_key)
    }

    /// Checks that the numbers and the configuration are valid, and that enough brokers accept replicas. Checks also
    /// that the metadata cache contains neither a topic with this name nor the maximum number of topics.
    fn check_spec(&self, new: &TopicSpec) -> Result<(), CreateError> {
        let state = self.metadata.state();
        if new.partitions == 0 || new.partitions > limits::MAX_PARTITIONS {
            return Err(CreateError::Partitions { requested: new.partitions });
        }
        let requested = new.replication_factor;
        if requested == 0 || requested > limits::MAX_REPLICAS {
            return Err(CreateError::Replicas { requested });
        }
        let counts = BrokerCounts::of(&state);
        if usize::try_from(requested).is_ok_and(|requested| requested > counts.eligible_brokers()) {
            return Err(CreateError::Brokers { requested, counts });
        }
        check_config(&self.defaults, &new.config, requested)?;
        if state.topic(&new.name).is_some() {
            return Err(CreateError::Exists { name: new.name.clone() });
        }
        if state.topics().len() >= limits::MAX_TOPICS { Err(CreateError::TooManyTopics) } else { Ok(()) }
    }
}
