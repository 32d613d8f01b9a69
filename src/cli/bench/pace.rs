//! Due times of records.

use std::time::Duration;

use tokio::time::Instant;

use crate::task::clock;

/// Maximum due time in seconds after the start. It bounds the due times of very low rates, and no run lasts that long.
const MAX_SECONDS: f64 = 1e9;

/// Condition that ends a run.
#[derive(Clone, Copy, Debug)]
pub(super) enum StopAfter {
    Records(u64),
    After(Duration),
}

/// Open loop: record `n` is due at a fixed time, regardless of the results of earlier records.
#[derive(Clone, Copy, Debug)]
pub(super) struct OpenLoop {
    start: Instant,
    /// Seconds between records; `None` without a rate.
    interval: Option<f64>,
    until: StopAfter,
}

impl OpenLoop {
    /// Creates a pace. `bytes_per_s` is the rate of this sender; `None` sends as fast as possible.
    pub(super) fn new(start: Instant, bytes_per_s: Option<f64>, record_bytes: u32, until: StopAfter) -> Self {
        Self { start, interval: bytes_per_s.map(|rate| f64::from(record_bytes) / rate), until }
    }

    /// Returns the time at which a run with a rate and a duration ends. Returns `None` for other runs, which end with
    /// their last record. The sender waits until this time, because the last record may be due earlier.
    pub(super) fn end_time(&self) -> Option<Instant> {
        match self.until {
            StopAfter::After(time) => self.interval.map(|_| self.start + time),
            StopAfter::Records(_) => None,
        }
    }

    /// Returns the due time of record `n` of this sender; `None` if the sender has finished.
    pub(super) fn due(&self, n: u64) -> Option<SendAt> {
        let at = self.interval.map(|interval| {
            #[expect(clippy::cast_precision_loss, reason = "2^53 records are more than any run sends")]
            let after = Duration::from_secs_f64((interval * n as f64).min(MAX_SECONDS));
            self.start + after
        });
        match self.until {
            StopAfter::Records(records) if n >= records => None,
            StopAfter::After(time) if at.is_some_and(|at| at >= self.start + time) => None,
            // Only a run with a duration and without a rate reads the clock, and only once per 16 records.
            StopAfter::After(time)
                if at.is_none() && n.is_multiple_of(16) && clock::monotonic() >= self.start + time =>
            {
                None
            }
            _ => Some(at.map_or(SendAt::Now, SendAt::At)),
        }
    }
}

/// Due time of a record: now without a rate, else a fixed time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SendAt {
    Now,
    At(Instant),
}

/// Blocks the calling thread until `at`. The runtime's timer is too coarse for tenths of a millisecond.
pub(super) fn wait_until(at: Instant) {
    let remaining = at.saturating_duration_since(clock::monotonic());
    if !remaining.is_zero() {
        std::thread::sleep(remaining);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn due_times_do_not_depend_on_a_late_sender() {
        let start = clock::monotonic();
        let pace = OpenLoop::new(start, Some(1000.0), 100, StopAfter::After(Duration::from_secs(1)));
        assert_eq!(pace.due(0), Some(SendAt::At(start)));
        tokio::time::advance(Duration::from_secs(30)).await;
        assert_eq!(pace.due(5), Some(SendAt::At(start + Duration::from_millis(500))));
        assert_eq!(pace.due(10), None, "one second at ten records a second");
        assert_eq!(pace.end_time(), Some(start + Duration::from_secs(1)), "the same at every rate");
        let slow = OpenLoop::new(start, Some(1e-300), 1_000_000, StopAfter::After(Duration::from_secs(1)));
        assert_eq!((slow.due(0), slow.due(1)), (Some(SendAt::At(start)), None), "an interval longer than any run");
    }

    #[tokio::test(start_paused = true)]
    async fn run_without_a_rate_ends_by_duration_or_count() {
        let start = clock::monotonic();
        let counted = OpenLoop::new(start, None, 100, StopAfter::Records(3));
        assert_eq!((counted.due(2), counted.due(3)), (Some(SendAt::Now), None));
        let timed = OpenLoop::new(start, None, 100, StopAfter::After(Duration::from_secs(1)));
        assert_eq!(timed.due(16), Some(SendAt::Now));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(timed.due(32), None);
    }
}
