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
    /// The partition has a live leader, and the preferred leader cannot replace it now.
    #[error(
        "broker {id}, the preferred leader of {partition}, cannot replace broker {leader}: {}; it is elected \
         automatically once that has passed", reason.describe()
    )]
    PreferredNotEligible {
        /// The partition, as `topic/number`.
        partition: String,
        /// Id of the preferred leader.
        id: BrokerId,
        /// Id of the current leader.
        leader: BrokerId,
        /// Reason why the preferred leader is not eligible.
        reason: PreferredLeaderIssue,
    },
    /// The partition has no live leader, and no live replica is known to hold all committed records.
    #[error("no replica can lead {partition} without loss: {}", unclean_election_hint(waited_for))]
    NoCandidate {
        /// The partition, as `topic/number`.
        partition: String,
        /// Members of the ISR and the ELR, all offline: they could lead if they were live. Empty if no replica is known
        /// to hold all committed records.
        waited_for: Vec<BrokerId>,
    },
    /// An unclean election was requested for a partition that has a live leader.
    #[error("broker {leader} leads {partition}: an unclean election would lose records without need")]
    HasLeader {
        /// The partition, as `topic/number`.
        partition: String,
        /// Id of the leader.
        leader: BrokerId,
    },
    /// An unclean election was requested for a partition that can have a clean one.
    #[error("broker {id} can lead {partition} without loss: elect without --unclean")]
    CleanPossible {
        /// The partition, as `topic/number`.
        partition: String,
        /// Broker that can lead without loss.
        id: BrokerId,
    },
    /// The requested broker has no replica or is not live.
    #[error(
        "broker {id} cannot lead {partition}: it is offline or has no replica of the partition (online replicas: {}); \
         start it, or elect another replica",
        IdList(live)
    )]
    NotLiveReplica {
        /// The partition, as `topic/number`.
        partition: String,
        /// Id of the requested leader.
        id: BrokerId,
        /// Live replicas.
        live: Vec<BrokerId>,
    },
    /// An unclean election was requested, and no live replica reported a usable log. A replica with an unusable log may
    /// be elected instead. This requires that the object store has records of the partition and the brokers of all live
    /// replicas respond.
    #[error("no replica of {partition} reports a usable log, so none can lead: start {}", any_of(replicas))]
    NoResponse {
        /// The partition, as `topic/number`.
        partition: String,
        /// All replicas of the partition.
        replicas: Vec<BrokerId>,
    },
    /// The value of the partition is no longer the one for which the operator confirmed the unclean election.
    #[error("{partition} has changed since the confirmation: check it again")]
    Changed {
        /// The partition, as `topic/number`.
        partition: String,
    },
    /// The broker that the operator confirmed as the leader does not respond, or its log cannot be used now. At the
    /// confirmation it reported a usable log.
    #[error("the log of broker {id} for {partition} cannot be used now, or the broker does not respond: try again")]
    LogUnusable {
        /// The partition, as `topic/number`.
        partition: String,
        /// Id of the requested leader.
        id: BrokerId,
    },
    /// The value could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// Reason why the preferred leader is not eligible.
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
            Self::NoCandidate { .. } | Self::NoResponse { .. } => true,
            Self::Write(error) => error.retryable(),
            _ => false,
        }
    }
}

/// Returns the end of the error message `NoCandidate`: the operator's options. `waited_for` is the field of that error.
fn unclean_election_hint(waited_for: &[BrokerId]) -> String {
    match waited_for {
        [] => "no replica is known to hold all committed records; elect with --unclean, which loses the records that \
             none holds"
            .to_owned(),
        _ => format!(
            "the partition waits for {}; start it, or, if that is permanently impossible, elect with --unclean, which \
             loses the records that no other replica holds",
            any_of(waited_for)
        ),
    }
}

/// Formats a choice of brokers as the object of a sentence: `broker 1`, or `one of the brokers 1 and 2`.
fn any_of(replicas: &[BrokerId]) -> String {
    match replicas {
        [id] => format!("broker {id}"),
        ids => format!("one of the brokers {}", IdList(ids)),
    }
}

