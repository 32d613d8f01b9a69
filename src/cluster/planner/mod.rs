//! The controller's plan: the changes that the cluster needs. A pure function of a metadata snapshot.
//!
//! # Overview
//!
//! A plan contains at most one change per partition, from the first rule that applies:
//!
//! 1. `elections`: a partition without a live leader gets one; if no replica can lead, its leader is cleared.
//! 2. `elections`: a leader that is stopping, drained or has a full disk transfers leadership.
//! 3. `reassignments`: a reassignment whose new replicas are in sync completes.
//! 4. `retarget`: a reassignment continues without permanently offline brokers.
//! 5. `reassignments`: a queued reassignment starts when the limits permit.
//! 6. `reassignments`: a changed replication factor is applied.
//! 7. `reassignments`: replicas of permanently offline or drained brokers are replaced, as many as possible.
//! 8. `reassignments`: a broker with many more replicas than another one moves a replica there.
//! 9. `elections`: leadership returns to the preferred leader.
//!
//! Every change is a compare-and-set, so a plan from a stale snapshot or a deposed controller costs only a failed
//! compare. There is no state between plans. Reassignments are stored in the partition values, so they survive a change
//! of the controller. If a change is not applied and still needed, the next plan contains it again.
//!
//! # Invariants
//!
//! - A change keeps the live members of the ISR. The only exception is the completion of a reassignment, which removes
//!   members that are in `removing`.
//! - Planning terminates: changes that are applied, with replicas that catch up, lead to a state without further
//!   changes.
//! - In a partition with a leader, no reassignment waits forever for a new replica on a permanently offline broker.
//! - No change adds a replica to a broker that is at its replica limit or unreachable for other brokers.

mod elections;
mod reassignments;
mod retarget;

use std::collections::{BTreeMap, BTreeSet};

use super::{
    keys::{BrokerState, TopicValue},
    metadata::MetadataSnapshot,
    partition_updates::PartitionUpdate,
    partition_value::PartitionValue,
    placement::is_unreachable,
    store::Revision,
};
use crate::model::{BrokerId, ConfigMap, PartitionId, TopicConfig};

/// Limits on concurrent changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlannerLimits {
    /// Maximum number of reassignments in progress in the cluster. A reassignment without a live ISR or ELR member does
    /// not count. One that copies nothing may start above the limit.
    pub max_reassignments: usize,
    /// Maximum number of new replicas on one broker in the counted reassignments.
    pub max_new_replicas_per_broker: usize,
    /// Maximum number of preferred leaders that one plan elects.
    pub max_preferred_elections: usize,
    /// Time, in milliseconds, after which the replicas of an offline broker are replaced; `None`: never.
    pub replace_after_ms: Option<u64>,
    /// True if replicas move to brokers with fewer replicas while no other reassignment starts or makes progress.
    pub balance: bool,
}

impl Default for PlannerLimits {
    fn default() -> Self {
        Self {
            max_reassignments: 8,
            max_new_replicas_per_broker: 2,
            max_preferred_elections: 50,
            replace_after_ms: Some(30 * 60 * 1000),
            balance: true,
        }
    }
}

/// Input of a plan.
#[derive(Clone, Copy, Debug)]
pub struct PlannerInput<'a> {
    /// Metadata snapshot.
    pub metadata: &'a MetadataSnapshot,
    /// Topic configuration defaults.
    pub defaults: &'a ConfigMap,
    /// Milliseconds for which unregistered brokers have been offline, as this controller has observed.
    pub offline_ms: &'a BTreeMap<BrokerId, u64>,
    /// Milliseconds for which registered brokers have been online.
    pub online_ms: &'a BTreeMap<BrokerId, u64>,
    /// Limits on concurrent changes.
    pub limits: PlannerLimits,
}

/// Reason for a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ChangeReason {
    /// The partition has no live leader; an ISR or ELR member is elected.
    Elected,
    /// The leader is not live, and no replica can lead: the leader is cleared.
    Leaderless,
    /// Leadership is transferred, because the leader is stopping, is drained, has a full disk, or its replica is being
    /// removed.
    ControlledShutdown,
    /// The new replicas of a reassignment are in sync.
    ReassignmentCompleted,
    /// A broker of the reassignment is permanently offline: the reassignment gets another target, or is reverted.
    ReassignmentRetargeted,
    /// A reassignment that an operator requested starts, because the limits permit it.
    ReassignmentStarted,
    /// The topic's replication factor was changed.
    ReplicationFactor,
    /// A replica's broker is permanently offline.
    BrokerReplaced,
    /// A replica's broker is drained.
    Drained,
    /// Leadership returns to the preferred leader, which can lead again.
    PreferredLeader,
    /// A replica moves to a broker with fewer replicas.
    Balanced,
}

