//! Simulation: one broker and its clients in one process and one thread, from one seed.
//!
//! The broker is the real one (`server::Node`), and so is the client. Simulated are the disk, the network, the bucket, the clocks and
//! randomness, and death. Time jumps to the next timer when nothing can run. `make sim SEEDS=N SEED=first` runs more.

#![allow(clippy::unwrap_used, reason = "a failed assumption is a failed test")]

mod mutants;
mod net;
mod objects;
mod run;
mod trace;
mod world;

/// So many seeds, from the first one on: by the environment, else few.
fn seeds() -> std::ops::Range<u64> {
    let number = |name: &str, unless: u64| {
        std::env::var(name).map_or(unless, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
    };
    let first = number("STRANDLINE_SEED", 1);
    first..first + number("STRANDLINE_SEEDS", 20)
}

/// Power losses, kills, broken and stalled links, a full disk, a bucket that fails and loses answers: what was acknowledged is there,
/// once, in order, and what was read once is read again.
#[test]
fn what_is_acknowledged_survives_every_fault() {
    for seed in seeds() {
        println!("seed {seed}");
        let trace = run::run(seed);
        if std::env::var_os("STRANDLINE_TRACE").is_some() {
            println!("{trace}");
        }
    }
}

/// Without this a seed that found something could not be looked at. It needs `--cfg tokio_unstable`: only then tokio's own choices follow
/// from a seed.
#[test]
#[cfg_attr(not(tokio_unstable), ignore = "needs RUSTFLAGS=--cfg tokio_unstable: make sim")]
fn a_seed_gives_the_same_trace_twice() {
    for seed in seeds().take(20) {
        let (first, second) = (run::run(seed), run::run(seed));
        let differs = first.lines().zip(second.lines()).find(|(one, other)| one != other);
        assert_eq!(differs, None, "seed {seed}");
        assert_eq!(first.lines().count(), second.lines().count(), "seed {seed}");
    }
}
