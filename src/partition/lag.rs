//! Lag of followers behind their leader, for monitoring. Decides nothing: `leader::insync` decides about the ISR. Pure.
//!
//! The lag needs the age of a record that is not acknowledged yet, and the log has no clock. So the log end is recorded with the time at
//! intervals, while followers acknowledge. Entries that every follower has acknowledged are dropped, so an idle partition keeps none.

use std::{collections::VecDeque, time::Duration};

use tokio::time::Instant;

use crate::model::{BrokerId, Offset};

/// Minimum interval between two entries.
const APART: Duration = Duration::from_millis(100);

/// Maximum number of entries. Above it every other entry is dropped: older ages become coarser.
const NOTES: usize = 64;

/// Lag of one follower.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lag {
    /// Number of records that it has not acknowledged.
    pub records: u64,
    /// Age of the oldest of these records.
    pub time: Duration,
}

/// Log ends of a leader's followers.
#[derive(Debug)]
pub(super) struct Followers {
    /// Time since which this broker leads.
    since: Instant,
    /// Log ends that followers have acknowledged.
    acknowledged: Vec<(BrokerId, Offset)>,
    /// Records from this offset on were appended at this time or later. Both ascend.
    notes: VecDeque<(Offset, Instant)>,
}

impl Followers {
    pub(super) fn new(now: Instant) -> Self {
        Self { since: now, acknowledged: Vec::new(), notes: VecDeque::new() }
    }

    /// Records an append: the log ended at `before` until now.
    pub(super) fn appended(&mut self, before: Offset, now: Instant) {
        if self.notes.back().is_some_and(|(_, at)| now.duration_since(*at) < APART) {
            return;
        }
        self.notes.push_back((before, now));
        if self.notes.len() > NOTES {
            let mut place = 0;
            self.notes.retain(|_| {
                place += 1;
                place % 2 == 1
            });
        }
    }

    /// Records an acknowledgement: a follower has everything below `end`.
    pub(super) fn acknowledged(&mut self, broker: BrokerId, end: Offset) {
        match self.acknowledged.iter_mut().find(|(known, _)| *known == broker) {
            Some((_, known)) => *known = end,
            None => self.acknowledged.push((broker, end)),
        }
        let least = self.acknowledged.iter().map(|(_, end)| *end).min().unwrap_or(end);
        // The last entry at or below `least` has the age of the records after it.
        while self.notes.get(1).is_some_and(|(before, _)| *before <= least) {
            self.notes.pop_front();
        }
    }

    /// Drops the acknowledgements of brokers that are not in `replicas`.
    pub(super) fn keep(&mut self, replicas: &[BrokerId]) {
        self.acknowledged.retain(|(id, _)| replicas.contains(id));
    }

    /// Returns the lag of a broker behind a log that ends at `log_end`. A broker that has acknowledged nothing lacks all records from
    /// `first` on, for as long as this broker leads.
    pub(super) fn lag(&self, broker: BrokerId, first: Offset, log_end: Offset, now: Instant) -> Lag {
        let known = self.acknowledged.iter().find(|(known, _)| *known == broker).map(|(_, end)| *end);
        let records = log_end.since(known.unwrap_or(first));
        let noted = known.and_then(|end| self.notes.iter().rev().find(|(before, _)| *before <= end));
        let since = noted.map_or(self.since, |(_, at)| *at);
        let time = if records == 0 { Duration::ZERO } else { now.duration_since(since) };
        Lag { records, time }
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

    /// Returns a leader that is idle since `start`, at offset 100, with two followers that have everything.
    fn calm(start: Instant) -> Followers {
        let mut followers = Followers::new(start);
        followers.acknowledged(TWO, offset(100));
        followers.acknowledged(THREE, offset(100));
        followers
    }

    fn lag(followers: &Followers, broker: BrokerId, log_end: u64, now: Instant) -> (u64, u64) {
        let lag = followers.lag(broker, offset(40), offset(log_end), now);
        (lag.records, u64::try_from(lag.time.as_millis()).unwrap())
    }

    #[test]
    fn lag_time_is_age_of_oldest_missing_record() {
        let start = clock::monotonic();
        let at = |ms| start + Duration::from_millis(ms);
        let mut followers = calm(start);
        assert_eq!(lag(&followers, TWO, 100, at(3_600_000)), (0, 0));
        followers.appended(offset(100), at(3_600_000));
        assert_eq!(lag(&followers, TWO, 110, at(3_600_020)), (10, 20), "an hour's quiet is no lag");
        followers.appended(offset(110), at(3_601_000));
        followers.acknowledged(TWO, offset(110));
        assert_eq!(lag(&followers, TWO, 120, at(3_601_500)), (10, 500));
        assert_eq!(lag(&followers, THREE, 120, at(3_601_500)), (20, 1500));
        followers.acknowledged(TWO, offset(120));
        followers.acknowledged(THREE, offset(120));
        assert_eq!(followers.notes.len(), 1, "what everybody has is forgotten");
        assert_eq!(lag(&followers, THREE, 120, at(9_000_000)), (0, 0));
    }

    #[test]
    fn lag_counts_new_replicas_and_drops_removed_ones() {
        let start = clock::monotonic();
        let at = |ms| start + Duration::from_millis(ms);
        let mut followers = calm(start);
        assert_eq!(lag(&followers, BrokerId(4), 100, at(700)), (60, 700));
        for step in 0..1000 {
            followers.appended(offset(100 + step), at(1000 * step));
        }
        assert!(followers.notes.len() <= NOTES, "{}", followers.notes.len());
        let (records, ms) = lag(&followers, TWO, 1100, at(1_000_000));
        assert_eq!((records, ms), (1000, 1_000_000), "the oldest note is kept");
        followers.acknowledged(TWO, offset(1099));
        assert!(followers.notes.len() > 1, "one is still behind");
        followers.keep(&[BrokerId(1), TWO]);
        followers.acknowledged(TWO, offset(1100));
        assert_eq!(followers.notes.len(), 1);
    }
}
