//! New targets for reassignments that need permanently offline brokers. Starts and completes no reassignment.
//!
//! A new replica that never catches up blocks its reassignment forever. So does a staying replica that never returns
//! while the min ISR needs the removed replicas. No other rule for replicas considers a partition under reassignment,
//! so this rule must unblock it.

use super::{
    super::{partition_value::PartitionValue, placement::Placement},
    BlockedReason, ClusterPlan, PartitionCase, PlannerInput,
};
use crate::model::BrokerId;

/// Returns the new target of a reassignment that needs a permanently offline broker; `None` if it continues
/// unchanged.
///
/// Successors of the permanently offline replicas are, in this order:
///
/// 1. Replicas in `removing` on live brokers that are not drained: they hold the partition already. So a reassignment
///    whose new replica is permanently offline is reverted.
/// 2. Other brokers.
/// 3. Replicas in `removing` on live brokers that are drained.
/// 4. Offline replicas in `removing`, only in the place of new replicas.
///
/// Without a successor, a new replica is dropped and an earlier replica keeps its position.
pub(super) fn target(
    input: &PlannerInput<'_>,
    case: &PartitionCase<'_>,
    placement: &Placement,
    plan: &mut ClusterPlan,
) -> Option<Vec<BrokerId>> {
    let value = case.value;
    let planned: Vec<BrokerId> = value.replicas.iter().copied().filter(|id| !value.removing.contains(id)).collect();
    let (mut offline, stay): (Vec<BrokerId>, Vec<BrokerId>) =
        planned.iter().copied().partition(|id| input.is_permanently_offline(*id, plan));
    if offline.is_empty() {
        return None;
    }
    // A new replica blocks the reassignment in any case, so it is replaced first.
    offline.sort_by_key(|id| !value.adding.contains(id));
    let successors = successors(input, case, placement, &stay, &offline);
    let position = |id: &BrokerId| offline.iter().position(|other| other == id);
    let target: Vec<BrokerId> = planned
        .iter()
        .filter_map(|id| match position(id) {
            None => Some(*id),
            Some(position) => successors.get(position).copied().or_else(|| keep_unless_new(value, *id)),
        })
        .collect();
    if target == planned {
        plan.waiting.push((case.id, BlockedReason::NoBrokers));
        return None;
    }
    Some(target)
}

/// Returns a replica without a successor if the replica existed before the reassignment.
fn keep_unless_new(value: &PartitionValue, id: BrokerId) -> Option<BrokerId> {
    (!value.adding.contains(&id)).then_some(id)
}

/// Returns the successors of the permanently offline replicas, in their order; fewer if there are too few brokers.
fn successors(
    input: &PlannerInput<'_>,
    case: &PartitionCase<'_>,
    placement: &Placement,
    stay: &[BrokerId],
    offline: &[BrokerId],
) -> Vec<BrokerId> {
    let (value, wanted) = (case.value, stay.len() + offline.len());
    let (online, removed_offline): (Vec<BrokerId>, Vec<BrokerId>) =
        value.removing.iter().partition(|id| input.is_live(**id));
    let (drained, mut free): (Vec<BrokerId>, Vec<BrokerId>) = online.iter().partition(|id| input.is_draining(**id));
    let mut chosen = stay.to_vec();
    while chosen.len() < wanted && !free.is_empty() {
        let rank = |(_, id): &(usize, &BrokerId)| (!value.isr.contains(id), input.shares_rack(**id, &chosen));
        let best = free.iter().enumerate().min_by_key(rank).map_or(0, |(position, _)| position);
        chosen.push(free.remove(best));
    }
    let mut chosen = placement.choose_up_to(case.id, chosen, wanted);
    chosen.extend(drained.iter().take(wanted - chosen.len()));
    // Offline replicas from before the reassignment are no worse than new ones that never catch up. They are no gain in
    // the place of another earlier replica.
    let new = offline.iter().filter(|id| value.adding.contains(id)).count();
    chosen.extend(removed_offline.iter().take((stay.len() + new).saturating_sub(chosen.len())));
    chosen.split_off(stay.len())
}
