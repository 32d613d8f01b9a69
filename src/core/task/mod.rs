//! Task sets, threads, locks, clocks and randomness. No module outside this one spawns, reads a clock or draws a random
//! number by other means.
//!
//! A [`Tasks`] is a set of tasks with one cancellation token. The owner of a set ends it with [`Tasks::stop`], which
//! cancels the token and joins every task. A long-running task runs each wait through [`Tasks::run_until_cancelled`].
//! Tasks and threads inherit the tracing span of their parent, so that the log lines of each broker in a process can be
//! distinguished.

use std::future::Future;

use futures::FutureExt as _;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{Instrument as _, Span};

mod backoff;
mod cancellation;
pub mod clock;
pub mod lock;
#[cfg(any(test, feature = "test-util"))]
pub mod mutation;
#[cfg(feature = "sim")]
pub mod process;
pub mod random;
#[cfg(feature = "sim")]
pub mod sim_event;
#[cfg(any(test, feature = "test-util"))]
pub mod test_timeout;

pub use backoff::Backoff;
use cancellation::UntilCancelled;

/// A set of tasks with one cancellation token. Clones share the set.
#[derive(Clone, Debug, Default)]
pub struct Tasks {
    token: CancellationToken,
    tracker: TaskTracker,
    /// The simulated process that owns the tasks.
    #[cfg(feature = "sim")]
    process: Option<process::SimProcess>,
}

impl Tasks {
    /// Creates an empty set.
    pub fn new() -> Self {
        Self {
            #[cfg(feature = "sim")]
            process: process::SimProcess::current(),
            ..Self::default()
        }
    }

    /// Creates a set that is cancelled with this set and can be stopped earlier. [`Tasks::stop`] of this set does not
    /// join the child's tasks: the owner of the child does.
    pub fn child(&self) -> Self {
        Self {
            token: self.token.child_token(),
            tracker: TaskTracker::new(),
            #[cfg(feature = "sim")]
            process: self.process.clone(),
        }
    }

    /// Spawns a future as a task of this set. When the task ends, a trace log line names it. A task without this line
    /// is the one that blocks a shutdown.
    pub fn spawn<F>(&self, name: &'static str, future: F) -> tokio::task::JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        // Not an async block, which would hold the future twice: as it was captured, and as it is awaited.
        let named = future.inspect(move |_| tracing::trace!(task = name, "ended")).in_current_span();
        #[cfg(feature = "sim")]
        if let Some(process) = &self.process {
            #[expect(clippy::disallowed_methods, reason = "the one place that spawns")]
            let task = self.tracker.spawn(process.run(named));
            process.add_task(task.abort_handle());
            return task;
        }
        #[expect(clippy::disallowed_methods, reason = "the one place that spawns")]
        self.tracker.spawn(named)
    }

    /// Runs a blocking function on a thread of the blocking pool, as a task of this set.
    pub fn spawn_blocking<F, T>(&self, function: F) -> tokio::task::JoinHandle<T>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        #[cfg(feature = "sim")]
        if let Some(process) = self.process.clone() {
            return self.spawn("blocking", async move {
                process.simulate_blocking().await;
                function()
            });
        }
        #[expect(clippy::disallowed_methods, reason = "the one place that spawns")]
        self.tracker.spawn_blocking(in_span(function))
    }

    /// Waits until the set is cancelled.
    pub async fn cancelled(&self) {
        self.token.cancelled().await;
    }

    /// Spawns a future as a task of this set that ends when the set is cancelled: then the future is dropped, even if
    /// it could complete as well.
    pub fn spawn_until_cancelled<F>(&self, name: &'static str, future: F)
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.spawn(name, UntilCancelled::new(self.token.clone().cancelled_owned(), future));
    }

    /// Runs a future until it completes or the set is cancelled. Returns `None` if the set is cancelled: then the
    /// future is dropped, even if it could complete as well.
    pub fn run_until_cancelled<F: Future>(&self, future: F) -> impl Future<Output = Option<F::Output>> {
        UntilCancelled::new(self.token.cancelled(), future)
    }

    /// Sleeps. Returns `None` if the set is cancelled before the end.
    pub async fn sleep_until_cancelled(&self, duration: std::time::Duration) -> Option<()> {
        self.run_until_cancelled(tokio::time::sleep(duration)).await
    }

    /// Returns whether the set is cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Cancels the set without joining its tasks.
    pub fn cancel(&self) {
        self.token.cancel();
    }

    /// Cancels the set and joins its tasks.
    pub async fn stop(&self) {
        self.token.cancel();
        self.tracker.close();
        self.tracker.wait().await;
    }
}

