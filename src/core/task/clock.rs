//! The wall clock and the monotonic clock. Decisions take `now` as an argument; only tasks and request handlers read
//! the clocks.

use std::time::{SystemTime, UNIX_EPOCH};

/// Returns the wall clock in milliseconds since 1970. The clock may jump in both directions, so use it for timestamps
/// and never for timeouts.
pub fn wall_ms() -> i64 {
    #[cfg(feature = "sim")]
    if let Some(process) = super::process::SimProcess::current() {
        return process.wall_ms();
    }
    #[expect(clippy::disallowed_methods, reason = "the one place that reads the wall clock")]
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// Returns the time of the monotonic clock, which tests can pause. Use this clock for timeouts and measurements.
pub fn monotonic() -> tokio::time::Instant {
    #[expect(clippy::disallowed_methods, reason = "the one place that reads the monotonic clock")]
    tokio::time::Instant::now()
}
