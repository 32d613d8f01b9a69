//! Simulated broker processes within one operating system process (feature `sim`).
//!
//! A [`SimProcess`] has its own wall clock and its own seeded random generator. Killing the process drops all its tasks
//! between two polls, as signal 9 would. A [`Tasks`](super::Tasks) set that is created inside the process spawns all
//! its tasks there.

use std::{
    cell::RefCell,
    fmt,
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use rand::{Rng, RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio::{task::AbortHandle, time::Instant};

use super::lock::Mutex;

/// Start of simulated time, in milliseconds since 1970.
const SIM_START_MS: i64 = 1_700_000_000_000;

/// Maximum simulated duration of a blocking function, in microseconds.
const MAX_BLOCKING_US: u64 = 2000;

thread_local! {
    static CURRENT: RefCell<Option<SimProcess>> = const { RefCell::new(None) };
}

/// A simulated process. Clones share the process.
#[derive(Clone)]
pub struct SimProcess(Arc<Inner>);

struct Inner {
    id: u32,
    /// Time of tokio's clock at the start of simulated time.
    began: Instant,
    /// Difference between this process's wall clock and simulated time.
    wall_offset_ms: AtomicI64,
    killed: AtomicBool,
    generator: Mutex<StdRng>,
    tasks: Mutex<Vec<AbortHandle>>,
}

impl SimProcess {
    /// Creates a process with a generator that starts from `seed` and a clock that started at `began`.
    pub fn new(id: u32, seed: u64, began: Instant) -> Self {
        Self(Arc::new(Inner {
            id,
            began,
            wall_offset_ms: AtomicI64::new(0),
            killed: AtomicBool::new(false),
            generator: Mutex::new(StdRng::seed_from_u64(seed)),
            tasks: Mutex::default(),
        }))
    }

    /// Returns the process of the running task; `None` outside of any process.
    pub fn current() -> Option<Self> {
        CURRENT.with_borrow(Option::clone)
    }

    /// Runs a function inside the process.
    pub fn enter<T>(&self, work: impl FnOnce() -> T) -> T {
        let _restore = RestoreProcess(CURRENT.replace(Some(self.clone())));
        work()
    }

    /// Runs a future inside the process. After the process is killed, the next poll drops the future, which then never
    /// completes.
    pub fn run<F: Future>(&self, future: F) -> ProcessFuture<F> {
        ProcessFuture { process: self.clone(), future: Some(Box::pin(future)) }
    }

    /// Kills the process as signal 9 does: none of its tasks is polled again.
    pub fn kill(&self) {
        self.0.killed.store(true, Ordering::Release);
        for task in std::mem::take(&mut *self.0.tasks.lock()) {
            task.abort();
        }
    }

    /// Returns whether the process was killed.
    pub fn is_killed(&self) -> bool {
        self.0.killed.load(Ordering::Acquire)
    }

    /// Returns the number of the process.
    pub fn id(&self) -> u32 {
        self.0.id
    }

    /// Sets the difference between the wall clock of the process and simulated time. A change makes the clock jump.
    pub fn set_wall_offset(&self, offset_ms: i64) {
        self.0.wall_offset_ms.store(offset_ms, Ordering::Relaxed);
    }

    pub(super) fn wall_ms(&self) -> i64 {
        #[expect(clippy::disallowed_methods, reason = "the simulated wall clock follows tokio's clock")]
        let elapsed = Instant::now().saturating_duration_since(self.0.began);
        let elapsed_ms = i64::try_from(elapsed.as_millis()).unwrap_or(i64::MAX);
        SIM_START_MS.saturating_add(elapsed_ms).saturating_add(self.0.wall_offset_ms.load(Ordering::Relaxed))
    }

    pub(super) fn with_generator<T>(&self, draw: impl FnOnce(&mut dyn Rng) -> T) -> T {
        draw(&mut *self.0.generator.lock())
    }

    /// Sleeps for a random time, which stands for the duration of a blocking function.
    pub(super) async fn simulate_blocking(&self) {
        let us = self.with_generator(|generator| generator.random_range(1..MAX_BLOCKING_US));
        tokio::time::sleep(Duration::from_micros(us)).await;
    }

    /// Stores the handle of a task, to abort the task when the process is killed. Aborts it at once if the process was
    /// killed already.
    pub(super) fn add_task(&self, task: AbortHandle) {
        if self.is_killed() {
            return task.abort();
        }
        let mut tasks = self.0.tasks.lock();
        if tasks.len() == tasks.capacity() {
            tasks.retain(|task| !task.is_finished());
        }
        tasks.push(task);
    }
}

impl fmt::Debug for SimProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimProcess({})", self.0.id)
    }
}

/// Restores the previous process of the thread on drop.
struct RestoreProcess(Option<SimProcess>);

impl Drop for RestoreProcess {
    fn drop(&mut self) {
        CURRENT.set(self.0.take());
    }
}

/// A future that runs inside a process.
pub struct ProcessFuture<F> {
    process: SimProcess,
    /// `None` once the future has completed or was dropped with its killed process.
    future: Option<Pin<Box<F>>>,
}

impl<F: Future> Future for ProcessFuture<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let this = &mut *self;
        if this.process.is_killed() {
            this.process.enter(|| this.future = None);
            return Poll::Pending;
        }
        let Some(future) = &mut this.future else { return Poll::Pending };
        let polled = this.process.enter(|| future.as_mut().poll(context));
        if polled.is_ready() {
            this.process.enter(|| this.future = None);
        }
        polled
    }
}

impl<F> Drop for ProcessFuture<F> {
    fn drop(&mut self) {
        let process = self.process.clone();
        process.enter(|| self.future = None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::{Tasks, clock, random, run_blocking};

    #[tokio::test(start_paused = true)]
    async fn killed_process_runs_no_task_and_leaves_clocks_of_others() {
        #[expect(clippy::disallowed_methods, reason = "the start of the simulated process")]
        let began = Instant::now();
        let [killed, running] = [1, 2].map(|id| SimProcess::new(id, 7, began));
        let (tasks, steps) = (killed.enter(Tasks::new), Arc::new(AtomicI64::new(0)));
        let counted = Arc::clone(&steps);
        tasks.spawn("steps", async move {
            loop {
                assert_eq!(SimProcess::current().map(|process| process.id()), Some(1));
                // The simulated blocking call sleeps in this task, so each iteration takes simulated time.
                run_blocking(|| ()).await;
                counted.fetch_add(1, Ordering::Relaxed);
            }
        });
        tokio::time::sleep(Duration::from_secs(1)).await;
        let before = steps.load(Ordering::Relaxed);
        assert!(before > 100);
        killed.kill();
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(steps.load(Ordering::Relaxed), before);
        assert_eq!(Arc::strong_count(&steps), 1, "the task was dropped");

        running.set_wall_offset(-5);
        assert_eq!(running.enter(clock::wall_ms), SIM_START_MS + 2000 - 5);
        assert!(SimProcess::current().is_none());
        let same_seed = SimProcess::new(3, 7, began);
        assert_eq!(running.enter(random::uuid), same_seed.enter(random::uuid));
        assert_ne!(running.enter(random::uuid), random::uuid());
    }
}
