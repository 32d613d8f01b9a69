//! Simulation: brokers and clients in one process and one thread, driven by one seed.
//!
//! The brokers (`server::Node`) and the client are the real code. Disks, network, object store, links to the metadata
//! store, clocks, randomness and crashes are simulated. Time jumps to the next timer when nothing can run.
//! `make sim SEEDS=N SEED=first` runs more seeds; `STRANDLINE_TRACE=1` prints the trace.
//!
//! | modules | content |
//! | --- | --- |
//! | `run`, `seeds` | one run; many runs |
//! | `world`, `machine`, `net`, `meta`, `objects` | the simulated environment |
//! | `faults`, `disks` | injected faults |
//! | `load`, `operator` | clients; admin operations during a run |
//! | `checker`, `reference`, `history` | rules that always hold |
//! | `logs`, `manifest` | content of the disks and the object store, read without the brokers |
//! | `liveness` | rules that hold some time after the faults |
//! | `mutants` | mutations that the checks must detect |
//! | `trace`, `panics` | trace of a run; its first panic or rule violation |

#![allow(clippy::unwrap_used, reason = "a failed assumption is a failed test")]

mod checker;
mod disks;
mod faults;
#[path = "../common/history.rs"]
mod history;
mod liveness;
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
mod reference;
mod run;
mod seeds;
mod trace;
mod world;

use std::sync::OnceLock;

use run::Topology;
use seeds::run_all;
use strandline::task::run_scoped;

// The broker's allocator. It makes a run a fifth shorter than the system's allocator does.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// No record acknowledged with `acks=all` or `acks=tiered` is lost. The records of an idempotent producer are stored
/// once and in order. Repeated reads return the same records. Faults: power loss, kill, stop, broken and stalled links,
/// a full, slow or failing disk, and clock jumps. The object store also fails or loses responses.
#[test]
fn one_broker_keeps_acknowledged_records() {
    run_all(Topology::ONE);
}

/// The same rules for three to five brokers, whose links to each other and to the metadata store also fail. In some
/// runs an operator reassigns partitions, drains brokers and changes topics. Every member of ISR and ELR holds the
/// acknowledged records, logs never contradict each other, and after the faults all replicas become equal.
#[test]
fn three_brokers_keep_acknowledged_records() {
    run_all(Topology::THREE);
}

/// Number of seeds of each topology that are run twice.
const TWICE: usize = 5;

/// A failing seed can only be analysed if its run is reproducible. The two runs of a seed are concurrent, so the test
/// also shows that runs share no state. The test needs `--cfg tokio_unstable`: only then the seed determines tokio's
/// own choices.
#[test]
#[cfg_attr(not(tokio_unstable), ignore = "needs RUSTFLAGS=--cfg tokio_unstable: make sim")]
fn seed_run_twice_gives_same_trace() {
    for shape in [Topology::ONE, Topology::THREE] {
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
