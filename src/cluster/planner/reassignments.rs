//! Placement of replicas: completes reassignments, and starts them for operators, changed factors, lost and drained
//! brokers, and balance. Every start is subject to the limits; a retargeted reassignment keeps its slot.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    super::{
        partition_value::PartitionValue,
        placement::{BrokerLoad, Placement},
    },
    BlockedReason, ChangeReason, ClusterPlan, PartitionCase, PlannedChange, PlannerInput, elections, retarget,
};
use crate::model::{BrokerId, PartitionId};

/// Imbalance above which a broker gives a replica to the least loaded one: in replicas, and in percent.
const MIN_IMBALANCE: usize = 2;
const MIN_IMBALANCE_PERCENT: usize = 10;

/// Completes a reassignment whose new replicas are in sync. If the leader is being removed, another replica is elected
/// first.
pub(super) fn end(input: &PlannerInput<'_>, case: &PartitionCase<'_>) -> Option<PlannedChange> {
    let value = case.value;
    // The last in-sync replica that is offline may never return: then the removed replicas hold the only data.
    let is_led = value.leader.is_some_and(|leader| input.is_live(leader));
    let copied = value.adding.iter().all(|id| value.isr.contains(id));
    if !case.is_reassigning() || !is_led || !copied || value.needs_removed_replicas(case.min_insync) {
        return None;
    }
    if let Some(completed) = value.complete_reassignment() {
        return Some(case.step(completed, ChangeReason::ReassignmentCompleted));
    }
    let to = elections::successor(input, case, |id| value.leader != Some(id))?;
    let value = value.elect(to, |id| input.is_live(id), case.min_insync)?;
    Some(case.step(value, ChangeReason::ControlledShutdown))
}

/// Returns true if a reassignment is in progress and a live ISR or ELR member remains. Without one, the reassignment
/// copies nothing, possibly forever.
fn is_progressing(input: &PlannerInput<'_>, case: &PartitionCase<'_>) -> bool {
    let value = case.value;
    case.is_reassigning() && value.isr.iter().chain(&value.elr).any(|id| input.is_live(*id))
}

/// Remaining number of reassignments that may start, in total and per broker.
struct MoveBudget {
    moves: usize,
    per_broker: usize,
    receiving: BTreeMap<BrokerId, usize>,
}

impl MoveBudget {
    fn of(input: &PlannerInput<'_>, cases: &[PartitionCase<'_>]) -> Self {
        let in_progress = cases.iter().filter(|case| is_progressing(input, case));
        let mut receiving = BTreeMap::new();
        for id in in_progress.clone().flat_map(|case| &case.value.adding) {
            *receiving.entry(*id).or_default() += 1;
        }
        let moves = input.limits.max_reassignments.saturating_sub(in_progress.count());
        Self { moves, per_broker: input.limits.max_moves_per_broker, receiving }
    }

    /// Takes capacity for a reassignment that copies to these brokers. Returns false if there is not enough.
    fn take(&mut self, new: &[BrokerId]) -> bool {
        // A reassignment that copies nothing needs no capacity.
        if new.is_empty() {
            return true;
        }
        if self.moves == 0 || !self.receive(new) {
            return false;
        }
        self.moves -= 1;
        true
    }

    /// Takes capacity at these brokers for a reassignment in progress, which is already counted in the total.
    fn receive(&mut self, new: &[BrokerId]) -> bool {
        let fits = |id: &BrokerId| self.receiving.get(id).copied().unwrap_or(0) < self.per_broker;
        if !new.iter().all(fits) {
            return false;
        }
        new.iter().for_each(|id| *self.receiving.entry(*id).or_default() += 1);
        true
    }
}

