//! Placement of replicas: completes reassignments, and starts them for operators, changed factors, lost and drained
//! brokers, and balance. The limits apply to every start that copies replicas, except balance, which moves one replica
//! at a time. A retargeted reassignment counts only once.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    super::{
        partition_value::PartitionValue,
        placement::{BrokerLoad, Placement},
    },
    BlockedReason, ChangeReason, ClusterPlan, PartitionCase, PlannedChange, PlannerInput, elections, retarget,
};
use crate::model::{BrokerId, PartitionId};

/// Difference in replicas between two brokers. Balancing may move a replica only if the difference is larger.
const MIN_IMBALANCE: usize = 2;

/// The same difference, in percent of the replicas of the broker with fewer. Balancing requires that both values are
/// exceeded.
const MIN_IMBALANCE_PERCENT: usize = 10;

/// Completes a reassignment whose new replicas are in sync. If the leader is being removed, this change only elects
/// another replica, and a later plan completes the reassignment. Returns `None` if no reassignment is in progress or it
/// cannot complete yet.
pub(super) fn complete(input: &PlannerInput<'_>, case: &PartitionCase<'_>) -> Option<PlannedChange> {
    let value = case.value;
    // Without a live leader, the removed replicas may hold the only remaining data: the brokers of the other replicas
    // may never return.
    let has_live_leader = value.leader.is_some_and(|leader| input.is_live(leader));
    let are_new_in_sync = value.adding.iter().all(|id| value.isr.contains(id));
    if !case.is_reassigning() || !has_live_leader || !are_new_in_sync || value.needs_removed_replicas(case.min_insync) {
        return None;
    }
    if let Some(completed) = value.complete_reassignment() {
        return Some(case.change_to(completed, ChangeReason::ReassignmentCompleted));
    }
    let to = elections::successor(input, case, |id| value.leader != Some(id))?;
    let value = value.elect(to, |id| input.is_live(id), case.min_insync)?;
    Some(case.change_to(value, ChangeReason::ControlledShutdown))
}

/// Returns true if a reassignment is in progress and an ISR or ELR member is live. Without a live member, the
/// reassignment copies nothing, possibly forever.
fn is_progressing(input: &PlannerInput<'_>, case: &PartitionCase<'_>) -> bool {
    let value = case.value;
    case.is_reassigning() && value.isr.iter().chain(&value.elr).any(|id| input.is_live(*id))
}

/// Limits of one plan on reassignments, and the part of them that is used: by reassignments in progress, and by those
/// that the plan starts.
struct ReassignmentBudget {
    /// Number of reassignments that may still start.
    remaining: usize,
    /// Maximum number of new replicas per broker.
    max_new_replicas_per_broker: usize,
    /// Number of new replicas of each broker, in reassignments in progress and in this plan.
    new_replicas: BTreeMap<BrokerId, usize>,
}

impl ReassignmentBudget {
    /// Returns the limits less the reassignments in progress that have a live ISR or ELR member.
    fn of(input: &PlannerInput<'_>, cases: &[PartitionCase<'_>]) -> Self {
        let in_progress = cases.iter().filter(|case| is_progressing(input, case));
        let mut new_replicas = BTreeMap::new();
        for id in in_progress.clone().flat_map(|case| &case.value.adding) {
            *new_replicas.entry(*id).or_default() += 1;
        }
        let remaining = input.limits.max_reassignments.saturating_sub(in_progress.count());
        let max_new_replicas_per_broker = input.limits.max_new_replicas_per_broker;
        Self { remaining, max_new_replicas_per_broker, new_replicas }
    }

    /// Subtracts a new reassignment that adds replicas on the brokers `new`. Returns false, and subtracts nothing, if
    /// it exceeds the budget.
    fn take(&mut self, new: &[BrokerId]) -> bool {
        // A reassignment that copies nothing is not limited.
        if new.is_empty() {
            return true;
        }
        if self.remaining == 0 || !self.take_at_brokers(new) {
            return false;
        }
        self.remaining -= 1;
        true
    }

    /// Subtracts only new replicas on the brokers `new`, for a reassignment in progress, which `remaining` excludes
    /// already. Returns false, and subtracts nothing, if the replicas exceed the limit of a broker.
    fn take_at_brokers(&mut self, new: &[BrokerId]) -> bool {
        let is_within_limit =
            |id: &BrokerId| self.new_replicas.get(id).copied().unwrap_or(0) < self.max_new_replicas_per_broker;
        if !new.iter().all(is_within_limit) {
            return false;
        }
        new.iter().for_each(|id| *self.new_replicas.entry(*id).or_default() += 1);
        true
    }
}

