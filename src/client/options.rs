//! Settings of a client, with defaults.

use std::time::Duration;

use crate::task::Backoff;

/// Default port of a broker.
pub const DEFAULT_PORT: u16 = 9460;

/// Settings of a [`super::Client`].
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// Time limit for making one connection. Default: 3 seconds.
    pub connect_timeout: Duration,
    /// Maximum wait for the response to one attempt of a call; no retry starts after this time. Default: 30 seconds.
    pub request_timeout: Duration,
    /// First pause after a failed attempt, before jitter. Each further pause is twice as long, up to `backoff_max`.
    /// Default: 20 ms.
    pub backoff_min: Duration,
    /// Maximum pause between attempts, before jitter. Jitter makes each pause up to twice as long. Default: 1 second.
    pub backoff_max: Duration,
    /// Interval of metadata refreshes without a failure. By these refreshes producers detect new partitions, and
    /// consumers with a rack detect which in-sync replicas are in that rack. Default: 1 minute.
    pub metadata_age: Duration,
}

impl Default for ClientOptions {
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

impl ClientOptions {
    pub(super) fn backoff(&self) -> Backoff {
        Backoff::with_jitter(self.backoff_min, self.backoff_max)
    }
}
