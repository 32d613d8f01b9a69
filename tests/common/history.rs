//! Checks the results that clients received from real processes (`tests/it`) and from simulated ones (`tests/sim`). No
//! acknowledged record may be lost, and no other record may be read.
//!
//! A [`History`] holds the sent records with their outcomes, and the records that readers received. Each payload is
//! sent once, so it identifies its record. [`History::check`] is a pure function. It finds these violations:
//!
//! | violation | meaning |
//! | --- | --- |
//! | lost | A reader did not receive a record that was acknowledged before its read began. The acknowledged offset is in the read range, or at or above an end that had to be the newest. |
//! | misplaced | The record was acknowledged at one offset and read at another. If the log may contain it twice: another record is at the acknowledged offset. |
//! | duplicated | The record was read at two offsets of a log that may contain it only once. |
//! | invented | The record was read, but was refused or never sent to this log. |
//! | reordered | A producer's records were read in another order than sent, or an acknowledged record is not below one that was sent after its acknowledgement. |
//! | skipped | The offsets that a reader received are not consecutive from the start to the end of its range. |
//! | rewritten | Two different records were read at one offset. |
//! | regressed | A reader got a lower end than an earlier reader, although both ends had to be the newest. |
//!
//! Times are values of one counter that each event increments, so that the order of events is exact.

use std::collections::{BTreeMap, HashMap, HashSet};

/// One log: the index of its topic in the test's list, and its partition.
pub(crate) type Log = (usize, i32);

/// Outcome of an attempt, as its client received it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The broker acknowledged the record at this offset.
    Acknowledged { offset: i64 },
    /// The broker refused the record.
    Refused,
    /// The record may be stored or not.
    Unknown,
}

/// One sent record.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attempt {
    pub(crate) log: Log,
    /// Identifies the record: no other attempt has this payload.
    pub(crate) payload: u64,
    /// True if the log may contain the record only once. A producer without sequences may send a stored record again.
    pub(crate) once: bool,
    pub(crate) producer: u32,
    /// Position in the order of the producer's records for this log.
    pub(crate) sequence: u64,
    /// Time of sending.
    pub(crate) sent: u64,
    /// Time of the outcome.
    pub(crate) responded: u64,
    pub(crate) outcome: Outcome,
}

/// One reader's read of the range `from..to` of a log.
#[derive(Clone, Debug)]
pub(crate) struct ReadPass {
    pub(crate) log: Log,
    /// Start time.
    pub(crate) began: u64,
    /// First offset.
    pub(crate) from: i64,
    /// End of the log, as reported to the reader before the read.
    pub(crate) end: i64,
    /// End of the read, excluded: `end`, or below it if only a part was read.
    pub(crate) to: i64,
    /// True if `end` had to be the newest end. False if `end` may come from a leader that has not detected its
    /// replacement. Then neither `end` nor the records from `end` on are checked.
    pub(crate) current: bool,
    /// Offset and payload of each received record, in the order of their arrival.
    pub(crate) records: Vec<(i64, u64)>,
}

/// All requests and results of the clients.
#[derive(Clone, Debug, Default)]
pub(crate) struct History {
    pub(crate) attempts: Vec<Attempt>,
    pub(crate) passes: Vec<ReadPass>,
}

/// One violation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Violation {
    Lost { log: Log, offset: i64, payload: u64 },
    Misplaced { log: Log, payload: u64, acknowledged: i64, read: i64 },
    Duplicated { log: Log, payload: u64, first: i64, second: i64 },
    Invented { log: Log, offset: i64, payload: u64 },
    Reordered { log: Log, earlier: u64, later: u64 },
    Skipped { log: Log, after: i64, next: i64 },
    Rewritten { log: Log, offset: i64, first: u64, second: u64 },
    Regressed { log: Log, earlier: i64, later: i64 },
}

