//! Liveness: from a state without further faults, all brokers restart, every message arrives, and the partition must
//! recover.

use super::{
    rules::RuleViolation,
    steps::Step,
    world::{BROKERS, Budget, ModelState, Role, at, id, index},
};

/// Maximum number of steps, more than the recovery from any state needs.
const MAX_STEPS: usize = 400;

/// No faults, but elections for a partition without a registered leader.
const ELECTIONS_ONLY: Budget = Budget { epochs: 20, ..Budget::NOTHING };

/// Continues a state without further faults until no step changes it. Each time, the first possible step that changes
/// the state is taken. In the last state every replica must be in sync and every record committed, unless ISR and ELR
/// are empty.
pub(super) fn check_liveness(mut state: ModelState) -> Result<(), RuleViolation> {
    state.budget = ELECTIONS_ONLY;
    for _ in 0..MAX_STEPS {
        reconnect(&mut state);
        match next_state(&state)? {
            Some(next) => state = next,
            None => return check_recovered(&state),
        }
    }
    Err(RuleViolation::NeverInSync(format!("no rest within the maximum number of steps: {state:?}")))
}

/// Returns the state after the first possible step that changes the state; `None` if no step does.
fn next_state(state: &ModelState) -> Result<Option<ModelState>, RuleViolation> {
    // `ClearLeader` is excluded: the controller prefers an election to a value without a leader.
    for step in state.steps().into_iter().filter(|step| *step != Step::ClearLeader) {
        let next = state.after(step)?;
        if next != *state {
            return Ok(Some(next));
        }
    }
    Ok(None)
}

/// Ends the subscription of each follower whose link was lost, so that the follower subscribes again. The model does
/// not store whether a link is up. A link counts as lost if no message is in flight on it, and the leader has not
/// responded to the subscription. Without a message in flight, it also counts as lost if the leader does not have the
/// subscription for this broker epoch.
fn reconnect(state: &mut ModelState) {
    for me in 0..BROKERS {
        let Role::Following(follower) = &state.brokers[me].role else { continue };
        let leader = index(follower.leader());
        let is_served = match &state.brokers[leader].role {
            Role::Leading(leader) => leader.follows(id(me)) == Some(state.brokers[me].epoch),
            _ => false,
        };
        let link = &state.links[leader][me];
        let has_no_messages = link.replicate_request.is_empty() && link.replicate_response.is_empty();
        if let Role::Following(follower) = &mut state.brokers[me].role
            && has_no_messages
            && (follower.is_subscribing() || follower.is_following() && !is_served)
        {
            follower.on_disconnected();
        }
    }
}

/// Checks that every replica is in sync and every record is committed. Accepts a value with empty ISR and ELR.
fn check_recovered(state: &ModelState) -> Result<(), RuleViolation> {
    // With ISR and ELR empty, no replica certainly holds all committed records: only an operator can elect a leader.
    if state.value.isr.is_empty() && state.value.elr.is_empty() {
        return Ok(());
    }
    let end = state.brokers.iter().map(|broker| at(broker.log.len())).max();
    let epoch_committed = state.brokers.iter().any(|broker| match &broker.role {
        Role::Leading(leader) => leader.epoch() == state.value.leader_epoch && leader.latest() == end,
        _ => false,
    });
    if epoch_committed && state.value.isr.len() == BROKERS && state.value.elr.is_empty() {
        return Ok(());
    }
    Err(RuleViolation::NeverInSync(format!("at rest: {state:?}")))
}
