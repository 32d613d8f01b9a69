//! Waiting, in tests, for what must come true: it is looked at again whenever other tasks had their turn, in bounded time.

use std::time::Duration;

/// How long something may take that must happen, on a machine that others keep busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until this is so; the text says what was waited for.
pub(crate) async fn until(what: &str, holds: impl Fn() -> bool) {
    becomes(what, async || holds().then_some(())).await;
}

/// Asks again until the answer is there.
pub(crate) async fn becomes<T>(what: &str, ask: impl AsyncFn() -> Option<T>) -> T {
    let answered = async {
        loop {
            if let Some(answer) = ask().await {
                return answer;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, answered).await.unwrap_or_else(|_| panic!("never: {what}"))
}
