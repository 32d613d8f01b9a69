//! Mutations of the broker's rules, one at a time: each must be detected within a stated number of seeds.
//!
//! These tests measure the other tests of the simulation: an undetected mutation means a missing check.

use std::{
    panic::{self, AssertUnwindSafe},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use strandline::task::{
    mutation::{self, Mutation},
    run_scoped,
};

use crate::{
    faults::Theme,
    panics,
    run::{self, Shape},
};

/// Mutations with the topology of their runs and a number of seeds. One of these seeds, from 1 on, must detect the mutation. The number was
/// at least three times the needed one when this list was written. docs/replication.md describes what shows each mutation.
const MUTANTS: &[(Mutation, Shape, u64)] = &[
    (Mutation::AcknowledgeBeforeSync, Shape::ONE, 10),
    (Mutation::ReuseJournalFileBeforeSync, Shape::ONE, 20),
    (Mutation::TreatFailedPutAsDone, Shape::ONE, 30),
    (Mutation::CollectReferenced, Shape::ONE, 40),
    (Mutation::EvictBeforeCommit, Shape::ONE, 10),
    (Mutation::DropLastFrame, Shape::ONE, 20),
    (Mutation::ApplyOlderMetadata, Shape::THREE, 110),
    (Mutation::TruncateToHighWatermark, Shape::THREE, 30),
    (Mutation::SkipStartupVerification, Shape::THREE, 90),
    (Mutation::AdmitBelowEpochStart, Shape::THREE, 40),
    (Mutation::DeposedLeaderCommits, Shape::THREE, 40),
    (Mutation::ElectAnyReplica, Shape::THREE, 20),
    (Mutation::KeepOldLeadership, Shape::THREE, 20),
    (Mutation::UpdateWithoutCas, Shape::THREE, 40),
    (Mutation::HighWatermarkOverCommittedIsr, Shape::THREE, 40),
    (Mutation::MinIsrOverMaximalIsr, Shape::THREE, 40),
    (Mutation::DropElr, Shape::THREE, 20),
    (Mutation::TreatUnknownAsDone, Shape::THREE, 20),
    (Mutation::BootstrapWithoutProducers, Shape::THREE, 20),
    (Mutation::ReadUncommitted, Shape::THREE, 10),
    (Mutation::LatestBeforeEpochCommitted, Shape::THREE, 80),
    (Mutation::FollowerServesUncommitted, Shape::THREE, 10),
    (Mutation::CountOlderEpochAcks, Shape::THREE.about(Theme::Leases), 40),
];

/// Mutations without a stated number of seeds. The model check (`partition/check`) detects those of `partition/leader` in every test run.
///
/// | mutation | why it is rare |
/// | --- | --- |
/// | `AcceptOlder…EpochAck` | A subscription ends with its leader epoch, a link with its broker epoch: no older acknowledgement arrives |
/// | `IgnoreElr` | Few runs lower `min.insync.replicas` |
/// | `AdmitAfterEpochCommitted` | The next election releases a partition whose epoch is not committed |
const RARE: &[(Mutation, Shape, u64)] = &[
    (Mutation::TruncateUnjournaled, Shape::THREE, 2000),
    (Mutation::AdoptNewerTieredEnd, Shape::THREE, 2000),
    (Mutation::TreatUncleanAsClean, Shape::THREE.about(Theme::OneDown), 2000),
    (Mutation::AdmitStaleBrokerEpoch, Shape::THREE.about(Theme::Admissions), 2000),
    (Mutation::AcceptOlderLeaderEpochAck, Shape::THREE, 2000),
    (Mutation::ObeyOlderLeaderEpoch, Shape::THREE.about(Theme::Leases), 2000),
    (Mutation::AcceptOlderBrokerEpochAck, Shape::THREE, 2000),
    (Mutation::IgnoreElr, Shape::THREE, 2000),
    (Mutation::AdmitAfterEpochCommitted, Shape::THREE, 2000),
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

/// Runs seeds for each mutation until one detects it. Mutations run concurrently, one per core.
fn search(mutants: &[(Mutation, Shape, u64)]) {
    let only = std::env::var("STRANDLINE_MUTANT").unwrap_or_default();
    let wanted: Vec<_> = mutants.iter().filter(|(mutation, ..)| format!("{mutation:?}").contains(&only)).collect();
    let (next, missed) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    run_scoped("mutants", cores, |_| {
        while let Some(&&(mutation, shape, seeds)) = wanted.get(next.fetch_add(1, Ordering::Relaxed)) {
            match found(mutation, shape, seeds) {
                Some((seed, why)) => println!("{mutation:?}: seed {seed}: {why}"),
                None => missed.lock().unwrap().push(format!("{mutation:?} in {seeds} seeds")),
            }
        }
    });
    let missed = missed.into_inner().unwrap();
    assert!(missed.is_empty(), "not found: {missed:?}");
}

/// Returns the first seed that detects a mutation, and the message.
fn found(mutation: Mutation, shape: Shape, seeds: u64) -> Option<(u64, String)> {
    (1..=seeds).find_map(|seed| {
        let why = fails(Some(mutation), shape, seed)?;
        // A seed that also fails without the mutation has detected something else.
        fails(None, shape, seed).is_none().then_some((seed, why))
    })
}

/// Runs a seed. Returns the message if it fails.
fn fails(mutation: Option<Mutation>, shape: Shape, seed: u64) -> Option<String> {
    let run = AssertUnwindSafe(|| run::run(shape, seed));
    let failed = mutation::with_mutation(mutation, || panic::catch_unwind(run)).is_err();
    failed.then(|| panics::first().unwrap_or_else(|| "a run that fails at its end".to_owned()))
}
