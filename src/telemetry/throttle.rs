//! Throttling of log lines about a repeated condition: its start, a reminder with a count per interval, and its end are
//! logged.
//!
//! The throttle only decides; the caller logs. The time is an argument.

use std::time::Duration;

use tokio::time::Instant;

/// Minimum time between two log lines about occurrences of one condition.
pub const REMINDER_INTERVAL: Duration = Duration::from_secs(60);

/// The throttle of one condition, which may start and end repeatedly.
///
/// A condition that starts and ends repeatedly within an interval causes at most one line about its start and one about
/// its end per interval. The next line contains the number of occurrences that were not logged.
#[derive(Clone, Debug, Default)]
pub struct LogThrottle {
    /// Time of the last line about an occurrence.
    logged: Option<Instant>,
    /// Number of occurrences since the last line of any kind.
    unlogged: u64,
    /// True if the last line was about the start or a reminder, so that the end must be logged.
    announced: bool,
}

impl LogThrottle {
    /// Counts an occurrence. Returns `Some` if the caller must log it, with the number of occurrences since the last
    /// line, including this one.
    pub fn occur(&mut self, now: Instant) -> Option<u64> {
        self.unlogged += 1;
        if !self.is_quiet(now) {
            return None;
        }
        (self.logged, self.announced) = (Some(now), true);
        Some(std::mem::take(&mut self.unlogged))
    }

    /// Ends the condition. Returns `Some` if the caller must log the end, with the number of occurrences since the last
    /// line. Returns `None` if the last line was already about an end, or if nothing was logged.
    pub fn recover(&mut self) -> Option<u64> {
        std::mem::take(&mut self.announced).then(|| std::mem::take(&mut self.unlogged))
    }

    /// Returns true if an occurrence at `now` would be logged. After the end of the condition, such a throttle can be
    /// replaced by a new one. At most the count of occurrences that were not logged is lost.
    pub fn is_quiet(&self, now: Instant) -> bool {
        self.logged.is_none_or(|logged| now.saturating_duration_since(logged) >= REMINDER_INTERVAL)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::clock;

    #[tokio::test(start_paused = true)]
    async fn lasting_condition_is_logged_at_start_intervals_and_end() {
        let (mut throttle, begin) = (LogThrottle::default(), clock::monotonic());
        let lines: Vec<u64> =
            (0..600).filter_map(|step| throttle.occur(begin + Duration::from_millis(250) * step)).collect();
        assert_eq!(lines, [1, 240, 240], "150 s at four a second");
        assert_eq!(throttle.recover(), Some(119));
        assert_eq!(throttle.recover(), None, "the condition has ended");
    }

    #[tokio::test(start_paused = true)]
    async fn flapping_condition_is_logged_twice_per_interval() {
        let (mut throttle, begin) = (LogThrottle::default(), clock::monotonic());
        let (mut start_lines, mut end_lines) = (Vec::new(), Vec::new());
        for step in 0..29 * 120 {
            start_lines.extend(throttle.occur(begin + Duration::from_secs(1) * step / 29));
            end_lines.extend(throttle.recover());
        }
        assert_eq!((start_lines, end_lines), (vec![1, 29 * 60], vec![0, 0]));
        assert!(throttle.is_quiet(begin + Duration::from_secs(180)));
    }
}
