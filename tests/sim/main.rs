//! Simulation: brokers and their clients in one process and one thread, from one seed.
//!
//! The brokers are the real ones (`server::Node`), and so is the client. Simulated are the disks, the network, the bucket, the metadata
//! store's link, the clocks and randomness, and death. Time jumps to the next timer when nothing can run. `make sim SEEDS=N SEED=first`
//! runs more; `STRANDLINE_TRACE=1` prints what happened.
//!
//! `run` is one run, `world` and `machine` what it happens to, `faults` what goes wrong, `load` the clients, `judge` and `history` what
//! must hold, `mutants` the proof that they would notice.

#![allow(clippy::unwrap_used, reason = "a failed assumption is a failed test")]

mod faults;
#[path = "../common/history.rs"]
mod history;
mod judge;
mod load;
mod logs;
mod machine;
mod meta;
mod mutants;
mod net;
mod objects;
mod panics;
mod run;
mod trace;
mod world;

use std::panic;

use run::Shape;

/// So many seeds, from the first one on: by the environment, else few.
fn seeds() -> std::ops::Range<u64> {
    let number = |name: &str, unless: u64| {
        std::env::var(name).map_or(unless, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
    };
    let first = number("STRANDLINE_SEED", 1);
    first..first + number("STRANDLINE_SEEDS", 20)
}

fn run_all(shape: Shape) {
    let mut failed = Vec::new();
    for seed in seeds() {
        if panic::catch_unwind(|| run::run(shape, seed)).is_err() {
            println!("seed {seed} of {} brokers failed", shape.brokers);
            failed.push(seed);
        }
        if std::env::var_os("STRANDLINE_TRACE").is_some() {
            println!("{}", trace::last());
        }
    }
    assert!(failed.is_empty(), "{} brokers: seeds {failed:?} of {:?} failed", shape.brokers, seeds());
}

/// Power losses, kills, broken and stalled links, a full disk, a bucket that fails and loses answers: what was acknowledged is there,
/// once, in order, and what was read once is read again.
#[test]
fn one_broker_keeps_what_it_acknowledged() {
    run_all(Shape::ONE);
}

/// The same of three brokers, which lose each other and the metadata store as well: whoever may lead holds what was acknowledged, logs
/// never contradict each other, and in peace every replica comes to hold the same.
#[test]
fn three_brokers_keep_what_they_acknowledged() {
    run_all(Shape::THREE);
}

/// Without this a seed that found something could not be looked at. It needs `--cfg tokio_unstable`: only then tokio's own choices follow
/// from a seed.
#[test]
#[cfg_attr(not(tokio_unstable), ignore = "needs RUSTFLAGS=--cfg tokio_unstable: make sim")]
fn a_seed_gives_the_same_trace_twice() {
    for shape in [Shape::ONE, Shape::THREE] {
        for seed in seeds().take(10) {
            let (first, second) = (run::run(shape, seed), run::run(shape, seed));
            let differs = first.lines().zip(second.lines()).find(|(one, other)| one != other);
            assert_eq!(differs, None, "seed {seed} of {shape:?}");
            assert_eq!(first.lines().count(), second.lines().count(), "seed {seed} of {shape:?}");
        }
    }
}