impl ChangeReason {
    /// Returns the label of the reason, for metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Elected => "elected",
            Self::Leaderless => "leaderless",
            Self::ControlledShutdown => "controlled_shutdown",
            Self::ReassignmentCompleted => "reassignment_completed",
            Self::ReassignmentRetargeted => "reassignment_retargeted",
            Self::ReassignmentStarted => "reassignment_started",
            Self::ReplicationFactor => "replication_factor",
            Self::BrokerReplaced => "broker_replaced",
            Self::Drained => "drained",
            Self::PreferredLeader => "preferred_leader",
            Self::Balanced => "balanced",
        }
    }

    /// Returns the metrics label of the election's cause; `None` if the change is no election.
    pub const fn election(self) -> Option<&'static str> {
        match self {
            Self::Elected => Some("failed"),
            Self::ControlledShutdown => Some("controlled_shutdown"),
            Self::PreferredLeader => Some("preferred"),
            _ => None,
        }
    }
}

/// One change of one partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedChange {
    /// The compare-and-set to apply.
    pub update: PartitionUpdate,
    /// Reason for the change.
    pub reason: ChangeReason,
}

/// Reason that blocks a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockedReason {
    /// No live replica may lead without loss.
    NoLeader,
    /// Too few brokers can take the replicas that the partition needs.
    NoBrokers,
    /// A broker of the queued reassignment is offline, unreachable for other brokers, or at its replica limit.
    QueuedTarget,
}

/// The changes that the cluster needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClusterPlan {
    /// Changes in the order in which they are written: elections and transfers first, preferred leaders last. At most
    /// one per partition.
    pub changes: Vec<PlannedChange>,
    /// Partitions that are blocked, with the reason.
    pub blocked: Vec<(PartitionId, BlockedReason)>,
    /// Milliseconds after which a new plan is needed even if the metadata does not change; `None` if none is.
    pub next_plan_ms: Option<u64>,
}

/// One partition as input of the rules.
#[derive(Clone, Copy)]
struct PartitionCase<'a> {
    id: PartitionId,
    topic: &'a TopicValue,
    value: &'a PartitionValue,
    /// Revision of the value.
    revision: Revision,
    /// Min ISR of the topic.
    min_insync: usize,
}

impl PartitionCase<'_> {
    /// Returns the change that writes a new value of this partition.
    fn change_to(&self, value: PartitionValue, reason: ChangeReason) -> PlannedChange {
        PlannedChange {
            update: PartitionUpdate { id: self.id, expected_revision: self.revision, value, guards: Vec::new() },
            reason,
        }
    }

    const fn is_reassigning(&self) -> bool {
        self.value.is_reassigning()
    }
}