impl History {
    /// Returns all violations, log by log.
    pub(crate) fn check(&self) -> Vec<Violation> {
        let logs: HashSet<Log> =
            self.attempts.iter().map(|attempt| attempt.log).chain(self.passes.iter().map(|pass| pass.log)).collect();
        let mut logs: Vec<Log> = logs.into_iter().collect();
        logs.sort_unstable();
        logs.into_iter().flat_map(|log| self.check_log(log)).collect()
    }

    fn check_log(&self, log: Log) -> Vec<Violation> {
        let attempts: Vec<&Attempt> = self.attempts.iter().filter(|attempt| attempt.log == log).collect();
        let mut passes: Vec<&ReadPass> = self.passes.iter().filter(|pass| pass.log == log).collect();
        passes.sort_by_key(|pass| pass.began);
        let mut found = Vec::new();
        let content = merge_passes(log, &passes, &mut found);
        check_ends(log, &passes, &mut found);
        check_identities(log, &attempts, &content, &mut found);
        let acknowledged = Acknowledged::of(&attempts);
        for pass in &passes {
            acknowledged.check_losses(pass, &mut found);
        }
        check_producer_order(log, &attempts, &content, &mut found);
        check_time_order(log, &attempts, &mut found);
        found
    }
}

/// Returns the records of the log by offset, as the first reader of each offset received them. Adds a violation in
/// these cases:
/// - at each point where the offsets of a reader are not consecutive
/// - for each record that differs from an earlier reader's
/// - for a reader that starts after its `from` or ends before its `to`
fn merge_passes(log: Log, passes: &[&ReadPass], found: &mut Vec<Violation>) -> BTreeMap<i64, u64> {
    let mut content: BTreeMap<i64, u64> = BTreeMap::new();
    for pass in passes {
        let mut expected = pass.from;
        for &(offset, payload) in &pass.records {
            if offset != expected {
                found.push(Violation::Skipped { log, after: expected - 1, next: offset });
            }
            expected = offset + 1;
            let first = *content.entry(offset).or_insert(payload);
            if first != payload {
                found.push(Violation::Rewritten { log, offset, first, second: payload });
            }
        }
        if expected < pass.to {
            found.push(Violation::Skipped { log, after: expected - 1, next: pass.to });
        }
    }
    content
}

/// Checks that no reader got a lower end than an earlier reader. Ignores passes whose end may be an older one.
fn check_ends(log: Log, passes: &[&ReadPass], found: &mut Vec<Violation>) {
    let mut highest = 0;
    for pass in passes.iter().filter(|pass| pass.current) {
        if pass.end < highest {
            found.push(Violation::Regressed { log, earlier: highest, later: pass.end });
        }
        highest = highest.max(pass.end);
    }
}

/// Checks that each received record was sent to this log and not refused, and is at its acknowledged offset. If
/// required, each record is in the log once. If the log may contain a record twice, only its acknowledged offset must
/// not hold another record.
fn check_identities(log: Log, attempts: &[&Attempt], content: &BTreeMap<i64, u64>, found: &mut Vec<Violation>) {
    let sent: HashMap<u64, &Attempt> = attempts.iter().map(|attempt| (attempt.payload, *attempt)).collect();
    let mut seen: HashMap<u64, i64> = HashMap::new();
    for (&offset, &payload) in content {
        let attempt = sent.get(&payload);
        if let Some(&first) = seen.get(&payload) {
            if attempt.is_none_or(|attempt| attempt.once) {
                found.push(Violation::Duplicated { log, payload, first, second: offset });
            }
            continue;
        }
        seen.insert(payload, offset);
        match attempt.map(|attempt| (attempt.outcome, attempt.once)) {
            None | Some((Outcome::Refused, _)) => found.push(Violation::Invented { log, offset, payload }),
            Some((Outcome::Acknowledged { offset: acknowledged }, once)) => {
                let stored = content.get(&acknowledged);
                let misplaced =
                    if once { acknowledged != offset } else { stored.is_some_and(|stored| *stored != payload) };
                if misplaced {
                    found.push(Violation::Misplaced { log, payload, acknowledged, read: offset });
                }
            }
            Some((Outcome::Unknown, _)) => {}
        }
    }
}

