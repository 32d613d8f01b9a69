//! Elections on request: of the preferred leader, or of a replica that may lack committed records.

use std::cmp::Reverse;

use super::{ClusterOperations, IdList, OperationResult, TargetError, WriteError};
use crate::{
    cluster::{
        keys::BrokerState,
        metadata::MetadataSnapshot,
        partition_value::PartitionValue,
        store::{Compare, Revision},
    },
    model::{BrokerId, LeaderEpoch, Offset, PartitionId, TopicName},
};

/// Error of an election.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ElectError {
    /// The topic or partition does not exist.
    #[error(transparent)]
    Unknown(#[from] TargetError),
    /// The preferred replica cannot lead now.
    #[error(
        "broker {id}, the preferred leader of {partition}, cannot replace broker {leader}: {}; it is elected \
         automatically once that has passed", reason.describe()
    )]
    Unfit {
        /// The partition, as `topic/number`.
        partition: String,
        /// Id of the preferred leader.
        id: BrokerId,
        /// Id of the present leader.
        leader: BrokerId,
        /// Reason against the preferred leader.
        reason: PreferredLeaderIssue,
    },
    /// No replica that holds all committed records is live.
    #[error("no replica can lead {partition} without loss: {}", unclean_election_hint(waited))]
    Nobody {
        /// The partition, as `topic/number`.
        partition: String,
        /// Brokers that could lead if they were live. Empty if no replica is known to hold all committed records.
        waited: Vec<BrokerId>,
    },
    /// An unclean election of a partition that has a leader.
    #[error("broker {leader} leads {partition}: an unclean election would lose records without need")]
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
    #[error("broker {id} cannot lead {partition}: of its replicas, {} are online", IdList(alive))]
    NoReplica {
        /// The partition, as `topic/number`.
        partition: String,
        /// Id of the requested leader.
        id: BrokerId,
        /// Live replicas.
        alive: Vec<BrokerId>,
    },
    /// No replica is live, or none reports its position.
    #[error("no replica of {partition} responds, so none can lead: start {}", any_of(replicas))]
    Silent {
        /// The partition, as `topic/number`.
        partition: String,
        replicas: Vec<BrokerId>,
    },
    /// The partition changed since the operator confirmed the election.
    #[error("{partition} has changed since the confirmation: check it again")]
    Changed {
        /// The partition, as `topic/number`.
        partition: String,
    },
    /// The log of the requested broker is unusable or the broker does not respond, unlike at the operator's
    /// confirmation.
    #[error("the log of broker {id} for {partition} cannot be used now, or the broker does not respond: try again")]
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
pub enum PreferredLeaderIssue {
    /// The broker is not registered.
    Offline,
    /// The broker is not in the ISR.
    NotInSync,
    /// The broker is stopping or drained.
    ShuttingDown,
    /// The broker's disk is full.
    DiskFull,
}

impl PreferredLeaderIssue {
    const fn describe(self) -> &'static str {
        match self {
            Self::Offline => "it is offline",
            Self::NotInSync => "it is not in sync",
            Self::ShuttingDown => "it is stopping or drained",
            Self::DiskFull => "its disk is full",
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
fn unclean_election_hint(waited: &[BrokerId]) -> String {
    match waited {
        [] => "no replica is known to hold all committed records; elect with --unclean, which loses the records that \
             none holds"
            .to_owned(),
        _ => format!(
            "it waits for broker {}; start it, or, if it is offline permanently, elect with --unclean, which loses the \
             records that only it holds",
            IdList(waited)
        ),
    }
}

/// Returns one or several brokers as the object of a sentence.
fn any_of(replicas: &[BrokerId]) -> String {
    match replicas {
        [one] => format!("broker {one}"),
        many => format!("one of the brokers {}", IdList(many)),
    }
}

/// Position of a replica, as its broker reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplicaPosition {
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
pub struct UncleanCandidate {
    pub broker: BrokerId,
    /// Committed offsets that would be lost, as far as the replicas report them; `None` for no loss.
    pub loss: Option<LostOffsets>,
}

/// Range of committed offsets that would be lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LostOffsets {
    /// First lost offset.
    pub from: Offset,
    /// End of the range.
    pub to: Offset,
}

/// Returns the replica with the most data: the newest epoch first, then the longest log, then the position in
/// `replicas`. The loss is the range between that log and the highest high watermark of all replicas. Records below
/// `tiered_end` are in the object store and not lost.
pub fn successor(replicas: &[BrokerId], positions: &[ReplicaPosition], tiered_end: Offset) -> Option<UncleanCandidate> {
    let index = |id: BrokerId| replicas.iter().position(|other| *other == id);
    let best = positions.iter().filter(|position| index(position.broker).is_some());
    let best = best.max_by_key(|position| (position.last_epoch, position.log_end, Reverse(index(position.broker))))?;
    let committed = positions.iter().map(|position| position.high_watermark).max().unwrap_or(Offset::ZERO);
    let kept = best.log_end.max(tiered_end);
    let loss = (kept < committed).then_some(LostOffsets { from: kept, to: committed });
    Some(UncleanCandidate { broker: best.broker, loss })
}

impl ClusterOperations {
    /// Elects the preferred leader. If the partition has no live leader, elects the first replica that may lead.
    pub async fn elect(&self, topic: &TopicName, partition: u32) -> Result<OperationResult, ElectError> {
        let (topic, ids) = self.find(topic, Some(partition))?;
        let min_insync = self.min_insync(topic.known.value.id);
        let results = self.edit(&ids, |id, value, _| {
            let state = self.metadata.state();
            let live = |id| state.brokers().contains_key(&id);
            match clean(&state, value) {
                Ok(to) => Ok(value.elect(to, live, min_insync)),
                Err(ElectionRefusal::Unfit { id: preferred, leader, reason }) => {
                    Err(ElectError::Unfit { partition: self.display_name(id), id: preferred, leader, reason })
                }
                Err(ElectionRefusal::Nobody) => {
                    let waited = value.isr.iter().chain(&value.elr).copied().collect();
                    Err(ElectError::Nobody { partition: self.display_name(id), waited })
                }
            }
        });
        Ok(only_result(results.await?))
    }