/// Starts reassignments and retargets blocked ones. Returns the partitions that were changed.
pub(super) fn begin(
    input: &PlannerInput<'_>,
    cases: &[PartitionCase<'_>],
    plan: &mut ClusterPlan,
) -> BTreeSet<PartitionId> {
    let (mut budget, mut placement) = (MoveBudget::of(input, cases), Placement::of(input.metadata));
    let mut moved = retarget_blocked(input, cases, &mut budget, &mut placement, plan);
    moved.append(&mut start_queued(input, cases, &mut budget, &mut placement, plan));
    for case in cases.iter().filter(|case| !case.is_reassigning() && case.value.leader.is_some()) {
        // A startable request of an operator takes precedence.
        if try_start_queued(input, case, &placement).is_some() {
            continue;
        }
        let Some((target, reason)) = choose_target(input, case, &placement, plan) else { continue };
        let Some(value) = case.value.start_reassignment(&target) else { continue };
        if budget.take(&value.adding) {
            placement.add_load(&value.adding);
            moved.insert(case.id);
            plan.steps.push(case.step(value, reason));
        }
    }
    let is_idle = moved.is_empty() && !cases.iter().any(|case| is_progressing(input, case));
    if input.limits.balance
        && is_idle
        && let Some(step) = balance(input, cases, &placement)
    {
        moved.insert(step.change.id);
        plan.steps.push(step);
    }
    moved
}

/// Retargets reassignments that need permanently offline brokers. They come first, because they hold their slot
/// already.
fn retarget_blocked(
    input: &PlannerInput<'_>,
    cases: &[PartitionCase<'_>],
    budget: &mut MoveBudget,
    placement: &mut Placement,
    plan: &mut ClusterPlan,
) -> BTreeSet<PartitionId> {
    let mut moved = BTreeSet::new();
    for case in cases.iter().filter(|case| case.is_reassigning() && case.value.leader.is_some()) {
        let Some(target) = retarget::target(input, case, placement, plan) else { continue };
        let Some(value) = case.value.start_reassignment(&target) else { continue };
        let is_new = |id: &BrokerId| !case.value.adding.contains(id);
        let new: Vec<BrokerId> = value.adding.iter().copied().filter(is_new).collect();
        if budget.receive(&new) {
            placement.add_load(&new);
            moved.insert(case.id);
            plan.steps.push(case.step(value, ChangeReason::ReassignmentRetargeted));
        }
    }
    moved
}

/// Starts queued reassignments, before any reassignment that only the planner requires.
fn start_queued(
    input: &PlannerInput<'_>,
    cases: &[PartitionCase<'_>],
    budget: &mut MoveBudget,
    placement: &mut Placement,
    plan: &mut ClusterPlan,
) -> BTreeSet<PartitionId> {
    let mut moved = BTreeSet::new();
    for case in cases.iter().filter(|case| case.value.has_queued() && !case.is_reassigning()) {
        match try_start_queued(input, case, placement) {
            Some(value) if budget.take(&value.adding) => {
                placement.add_load(&value.adding);
                moved.insert(case.id);
                plan.steps.push(case.step(value, ChangeReason::ReassignmentStarted));
            }
            Some(_) => {}
            None if case.value.leader.is_some() => plan.waiting.push((case.id, BlockedReason::QueuedTarget)),
            // The partition is blocked without a leader, which is reported elsewhere.
            None => {}
        }
    }
    moved
}

/// Returns the value with the queued reassignment started. Returns `None` if none is queued, there is no leader to copy
/// from, or a new broker is offline, unreachable or at its replica limit.
fn try_start_queued(
    input: &PlannerInput<'_>,
    case: &PartitionCase<'_>,
    placement: &Placement,
) -> Option<PartitionValue> {
    case.value.leader?;
    let value = case.value.start_queued().filter(|_| !case.is_reassigning())?;
    value.adding.iter().all(|id| input.is_reachable(*id) && placement.is_below_bound(*id)).then_some(value)
}

/// Returns the replicas that a partition should have, if they differ from the present ones. With too few brokers, some
/// replicas that should be removed stay.
fn choose_target(
    input: &PlannerInput<'_>,
    case: &PartitionCase<'_>,
    placement: &Placement,
    plan: &mut ClusterPlan,
) -> Option<(Vec<BrokerId>, ChangeReason)> {
    let (replicas, id) = (&case.value.replicas, case.id);
    let factor = usize::try_from(case.topic.replication_factor).ok()?;
    if replicas.len() > factor
        && let Some(target) = choose_remaining(input, case, factor)
    {
        return Some((target, ChangeReason::ReplicationFactor));
    }
    let is_leaving = |id: &BrokerId| input.is_draining(*id) || input.is_lost(*id, plan);
    let (leaving, stay): (Vec<BrokerId>, Vec<BrokerId>) = replicas.iter().copied().partition(is_leaving);
    if leaving.is_empty() && replicas.len() == factor {
        return None;
    }
    let chosen = placement.choose_up_to(id, stay.clone(), factor);
    let new = &chosen[stay.len()..];
    if new.is_empty() {
        // Too many replicas with too few in sync, but enough of them stay: they will catch up.
        if stay.len() < factor {
            plan.waiting.push((id, BlockedReason::NoBrokers));
        }
        return None;
    }
    let leaving = replicas_to_remove(input, case, leaving, new.len(), factor);
    // A new replica takes the position of a removed one, so the preferred leader changes only if its own replica is
    // removed.
    let mut new = new.iter().copied();
    let mut target: Vec<BrokerId> =
        replicas.iter().filter_map(|id| if leaving.contains(id) { new.next() } else { Some(*id) }).collect();
    target.extend(new);
    let reason = match leaving.iter().any(|id| input.is_draining(*id)) {
        _ if leaving.is_empty() => ChangeReason::ReplicationFactor,
        true => ChangeReason::Drained,
        false => ChangeReason::BrokerReplaced,
    };
    Some((target, reason))
}

/// Selects the replicas to remove when `new` replicas are added: offline ones first, possible leaders last. With more
/// replicas than the factor, more are removed than added, if enough stay in sync.
fn replicas_to_remove(
    input: &PlannerInput<'_>,
    case: &PartitionCase<'_>,
    mut leaving: Vec<BrokerId>,
    new: usize,
    factor: usize,
) -> Vec<BrokerId> {
    let value = case.value;
    leaving.sort_by_key(|id| (input.is_live(*id), value.isr.contains(id) || value.elr.contains(id)));
    let max = new + value.replicas.len().saturating_sub(factor);
    let kept_in_sync = value.isr.iter().filter(|id| !leaving.iter().take(max).any(|removed| removed == *id)).count();
    let is_enough = kept_in_sync + new >= case.min_insync.min(factor);
    leaving.truncate(if is_enough { max } else { new });
    leaving
}

/// Returns the replicas that stay if the factor shrinks; `None` while too few of them would be in sync. Order of
/// preference: the leader, in sync, live, not drained, alone in its rack, first in the list.
fn choose_remaining(input: &PlannerInput<'_>, case: &PartitionCase<'_>, factor: usize) -> Option<Vec<BrokerId>> {
    let value = case.value;
    let mut kept: Vec<BrokerId> = Vec::new();
    let mut rest: Vec<BrokerId> = value.replicas.clone();
    while kept.len() < factor && !rest.is_empty() {
        let rank = |(position, id): &(usize, &BrokerId)| {
            let (leads, in_sync) = (value.leader == Some(**id), value.isr.contains(id));
            let shared = input.shares_rack(**id, &kept);
            (!leads, !in_sync, !input.is_live(**id), input.is_draining(**id), shared, *position)
        };
        let (best, _) = rest.iter().enumerate().min_by_key(rank)?;
        kept.push(rest.remove(best));
    }
    let in_sync = kept.iter().filter(|id| value.isr.contains(id)).count();
    if in_sync < case.min_insync.min(factor) {
        return None;
    }
    Some(value.replicas.iter().copied().filter(|id| kept.contains(id)).collect())
}

/// Moves one replica from the broker with the most to the broker with the fewest, if they are uneven enough. Prefers
/// the most uneven pair and never reduces the number of racks of a partition.
fn balance(input: &PlannerInput<'_>, cases: &[PartitionCase<'_>], placement: &Placement) -> Option<PlannedChange> {
    let mut brokers: Vec<(usize, BrokerId)> =
        placement.accepting_brokers().map(|(id, BrokerLoad { replicas, .. })| (replicas, id)).collect();
    brokers.sort_unstable();
    let uneven = |max: usize, min: usize| max > min + MIN_IMBALANCE && max * 100 > min * (100 + MIN_IMBALANCE_PERCENT);
    brokers.iter().rev().find_map(|(max, from)| {
        let targets = brokers.iter().take_while(|(min, _)| uneven(*max, *min));
        let targets = targets.filter(|(_, to)| placement.has_capacity(*to));
        targets.into_iter().find_map(|(_, to)| cases.iter().find_map(|case| move_replica(input, case, *from, *to)))
    })
}

/// Returns the change that moves a replica of this partition from one broker to another, in the same position.
fn move_replica(
    input: &PlannerInput<'_>,
    case: &PartitionCase<'_>,
    from: BrokerId,
    to: BrokerId,
) -> Option<PlannedChange> {
    let replicas = &case.value.replicas;
    if case.value.leader.is_none() || case.value.has_queued() {
        return None;
    }
    if !replicas.contains(&from) || replicas.contains(&to) {
        return None;
    }
    let others: Vec<BrokerId> = replicas.iter().copied().filter(|id| *id != from).collect();
    if input.shares_rack(to, &others) && !input.shares_rack(from, &others) {
        return None;
    }
    let target: Vec<BrokerId> = replicas.iter().map(|id| if *id == from { to } else { *id }).collect();
    Some(case.step(case.value.start_reassignment(&target)?, ChangeReason::Balanced))
}
