//! Requests and lists reassignments.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    BrokerList, ClusterOperations, OperationResult, TargetError, TargetTopic, UnknownBrokers, WriteError, known_brokers,
};
use crate::{
    cluster::{
        keys::BrokerValue,
        metadata::MetadataSnapshot,
        partition_value::PartitionValue,
        placement::{ReplicaLimitExceeded, is_unreachable},
    },
    model::{BrokerId, PartitionId, TopicName},
};

/// Error of a reassignment.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReassignError {
    /// The topic or partition does not exist.
    #[error(transparent)]
    Unknown(#[from] TargetError),
    /// A broker does not exist.
    #[error(transparent)]
    Brokers(#[from] UnknownBrokers),
    /// A broker is named twice.
    #[error("broker {id} is named twice: a partition has one replica on a broker")]
    Repeated { id: BrokerId },
    /// The number of brokers differs from the topic's replication factor.
    #[error(
        "topic {:?} has a replication factor of {factor}, and {} named: name {factor}, or change it first \
         with `strandline topic alter {} --replication-factor {requested}`", topic.as_str(),
        format_broker_count(*.requested), topic
    )]
    WrongBrokerCount {
        topic: TopicName,
        /// Replication factor of the topic.
        factor: u32,
        /// Number of requested brokers.
        requested: usize,
    },
    /// Some brokers hold no replica of the partition and are offline, so they cannot copy.
    #[error(
        "partition {partition} cannot be assigned to {}, offline and without a replica of it: start each first",
        BrokerList(ids)
    )]
    Offline {
        /// Ids of the offline brokers.
        ids: Vec<BrokerId>,
        /// The partition, as `topic/number`.
        partition: String,
    },
    /// Some requested brokers are drained: the controller would move their replicas to other brokers again.
    #[error(
        "no replica can be assigned to {}, being drained: name other brokers, or run `strandline broker undrain \
         ID` first",
        BrokerList(ids)
    )]
    Draining {
        /// Ids of the drained brokers.
        ids: Vec<BrokerId>,
    },
    /// Some brokers hold no replica of the partition and are under disk pressure.
    #[error(
        "partition {partition} cannot be assigned to {}, under disk pressure (broker.disk_pressure_percent): name \
         other brokers, or free space there",
        BrokerList(ids)
    )]
    DiskPressure {
        /// Ids of the brokers under disk pressure.
        ids: Vec<BrokerId>,
        /// The partition, as `topic/number`.
        partition: String,
    },
    /// Some brokers hold no replica of the partition, and other brokers cannot reach them: a replica there would never
    /// be in sync.
    #[error(
        "partition {partition} cannot be assigned to {}, registered without an address for other brokers: name \
         other brokers, or run the same version everywhere",
        BrokerList(ids)
    )]
    Unreachable {
        /// Ids of the unreachable brokers.
        ids: Vec<BrokerId>,
        /// The partition, as `topic/number`.
        partition: String,
    },
    /// A broker would exceed its replica limit.
    #[error(transparent)]
    ReplicaLimit(#[from] ReplicaLimitExceeded),
    /// The values could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

impl ReassignError {
    /// Returns true if the same operation may succeed later.
    pub const fn retryable(&self) -> bool {
        match self {
            Self::Write(error) => error.retryable(),
            _ => false,
        }
    }
}

impl ClusterOperations {
    /// Requests a reassignment to `replicas`, the preferred leader first, for one partition of a topic or for all. With
    /// all partitions, partition N gets the list rotated by N, so that preferred leaders spread. The reassignment
    /// starts at once if it copies nothing or replaces one in progress. Otherwise it is queued until the controller's
    /// limits permit it. If one partition cannot get these replicas, nothing is written.
    pub async fn reassign(
        &self,
        topic: &TopicName,
        partition: Option<u32>,
        replicas: &[BrokerId],
    ) -> Result<Vec<OperationResult>, ReassignError> {
        let (topic, ids) = self.find(topic, partition)?;
        check_brokers(&self.metadata.state(), &topic, replicas)?;
        check_replica_limits(&self.metadata.state(), &ids, replicas)?;
        let target = |id: PartitionId| {
            let mut target = replicas.to_vec();
            if partition.is_none() {
                target.rotate_left(usize::try_from(id.number).unwrap_or(0) % replicas.len());
            }
            target
        };
        self.edit(&ids, |id, value, _| {
            let (state, target) = (self.metadata.state(), target(id));
            // Returns the brokers in `target` that have no replica yet and for which `is_unfit` returns true. The
            // argument of `is_unfit` is `None` if the broker is offline.
            let new_brokers_where = |is_unfit: &dyn Fn(Option<&BrokerValue>) -> bool| -> Vec<BrokerId> {
                let new = target.iter().copied().filter(|id| !value.replicas.contains(id));
                new.filter(|id| is_unfit(state.brokers().get(id).map(|broker| &broker.value))).collect()
            };
            let ids = new_brokers_where(&|broker| broker.is_none());
            if !ids.is_empty() {
                return Err(ReassignError::Offline { ids, partition: self.display_name(id) });
            }
            let ids = new_brokers_where(&|broker| broker.is_some_and(|broker| broker.disk_pressure));
            if !ids.is_empty() {
                return Err(ReassignError::DiskPressure { ids, partition: self.display_name(id) });
            }
            let ids = new_brokers_where(&|broker| broker.is_some_and(|broker| is_unreachable(&state, broker)));
            if !ids.is_empty() {
                return Err(ReassignError::Unreachable { ids, partition: self.display_name(id) });
            }
            Ok(with_target(value, &target))
        })
        .await
    }

    /// Returns the partitions with a reassignment in progress or queued, whether an operator or the controller started
    /// it. The result covers one partition, one topic, or the cluster if `topic` is `None`.
    pub fn list_reassignments(
        &self,
        topic: Option<&TopicName>,
        partition: Option<u32>,
    ) -> Result<Vec<OperationResult>, TargetError> {
        let ids = match topic {
            None => self.all_partitions(),
            Some(name) => self.find(name, partition)?.1,
        };
        let state = self.metadata.state();
        let partitions = ids.into_iter().filter_map(|id| Some((id, state.partition(id)?.partition.clone()?)));
        Ok(partitions
            .filter(|(_, partition)| partition.value.is_reassigning() || partition.value.has_queued())
            .map(|(id, partition)| OperationResult {
                id,
                value: partition.value.clone(),
                revision: partition.mod_revision,
                changed: false,
            })
            .collect())
    }

    /// Returns the partitions of all topics, in the order of topic names. If two names have one topic id, that topic is
    /// included once.
    pub(super) fn all_partitions(&self) -> Vec<PartitionId> {
        let (state, mut topic_ids) = (self.metadata.state(), BTreeSet::new());
        let topics = state.topics().values().map(|topic| &topic.value).filter(|topic| topic_ids.insert(topic.id));
        topics.flat_map(|topic| (0..topic.partitions).map(|number| PartitionId::new(topic.id, number))).collect()
    }
}

/// Formats a number of brokers with its verb: `1 broker is`.
fn format_broker_count(requested: usize) -> String {
    if requested == 1 { "1 broker is".to_owned() } else { format!("{requested} brokers are") }
}

/// Checks that the requested brokers are distinct, named by the metadata and not drained, and as many as the topic's
/// replication factor.
fn check_brokers(state: &MetadataSnapshot, topic: &TargetTopic, replicas: &[BrokerId]) -> Result<(), ReassignError> {
    let mut distinct = BTreeSet::new();
    if let Some(id) = replicas.iter().find(|id| !distinct.insert(**id)) {
        return Err(ReassignError::Repeated { id: *id });
    }
    let known = known_brokers(state);
    let unknown: Vec<BrokerId> = replicas.iter().copied().filter(|id| !known.contains(id)).collect();
    if !unknown.is_empty() {
        return Err(UnknownBrokers { ids: unknown, known: known.into_iter().collect() }.into());
    }
    let factor = topic.cached.value.replication_factor;
    if usize::try_from(factor).is_ok_and(|factor| factor != replicas.len()) {
        return Err(ReassignError::WrongBrokerCount { topic: topic.name.clone(), factor, requested: replicas.len() });
    }
    let draining: Vec<BrokerId> = replicas.iter().copied().filter(|id| state.drains().contains_key(id)).collect();
    if draining.is_empty() { Ok(()) } else { Err(ReassignError::Draining { ids: draining }) }
}

/// Checks that no requested broker would exceed its replica limit. A broker's count contains each partition that has a
/// replica there, also one that is being removed, or would get one. A partition in `ids` would get one by the request,
/// any other partition by its queued reassignment. A broker that gains no replica by the request is not checked.
fn check_replica_limits(
    state: &MetadataSnapshot,
    ids: &[PartitionId],
    replicas: &[BrokerId],
) -> Result<(), ReplicaLimitExceeded> {
    let ids: BTreeSet<PartitionId> = ids.iter().copied().collect();
    // For each requested broker: the number of its replicas, and whether the request adds one.
    let mut counts: BTreeMap<BrokerId, (usize, bool)> = replicas.iter().map(|id| (*id, (0, false))).collect();
    for topic in state.topics().values() {
        for (number, entry) in state.partitions_of(&topic.value) {
            let Some(partition) = &entry.partition else { continue };
            let is_requested = ids.contains(&PartitionId::new(topic.value.id, number));
            let target = if is_requested { replicas } else { &partition.value.queued_replicas };
            for (broker, (count, gains_replica)) in &mut counts {
                let has_replica = partition.value.replicas.contains(broker);
                *count += usize::from(has_replica || target.contains(broker));
                *gains_replica |= is_requested && !has_replica;
            }
        }
    }
    for (broker, (replicas, gains_replica)) in counts {
        let max = state.brokers().get(&broker).and_then(|broker| broker.value.max_replicas);
        if let Some(max) = max.and_then(|max| usize::try_from(max).ok()).filter(|max| gains_replica && replicas > *max)
        {
            return Err(ReplicaLimitExceeded { broker, replicas, max });
        }
    }
    Ok(())
}

/// Returns the value with a reassignment to `target`; `None` if the value would not change. A reassignment starts at
/// once if it adds no replica, or if it replaces a reassignment in progress, which the controller's limit counts
/// already. Any other reassignment is queued.
fn with_target(value: &PartitionValue, target: &[BrokerId]) -> Option<PartitionValue> {
    let started = value.start_reassignment(target).expect("the brokers are distinct, and there is at least one");
    let starts_at_once = started.adding.is_empty() || value.is_reassigning();
    let new = if starts_at_once { started.clear_queued() } else { value.queue_reassignment(target) };
    (new != *value).then_some(new)
}
