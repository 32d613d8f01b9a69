//! Functions that wait for a condition: they poll it at short intervals, with a timeout. Tests use fixed waits only for
//! injected faults of a fixed duration.

use std::{future::Future, thread, time::Duration};

use strandline::task::clock;

/// Maximum time that a test waits for a condition.
pub(crate) const TEST_TIMEOUT: Duration = Duration::from_secs(60);

/// Interval between polls.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Calls `attempt` until it returns a value, and returns that value. Returns `None` after the timeout.
pub(crate) fn poll<T>(timeout: Duration, mut attempt: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = clock::monotonic() + timeout;
    loop {
        let value = attempt();
        if value.is_some() || clock::monotonic() > deadline {
            return value;
        }
        thread::sleep(POLL_INTERVAL);
    }
}

/// Calls `attempt` until it returns a value, and returns that value. Panics after [`TEST_TIMEOUT`]; `condition` is part
/// of the panic message.
pub(crate) fn eventually<T>(condition: &str, attempt: impl FnMut() -> Option<T>) -> T {
    poll(TEST_TIMEOUT, attempt).unwrap_or_else(|| panic!("{condition}: timeout after {TEST_TIMEOUT:?}"))
}

/// Async form of [`eventually`].
pub(crate) async fn eventually_async<T, F: Future<Output = Option<T>>>(
    condition: &str,
    mut attempt: impl FnMut() -> F,
) -> T {
    let deadline = clock::monotonic() + TEST_TIMEOUT;
    loop {
        if let Some(value) = attempt().await {
            return value;
        }
        assert!(clock::monotonic() < deadline, "{condition}: timeout after {TEST_TIMEOUT:?}");
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}
