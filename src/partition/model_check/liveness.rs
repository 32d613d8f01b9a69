//! Continuation of a state without further faults: all brokers restart, receive every message, and do what they can.

use super::{
    rules::RuleViolation,
    steps::Step,
    world::{BROKERS, Budget, ModelState, Role, at, id, index},
};

/// Maximum number of steps; more than any state needs.
const MAX_STEPS: usize = 400;

/// No faults, but elections for a partition without a leader.
const CALM: Budget = Budget { epochs: 20, ..Budget::NOTHING };

/// Follows the state until the state stops changing. Then every replica must be in sync and every record committed.
pub(super) fn comes_to_rest(mut world: ModelState) -> Result<(), RuleViolation> {
    world.budget = CALM;
    for _ in 0..MAX_STEPS {
        reconnect(&mut world);
        let mut next = None;
        for step in world.steps() {
            // An election is better than a value without a leader.
            if step == Step::Leaderless || next.is_some() {
                continue;
            }
            let after = world.after(step)?;
            next = (after != world).then_some(after);
        }
        match next {
            Some(after) => world = after,
            None => return check_recovered(&world),
        }
    }
    Err(RuleViolation::NeverInSync(format!("no rest within the maximum number of steps: {world:?}")))
}

/// Ends the subscription of a follower whose link is lost, so that it subscribes again.
fn reconnect(world: &mut ModelState) {
    for me in 0..BROKERS {
        let Role::Following(follower) = &world.brokers[me].role else { continue };
        let leader = index(follower.leader());
        let follows = match &world.brokers[leader].role {
            Role::Leading(leader) => leader.follows(id(me)) == Some(world.brokers[me].epoch),
            _ => false,
        };
        let link = &world.wires[leader][me];
        let is_quiet = link.replicate_request.is_empty() && link.replicate_response.is_empty();
        if let Role::Following(follower) = &mut world.brokers[me].role
            && is_quiet
            && (follower.is_subscribing() || follower.is_following() && !follows)
        {
            follower.on_disconnected();
        }
    }
}

fn check_recovered(world: &ModelState) -> Result<(), RuleViolation> {
    // No replica is known to hold all committed records: the partition waits for an operator.
    if world.value.isr.is_empty() && world.value.elr.is_empty() {
        return Ok(());
    }
    let end = world.brokers.iter().map(|broker| at(broker.log.len())).max();
    let epoch_committed = world.brokers.iter().any(|broker| match &broker.role {
        Role::Leading(leader) => leader.epoch() == world.value.leader_epoch && leader.latest() == end,
        _ => false,
    });
    if epoch_committed && world.value.isr.len() == BROKERS && world.value.elr.is_empty() {
        return Ok(());
    }
    Err(RuleViolation::NeverInSync(format!("at rest: {world:?}")))
}