/// The acknowledged records of one log in the order of their offsets. With this order, a check of one reader does not
/// scan the whole history.
struct Acknowledged<'a> {
    attempts: Vec<(i64, &'a Attempt)>,
    /// For each record, the time of the earliest acknowledgement among this record and all records above it.
    earliest: Vec<u64>,
}

impl<'a> Acknowledged<'a> {
    fn of(attempts: &[&'a Attempt]) -> Self {
        let offset = |attempt: &&'a Attempt| match attempt.outcome {
            Outcome::Acknowledged { offset } => Some((offset, *attempt)),
            _ => None,
        };
        let mut attempts: Vec<_> = attempts.iter().filter_map(offset).collect();
        attempts.sort_by_key(|&(offset, _)| offset);
        let mut earliest: Vec<u64> = attempts.iter().map(|(_, attempt)| attempt.responded).collect();
        for at in (1..earliest.len()).rev() {
            earliest[at - 1] = earliest[at - 1].min(earliest[at]);
        }
        Self { attempts, earliest }
    }

    /// Checks that the reader received all records of its range that were acknowledged before its start. With a current
    /// end, a record that was acknowledged at or above this end before the start is lost too.
    fn check_losses(&self, pass: &ReadPass, found: &mut Vec<Violation>) {
        let seen: HashSet<u64> = pass.records.iter().map(|&(_, payload)| payload).collect();
        let first = self.attempts.partition_point(|&(offset, _)| offset < pass.from);
        // The `earliest` of a record may be at or after the start of the pass. The reader then had to receive neither
        // this record nor any record above it.
        let required = self.attempts[first..].iter().zip(&self.earliest[first..]);
        for (&(offset, attempt), _) in required.take_while(|&(_, &earliest)| earliest < pass.began) {
            let covered = offset < pass.to || pass.current && offset >= pass.end;
            if covered && attempt.responded < pass.began && !seen.contains(&attempt.payload) {
                found.push(Violation::Lost { log: pass.log, offset, payload: attempt.payload });
            }
        }
    }
}

/// Checks that the received records of each producer are in the order of sending.
fn check_producer_order(log: Log, attempts: &[&Attempt], content: &BTreeMap<i64, u64>, found: &mut Vec<Violation>) {
    let sent: HashMap<u64, &Attempt> = attempts.iter().map(|attempt| (attempt.payload, *attempt)).collect();
    let mut last: HashMap<u32, &Attempt> = HashMap::new();
    for attempt in content.values().filter_map(|payload| sent.get(payload)) {
        if let Some(before) = last.get(&attempt.producer)
            && before.sequence > attempt.sequence
        {
            found.push(Violation::Reordered { log, earlier: attempt.payload, later: before.payload });
        }
        last.insert(attempt.producer, attempt);
    }
}

