//! Named, joined, cancellable tasks, and the only place that spawns, reads a clock or draws a random number.
//!
//! A [`Tasks`] is a set of tasks with one cancellation token. Whoever makes a set ends it with [`Tasks::stop`], which
//! cancels the token and waits until every task has returned; nothing outlives its owner. A task that must end
//! by itself selects on [`Tasks::cancelled`], cancellation first.
//!
//! What is started here goes on in the tracing span of whoever started it: where several brokers share a process their log lines say whose
//! they are, and nobody else has to think of it.

use std::future::Future;

use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{Instrument as _, Span};

pub mod clock;
#[cfg(all(feature = "server", any(test, feature = "sim")))]
pub mod mutation;
#[cfg(all(feature = "server", test))]
pub(crate) mod patience;
#[cfg(feature = "sim")]
pub mod process;
pub mod random;
#[cfg(feature = "sim")]
pub mod witness;

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
        }
        .in_current_span();
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
        self.tracker.spawn_blocking(in_span(function))
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
    let handle = tokio::task::spawn_blocking(in_span(function));
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
    std::thread::Builder::new().name(name.to_owned()).spawn(in_span(function)).expect("the system can start a thread")
}

/// The function in the span of whoever calls this.
fn in_span<T>(function: impl FnOnce() -> T) -> impl FnOnce() -> T {
    let span = Span::current();
    move || span.in_scope(function)
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
    let (work, span) = (&work, &Span::current());
    std::thread::scope(|scope| {
        for number in 1..threads {
            #[expect(clippy::disallowed_methods, reason = "the one place that spawns")]
            let started = std::thread::Builder::new()
                .name(name.to_owned())
                .spawn_scoped(scope, move || span.in_scope(|| work(number)));
            if let Err(error) = started {
                tracing::debug!(%error, name, "no thread was to be had");
                break;
            }
        }
        work(0);
    });
}

#[cfg(all(feature = "server", test))]
mod tests {
    use std::sync::{Arc, Mutex};

    use tracing_subscriber::fmt::MakeWriter;

    use super::*;

    /// Lines, as they are written.
    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Lines {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().expect("nothing panics").clone()).expect("lines are UTF-8")
        }
    }

    impl std::io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("nothing panics").write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl<'a> MakeWriter<'a> for Lines {
        type Writer = Self;

        fn make_writer(&'a self) -> Self {
            self.clone()
        }
    }

    #[test]
    fn whatever_is_started_goes_on_in_the_span_of_who_started_it() {
        let lines = Lines::default();
        let subscriber = tracing_subscriber::fmt().with_writer(lines.clone()).with_ansi(false).finish();
        let dispatch = tracing::Dispatch::new(subscriber);
        let _here = tracing::dispatcher::set_default(&dispatch);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let span = tracing::info_span!("broker", id = 7);
        let said = |dispatch: tracing::Dispatch, what: &'static str| {
            // A thread of its own has a subscriber of its own: here it is this one.
            move || tracing::dispatcher::with_default(&dispatch, || tracing::info!("{what}"))
        };
        runtime.block_on(
            async {
                let tasks = Tasks::new();
                let inner = tasks.clone();
                tasks.spawn("one", async move {
                    tracing::info!("said by a task");
                    inner.spawn("two", async { tracing::info!("said by its task") }).await.unwrap();
                });
                blocking(said(dispatch.clone(), "said where it may block")).await;
                let thread = thread("t", said(dispatch.clone(), "said by a thread"));
                thread.join().unwrap();
                while lines.text().lines().count() < 4 {
                    tokio::task::yield_now().await;
                }
                tasks.stop().await;
            }
            .instrument(span),
        );
        tracing::info!("said by nobody");
        let text = lines.text();
        for line in text.lines() {
            assert_eq!(line.contains("broker{id=7}: "), !line.contains("said by nobody"), "{text}");
        }
        assert_eq!(text.lines().count(), 5, "{text}");
    }
}
