//! Moving partitions where an operator wants them.

use std::collections::{BTreeMap, BTreeSet};

use super::{Brokers, Chosen, FindError, Ordered, Orders, UnknownBrokers, WriteError, known};
use crate::{
    cluster::{
        keys::BrokerValue,
        partition_value::PartitionValue,
        placement::{ReplicaBound, is_unreachable},
        view::ViewState,
    },
    model::{BrokerId, PartitionId, TopicName},
};

/// Why partitions are not moved.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReassignError {
    /// No such topic or partition.
    #[error(transparent)]
    Unknown(#[from] FindError),
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
        "topic {:?} has a replication factor of {factor}, and {} named: name {factor}, or change it first \
         with `strandline topic alter {} --replication-factor {asked}`", topic.as_str(), named(*.asked), topic
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
        "partition {partition} cannot go to {}, not alive and without a replica of it: start what is down first",
        Brokers(ids)
    )]
    Gone {
        /// Which.
        ids: Vec<BrokerId>,
        /// The partition, as `topic/number`.
        partition: String,
    },
    /// A broker that is being emptied would give its replicas away again.
    #[error(
        "no replica goes to {}, being drained: leave that out, or `strandline broker restore` it first",
        Brokers(ids)
    )]
    Draining {
        /// Which.
        ids: Vec<BrokerId>,
    },
    /// A broker whose disk is full would be filled further.
    #[error(
        "the disk of {} is full (broker.disk_full_percent), so no replica of partition {partition} goes there: leave it out, or free \
         space there",
        Brokers(ids)
    )]
    Full {
        /// Which.
        ids: Vec<BrokerId>,
        /// The partition, as `topic/number`.
        partition: String,
    },
    /// A broker that others cannot reach would never be in sync.
    #[error(
        "other brokers cannot reach {}, registered without an address for them, so no replica of partition {partition} goes there: leave \
         that out, or run the same version everywhere",
        Brokers(ids)
    )]
    Unreachable {
        /// Which.
        ids: Vec<BrokerId>,
        /// The partition, as `topic/number`.
        partition: String,
    },
    /// A broker would hold more replicas than it takes.
    #[error(transparent)]
    Bound(#[from] ReplicaBound),
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
    /// Orders one partition of a topic, or all, to these brokers, the preferred leader first. Of all, partition N gets the list rotated by
    /// N. A move that is under way is replaced; others begin when the controller has room for them.
    pub async fn reassign(
        &self,
        topic: &TopicName,
        partition: Option<u32>,
        replicas: &[BrokerId],
    ) -> Result<Vec<Ordered>, ReassignError> {
        let (topic, ids) = self.find(topic, partition)?;
        admit(&self.view.state(), &topic, replicas)?;
        check_bounds(&self.view.state(), &ids, replicas)?;
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
            let new = |refused: &dyn Fn(&BrokerValue) -> bool| {
                let refused = |id: &BrokerId| state.brokers().get(id).is_some_and(|known| refused(&known.value));
                let new = target.iter().copied().filter(|id| refused(id) && !value.replicas.contains(id));
                Some(new.collect::<Vec<_>>()).filter(|ids| !ids.is_empty())
            };
            if let Some(ids) = new(&|broker| broker.disk_full) {
                return Err(ReassignError::Full { ids, partition: self.spoken(id) });
            }
            if let Some(ids) = new(&|broker| is_unreachable(&state, broker)) {
                return Err(ReassignError::Unreachable { ids, partition: self.spoken(id) });
            }
            Ok(moved(value, &target))
        })
        .await
    }

    /// Partitions that are being moved, whoever ordered it, or wait for their turn: of one topic, one partition of it, or all.
    pub fn moving(&self, topic: Option<&TopicName>, partition: Option<u32>) -> Result<Vec<Ordered>, FindError> {
        let ids = match topic {
            None => self.everything(),
            Some(name) => self.find(name, partition)?.1,
        };
        let state = self.view.state();
        let known = ids.into_iter().filter_map(|id| Some((id, state.partition(id)?.partition.clone()?)));
        Ok(known
            .filter(|(_, known)| known.value.is_moving() || known.value.is_ordered())
            .map(|(id, known)| Ordered { id, value: known.value.clone(), revision: known.mod_revision, changed: false })
            .collect())
    }

    /// Every partition that counts, by topic name, once.
    pub(super) fn everything(&self) -> Vec<PartitionId> {
        let (state, mut seen) = (self.view.state(), BTreeSet::new());
        let topics = state.topics().values().map(|known| &known.value).filter(|topic| seen.insert(topic.id));
        topics.flat_map(|topic| (0..topic.partitions).map(|number| PartitionId::new(topic.id, number))).collect()
    }
}

/// So many brokers in a sentence.
fn named(asked: usize) -> String {
    if asked == 1 { "1 broker is".to_owned() } else { format!("{asked} brokers are") }
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

/// Whether brokers take what is ordered to them, with what they hold and what was ordered before. A replica that goes is there until the
/// move ends, so it counts.
fn check_bounds(state: &ViewState, ids: &[PartitionId], replicas: &[BrokerId]) -> Result<(), ReplicaBound> {
    let ids: BTreeSet<PartitionId> = ids.iter().copied().collect();
    let mut held: BTreeMap<BrokerId, (usize, bool)> = replicas.iter().map(|id| (*id, (0, false))).collect();
    for topic in state.topics().values() {
        for (number, entry) in state.partitions_of(&topic.value) {
            let Some(known) = &entry.partition else { continue };
            let is_ordered = ids.contains(&PartitionId::new(topic.value.id, number));
            let target = if is_ordered { replicas } else { &known.value.ordered };
            for (broker, (count, gains)) in &mut held {
                let has = known.value.replicas.contains(broker);
                *count += usize::from(has || target.contains(broker));
                *gains |= is_ordered && !has;
            }
        }
    }
    for (broker, (replicas, gains)) in held {
        let max = state.brokers().get(&broker).and_then(|known| known.value.max_replicas);
        if let Some(max) = max.and_then(|max| usize::try_from(max).ok()).filter(|max| gains && replicas > *max) {
            return Err(ReplicaBound { broker, replicas, max });
        }
    }
    Ok(())
}

/// The value with a move to `target` ordered; `None` when that is what it has, or is on its way to. What copies nothing is done at once,
/// and a move that takes the place of another one goes on in its place: only what is more to copy waits for its turn.
fn moved(value: &PartitionValue, target: &[BrokerId]) -> Option<PartitionValue> {
    let begun = value.begin_move(target).expect("the brokers are named once each, and there are some");
    let at_once = begun.adding.is_empty() || value.is_moving();
    let new = if at_once { begun.without_order() } else { value.order_move(target) };
    (new != *value).then_some(new)
}
