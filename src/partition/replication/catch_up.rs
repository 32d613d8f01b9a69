//! The rate at which replicas catch up.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use super::flow_control::RateLimiter;
use crate::task::clock;

/// Limit on the bytes that catching-up replicas read from this broker, over all links together.
#[derive(Debug)]
pub struct CatchUpThrottle {
    began: Instant,
    throttle: Mutex<RateLimiter>,
}

impl CatchUpThrottle {
    /// Creates a limit in bytes per second; `None` is no limit.
    pub fn new(bytes_per_second: Option<u64>) -> Self {
        Self { began: clock::monotonic(), throttle: Mutex::new(RateLimiter::new(bytes_per_second)) }
    }

    /// Returns the time at which the next read may begin; `None` if it may begin now.
    pub(super) fn next_send_at(&self) -> Option<Instant> {
        let now = clock::monotonic();
        let now_ms = u64::try_from(now.saturating_duration_since(self.began).as_millis()).unwrap_or(u64::MAX);
        let until_ms = self.throttle.lock().next_send_at(now_ms)?;
        Some(now + Duration::from_millis(until_ms.saturating_sub(now_ms)))
    }

    pub(super) fn take(&self, bytes: usize) {
        self.throttle.lock().take(bytes);
    }
}
