//! Judges what clients saw, of real processes (`tests/it`) and of simulated ones (`tests/sim`): was anything acknowledged lost,
//! and was anything read that should not have been?
//!
//! A [`History`] is what was sent with what came back, and what readers saw. Every payload is sent once and is therefore a
//! record's identity. [`History::check`] is pure; it finds:
//!
//! | violation | what it means |
//! | --- | --- |
//! | lost | acknowledged at an offset that a later reader passed, or should have reached, without seeing it |
//! | misplaced | acknowledged at one offset and read at another |
//! | duplicated | read at two offsets of a log |
//! | invented | read, though nobody sent it, or though it was refused |
//! | reordered | one producer's order turned round, or acknowledged before another was sent and yet above it |
//! | skipped | a reader went from one offset to another that is not the next |
//! | rewritten | two readers saw different records at one offset |
//! | regressed | the end that a reader was told lies below one that an earlier reader was told |
//!
//! Time here is a counter that every event takes its number from, so that before and after are exact.

use std::collections::{BTreeMap, HashMap, HashSet};

/// One log: its topic's place in the test's list, and its partition.
pub(crate) type Log = (usize, i32);

/// What became of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The broker said that the record is at this offset.
    Acknowledged { offset: i64 },
    /// The broker said that it did not take the record.
    Refused,
    /// No answer: it may be there or not.
    Unknown,
}

/// One record sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attempt {
    pub(crate) log: Log,
    /// Its identity: no other attempt has it.
    pub(crate) payload: u64,
    /// Whether it may be there only once. A producer without sequences sends again what may be there.
    pub(crate) once: bool,
    pub(crate) producer: u32,
    /// Its place in its producer's order of sending to this log.
    pub(crate) sequence: u64,
    /// When it was sent.
    pub(crate) sent: u64,
    /// When its outcome was known.
    pub(crate) answered: u64,
    pub(crate) outcome: Outcome,
}

/// One reader's way through a part of a log.
#[derive(Clone, Debug)]
pub(crate) struct Pass {
    pub(crate) log: Log,
    /// When it began.
    pub(crate) began: u64,
    /// Where it began.
    pub(crate) from: i64,
    /// The end that it was told before it read.
    pub(crate) end: i64,
    /// Where it stopped: at that end, or below it when it was only to look at a piece.
    pub(crate) to: i64,
    /// Whether that end had to be the newest. A leader that the others have replaced without its knowledge tells an older one: then
    /// the pass answers only for what it read.
    pub(crate) current: bool,
    /// What it saw, in the order in which it saw it.
    pub(crate) records: Vec<(i64, u64)>,
}

/// Everything that clients did and saw.
#[derive(Clone, Debug, Default)]
pub(crate) struct History {
    pub(crate) attempts: Vec<Attempt>,
    pub(crate) passes: Vec<Pass>,
}

/// One thing that must not have happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Violation {
    Lost { log: Log, offset: i64, payload: u64 },
    Misplaced { log: Log, payload: u64, acknowledged: i64, read: i64 },
    Duplicated { log: Log, payload: u64, first: i64, second: i64 },
    Invented { log: Log, offset: i64, payload: u64 },
    Reordered { log: Log, earlier: u64, later: u64 },
    Skipped { log: Log, after: i64, next: i64 },
    Rewritten { log: Log, offset: i64, first: u64, second: u64 },
    Regressed { log: Log, told: i64, then: i64 },
}

impl History {
    /// Everything that is wrong, log by log.
    pub(crate) fn check(&self) -> Vec<Violation> {
        let logs: HashSet<Log> =
            self.attempts.iter().map(|one| one.log).chain(self.passes.iter().map(|pass| pass.log)).collect();
        let mut logs: Vec<Log> = logs.into_iter().collect();
        logs.sort_unstable();
        logs.into_iter().flat_map(|log| self.check_log(log)).collect()
    }

