//! Mutations of the broker's rules, one in each run: each must be detected within a stated number of seeds.
//!
//! These tests measure the checks of the simulation: an undetected mutation means that a check is missing.

use std::{
    panic::{self, AssertUnwindSafe},
    sync::atomic::{AtomicUsize, Ordering},
};

use strandline::task::{
    lock::Mutex,
    mutation::{self, Mutation},
    run_scoped,
};

use crate::{
    faults::FaultProfile,
    panics,
    run::{self, Topology},
};

/// Mutations with the topology of their runs and a number of seeds. One of these seeds, from 1 on, must detect the
/// mutation. When this list was written, a third of the seeds was enough. docs/replication.md describes the events that
/// show each mutation.
const MUTANTS: &[(Mutation, Topology, u64)] = &[
    (Mutation::AcknowledgeBeforeSync, Topology::ONE, 10),
    (Mutation::ReuseJournalFileBeforeSync, Topology::ONE, 20),
    (Mutation::TreatFailedPutAsDone, Topology::ONE, 30),
    (Mutation::CollectReferenced, Topology::ONE, 40),
    (Mutation::EvictBeforeCommit, Topology::ONE, 10),
    (Mutation::DropLastFrame, Topology::ONE, 20),
    (Mutation::ApplyOlderMetadata, Topology::THREE, 110),
    (Mutation::TruncateToHighWatermark, Topology::THREE, 30),
    (Mutation::SkipStartupVerification, Topology::THREE, 90),
    (Mutation::AdmitBelowEpochStart, Topology::THREE, 40),
    (Mutation::DeposedLeaderCommits, Topology::THREE, 40),
    (Mutation::ElectAnyReplica, Topology::THREE, 20),
    (Mutation::KeepOldLeadership, Topology::THREE, 20),
    (Mutation::UpdateWithoutCas, Topology::THREE, 40),
    (Mutation::HighWatermarkOverCommittedIsr, Topology::THREE, 40),
    (Mutation::MinIsrOverMaximalIsr, Topology::THREE, 40),
    (Mutation::DropElr, Topology::THREE, 20),
    (Mutation::TreatUnknownAsDone, Topology::THREE, 20),
    (Mutation::BootstrapWithoutProducers, Topology::THREE, 20),
    (Mutation::ReadUncommitted, Topology::THREE, 10),
    (Mutation::LatestBeforeEpochCommitted, Topology::THREE, 80),
    (Mutation::FollowerServesUncommitted, Topology::THREE, 10),
    (Mutation::CountOlderEpochAcks, Topology::THREE.with_profile(FaultProfile::Leases), 40),
    (Mutation::TruncateUnjournaled, Topology::THREE, 90),
    (Mutation::TreatUncleanAsClean, Topology::THREE.with_profile(FaultProfile::OneDown), 110),
    (Mutation::AdmitStaleBrokerEpoch, Topology::THREE.with_profile(FaultProfile::Admissions), 30),
    (Mutation::AdmitAfterEpochCommitted, Topology::THREE, 10),
];

/// Mutations that few seeds detect. A third of the seeds was enough here too, but their runs take minutes.
const RARE: &[(Mutation, Topology, u64)] =
    &[(Mutation::AdoptNewerTieredEnd, Topology::THREE, 740), (Mutation::IgnoreElr, Topology::THREE, 1260)];

/// Mutations that none of the seeds 1 to 2,000 detects. A new leader epoch ends the subscription, and a new broker
/// epoch the link, so a message of an older epoch rarely arrives. Other tests detect them in every run: the model check
/// (`partition/model_check`) the first two, and `message_of_another_epoch_changes_nothing` in `partition/follower` the
/// last one. These mutations are simulated only if `STRANDLINE_MUTANT` selects them.
const UNDETECTED: &[(Mutation, Topology, u64)] = &[
    (Mutation::AcceptOlderLeaderEpochAck, Topology::THREE, 2000),
    (Mutation::AcceptOlderBrokerEpochAck, Topology::THREE, 2000),
    (Mutation::ObeyOlderLeaderEpoch, Topology::THREE.with_profile(FaultProfile::Leases), 2000),
];

#[test]
fn every_broken_rule_is_found() {
    search(MUTANTS);
}

#[test]
#[ignore = "takes minutes: make mutants MUTANT=name"]
fn every_rare_broken_rule_is_found() {
    let is_one_selected = std::env::var_os("STRANDLINE_MUTANT").is_some_and(|name| !name.is_empty());
    if is_one_selected { search(&[RARE, UNDETECTED].concat()) } else { search(RARE) }
}

/// Runs seeds for each mutation until one detects it, and panics if none does. `STRANDLINE_MUTANT` selects the
/// mutations whose names contain its value. As many mutations as there are cores run concurrently.
fn search(mutants: &[(Mutation, Topology, u64)]) {
    let only = std::env::var("STRANDLINE_MUTANT").unwrap_or_default();
    let wanted: Vec<_> = mutants.iter().filter(|(mutation, ..)| format!("{mutation:?}").contains(&only)).collect();
    let (next, missed) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    run_scoped("mutants", cores, |_| {
        while let Some(&&(mutation, shape, seeds)) = wanted.get(next.fetch_add(1, Ordering::Relaxed)) {
            match find_seed(mutation, shape, seeds) {
                Some((seed, reason)) => println!("{mutation:?}: seed {seed}: {reason}"),
                None => missed.lock().push(format!("{mutation:?} in {seeds} seeds")),
            }
        }
    });
    let missed = missed.into_inner();
    assert!(missed.is_empty(), "not found: {missed:?}");
}

/// Returns the first of `seeds` seeds that detects a mutation, and the message of the failure; `None` if no seed does.
fn find_seed(mutation: Mutation, shape: Topology, seeds: u64) -> Option<(u64, String)> {
    (1..=seeds).find_map(|seed| {
        let reason = run_seed(Some(mutation), shape, seed)?;
        // A seed that also fails without the mutation does not count: it has detected another error.
        run_seed(None, shape, seed).is_none().then_some((seed, reason))
    })
}

/// Runs a seed, with the mutation if there is one. Returns the message of the failure; `None` if the run passes.
fn run_seed(mutation: Option<Mutation>, shape: Topology, seed: u64) -> Option<String> {
    let run = AssertUnwindSafe(|| run::run(shape, seed));
    let failed = mutation::with_mutation(mutation, || panic::catch_unwind(run)).is_err();
    failed.then(|| panics::first().unwrap_or_else(|| "a run that fails at its end".to_owned()))
}
