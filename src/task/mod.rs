//! Named, joined, cancellable tasks, and the only place that spawns, reads a clock or draws a random number.
//!
//! A [`Tasks`] is a set of tasks with one cancellation token. Whoever makes a set ends it with [`Tasks::stop`], which
//! cancels the token and waits until every task has returned; nothing outlives its owner. A task that must end
//! by itself selects on [`Tasks::cancelled`], cancellation first.

use std::future::Future;

use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub mod clock;
#[cfg(all(feature = "server", any(test, feature = "sim")))]
pub mod mutation;
#[cfg(all(feature = "server", test))]
pub(crate) mod patience;
#[cfg(feature = "sim")]
pub mod process;
pub mod random;

/// A set of tasks with one token that stops them all. Clones share the set.
#[derive(Clone, Debug, Default)]
pub struct Tasks {
    token: CancellationToken,
    tracker: TaskTracker,
    /// Whose tasks they are.
    #[cfg(feature = "sim")]
    process: Option<process::Process>,
}

impl Tasks {
    /// An empty set.
    pub fn new() -> Self {
        Self {
            #[cfg(feature = "sim")]
            process: process::Process::current(),
            ..Self::default()
        }
    }

    /// An empty set that is cancelled with this one, and can be stopped before it. Its owner joins it.
    pub fn child(&self) -> Self {
        Self {
            token: self.token.child_token(),
            tracker: TaskTracker::new(),
            #[cfg(feature = "sim")]
            process: self.process.clone(),
        }
    }

    /// Runs a future as a task of this set. The name is for the person who reads the logs of a stuck shutdown.
    pub fn spawn<F>(&self, name: &'static str, future: F) -> tokio::task::JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        let named = async move {
            let output = future.await;
            tracing::trace!(task = name, "ended");
            output
        };
        #[cfg(feature = "sim")]
        if let Some(process) = &self.process {
            #[expect(clippy::disallowed_methods, reason = "the one place that spawns")]
            let task = self.tracker.spawn(process.run(named));
            process.started(task.abort_handle());
            return task;
        }
        #[expect(clippy::disallowed_methods, reason = "the one place that spawns")]
        self.tracker.spawn(named)
    }

    /// Runs a function that blocks on a thread made for such, and joins it with the set.
    pub fn spawn_blocking<F, T>(&self, function: F) -> tokio::task::JoinHandle<T>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        #[cfg(feature = "sim")]
        if let Some(process) = self.process.clone() {
            return self.spawn("blocking", async move {
                process.blocks().await;
                function()
            });
        }
        #[expect(clippy::disallowed_methods, reason = "the one place that spawns")]
        self.tracker.spawn_blocking(function)
    }

    /// Resolves once the set is being stopped.
    pub async fn cancelled(&self) {
        self.token.cancelled().await;
    }

    /// Whether the set is being stopped.
    pub fn is_cancelled(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Asks every task to end, without waiting.
    pub fn cancel(&self) {
        self.token.cancel();
    }

    /// Asks every task to end and waits until all have.
    pub async fn stop(&self) {
        self.token.cancel();
        self.tracker.close();
        self.tracker.wait().await;
    }
}

/// Runs a function that blocks (files, compression of much) away from the async threads and waits for its result.
///
/// # Panics
/// When the function panicked: the panic goes on in the caller.
pub async fn blocking<F, T>(function: F) -> T
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    #[cfg(feature = "sim")]
    if let Some(process) = process::Process::current() {
        process.blocks().await;
        return function();
    }
    #[expect(clippy::disallowed_methods, reason = "the one place that spawns")]
    let handle = tokio::task::spawn_blocking(function);
    match handle.await {
        Ok(output) => output,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// Starts an operating system thread with a name. Its owner joins the handle.
///
/// # Panics
/// When the system has no thread left: at start-up that is a failed start.
pub fn thread<F, T>(name: &str, function: F) -> std::thread::JoinHandle<T>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    #[expect(clippy::disallowed_methods, reason = "the one place that spawns")]
    std::thread::Builder::new().name(name.to_owned()).spawn(function).expect("the system can start a thread")
}

/// Runs `work` on so many threads at once, the caller's among them, and returns when all are done. Each is told its number,
/// from 0. For work that blocks, on a thread that may. Where the system has no thread left, those that there are do it all.
///
/// # Panics
/// When the work panicked on one of them.
pub fn side_by_side(name: &str, threads: usize, work: impl Fn(usize) + Sync) {
    #[cfg(feature = "sim")]
    if process::Process::current().is_some() {
        return work(0);
    }
    let work = &work;
    std::thread::scope(|scope| {
        for number in 1..threads {
            #[expect(clippy::disallowed_methods, reason = "the one place that spawns")]
            let started = std::thread::Builder::new().name(name.to_owned()).spawn_scoped(scope, move || work(number));
            if let Err(error) = started {
                tracing::debug!(%error, name, "no thread was to be had");
                break;
            }
        }
        work(0);
    });
}
