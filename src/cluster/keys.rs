//! The key space: the paths and their values, stored as JSON that an operator can read.
//!
//! Decoding is lenient: unknown fields are ignored, and optional fields have defaults. A value that does not parse or
//! that contradicts itself is an error with its key. The metadata cache logs the key and continues without the value.

use std::{collections::BTreeSet, fmt, str::FromStr, sync::Arc};

use bytes::Bytes;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{endpoints::Endpoints, partition_value::PartitionValue};
use crate::{
    limits,
    model::{BrokerId, ConfigMap, Offset, PartitionId, TopicId, TopicName},
    tier::{StoreBinding, TierState},
};

/// Number of bits of the check value in a producer id.
pub(super) const PRODUCER_ID_CHECK_BITS: u32 = 25;

/// First counter that does not fit into a producer id.
pub(super) const PRODUCER_ID_COUNTER_END: i64 = 1 << (63 - PRODUCER_ID_CHECK_BITS);

/// The paths of one cluster's keys in the metadata store. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys {
    prefix: Arc<str>,
}

/// Error for a cluster name that does not consist of 1 to 100 characters of `a-z A-Z 0-9 . _ -`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cluster name {name:?} is not valid: use 1 to 100 of a-z, A-Z, 0-9, '.', '_' and '-'")]
pub struct InvalidClusterName {
    /// The rejected name, shortened to 100 characters.
    pub name: String,
}

/// Meaning of a path.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    /// `brokers/{id}`: the registration of a live broker.
    Broker(BrokerId),
    /// `directories/{id}`: the last registered data directory of a broker.
    Directory(BrokerId),
    /// `drains/{id}`: an operator's request to drain a broker.
    Drain(BrokerId),
    /// `controller`: the id of the controller.
    Controller,
    /// `topics/{name}`: a topic with its configuration.
    Topic(TopicName),
    /// `partitions/{topic-id}/{n}`: the replicas, leader and ISR of a partition.
    Partition(PartitionId),
    /// `tier/{topic-id}/{n}`: the committed tier state of a partition.
    Tier(PartitionId),
    /// `deleted/{topic-id}`: the tombstone of a deleted topic.
    Tombstone(TopicId),
    /// `producer-ids`: the first counter of the next block of producer ids.
    ProducerIds,
    /// `producer-id-key`: the key that signs producer ids.
    ProducerIdKey,
    /// `object-store`: the store binding.
    ObjectStore,
    /// `generation`: the cluster generation.
    Generation,
}

impl Keys {
    /// Returns the paths of the cluster with this name.
    pub fn new(cluster: &str) -> Result<Self, InvalidClusterName> {
        let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        if cluster.is_empty() || cluster.len() > 100 || !cluster.bytes().all(legal) {
            return Err(InvalidClusterName { name: cluster.chars().take(100).collect() });
        }
        Ok(Self { prefix: format!("/strandline/{cluster}/").into() })
    }

    /// Returns the prefix of every path of the cluster; ends with a slash.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Returns the path of a key.
    pub fn path(&self, key: &Key) -> String {
        let prefix = &self.prefix;
        match key {
            Key::Broker(id) => format!("{prefix}brokers/{id}"),
            Key::Directory(id) => format!("{prefix}directories/{id}"),
            Key::Drain(id) => format!("{prefix}drains/{id}"),
            Key::Controller => format!("{prefix}controller"),
            Key::Topic(name) => format!("{prefix}topics/{name}"),
            Key::Partition(id) => format!("{prefix}partitions/{id}"),
            Key::Tier(id) => format!("{prefix}tier/{id}"),
            Key::Tombstone(id) => format!("{prefix}deleted/{id}"),
            Key::ProducerIds => format!("{prefix}producer-ids"),
            Key::ProducerIdKey => format!("{prefix}producer-id-key"),
            Key::ObjectStore => format!("{prefix}object-store"),
            Key::Generation => format!("{prefix}generation"),
        }
    }

