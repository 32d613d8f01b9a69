//! Pauses between the attempts of an operation that failed.

use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};

use super::random;

/// An endless sequence of pauses. Each pause is twice as long as the one before, up to a maximum.
#[derive(Debug)]
pub struct Backoff {
    builder: ExponentialBuilder,
    pauses: ExponentialBackoff,
    max: Duration,
}

impl Backoff {
    /// Creates a sequence that starts with `min`.
    pub fn new(min: Duration, max: Duration) -> Self {
        Self::from_builder(ExponentialBuilder::new(), min, max)
    }

    /// Creates a sequence that adds to each pause a random time, which is shorter than the pause. A pause can thus be
    /// almost twice `max`. Callers that failed together then do not retry together.
    pub fn with_jitter(min: Duration, max: Duration) -> Self {
        Self::from_builder(ExponentialBuilder::new().with_jitter().with_jitter_seed(random::bits()), min, max)
    }

    fn from_builder(builder: ExponentialBuilder, min: Duration, max: Duration) -> Self {
        let builder = builder.with_min_delay(min).with_max_delay(max).without_max_times();
        Self { builder, pauses: builder.build(), max }
    }

    /// Returns the next pause.
    pub fn next_pause(&mut self) -> Duration {
        self.pauses.next().unwrap_or(self.max)
    }

    /// Sleeps for the next pause.
    pub async fn pause(&mut self) {
        tokio::time::sleep(self.next_pause()).await;
    }

    /// Starts the sequence again with the shortest pause, because an attempt succeeded.
    pub fn reset(&mut self) {
        self.pauses = self.builder.build();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIN_DELAY: Duration = Duration::from_millis(100);
    const MAX_DELAY: Duration = Duration::from_secs(1);

    #[test]
    fn pauses_double_up_to_maximum_and_start_again_after_reset() {
        let mut backoff = Backoff::new(MIN_DELAY, MAX_DELAY);
        let millis: Vec<_> = (0..6).map(|_| backoff.next_pause().as_millis()).collect();
        assert_eq!(millis, [100, 200, 400, 800, 1000, 1000]);
        backoff.reset();
        assert_eq!(backoff.next_pause(), MIN_DELAY);
    }

    #[test]
    fn jitter_lengthens_each_pause_by_less_than_the_pause() {
        let mut backoff = Backoff::with_jitter(MIN_DELAY, MAX_DELAY);
        for plain in [100, 200, 400, 800, 1000].map(Duration::from_millis) {
            let pause = backoff.next_pause();
            assert!((plain..plain * 2).contains(&pause), "{plain:?}: {pause:?}");
        }
    }
}
