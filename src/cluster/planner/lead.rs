//! Leadership: elections, transfers and the return to preferred leaders.

use std::collections::BTreeSet;

use super::{Input, Plan, Step, Subject, Waiting, Why};
use crate::model::{BrokerId, PartitionId};

/// Minimum time that a broker is online before leadership returns to it: an unstable broker must not lead after each
/// return.
const STEADY_MS: u64 = 30_000;

/// Delay before the next part of the leaderships returns.
const NEXT_LEADERS_MS: u64 = 1000;

/// Elects a leader for a partition without a live leader. ISR members come before ELR members, as the value requires;
/// among them, the first replica on a broker that is expected to stay. Without a candidate the partition is blocked,
/// and its leader is cleared.
pub(super) fn elect(
    input: &Input<'_>,
    subject: &Subject<'_>,
    waiting: &mut Vec<(PartitionId, Waiting)>,
) -> Option<Step> {
    let value = subject.value;
    let live = |id| input.is_live(id);
    if value.leader.is_some_and(|leader| live(leader) && value.replicas.contains(&leader)) {
        return None;
    }
    let rank = |id: &BrokerId| {
        (input.is_stopping(*id), input.is_without_room(*id), input.is_draining(*id), value.removing.contains(id))
    };
    let candidates = value.replicas.iter().copied().filter(|id| value.may_elect(*id, live));
    let elected = candidates.min_by_key(rank).and_then(|to| value.elect(to, live, subject.min_insync));
    match elected {
        Some(value) => Some(subject.step(value, Why::Elected)),
        None => {
            waiting.push((subject.id, Waiting::ForLeader));
            value.leader.is_some().then(|| subject.step(value.leaderless(), Why::Leaderless))
        }
    }
}

/// Transfers leadership to another ISR member if the leader is stopping, drained or has a full disk.
pub(super) fn hand_over(input: &Input<'_>, subject: &Subject<'_>) -> Option<Step> {
    let value = subject.value;
    let leader = value.leader?;
    if input.may_lead(leader) {
        return None;
    }
    let to = successor(input, subject, |id| id != leader)?;
    let value = value.elect(to, |id| input.is_live(id), subject.min_insync)?;
    Some(subject.step(value, Why::HandedOver))
}

/// Returns the first ISR member that may lead and satisfies `of`.
pub(super) fn successor(input: &Input<'_>, subject: &Subject<'_>, of: impl Fn(BrokerId) -> bool) -> Option<BrokerId> {
    let value = subject.value;
    let fits = |id: &BrokerId| of(*id) && value.isr.contains(id) && input.may_lead(*id) && !value.removing.contains(id);
    value.replicas.iter().copied().find(fits)
}

/// Returns leadership to preferred leaders, a limited number per plan.
pub(super) fn prefer(input: &Input<'_>, subjects: &[Subject<'_>], moved: &BTreeSet<PartitionId>, plan: &mut Plan) {
    let mut left = input.limits.leaders;
    for subject in subjects.iter().filter(|subject| !subject.is_moving() && !moved.contains(&subject.id)) {
        let value = subject.value;
        let preferred = value.replicas[0];
        let fits = value.isr.contains(&preferred) && input.may_lead(preferred);
        if value.leader.is_none() || value.leader == Some(preferred) || !fits {
            continue;
        }
        let up_ms = input.up_ms.get(&preferred).copied().unwrap_or(0);
        if up_ms < STEADY_MS {
            plan.again_in(STEADY_MS - up_ms);
        } else if left == 0 {
            plan.again_in(NEXT_LEADERS_MS);
            return;
        } else if let Some(value) = value.elect(preferred, |id| input.is_live(id), subject.min_insync) {
            left -= 1;
            plan.steps.push(subject.step(value, Why::Preferred));
        }
    }
}
