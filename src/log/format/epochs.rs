//! Epoch history: the start offset of each leader epoch. A follower compares its history with the leader's before it
//! copies (KIP-101, KIP-279). Pure code: no I/O, lock or clock.

use bytes::{Buf, BufMut};

use crate::model::{LeaderEpoch, Offset};

/// Epochs of one log, each with its start offset. Epochs and starts grow strictly.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EpochHistory {
    starts: Vec<(LeaderEpoch, Offset)>,
}

impl EpochHistory {
    /// Returns a history without epochs.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the history of these epochs, each with its first offset; `None` if the epochs or the offsets do not grow
    /// strictly.
    pub fn from_starts(starts: impl IntoIterator<Item = (LeaderEpoch, Offset)>) -> Option<Self> {
        let mut history = Self::new();
        for (epoch, start) in starts {
            if history.last().is_some_and(|(last, last_start)| last >= epoch || last_start >= start) {
                return None;
            }
            history.starts.push((epoch, start));
        }
        Some(history)
    }

    /// Returns every epoch with its start, oldest first.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (LeaderEpoch, Offset)> + '_ {
        self.starts.iter().copied()
    }

    /// Returns the newest epoch with its start.
    pub fn last(&self) -> Option<(LeaderEpoch, Offset)> {
        self.starts.last().copied()
    }

    /// Returns the epoch of `offset`, which must lie in the log; `None` if the history starts above `offset`.
    pub fn at(&self, offset: Offset) -> Option<LeaderEpoch> {
        let after = self.starts.partition_point(|(_, start)| *start <= offset);
        after.checked_sub(1).map(|i| self.starts[i].0)
    }

    /// Adds the epoch of a batch at `start`, unless it is the last epoch already. A new epoch that starts where the
    /// last one starts replaces the last one. Returns false, without a change, if the epoch is lower than the last one.
    /// Returns false also if a new epoch starts below the start of the last one.
    #[must_use]
    pub fn record(&mut self, epoch: LeaderEpoch, start: Offset) -> bool {
        match self.starts.last() {
            Some((last, _)) if *last == epoch => true,
            Some((last, last_start)) if *last > epoch || *last_start > start => false,
            last => {
                // The last epoch has no batch in this log: its start was moved to the log start.
                if last.is_some_and(|(_, last_start)| *last_start == start) {
                    self.starts.pop();
                }
                self.starts.push((epoch, start));
                true
            }
        }
    }

    /// Returns the largest epoch of this log not above `epoch`, and its end, in a log that ends at `log_end`. Returns
    /// `None` if every epoch is newer.
    pub fn end_of(&self, epoch: LeaderEpoch, log_end: Offset) -> Option<(LeaderEpoch, Offset)> {
        let after = self.starts.partition_point(|(candidate, _)| *candidate <= epoch);
        let largest = self.starts.get(after.checked_sub(1)?)?.0;
        Some((largest, self.starts.get(after).map_or(log_end, |(_, start)| *start)))
    }

    /// Removes the epochs that start at or above `end`.
    pub fn truncate(&mut self, end: Offset) {
        self.starts.retain(|(_, start)| *start < end);
    }

    /// Removes the epochs that end at or below `start`. The last epoch has no end and stays. The epoch that contains
    /// `start` begins there from now on.
    pub fn truncate_front(&mut self, start: Offset) {
        let first_kept = self.starts.partition_point(|(_, epoch_start)| *epoch_start <= start).saturating_sub(1);
        self.starts.drain(..first_kept);
        if let Some((_, epoch_start)) = self.starts.first_mut() {
            *epoch_start = (*epoch_start).max(start);
        }
    }

    /// Returns the history of the offsets `start..end`.
    #[must_use]
    pub fn between(&self, start: Offset, end: Offset) -> Self {
        let mut part = self.clone();
        part.truncate(end);
        part.truncate_front(start);
        part
    }

    pub(in crate::log) fn encode(&self, out: &mut impl BufMut) {
        out.put_u32(u32::try_from(self.starts.len()).unwrap_or(u32::MAX));
        for (epoch, start) in &self.starts {
            out.put_u32(epoch.0);
            out.put_u64(start.get());
        }
    }

    pub(in crate::log) fn decode(from: &mut impl Buf) -> Option<Self> {
        let count = usize::try_from(from.try_get_u32().ok()?).ok()?;
        if from.remaining() / 12 < count {
            return None;
        }
        let mut history = Self { starts: Vec::with_capacity(count) };
        for _ in 0..count {
            // The epoch must be one that a batch can have.
            let epoch = LeaderEpoch::from_i32(from.try_get_i32().ok()?)?;
            let start = Offset::new(from.try_get_u64().ok()?)?;
            if history.last().is_some_and(|(last, last_start)| last >= epoch || last_start >= start) {
                return None;
            }
            history.starts.push((epoch, start));
        }
        Some(history)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(offset: u64) -> Offset {
        Offset::new(offset).unwrap()
    }

    fn history() -> EpochHistory {
        let mut history = EpochHistory::new();
        for (epoch, start) in [(1, 0), (3, 10), (4, 25)] {
            assert!(history.record(LeaderEpoch(epoch), at(start)));
        }
        history
    }

    #[test]
    fn epoch_ends_at_the_start_of_the_next() {
        let history = history();
        assert_eq!(history.end_of(LeaderEpoch(0), at(30)), None);
        assert_eq!(history.end_of(LeaderEpoch(1), at(30)), Some((LeaderEpoch(1), at(10))));
        assert_eq!(history.end_of(LeaderEpoch(2), at(30)), Some((LeaderEpoch(1), at(10))), "KIP-279: the lower one");
        assert_eq!(history.end_of(LeaderEpoch(9), at(30)), Some((LeaderEpoch(4), at(30))));
        assert_eq!(history.at(at(9)), Some(LeaderEpoch(1)));
        assert_eq!(history.at(at(10)), Some(LeaderEpoch(3)));
    }

    #[test]
    fn decreasing_epoch_is_rejected() {
        let mut history = history();
        assert!(!history.record(LeaderEpoch(3), at(40)));
        assert!(history.record(LeaderEpoch(4), at(40)), "the same epoch is accepted");
        assert_eq!(history, self::history());
    }

    #[test]
    fn truncation_at_either_end_keeps_the_remaining_epochs() {
        let mut history = history();
        history.truncate(at(25));
        assert_eq!(history.last(), Some((LeaderEpoch(3), at(10))));
        history.truncate_front(at(12));
        assert_eq!(history.iter().collect::<Vec<_>>(), [(LeaderEpoch(3), at(12))]);
    }
}
