//! The key space and the values in it: what is at which path, as JSON that an operator can read.
//!
//! Values are read leniently: a field that this version does not know is passed over, one that may be missing has a
//! default. A value that does not parse, or contradicts itself, is an error with its key; who mirrors the store names
//! it and goes on without it.

use std::{collections::BTreeSet, fmt, str::FromStr, sync::Arc};

use bytes::Bytes;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{endpoints::Endpoints, partition_value::PartitionValue, producer_ids::COUNTER_END};
use crate::{
    limits,
    model::{BrokerId, ConfigMap, Offset, PartitionId, TopicId, TopicName},
    tier::{StoreNote, TierState},
};

/// The paths of one cluster. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys {
    prefix: Arc<str>,
}

/// A cluster's name: 1 to 100 of `a-z A-Z 0-9 . _ -`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cluster name {name:?} is not valid: use 1 to 100 of a-z, A-Z, 0-9, '.', '_' and '-'")]
pub struct InvalidClusterName {
    /// What was given, cut to a length that can be printed.
    pub name: String,
}

/// What a path names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    /// `brokers/{id}`
    Broker(BrokerId),
    /// `directories/{id}`
    Directory(BrokerId),
    /// `drains/{id}`
    Drain(BrokerId),
    /// `controller`
    Controller,
    /// `topics/{name}`
    Topic(TopicName),
    /// `partitions/{topic-id}/{n}`
    Partition(PartitionId),
    /// `tier/{topic-id}/{n}`
    Tier(PartitionId),
    /// `deleted/{topic-id}`
    Deleted(TopicId),
    /// `producer-ids`
    ProducerIds,
    /// `producer-id-key`
    ProducerIdKey,
    /// `object-store`
    ObjectStore,
    /// `generation`
    Generation,
}

impl Keys {
    /// The paths of the cluster of this name.
    pub fn new(cluster: &str) -> Result<Self, InvalidClusterName> {
        let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        if cluster.is_empty() || cluster.len() > 100 || !cluster.bytes().all(legal) {
            return Err(InvalidClusterName { name: cluster.chars().take(100).collect() });
        }
        Ok(Self { prefix: format!("/strandline/{cluster}/").into() })
    }

    /// What every path of the cluster begins with; ends with a slash.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The path of a key.
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
            Key::Deleted(id) => format!("{prefix}deleted/{id}"),
            Key::ProducerIds => format!("{prefix}producer-ids"),
            Key::ProducerIdKey => format!("{prefix}producer-id-key"),
            Key::ObjectStore => format!("{prefix}object-store"),
            Key::Generation => format!("{prefix}generation"),
        }
    }

    /// The path of a broker's registration.
    pub fn broker(&self, id: BrokerId) -> String {
        self.path(&Key::Broker(id))
    }

    /// The path of what is known of a broker's data directory.
    pub fn directory(&self, id: BrokerId) -> String {
        self.path(&Key::Directory(id))
    }

    /// The path of the wish that a broker be drained.
    pub fn drain(&self, id: BrokerId) -> String {
        self.path(&Key::Drain(id))
    }

    /// The path of the controller's key.
    pub fn controller(&self) -> String {
        self.path(&Key::Controller)
    }

    /// The path of a topic.
    pub fn topic(&self, name: &TopicName) -> String {
        self.path(&Key::Topic(name.clone()))
    }

    /// The path of a partition.
    pub fn partition(&self, id: PartitionId) -> String {
        self.path(&Key::Partition(id))
    }

    /// The path of what a partition has in the bucket.
    pub fn tier(&self, id: PartitionId) -> String {
        self.path(&Key::Tier(id))
    }

    /// The path of the mark that a topic was deleted.
    pub fn deleted(&self, id: TopicId) -> String {
        self.path(&Key::Deleted(id))
    }

    /// The path of the next block of producer ids.
    pub fn producer_ids(&self) -> String {
        self.path(&Key::ProducerIds)
    }

    /// The path of the key of producer ids.
    pub fn producer_id_key(&self) -> String {
        self.path(&Key::ProducerIdKey)
    }

    /// The path of which object store is the cluster's.
    pub fn object_store(&self) -> String {
        self.path(&Key::ObjectStore)
    }

    /// The path of the cluster generation.
    pub fn generation(&self) -> String {
        self.path(&Key::Generation)
    }

    /// What a path names; `None` for one of another cluster, or of a kind that this version does not know.
    pub fn parse(&self, path: &str) -> Option<Key> {
        let rest = path.strip_prefix(&*self.prefix)?;
        let key = match rest.split_once('/') {
            None if rest == "controller" => Key::Controller,
            None if rest == "producer-ids" => Key::ProducerIds,
            None if rest == "producer-id-key" => Key::ProducerIdKey,
            None if rest == "object-store" => Key::ObjectStore,
            None if rest == "generation" => Key::Generation,
            Some(("brokers", id)) => Key::Broker(BrokerId(canonical(id)?)),
            Some(("directories", id)) => Key::Directory(BrokerId(canonical(id)?)),
            Some(("drains", id)) => Key::Drain(BrokerId(canonical(id)?)),
            Some(("topics", name)) => Key::Topic(name.parse().ok()?),
            Some(("partitions", id)) => Key::Partition(partition(id)?),
            Some(("tier", id)) => Key::Tier(partition(id)?),
            Some(("deleted", id)) => Key::Deleted(canonical(id)?),
            _ => return None,
        };
        Some(key)
    }
}

