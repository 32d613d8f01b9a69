//! Replication, model-checked: every order of events within bounds, over the real decisions.
//!
//! # Overview
//!
//! A state (`world`) is three brokers with their logs, their [`AppliedMetadata`] and their [`IsrTracker`] or
//! [`Follower`], the partition's value in the metadata store, and the messages between them. `steps` lists the possible
//! next events: appends, syncs, late and reordered messages, broken links, process exits with or without loss, expired
//! leases, elections, transactions with a lost outcome. `rules` checks the state after each step. [`explore`] visits
//! every state that can be reached, nearest first, so that a counterexample is a shortest one.
//!
//! There is no second description of the protocol: the explored structs are those that brokers run, and the same
//! functions make the values in the store.
//!
//! From one state in [`CALM`] no further fault follows (`liveness`). Then a leader must commit its epoch, every replica
//! must be in sync again, and all records in the log must be committed.
//!
//! The [`Budget`](world::Budget) limits the search: how often each event may happen on the way to a state. A hash of
//! 128 bits identifies a state.
//!
//! Mutations (`task::mutation`) show that the search finds violations: each rule that is broken on purpose gives a
//! counterexample.
//!
//! [`IsrTracker`]: super::leader::isr::IsrTracker
//! [`Follower`]: super::follower::Follower
//! [`AppliedMetadata`]: super::metadata::AppliedMetadata

mod liveness;
mod rules;
mod steps;
mod tests;
mod world;

use std::{
    collections::{HashSet, VecDeque},
    hash::{DefaultHasher, Hash, Hasher},
};

use self::{
    rules::{RuleViolation, apply_value},
    steps::{DeliveryTime, Step},
    world::{BROKERS, ModelState, Setup},
};

/// One state in this many is continued without faults until nothing changes.
const CALM: u128 = 64;

/// Result of a search.
#[derive(Debug)]
struct CheckResult {
    /// Number of different states.
    states: usize,
    /// Number of steps tried.
    steps: usize,
    /// Maximum length of the shortest ways to the states.
    depth: usize,
    /// True if every state within the bounds was visited.
    complete: bool,
    /// A shortest way to a state that violates a rule, and the violation.
    error: Option<(Vec<Step>, RuleViolation)>,
}

/// Returns the state from which a search begins: every broker has the value, and the followers are subscribed.
fn beginning(setup: Setup) -> ModelState {
    let mut world = ModelState::new(setup);
    for me in 0..BROKERS {
        apply_value(&mut world, me);
    }
    let mut step_without_fault =
        |step: Step| world = world.after(step).expect("no step before a fault violates a rule");
    step_without_fault(Step::ApplyMetadata(0));
    for follower in 1..BROKERS {
        step_without_fault(Step::Subscribe { follower, request: DeliveryTime::Now, response: DeliveryTime::Now });
        step_without_fault(Step::Acknowledge { follower, arrives: DeliveryTime::Now });
    }
    world
}

/// Returns the identity of a state: two hashes, so that two states of a search of millions do not share it by chance.
fn state_hash(world: &ModelState) -> u128 {
    let half = |salt: u8| {
        let mut hasher = DefaultHasher::new();
        (salt, world).hash(&mut hasher);
        u128::from(hasher.finish())
    };
    half(0) << 64 | half(1)
}

/// Visits every state within the bounds, or as many as `max_states`.
fn explore(setup: Setup, max_states: usize) -> CheckResult {
    let first = beginning(setup);
    let mut visited = HashSet::from([state_hash(&first)]);
    // For each state: the state before it, and the step from there.
    let mut reached: Vec<Option<(usize, Step)>> = vec![None];
    let mut queue = VecDeque::from([(0, 0, first)]);
    let mut result = CheckResult { states: 1, steps: 0, depth: 0, complete: false, error: None };
    while let Some((index, depth, world)) = queue.pop_front() {
        result.depth = depth;
        for step in world.steps() {
            result.steps += 1;
            match world.after(step) {
                Ok(next) => {
                    let hash = state_hash(&next);
                    if visited.insert(hash) {
                        if hash.is_multiple_of(CALM)
                            && let Err(error) = liveness::comes_to_rest(next.clone())
                        {
                            result.error = Some((way(&reached, index, step), error));
                            result.states = reached.len();
                            return result;
                        }
                        reached.push(Some((index, step)));
                        queue.push_back((reached.len() - 1, depth + 1, next));
                    }
                }
                Err(error) => {
                    result.error = Some((way(&reached, index, step), error));
                    result.states = reached.len();
                    return result;
                }
            }
        }
        if reached.len() > max_states {
            result.states = reached.len();
            return result;
        }
    }
    CheckResult { states: reached.len(), complete: true, ..result }
}

/// Returns the steps from the beginning to a state, and one more.
fn way(reached: &[Option<(usize, Step)>], mut index: usize, last: Step) -> Vec<Step> {
    let mut steps = vec![last];
    while let Some((before, step)) = reached[index] {
        steps.push(step);
        index = before;
    }
    steps.reverse();
    steps
}
