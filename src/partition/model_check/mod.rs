//! Model check of replication: every order of events within bounds, over the decisions of the broker.
//!
//! # Overview
//!
//! A state (`world`) is three brokers, the partition's value in the metadata store, and the messages between the
//! brokers. Each broker has its log, its [`AppliedMetadata`] and its [`IsrTracker`] or [`Follower`]. `steps` lists the
//! possible next events: appends, syncs, late and reordered messages, and broken links. Further events are process
//! exits with or without loss, expired leases, elections, and transactions with a lost outcome. `rules` checks the
//! state after each step. [`explore`] visits every state that can be reached, in the order of its distance, so that a
//! counterexample is a shortest one.
//!
//! The check has no description of the protocol of its own. The check runs the structs of the broker, and makes the
//! values in the store by the broker's functions.
//!
//! From one state in [`LIVENESS_SAMPLING`] the model also continues without further faults (`liveness`). A leader must
//! then commit its epoch, every replica must be in sync again, and all records must be committed.
//!
//! The [`Budget`](world::Budget) limits the search: how often each event may happen on the path to a state. A hash of
//! 128 bits identifies a state.
//!
//! Mutations (`task::mutation`) show that the search finds violations: each mutation breaks one rule of the broker, and
//! gives a counterexample.
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

/// One state in this many is continued without faults, to check liveness.
const LIVENESS_SAMPLING: u128 = 64;

/// Result of a search.
#[derive(Debug)]
struct CheckResult {
    /// Number of different states.
    states: usize,
    /// Number of steps tried.
    steps: usize,
    /// Maximum distance of a state from the first state, in steps.
    depth: usize,
    /// True if every state within the bounds was visited.
    complete: bool,
    /// Shortest sequence of steps to a state that violates a rule, or from which the partition does not recover, and
    /// the violation. `None` if there is no such state.
    error: Option<(Vec<Step>, RuleViolation)>,
}

/// Returns the first state of a search: every broker has the value, and the followers are subscribed and have
/// acknowledged.
fn initial_state(setup: Setup) -> ModelState {
    let mut state = ModelState::new(setup);
    for me in 0..BROKERS {
        apply_value(&mut state, me);
    }
    let mut step_without_fault =
        |step: Step| state = state.after(step).expect("no step before a fault violates a rule");
    step_without_fault(Step::ApplyMetadata(0));
    for follower in 1..BROKERS {
        step_without_fault(Step::Subscribe { follower, request: DeliveryTime::Now, response: DeliveryTime::Now });
        step_without_fault(Step::Acknowledge { follower, arrives: DeliveryTime::Now });
    }
    state
}

/// Returns a 128-bit hash that identifies a state. With 64 bits, two of millions of states might share a hash.
fn state_hash(state: &ModelState) -> u128 {
    let half = |salt: u8| {
        let mut hasher = DefaultHasher::new();
        (salt, state).hash(&mut hasher);
        u128::from(hasher.finish())
    };
    half(0) << 64 | half(1)
}

/// Visits every state within the bounds, at most about `max_states`. Stops at the first violation.
fn explore(setup: Setup, max_states: usize) -> CheckResult {
    let first = initial_state(setup);
    let mut visited = HashSet::from([state_hash(&first)]);
    // For each state: the state before it, and the step from there.
    let mut reached: Vec<Option<(usize, Step)>> = vec![None];
    let mut queue = VecDeque::from([(0, 0, first)]);
    let mut result = CheckResult { states: 1, steps: 0, depth: 0, complete: false, error: None };
    while let Some((index, depth, state)) = queue.pop_front() {
        result.depth = depth;
        for step in state.steps() {
            result.steps += 1;
            match state.after(step) {
                Ok(next) => {
                    let hash = state_hash(&next);
                    if visited.insert(hash) {
                        if hash.is_multiple_of(LIVENESS_SAMPLING)
                            && let Err(error) = liveness::check_liveness(next.clone())
                        {
                            result.error = Some((path_to(&reached, index, step), error));
                            result.states = reached.len();
                            return result;
                        }
                        reached.push(Some((index, step)));
                        queue.push_back((reached.len() - 1, depth + 1, next));
                    }
                }
                Err(error) => {
                    result.error = Some((path_to(&reached, index, step), error));
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

/// Returns the steps from the first state to the state at `index`, followed by `last`. For each state, `reached`
/// contains the index of the previous state and the step from there; `None` for the first state.
fn path_to(reached: &[Option<(usize, Step)>], mut index: usize, last: Step) -> Vec<Step> {
    let mut steps = vec![last];
    while let Some((previous, step)) = reached[index] {
        steps.push(step);
        index = previous;
    }
    steps.reverse();
    steps
}
