//! The controller's plan: the changes that the cluster needs. A pure function of a metadata snapshot.
//!
//! # Overview
//!
//! A plan contains at most one change per partition, from the first rule that applies:
//!
//! 1. `lead`: a partition whose leader is gone gets a leader.
//! 2. `lead`: leaders that are stopping, drained or have a full disk transfer leadership.
//! 3. `moves`: a reassignment whose new replicas are in sync completes.
//! 4. `redirect`: a reassignment continues without brokers that are gone permanently.
//! 5. `moves`: a queued reassignment starts when the limits permit.
//! 6. `moves`: a changed replication factor is applied.
//! 7. `moves`: replicas of brokers that are gone permanently or drained are replaced, as far as there are brokers.
//! 8. `lead`: leadership returns to the preferred leader.
//! 9. `moves`: a broker with many more replicas than another one moves a replica there.
//!
//! Every change is a compare-and-set, so a plan from a stale snapshot or a deposed controller costs only a failed
//! compare. There is no state between plans. Reassignments are stored in the partition values, so they survive a change
//! of the controller, and the next plan contains again whatever this plan does not achieve.
//!
//! # Invariants
//!
//! - A change keeps the live members of the ISR; only the completion of a reassignment removes one, and only one in
//!   `removing`.
//! - Planning terminates: changes that are applied, with replicas that catch up, lead to a state without further
//!   changes.
//! - No reassignment waits for a broker that is gone permanently.
//! - No change assigns a replica to a broker that is at its replica limit or unreachable for other brokers.

mod lead;
mod moves;
mod redirect;

use std::collections::{BTreeMap, BTreeSet};

use super::{
    changes::Change,
    keys::{BrokerState, TopicValue},
    partition_value::PartitionValue,
    placement::is_unreachable,
    store::Revision,
    view::ViewState,
};
use crate::model::{BrokerId, ConfigMap, PartitionId, TopicConfig};

/// Limits on concurrent changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Maximum number of partitions under reassignment in the cluster.
    pub moves: usize,
    /// Maximum number of new replicas per broker in these reassignments.
    pub moves_to_one: usize,
    /// Maximum number of leaderships that return to preferred leaders in one plan.
    pub leaders: usize,
    /// Time, in milliseconds, after which the replicas of an offline broker are replaced; `None`: never.
    pub replace_after_ms: Option<u64>,
    /// True if replicas move to less loaded brokers.
    pub balance: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self { moves: 8, moves_to_one: 2, leaders: 50, replace_after_ms: Some(30 * 60 * 1000), balance: true }
    }
}

/// Input of a plan.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// Metadata snapshot.
    pub view: &'a ViewState,
    /// Topic configuration defaults.
    pub defaults: &'a ConfigMap,
    /// Milliseconds for which unregistered brokers have been offline, as this controller has observed.
    pub gone_ms: &'a BTreeMap<BrokerId, u64>,
    /// Milliseconds for which registered brokers have been online.
    pub up_ms: &'a BTreeMap<BrokerId, u64>,
    /// Limits on concurrent changes.
    pub limits: Limits,
}

/// Reason for a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Why {
    /// The leader is gone; another ISR or ELR member is elected.
    Elected,
    /// The leader is gone, and no other replica can lead.
    Leaderless,
    /// The leader is stopping, drained, has a full disk, or its replica is being removed.
    HandedOver,
    /// The new replicas of a reassignment are in sync.
    MoveEnded,
    /// A broker of the reassignment is gone permanently: the reassignment gets another target, or is reverted.
    Redirected,
    /// An operator requested it, and the limits permit it.
    Ordered,
    /// The topic's replication factor was changed.
    Factor,
    /// A replica's broker is gone permanently.
    Replaced,
    /// A replica's broker is drained.
    Drained,
    /// The preferred leader can lead again.
    Preferred,
    /// The broker of the replica held more replicas than others.
    Balanced,
}

impl Why {
    /// Returns the label of the reason, for metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Elected => "elected",
            Self::Leaderless => "leaderless",
            Self::HandedOver => "handed_over",
            Self::MoveEnded => "move_ended",
            Self::Redirected => "redirected",
            Self::Ordered => "ordered",
            Self::Factor => "factor",
            Self::Replaced => "replaced",
            Self::Drained => "drained",
            Self::Preferred => "preferred",
            Self::Balanced => "balanced",
        }
    }

    /// Returns the label of the election's cause; `None` if the change is no election.
    pub const fn election(self) -> Option<&'static str> {
        match self {
            Self::Elected => Some("failed"),
            Self::HandedOver => Some("handover"),
            Self::Preferred => Some("preferred"),
            _ => None,
        }
    }
}

/// One change of one partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The compare-and-set to apply.
    pub change: Change,
    /// Reason for the change.
    pub why: Why,
}

/// Reason that blocks a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// No replica that may lead is live.
    ForLeader,
    /// Too few brokers can take its replicas.
    ForBrokers,
    /// A broker of the queued reassignment is offline, unreachable for other brokers, or at its replica limit.
    ForOrdered,
}

