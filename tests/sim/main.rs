//! Simulation: brokers and their clients in one process and one thread, from one seed.
//!
//! The brokers are the real ones (`server::Node`), and so is the client. Simulated are the disks, the network, the bucket, the metadata
//! store's link, the clocks and randomness, and death. Time jumps to the next timer when nothing can run. `make sim SEEDS=N SEED=first`
//! runs more; `STRANDLINE_TRACE=1` prints what happened.
//!
//! `run` is one run and `seeds` are many, `world` and `machine` what it happens to, `faults` and `disks` what goes wrong, `load` the clients, `operator`
//! who changes the cluster meanwhile, `judge`, `truth` and `history` what must hold, `peace` what must come to
//! hold in the end, `mutants` the proof that they would notice.

#![allow(clippy::unwrap_used, reason = "a failed assumption is a failed test")]

mod disks;
mod faults;
#[path = "../common/history.rs"]
mod history;
mod judge;
mod load;
mod logs;
mod machine;
mod manifest;
mod meta;
mod mutants;
mod net;
mod objects;
mod operator;
mod panics;
mod peace;
mod run;
mod seeds;
mod trace;
mod truth;
mod world;

use std::sync::OnceLock;

use run::Shape;
use seeds::run_all;
use strandline::task::run_scoped;

// As the broker's own: a run takes a fifth less time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Power losses, kills, broken and stalled links, a full disk, a bucket that fails and loses answers: what was acknowledged is there,
/// once, in order, and what was read once is read again.
#[test]
fn one_broker_keeps_what_it_acknowledged() {
    run_all(Shape::ONE);
}

/// The same of three brokers and more, which lose each other and the metadata store as well, and whose partitions an operator moves in
/// some of the runs: whoever may lead holds what was acknowledged, logs never contradict each other, and in peace every replica comes to
/// hold the same.
#[test]
fn three_brokers_keep_what_they_acknowledged() {
    run_all(Shape::THREE);
}

/// How many seeds are run twice.
const TWICE: usize = 5;

/// Without this a seed that found something could not be looked at. Both runs go on at the same time: nothing of one may be seen in the
/// other. It needs `--cfg tokio_unstable`: only then tokio's own choices follow from a seed.
#[test]
#[cfg_attr(not(tokio_unstable), ignore = "needs RUSTFLAGS=--cfg tokio_unstable: make sim")]
fn a_seed_gives_the_same_trace_twice() {
    for shape in [Shape::ONE, Shape::THREE] {
        for seed in (seeds::first()..).take(TWICE) {
            let traces = [const { OnceLock::new() }; 2];
            run_scoped("sim", 2, |number| drop(traces[number].set(run::run(shape, seed))));
            let [one, other] = traces.map(|trace| trace.into_inner().unwrap_or_else(|| run::run(shape, seed)));
            let differs = one.lines().zip(other.lines()).find(|(one, other)| one != other);
            assert_eq!(differs, None, "seed {seed} of {shape}");
            assert_eq!(one.lines().count(), other.lines().count(), "seed {seed} of {shape}");
        }
    }
}
