//! Reassignments on request.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    BrokerList, ClusterOperations, OperationResult, TargetError, TargetTopic, UnknownBrokers, WriteError,
    registered_brokers,
};
use crate::{
    cluster::{
        keys::BrokerValue,
        metadata::MetadataSnapshot,
        partition_value::PartitionValue,
        placement::{ReplicaBound, is_unreachable},
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
    Factor {
        topic: TopicName,
        /// Replication factor of the topic.
        factor: u32,
        /// Number of requested brokers.
        requested: usize,
    },
    /// A new broker is not live and cannot copy.
    #[error(
        "partition {partition} cannot be assigned to {}, offline and without a replica of it: start the brokers first",
        BrokerList(ids)
    )]
    Gone {
        /// Ids of these brokers.
        ids: Vec<BrokerId>,
        /// The partition, as `topic/number`.
        partition: String,
    },
    /// A drained broker would give its new replica away again.
    #[error(
        "no replica can be assigned to {}, being drained: leave it out, or run `strandline broker undrain` first",
        BrokerList(ids)
    )]
    Draining {
        /// Ids of these brokers.
        ids: Vec<BrokerId>,
    },
    /// A new broker is under disk pressure.
    #[error(
        "partition {partition} cannot be assigned to {}, under disk pressure (broker.disk_pressure_percent): leave it \
         out, or free space there",
        BrokerList(ids)
    )]
    Full {
        /// Ids of these brokers.
        ids: Vec<BrokerId>,
        /// The partition, as `topic/number`.
        partition: String,
    },
    /// Other brokers cannot reach a new broker, so it would never be in sync.
    #[error(
        "partition {partition} cannot be assigned to {}, registered without an address for other brokers: leave it \
         out, or run the same version everywhere",
        BrokerList(ids)
    )]
    Unreachable {
        /// Ids of these brokers.
        ids: Vec<BrokerId>,
        /// The partition, as `topic/number`.
        partition: String,
    },
    /// A broker would exceed its replica limit.
    #[error(transparent)]
    Bound(#[from] ReplicaBound),
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
    /// Requests these brokers for one partition of a topic, or for all, the preferred leader first. For all, partition
    /// N gets the list rotated by N. A reassignment in progress is replaced; others are queued until the controller's
    /// limits permit them.
    pub async fn reassign(
        &self,
        topic: &TopicName,
        partition: Option<u32>,
        replicas: &[BrokerId],
    ) -> Result<Vec<OperationResult>, ReassignError> {
        let (topic, ids) = self.find(topic, partition)?;
        admit(&self.metadata.state(), &topic, replicas)?;
        check_bounds(&self.metadata.state(), &ids, replicas)?;
        let target = |id: PartitionId| {
            let mut target = replicas.to_vec();
            if partition.is_none() {
                target.rotate_left(usize::try_from(id.number).unwrap_or(0) % replicas.len());
            }
            target
        };
        self.edit(&ids, |id, value, _| {
            let (state, target) = (self.metadata.state(), target(id));
            let is_gone = |id: &BrokerId| !state.brokers().contains_key(id) && !value.replicas.contains(id);
            let offline: Vec<BrokerId> = target.iter().copied().filter(is_gone).collect();
            if !offline.is_empty() {
                return Err(ReassignError::Gone { ids: offline, partition: self.display_name(id) });
            }
            let new = |refused: &dyn Fn(&BrokerValue) -> bool| {
                let refused = |id: &BrokerId| state.brokers().get(id).is_some_and(|broker| refused(&broker.value));
                let new = target.iter().copied().filter(|id| refused(id) && !value.replicas.contains(id));
                Some(new.collect::<Vec<_>>()).filter(|ids| !ids.is_empty())
            };
            if let Some(ids) = new(&|broker| broker.disk_pressure) {
                return Err(ReassignError::Full { ids, partition: self.display_name(id) });
            }
            if let Some(ids) = new(&|broker| is_unreachable(&state, broker)) {
                return Err(ReassignError::Unreachable { ids, partition: self.display_name(id) });
            }
            Ok(with_target(value, &target))
        })
        .await
    }

    /// Returns the partitions with a reassignment, in progress or queued, of any origin: of one topic, one partition,
    /// or all.
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

    /// Returns every partition that counts once, by topic name.
    pub(super) fn all_partitions(&self) -> Vec<PartitionId> {
        let (state, mut seen) = (self.metadata.state(), BTreeSet::new());
        let topics = state.topics().values().map(|topic| &topic.value).filter(|topic| seen.insert(topic.id));
        topics.flat_map(|topic| (0..topic.partitions).map(|number| PartitionId::new(topic.id, number))).collect()
    }
}