/// The changes that the cluster needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Changes, the most important first; at most one per partition.
    pub steps: Vec<Step>,
    /// Partitions that are blocked, with the reason.
    pub waiting: Vec<(PartitionId, Waiting)>,
    /// Milliseconds until the next plan if nothing changes before.
    pub again_in_ms: Option<u64>,
}

/// One partition as input of the rules.
#[derive(Clone, Copy)]
struct Subject<'a> {
    id: PartitionId,
    topic: &'a TopicValue,
    value: &'a PartitionValue,
    revision: Revision,
    min_insync: usize,
}

impl Subject<'_> {
    fn step(&self, value: PartitionValue, why: Why) -> Step {
        Step { change: Change { id: self.id, expect: self.revision, value, also: Vec::new() }, why }
    }

    const fn is_moving(&self) -> bool {
        self.value.is_moving()
    }
}

impl Input<'_> {
    fn is_live(&self, id: BrokerId) -> bool {
        self.view.brokers().contains_key(&id)
    }

    /// Returns true if a broker is offline for longer than `replace_after_ms`.
    fn is_lost(&self, id: BrokerId, plan: &mut Plan) -> bool {
        let (Some(after_ms), false) = (self.limits.replace_after_ms, self.is_live(id)) else { return false };
        let gone_ms = self.gone_ms.get(&id).copied().unwrap_or(0);
        if gone_ms < after_ms {
            plan.again_in(after_ms - gone_ms);
        }
        gone_ms >= after_ms
    }

    /// Returns true if a broker is gone permanently: offline for too long, or offline and drained.
    fn is_gone_for_good(&self, id: BrokerId, plan: &mut Plan) -> bool {
        self.is_lost(id, plan) || self.is_draining(id) && !self.is_live(id)
    }

    /// A broker without a rack, or offline, shares a rack with no other broker.
    fn rack(&self, id: BrokerId) -> Option<&str> {
        self.view.brokers().get(&id)?.value.rack.as_deref()
    }

    fn shares_rack(&self, id: BrokerId, others: &[BrokerId]) -> bool {
        self.rack(id).is_some_and(|own| others.iter().any(|other| self.rack(*other) == Some(own)))
    }

    fn is_stopping(&self, id: BrokerId) -> bool {
        self.view.brokers().get(&id).is_some_and(|known| known.value.state == BrokerState::Stopping)
    }

    fn is_draining(&self, id: BrokerId) -> bool {
        self.view.drains().contains_key(&id)
    }

    /// Returns true if the broker is live and other brokers can reach it.
    fn is_reachable(&self, id: BrokerId) -> bool {
        self.view.brokers().get(&id).is_some_and(|known| !is_unreachable(self.view, &known.value))
    }

    /// Returns true if the broker's disk is full.
    fn is_without_room(&self, id: BrokerId) -> bool {
        self.view.brokers().get(&id).is_some_and(|known| known.value.no_room)
    }

    /// Returns true if the broker may get leadership without need.
    fn may_lead(&self, id: BrokerId) -> bool {
        self.is_live(id) && !self.is_stopping(id) && !self.is_draining(id) && !self.is_without_room(id)
    }
}

impl Plan {
    /// Requests a plan after this time, or sooner.
    fn again_in(&mut self, ms: u64) {
        self.again_in_ms = Some(self.again_in_ms.map_or(ms, |known| known.min(ms)));
    }
}

/// Computes the changes that the cluster needs.
pub fn plan(input: &Input<'_>) -> Plan {
    let mut plan = Plan::default();
    let (mut settled, mut seen) = (Vec::new(), BTreeSet::new());
    // A value that was copied to another name gives two topics one id.
    for known in input.view.topics().values().filter(|known| seen.insert(known.value.id)) {
        let (topic, min_insync) = (&known.value, min_insync(input, &known.value));
        for (number, entry) in input.view.partitions_of(topic) {
            let Some(known) = &entry.partition else { continue };
            let (id, revision) = (PartitionId::new(topic.id, number), known.mod_revision);
            let subject = Subject { id, topic, value: &known.value, revision, min_insync };
            let pressing = lead::elect(input, &subject, &mut plan.waiting)
                .or_else(|| lead::hand_over(input, &subject))
                .or_else(|| moves::end(input, &subject));
            match pressing {
                Some(step) => plan.steps.push(step),
                None => settled.push(subject),
            }
        }
    }
    plan.steps.sort_by_key(|step| step.why);
    let moved = moves::begin(input, &settled, &mut plan);
    if plan.steps.iter().all(|step| step.why > Why::Leaderless) {
        lead::prefer(input, &settled, &moved, &mut plan);
    }
    plan
}

/// Returns the min ISR of the topic. If its configuration is unreadable, the result exceeds any ISR, so every removed
/// member enters the ELR.
fn min_insync(input: &Input<'_>, topic: &TopicValue) -> usize {
    TopicConfig::resolve(input.defaults, &topic.config).map_or(usize::MAX, |config| config.min_insync_replicas)
}

#[cfg(test)]
mod tests;
