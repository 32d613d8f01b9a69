//! Warnings about two brokers whose clocks differ by much. No decision between brokers depends on a clock.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use crate::{model::BrokerId, task::clock, telemetry::LogThrottle};

/// Difference from which a warning is logged, in milliseconds. The value is far above the effect of a link's delay on equal clocks.
const FAR_APART_MS: u64 = 10_000;

/// Comparison of other brokers' clocks with the local clock.
#[derive(Debug, Default)]
pub(in crate::broker) struct ClockComparison(Mutex<BTreeMap<BrokerId, LogThrottle>>);

impl ClockComparison {
    /// Logs a warning if the clock of `broker`, as sent in its Hello or Welcome, differs by much from the local clock. Older versions send
    /// no clock.
    pub(in crate::broker) fn compare(&self, broker: BrokerId, theirs_ms: Option<i64>) {
        let Some(seconds_ahead) = theirs_ms.and_then(|theirs| apart(theirs, clock::wall_ms())) else { return };
        let mut logs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(count) = logs.entry(broker).or_default().occur(clock::monotonic()) else { return };
        tracing::warn!(
            %broker, seconds_ahead, count,
            "this broker's clock and the one here are far apart: retention by time and the timestamps that brokers set go by the clock of \
             whoever leads, and nothing else does; set both by one source (NTP)"
        );
    }
}

/// Returns the seconds by which the first clock is ahead, if the difference is large. Negative if that clock is behind.
fn apart(theirs_ms: i64, ours_ms: i64) -> Option<i64> {
    let ahead_ms = theirs_ms.saturating_sub(ours_ms);
    (ahead_ms.unsigned_abs() >= FAR_APART_MS).then_some(ahead_ms / 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_large_clock_differences_are_reported() {
        let now = 1_700_000_000_000;
        for (theirs, said) in [
            (now, None),
            (now + 9_999, None),
            (now - 9_999, None),
            (now + 10_000, Some(10)),
            (now - 600_000, Some(-600)),
            (i64::MIN, Some(i64::MIN / 1000)),
            (i64::MAX, Some((i64::MAX - now) / 1000)),
        ] {
            assert_eq!(apart(theirs, now), said, "{theirs}");
        }
    }
}
