//! Placement of replicas: completes reassignments, and starts them for operators, changed factors, lost and drained
//! brokers, and balance. Every start is subject to the limits; a retargeted reassignment keeps its slot.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    super::{
        partition_value::PartitionValue,
        placement::{Load, Placement},
    },
    Input, Plan, Step, Subject, Waiting, Why, lead, redirect,
};
use crate::model::{BrokerId, PartitionId};

/// Imbalance above which a broker gives a replica to the least loaded one: in replicas, and in percent.
const UNEVEN: usize = 2;
const UNEVEN_PERCENT: usize = 10;

/// Completes a reassignment whose new replicas are in sync. If the leader is being removed, another replica is elected
/// first.
pub(super) fn end(input: &Input<'_>, subject: &Subject<'_>) -> Option<Step> {
    let value = subject.value;
    // The last in-sync replica that is offline may never return: then the removed replicas hold the only data.
    let is_led = value.leader.is_some_and(|leader| input.is_live(leader));
    let copied = value.adding.iter().all(|id| value.isr.contains(id));
    if !subject.is_moving() || !is_led || !copied || value.leavers_are_needed(subject.min_insync) {
        return None;
    }
    if let Some(ended) = value.end_move() {
        return Some(subject.step(ended, Why::MoveEnded));
    }
    let to = lead::successor(input, subject, |id| value.leader != Some(id))?;
    let value = value.elect(to, |id| input.is_live(id), subject.min_insync)?;
    Some(subject.step(value, Why::HandedOver))
}

/// Returns true if a reassignment is in progress and a live ISR or ELR member remains. Without one, the reassignment
/// copies nothing, possibly forever.
fn goes_on(input: &Input<'_>, subject: &Subject<'_>) -> bool {
    let value = subject.value;
    subject.is_moving() && value.isr.iter().chain(&value.elr).any(|id| input.is_live(*id))
}

/// Remaining number of reassignments that may start, in total and per broker.
struct Room {
    moves: usize,
    to_one: usize,
    receiving: BTreeMap<BrokerId, usize>,
}

impl Room {
    fn of(input: &Input<'_>, subjects: &[Subject<'_>]) -> Self {
        let under_way = subjects.iter().filter(|subject| goes_on(input, subject));
        let mut receiving = BTreeMap::new();
        for id in under_way.clone().flat_map(|subject| &subject.value.adding) {
            *receiving.entry(*id).or_default() += 1;
        }
        let moves = input.limits.moves.saturating_sub(under_way.count());
        Self { moves, to_one: input.limits.moves_to_one, receiving }
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
        let fits = |id: &BrokerId| self.receiving.get(id).copied().unwrap_or(0) < self.to_one;
        if !new.iter().all(fits) {
            return false;
        }
        new.iter().for_each(|id| *self.receiving.entry(*id).or_default() += 1);
        true
    }
}

/// Starts reassignments and retargets blocked ones. Returns the partitions that were changed.
pub(super) fn begin(input: &Input<'_>, subjects: &[Subject<'_>], plan: &mut Plan) -> BTreeSet<PartitionId> {
    let (mut room, mut placement) = (Room::of(input, subjects), Placement::of(input.view));
    let mut moved = redirect_stranded(input, subjects, &mut room, &mut placement, plan);
    moved.append(&mut begin_ordered(input, subjects, &mut room, &mut placement, plan));
    for subject in subjects.iter().filter(|subject| !subject.is_moving() && subject.value.leader.is_some()) {
        // A startable request of an operator takes precedence.
        if startable(input, subject, &placement).is_some() {
            continue;
        }
        let Some((target, why)) = wanted(input, subject, &placement, plan) else { continue };
        let Some(value) = subject.value.begin_move(&target) else { continue };
        if room.take(&value.adding) {
            placement.carry_more(&value.adding);
            moved.insert(subject.id);
            plan.steps.push(subject.step(value, why));
        }
    }
    let quiet = moved.is_empty() && !subjects.iter().any(|subject| goes_on(input, subject));
    if input.limits.balance
        && quiet
        && let Some(step) = balance(input, subjects, &placement)
    {
        moved.insert(step.change.id);
        plan.steps.push(step);
    }
    moved
}

