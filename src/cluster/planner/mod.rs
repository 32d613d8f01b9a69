//! The controller's plan: what is to be changed of a cluster as it stands. A pure function of the view.
//!
//! # Overview
//!
//! A plan holds at most one step of a partition, the first that applies:
//!
//! 1. `lead`: somebody must lead a partition whose leader is gone.
//! 2. `lead`: leaders that are being stopped or drained, or whose disk took no more records, hand over.
//! 3. `moves`: a move whose new replicas are in sync ends.
//! 4. `redirect`: a move goes on without brokers that are gone for good.
//! 5. `moves`: an operator's order to move begins when it is its turn.
//! 6. `moves`: a topic's replication factor was changed.
//! 7. `moves`: replicas of brokers that are gone for good, or drained, are replaced, as many as there are brokers for.
//! 8. `lead`: leadership goes back to the preferred replica.
//! 9. `moves`: a broker that holds much more than another one gives.
//!
//! Every step is a compare-and-set, so a plan that was made from an old view, or by a controller that is none any more, costs a
//! refusal and nothing else. There is no state between plans: moves are in the partitions' values, so they survive a change of
//! controller, and what is not done in this plan is found again by the next.
//!
//! # Invariants
//!
//! - A step keeps the in-sync replicas that are alive; only the end of a move takes out one, and only one that the move takes away.
//! - Steps end: carried out, with replicas that catch up, they lead to a state that needs none.
//! - No move waits for a broker that is gone for good.
//! - No step gives a replica to a broker that holds as many as it takes, or that other brokers cannot reach.

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

/// How much is moved at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Partitions whose replicas are being moved, over the cluster.
    pub moves: usize,
    /// Of these, new replicas on one broker.
    pub moves_to_one: usize,
    /// Leaderships that go back to preferred replicas in one plan.
    pub leaders: usize,
    /// How long a broker is gone before its replicas are replaced, in milliseconds; `None`: never.
    pub replace_after_ms: Option<u64>,
    /// Whether partitions move to brokers that hold less.
    pub balance: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self { moves: 8, moves_to_one: 2, leaders: 50, replace_after_ms: Some(30 * 60 * 1000), balance: true }
    }
}

/// What a plan is made from.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// The cluster.
    pub view: &'a ViewState,
    /// What topics have that set nothing else.
    pub defaults: &'a ConfigMap,
    /// How long brokers that are not registered have been gone, in milliseconds, as far as this controller knows.
    pub gone_ms: &'a BTreeMap<BrokerId, u64>,
    /// How long the registered ones have been there, in milliseconds.
    pub up_ms: &'a BTreeMap<BrokerId, u64>,
    /// How much is moved at the same time.
    pub limits: Limits,
}

/// Why a step is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Why {
    /// The leader is gone; another in-sync or eligible replica leads.
    Elected,
    /// The leader is gone, and so is everybody else who could lead.
    Leaderless,
    /// The leader is being stopped or drained, or has no room for records, or its replica is moved away.
    HandedOver,
    /// A move's new replicas are in sync.
    MoveEnded,
    /// A broker of the move under way is gone for good: it goes elsewhere, or back.
    Redirected,
    /// An operator ordered it, and it is its turn.
    Ordered,
    /// The topic's replication factor was changed.
    Factor,
    /// A replica's broker is gone for good.
    Replaced,
    /// A replica's broker is drained.
    Drained,
    /// The preferred replica can lead again.
    Preferred,
    /// Its broker held more than others.
    Balanced,
}

impl Why {
    /// The rule in a word, for figures.
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

    /// What made an election necessary; `None` for a step that elects nobody.
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
    /// What is written.
    pub change: Change,
    /// Why.
    pub why: Why,
}

/// What keeps a partition from being as it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// Nobody who may lead is there.
    ForLeader,
    /// There are too few brokers that take its replicas.
    ForBrokers,
    /// A broker that it was ordered to is not there, cannot be reached by other brokers, or holds as many replicas as it takes.
    ForOrdered,
}

/// What is to be done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Steps, those that matter most first. At most one of each partition.
    pub steps: Vec<Step>,
    /// Partitions that wait for something else.
    pub waiting: Vec<(PartitionId, Waiting)>,
    /// When to plan again though nothing changed, in milliseconds.
    pub again_in_ms: Option<u64>,
}

/// One partition as the rules see it.
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

    /// Whether a broker is gone for longer than its replicas wait for it.
    fn is_lost(&self, id: BrokerId, plan: &mut Plan) -> bool {
        let (Some(after_ms), false) = (self.limits.replace_after_ms, self.is_live(id)) else { return false };
        let gone_ms = self.gone_ms.get(&id).copied().unwrap_or(0);
        if gone_ms < after_ms {
            plan.again_in(after_ms - gone_ms);
        }
        gone_ms >= after_ms
    }

    /// Whether nobody waits for it any more: it is gone for so long, or gone and to be emptied.
    fn is_gone_for_good(&self, id: BrokerId, plan: &mut Plan) -> bool {
        self.is_lost(id, plan) || self.is_draining(id) && !self.is_live(id)
    }

    /// A broker that names no rack, or is gone, shares one with nobody.
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

    /// True if the broker is there and other brokers can reach it.
    fn is_reachable(&self, id: BrokerId) -> bool {
        self.view.brokers().get(&id).is_some_and(|known| !is_unreachable(self.view, &known.value))
    }

    /// Whether its disk took no more records.
    fn is_without_room(&self, id: BrokerId) -> bool {
        self.view.brokers().get(&id).is_some_and(|known| known.value.no_room)
    }

    /// Whether leadership may be given to it when nothing presses.
    fn may_lead(&self, id: BrokerId) -> bool {
        self.is_live(id) && !self.is_stopping(id) && !self.is_draining(id) && !self.is_without_room(id)
    }
}

impl Plan {
    /// Plans again after this time, or sooner.
    fn again_in(&mut self, ms: u64) {
        self.again_in_ms = Some(self.again_in_ms.map_or(ms, |known| known.min(ms)));
    }
}

/// What is to be done about the cluster as it stands.
pub fn plan(input: &Input<'_>) -> Plan {
    let mut plan = Plan::default();
    let (mut settled, mut seen) = (Vec::new(), BTreeSet::new());
    // A value that somebody copied under another name makes two topics of one id.
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

/// How many in-sync replicas a commit of the topic needs. Of a topic whose configuration cannot be read as many as there are: then nobody
/// leaves the ISR for good.
fn min_insync(input: &Input<'_>, topic: &TopicValue) -> usize {
    TopicConfig::resolve(input.defaults, &topic.config).map_or(usize::MAX, |config| config.min_insync_replicas)
}

#[cfg(test)]
mod tests;
