//! Continuation of a state without further faults: all brokers restart, receive every message, and do what they can.

use super::{
    rules::Fault,
    steps::Step,
    world::{BROKERS, Budget, Role, World, at, id, index},
};

/// Maximum number of steps, more than any state needs.
const PATIENCE: usize = 400;

/// No faults, but elections for a partition without a leader.
const CALM: Budget = Budget { epochs: 20, ..Budget::NOTHING };

/// Follows the state until the state stops changing. Then every replica must be in sync and every record committed.
pub(super) fn comes_to_rest(mut world: World) -> Result<(), Fault> {
    world.budget = CALM;
    for _ in 0..PATIENCE {
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
            None => return is_whole(&world),
        }
    }
    Err(Fault::NeverWhole(format!("still going on: {world:?}")))
}

/// Ends the subscription of a follower whose link is lost, so that it subscribes again.
fn reconnect(world: &mut World) {
    for me in 0..BROKERS {
        let Role::Following(follower) = &world.brokers[me].role else { continue };
        let leader = index(follower.leader());
        let follows = match &world.brokers[leader].role {
            Role::Leading(it) => it.follows(id(me)) == Some(world.brokers[me].epoch),
            _ => false,
        };
        let wire = &world.wires[leader][me];
        let is_quiet = wire.to_leader.is_empty() && wire.to_follower.is_empty();
        if let Role::Following(follower) = &mut world.brokers[me].role
            && is_quiet
            && (follower.is_claiming() || follower.is_following() && !follows)
        {
            follower.interrupted();
        }
    }
}

fn is_whole(world: &World) -> Result<(), Fault> {
    // No replica is known to hold all committed records: the partition waits for an operator.
    if world.value.isr.is_empty() && world.value.elr.is_empty() {
        return Ok(());
    }
    let end = world.brokers.iter().map(|broker| at(broker.log.len())).max();
    let settled = world.brokers.iter().any(|broker| match &broker.role {
        Role::Leading(leader) => leader.epoch() == world.value.leader_epoch && leader.latest() == end,
        _ => false,
    });
    if settled && world.value.isr.len() == BROKERS && world.value.elr.is_empty() {
        return Ok(());
    }
    Err(Fault::NeverWhole(format!("at rest: {world:?}")))
}