    /// Returns a partition that no replica can lead without loss, as input of an unclean election.
    pub fn leaderless_partition(&self, topic: &TopicName, partition: u32) -> Result<OperationResult, ElectError> {
        let (_, ids) = self.find(topic, Some(partition))?;
        let edit = self.load_partitions(&ids)?.pop().expect("one partition was requested");
        self.needs_loss(edit.id, &edit.value)?;
        Ok(OperationResult { id: edit.id, value: edit.value, revision: edit.revision, changed: false })
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
    ) -> Result<OperationResult, ElectError> {
        let (_, ids) = self.find(topic, Some(partition))?;
        // A replica that could lead without loss may return at this moment and must lead then: compare its
        // registration.
        let guards = |value: &PartitionValue| {
            value.isr.iter().chain(&value.elr).map(|id| Compare::Absent(self.keys.broker(*id))).collect()
        };
        let results = self.edit_while(&ids, guards, |id, value, revision| {
            // An earlier attempt of the same operation.
            if value.leader == Some(to) && value.unclean_epoch == Some(value.leader_epoch) {
                return Ok(None);
            }
            if expect.is_some_and(|expect| expect != revision) {
                return Err(ElectError::Changed { partition: self.display_name(id) });
            }
            self.needs_loss(id, value)?;
            let state = self.metadata.state();
            let alive: Vec<BrokerId> =
                value.replicas.iter().copied().filter(|id| state.brokers().contains_key(id)).collect();
            if !alive.contains(&to) {
                return Err(ElectError::NoReplica { partition: self.display_name(id), id: to, alive });
            }
            Ok(value.elect_unclean(to, discard))
        });
        Ok(only_result(results.await?))
    }

    fn needs_loss(&self, id: PartitionId, value: &PartitionValue) -> Result<(), ElectError> {
        let state = self.metadata.state();
        let live = |id: BrokerId| state.brokers().contains_key(&id);
        if let Some(leader) = value.leader.filter(|leader| live(*leader)) {
            return Err(ElectError::Led { partition: self.display_name(id), leader });
        }
        match value.replicas.iter().copied().find(|id| value.may_elect(*id, live)) {
            Some(candidate) => Err(ElectError::Clean { partition: self.display_name(id), id: candidate }),
            None => Ok(()),
        }
    }
}

enum ElectionRefusal {
    Unfit { id: BrokerId, leader: BrokerId, reason: PreferredLeaderIssue },
    Nobody,
}

/// Returns the broker to elect without loss.
fn clean(state: &MetadataSnapshot, value: &PartitionValue) -> Result<BrokerId, ElectionRefusal> {
    let live = |id: BrokerId| state.brokers().contains_key(&id);
    let preferred = value.replicas[0];
    let Some(leader) = value.leader.filter(|leader| live(*leader)) else {
        let mut candidates = value.replicas.iter().copied().filter(|id| value.may_elect(*id, live));
        return candidates.next().ok_or(ElectionRefusal::Nobody);
    };
    let stopping = |id| state.brokers().get(&id).is_some_and(|broker| broker.value.state == BrokerState::Stopping);
    let reason = if leader == preferred {
        return Ok(preferred);
    } else if !live(preferred) {
        PreferredLeaderIssue::Offline
    } else if !value.isr.contains(&preferred) {
        PreferredLeaderIssue::NotInSync
    } else if stopping(preferred) || state.drains().contains_key(&preferred) {
        PreferredLeaderIssue::ShuttingDown
    } else if state.brokers().get(&preferred).is_some_and(|broker| broker.value.disk_full) {
        PreferredLeaderIssue::DiskFull
    } else {
        return Ok(preferred);
    };
    Err(ElectionRefusal::Unfit { id: preferred, leader, reason })
}

fn only_result(mut results: Vec<OperationResult>) -> OperationResult {
    results.pop().expect("one partition was requested")
}
