//! When records are due.

use std::time::Duration;

use tokio::time::Instant;

use crate::task::clock;

/// Seconds that no run lasts: the moments of a rate of next to nothing are not beyond it.
const MOST_S: f64 = 1e9;

/// When to stop.
#[derive(Clone, Copy, Debug)]
pub(super) enum Until {
    Records(u64),
    After(Duration),
}

/// An open loop: record `n` is due at a fixed moment, whatever became of those before it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    start: Instant,
    /// Seconds between records; none when there is no rate.
    interval: Option<f64>,
    until: Until,
}

impl Pace {
    /// `bytes_per_s` over all that send at this pace.
    pub(super) fn new(start: Instant, bytes_per_s: Option<f64>, record_bytes: u32, until: Until) -> Self {
        Self { start, interval: bytes_per_s.map(|rate| f64::from(record_bytes) / rate), until }
    }

    /// When a run at a rate and for a time ends, however early its last record was due.
    pub(super) fn end(&self) -> Option<Instant> {
        match self.until {
            Until::After(time) => self.interval.map(|_| self.start + time),
            Until::Records(_) => None,
        }
    }

    /// When record `n` of this sender is due; none when the sender is done.
    pub(super) fn due(&self, n: u64) -> Option<Due> {
        let at = self.interval.map(|interval| {
            #[expect(clippy::cast_precision_loss, reason = "2^53 records are more than any run sends")]
            let after = Duration::from_secs_f64((interval * n as f64).min(MOST_S));
            self.start + after
        });
        match self.until {
            Until::Records(records) if n >= records => None,
            Until::After(time) if at.is_some_and(|at| at >= self.start + time) => None,
            // Reading the clock is for those who must: not for every record of a run by count at full speed.
            Until::After(time) if at.is_none() && n.is_multiple_of(16) && clock::monotonic() >= self.start + time => {
                None
            }
            _ => Some(at.map_or(Due::Now, Due::At)),
        }
    }
}

/// When a record is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    Now,
    At(Instant),
}

/// Waits on a thread of its own until a moment: the runtime's timer is too coarse for tenths of milliseconds.
pub(super) fn wait_until(at: Instant) {
    let left = at.saturating_duration_since(clock::monotonic());
    if !left.is_zero() {
        std::thread::sleep(left);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn records_are_due_at_fixed_moments_however_late_the_sender_is() {
        let start = clock::monotonic();
        let pace = Pace::new(start, Some(1000.0), 100, Until::After(Duration::from_secs(1)));
        assert_eq!(pace.due(0), Some(Due::At(start)));
        tokio::time::advance(Duration::from_secs(30)).await;
        assert_eq!(pace.due(5), Some(Due::At(start + Duration::from_millis(500))));
        assert_eq!(pace.due(10), None, "one second at ten records a second");
        assert_eq!(pace.end(), Some(start + Duration::from_secs(1)), "whatever the rate");
        let slow = Pace::new(start, Some(1e-300), 1_000_000, Until::After(Duration::from_secs(1)));
        assert_eq!((slow.due(0), slow.due(1)), (Some(Due::At(start)), None), "an interval longer than any run");
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_rate_the_clock_or_the_count_ends_a_run() {
        let start = clock::monotonic();
        let counted = Pace::new(start, None, 100, Until::Records(3));
        assert_eq!((counted.due(2), counted.due(3)), (Some(Due::Now), None));
        let timed = Pace::new(start, None, 100, Until::After(Duration::from_secs(1)));
        assert_eq!(timed.due(16), Some(Due::Now));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(timed.due(32), None);
    }
}
