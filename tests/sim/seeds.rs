//! Which seeds a test takes, on all cores, and what it says of them.
//!
//! A run has a thread of its own, and nothing that two runs share: panics, traces and broken rules are remembered for each thread.

use std::{
    collections::BTreeMap,
    fmt, panic, process,
    sync::{
        Condvar, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use strandline::task::{clock, run_scoped};
use tokio::time::Instant;

use crate::{
    panics,
    run::{self, Shape},
    trace,
};

/// How often it says how far it is.
const TELL: Duration = Duration::from_secs(60);

/// A run takes a fraction of a second: one that takes so long has no end.
const ENDLESS: Duration = Duration::from_secs(600);

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

/// How far the seeds of a test have come.
#[derive(Default)]
struct Course {
    done: u64,
    failed: Vec<u64>,
    /// Seeds that are being run, and since when.
    running: BTreeMap<u64, Instant>,
    /// Threads that take no seed any more.
    through: usize,
}

/// Runs the wished seeds of a shape. Panics when any of them found something.
pub(crate) fn run_all(shape: Shape) {
    let (seeds, began, threads) = (Seeds::wished(shape), clock::monotonic(), threads());
    println!("sim: {shape}: {seeds}, {threads} at a time");
    let (next, course, ended) = (AtomicU64::new(0), Mutex::new(Course::default()), Condvar::new());
    run_scoped("sim", threads + 1, |thread| {
        if thread == threads {
            return watch(shape, &course, &ended, |course| course.through < threads);
        }
        while let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed)) {
            course.lock().unwrap().running.insert(seed, clock::monotonic());
            let held = run_one(shape, seed);
            let mut course = course.lock().unwrap();
            course.running.remove(&seed);
            course.done += 1;
            if !held {
                course.failed.push(seed);
            }
        }
        course.lock().unwrap().through += 1;
        ended.notify_all();
    });
    let course = course.into_inner().unwrap();
    println!("{}", course.so_far(shape, began));
    assert!(course.failed.is_empty(), "{shape}: seeds {:?} failed", course.failed);
}

/// Whether nothing was found. Says what was.
fn run_one(shape: Shape, seed: u64) -> bool {
    let held = panic::catch_unwind(|| run::run(shape, seed)).is_ok();
    if !held {
        let why = panics::first().unwrap_or_default();
        println!("sim: seed {seed} of {shape} failed: {why}");
        println!("     make sim SEED={seed} SEEDS=1 ONLY={} TRACE=1 shows what happened", shape.test());
    }
    trace::print_last();
    held
}

/// Says from time to time how far it is and which seeds take long. Ends the process where one has no end: its thread cannot be ended.
fn watch(shape: Shape, course: &Mutex<Course>, ended: &Condvar, goes_on: impl Fn(&mut Course) -> bool) {
    let began = clock::monotonic();
    loop {
        let (now, waited) = ended.wait_timeout_while(course.lock().unwrap(), TELL, &goes_on).unwrap();
        if !waited.timed_out() {
            return;
        }
        println!("{}", now.so_far(shape, began));
        for (seed, since) in now.running.iter().filter(|(_, since)| since.elapsed() >= TELL) {
            println!("sim: seed {seed} of {shape} has run for {} and goes on", Time(since.elapsed()));
            if since.elapsed() >= ENDLESS {
                println!("     that is a failure; TRACE=live, SEED={seed} SEEDS=1 ONLY={} show it", shape.test());
                process::exit(1);
            }
        }
    }
}

impl Course {
    fn so_far(&self, shape: Shape, began: Instant) -> String {
        format!("sim: {} seeds of {shape}, {} failed, {}", self.done, self.failed.len(), Time(began.elapsed()))
    }
}

/// A time for a reader.
struct Time(Duration);

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs_f64();
        if seconds < 120.0 { write!(f, "{seconds:.1} s") } else { write!(f, "{:.0} min", seconds / 60.0) }
    }
}
