//! Elections on request: of the preferred leader, or of a replica that may lack committed records.

use std::cmp::Reverse;

use super::{FindError, List, Ordered, Orders, WriteError};
use crate::{
    cluster::{
        keys::BrokerState,
        partition_value::PartitionValue,
        store::{Compare, Revision},
        view::ViewState,
    },
    model::{BrokerId, LeaderEpoch, Offset, PartitionId, TopicName},
};

/// Error of an election.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ElectError {
    /// The topic or partition does not exist.
    #[error(transparent)]
    Unknown(#[from] FindError),
    /// The preferred replica cannot lead now.
    #[error(
        "broker {id}, the preferred leader of {partition}, cannot take over from broker {leader}: {}; it leads again by \
         itself once that has passed", why.words()
    )]
    Unfit {
        /// The partition, as `topic/number`.
        partition: String,
        /// Id of the preferred leader.
        id: BrokerId,
        /// Id of the present leader.
        leader: BrokerId,
        /// Reason against the preferred leader.
        why: Unfit,
    },
    /// No replica that holds all committed records is live.
    #[error("nobody can lead {partition} without loss: {}", way_out(waited))]
    Nobody {
        /// The partition, as `topic/number`.
        partition: String,
        /// Brokers that could lead if they were live. Empty if no replica is known to hold all committed records.
        waited: Vec<BrokerId>,
    },
    /// An unclean election of a partition that has a leader.
    #[error("broker {leader} leads {partition}: an unclean election would lose records for nothing")]
    Led {
        /// The partition, as `topic/number`.
        partition: String,
        /// Id of the leader.
        leader: BrokerId,
    },
    /// An unclean election of a partition that can have a clean one.
    #[error("broker {id} can lead {partition} without loss: elect without --unclean")]
    Clean {
        /// The partition, as `topic/number`.
        partition: String,
        /// Broker that can lead without loss.
        id: BrokerId,
    },
    /// The requested broker has no replica or is not live.
    #[error("broker {id} cannot lead {partition}: of its replicas, {} are alive", List(alive))]
    NoReplica {
        /// The partition, as `topic/number`.
        partition: String,
        /// Id of the requested leader.
        id: BrokerId,
        /// Live replicas.
        alive: Vec<BrokerId>,
    },
    /// No replica is live, or none reports its position.
    #[error("no replica of {partition} answers, so none can lead: start {}", any_of(replicas))]
    Silent {
        /// The partition, as `topic/number`.
        partition: String,
        /// All replicas.
        replicas: Vec<BrokerId>,
    },
    /// The partition changed since the operator confirmed the election.
    #[error("{partition} has changed since you were asked: look again")]
    Changed {
        /// The partition, as `topic/number`.
        partition: String,
    },
    /// The log of the requested broker is unusable or the broker does not respond, unlike at the operator's
    /// confirmation.
    #[error("the log of broker {id} for {partition} cannot be used now, or it does not answer: look again")]
    Unusable {
        /// The partition, as `topic/number`.
        partition: String,
        /// Id of the requested leader.
        id: BrokerId,
    },
    /// The value could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// Reason why the preferred leader cannot be elected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// The broker is not registered.
    Gone,
    /// The broker is not in the ISR.
    Behind,
    /// The broker is stopping or drained.
    Leaving,
    /// The broker's disk is full.
    Full,
}

impl Unfit {
    const fn words(self) -> &'static str {
        match self {
            Self::Gone => "it is not alive",
            Self::Behind => "it is not in sync",
            Self::Leaving => "it is being stopped or drained",
            Self::Full => "its disk has no room for records",
        }
    }
}

impl ElectError {
    /// Returns true if the same operation may succeed later.
    pub const fn retryable(&self) -> bool {
        match self {
            Self::Nobody { .. } | Self::Silent { .. } => true,
            Self::Write(error) => error.retryable(),
            _ => false,
        }
    }
}

/// Returns what an operator can do if no replica may lead.
fn way_out(waited: &[BrokerId]) -> String {
    match waited {
        [] => {
            "no replica is known to hold everything; elect with --unclean and lose what none of them holds".to_owned()
        }
        _ => format!(
            "it waits for broker {}; start it, or, if it is gone for good, elect with --unclean and lose what only it holds",
            List(waited)
        ),
    }
}

/// Returns one or several brokers as the object of a sentence.
fn any_of(replicas: &[BrokerId]) -> String {
    match replicas {
        [one] => format!("broker {one}"),
        many => format!("one of the brokers {}", List(many)),
    }
}

/// Position of a replica, as its broker reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Id of the broker.
    pub broker: BrokerId,
    /// Epoch of the last batch; `None` for an empty log.
    pub last_epoch: Option<LeaderEpoch>,
    /// Log end of the replica.
    pub log_end: Offset,
    /// High watermark of the replica.
    pub high_watermark: Offset,
}

/// Leader that an unclean election would choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Successor {
    /// Id of the broker.
    pub broker: BrokerId,
    /// Committed offsets that would be lost, as far as the replicas report them; `None` for no loss.
    pub loss: Option<Loss>,
}

/// Range of committed offsets that would be lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loss {
    /// First lost offset.
    pub from: Offset,
    /// End of the range.
    pub to: Offset,
}