/// Checks that each acknowledged record is below every acknowledged record that was sent after its acknowledgement.
fn check_time_order(log: Log, attempts: &[&Attempt], found: &mut Vec<Violation>) {
    let acknowledged = |attempt: &&Attempt| match attempt.outcome {
        Outcome::Acknowledged { offset } => Some((offset, attempt.sent, attempt.responded, attempt.payload)),
        _ => None,
    };
    let mut by_sent: Vec<_> = attempts.iter().filter_map(acknowledged).collect();
    let mut by_response = by_sent.clone();
    by_sent.sort_by_key(|&(_, sent, _, _)| sent);
    by_response.sort_by_key(|&(_, _, responded, _)| responded);
    let mut acknowledgements = by_response.into_iter().peekable();
    let mut highest: Option<(i64, u64)> = None;
    for (offset, sent, _, payload) in by_sent {
        while let Some((offset, _, _, payload)) = acknowledgements.next_if(|&(_, _, responded, _)| responded < sent) {
            highest = highest.max(Some((offset, payload)));
        }
        if let Some((_, earlier)) = highest.filter(|&(highest, _)| highest >= offset) {
            found.push(Violation::Reordered { log, earlier, later: payload });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: Log = (0, 3);

    fn attempt(payload: u64, sent: u64, responded: u64, outcome: Outcome) -> Attempt {
        Attempt { log: LOG, payload, once: true, producer: 1, sequence: payload, sent, responded, outcome }
    }

    fn acknowledged(payload: u64, offset: i64) -> Attempt {
        attempt(payload, payload * 10, payload * 10 + 5, Outcome::Acknowledged { offset })
    }

    fn pass(began: u64, from: i64, payloads: &[u64]) -> ReadPass {
        let records: Vec<(i64, u64)> = (from..).zip(payloads.iter().copied()).collect();
        let end = from + records.len() as i64;
        ReadPass { log: LOG, began, from, end, to: end, current: true, records }
    }

    /// Returns a history without violations: acknowledged records in order, a stored and a missing record with unknown
    /// outcomes, and a refused record.
    fn valid() -> History {
        let attempts = vec![
            acknowledged(1, 0),
            acknowledged(2, 1),
            attempt(3, 30, 35, Outcome::Unknown),
            attempt(4, 40, 45, Outcome::Unknown),
            attempt(5, 50, 55, Outcome::Refused),
            acknowledged(6, 3),
            acknowledged(7, 4),
        ];
        let passes = vec![pass(25, 0, &[1, 2]), pass(100, 0, &[1, 2, 3, 6, 7]), pass(110, 3, &[6, 7])];
        History { attempts, passes }
    }

    #[test]
    fn valid_history_has_no_violation() {
        assert_eq!(valid().check(), []);
        assert_eq!(History::default().check(), []);
    }

    #[test]
    fn lost_record_and_shifted_offset_are_found() {
        let mut history = valid();
        history.passes[2] = pass(110, 3, &[6]);
        assert_eq!(
            history.check(),
            [
                Violation::Regressed { log: LOG, earlier: 5, later: 4 },
                Violation::Lost { log: LOG, offset: 4, payload: 7 }
            ]
        );
        let mut history = valid();
        history.passes = vec![pass(100, 0, &[1, 2, 6, 7])];
        let found = history.check();
        assert!(found.contains(&Violation::Misplaced { log: LOG, payload: 6, acknowledged: 3, read: 2 }), "{found:?}");
        let mut history = valid();
        history.passes = vec![pass(100, 0, &[])];
        assert_eq!(history.check().iter().filter(|found| matches!(found, Violation::Lost { .. })).count(), 4);
    }

    #[test]
    fn record_acknowledged_during_a_read_may_be_missing() {
        let mut history = valid();
        history.attempts.push(attempt(8, 99, 101, Outcome::Acknowledged { offset: 5 }));
        history.passes.pop();
        assert_eq!(history.check(), []);
        history.passes.push(pass(110, 3, &[6, 7]));
        assert_eq!(history.check(), [Violation::Lost { log: LOG, offset: 5, payload: 8 }]);
    }

    #[test]
    fn record_below_the_start_of_a_read_is_not_lost() {
        let mut history = valid();
        history.passes = vec![pass(100, 3, &[6, 7])];
        assert_eq!(history.check(), []);
    }

    #[test]
    fn partial_read_covers_its_range_and_above_the_end() {
        let partial = |from, to, payloads: &[u64]| {
            let mut history = valid();
            history.passes = vec![pass(100, 0, &[1, 2, 3, 6, 7])];
            history.passes.push(ReadPass { end: 5, to, ..pass(110, from, payloads) });
            history
        };
        assert_eq!(partial(1, 4, &[2, 3, 6]).check(), []);
        let short = partial(1, 4, &[2, 3]).check();
        assert!(short.contains(&Violation::Skipped { log: LOG, after: 2, next: 4 }), "{short:?}");
        assert!(short.contains(&Violation::Lost { log: LOG, offset: 3, payload: 6 }), "{short:?}");
        let rewritten = partial(1, 3, &[2, 4]).check();
        assert!(
            rewritten.contains(&Violation::Rewritten { log: LOG, offset: 2, first: 3, second: 4 }),
            "{rewritten:?}"
        );
        // A record that was acknowledged at or above the reported end is lost, also if the reader reads only a part.
        let mut history = partial(1, 2, &[2]);
        history.attempts.push(attempt(8, 80, 85, Outcome::Acknowledged { offset: 5 }));
        assert!(history.check().contains(&Violation::Lost { log: LOG, offset: 5, payload: 8 }));
        let losses = history.check().iter().filter(|found| matches!(found, Violation::Lost { .. })).count();
        assert_eq!(losses, 2, "by the full read and by the partial one");
    }

    #[test]
    fn duplicate_is_found() {
        let mut history = valid();
        history.passes = vec![pass(100, 0, &[1, 2, 3, 6, 7, 3])];
        let found = history.check();
        assert!(found.contains(&Violation::Duplicated { log: LOG, payload: 3, first: 2, second: 5 }), "{found:?}");
    }

    #[test]
    fn allowed_duplicate_is_at_its_acknowledged_offset() {
        let mut history = valid();
        history.attempts[4] = Attempt { once: false, producer: 2, ..acknowledged(6, 3) };
        history.attempts.remove(5);
        history.passes = vec![pass(100, 0, &[1, 2, 3, 6, 7, 6])];
        assert_eq!(history.check(), []);
        history.attempts[4].outcome = Outcome::Acknowledged { offset: 4 };
        assert!(history.check().contains(&Violation::Misplaced { log: LOG, payload: 6, acknowledged: 4, read: 3 }));
    }

    #[test]
    fn invented_and_refused_records_are_found() {
        let mut history = valid();
        history.passes = vec![pass(100, 0, &[1, 2, 3, 6, 7, 99])];
        assert_eq!(history.check(), [Violation::Invented { log: LOG, offset: 5, payload: 99 }]);
        history.passes = vec![pass(100, 0, &[1, 2, 5, 6, 7])];
        assert!(history.check().contains(&Violation::Invented { log: LOG, offset: 2, payload: 5 }));
    }

    #[test]
    fn record_of_another_log_is_invented() {
        let mut history = valid();
        history.attempts[2].log = (0, 4);
        assert_eq!(history.check(), [Violation::Invented { log: LOG, offset: 2, payload: 3 }]);
    }

    #[test]
    fn reversed_unacknowledged_records_are_found() {
        let attempts = vec![attempt(1, 1, 9, Outcome::Unknown), attempt(2, 2, 9, Outcome::Unknown)];
        let history = History { attempts, passes: vec![pass(10, 0, &[2, 1])] };
        assert_eq!(history.check(), [Violation::Reordered { log: LOG, earlier: 1, later: 2 }]);
    }

    #[test]
    fn producers_may_overlap_but_not_reverse_time() {
        let other = |sent, responded| Attempt {
            producer: 2,
            sequence: 0,
            ..attempt(2, sent, responded, Outcome::Acknowledged { offset: 0 })
        };
        let first = attempt(1, 1, 5, Outcome::Acknowledged { offset: 1 });
        let overlapping = History { attempts: vec![first, other(3, 7)], passes: vec![pass(10, 0, &[2, 1])] };
        assert_eq!(overlapping.check(), []);
        let reversed = History { attempts: vec![first, other(6, 7)], passes: vec![pass(10, 0, &[2, 1])] };
        assert_eq!(reversed.check(), [Violation::Reordered { log: LOG, earlier: 1, later: 2 }]);
    }

    #[test]
    fn offset_acknowledged_twice_is_found() {
        let history = History { attempts: vec![acknowledged(1, 0), acknowledged(2, 0)], passes: vec![] };
        assert_eq!(history.check(), [Violation::Reordered { log: LOG, earlier: 1, later: 2 }]);
    }

    #[test]
    fn gaps_and_repeats_of_a_reader_are_found() {
        let with = |records: Vec<(i64, u64)>, end| {
            let mut history = valid();
            history.passes = vec![ReadPass { log: LOG, began: 100, from: 0, end, to: end, current: true, records }];
            history.check()
        };
        let gap = with(vec![(0, 1), (1, 2), (3, 6), (4, 7)], 5);
        assert_eq!(gap, [Violation::Skipped { log: LOG, after: 1, next: 3 }]);
        let back = with(vec![(0, 1), (1, 2), (1, 2), (2, 3), (3, 6), (4, 7)], 5);
        assert_eq!(back, [Violation::Skipped { log: LOG, after: 1, next: 1 }]);
        let missing = with(vec![(0, 1), (1, 2), (2, 3), (3, 6), (4, 7)], 6);
        assert_eq!(missing, [Violation::Skipped { log: LOG, after: 4, next: 6 }]);
        let late = with(vec![(1, 2), (2, 3), (3, 6), (4, 7)], 5);
        assert!(late.contains(&Violation::Skipped { log: LOG, after: -1, next: 1 }), "{late:?}");
    }

    #[test]
    fn rewritten_offset_is_found() {
        let mut history = valid();
        history.passes[2] = ReadPass { records: vec![(3, 6), (4, 4)], ..pass(110, 3, &[6, 7]) };
        let found = history.check();
        assert!(found.contains(&Violation::Rewritten { log: LOG, offset: 4, first: 7, second: 4 }), "{found:?}");
    }

    #[test]
    fn regressed_end_is_found() {
        let mut history = valid();
        history.attempts.truncate(4);
        history.passes = vec![pass(50, 0, &[1, 2, 3]), pass(60, 0, &[1, 2])];
        assert_eq!(history.check(), [Violation::Regressed { log: LOG, earlier: 3, later: 2 }]);
    }

    #[test]
    fn read_with_an_older_end_covers_its_records() {
        let mut history = valid();
        history.passes.push(ReadPass { current: false, ..pass(120, 0, &[1, 2, 3]) });
        history.passes.push(pass(130, 0, &[1, 2, 3, 6, 7]));
        assert_eq!(history.check(), []);
        history.passes[3] = ReadPass { current: false, ..pass(120, 0, &[1, 3]) };
        assert!(history.check().contains(&Violation::Lost { log: LOG, offset: 1, payload: 2 }));
    }

    /// Each single dropped, changed or inserted record of a full read is a violation.
    #[test]
    fn single_change_to_a_full_read_is_found() {
        let attempts: Vec<Attempt> = (1..=8).map(|n| acknowledged(n, n as i64 - 1)).collect();
        let full: Vec<u64> = (1..=8).collect();
        let history = |payloads: &[u64]| History { attempts: attempts.clone(), passes: vec![pass(1000, 0, payloads)] };
        assert_eq!(history(&full).check(), []);
        for at in 0..full.len() {
            let mut dropped = full.clone();
            dropped.remove(at);
            assert!(!history(&dropped).check().is_empty(), "dropped {at}");
            for payload in 0..=9 {
                let mut changed = full.clone();
                changed[at] = payload;
                assert_eq!(history(&changed).check().is_empty(), changed == full, "{changed:?}");
                let mut inserted = full.clone();
                inserted.insert(at, payload);
                assert!(!history(&inserted).check().is_empty(), "{inserted:?}");
            }
        }
    }
}