/// A number in its one spelling: `01` and `+1` would be second paths of the same thing.
fn canonical<T: FromStr + fmt::Display>(text: &str) -> Option<T> {
    let value: T = text.parse().ok()?;
    (value.to_string() == text).then_some(value)
}

fn partition(text: &str) -> Option<PartitionId> {
    let (topic, number) = text.split_once('/')?;
    // Bounded, because a number becomes the length of a table.
    let number = canonical(number).filter(|number| *number < limits::MAX_PARTITIONS)?;
    Some(PartitionId::new(canonical(topic)?, number))
}

/// The value of `brokers/{id}`: a broker that is alive. The key's create revision is the broker epoch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BrokerValue {
    /// Where it is reached.
    pub listeners: Endpoints,
    /// Its rack or zone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rack: Option<String>,
    /// The id of its data directory: another one holds nothing of what this one acknowledged.
    pub directory_id: String,
    /// The id of its process: drawn at each start.
    #[serde(default)]
    pub incarnation: String,
    /// Whether it is on its way out.
    #[serde(default)]
    pub state: BrokerState,
    /// Whether its disk is so full that it is to be given no new replicas.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub disk_full: bool,
    /// Whether its disk took no more records: others are to lead what they can.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub no_room: bool,
    /// Most replicas that are placed on it (`broker.max_replicas`); `None`: no bound is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_replicas: Option<u32>,
    /// The version of its program.
    pub version: String,
}

#[cfg(test)]
impl BrokerValue {
    /// A running broker that clients and brokers reach at this address.
    pub(crate) fn running_at(address: String) -> Self {
        Self {
            listeners: Endpoints::new(address.clone()).with_peer(address),
            rack: None,
            directory_id: "d".to_owned(),
            incarnation: "p".to_owned(),
            state: BrokerState::Running,
            disk_full: false,
            no_room: false,
            max_replicas: None,
            version: "0".to_owned(),
        }
    }
}

/// What a live broker says of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BrokerState {
    /// It takes part.
    #[default]
    Running,
    /// It is being stopped: it hands its leaderships over and is given nothing new.
    Stopping,
}

/// The value of `directories/{id}`, which outlives the registration: what took part last under this number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirectoryValue {
    /// The id of the data directory.
    pub directory_id: String,
    /// The process that ran on it.
    pub incarnation: String,
}

/// The value of `drains/{id}`: an operator wants the broker empty.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainValue {
    /// When that was said, by the wall clock in milliseconds.
    pub since_ms: i64,
}

/// The value of `controller`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControllerValue {
    /// Who plans.
    pub broker: BrokerId,
}

/// The value of `generation`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GenerationValue {
    /// 1 in a new cluster; raised after the store was restored.
    pub generation: u64,
}

