//! New targets for reassignments that need permanently offline brokers. Starts and completes no reassignment.
//!
//! A new replica that never catches up blocks its reassignment forever. So does a staying replica that never returns,
//! if the min ISR needs the removed replicas until the staying replica is in sync. The rules that start reassignments
//! skip a partition under reassignment, so this rule must unblock it.

use super::{
    super::{partition_value::PartitionValue, placement::Placement},
    BlockedReason, ClusterPlan, PartitionCase, PlannerInput,
};
use crate::model::BrokerId;

/// Returns the new target of a reassignment in progress whose target contains a permanently offline broker; `None` if
/// the reassignment continues unchanged. If it continues only because there is no better target, the partition is added
/// to the blocked ones of the plan.
///
/// Successors of the permanently offline replicas are, in this order:
///
/// 1. Replicas in `removing` on live brokers that are not drained: they hold the partition already. So a reassignment
///    whose new replica is permanently offline is reverted.
/// 2. Other brokers.
/// 3. Replicas in `removing` on live brokers that are drained.
/// 4. Offline replicas in `removing`, and only as successors of new replicas.
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
    let (mut offline, staying): (Vec<BrokerId>, Vec<BrokerId>) =
        planned.iter().copied().partition(|id| input.is_permanently_offline(*id, plan));
    if offline.is_empty() {
        return None;
    }
    // An offline new replica always blocks the reassignment, and an offline staying one only if the min ISR needs it.
    // So new replicas get successors first.
    offline.sort_by_key(|id| !value.adding.contains(id));
    let successors = choose_successors(input, case, placement, &staying, &offline);
    let offline_position = |id: &BrokerId| offline.iter().position(|offline_id| offline_id == id);
    let target: Vec<BrokerId> = planned
        .iter()
        .filter_map(|id| match offline_position(id) {
            None => Some(*id),
            Some(position) => successors.get(position).copied().or_else(|| keep_unless_new(value, *id)),
        })
        .collect();
    if target == planned {
        plan.blocked.push((case.id, BlockedReason::NoBrokers));
        return None;
    }
    Some(target)
}

/// Returns the id of a permanently offline replica without a successor if the replica is from before the reassignment
/// and keeps its position. Returns `None` if the replica is new and is dropped.
fn keep_unless_new(value: &PartitionValue, id: BrokerId) -> Option<BrokerId> {
    (!value.adding.contains(&id)).then_some(id)
}

/// Returns the successors of the replicas in `offline`, in the same order; fewer if there are too few brokers. The
/// candidates and their order are those of [`target`].
fn choose_successors(
    input: &PlannerInput<'_>,
    case: &PartitionCase<'_>,
    placement: &Placement,
    staying: &[BrokerId],
    offline: &[BrokerId],
) -> Vec<BrokerId> {
    let (value, target_count) = (case.value, staying.len() + offline.len());
    let (online, removed_offline): (Vec<BrokerId>, Vec<BrokerId>) =
        value.removing.iter().partition(|id| input.is_live(**id));
    let (drained, mut reusable): (Vec<BrokerId>, Vec<BrokerId>) = online.iter().partition(|id| input.is_draining(**id));
    let mut chosen = staying.to_vec();
    while chosen.len() < target_count && !reusable.is_empty() {
        let rank = |(_, id): &(usize, &BrokerId)| (!value.isr.contains(id), input.shares_rack(**id, &chosen));
        let best = reusable.iter().enumerate().min_by_key(rank).map_or(0, |(position, _)| position);
        chosen.push(reusable.remove(best));
    }
    let mut chosen = placement.choose_up_to(case.id, chosen, target_count);
    chosen.extend(drained.iter().take(target_count - chosen.len()));
    // An offline replica in `removing` may return with its data, so it is better than an offline new replica that never
    // caught up. It is not better than an offline replica that stays. New replicas come first in `offline`, so only
    // their successors are extended.
    let new_count = offline.iter().filter(|id| value.adding.contains(id)).count();
    chosen.extend(removed_offline.iter().take((staying.len() + new_count).saturating_sub(chosen.len())));
    chosen.split_off(staying.len())
}
