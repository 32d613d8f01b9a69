//! Leadership: elections, transfers and the return to preferred leaders.

use std::collections::BTreeSet;

use super::{BlockedReason, ChangeReason, ClusterPlan, PartitionCase, PlannedChange, PlannerInput};
use crate::model::{BrokerId, PartitionId};

/// Minimum time that a broker is online before leadership returns to it: an unstable broker must not get leadership
/// after each return.
const PREFERRED_LEADER_DELAY_MS: u64 = 30_000;

/// Delay of the next plan if this plan could not elect all preferred leaders, because of its limit.
const NEXT_PREFERRED_ELECTIONS_DELAY_MS: u64 = 1000;

/// Elects a leader for a partition without a live leader; returns `None` if there is one, or if nothing changes. Only
/// replicas that may lead without loss are candidates (`PartitionValue::may_elect`). Candidates are preferred in this
/// order: not stopping, disk not full, not drained, replica not being removed, first in the list. Without a candidate,
/// the partition is added to `blocked`, and its leader is cleared.
pub(super) fn elect(
    input: &PlannerInput<'_>,
    case: &PartitionCase<'_>,
    blocked: &mut Vec<(PartitionId, BlockedReason)>,
) -> Option<PlannedChange> {
    let value = case.value;
    let is_live = |id| input.is_live(id);
    if value.leader.is_some_and(|leader| is_live(leader) && value.replicas.contains(&leader)) {
        return None;
    }
    let rank = |id: &BrokerId| {
        (input.is_stopping(*id), input.is_disk_full(*id), input.is_draining(*id), value.removing.contains(id))
    };
    let candidates = value.replicas.iter().copied().filter(|id| value.may_elect(*id, is_live));
    let elected = candidates.min_by_key(rank).and_then(|to| value.elect(to, is_live, case.min_insync));
    match elected {
        Some(value) => Some(case.change_to(value, ChangeReason::Elected)),
        None => {
            blocked.push((case.id, BlockedReason::NoLeader));
            value.leader.is_some().then(|| case.change_to(value.leaderless(), ChangeReason::Leaderless))
        }
    }
}

/// Transfers leadership to another ISR member if the leader is stopping, is drained or has a full disk. Returns `None`
/// if the leader should stay, or if no other ISR member should lead: the leader then keeps leading.
pub(super) fn transfer_leadership(input: &PlannerInput<'_>, case: &PartitionCase<'_>) -> Option<PlannedChange> {
    let value = case.value;
    let leader = value.leader?;
    if input.should_lead(leader) {
        return None;
    }
    let to = successor(input, case, |id| id != leader)?;
    let value = value.elect(to, |id| input.is_live(id), case.min_insync)?;
    Some(case.change_to(value, ChangeReason::ControlledShutdown))
}

/// Returns the first ISR member that should lead ([`PlannerInput::should_lead`]), is not being removed, and satisfies
/// `is_candidate`.
pub(super) fn successor(
    input: &PlannerInput<'_>,
    case: &PartitionCase<'_>,
    is_candidate: impl Fn(BrokerId) -> bool,
) -> Option<BrokerId> {
    let value = case.value;
    let is_eligible = |id: &BrokerId| {
        is_candidate(*id) && value.isr.contains(id) && input.should_lead(*id) && !value.removing.contains(id)
    };
    value.replicas.iter().copied().find(is_eligible)
}

/// Elects preferred leaders that should lead and do not: at most `max_preferred_elections` per plan, and only on
/// brokers that have been online for `PREFERRED_LEADER_DELAY_MS`. Skips partitions that this plan changes, that have no
/// leader, or that are under reassignment. If a broker is online for less time, or the limit is reached, requests a
/// later plan.
pub(super) fn return_to_preferred_leaders(
    input: &PlannerInput<'_>,
    cases: &[PartitionCase<'_>],
    changed: &BTreeSet<PartitionId>,
    plan: &mut ClusterPlan,
) {
    let mut remaining = input.limits.max_preferred_elections;
    for case in cases.iter().filter(|case| !case.is_reassigning() && !changed.contains(&case.id)) {
        let value = case.value;
        let preferred = value.replicas[0];
        let is_eligible = value.isr.contains(&preferred) && input.should_lead(preferred);
        if value.leader.is_none() || value.leader == Some(preferred) || !is_eligible {
            continue;
        }
        let online_ms = input.online_ms.get(&preferred).copied().unwrap_or(0);
        if online_ms < PREFERRED_LEADER_DELAY_MS {
            plan.request_plan_in(PREFERRED_LEADER_DELAY_MS - online_ms);
        } else if remaining == 0 {
            plan.request_plan_in(NEXT_PREFERRED_ELECTIONS_DELAY_MS);
            return;
        } else if let Some(value) = value.elect(preferred, |id| input.is_live(id), case.min_insync) {
            remaining -= 1;
            plan.changes.push(case.change_to(value, ChangeReason::PreferredLeader));
        }
    }
}