/// The value of `topics/{name}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopicValue {
    /// The topic's identity.
    pub id: TopicId,
    /// How many partitions it has: from 1. Partition keys of this number and above do not count (yet).
    pub partitions: u32,
    /// How many replicas each partition is to have: from 1.
    pub replication_factor: u32,
    /// What the topic itself sets.
    #[serde(default)]
    pub config: ConfigMap,
}

/// The value of `deleted/{topic-id}`: the topic was deleted on purpose, so what the brokers and the bucket still hold of it is
/// garbage. Without this mark, a topic that the metadata does not know is kept: its metadata may have been lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeletedValue {
    /// The name it had.
    pub name: TopicName,
    /// Since when nothing is left of it, by the wall clock in milliseconds, as far as is known. The mark ends long after that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gone_since_ms: Option<i64>,
}

/// The value of `producer-ids`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProducerIdsValue {
    /// The first counter of an id that nobody has been given.
    pub next: i64,
}

/// A value that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the value of {key} cannot be used: {why}")]
pub struct InvalidValue {
    /// The path.
    pub key: String,
    /// What is wrong with it.
    pub why: String,
}

/// A value of the key space: JSON, checked when it is read.
pub trait Value: Serialize + DeserializeOwned {
    /// What is wrong with a value whose JSON parses.
    fn contradiction(&self) -> Option<String> {
        None
    }

    /// The value as it is stored.
    fn encode(&self) -> Bytes {
        serde_json::to_vec(self).expect("the values' fields are all JSON").into()
    }

    /// Reads a value; `key` is for the error.
    fn decode(key: &str, bytes: &[u8]) -> Result<Self, InvalidValue> {
        let invalid = |why: String| InvalidValue { key: key.to_owned(), why };
        let value: Self = serde_json::from_slice(bytes).map_err(|error| invalid(error.to_string()))?;
        match value.contradiction() {
            Some(why) => Err(invalid(why)),
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
            return Some(format!("partitions is {}: 1 to {}", self.partitions, limits::MAX_PARTITIONS));
        }
        if self.replication_factor == 0 || self.replication_factor > limits::MAX_REPLICAS {
            return Some(format!("replication_factor is {}: 1 to {}", self.replication_factor, limits::MAX_REPLICAS));
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
        if self.ordered.iter().collect::<BTreeSet<_>>().len() != self.ordered.len() {
            return Some("a broker is in ordered twice".to_owned());
        }
        if self.leader_epoch.0 > i32::MAX.unsigned_abs() {
            return Some(format!("leader_epoch is {}: at most {}", self.leader_epoch, i32::MAX));
        }
        let sets = [("isr", &self.isr), ("elr", &self.elr), ("adding", &self.adding), ("removing", &self.removing)];
        for (name, set) in sets {
            if let Some(stranger) = set.iter().find(|id| !replicas.contains(id)) {
                return Some(format!("broker {stranger} is in {name} and not in replicas"));
            }
        }
        if let Some(twice) =
            self.isr.iter().enumerate().find(|(i, id)| self.isr[..*i].contains(id) || self.elr.contains(id))
        {
            return Some(format!("broker {} is in isr twice, or in isr and elr", twice.1));
        }
        match self.leader {
            Some(leader) if !self.isr.contains(&leader) => Some(format!("leader {leader} is not in isr")),
            _ => None,
        }
    }
}

/// The value of `tier/{topic-id}/{n}`: its shape belongs to the room that reads the bucket.
impl Value for TierState {
    fn contradiction(&self) -> Option<String> {
        if Offset::new(self.tiered_end.get()).is_none() || Offset::new(self.log_start.get()).is_none() {
            return Some("an offset is 2^63 or more".to_owned());
        }
        if self.manifest.is_none() && self.tiered_end > self.log_start {
            return Some("tiered_end names records and there is no manifest".to_owned());
        }
        None
    }
}

impl Value for DeletedValue {}

/// The value of `object-store`.
impl Value for StoreNote {}

impl Value for ProducerIdsValue {
    fn contradiction(&self) -> Option<String> {
        let possible = (0..=COUNTER_END).contains(&self.next);
        (!possible).then(|| format!("next is {}: 0 to {COUNTER_END}", self.next))
    }
}

#[cfg(test)]
mod tests;