    /// Returns the path of a broker's registration.
    pub fn broker(&self, id: BrokerId) -> String {
        self.path(&Key::Broker(id))
    }

    /// Returns the path of a broker's data directory record.
    pub fn directory(&self, id: BrokerId) -> String {
        self.path(&Key::Directory(id))
    }

    /// Returns the path of a broker's drain request.
    pub fn drain(&self, id: BrokerId) -> String {
        self.path(&Key::Drain(id))
    }

    /// Returns the path of the controller's key.
    pub fn controller(&self) -> String {
        self.path(&Key::Controller)
    }

    /// Returns the path of a topic.
    pub fn topic(&self, name: &TopicName) -> String {
        self.path(&Key::Topic(name.clone()))
    }

    /// Returns the path of a partition.
    pub fn partition(&self, id: PartitionId) -> String {
        self.path(&Key::Partition(id))
    }

    /// Returns the path of a partition's tier state.
    pub fn tier(&self, id: PartitionId) -> String {
        self.path(&Key::Tier(id))
    }

    /// Returns the path of the tombstone that the topic with this id gets when it is deleted.
    pub fn tombstone(&self, id: TopicId) -> String {
        self.path(&Key::Tombstone(id))
    }

    /// Returns the path of the key with the next block of producer ids.
    pub fn producer_ids(&self) -> String {
        self.path(&Key::ProducerIds)
    }

    /// Returns the path of the key that signs producer ids.
    pub fn producer_id_key(&self) -> String {
        self.path(&Key::ProducerIdKey)
    }

    /// Returns the path of the object store binding.
    pub fn object_store(&self) -> String {
        self.path(&Key::ObjectStore)
    }

    /// Returns the path of the cluster generation.
    pub fn generation(&self) -> String {
        self.path(&Key::Generation)
    }

    /// Returns the meaning of a path. Returns `None` for a path of another cluster, for a malformed path, and for a
    /// kind of key that this version does not support.
    pub fn parse(&self, path: &str) -> Option<Key> {
        let rest = path.strip_prefix(&*self.prefix)?;
        let key = match rest.split_once('/') {
            None if rest == "controller" => Key::Controller,
            None if rest == "producer-ids" => Key::ProducerIds,
            None if rest == "producer-id-key" => Key::ProducerIdKey,
            None if rest == "object-store" => Key::ObjectStore,
            None if rest == "generation" => Key::Generation,
            Some(("brokers", id)) => Key::Broker(BrokerId(parse_canonical(id)?)),
            Some(("directories", id)) => Key::Directory(BrokerId(parse_canonical(id)?)),
            Some(("drains", id)) => Key::Drain(BrokerId(parse_canonical(id)?)),
            Some(("topics", name)) => Key::Topic(name.parse().ok()?),
            Some(("partitions", id)) => Key::Partition(parse_partition_id(id)?),
            Some(("tier", id)) => Key::Tier(parse_partition_id(id)?),
            Some(("deleted", id)) => Key::Tombstone(parse_canonical(id)?),
            _ => return None,
        };
        Some(key)
    }
}

/// Parses a value; `None` unless `text` is its canonical spelling. If `01` or `+1` were accepted, one key would have
/// several paths.
fn parse_canonical<T: FromStr + fmt::Display>(text: &str) -> Option<T> {
    let value: T = text.parse().ok()?;
    (value.to_string() == text).then_some(value)
}

/// Parses `{topic-id}/{n}`; `None` unless both parts are canonical and the number is below `MAX_PARTITIONS`.
fn parse_partition_id(text: &str) -> Option<PartitionId> {
    let (topic, number) = text.split_once('/')?;
    // Bounded, because the metadata cache allocates an entry for each partition number of the topic up to this one.
    let number = parse_canonical(number).filter(|number| *number < limits::MAX_PARTITIONS)?;
    Some(PartitionId::new(parse_canonical(topic)?, number))
}