/// Returns the replica with the most data: the newest epoch first, then the longest log, then the position in
/// `replicas`. The loss is the range between that log and the highest high watermark of all replicas. Records below
/// `tiered_end` are in the object store and not lost.
pub fn successor(replicas: &[BrokerId], held: &[Held], tiered_end: Offset) -> Option<Successor> {
    let place = |id: BrokerId| replicas.iter().position(|other| *other == id);
    let best = held.iter().filter(|one| place(one.broker).is_some());
    let best = best.max_by_key(|one| (one.last_epoch, one.log_end, Reverse(place(one.broker))))?;
    let committed = held.iter().map(|one| one.high_watermark).max().unwrap_or(Offset::ZERO);
    let kept = best.log_end.max(tiered_end);
    let loss = (kept < committed).then_some(Loss { from: kept, to: committed });
    Some(Successor { broker: best.broker, loss })
}

impl Orders {
    /// Elects the preferred leader. If the partition has no live leader, elects the first replica that may lead.
    pub async fn elect(&self, topic: &TopicName, partition: u32) -> Result<Ordered, ElectError> {
        let (topic, ids) = self.find(topic, Some(partition))?;
        let min_insync = self.min_insync(topic.known.value.id);
        let ordered = self.edit(&ids, |id, value, _| {
            let state = self.view.state();
            let live = |id| state.brokers().contains_key(&id);
            match clean(&state, value) {
                Ok(to) => Ok(value.elect(to, live, min_insync)),
                Err(Refusal::Unfit { id: preferred, leader, why }) => {
                    Err(ElectError::Unfit { partition: self.spoken(id), id: preferred, leader, why })
                }
                Err(Refusal::Nobody) => {
                    let waited = value.isr.iter().chain(&value.elr).copied().collect();
                    Err(ElectError::Nobody { partition: self.spoken(id), waited })
                }
            }
        });
        Ok(one(ordered.await?))
    }

    /// Returns a partition that no replica can lead without loss, as input of an unclean election.
    pub fn forsaken(&self, topic: &TopicName, partition: u32) -> Result<Ordered, ElectError> {
        let (_, ids) = self.find(topic, Some(partition))?;
        let looked = self.look(&ids)?.pop().expect("one was asked for");
        self.needs_loss(looked.id, &looked.value)?;
        Ok(Ordered { id: looked.id, value: looked.value, revision: looked.revision, changed: false })
    }

    /// Elects a replica that may lack committed records. With `expect`, only if the partition still has that revision.
    /// With `discard`, the replica's log is deleted if it is unusable.
    pub async fn elect_unclean(
        &self,
        topic: &TopicName,
        partition: u32,
        to: BrokerId,
        expect: Option<Revision>,
        discard: bool,
    ) -> Result<Ordered, ElectError> {
        let (_, ids) = self.find(topic, Some(partition))?;
        // A replica that could lead without loss may return at this moment and must lead then: compare its
        // registration.
        let forsaken = |value: &PartitionValue| {
            value.isr.iter().chain(&value.elr).map(|id| Compare::Absent(self.keys.broker(*id))).collect()
        };
        let ordered = self.edit_while(&ids, forsaken, |id, value, revision| {
            // An earlier attempt of the same operation.
            if value.leader == Some(to) && value.unclean == Some(value.leader_epoch) {
                return Ok(None);
            }
            if expect.is_some_and(|expect| expect != revision) {
                return Err(ElectError::Changed { partition: self.spoken(id) });
            }
            self.needs_loss(id, value)?;
            let state = self.view.state();
            let alive: Vec<BrokerId> =
                value.replicas.iter().copied().filter(|id| state.brokers().contains_key(id)).collect();
            if !alive.contains(&to) {
                return Err(ElectError::NoReplica { partition: self.spoken(id), id: to, alive });
            }
            Ok(value.elect_unclean(to, discard))
        });
        Ok(one(ordered.await?))
    }

    fn needs_loss(&self, id: PartitionId, value: &PartitionValue) -> Result<(), ElectError> {
        let state = self.view.state();
        let live = |id: BrokerId| state.brokers().contains_key(&id);
        if let Some(leader) = value.leader.filter(|leader| live(*leader)) {
            return Err(ElectError::Led { partition: self.spoken(id), leader });
        }
        match value.replicas.iter().copied().find(|id| value.may_elect(*id, live)) {
            Some(fit) => Err(ElectError::Clean { partition: self.spoken(id), id: fit }),
            None => Ok(()),
        }
    }
}

enum Refusal {
    Unfit { id: BrokerId, leader: BrokerId, why: Unfit },
    Nobody,
}

/// Returns the broker to elect without loss.
fn clean(state: &ViewState, value: &PartitionValue) -> Result<BrokerId, Refusal> {
    let live = |id: BrokerId| state.brokers().contains_key(&id);
    let preferred = value.replicas[0];
    let Some(leader) = value.leader.filter(|leader| live(*leader)) else {
        let mut candidates = value.replicas.iter().copied().filter(|id| value.may_elect(*id, live));
        return candidates.next().ok_or(Refusal::Nobody);
    };
    let stopping = |id| state.brokers().get(&id).is_some_and(|known| known.value.state == BrokerState::Stopping);
    let why = if leader == preferred {
        return Ok(preferred);
    } else if !live(preferred) {
        Unfit::Gone
    } else if !value.isr.contains(&preferred) {
        Unfit::Behind
    } else if stopping(preferred) || state.drains().contains_key(&preferred) {
        Unfit::Leaving
    } else if state.brokers().get(&preferred).is_some_and(|known| known.value.no_room) {
        Unfit::Full
    } else {
        return Ok(preferred);
    };
    Err(Refusal::Unfit { id: preferred, leader, why })
}

fn one(mut ordered: Vec<Ordered>) -> Ordered {
    ordered.pop().expect("one partition was ordered")
}
