//! Warnings about two brokers whose clocks differ by much. No decision between brokers depends on a clock.

use std::collections::BTreeMap;

use parking_lot::Mutex;

use crate::{model::BrokerId, task::clock, telemetry::LogThrottle};

/// Difference from which a warning is logged, in milliseconds. The value is far above the effect of a link's delay on
/// equal clocks.
const MAX_CLOCK_SKEW_MS: u64 = 10_000;

/// Comparison of other brokers' clocks with the local clock.
#[derive(Debug, Default)]
pub(in crate::broker) struct ClockComparison(Mutex<BTreeMap<BrokerId, LogThrottle>>);

impl ClockComparison {
    /// Logs a warning if the clock of `broker`, as sent in its Hello or Welcome, differs by much from the local clock.
    /// Older versions send no clock.
    pub(in crate::broker) fn compare(&self, broker: BrokerId, theirs_ms: Option<i64>) {
        let skew = theirs_ms.and_then(|theirs| clock_skew_seconds(theirs, clock::wall_ms()));
        let Some(seconds_ahead) = skew else { return };
        let mut logs = self.0.lock();
        let Some(count) = logs.entry(broker).or_default().occur(clock::monotonic()) else { return };
        tracing::warn!(
            %broker, seconds_ahead, count,
            "the clocks of this broker and of another broker differ: retention by time and the timestamps that brokers \
             set use the leader's clock; synchronize both clocks with one source (NTP)"
        );
    }
}

/// Returns the seconds by which the first clock is ahead, if the difference is large. Negative if that clock is behind.
fn clock_skew_seconds(theirs_ms: i64, ours_ms: i64) -> Option<i64> {
    let ahead_ms = theirs_ms.saturating_sub(ours_ms);
    (ahead_ms.unsigned_abs() >= MAX_CLOCK_SKEW_MS).then_some(ahead_ms / 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_large_clock_differences_are_reported() {
        let now = 1_700_000_000_000;
        for (theirs, expected) in [
            (now, None),
            (now + 9_999, None),
            (now - 9_999, None),
            (now + 10_000, Some(10)),
            (now - 600_000, Some(-600)),
            (i64::MIN, Some(i64::MIN / 1000)),
            (i64::MAX, Some((i64::MAX - now) / 1000)),
        ] {
            assert_eq!(clock_skew_seconds(theirs, now), expected, "{theirs}");
        }
    }
}
