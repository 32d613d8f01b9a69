//! Who is to lead: the preferred replica again, or, by an operator's word, one that may lack committed records.

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

/// Why nobody was elected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ElectError {
    /// No such topic or partition.
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
        /// The preferred replica.
        id: BrokerId,
        /// Who leads.
        leader: BrokerId,
        /// What is against it.
        why: Unfit,
    },
    /// Nobody who holds all that is committed is there.
    #[error("nobody can lead {partition} without loss: {}", way_out(waited))]
    Nobody {
        /// The partition, as `topic/number`.
        partition: String,
        /// Who could lead if it were there. Nobody where no replica is known to hold all that is committed.
        waited: Vec<BrokerId>,
    },
    /// An unclean election of a partition that has a leader.
    #[error("broker {leader} leads {partition}: an unclean election would lose records for nothing")]
    Led {
        /// The partition, as `topic/number`.
        partition: String,
        /// Who leads it.
        leader: BrokerId,
    },
    /// An unclean election of a partition that needs none.
    #[error("broker {id} can lead {partition} without loss: elect without --unclean")]
    Clean {
        /// The partition, as `topic/number`.
        partition: String,
        /// Who can.
        id: BrokerId,
    },
    /// It holds no replica, or is not alive.
    #[error("broker {id} cannot lead {partition}: of its replicas, {} are alive", List(alive))]
    NoReplica {
        /// The partition, as `topic/number`.
        partition: String,
        /// Who was to lead.
        id: BrokerId,
        /// Replicas that are alive.
        alive: Vec<BrokerId>,
    },
    /// No replica is alive, or none says what it holds.
    #[error("no replica of {partition} answers, so none can lead: start {}", any_of(replicas))]
    Silent {
        /// The partition, as `topic/number`.
        partition: String,
        /// All replicas.
        replicas: Vec<BrokerId>,
    },
    /// It is not as it was when that was agreed to.
    #[error("{partition} has changed since you were asked: look again")]
    Changed {
        /// The partition, as `topic/number`.
        partition: String,
    },
    /// Its log cannot be used now, which was not known, or could not be asked, when that was agreed to.
    #[error("the log of broker {id} for {partition} cannot be used now, or it does not answer: look again")]
    Unusable {
        /// The partition, as `topic/number`.
        partition: String,
        /// Who was to lead.
        id: BrokerId,
    },
    /// The values could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// What is against a broker that is preferred.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// It is not registered.
    Gone,
    /// It does not hold all that is committed yet.
    Behind,
    /// It is being stopped, or emptied.
    Leaving,
    /// Its disk took no more records.
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
    /// Whether the same order may succeed later.
    pub const fn retryable(&self) -> bool {
        match self {
            Self::Nobody { .. } | Self::Silent { .. } => true,
            Self::Write(error) => error.retryable(),
            _ => false,
        }
    }
}

/// What an operator can do where nobody may lead.
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

/// One of these brokers, in a sentence.
fn any_of(replicas: &[BrokerId]) -> String {
    match replicas {
        [one] => format!("broker {one}"),
        many => format!("one of the brokers {}", List(many)),
    }
}

/// What a replica holds, as its broker says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// The broker.
    pub broker: BrokerId,
    /// The epoch of its last batch; none in an empty log.
    pub last_epoch: Option<LeaderEpoch>,
    /// Its log end.
    pub log_end: Offset,
    /// What it knows as committed.
    pub high_watermark: Offset,
}

/// Who would lead after an unclean election.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Successor {
    /// The broker.
    pub broker: BrokerId,
    /// What would be lost, as far as can be known.
    pub loss: Option<Loss>,
}

/// Offsets that were committed and would be lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loss {
    /// The first.
    pub from: Offset,
    /// The end.
    pub to: Offset,
}

/// The replica that holds most: the newest epoch first, then the longest log, then the first of `replicas`. What any replica knows as
/// committed and this one has not is lost, but for what lies in the bucket, below `tiered_end`.
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
    /// Has the preferred replica lead. Where nobody leads, the first that may.
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

    /// A partition that nobody can lead without loss, as an unclean election would find it.
    pub fn forsaken(&self, topic: &TopicName, partition: u32) -> Result<Ordered, ElectError> {
        let (_, ids) = self.find(topic, Some(partition))?;
        let looked = self.look(&ids)?.pop().expect("one was asked for");
        self.needs_loss(looked.id, &looked.value)?;
        Ok(Ordered { id: looked.id, value: looked.value, revision: looked.revision, changed: false })
    }

    /// Has a replica lead that may lack committed records; with `expect` only if the partition is still as it was at that revision. With
    /// `discard` its log goes, if that cannot be used.
    pub async fn elect_unclean(
        &self,
        topic: &TopicName,
        partition: u32,
        to: BrokerId,
        expect: Option<Revision>,
        discard: bool,
    ) -> Result<Ordered, ElectError> {
        let (_, ids) = self.find(topic, Some(partition))?;
        // Whoever could lead without loss and comes back at this moment leads: its registration is compared.
        let forsaken = |value: &PartitionValue| {
            value.isr.iter().chain(&value.elr).map(|id| Compare::Absent(self.keys.broker(*id))).collect()
        };
        let ordered = self.edit_while(&ids, forsaken, |id, value, revision| {
            // An earlier try of this very order.
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

/// Who is to lead without loss.
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
