//! Conditions of one partition that last and are met again and again: each is logged once, then as a reminder with a count.

use crate::{task::clock, telemetry::LogThrottle};

/// A condition that may last.
#[derive(Clone, Copy, Debug)]
pub(super) enum Condition {
    /// A new replica cannot begin.
    CannotBegin,
    /// Batches of the leader are refused.
    BadBatches,
    /// The leader cannot read the bucket.
    CannotLead,
    /// The active segment cannot be sealed.
    CannotSeal,
    /// Segments cannot be removed.
    CannotEvict,
}

const CONDITIONS: usize = Condition::CannotEvict as usize + 1;

/// When each condition of a partition was last logged. Takes no room while there was none.
#[derive(Debug, Default)]
pub(super) struct Warnings(Option<Box<[LogThrottle; CONDITIONS]>>);

impl Warnings {
    /// `Some` when the condition is to be logged, with how often it was met since the last line.
    pub(super) fn occur(&mut self, condition: Condition) -> Option<u64> {
        self.0.get_or_insert_default()[condition as usize].occur(clock::monotonic())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_condition_that_lasts_is_logged_once_and_hides_no_other() {
        let mut warnings = Warnings::default();
        let lines: Vec<_> = (0..100).filter_map(|_| warnings.occur(Condition::CannotBegin)).collect();
        assert_eq!(lines, [1]);
        assert_eq!(warnings.occur(Condition::CannotEvict), Some(1));
        tokio::time::advance(std::time::Duration::from_secs(60)).await;
        assert_eq!(warnings.occur(Condition::CannotBegin), Some(100));
    }
}
