//! The pace at which replicas catch up.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use super::window::Throttle;
use crate::task::clock;

/// What replicas that catch up may take of this broker, over all links together.
#[derive(Debug)]
pub struct CatchUp {
    began: Instant,
    throttle: Mutex<Throttle>,
}

impl CatchUp {
    /// So many bytes in a second; without a number as many as there are.
    pub fn new(bytes_per_second: Option<u64>) -> Self {
        Self { began: clock::monotonic(), throttle: Mutex::new(Throttle::new(bytes_per_second)) }
    }

    /// When the next read may begin; `None` when now.
    pub(super) fn wait(&self) -> Option<Instant> {
        let now = clock::monotonic();
        let now_ms = u64::try_from(now.saturating_duration_since(self.began).as_millis()).unwrap_or(u64::MAX);
        let until_ms = self.throttle.lock().unwrap_or_else(PoisonError::into_inner).wait(now_ms)?;
        Some(now + Duration::from_millis(until_ms.saturating_sub(now_ms)))
    }

    pub(super) fn take(&self, bytes: usize) {
        self.throttle.lock().unwrap_or_else(PoisonError::into_inner).take(bytes);
    }
}