/// Plans reassignments within the limits. Retargets blocked ones, starts queued ones, and starts those that a changed
/// factor or a drained or lost broker requires. Balances if no other reassignment starts or makes progress. Returns the
/// partitions that the plan changes.
pub(super) fn plan_all(
    input: &PlannerInput<'_>,
    cases: &[PartitionCase<'_>],
    plan: &mut ClusterPlan,
) -> BTreeSet<PartitionId> {
    let (mut budget, mut placement) = (ReassignmentBudget::of(input, cases), Placement::of(input.metadata));
    let mut changed = retarget_blocked(input, cases, &mut budget, &mut placement, plan);
    changed.append(&mut start_queued(input, cases, &mut budget, &mut placement, plan));
    for case in cases.iter().filter(|case| !case.is_reassigning() && case.value.leader.is_some()) {
        if changed.contains(&case.id) {
            continue;
        }
        // If the queued reassignment of a partition could start but for the limits, no other reassignment of this
        // partition starts.
        if try_start_queued(input, case, &placement).is_some() {
            continue;
        }
        let Some((target, reason)) = choose_target(input, case, &placement, plan) else { continue };
        let Some(value) = case.value.start_reassignment(&target) else { continue };
        if budget.take(&value.adding) {
            placement.add_replica_to_each(&value.adding);
            changed.insert(case.id);
            plan.changes.push(case.change_to(value, reason));
        }
    }
    let is_idle = changed.is_empty() && !cases.iter().any(|case| is_progressing(input, case));
    if input.limits.balance
        && is_idle
        && let Some(change) = balance(input, cases, &placement)
    {
        changed.insert(change.update.id);
        plan.changes.push(change);
    }
    changed
}

/// Retargets reassignments whose targets contain permanently offline brokers. The total of the limits counts these
/// reassignments already, so only their added replicas are subtracted from the limits of the brokers. Returns the
/// partitions that the plan changes.
fn retarget_blocked(
    input: &PlannerInput<'_>,
    cases: &[PartitionCase<'_>],
    budget: &mut ReassignmentBudget,
    placement: &mut Placement,
    plan: &mut ClusterPlan,
) -> BTreeSet<PartitionId> {
    let mut changed = BTreeSet::new();
    for case in cases.iter().filter(|case| case.is_reassigning() && case.value.leader.is_some()) {
        let Some(target) = retarget::target(input, case, placement, plan) else { continue };
        let Some(value) = case.value.start_reassignment(&target) else { continue };
        let is_new = |id: &BrokerId| !case.value.adding.contains(id);
        let new: Vec<BrokerId> = value.adding.iter().copied().filter(is_new).collect();
        if budget.take_at_brokers(&new) {
            placement.add_replica_to_each(&new);
            changed.insert(case.id);
            plan.changes.push(case.change_to(value, ChangeReason::ReassignmentRetargeted));
        }
    }
    changed
}

/// Starts queued reassignments within the limits, before any reassignment that no operator requested. Reports a
/// partition with a leader as blocked if a new broker of its queued reassignment cannot take a replica. Returns the
/// partitions that the plan changes.
fn start_queued(
    input: &PlannerInput<'_>,
    cases: &[PartitionCase<'_>],
    budget: &mut ReassignmentBudget,
    placement: &mut Placement,
    plan: &mut ClusterPlan,
) -> BTreeSet<PartitionId> {
    let mut changed = BTreeSet::new();
    for case in cases.iter().filter(|case| case.value.has_queued() && !case.is_reassigning()) {
        match try_start_queued(input, case, placement) {
            Some(value) if budget.take(&value.adding) => {
                placement.add_replica_to_each(&value.adding);
                changed.insert(case.id);
                plan.changes.push(case.change_to(value, ChangeReason::ReassignmentStarted));
            }
            // The limits are reached: the reassignment starts in a later plan.
            Some(_) => {}
            None if case.value.leader.is_some() => plan.blocked.push((case.id, BlockedReason::QueuedTarget)),
            // The election rule reports a partition without a leader as blocked.
            None => {}
        }
    }
    changed
}

/// Returns the value with the queued reassignment started. Returns `None` in these cases:
/// - No reassignment is queued, or another one is in progress.
/// - There is no leader to copy from.
/// - A new broker is offline, unreachable or at its replica limit.
///
/// Does not check the budget.
fn try_start_queued(
    input: &PlannerInput<'_>,
    case: &PartitionCase<'_>,
    placement: &Placement,
) -> Option<PartitionValue> {
    case.value.leader?;
    let value = case.value.start_queued().filter(|_| !case.is_reassigning())?;
    value.adding.iter().all(|id| input.is_reachable(*id) && placement.is_below_limit(*id)).then_some(value)
}

/// Returns the replicas that a partition should have, with the reason; `None` if they are the current ones or cannot be
/// improved now. The rules are the replication factor and the replacement of replicas on drained or lost brokers. With
/// too few brokers, some replicas on such brokers stay. If no replica can be added and too few stay, the partition is
/// reported as blocked.
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
    let leaving: Vec<BrokerId> = replicas.iter().copied().filter(is_leaving).collect();
    if leaving.is_empty() && replicas.len() == factor {
        return None;
    }
    let target = placement.replace(id, case.value, &leaving, factor, case.min_insync);
    if target == *replicas {
        // If enough replicas stay, the partition is not blocked: it only waits until they are in sync.
        if replicas.len() - leaving.len() < factor {
            plan.blocked.push((id, BlockedReason::NoBrokers));
        }
        return None;
    }
    let removed: Vec<BrokerId> = leaving.into_iter().filter(|id| !target.contains(id)).collect();
    let reason = if removed.is_empty() {
        ChangeReason::ReplicationFactor
    } else if removed.iter().any(|id| input.is_draining(*id)) {
        ChangeReason::Drained
    } else {
        ChangeReason::BrokerReplaced
    };
    Some((target, reason))
}

/// Returns the replicas that stay after the factor was lowered, in their order. Returns `None` while fewer of them are
/// in sync than the min ISR or, if that is lower, the factor. Preferred are: the leader, in-sync replicas, live ones,
/// those not drained, those in a rack of no chosen replica, and the first in the list.
fn choose_remaining(input: &PlannerInput<'_>, case: &PartitionCase<'_>, factor: usize) -> Option<Vec<BrokerId>> {
    let value = case.value;
    let mut staying: Vec<BrokerId> = Vec::new();
    let mut candidates: Vec<BrokerId> = value.replicas.clone();
    while staying.len() < factor && !candidates.is_empty() {
        let rank = |(position, id): &(usize, &BrokerId)| {
            let (leads, in_sync) = (value.leader == Some(**id), value.isr.contains(id));
            let shares_rack = input.shares_rack(**id, &staying);
            (!leads, !in_sync, !input.is_live(**id), input.is_draining(**id), shares_rack, *position)
        };
        let (best, _) = candidates.iter().enumerate().min_by_key(rank)?;
        staying.push(candidates.remove(best));
    }
    let in_sync = staying.iter().filter(|id| value.isr.contains(id)).count();
    if in_sync < case.min_insync.min(factor) {
        return None;
    }
    Some(value.replicas.iter().copied().filter(|id| staying.contains(id)).collect())
}

/// Returns a change that moves one replica from a broker with many replicas to one with few, if the imbalance exceeds
/// `MIN_IMBALANCE` and `MIN_IMBALANCE_PERCENT`. Prefers the broker with the most replicas as the source, then the one
/// with the fewest as the target. Never reduces the number of racks of a partition. Returns `None` if the brokers are
/// balanced or no replica can move.
fn balance(input: &PlannerInput<'_>, cases: &[PartitionCase<'_>], placement: &Placement) -> Option<PlannedChange> {
    let mut brokers: Vec<(usize, BrokerId)> =
        placement.accepting_brokers().map(|(id, BrokerLoad { replicas, .. })| (replicas, id)).collect();
    brokers.sort_unstable();
    let is_imbalanced =
        |max: usize, min: usize| max > min + MIN_IMBALANCE && max * 100 > min * (100 + MIN_IMBALANCE_PERCENT);
    brokers.iter().rev().find_map(|(max, from)| {
        let targets = brokers.iter().take_while(|(min, _)| is_imbalanced(*max, *min));
        let targets = targets.filter(|(_, to)| placement.has_capacity(*to));
        targets.into_iter().find_map(|(_, to)| cases.iter().find_map(|case| move_replica(input, case, *from, *to)))
    })
}

/// Returns the change that moves a replica of this partition from one broker to another, in the same position. Returns
/// `None` in these cases:
/// - The partition has no leader, or has a queued reassignment.
/// - It has no replica on `from` or one on `to`.
/// - It would use fewer racks.
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
    Some(case.change_to(case.value.start_reassignment(&target)?, ChangeReason::Balanced))
}