/// The value of `brokers/{id}`: a live broker. The key's create revision is the broker epoch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BrokerValue {
    /// Listeners of the broker.
    pub listeners: Endpoints,
    /// Rack or zone of the broker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rack: Option<String>,
    /// Id of the data directory. Another directory lacks the records that the broker acknowledged with this one.
    pub directory_id: String,
    /// Incarnation: UUID of the process, chosen at each start. Empty if the value has none.
    #[serde(default)]
    pub incarnation: String,
    /// State of the broker: running or stopping.
    #[serde(default)]
    pub state: BrokerState,
    /// True under disk pressure: the broker gets no new replicas.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub disk_pressure: bool,
    /// True if the disk is full: other brokers take over the leadership of its partitions where possible.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub disk_full: bool,
    /// Maximum number of replicas that are placed on the broker (`broker.max_replicas`); `None` if the value has no
    /// limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_replicas: Option<u32>,
    /// Version of the server program.
    pub version: String,
}

#[cfg(test)]
impl BrokerValue {
    /// Returns a running broker with this address for clients and peers.
    pub(crate) fn running_at(address: String) -> Self {
        Self {
            listeners: Endpoints::new(address.clone()).with_peer(address),
            rack: None,
            directory_id: "d".to_owned(),
            incarnation: "p".to_owned(),
            state: BrokerState::Running,
            disk_pressure: false,
            disk_full: false,
            max_replicas: None,
            version: "0".to_owned(),
        }
    }
}

/// State that a live broker publishes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BrokerState {
    /// The broker is active.
    #[default]
    Running,
    /// The broker is shutting down: it transfers its leaderships and gets no new ones.
    Stopping,
}

/// The value of `directories/{id}`, which outlives the registration: the data directory and the process that registered
/// last with this broker id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirectoryValue {
    /// Id of the data directory.
    pub directory_id: String,
    /// Incarnation of the process that registered with the directory.
    pub incarnation: String,
}

/// The value of `drains/{id}`: an operator requested that the broker be drained.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainValue {
    /// Wall-clock time of the request, in milliseconds.
    pub since_ms: i64,
}

/// The value of `controller`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControllerValue {
    /// Id of the controller.
    pub broker: BrokerId,
}

/// The value of `generation`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GenerationValue {
    /// Cluster generation: 1 in a new cluster, raised after a restore of the metadata store.
    pub generation: u64,
}

/// The value of `topics/{name}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopicValue {
    pub id: TopicId,
    /// Number of partitions, at least 1. A partition key with this number or a higher one is ignored: the partition is
    /// being created, or the key is stale.
    pub partitions: u32,
    /// Number of replicas per partition, at least 1.
    pub replication_factor: u32,
    /// Configuration of the topic, without the defaults.
    #[serde(default)]
    pub config: ConfigMap,
}

/// The value of `deleted/{topic-id}`, a tombstone: the topic was deleted on purpose, so its data on the brokers and in
/// the object store is garbage. Without a tombstone, the data of an unknown topic is kept, because the topic's metadata
/// may have been lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TombstoneValue {
    /// Former name of the topic.
    pub name: TopicName,
    /// Wall-clock time, in milliseconds, since which checks have found no data of the topic. `None` if the last check
    /// found data, or before the first check. The tombstone is deleted after a retention period from this time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub purged_since_ms: Option<i64>,
}

/// The value of `producer-ids`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProducerIdsValue {
    /// First counter that is in no assigned block of producer ids.
    pub next: i64,
}

/// Error for a value that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the value of {key} is invalid ({reason}): restore its last valid value in the metadata store")]
pub struct InvalidValue {
    /// Path of the value.
    pub key: String,
    /// Reason why the value cannot be used.
    pub reason: String,
}

/// A value of the key space: JSON, validated when it is read.
pub trait Value: Serialize + DeserializeOwned {
    /// Returns the contradiction in a value that was parsed; `None` if the value is valid.
    fn contradiction(&self) -> Option<String> {
        None
    }

