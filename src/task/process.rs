//! The process that a task belongs to, where many brokers are simulated in one.
//!
//! Only with the feature `sim`. A [`Process`] has its own wall clock and its own generator, both of a seed, and can be killed: every task
//! that it started ends between two of its steps, as with signal 9. Whatever a task of it does runs inside it ([`Process::enter`]);
//! `task::Tasks` sees to that for all that is spawned from there.

use std::{
    cell::RefCell,
    fmt,
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use rand::{Rng, RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio::{task::AbortHandle, time::Instant};

use super::clock;

/// When simulated time begins, in ms since 1970.
const BEGINNING_MS: i64 = 1_700_000_000_000;

/// How long work that blocks takes at most, in microseconds.
const MOST_BLOCKING_US: u64 = 2000;

thread_local! {
    static CURRENT: RefCell<Option<Process>> = const { RefCell::new(None) };
}

/// A simulated process. Clones are the same one.
#[derive(Clone)]
pub struct Process(Arc<Inner>);

struct Inner {
    id: u32,
    began: Instant,
    wall_offset_ms: AtomicI64,
    dead: AtomicBool,
    generator: Mutex<StdRng>,
    tasks: Mutex<Vec<AbortHandle>>,
}

impl Process {
    /// A process whose choices follow from `seed` and whose clock began at `began`.
    pub fn new(id: u32, seed: u64, began: Instant) -> Self {
        Self(Arc::new(Inner {
            id,
            began,
            wall_offset_ms: AtomicI64::new(0),
            dead: AtomicBool::new(false),
            generator: Mutex::new(StdRng::seed_from_u64(seed)),
            tasks: Mutex::default(),
        }))
    }

    /// The one that the caller runs in.
    pub fn current() -> Option<Self> {
        CURRENT.with_borrow(Option::clone)
    }

    /// Does something inside it.
    pub fn enter<T>(&self, work: impl FnOnce() -> T) -> T {
        let _back = Back(CURRENT.replace(Some(self.clone())));
        work()
    }

    /// Runs a future inside it. When the process is killed the future is dropped at its next turn, and never ends.
    pub fn run<F: Future>(&self, future: F) -> Running<F> {
        Running { process: self.clone(), future: Some(Box::pin(future)) }
    }

    /// Ends it as signal 9 does: no task of it takes another step.
    pub fn kill(&self) {
        self.0.dead.store(true, Ordering::Release);
        for task in std::mem::take(&mut *self.tasks()) {
            task.abort();
        }
    }

    /// Whether it was killed.
    pub fn is_dead(&self) -> bool {
        self.0.dead.load(Ordering::Acquire)
    }

    /// Its number.
    pub fn id(&self) -> u32 {
        self.0.id
    }

    /// Sets its wall clock to be so far from simulated time. A change is a jump.
    pub fn set_wall(&self, offset_ms: i64) {
        self.0.wall_offset_ms.store(offset_ms, Ordering::Relaxed);
    }

    pub(super) fn wall_ms(&self) -> i64 {
        let passed = clock::monotonic().saturating_duration_since(self.0.began);
        let passed = i64::try_from(passed.as_millis()).unwrap_or(i64::MAX);
        BEGINNING_MS.saturating_add(passed).saturating_add(self.0.wall_offset_ms.load(Ordering::Relaxed))
    }

    pub(super) fn draw<T>(&self, draw: impl FnOnce(&mut dyn Rng) -> T) -> T {
        draw(&mut *self.0.generator.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits as long as something that blocks may take.
    pub(super) async fn blocks(&self) {
        let us = self.draw(|generator| generator.random_range(1..MOST_BLOCKING_US));
        tokio::time::sleep(Duration::from_micros(us)).await;
    }

    /// A task of it was started.
    pub(super) fn started(&self, task: AbortHandle) {
        if self.is_dead() {
            return task.abort();
        }
        let mut tasks = self.tasks();
        if tasks.len() == tasks.capacity() {
            tasks.retain(|task| !task.is_finished());
        }
        tasks.push(task);
    }

    fn tasks(&self) -> MutexGuard<'_, Vec<AbortHandle>> {
        self.0.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Process({})", self.0.id)
    }
}

/// Gives the thread back to whom it belonged.
struct Back(Option<Process>);

impl Drop for Back {
    fn drop(&mut self) {
        CURRENT.set(self.0.take());
    }
}

/// A future inside a process.
pub struct Running<F> {
    process: Process,
    future: Option<Pin<Box<F>>>,
}

impl<F: Future> Future for Running<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let this = &mut *self;
        if this.process.is_dead() {
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

impl<F> Drop for Running<F> {
    fn drop(&mut self) {
        let process = self.process.clone();
        process.enter(|| self.future = None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::{Tasks, blocking, random};

    #[tokio::test(start_paused = true)]
    async fn a_killed_process_takes_no_other_step_and_its_clock_and_choices_are_its_own() {
        let began = clock::monotonic();
        let [one, other] = [1, 2].map(|id| Process::new(id, 7, began));
        let (tasks, steps) = (one.enter(Tasks::new), Arc::new(AtomicI64::new(0)));
        let counted = Arc::clone(&steps);
        tasks.spawn("steps", async move {
            loop {
                assert_eq!(Process::current().map(|process| process.id()), Some(1));
                // What a task starts is its process's too.
                blocking(|| ()).await;
                counted.fetch_add(1, Ordering::Relaxed);
            }
        });
        tokio::time::sleep(Duration::from_secs(1)).await;
        let before = steps.load(Ordering::Relaxed);
        assert!(before > 100);
        one.kill();
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(steps.load(Ordering::Relaxed), before);
        assert_eq!(Arc::strong_count(&steps), 1, "what the task held is gone");

        other.set_wall(-5);
        assert_eq!(other.enter(clock::wall_ms), BEGINNING_MS + 2000 - 5);
        assert!(Process::current().is_none());
        let again = Process::new(3, 7, began);
        assert_eq!(other.enter(random::uuid), again.enter(random::uuid));
        assert_ne!(other.enter(random::uuid), random::uuid());
    }
}
