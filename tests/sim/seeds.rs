//! Which seeds a test takes, on all cores, and what it says of them.
//!
//! A run has a thread of its own, and nothing that two runs share: panics, traces and broken rules are remembered for each thread.

use std::{
    fmt, panic,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use strandline::task::{clock, side_by_side};
use tokio::time::Instant;

use crate::{
    panics,
    run::{self, Shape},
    trace,
};

/// How often it says how far it is.
const TELL: Duration = Duration::from_secs(60);

/// Runs without any wish.
const SEEDS: u64 = 20;

/// The seeds of one test.
struct Seeds {
    first: u64,
    /// So many, or as many as the time allows.
    count: u64,
    until: Option<Instant>,
}

/// A number of the environment.
fn wish(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// The first seed: the one that was wished for, else 1.
pub(crate) fn first() -> u64 {
    wish("STRANDLINE_SEED").unwrap_or(1)
}

impl Seeds {
    /// Those of the environment: `STRANDLINE_SEEDS` from `STRANDLINE_SEED` on, or new ones for `STRANDLINE_SIM_SECONDS`, most of them for
    /// three brokers.
    fn wished(shape: Shape) -> Self {
        let Some(seconds) = wish("STRANDLINE_SIM_SECONDS") else {
            return Self { first: first(), count: wish("STRANDLINE_SEEDS").unwrap_or(SEEDS), until: None };
        };
        let seconds = if shape.brokers == 1 { seconds / 5 } else { seconds - seconds / 5 };
        let new = u64::try_from(clock::wall_ms()).unwrap_or(1);
        let first = wish("STRANDLINE_SEED").unwrap_or(new);
        Self { first, count: u64::MAX, until: Some(clock::monotonic() + Duration::from_secs(seconds)) }
    }

    /// The seed of this number, if it is still wanted.
    fn get(&self, number: u64) -> Option<u64> {
        let wanted = number < self.count && self.until.is_none_or(|until| clock::monotonic() < until);
        wanted.then(|| self.first + number)
    }
}

impl fmt::Display for Seeds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.until {
            Some(until) => write!(f, "seeds from {} on for {}", self.first, Time(until - clock::monotonic())),
            None => write!(f, "seeds {}..{}", self.first, self.first + self.count),
        }
    }
}

/// How many runs there are at the same time.
pub(crate) fn threads() -> usize {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    wish("STRANDLINE_THREADS").map_or(cores, |wished| usize::try_from(wished).unwrap_or(cores).max(1))
}

/// Runs the wished seeds of a shape. Panics when any of them found something.
pub(crate) fn run_all(shape: Shape) {
    let (seeds, began) = (Seeds::wished(shape), clock::monotonic());
    println!("sim: {shape}: {seeds}, {} at a time", threads());
    let (next, done) = (AtomicU64::new(0), AtomicU64::new(0));
    let (failed, told) = (Mutex::new(Vec::new()), Mutex::new(began));
    let so_far = || {
        let (done, failed) = (done.load(Ordering::Relaxed), failed.lock().unwrap().len());
        println!("sim: {done} seeds of {shape}, {failed} failed, {}", Time(clock::monotonic() - began));
    };
    side_by_side("sim", threads(), |_| {
        while let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed)) {
            if panic::catch_unwind(|| run::run(shape, seed)).is_err() {
                let why = panics::first().unwrap_or_default();
                println!("sim: seed {seed} of {shape} failed: {why}");
                println!("     make sim SEED={seed} SEEDS=1 ONLY={} TRACE=1 shows what happened", shape.test());
                failed.lock().unwrap().push(seed);
            }
            if std::env::var("STRANDLINE_TRACE").is_ok_and(|wish| !wish.is_empty()) {
                println!("{}", trace::last());
            }
            done.fetch_add(1, Ordering::Relaxed);
            let mut last = told.lock().unwrap();
            if last.elapsed() >= TELL {
                *last = clock::monotonic();
                so_far();
            }
        }
    });
    so_far();
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "{shape}: seeds {failed:?} failed");
}

/// A time for a reader.
struct Time(Duration);

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs_f64();
        if seconds < 120.0 { write!(f, "{seconds:.1} s") } else { write!(f, "{:.0} min", seconds / 60.0) }
    }
}
