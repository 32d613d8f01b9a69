//! How a client behaves, as plain data with defaults.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};

use crate::task::random;

/// The port that brokers listen on unless told otherwise.
pub const DEFAULT_PORT: u16 = 9460;

/// What a [`super::Client`] may be told.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long one connection may take to come up. 3 seconds.
    pub connect_timeout: Duration,
    /// How long a call may go unanswered, retries included. 30 seconds.
    pub request_timeout: Duration,
    /// First pause after a failed try; it doubles, with jitter, up to `backoff_max`. 20 ms.
    pub backoff_min: Duration,
    /// Longest pause between tries. 1 second.
    pub backoff_max: Duration,
    /// How often a producer looks up the leaders of partitions in use though nothing failed, so that new partitions are
    /// seen, and a consumer with a rack who is in sync there. 1 minute.
    pub metadata_age: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(3),
            request_timeout: Duration::from_secs(30),
            backoff_min: Duration::from_millis(20),
            backoff_max: Duration::from_secs(1),
            metadata_age: Duration::from_secs(60),
        }
    }
}

impl Options {
    /// The pauses between tries, without end.
    pub(super) fn backoff(&self) -> Pauses {
        let exponential = ExponentialBuilder::new()
            .with_min_delay(self.backoff_min)
            .with_max_delay(self.backoff_max)
            .with_jitter()
            .with_jitter_seed(random::bits())
            .without_max_times()
            .build();
        Pauses { exponential, most: self.backoff_max }
    }
}

/// Pauses between tries.
#[derive(Debug)]
pub(super) struct Pauses {
    exponential: ExponentialBackoff,
    most: Duration,
}

impl Pauses {
    pub(super) fn next(&mut self) -> Duration {
        self.exponential.next().unwrap_or(self.most)
    }
}