/// Runs a blocking function (file access, compression) on a thread of the blocking pool and waits for its result.
///
/// # Panics
/// If the function panics: the panic is resumed in the caller.
pub async fn run_blocking<F, T>(function: F) -> T
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    #[cfg(feature = "sim")]
    if let Some(process) = process::SimProcess::current() {
        process.simulate_blocking().await;
        return function();
    }
    #[expect(clippy::disallowed_methods, reason = "the one place that spawns")]
    let handle = tokio::task::spawn_blocking(in_span(function));
    match handle.await {
        Ok(output) => output,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// Spawns a named operating system thread. The caller joins the handle.
///
/// # Panics
/// If the system cannot create a thread. Threads are spawned at startup only.
pub fn spawn_thread<F, T>(name: &str, function: F) -> std::thread::JoinHandle<T>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    #[expect(clippy::disallowed_methods, reason = "the one place that spawns")]
    std::thread::Builder::new().name(name.to_owned()).spawn(in_span(function)).expect("the system can create a thread")
}

/// Wraps the function so that it runs in the caller's tracing span.
fn in_span<T>(function: impl FnOnce() -> T) -> impl FnOnce() -> T {
    let span = Span::current();
    move || span.in_scope(function)
}

/// Runs blocking `work` on up to `threads` threads, the caller's thread included, and joins them. `work` receives the
/// number of its thread, from 0. Fewer threads run if the system cannot create all of them, and only the caller's
/// thread in a simulated process. So `work` must not expect a fixed number.
///
/// # Panics
/// If `work` panics on a thread.
pub fn run_scoped(name: &str, threads: usize, work: impl Fn(usize) + Sync) {
    #[cfg(feature = "sim")]
    if process::SimProcess::current().is_some() {
        return work(0);
    }
    let (work, span) = (&work, &Span::current());
    std::thread::scope(|scope| {
        for number in 1..threads {
            #[expect(clippy::disallowed_methods, reason = "the one place that spawns")]
            let started = std::thread::Builder::new()
                .name(name.to_owned())
                .spawn_scoped(scope, move || span.in_scope(|| work(number)));
            if let Err(error) = started {
                tracing::debug!(%error, name, "cannot create another thread");
                break;
            }
        }
        work(0);
    });
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tracing_subscriber::fmt::MakeWriter;

    use super::{lock::Mutex, *};

    /// Collects the log output of a test.
    #[derive(Clone, Default)]
    struct CapturedLog(Arc<Mutex<Vec<u8>>>);

    impl CapturedLog {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().clone()).expect("lines are UTF-8")
        }
    }

    impl std::io::Write for CapturedLog {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl<'a> MakeWriter<'a> for CapturedLog {
        type Writer = Self;

        fn make_writer(&'a self) -> Self {
            self.clone()
        }
    }

    #[test]
    fn tasks_and_threads_inherit_the_span_of_their_parent() {
        let log = CapturedLog::default();
        let subscriber = tracing_subscriber::fmt().with_writer(log.clone()).with_ansi(false).finish();
        let dispatch = tracing::Dispatch::new(subscriber);
        let _guard = tracing::dispatcher::set_default(&dispatch);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let span = tracing::info_span!("broker", id = 7);
        let logs = |dispatch: tracing::Dispatch, message: &'static str| {
            // The default subscriber is set per thread.
            move || tracing::dispatcher::with_default(&dispatch, || tracing::info!("{message}"))
        };
        runtime.block_on(
            async {
                let tasks = Tasks::new();
                let child_tasks = tasks.clone();
                tasks.spawn("parent", async move {
                    tracing::info!("logged by a task");
                    child_tasks.spawn("child", async { tracing::info!("logged by its task") }).await.unwrap();
                });
                run_blocking(logs(dispatch.clone(), "logged by a blocking function")).await;
                let thread = spawn_thread("t", logs(dispatch.clone(), "logged by a thread"));
                thread.join().unwrap();
                while log.text().lines().count() < 4 {
                    tokio::task::yield_now().await;
                }
                tasks.stop().await;
            }
            .instrument(span),
        );
        tracing::info!("logged outside of the span");
        let text = log.text();
        for line in text.lines() {
            assert_eq!(line.contains("broker{id=7}: "), !line.contains("logged outside of the span"), "{text}");
        }
        assert_eq!(text.lines().count(), 5, "{text}");
    }
}
