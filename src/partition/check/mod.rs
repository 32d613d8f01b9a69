//! Replication, model-checked: every order of events within bounds, over the real decisions.
//!
//! # Overview
//!
//! A state (`world`) is three brokers with their logs and their [`InSync`] or [`Follower`], the partition's value in the metadata store,
//! and the messages between them. `steps` lists the possible next events: appends, syncs, late and reordered messages, broken links,
//! process exits with or without loss, expired leases, elections, transactions with a lost outcome. `rules` checks the state after each
//! step. [`explore`] visits every state that can be reached, nearest first, so that a counterexample is a shortest one.
//!
//! There is no second description of the protocol: the explored structs are those that brokers run, and the same functions make the
//! values in the store.
//!
//! From one state in [`CALM`] no further fault follows (`calm`). Then a leader must commit its epoch, every replica must be in sync
//! again, and all records in the log must be committed.
//!
//! The [`Budget`](world::Budget) limits the search: how often each event may happen on the way to a state. A hash of 128 bits identifies
//! a state.
//!
//! Mutations (`task::mutation`) show that the search finds violations: each rule that is broken on purpose gives a counterexample.
//!
//! [`InSync`]: super::leader::insync::InSync
//! [`Follower`]: super::follower::Follower

mod calm;
mod rules;
mod steps;
mod tests;
mod world;

use std::{
    collections::{HashSet, VecDeque},
    hash::{DefaultHasher, Hash, Hasher},
};

use self::{
    rules::{Fault, learned_role},
    steps::{Arrives, Step},
    world::{BROKERS, Setup, World},
};

/// One state in this many is continued without faults until nothing changes.
const CALM: u128 = 64;

/// Result of a search.
#[derive(Debug)]
struct Found {
    /// Number of different states.
    states: usize,
    /// Number of steps tried.
    steps: usize,
    /// Maximum length of the shortest ways to the states.
    depth: usize,
    /// True if every state within the bounds was visited.
    complete: bool,
    /// A shortest way to a state that violates a rule, and the violation.
    fault: Option<(Vec<Step>, Fault)>,
}

/// Returns the state from which a search begins: every broker has the value, and the followers are subscribed.
fn beginning(setup: Setup) -> World {
    let mut world = World::new(setup);
    for me in 0..BROKERS {
        world.brokers[me].known = world.revision;
        learned_role(&mut world, me);
    }
    let mut calm = |step: Step| world = world.after(step).expect("nothing has happened yet");
    calm(Step::Learn(0));
    for follower in 1..BROKERS {
        calm(Step::Join { follower, claim: Arrives::Now, answer: Arrives::Now });
        calm(Step::Acknowledge { follower, arrives: Arrives::Now });
    }
    world
}

/// Returns the identity of a state: two hashes, so that two states of a search of millions do not share it by chance.
fn name(world: &World) -> u128 {
    let half = |salt: u8| {
        let mut hasher = DefaultHasher::new();
        (salt, world).hash(&mut hasher);
        u128::from(hasher.finish())
    };
    half(0) << 64 | half(1)
}

/// Visits every state within the bounds, or as many as `most`.
fn explore(setup: Setup, most: usize) -> Found {
    let first = beginning(setup);
    let mut names = HashSet::from([name(&first)]);
    // For each state: the state before it, and the step from there.
    let mut reached: Vec<Option<(usize, Step)>> = vec![None];
    let mut edge = VecDeque::from([(0, 0, first)]);
    let mut found = Found { states: 1, steps: 0, depth: 0, complete: false, fault: None };
    while let Some((place, depth, world)) = edge.pop_front() {
        found.depth = depth;
        for step in world.steps() {
            found.steps += 1;
            match world.after(step) {
                Ok(next) => {
                    let name = name(&next);
                    if names.insert(name) {
                        if name.is_multiple_of(CALM)
                            && let Err(fault) = calm::comes_to_rest(next.clone())
                        {
                            found.fault = Some((way(&reached, place, step), fault));
                            found.states = reached.len();
                            return found;
                        }
                        reached.push(Some((place, step)));
                        edge.push_back((reached.len() - 1, depth + 1, next));
                    }
                }
                Err(fault) => {
                    found.fault = Some((way(&reached, place, step), fault));
                    found.states = reached.len();
                    return found;
                }
            }
        }
        if reached.len() > most {
            found.states = reached.len();
            return found;
        }
    }
    Found { states: reached.len(), complete: true, ..found }
}

/// Returns the steps from the beginning to a state, and one more.
fn way(reached: &[Option<(usize, Step)>], mut place: usize, last: Step) -> Vec<Step> {
    let mut steps = vec![last];
    while let Some((before, step)) = reached[place] {
        steps.push(step);
        place = before;
    }
    steps.reverse();
    steps
}