/// Position of a replica, as its broker reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplicaPosition {
    pub broker: BrokerId,
    /// Epoch of the last batch that the log ever had; `None` if it had none.
    pub last_epoch: Option<LeaderEpoch>,
    pub log_end: Offset,
    pub high_watermark: Offset,
}

/// Leader that an unclean election would choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UncleanCandidate {
    pub broker: BrokerId,
    /// Committed offsets that would be lost, according to the reported positions; `None` if no loss is known. Offline
    /// replicas may have more committed records.
    pub loss: Option<LostOffsets>,
}

/// Range of committed offsets that would be lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LostOffsets {
    /// First lost offset.
    pub from: Offset,
    /// End of the range; this offset is not lost.
    pub to: Offset,
}

/// Returns the best candidate of an unclean election. This is the replica whose last batch has the newest epoch, then
/// the one with the longest log, then the first in `replicas`. The loss starts at the log end of the candidate, or at
/// `tiered_end` if that is higher. The loss ends at the highest high watermark of all positions. Records below
/// `tiered_end` are in the object store. Returns `None` if no position is that of a replica in `replicas`.
pub fn best_unclean_candidate(
    replicas: &[BrokerId],
    positions: &[ReplicaPosition],
    tiered_end: Offset,
) -> Option<UncleanCandidate> {
    let index = |id: BrokerId| replicas.iter().position(|replica| *replica == id);
    let best = positions.iter().filter(|position| index(position.broker).is_some());
    let best = best.max_by_key(|position| (position.last_epoch, position.log_end, Reverse(index(position.broker))))?;
    let committed = positions.iter().map(|position| position.high_watermark).max().unwrap_or(Offset::ZERO);
    let remaining_end = best.log_end.max(tiered_end);
    let loss = (remaining_end < committed).then_some(LostOffsets { from: remaining_end, to: committed });
    Some(UncleanCandidate { broker: best.broker, loss })
}

impl ClusterOperations {
    /// Elects the preferred leader. If the partition has no live leader, elects the first replica that may lead without
    /// loss. Changes nothing if the preferred leader leads already. Fails if the preferred leader cannot replace a live
    /// leader, or if no live replica may lead without loss.
    pub async fn elect(&self, topic: &TopicName, partition: u32) -> Result<OperationResult, ElectError> {
        let (topic, ids) = self.find(topic, Some(partition))?;
        let min_insync = self.min_insync(topic.cached.value.id);
        let results = self.edit(&ids, |id, value, _| {
            let state = self.metadata.state();
            let is_live = |id| state.brokers().contains_key(&id);
            match choose_clean_leader(&state, value) {
                // `elect` returns `None` if the chosen replica leads already: the value stays.
                Ok(to) => Ok(value.elect(to, is_live, min_insync)),
                Err(ElectionRefusal::PreferredNotEligible { id: preferred, leader, reason }) => {
                    Err(ElectError::PreferredNotEligible {
                        partition: self.display_name(id),
                        id: preferred,
                        leader,
                        reason,
                    })
                }
                Err(ElectionRefusal::NoCandidate) => {
                    let waited_for = value.isr.iter().chain(&value.elr).copied().collect();
                    Err(ElectError::NoCandidate { partition: self.display_name(id), waited_for })
                }
            }
        });
        Ok(only_result(results.await?))
    }

    /// Returns the value of a partition from the metadata cache, as input of an unclean election. Fails if the
    /// partition has a live leader or a live replica that may lead without loss.
    pub fn leaderless_partition(&self, topic: &TopicName, partition: u32) -> Result<OperationResult, ElectError> {
        let (_, ids) = self.find(topic, Some(partition))?;
        let edit = self.load_partitions(&ids)?.pop().expect("one partition was requested");
        self.check_needs_unclean(edit.id, &edit.value)?;
        Ok(OperationResult { id: edit.id, value: edit.value, revision: edit.revision, changed: false })
    }