    /// Returns the stored form of the value.
    fn encode(&self) -> Bytes {
        serde_json::to_vec(self).expect("every field of a value serializes to JSON").into()
    }

    /// Parses and validates a value; `key` appears in the error.
    fn decode(key: &str, bytes: &[u8]) -> Result<Self, InvalidValue> {
        let invalid = |reason: String| InvalidValue { key: key.to_owned(), reason };
        let value: Self = serde_json::from_slice(bytes).map_err(|error| invalid(error.to_string()))?;
        match value.contradiction() {
            Some(reason) => Err(invalid(reason)),
            None => Ok(value),
        }
    }
}

impl Value for BrokerValue {
    fn contradiction(&self) -> Option<String> {
        self.listeners.client().is_empty().then(|| "listeners has no gRPC address for clients".to_owned())
    }
}

impl Value for DirectoryValue {}

impl Value for DrainValue {}

impl Value for ControllerValue {}

impl Value for GenerationValue {}

impl Value for TopicValue {
    fn contradiction(&self) -> Option<String> {
        if self.partitions == 0 || self.partitions > limits::MAX_PARTITIONS {
            return Some(format!("partitions is {}, allowed are 1 to {}", self.partitions, limits::MAX_PARTITIONS));
        }
        if self.replication_factor == 0 || self.replication_factor > limits::MAX_REPLICAS {
            return Some(format!(
                "replication_factor is {}, allowed are 1 to {}",
                self.replication_factor,
                limits::MAX_REPLICAS
            ));
        }
        None
    }
}

impl Value for PartitionValue {
    fn contradiction(&self) -> Option<String> {
        let replicas: BTreeSet<_> = self.replicas.iter().collect();
        if replicas.is_empty() {
            return Some("replicas is empty".to_owned());
        }
        if replicas.len() != self.replicas.len() {
            return Some("a broker is in replicas twice".to_owned());
        }
        if self.queued_replicas.iter().collect::<BTreeSet<_>>().len() != self.queued_replicas.len() {
            return Some("a broker is in queued_replicas twice".to_owned());
        }
        if self.leader_epoch.0 > i32::MAX.unsigned_abs() {
            return Some(format!("leader_epoch is {}: at most {}", self.leader_epoch, i32::MAX));
        }
        let sets = [("isr", &self.isr), ("elr", &self.elr), ("adding", &self.adding), ("removing", &self.removing)];
        for (name, set) in sets {
            if let Some(id) = set.iter().find(|id| !replicas.contains(id)) {
                return Some(format!("broker {id} is in {name} and not in replicas"));
            }
        }
        if let Some(duplicate) =
            self.isr.iter().enumerate().find(|(i, id)| self.isr[..*i].contains(id) || self.elr.contains(id))
        {
            return Some(format!("broker {} is in isr twice, or in isr and elr", duplicate.1));
        }
        match self.leader {
            Some(leader) if !self.isr.contains(&leader) => Some(format!("leader {leader} is not in isr")),
            _ => None,
        }
    }
}

/// The value of `tier/{topic-id}/{n}`; `tier` defines its fields.
impl Value for TierState {
    fn contradiction(&self) -> Option<String> {
        if Offset::new(self.tiered_end.get()).is_none() || Offset::new(self.log_start.get()).is_none() {
            return Some("an offset is 2^63 or more".to_owned());
        }
        if self.manifest.is_none() && self.tiered_end > self.log_start {
            return Some("tiered_end is above log_start and there is no manifest".to_owned());
        }
        None
    }
}

impl Value for TombstoneValue {}

/// The value of `object-store`.
impl Value for StoreBinding {}

impl Value for ProducerIdsValue {
    fn contradiction(&self) -> Option<String> {
        let is_valid = (0..=PRODUCER_ID_COUNTER_END).contains(&self.next);
        (!is_valid).then(|| format!("next is {}: 0 to {PRODUCER_ID_COUNTER_END}", self.next))
    }
}

#[cfg(test)]
mod tests;
