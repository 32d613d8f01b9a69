//! The seeds of a test: their selection, their runs on all cores, and the reports about them.
//!
//! A thread runs one seed at a time. Concurrent runs share no state: panics, traces and mutations are stored per
//! thread.

use std::{
    collections::BTreeMap,
    fmt, panic, process,
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::Duration,
};

use strandline::task::{
    clock,
    lock::{Condvar, Mutex},
    run_scoped,
};
use tokio::time::Instant;

use crate::{
    panics,
    run::{self, Topology},
    trace,
};

/// Interval between progress reports.
const REPORT_INTERVAL: Duration = Duration::from_secs(60);

/// Maximum real time of a run, which normally takes a fraction of a second. A longer run counts as endless.
const RUN_TIMEOUT: Duration = Duration::from_secs(600);

/// Number of seeds if `STRANDLINE_SEEDS` and `STRANDLINE_SIM_SECONDS` are not set.
const SEEDS: u64 = 20;

/// Seeds of one test.
struct Seeds {
    first: u64,
    /// Maximum number of seeds; unlimited with `until`.
    count: u64,
    until: Option<Instant>,
}

/// Returns the number in an environment variable; `None` if the variable is not set. Panics if it is not a number.
fn env_number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

/// Returns the first seed: `STRANDLINE_SEED`, else 1.
pub(crate) fn first() -> u64 {
    env_number("STRANDLINE_SEED").unwrap_or(1)
}

impl Seeds {
    /// Returns the seeds that the environment selects: `STRANDLINE_SEEDS` seeds from `STRANDLINE_SEED` on. With
    /// `STRANDLINE_SIM_SECONDS`, as many seeds as start in this time; without `STRANDLINE_SEED`, the first one is the
    /// time of the wall clock. The test of one broker gets a fifth of the time, that of three brokers the rest.
    fn from_environment(shape: Topology) -> Self {
        let Some(seconds) = env_number("STRANDLINE_SIM_SECONDS") else {
            return Self { first: first(), count: env_number("STRANDLINE_SEEDS").unwrap_or(SEEDS), until: None };
        };
        let seconds = if shape.brokers == 1 { seconds / 5 } else { seconds - seconds / 5 };
        let new = u64::try_from(clock::wall_ms()).unwrap_or(1);
        let first = env_number("STRANDLINE_SEED").unwrap_or(new);
        Self { first, count: u64::MAX, until: Some(clock::monotonic() + Duration::from_secs(seconds)) }
    }

    /// Returns the seed with this number, counted from 0; `None` if the count or the time is used up.
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

/// Returns the number of concurrent runs: `STRANDLINE_THREADS`, else one per core.
pub(crate) fn threads() -> usize {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    env_number("STRANDLINE_THREADS").map_or(cores, |threads| usize::try_from(threads).unwrap_or(cores).max(1))
}

/// Progress of the seeds of a test.
#[derive(Default)]
struct SeedProgress {
    done: u64,
    failed: Vec<u64>,
    /// Running seeds with their start times.
    running: BTreeMap<u64, Instant>,
    /// Number of threads that have no more seeds to run.
    through: usize,
}

/// Runs the selected seeds of a topology, and prints failures and progress. Panics at the end if a seed failed.
pub(crate) fn run_all(shape: Topology) {
    let (seeds, began, threads) = (Seeds::from_environment(shape), clock::monotonic(), threads());
    println!("sim: {shape}: {seeds}, {threads} concurrently");
    let (next, progress, ended) = (AtomicU64::new(0), Mutex::new(SeedProgress::default()), Condvar::new());
    run_scoped("sim", threads + 1, |thread| {
        if thread == threads {
            return report_progress(shape, &progress, &ended, |progress| progress.through < threads);
        }
        while let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed)) {
            progress.lock().running.insert(seed, clock::monotonic());
            let passed = run_one(shape, seed);
            let mut progress = progress.lock();
            progress.running.remove(&seed);
            progress.done += 1;
            if !passed {
                progress.failed.push(seed);
            }
        }
        progress.lock().through += 1;
        ended.notify_all();
    });
    let progress = progress.into_inner();
    println!("{}", progress.summary(shape, began));
    assert!(progress.failed.is_empty(), "{shape}: seeds {:?} failed", progress.failed);
}

/// Runs a seed, and prints its failure and, if the environment selects it, its trace. Returns true if the seed passed.
fn run_one(shape: Topology, seed: u64) -> bool {
    let passed = panic::catch_unwind(|| run::run(shape, seed)).is_ok();
    if !passed {
        let reason = panics::first().unwrap_or_default();
        println!("sim: seed {seed} of {shape} failed: {reason}");
        println!("     make sim SEED={seed} SEEDS=1 ONLY={} TRACE=1 shows the events", shape.test());
    }
    trace::print_last();
    passed
}

/// Prints progress and slow seeds at intervals, while `is_running` holds. Exits the process if a run takes longer than
/// [`RUN_TIMEOUT`], because its thread cannot be ended.
fn report_progress(
    shape: Topology,
    progress: &Mutex<SeedProgress>,
    ended: &Condvar,
    is_running: impl Fn(&mut SeedProgress) -> bool,
) {
    let began = clock::monotonic();
    loop {
        let mut now = ended.wait_while_for(progress.lock(), &is_running, REPORT_INTERVAL);
        if !is_running(&mut now) {
            return;
        }
        println!("{}", now.summary(shape, began));
        for (seed, since) in now.running.iter().filter(|(_, since)| since.elapsed() >= REPORT_INTERVAL) {
            println!("sim: seed {seed} of {shape} is still running after {}", Time(since.elapsed()));
            if since.elapsed() >= RUN_TIMEOUT {
                println!(
                    "     this is a failure: make sim SEED={seed} SEEDS=1 ONLY={} TRACE=live shows the events",
                    shape.test()
                );
                process::exit(1);
            }
        }
    }
}

impl SeedProgress {
    fn summary(&self, shape: Topology, began: Instant) -> String {
        format!("sim: {} seeds of {shape}, {} failed, {}", self.done, self.failed.len(), Time(began.elapsed()))
    }
}

/// Duration in seconds or minutes for display.
struct Time(Duration);

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs_f64();
        if seconds < 120.0 { write!(f, "{seconds:.1} s") } else { write!(f, "{:.0} min", seconds / 60.0) }
    }
}
