//! Leadership: elections, transfers and the return to preferred leaders.

use std::collections::BTreeSet;

use super::{BlockedReason, ChangeReason, ClusterPlan, PartitionCase, PlannedChange, PlannerInput};
use crate::model::{BrokerId, PartitionId};

/// Minimum time that a broker is online before leadership returns to it: an unstable broker must not get leadership
/// after each return.
const PREFERRED_LEADER_DELAY_MS: u64 = 30_000;

/// Delay before the next part of the leaderships returns.
const NEXT_LEADERS_MS: u64 = 1000;

/// Elects a leader for a partition without a live leader. ISR members come before ELR members, as the value requires;
/// among them, the first replica on a broker that is expected to stay. Without a candidate the partition is blocked,
/// and its leader is cleared.
pub(super) fn elect(
    input: &PlannerInput<'_>,
    case: &PartitionCase<'_>,
    blocked: &mut Vec<(PartitionId, BlockedReason)>,
) -> Option<PlannedChange> {
    let value = case.value;
    let live = |id| input.is_live(id);
    if value.leader.is_some_and(|leader| live(leader) && value.replicas.contains(&leader)) {
        return None;
    }
    let rank = |id: &BrokerId| {
        (input.is_stopping(*id), input.is_disk_full(*id), input.is_draining(*id), value.removing.contains(id))
    };
    let candidates = value.replicas.iter().copied().filter(|id| value.may_elect(*id, live));
    let elected = candidates.min_by_key(rank).and_then(|to| value.elect(to, live, case.min_insync));
    match elected {
        Some(value) => Some(case.step(value, ChangeReason::Elected)),
        None => {
            blocked.push((case.id, BlockedReason::NoLeader));
            value.leader.is_some().then(|| case.step(value.leaderless(), ChangeReason::Leaderless))
        }
    }
}

/// Transfers leadership to another ISR member if the leader is stopping, drained or has a full disk.
pub(super) fn transfer_leadership(input: &PlannerInput<'_>, case: &PartitionCase<'_>) -> Option<PlannedChange> {
    let value = case.value;
    let leader = value.leader?;
    if input.may_lead(leader) {
        return None;
    }
    let to = successor(input, case, |id| id != leader)?;
    let value = value.elect(to, |id| input.is_live(id), case.min_insync)?;
    Some(case.step(value, ChangeReason::ControlledShutdown))
}

/// Returns the first ISR member that may lead and satisfies `of`.
pub(super) fn successor(
    input: &PlannerInput<'_>,
    case: &PartitionCase<'_>,
    of: impl Fn(BrokerId) -> bool,
) -> Option<BrokerId> {
    let value = case.value;
    let fits = |id: &BrokerId| of(*id) && value.isr.contains(id) && input.may_lead(*id) && !value.removing.contains(id);
    value.replicas.iter().copied().find(fits)
}

/// Returns leadership to preferred leaders, a limited number per plan.
pub(super) fn prefer(
    input: &PlannerInput<'_>,
    cases: &[PartitionCase<'_>],
    moved: &BTreeSet<PartitionId>,
    plan: &mut ClusterPlan,
) {
    let mut remaining = input.limits.leaders;
    for case in cases.iter().filter(|case| !case.is_reassigning() && !moved.contains(&case.id)) {
        let value = case.value;
        let preferred = value.replicas[0];
        let fits = value.isr.contains(&preferred) && input.may_lead(preferred);
        if value.leader.is_none() || value.leader == Some(preferred) || !fits {
            continue;
        }
        let online_ms = input.online_ms.get(&preferred).copied().unwrap_or(0);
        if online_ms < PREFERRED_LEADER_DELAY_MS {
            plan.request_plan_in(PREFERRED_LEADER_DELAY_MS - online_ms);
        } else if remaining == 0 {
            plan.request_plan_in(NEXT_LEADERS_MS);
            return;
        } else if let Some(value) = value.elect(preferred, |id| input.is_live(id), case.min_insync) {
            remaining -= 1;
            plan.steps.push(case.step(value, ChangeReason::PreferredLeader));
        }
    }
}
