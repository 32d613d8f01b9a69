//! New targets for reassignments that need brokers which are gone permanently. Starts and completes no reassignment.
//!
//! A new replica that never catches up blocks its reassignment forever. So does a staying replica that never returns
//! while the min ISR needs the removed replicas. No other rule for replicas considers a partition under reassignment,
//! so this rule must unblock it.

use super::{
    super::{partition_value::PartitionValue, placement::Placement},
    Input, Plan, Subject, Waiting,
};
use crate::model::BrokerId;

/// Returns the new target of a reassignment that needs a broker which is gone permanently; `None` if it continues
/// unchanged.
///
/// Successors of the gone replicas are, in this order:
///
/// 1. Replicas in `removing` on live brokers that are not drained: they hold the partition already. So a reassignment
///    whose new replica is gone is reverted.
/// 2. Other brokers.
/// 3. Replicas in `removing` on live brokers that are drained.
/// 4. Offline replicas in `removing`, only in the place of new replicas.
///
/// Without a successor, a new replica is dropped and an earlier replica keeps its position.
pub(super) fn target(
    input: &Input<'_>,
    subject: &Subject<'_>,
    placement: &Placement,
    plan: &mut Plan,
) -> Option<Vec<BrokerId>> {
    let value = subject.value;
    let aim: Vec<BrokerId> = value.replicas.iter().copied().filter(|id| !value.removing.contains(id)).collect();
    let (mut gone, stay): (Vec<BrokerId>, Vec<BrokerId>) =
        aim.iter().copied().partition(|id| input.is_gone_for_good(*id, plan));
    if gone.is_empty() {
        return None;
    }
    // A new replica blocks the reassignment in any case, so it is replaced first.
    gone.sort_by_key(|id| !value.adding.contains(id));
    let heirs = heirs(input, subject, placement, &stay, &gone);
    let place = |id: &BrokerId| gone.iter().position(|other| other == id);
    let target: Vec<BrokerId> = aim
        .iter()
        .filter_map(|id| match place(id) {
            None => Some(*id),
            Some(place) => heirs.get(place).copied().or_else(|| keeps_its_place(value, *id)),
        })
        .collect();
    if target == aim {
        plan.waiting.push((subject.id, Waiting::ForBrokers));
        return None;
    }
    Some(target)
}

/// Returns a replica without a successor if the replica existed before the reassignment.
fn keeps_its_place(value: &PartitionValue, id: BrokerId) -> Option<BrokerId> {
    (!value.adding.contains(&id)).then_some(id)
}

/// Returns the successors of the gone replicas, in their order; fewer if there are too few brokers.
fn heirs(
    input: &Input<'_>,
    subject: &Subject<'_>,
    placement: &Placement,
    stay: &[BrokerId],
    gone: &[BrokerId],
) -> Vec<BrokerId> {
    let (value, wanted) = (subject.value, stay.len() + gone.len());
    let (here, away): (Vec<BrokerId>, Vec<BrokerId>) = value.removing.iter().partition(|id| input.is_live(**id));
    let (drained, mut free): (Vec<BrokerId>, Vec<BrokerId>) = here.iter().partition(|id| input.is_draining(**id));
    let mut chosen = stay.to_vec();
    while chosen.len() < wanted && !free.is_empty() {
        let worth = |(_, id): &(usize, &BrokerId)| (!value.isr.contains(id), input.shares_rack(**id, &chosen));
        let best = free.iter().enumerate().min_by_key(worth).map_or(0, |(place, _)| place);
        chosen.push(free.remove(best));
    }
    let mut chosen = placement.choose_up_to(subject.id, chosen, wanted);
    chosen.extend(drained.iter().take(wanted - chosen.len()));
    // Offline replicas from before the reassignment are no worse than new ones that never catch up. They are no gain in
    // the place of another earlier replica.
    let new = gone.iter().filter(|id| value.adding.contains(id)).count();
    chosen.extend(away.iter().take((stay.len() + new).saturating_sub(chosen.len())));
    chosen.split_off(stay.len())
}
