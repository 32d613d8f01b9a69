//! Waiting in unit tests for a condition, with a timeout. The condition is checked again whenever other tasks have run.

use std::time::Duration;

/// Maximum wait for a condition. It is long because a test machine can be busy.
const TEST_TIMEOUT: Duration = Duration::from_secs(60);

/// Waits until `condition` returns true. Panics after `TEST_TIMEOUT`; `description` names the condition in the
/// message.
pub async fn wait_until(description: &str, condition: impl Fn() -> bool) {
    wait_for(description, async || condition().then_some(())).await;
}

/// Calls `attempt` until it returns a value. Panics after `TEST_TIMEOUT`; `description` names the value in the
/// message.
pub async fn wait_for<T>(description: &str, attempt: impl AsyncFn() -> Option<T>) -> T {
    let value = async {
        loop {
            if let Some(value) = attempt().await {
                return value;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(TEST_TIMEOUT, value).await.unwrap_or_else(|_| panic!("timed out: {description}"))
}
