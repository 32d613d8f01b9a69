//! Lasting conditions of one partition: each is logged at its start, then as a reminder with a count.

use crate::{task::clock, telemetry::LogThrottle};

/// Condition that may last.
#[derive(Clone, Copy, Debug)]
pub(super) enum Condition {
    /// A replica cannot bootstrap.
    CannotBootstrap,
    /// Messages of the leader are invalid.
    BadBatches,
    /// A new leader cannot read the object store.
    CannotLead,
    /// The active segment cannot be sealed.
    CannotRoll,
    /// Segments cannot be evicted.
    CannotEvict,
}

const CONDITIONS: usize = Condition::CannotEvict as usize + 1;

/// Time of the last log line for each condition. Allocates nothing before the first occurrence.
#[derive(Debug, Default)]
pub(super) struct Warnings(Option<Box<[LogThrottle; CONDITIONS]>>);

impl Warnings {
    /// Counts an occurrence. Returns the number of occurrences since the last line, or `None` if no line is due.
    pub(super) fn occur(&mut self, condition: Condition) -> Option<u64> {
        self.0.get_or_insert_default()[condition as usize].occur(clock::monotonic())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn lasting_condition_is_logged_once_and_hides_no_other() {
        let mut warnings = Warnings::default();
        let lines: Vec<_> = (0..100).filter_map(|_| warnings.occur(Condition::CannotBootstrap)).collect();
        assert_eq!(lines, [1]);
        assert_eq!(warnings.occur(Condition::CannotEvict), Some(1));
        tokio::time::advance(std::time::Duration::from_secs(60)).await;
        assert_eq!(warnings.occur(Condition::CannotBootstrap), Some(100));
    }
}
