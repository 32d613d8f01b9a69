//! Which occurrences of a repeated condition are logged: the first, one in each interval as a reminder with a count, and the end.
//!
//! Pure: the time is an argument. The caller writes the line, because only the caller has the words and the fields.

use std::time::Duration;

use tokio::time::Instant;

/// Shortest time between two lines about the same condition.
pub const REMINDER_INTERVAL: Duration = Duration::from_secs(60);

/// One condition that may come, last, go, and come again.
///
/// A condition that flaps costs at most one line about its begin and one about its end per interval, however often it changes. What was
/// passed over is in the count of the next line.
#[derive(Clone, Debug, Default)]
pub struct LogThrottle {
    /// When the last line about an occurrence was written.
    logged: Option<Instant>,
    /// Occurrences since that line.
    passed_over: u64,
    /// Whether the last line says that the condition holds.
    announced: bool,
}

impl LogThrottle {
    /// Counts an occurrence. `Some` when it is to be logged, with the number of occurrences since the line before, this one included.
    pub fn occur(&mut self, now: Instant) -> Option<u64> {
        self.passed_over += 1;
        if !self.is_quiet(now) {
            return None;
        }
        (self.logged, self.announced) = (Some(now), true);
        Some(std::mem::take(&mut self.passed_over))
    }

    /// The condition has ended. `Some` when that is to be logged, with the number of occurrences since the line before.
    pub fn recover(&mut self) -> Option<u64> {
        std::mem::take(&mut self.announced).then(|| std::mem::take(&mut self.passed_over))
    }

    /// Whether nothing would be lost with this throttle: the next occurrence is logged in any case.
    pub fn is_quiet(&self, now: Instant) -> bool {
        self.logged.is_none_or(|logged| now.saturating_duration_since(logged) >= REMINDER_INTERVAL)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::clock;

    #[tokio::test(start_paused = true)]
    async fn a_lasting_condition_is_logged_once_then_as_a_reminder_with_a_count_then_at_its_end() {
        let (mut throttle, begin) = (LogThrottle::default(), clock::monotonic());
        let lines: Vec<u64> =
            (0..600).filter_map(|step| throttle.occur(begin + Duration::from_millis(250) * step)).collect();
        assert_eq!(lines, [1, 240, 240], "150 s at four a second");
        assert_eq!(throttle.recover(), Some(119));
        assert_eq!(throttle.recover(), None, "it has ended already");
    }

    #[tokio::test(start_paused = true)]
    async fn a_condition_that_comes_and_goes_29_times_a_second_costs_two_lines_a_minute() {
        let (mut throttle, begin) = (LogThrottle::default(), clock::monotonic());
        let (mut begun, mut ended) = (Vec::new(), Vec::new());
        for step in 0..29 * 120 {
            begun.extend(throttle.occur(begin + Duration::from_secs(1) * step / 29));
            ended.extend(throttle.recover());
        }
        assert_eq!((begun, ended), (vec![1, 29 * 60], vec![0, 0]));
        assert!(throttle.is_quiet(begin + Duration::from_secs(180)));
    }
}