impl PlannerInput<'_> {
    /// Returns true if the broker is registered.
    fn is_live(&self, id: BrokerId) -> bool {
        self.metadata.brokers().contains_key(&id)
    }

    /// Returns true if a broker has been offline for `replace_after_ms`; always false if that is `None`. If the broker
    /// is offline for less time, requests a plan at the end of that time.
    fn is_lost(&self, id: BrokerId, plan: &mut ClusterPlan) -> bool {
        let (Some(after_ms), false) = (self.limits.replace_after_ms, self.is_live(id)) else { return false };
        let offline_ms = self.offline_ms.get(&id).copied().unwrap_or(0);
        if offline_ms < after_ms {
            plan.request_plan_in(after_ms - offline_ms);
        }
        offline_ms >= after_ms
    }

    /// Returns true if a broker counts as permanently offline: it is lost ([`Self::is_lost`]), or offline and drained.
    fn is_permanently_offline(&self, id: BrokerId, plan: &mut ClusterPlan) -> bool {
        self.is_lost(id, plan) || self.is_draining(id) && !self.is_live(id)
    }

    /// Returns the broker's rack. A broker without a rack, or offline, shares a rack with no other broker.
    fn rack(&self, id: BrokerId) -> Option<&str> {
        self.metadata.brokers().get(&id)?.value.rack.as_deref()
    }

    /// Returns true if one of the brokers in `others` is in the rack of `id`.
    fn shares_rack(&self, id: BrokerId, others: &[BrokerId]) -> bool {
        self.rack(id).is_some_and(|rack| others.iter().any(|other| self.rack(*other) == Some(rack)))
    }

    /// Returns true if the broker's registration shows that it shuts down.
    fn is_stopping(&self, id: BrokerId) -> bool {
        self.metadata.brokers().get(&id).is_some_and(|broker| broker.value.state == BrokerState::Stopping)
    }

    /// Returns true if an operator requested a drain of the broker.
    fn is_draining(&self, id: BrokerId) -> bool {
        self.metadata.drains().contains_key(&id)
    }

    /// Returns true if the broker is live and other brokers can reach it.
    fn is_reachable(&self, id: BrokerId) -> bool {
        self.metadata.brokers().get(&id).is_some_and(|broker| !is_unreachable(self.metadata, &broker.value))
    }

    /// Returns true if the broker's disk is full.
    fn is_disk_full(&self, id: BrokerId) -> bool {
        self.metadata.brokers().get(&id).is_some_and(|broker| broker.value.disk_full)
    }

    /// Returns true if the broker should lead: it is live, not stopping, not drained, and its disk is not full. Any
    /// other live broker is elected only for a partition without a live leader that no such broker can lead.
    fn should_lead(&self, id: BrokerId) -> bool {
        self.is_live(id) && !self.is_stopping(id) && !self.is_draining(id) && !self.is_disk_full(id)
    }
}

impl ClusterPlan {
    /// Requests a new plan after this time, unless an earlier one is requested already.
    fn request_plan_in(&mut self, delay_ms: u64) {
        self.next_plan_ms = Some(self.next_plan_ms.map_or(delay_ms, |requested_ms| requested_ms.min(delay_ms)));
    }
}

/// Computes the changes that the cluster needs. Elections, transfers of leadership and completions of reassignments are
/// not limited. The other partitions then get reassignments within the limits, and at last preferred leaders.
pub fn plan(input: &PlannerInput<'_>) -> ClusterPlan {
    let mut plan = ClusterPlan::default();
    let (mut remaining, mut topic_ids) = (Vec::new(), BTreeSet::new());
    // Two names have one topic id if a topic's value was copied to another name: use the first.
    for entry in input.metadata.topics().values().filter(|entry| topic_ids.insert(entry.value.id)) {
        let (topic, min_insync) = (&entry.value, min_insync(input, &entry.value));
        for (number, entry) in input.metadata.partitions_of(topic) {
            let Some(partition) = &entry.partition else { continue };
            let (id, revision) = (PartitionId::new(topic.id, number), partition.mod_revision);
            let case = PartitionCase { id, topic, value: &partition.value, revision, min_insync };
            let unlimited = elections::elect(input, &case, &mut plan.blocked)
                .or_else(|| elections::transfer_leadership(input, &case))
                .or_else(|| reassignments::complete(input, &case));
            match unlimited {
                Some(change) => plan.changes.push(change),
                None => remaining.push(case),
            }
        }
    }
    // The variants of `ChangeReason` are declared in the order of their importance.
    plan.changes.sort_by_key(|change| change.reason);
    let changed = reassignments::plan_all(input, &remaining, &mut plan);
    // If this plan elects or clears a leader because a broker is offline, leadership returns to preferred leaders only
    // in a later plan.
    if plan.changes.iter().all(|change| change.reason > ChangeReason::Leaderless) {
        elections::return_to_preferred_leaders(input, &remaining, &changed, &mut plan);
    }
    plan
}

/// Returns the min ISR of the topic. If the topic's configuration is unreadable, the result exceeds any ISR, so every
/// removed member enters the ELR.
fn min_insync(input: &PlannerInput<'_>, topic: &TopicValue) -> usize {
    TopicConfig::resolve(input.defaults, &topic.config).map_or(usize::MAX, |config| config.min_insync_replicas)
}

#[cfg(test)]
mod tests;
