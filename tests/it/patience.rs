//! Waiting for what must come true: asked again at short intervals, in bounded time. Nothing else here waits by the clock, but for
//! the faults that last a while.

use std::{future::Future, thread, time::Duration};

use strandline::task::clock;

/// How long something may take that must happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// How often it is asked for.
const INTERVAL: Duration = Duration::from_millis(10);

/// Asks again until the answer is there; `None` when the time is over.
pub(crate) fn poll<T>(at_most: Duration, mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = clock::monotonic() + at_most;
    loop {
        let answer = ask();
        if answer.is_some() || clock::monotonic() > deadline {
            return answer;
        }
        thread::sleep(INTERVAL);
    }
}

/// Asks again until the answer is there; the text says what was waited for.
pub(crate) fn eventually<T>(what: &str, ask: impl FnMut() -> Option<T>) -> T {
    poll(PATIENCE, ask).unwrap_or_else(|| panic!("{what}: not so after {PATIENCE:?}"))
}

/// As [`eventually`], for a question that is asked in a task.
pub(crate) async fn becomes<T, F: Future<Output = Option<T>>>(what: &str, mut ask: impl FnMut() -> F) -> T {
    let deadline = clock::monotonic() + PATIENCE;
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(clock::monotonic() < deadline, "{what}: not so after {PATIENCE:?}");
        tokio::time::sleep(INTERVAL).await;
    }
}