    fn check_log(&self, log: Log) -> Vec<Violation> {
        let attempts: Vec<&Attempt> = self.attempts.iter().filter(|one| one.log == log).collect();
        let mut passes: Vec<&Pass> = self.passes.iter().filter(|pass| pass.log == log).collect();
        passes.sort_by_key(|pass| pass.began);
        let mut found = Vec::new();
        let content = content(log, &passes, &mut found);
        ends(log, &passes, &mut found);
        identities(log, &attempts, &content, &mut found);
        let acknowledged = Acknowledged::of(&attempts);
        for pass in &passes {
            acknowledged.losses(pass, &mut found);
        }
        producer_order(log, &attempts, &content, &mut found);
        time_order(log, &attempts, &mut found);
        found
    }
}

/// What the log holds by its readers, offset by offset.
fn content(log: Log, passes: &[&Pass], found: &mut Vec<Violation>) -> BTreeMap<i64, u64> {
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

fn ends(log: Log, passes: &[&Pass], found: &mut Vec<Violation>) {
    let mut told = 0;
    for pass in passes.iter().filter(|pass| pass.current) {
        if pass.end < told {
            found.push(Violation::Regressed { log, told, then: pass.end });
        }
        told = told.max(pass.end);
    }
}

/// Every record read was sent, to here, once where it may be there only once, and is where its acknowledgement said.
fn identities(log: Log, attempts: &[&Attempt], content: &BTreeMap<i64, u64>, found: &mut Vec<Violation>) {
    let sent: HashMap<u64, &Attempt> = attempts.iter().map(|one| (one.payload, *one)).collect();
    let mut seen: HashMap<u64, i64> = HashMap::new();
    for (&offset, &payload) in content {
        let attempt = sent.get(&payload);
        if let Some(&first) = seen.get(&payload) {
            if attempt.is_none_or(|one| one.once) {
                found.push(Violation::Duplicated { log, payload, first, second: offset });
            }
            continue;
        }
        seen.insert(payload, offset);
        match attempt.map(|one| (one.outcome, one.once)) {
            None | Some((Outcome::Refused, _)) => found.push(Violation::Invented { log, offset, payload }),
            Some((Outcome::Acknowledged { offset: acknowledged }, once)) => {
                let there = content.get(&acknowledged);
                let misplaced =
                    if once { acknowledged != offset } else { there.is_some_and(|there| *there != payload) };
                if misplaced {
                    found.push(Violation::Misplaced { log, payload, acknowledged, read: offset });
                }
            }
            Some((Outcome::Unknown, _)) => {}
        }
    }
}

/// What was acknowledged in one log, in the order of its offsets, so that what a reader must have seen is found without
/// going over the whole history for each of them.
struct Acknowledged<'a> {
    attempts: Vec<(i64, &'a Attempt)>,
    /// For each, when the first of it and all above it was answered.
    earliest: Vec<u64>,
}

impl<'a> Acknowledged<'a> {
    fn of(attempts: &[&'a Attempt]) -> Self {
        let offset = |one: &&'a Attempt| match one.outcome {
            Outcome::Acknowledged { offset } => Some((offset, *one)),
            _ => None,
        };
        let mut attempts: Vec<_> = attempts.iter().filter_map(offset).collect();
        attempts.sort_by_key(|&(offset, _)| offset);
        let mut earliest: Vec<u64> = attempts.iter().map(|(_, one)| one.answered).collect();
        for at in (1..earliest.len()).rev() {
            earliest[at - 1] = earliest[at - 1].min(earliest[at]);
        }
        Self { attempts, earliest }
    }

    /// A reader must see, where it read, all that was acknowledged before it began.
    fn losses(&self, pass: &Pass, found: &mut Vec<Violation>) {
        let seen: HashSet<u64> = pass.records.iter().map(|&(_, payload)| payload).collect();
        let first = self.attempts.partition_point(|&(offset, _)| offset < pass.from);
        // Above the first place from which on everything was answered later, nothing was its to see.
        let due = self.attempts[first..].iter().zip(&self.earliest[first..]);
        for (&(offset, one), _) in due.take_while(|&(_, &earliest)| earliest < pass.began) {
            let looked = offset < pass.to || pass.current && offset >= pass.end;
            if looked && one.answered < pass.began && !seen.contains(&one.payload) {
                found.push(Violation::Lost { log: pass.log, offset, payload: one.payload });
            }
        }
    }
}

/// What one producer sent earlier lies lower.
fn producer_order(log: Log, attempts: &[&Attempt], content: &BTreeMap<i64, u64>, found: &mut Vec<Violation>) {
    let sent: HashMap<u64, &Attempt> = attempts.iter().map(|one| (one.payload, *one)).collect();
    let mut last: HashMap<u32, &Attempt> = HashMap::new();
    for one in content.values().filter_map(|payload| sent.get(payload)) {
        if let Some(before) = last.get(&one.producer)
            && before.sequence > one.sequence
        {
            found.push(Violation::Reordered { log, earlier: one.payload, later: before.payload });
        }
        last.insert(one.producer, one);
    }
}

/// What was acknowledged before something else was sent lies lower than it.
fn time_order(log: Log, attempts: &[&Attempt], found: &mut Vec<Violation>) {
    let acknowledged = |one: &&Attempt| match one.outcome {
        Outcome::Acknowledged { offset } => Some((offset, one.sent, one.answered, one.payload)),
        _ => None,
    };
    let mut by_sent: Vec<_> = attempts.iter().filter_map(acknowledged).collect();
    let mut by_answered = by_sent.clone();
    by_sent.sort_by_key(|&(_, sent, _, _)| sent);
    by_answered.sort_by_key(|&(_, _, answered, _)| answered);
    let mut answers = by_answered.into_iter().peekable();
    let mut highest: Option<(i64, u64)> = None;
    for (offset, sent, _, payload) in by_sent {
        while let Some((offset, _, _, payload)) = answers.next_if(|&(_, _, answered, _)| answered < sent) {
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

    fn attempt(payload: u64, sent: u64, answered: u64, outcome: Outcome) -> Attempt {
        Attempt { log: LOG, payload, once: true, producer: 1, sequence: payload, sent, answered, outcome }
    }

    fn acknowledged(payload: u64, offset: i64) -> Attempt {
        attempt(payload, payload * 10, payload * 10 + 5, Outcome::Acknowledged { offset })
    }

    fn pass(began: u64, from: i64, payloads: &[u64]) -> Pass {
        let records: Vec<(i64, u64)> = (from..).zip(payloads.iter().copied()).collect();
        let end = from + records.len() as i64;
        Pass { log: LOG, began, from, end, to: end, current: true, records }
    }

    /// Five records in order, one of unknown outcome that is there, one that is not, one that was refused.
    fn sound() -> History {
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
    fn a_sound_history_has_no_violation() {
        assert_eq!(sound().check(), []);
        assert_eq!(History::default().check(), []);
    }

    #[test]
    fn a_lost_record_is_found_in_the_middle_and_at_the_end() {
        let mut history = sound();
        history.passes[2] = pass(110, 3, &[6]);
        assert_eq!(
            history.check(),
            [Violation::Regressed { log: LOG, told: 5, then: 4 }, Violation::Lost { log: LOG, offset: 4, payload: 7 }]
        );
        let mut history = sound();
        history.passes = vec![pass(100, 0, &[1, 2, 6, 7])];
        let found = history.check();
        assert!(found.contains(&Violation::Misplaced { log: LOG, payload: 6, acknowledged: 3, read: 2 }), "{found:?}");
        let mut history = sound();
        history.passes = vec![pass(100, 0, &[])];
        assert_eq!(history.check().iter().filter(|one| matches!(one, Violation::Lost { .. })).count(), 4);
    }

    #[test]
    fn what_is_acknowledged_while_a_reader_reads_need_not_be_seen() {
        let mut history = sound();
        history.attempts.push(attempt(8, 99, 101, Outcome::Acknowledged { offset: 5 }));
        history.passes.pop();
        assert_eq!(history.check(), []);
        history.passes.push(pass(110, 3, &[6, 7]));
        assert_eq!(history.check(), [Violation::Lost { log: LOG, offset: 5, payload: 8 }]);
    }

    #[test]
    fn what_lies_below_where_a_reader_began_is_not_its_loss() {
        let mut history = sound();
        history.passes = vec![pass(100, 3, &[6, 7])];
        assert_eq!(history.check(), []);
    }

    #[test]
    fn a_reader_of_a_piece_answers_for_the_piece_and_for_what_lies_above_the_end() {
        let piece = |from, to, payloads: &[u64]| {
            let mut history = sound();
            history.passes = vec![pass(100, 0, &[1, 2, 3, 6, 7])];
            history.passes.push(Pass { end: 5, to, ..pass(110, from, payloads) });
            history
        };
        assert_eq!(piece(1, 4, &[2, 3, 6]).check(), []);
        let short = piece(1, 4, &[2, 3]).check();
        assert!(short.contains(&Violation::Skipped { log: LOG, after: 2, next: 4 }), "{short:?}");
        assert!(short.contains(&Violation::Lost { log: LOG, offset: 3, payload: 6 }), "{short:?}");
        let rewritten = piece(1, 3, &[2, 4]).check();
        assert!(
            rewritten.contains(&Violation::Rewritten { log: LOG, offset: 2, first: 3, second: 4 }),
            "{rewritten:?}"
        );
        // Acknowledged above the end that it was told: lost, wherever it stopped.
        let mut history = piece(1, 2, &[2]);
        history.attempts.push(attempt(8, 80, 85, Outcome::Acknowledged { offset: 5 }));
        assert!(history.check().contains(&Violation::Lost { log: LOG, offset: 5, payload: 8 }));
        let pieces = history.check().iter().filter(|one| matches!(one, Violation::Lost { .. })).count();
        assert_eq!(pieces, 2, "by the reader of everything and by that of the piece");
    }

    #[test]
    fn a_duplicate_is_found() {
        let mut history = sound();
        history.passes = vec![pass(100, 0, &[1, 2, 3, 6, 7, 3])];
        let found = history.check();
        assert!(found.contains(&Violation::Duplicated { log: LOG, payload: 3, first: 2, second: 5 }), "{found:?}");
    }

    #[test]
    fn what_may_be_there_twice_is_still_where_its_acknowledgement_said() {
        let mut history = sound();
        history.attempts[4] = Attempt { once: false, producer: 2, ..acknowledged(6, 3) };
        history.attempts.remove(5);
        history.passes = vec![pass(100, 0, &[1, 2, 3, 6, 7, 6])];
        assert_eq!(history.check(), []);
        history.attempts[4].outcome = Outcome::Acknowledged { offset: 4 };
        assert!(history.check().contains(&Violation::Misplaced { log: LOG, payload: 6, acknowledged: 4, read: 3 }));
    }

    #[test]
    fn an_invented_and_a_refused_record_are_found() {
        let mut history = sound();
        history.passes = vec![pass(100, 0, &[1, 2, 3, 6, 7, 99])];
        assert_eq!(history.check(), [Violation::Invented { log: LOG, offset: 5, payload: 99 }]);
        history.passes = vec![pass(100, 0, &[1, 2, 5, 6, 7])];
        assert!(history.check().contains(&Violation::Invented { log: LOG, offset: 2, payload: 5 }));
    }

    #[test]
    fn a_record_of_another_log_is_invented_here() {
        let mut history = sound();
        history.attempts[2].log = (0, 4);
        assert_eq!(history.check(), [Violation::Invented { log: LOG, offset: 2, payload: 3 }]);
    }

    #[test]
    fn one_producers_order_turned_round_is_found_though_nothing_was_acknowledged() {
        let attempts = vec![attempt(1, 1, 9, Outcome::Unknown), attempt(2, 2, 9, Outcome::Unknown)];
        let history = History { attempts, passes: vec![pass(10, 0, &[2, 1])] };
        assert_eq!(history.check(), [Violation::Reordered { log: LOG, earlier: 1, later: 2 }]);
    }

    #[test]
    fn two_producers_may_overlap_but_not_travel_in_time() {
        let other = |sent, answered| Attempt {
            producer: 2,
            sequence: 0,
            ..attempt(2, sent, answered, Outcome::Acknowledged { offset: 0 })
        };
        let first = attempt(1, 1, 5, Outcome::Acknowledged { offset: 1 });
        let overlapping = History { attempts: vec![first, other(3, 7)], passes: vec![pass(10, 0, &[2, 1])] };
        assert_eq!(overlapping.check(), []);
        let travelled = History { attempts: vec![first, other(6, 7)], passes: vec![pass(10, 0, &[2, 1])] };
        assert_eq!(travelled.check(), [Violation::Reordered { log: LOG, earlier: 1, later: 2 }]);
    }

    #[test]
    fn one_offset_acknowledged_twice_is_found() {
        let history = History { attempts: vec![acknowledged(1, 0), acknowledged(2, 0)], passes: vec![] };
        assert_eq!(history.check(), [Violation::Reordered { log: LOG, earlier: 1, later: 2 }]);
    }

    #[test]
    fn gaps_repeats_and_steps_back_of_a_reader_are_found() {
        let with = |records: Vec<(i64, u64)>, end| {
            let mut history = sound();
            history.passes = vec![Pass { log: LOG, began: 100, from: 0, end, to: end, current: true, records }];
            history.check()
        };
        let gap = with(vec![(0, 1), (1, 2), (3, 6), (4, 7)], 5);
        assert_eq!(gap, [Violation::Skipped { log: LOG, after: 1, next: 3 }]);
        let back = with(vec![(0, 1), (1, 2), (1, 2), (2, 3), (3, 6), (4, 7)], 5);
        assert_eq!(back, [Violation::Skipped { log: LOG, after: 1, next: 1 }]);
        let short = with(vec![(0, 1), (1, 2), (2, 3), (3, 6), (4, 7)], 6);
        assert_eq!(short, [Violation::Skipped { log: LOG, after: 4, next: 6 }]);
        let late = with(vec![(1, 2), (2, 3), (3, 6), (4, 7)], 5);
        assert!(late.contains(&Violation::Skipped { log: LOG, after: -1, next: 1 }), "{late:?}");
    }

    #[test]
    fn a_rewritten_offset_is_found() {
        let mut history = sound();
        history.passes[2] = Pass { records: vec![(3, 6), (4, 4)], ..pass(110, 3, &[6, 7]) };
        let found = history.check();
        assert!(found.contains(&Violation::Rewritten { log: LOG, offset: 4, first: 7, second: 4 }), "{found:?}");
    }

    #[test]
    fn an_end_that_goes_back_is_found() {
        let mut history = sound();
        history.attempts.truncate(4);
        history.passes = vec![pass(50, 0, &[1, 2, 3]), pass(60, 0, &[1, 2])];
        assert_eq!(history.check(), [Violation::Regressed { log: LOG, told: 3, then: 2 }]);
    }

    #[test]
    fn a_reader_that_may_be_told_an_older_end_answers_for_what_it_read() {
        let mut history = sound();
        history.passes.push(Pass { current: false, ..pass(120, 0, &[1, 2, 3]) });
        history.passes.push(pass(130, 0, &[1, 2, 3, 6, 7]));
        assert_eq!(history.check(), []);
        history.passes[3] = Pass { current: false, ..pass(120, 0, &[1, 3]) };
        assert!(history.check().contains(&Violation::Lost { log: LOG, offset: 1, payload: 2 }));
    }

    /// Any single change to what a reader of a sound history saw is a violation.
    #[test]
    fn no_single_change_to_a_full_reading_goes_unseen() {
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
