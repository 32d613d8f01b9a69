//! Where a move under way goes when brokers that it needs are gone for good. It begins no move and ends none.
//!
//! A new replica that never comes holds its move up for ever. So does one that was there before and stays, while those that go are needed
//! for the minimum. A partition that is moving is not looked at by any other rule for replicas, so this one must find a way on.

use super::{
    super::{partition_value::PartitionValue, placement::Placement},
    Input, Plan, Subject, Waiting,
};
use crate::model::BrokerId;

/// The replicas that a move under way is to lead to, when it leads to brokers that are gone for good; `None` where it goes on as it is.
///
/// Their places are taken by those who were to go and need not, because they hold the partition already: so a move whose new replica is
/// gone is taken back. Else by other brokers, or by those who should go and are there. Where nobody is left a new replica is given up, and
/// one that was there before keeps its place.
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
    // A new one holds the move up in any case, so its place is filled first.
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

/// A replica that nobody takes the place of, if it was there before the move.
fn keeps_its_place(value: &PartitionValue, id: BrokerId) -> Option<BrokerId> {
    (!value.adding.contains(&id)).then_some(id)
}

/// Who takes the places of those that are gone, in their order; fewer where there are too few.
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
    // The replicas of before are no worse than new ones that never come; for one of before they are no gain.
    let new = gone.iter().filter(|id| value.adding.contains(id)).count();
    chosen.extend(away.iter().take((stay.len() + new).saturating_sub(chosen.len())));
    chosen.split_off(stay.len())
}
