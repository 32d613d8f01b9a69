//! What becomes of a state when no further fault comes: everybody restarts, hears of everything, and does what it can.

use super::{
    rules::Fault,
    steps::Step,
    world::{BROKERS, Budget, Role, World, at, id, index},
};

/// More steps than any state needs.
const PATIENCE: usize = 400;

/// No fault at all, but elections for whoever is without a leader.
const CALM: Budget = Budget { epochs: 20, ..Budget::NOTHING };

/// Follows the state until nothing changes any more, and checks that the partition is whole then.
pub(super) fn comes_to_rest(mut world: World) -> Result<(), Fault> {
    world.budget = CALM;
    for _ in 0..PATIENCE {
        reconnect(&mut world);
        let mut next = None;
        for step in world.steps() {
            // An election is better than nobody.
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

/// A follower whose link is gone notices, and claims again.
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
    // Nobody can prove to hold what was committed: the partition waits for an operator.
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