/// Returns a number of brokers with its verb.
fn format_broker_count(requested: usize) -> String {
    if requested == 1 { "1 broker is".to_owned() } else { format!("{requested} brokers are") }
}

/// Checks that need no partition values.
fn admit(state: &MetadataSnapshot, topic: &TargetTopic, replicas: &[BrokerId]) -> Result<(), ReassignError> {
    let mut seen = BTreeSet::new();
    if let Some(id) = replicas.iter().find(|id| !seen.insert(**id)) {
        return Err(ReassignError::Repeated { id: *id });
    }
    let known = registered_brokers(state);
    let unknown: Vec<BrokerId> = replicas.iter().copied().filter(|id| !known.contains(id)).collect();
    if !unknown.is_empty() {
        return Err(UnknownBrokers { ids: unknown, known: known.into_iter().collect() }.into());
    }
    let factor = topic.known.value.replication_factor;
    if usize::try_from(factor).is_ok_and(|factor| factor != replicas.len()) {
        return Err(ReassignError::Factor { topic: topic.name.clone(), factor, requested: replicas.len() });
    }
    let draining: Vec<BrokerId> = replicas.iter().copied().filter(|id| state.drains().contains_key(id)).collect();
    if draining.is_empty() { Ok(()) } else { Err(ReassignError::Draining { ids: draining }) }
}

/// Checks the replica limits of the requested brokers, with present replicas and queued reassignments. A removed
/// replica counts until its reassignment completes.
fn check_bounds(state: &MetadataSnapshot, ids: &[PartitionId], replicas: &[BrokerId]) -> Result<(), ReplicaBound> {
    let ids: BTreeSet<PartitionId> = ids.iter().copied().collect();
    let mut counts: BTreeMap<BrokerId, (usize, bool)> = replicas.iter().map(|id| (*id, (0, false))).collect();
    for topic in state.topics().values() {
        for (number, entry) in state.partitions_of(&topic.value) {
            let Some(partition) = &entry.partition else { continue };
            let is_requested = ids.contains(&PartitionId::new(topic.value.id, number));
            let target = if is_requested { replicas } else { &partition.value.queued_replicas };
            for (broker, (count, gains)) in &mut counts {
                let has = partition.value.replicas.contains(broker);
                *count += usize::from(has || target.contains(broker));
                *gains |= is_requested && !has;
            }
        }
    }
    for (broker, (replicas, gains)) in counts {
        let max = state.brokers().get(&broker).and_then(|broker| broker.value.max_replicas);
        if let Some(max) = max.and_then(|max| usize::try_from(max).ok()).filter(|max| gains && replicas > *max) {
            return Err(ReplicaBound { broker, replicas, max });
        }
    }
    Ok(())
}

/// Returns the value with a reassignment to `target`; `None` if `target` is already reached or in progress. A
/// reassignment that copies nothing starts at once, and one that replaces another keeps its slot. Any other is queued.
fn with_target(value: &PartitionValue, target: &[BrokerId]) -> Option<PartitionValue> {
    let started = value.start_reassignment(target).expect("the brokers are distinct, and there is at least one");
    let at_once = started.adding.is_empty() || value.is_reassigning();
    let new = if at_once { started.clear_queued() } else { value.queue_reassignment(target) };
    (new != *value).then_some(new)
}
