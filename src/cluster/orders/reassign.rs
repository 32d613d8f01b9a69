//! Moving partitions where an operator wants them.

use std::collections::BTreeSet;

use super::{Chosen, List, Ordered, Orders, UnknownBrokers, UnknownPartition, WriteError, known};
use crate::{
    cluster::{partition_value::PartitionValue, topics::UnknownTopic, view::ViewState},
    model::{BrokerId, PartitionId, TopicName},
};

/// Why partitions are not moved.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReassignError {
    /// No such topic.
    #[error(transparent)]
    Topic(#[from] UnknownTopic),
    /// No such partition.
    #[error(transparent)]
    Partition(#[from] UnknownPartition),
    /// No such brokers.
    #[error(transparent)]
    Brokers(#[from] UnknownBrokers),
    /// A broker is named twice.
    #[error("broker {id} is named twice: a partition has one replica on a broker")]
    Repeated {
        /// Which.
        id: BrokerId,
    },
    /// Not as many brokers as the topic has replicas.
    #[error(
        "topic {:?} has a replication factor of {factor}, and {asked} brokers are named: name {factor}, or change it first \
         with `strandline topic alter {} --replication-factor {asked}`", topic.as_str(), topic
    )]
    Factor {
        /// The topic.
        topic: TopicName,
        /// How many replicas it is to have.
        factor: u32,
        /// How many brokers are named.
        asked: usize,
    },
    /// Brokers that are not alive cannot copy.
    #[error(
        "broker {} is not alive and holds no replica of partition {partition}, so it cannot copy one: start it first",
        List(ids)
    )]
    Gone {
        /// Which.
        ids: Vec<BrokerId>,
        /// The partition, as `topic/number`.
        partition: String,
    },
    /// A broker that is being emptied would give its replicas away again.
    #[error(
        "broker {} is being drained and takes no replicas: leave it out, or `strandline broker restore` it",
        List(ids)
    )]
    Draining {
        /// Which.
        ids: Vec<BrokerId>,
    },
    /// The values could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

impl ReassignError {
    /// Whether the same order may succeed later.
    pub const fn retryable(&self) -> bool {
        match self {
            Self::Write(error) => error.retryable(),
            _ => false,
        }
    }
}

impl Orders {
    /// Moves one partition of a topic, or all, to these brokers, the preferred leader first. Of all, partition N gets the list rotated by
    /// N. A move that is under way is replaced.
    pub async fn reassign(
        &self,
        topic: &TopicName,
        partition: Option<u32>,
        replicas: &[BrokerId],
    ) -> Result<Vec<Ordered>, ReassignError> {
        let topic = self.topic(topic)?;
        let ids = topic.partitions(partition)?;
        admit(&self.view.state(), &topic, replicas)?;
        let target = |id: PartitionId| {
            let mut target = replicas.to_vec();
            if partition.is_none() {
                target.rotate_left(usize::try_from(id.number).unwrap_or(0) % replicas.len());
            }
            target
        };
        self.edit(&ids, |id, value, _| {
            let (state, target) = (self.view.state(), target(id));
            let is_gone = |id: &BrokerId| !state.brokers().contains_key(id) && !value.replicas.contains(id);
            let gone: Vec<BrokerId> = target.iter().copied().filter(is_gone).collect();
            if !gone.is_empty() {
                return Err(ReassignError::Gone { ids: gone, partition: self.spoken(id) });
            }
            Ok(moved(value, &target))
        })
        .await
    }

    /// Partitions that are being moved, whoever ordered it: of one topic, one partition of it, or all.
    pub fn moving(&self, topic: Option<&TopicName>, partition: Option<u32>) -> Result<Vec<Ordered>, ReassignError> {
        let ids = match topic {
            None => self.everything(),
            Some(name) => self.topic(name)?.partitions(partition)?,
        };
        let state = self.view.state();
        let known = ids.into_iter().filter_map(|id| Some((id, state.partition(id)?.partition.clone()?)));
        Ok(known
            .filter(|(_, known)| known.value.is_moving())
            .map(|(id, known)| Ordered { id, value: known.value.clone(), revision: known.mod_revision, changed: false })
            .collect())
    }

    /// Every partition that counts, by topic name.
    pub(super) fn everything(&self) -> Vec<PartitionId> {
        let state = self.view.state();
        let topics = state.topics().values().map(|known| &known.value);
        topics.flat_map(|topic| (0..topic.partitions).map(|number| PartitionId::new(topic.id, number))).collect()
    }
}

/// What can be told without looking at partitions.
fn admit(state: &ViewState, topic: &Chosen, replicas: &[BrokerId]) -> Result<(), ReassignError> {
    let mut seen = BTreeSet::new();
    if let Some(id) = replicas.iter().find(|id| !seen.insert(**id)) {
        return Err(ReassignError::Repeated { id: *id });
    }
    let known = known(state);
    let strangers: Vec<BrokerId> = replicas.iter().copied().filter(|id| !known.contains(id)).collect();
    if !strangers.is_empty() {
        return Err(UnknownBrokers { ids: strangers, known: known.into_iter().collect() }.into());
    }
    let factor = topic.known.value.replication_factor;
    if usize::try_from(factor).is_ok_and(|factor| factor != replicas.len()) {
        return Err(ReassignError::Factor { topic: topic.name.clone(), factor, asked: replicas.len() });
    }
    let draining: Vec<BrokerId> = replicas.iter().copied().filter(|id| state.drains().contains_key(id)).collect();
    if draining.is_empty() { Ok(()) } else { Err(ReassignError::Draining { ids: draining }) }
}

/// The value with a move to `target` begun; `None` when that is what it has, or is on its way to.
fn moved(value: &PartitionValue, target: &[BrokerId]) -> Option<PartitionValue> {
    let value_moved = value.begin_move(target).expect("the brokers are named once each, and there are some");
    (value_moved != *value).then_some(value_moved)
}
