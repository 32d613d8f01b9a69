//! The two clocks. Decisions take `now` as an argument; only loops and edges call these.

use std::time::{SystemTime, UNIX_EPOCH};

/// Milliseconds since 1970 by the machine's clock, which may jump either way. For timestamps of records and objects.
pub fn wall_ms() -> i64 {
    #[cfg(feature = "sim")]
    if let Some(process) = super::process::Process::current() {
        return process.wall_ms();
    }
    #[expect(clippy::disallowed_methods, reason = "the one place that reads the wall clock")]
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// A clock that only goes forward, and that tests can pause. For waiting and measuring.
pub fn monotonic() -> tokio::time::Instant {
    #[expect(clippy::disallowed_methods, reason = "the one place that reads the monotonic clock")]
    tokio::time::Instant::now()
}
