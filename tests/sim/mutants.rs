//! Rules of the broker that are broken on purpose, one at a time: each must be found within so many seeds.
//!
//! This is what the other tests here are worth. A rule that nobody misses is a check that is not there.

use std::panic::{self, AssertUnwindSafe};

use strandline::task::mutation::{self, Mutation};

use crate::{
    panics,
    run::{self, Shape},
};

/// The broken rules with the brokers of a run, and the seeds, from 1 on, one of which must find each.
const MUTANTS: &[(Mutation, Shape, u64)] = &[
    (Mutation::AcknowledgeBeforeSync, Shape::ONE, 20),
    (Mutation::EvictBeforeCommit, Shape::ONE, 40),
    (Mutation::SkipProof, Shape::THREE, 10),
    (Mutation::ElectAnyReplica, Shape::THREE, 10),
];

/// Rules whose breaking shows rarely: they take more seeds than every run of the tests has time for. Those of `partition/leader` and
/// `partition/follower` are found by the model check in every run.
const RARE: &[(Mutation, Shape, u64)] = &[
    (Mutation::ReadUncommitted, Shape::THREE, 2000),
    (Mutation::ResumeLeading, Shape::THREE, 2000),
    (Mutation::ChangeUncompared, Shape::THREE, 2000),
    (Mutation::AdmitUnregistered, Shape::THREE, 2000),
    (Mutation::BeginWithoutProducers, Shape::THREE, 2000),
    (Mutation::DeposedCommits, Shape::THREE, 2000),
    (Mutation::AckOfOlderLeaderEpoch, Shape::THREE, 2000),
    (Mutation::AckOfOlderBrokerEpoch, Shape::THREE, 2000),
    (Mutation::CutToHighWatermark, Shape::THREE, 2000),
    (Mutation::AdmitBelowEpochStart, Shape::THREE, 2000),
    (Mutation::CommittedIsrOnly, Shape::THREE, 2000),
    (Mutation::MinimumOfMaximal, Shape::THREE, 2000),
    (Mutation::ElrIgnored, Shape::THREE, 2000),
    (Mutation::UnknownIsDone, Shape::THREE, 2000),
];

#[test]
fn every_broken_rule_is_found() {
    search(MUTANTS);
}

#[test]
#[ignore = "takes an hour: make mutants MUTANT=name"]
fn every_rare_broken_rule_is_found() {
    search(RARE);
}

fn search(mutants: &[(Mutation, Shape, u64)]) {
    let only = std::env::var("STRANDLINE_MUTANT").unwrap_or_default();
    for &(mutation, shape, seeds) in mutants {
        if !format!("{mutation:?}").contains(&only) {
            continue;
        }
        let found = (1..=seeds).find_map(|seed| {
            let run = AssertUnwindSafe(|| run::run(shape, seed));
            let why = mutation::with(Some(mutation), || panic::catch_unwind(run));
            why.err().map(|_| (seed, panics::first().unwrap_or_default()))
        });
        let (seed, why) = found.unwrap_or_else(|| panic!("{mutation:?} was not found in {seeds} seeds"));
        println!("{mutation:?}: seed {seed}: {why}");
    }
}
