//! Lag of followers behind their leader, for monitoring alone: `leader::isr` decides about the ISR. Pure.
//!
//! The lag in time is the age of the oldest record that a follower has not acknowledged. Records have no time of their
//! append. So the tracker stores the log end with the time at intervals, once a follower has acknowledged. Of the
//! entries that every follower with an acknowledgement has acknowledged, only the last remains.

use std::{collections::VecDeque, time::Duration};

use tokio::time::Instant;

use crate::model::{BrokerId, Offset};

/// Minimum interval between two entries of a [`FollowerLagTracker`].
const MIN_ENTRY_INTERVAL: Duration = Duration::from_millis(100);

/// Maximum number of entries of a [`FollowerLagTracker`]. If there are more, every other entry is dropped, so the ages
/// of old records become less exact.
const MAX_ENTRIES: usize = 64;

/// Lag of one follower.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FollowerLag {
    /// Number of records that the follower has not acknowledged.
    pub records: u64,
    /// Age of the oldest of these records.
    pub time: Duration,
}

/// Log ends that a leader's followers have acknowledged, and times at which the leader's log reached certain offsets.
#[derive(Debug)]
pub(super) struct FollowerLagTracker {
    /// Start of the leadership.
    since: Instant,
    /// Log end that each follower acknowledged last; a follower without an acknowledgement is missing.
    acknowledged: Vec<(BrokerId, Offset)>,
    /// Records from this offset on were appended at this time or later. Offsets and times ascend.
    entries: VecDeque<(Offset, Instant)>,
}

impl FollowerLagTracker {
    pub(super) fn new(now: Instant) -> Self {
        Self { since: now, acknowledged: Vec::new(), entries: VecDeque::new() }
    }

    /// Adds an entry for an append, unless the last entry is younger than [`MIN_ENTRY_INTERVAL`]. The log ended at
    /// `previous_end` before the append.
    pub(super) fn appended(&mut self, previous_end: Offset, now: Instant) {
        if self.entries.back().is_some_and(|(_, time)| now.duration_since(*time) < MIN_ENTRY_INTERVAL) {
            return;
        }
        self.entries.push_back((previous_end, now));
        if self.entries.len() > MAX_ENTRIES {
            let mut index = 0;
            self.entries.retain(|_| {
                index += 1;
                index % 2 == 1
            });
        }
    }

    /// Stores an acknowledgement: follower `broker` has all records below `end`. Drops the entries that no follower
    /// needs.
    pub(super) fn acknowledged(&mut self, broker: BrokerId, end: Offset) {
        match self.acknowledged.iter_mut().find(|(id, _)| *id == broker) {
            Some((_, acked)) => *acked = end,
            None => self.acknowledged.push((broker, end)),
        }
        let min_acked = self.acknowledged.iter().map(|(_, end)| *end).min().unwrap_or(end);
        // The last entry at or below `min_acked` stays: its time is that of the records after it.
        while self.entries.get(1).is_some_and(|(offset, _)| *offset <= min_acked) {
            self.entries.pop_front();
        }
    }

    /// Drops the acknowledgements of brokers that are not in `replicas`.
    pub(super) fn keep(&mut self, replicas: &[BrokerId]) {
        self.acknowledged.retain(|(id, _)| replicas.contains(id));
    }

    /// Returns the lag of follower `broker` behind a log that ends at `log_end`. A follower without an acknowledgement
    /// counts as lacking all records from `first` on. Without an entry at or below the acknowledged end, the age counts
    /// from the start of the leadership.
    pub(super) fn lag(&self, broker: BrokerId, first: Offset, log_end: Offset, now: Instant) -> FollowerLag {
        let acked = self.acknowledged.iter().find(|(id, _)| *id == broker).map(|(_, end)| *end);
        let records = log_end.since(acked.unwrap_or(first));
        let entry = acked.and_then(|end| self.entries.iter().rev().find(|(offset, _)| *offset <= end));
        let since = entry.map_or(self.since, |(_, time)| *time);
        let time = if records == 0 { Duration::ZERO } else { now.duration_since(since) };
        FollowerLag { records, time }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::clock;

    const TWO: BrokerId = BrokerId(2);
    const THREE: BrokerId = BrokerId(3);

    fn offset(value: u64) -> Offset {
        Offset::new(value).unwrap()
    }

    /// Returns the tracker of a leader that has led since `start` and appended nothing. Its log ends at 100, and two
    /// followers have all records.
    fn idle_leader(start: Instant) -> FollowerLagTracker {
        let mut followers = FollowerLagTracker::new(start);
        followers.acknowledged(TWO, offset(100));
        followers.acknowledged(THREE, offset(100));
        followers
    }

    fn lag(followers: &FollowerLagTracker, broker: BrokerId, log_end: u64, now: Instant) -> (u64, u64) {
        let lag = followers.lag(broker, offset(40), offset(log_end), now);
        (lag.records, u64::try_from(lag.time.as_millis()).unwrap())
    }

    #[test]
    fn lag_time_is_age_of_oldest_missing_record() {
        let start = clock::monotonic();
        let at = |ms| start + Duration::from_millis(ms);
        let mut followers = idle_leader(start);
        assert_eq!(lag(&followers, TWO, 100, at(3_600_000)), (0, 0));
        followers.appended(offset(100), at(3_600_000));
        assert_eq!(lag(&followers, TWO, 110, at(3_600_020)), (10, 20), "an idle hour is no lag");
        followers.appended(offset(110), at(3_601_000));
        followers.acknowledged(TWO, offset(110));
        assert_eq!(lag(&followers, TWO, 120, at(3_601_500)), (10, 500));
        assert_eq!(lag(&followers, THREE, 120, at(3_601_500)), (20, 1500));
        followers.acknowledged(TWO, offset(120));
        followers.acknowledged(THREE, offset(120));
        assert_eq!(followers.entries.len(), 1, "entries that all followers have acknowledged are dropped");
        assert_eq!(lag(&followers, THREE, 120, at(9_000_000)), (0, 0));
    }

    #[test]
    fn lag_counts_new_replicas_and_drops_removed_ones() {
        let start = clock::monotonic();
        let at = |ms| start + Duration::from_millis(ms);
        let mut followers = idle_leader(start);
        assert_eq!(lag(&followers, BrokerId(4), 100, at(700)), (60, 700));
        for step in 0..1000 {
            followers.appended(offset(100 + step), at(1000 * step));
        }
        assert!(followers.entries.len() <= MAX_ENTRIES, "{}", followers.entries.len());
        let (records, ms) = lag(&followers, TWO, 1100, at(1_000_000));
        assert_eq!((records, ms), (1000, 1_000_000), "the oldest entry is kept");
        followers.acknowledged(TWO, offset(1099));
        assert!(followers.entries.len() > 1, "one follower still lacks records");
        followers.keep(&[BrokerId(1), TWO]);
        followers.acknowledged(TWO, offset(1100));
        assert_eq!(followers.entries.len(), 1);
    }
}