    /// Elects `to`, a live replica that may lack committed records. Succeeds without a write if this election is
    /// applied already. Otherwise requires that only an unclean election can give the partition a leader, and that the
    /// value has `expected_revision`, if that is given. With `discard`, the broker `to` deletes its log of the
    /// partition if the log is unusable.
    pub async fn elect_unclean(
        &self,
        topic: &TopicName,
        partition: u32,
        to: BrokerId,
        expected_revision: Option<Revision>,
        discard: bool,
    ) -> Result<OperationResult, ElectError> {
        let (_, ids) = self.find(topic, Some(partition))?;
        // An ISR or ELR member that has registered could lead without loss, and the metadata cache may not show its
        // registration yet. These compares then reject the election.
        let guards = |value: &PartitionValue| {
            value.isr.iter().chain(&value.elr).map(|id| Compare::Absent(self.keys.broker(*id))).collect()
        };
        let results = self.edit_with_guards(&ids, guards, |id, value, revision| {
            // This election is applied already, by an earlier attempt or an earlier request.
            if value.leader == Some(to) && value.unclean_epoch == Some(value.leader_epoch) {
                return Ok(None);
            }
            if expected_revision.is_some_and(|expected| expected != revision) {
                return Err(ElectError::Changed { partition: self.display_name(id) });
            }
            self.check_needs_unclean(id, value)?;
            let state = self.metadata.state();
            let live: Vec<BrokerId> =
                value.replicas.iter().copied().filter(|id| state.brokers().contains_key(id)).collect();
            if !live.contains(&to) {
                return Err(ElectError::NotLiveReplica { partition: self.display_name(id), id: to, live });
            }
            Ok(value.elect_unclean(to, discard))
        });
        Ok(only_result(results.await?))
    }

    /// Fails unless only an unclean election can give the partition a leader: it has no live leader, and no live
    /// replica may be elected cleanly.
    fn check_needs_unclean(&self, id: PartitionId, value: &PartitionValue) -> Result<(), ElectError> {
        let state = self.metadata.state();
        let is_live = |id: BrokerId| state.brokers().contains_key(&id);
        if let Some(leader) = value.leader.filter(|leader| is_live(*leader)) {
            return Err(ElectError::HasLeader { partition: self.display_name(id), leader });
        }
        match value.replicas.iter().copied().find(|id| value.may_elect(*id, is_live)) {
            Some(candidate) => Err(ElectError::CleanPossible { partition: self.display_name(id), id: candidate }),
            None => Ok(()),
        }
    }
}

/// Reason why a clean election on request has no broker to elect.
enum ElectionRefusal {
    /// The partition has a live leader, and the preferred leader `id` cannot replace it.
    PreferredNotEligible { id: BrokerId, leader: BrokerId, reason: PreferredLeaderIssue },
    /// The partition has no live leader, and no live replica may lead without loss.
    NoCandidate,
}

/// Returns the broker that a clean election on request elects. This is the preferred leader if the partition has a live
/// leader, and otherwise the first replica that may lead. The returned broker may lead already. Fails if no broker
/// satisfies this, or if the preferred leader cannot replace the live leader.
fn choose_clean_leader(state: &MetadataSnapshot, value: &PartitionValue) -> Result<BrokerId, ElectionRefusal> {
    let is_live = |id: BrokerId| state.brokers().contains_key(&id);
    let preferred = value.replicas[0];
    let Some(leader) = value.leader.filter(|leader| is_live(*leader)) else {
        let mut candidates = value.replicas.iter().copied().filter(|id| value.may_elect(*id, is_live));
        return candidates.next().ok_or(ElectionRefusal::NoCandidate);
    };
    let is_stopping = |id| state.brokers().get(&id).is_some_and(|broker| broker.value.state == BrokerState::Stopping);
    let reason = if leader == preferred {
        return Ok(preferred);
    } else if !is_live(preferred) {
        PreferredLeaderIssue::Offline
    } else if !value.isr.contains(&preferred) {
        PreferredLeaderIssue::NotInSync
    } else if is_stopping(preferred) || state.drains().contains_key(&preferred) {
        PreferredLeaderIssue::ShuttingDown
    } else if state.brokers().get(&preferred).is_some_and(|broker| broker.value.disk_full) {
        PreferredLeaderIssue::DiskFull
    } else {
        return Ok(preferred);
    };
    Err(ElectionRefusal::PreferredNotEligible { id: preferred, leader, reason })
}

/// Returns the only result of an operation on one partition.
fn only_result(mut results: Vec<OperationResult>) -> OperationResult {
    results.pop().expect("one partition was requested")
}