/// Retargets reassignments that need brokers which are gone permanently. They come first, because they hold their slot
/// already.
fn redirect_stranded(
    input: &Input<'_>,
    subjects: &[Subject<'_>],
    room: &mut Room,
    placement: &mut Placement,
    plan: &mut Plan,
) -> BTreeSet<PartitionId> {
    let mut moved = BTreeSet::new();
    for subject in subjects.iter().filter(|subject| subject.is_moving() && subject.value.leader.is_some()) {
        let Some(target) = redirect::target(input, subject, placement, plan) else { continue };
        let Some(value) = subject.value.begin_move(&target) else { continue };
        let is_new = |id: &BrokerId| !subject.value.adding.contains(id);
        let new: Vec<BrokerId> = value.adding.iter().copied().filter(is_new).collect();
        if room.receive(&new) {
            placement.carry_more(&new);
            moved.insert(subject.id);
            plan.steps.push(subject.step(value, Why::Redirected));
        }
    }
    moved
}

/// Starts queued reassignments, before any that only the planner wants.
fn begin_ordered(
    input: &Input<'_>,
    subjects: &[Subject<'_>],
    room: &mut Room,
    placement: &mut Placement,
    plan: &mut Plan,
) -> BTreeSet<PartitionId> {
    let mut moved = BTreeSet::new();
    for subject in subjects.iter().filter(|subject| subject.value.is_ordered() && !subject.is_moving()) {
        match startable(input, subject, placement) {
            Some(value) if room.take(&value.adding) => {
                placement.carry_more(&value.adding);
                moved.insert(subject.id);
                plan.steps.push(subject.step(value, Why::Ordered));
            }
            Some(_) => {}
            None if subject.value.leader.is_some() => plan.waiting.push((subject.id, Waiting::ForOrdered)),
            // The partition is blocked without a leader, which is reported elsewhere.
            None => {}
        }
    }
    moved
}

/// Returns the value with the queued reassignment started. Returns `None` if none is queued, there is no leader to copy
/// from, or a new broker is offline, unreachable or at its replica limit.
fn startable(input: &Input<'_>, subject: &Subject<'_>, placement: &Placement) -> Option<PartitionValue> {
    subject.value.leader?;
    let value = subject.value.begin_ordered().filter(|_| !subject.is_moving())?;
    value.adding.iter().all(|id| input.is_reachable(*id) && placement.is_below_bound(*id)).then_some(value)
}

/// Returns the replicas that a partition should have, if they differ from the present ones. With too few brokers, some
/// replicas that should be removed stay.
fn wanted(
    input: &Input<'_>,
    subject: &Subject<'_>,
    placement: &Placement,
    plan: &mut Plan,
) -> Option<(Vec<BrokerId>, Why)> {
    let (replicas, id) = (&subject.value.replicas, subject.id);
    let factor = usize::try_from(subject.topic.replication_factor).ok()?;
    if replicas.len() > factor
        && let Some(target) = fewer(input, subject, factor)
    {
        return Some((target, Why::Factor));
    }
    let leaving = |id: &BrokerId| input.is_draining(*id) || input.is_lost(*id, plan);
    let (going, stay): (Vec<BrokerId>, Vec<BrokerId>) = replicas.iter().copied().partition(leaving);
    if going.is_empty() && replicas.len() == factor {
        return None;
    }
    let chosen = placement.choose_up_to(id, stay.clone(), factor);
    let new = &chosen[stay.len()..];
    if new.is_empty() {
        // Too many replicas with too few in sync, but enough of them stay: they will catch up.
        if stay.len() < factor {
            plan.waiting.push((id, Waiting::ForBrokers));
        }
        return None;
    }
    let going = first_to_go(input, subject, going, new.len(), factor);
    // A new replica takes the position of a removed one, so the preferred leader changes only if its own replica is
    // removed.
    let mut new = new.iter().copied();
    let mut target: Vec<BrokerId> =
        replicas.iter().filter_map(|id| if going.contains(id) { new.next() } else { Some(*id) }).collect();
    target.extend(new);
    let why = match going.iter().any(|id| input.is_draining(*id)) {
        _ if going.is_empty() => Why::Factor,
        true => Why::Drained,
        false => Why::Replaced,
    };
    Some((target, why))
}

/// Selects the replicas to remove when `new` replicas are added: offline ones first, possible leaders last. With more
/// replicas than the factor, more are removed than added, if enough stay in sync.
fn first_to_go(
    input: &Input<'_>,
    subject: &Subject<'_>,
    mut going: Vec<BrokerId>,
    new: usize,
    factor: usize,
) -> Vec<BrokerId> {
    let value = subject.value;
    going.sort_by_key(|id| (input.is_live(*id), value.isr.contains(id) || value.elr.contains(id)));
    let most = new + value.replicas.len().saturating_sub(factor);
    let kept_in_sync = value.isr.iter().filter(|id| !going.iter().take(most).any(|goes| goes == *id)).count();
    let enough = kept_in_sync + new >= subject.min_insync.min(factor);
    going.truncate(if enough { most } else { new });
    going
}

/// Returns the replicas that stay if the factor shrinks; `None` while too few of them would be in sync. Order of
/// preference: the leader, in sync, live, not drained, alone in its rack, first in the list.
fn fewer(input: &Input<'_>, subject: &Subject<'_>, factor: usize) -> Option<Vec<BrokerId>> {
    let value = subject.value;
    let mut kept: Vec<BrokerId> = Vec::new();
    let mut rest: Vec<BrokerId> = value.replicas.clone();
    while kept.len() < factor && !rest.is_empty() {
        let worth = |(place, id): &(usize, &BrokerId)| {
            let (leads, in_sync) = (value.leader == Some(**id), value.isr.contains(id));
            let shared = input.shares_rack(**id, &kept);
            (!leads, !in_sync, !input.is_live(**id), input.is_draining(**id), shared, *place)
        };
        let (best, _) = rest.iter().enumerate().min_by_key(worth)?;
        kept.push(rest.remove(best));
    }
    let in_sync = kept.iter().filter(|id| value.isr.contains(id)).count();
    if in_sync < subject.min_insync.min(factor) {
        return None;
    }
    Some(value.replicas.iter().copied().filter(|id| kept.contains(id)).collect())
}

/// Moves one replica from the broker with the most to the broker with the fewest, if they are uneven enough. Prefers
/// the most uneven pair and never reduces the number of racks of a partition.
fn balance(input: &Input<'_>, subjects: &[Subject<'_>], placement: &Placement) -> Option<Step> {
    let mut brokers: Vec<(usize, BrokerId)> =
        placement.steady().map(|(id, Load { replicas, .. })| (replicas, id)).collect();
    brokers.sort_unstable();
    let uneven = |most: usize, least: usize| most > least + UNEVEN && most * 100 > least * (100 + UNEVEN_PERCENT);
    brokers.iter().rev().find_map(|(most, from)| {
        let takers = brokers.iter().take_while(|(least, _)| uneven(*most, *least));
        let takers = takers.filter(|(_, to)| placement.has_room(*to));
        takers.into_iter().find_map(|(_, to)| subjects.iter().find_map(|subject| hand_on(input, subject, *from, *to)))
    })
}

/// Returns the change that moves a replica of this partition from one broker to another, in the same position.
fn hand_on(input: &Input<'_>, subject: &Subject<'_>, from: BrokerId, to: BrokerId) -> Option<Step> {
    let replicas = &subject.value.replicas;
    if subject.value.leader.is_none() || subject.value.is_ordered() {
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
    Some(subject.step(subject.value.begin_move(&target)?, Why::Balanced))
}
