//! Outcomes of subscriptions: for listed logs, and for any two logs.

use proptest::prelude::*;

use super::*;
use crate::{
    model::BrokerId,
    partition::follower::{Follower, FollowerAction},
};

fn at(offset: usize) -> Offset {
    Offset::new(offset.try_into().unwrap()).unwrap()
}

/// Returns the history of a log with one record of each of these epochs.
fn history(log: &[u32]) -> EpochHistory {
    let mut history = EpochHistory::new();
    for (offset, epoch) in log.iter().enumerate() {
        assert!(history.record(LeaderEpoch(*epoch), at(offset)));
    }
    history
}

/// Returns the leader's outcome for a follower whose log ends at `end` with a batch of epoch `last`. `last` is `None`
/// for a log without a batch.
fn resolve(leader: &[u32], local: LocalLogBounds, last: Option<u32>, end: usize) -> SubscribeOutcome {
    resolve_divergence(
        LogPosition { last_epoch: last.map(LeaderEpoch), log_end: at(end), removal_count: None },
        &history(leader),
        at(leader.len()),
        local,
    )
}

fn bootstrap(start: usize, from_object_store: bool) -> SubscribeOutcome {
    let tables = BootstrapTables { start: at(start), from_object_store, ..BootstrapTables::default() };
    SubscribeOutcome::Bootstrap(Box::new(tables))
}

const COMPLETE: LocalLogBounds = LocalLogBounds { local_start: Offset::ZERO, tiered_end: None };

#[test]
fn follower_continues_if_its_log_is_a_prefix() {
    let leader = [1, 1, 1, 3, 3, 5, 5, 5];
    let diverged = |epoch, end| SubscribeOutcome::Diverged { epoch: LeaderEpoch(epoch), end: at(end) };
    for (last, end, expected) in [
        (Some(1), 2, SubscribeOutcome::Accepted(at(2))),
        (Some(5), 8, SubscribeOutcome::Accepted(at(8))),
        (Some(1), 4, diverged(1, 3)),
        (Some(2), 5, diverged(1, 3)),
        (Some(4), 7, diverged(3, 5)),
        (Some(5), 9, diverged(5, 8)),
        (None, 0, SubscribeOutcome::Accepted(at(0))),
        (None, 4, bootstrap(0, false)),
    ] {
        assert_eq!(resolve(&leader, COMPLETE, last, end), expected, "{last:?} {end}");
    }
    assert_eq!(resolve(&[3, 3], COMPLETE, Some(2), 1), bootstrap(0, false), "the leader has no epoch that old");
    assert_eq!(resolve(&[], COMPLETE, None, 0), SubscribeOutcome::Accepted(at(0)));
}

#[test]
fn log_below_local_start_bootstraps_at_tiered_end() {
    let leader = [1, 1, 1, 3, 3, 5, 5, 5];
    let tiered = LocalLogBounds { local_start: at(4), tiered_end: Some(at(6)) };
    for (last, end, expected) in [
        (Some(1), 2, bootstrap(6, true)),
        (Some(2), 6, bootstrap(6, true)),
        (Some(3), 5, SubscribeOutcome::Accepted(at(5))),
        (None, 0, bootstrap(6, true)),
        (None, 6, SubscribeOutcome::Accepted(at(6))),
    ] {
        assert_eq!(resolve(&leader, tiered, last, end), expected, "{last:?} {end}");
    }
    // Deletion overtook the uploads: records above the tiered end are deleted.
    let overtaken = LocalLogBounds { local_start: at(7), tiered_end: Some(at(6)) };
    assert_eq!(resolve(&leader, overtaken, None, 0), bootstrap(7, false));
}

/// Returns two logs as replication makes them: leaders of growing epochs append, one after the other.
fn logs() -> impl Strategy<Value = (Vec<u32>, Vec<u32>)> {
    let common = prop::collection::vec(1u32..4, 0..6);
    let tail = || prop::collection::vec(any::<bool>(), 0..6);
    (common, tail(), tail()).prop_map(|(mut common, first_tail, second_tail)| {
        common.sort_unstable();
        // An epoch has one leader: after the common part the logs share no epoch.
        let grow = |is_later_epoch: &[bool], epochs: [u32; 2]| {
            let mut tail: Vec<u32> = is_later_epoch.iter().map(|is_later| epochs[usize::from(*is_later)]).collect();
            tail.sort_unstable();
            common.iter().copied().chain(tail).collect()
        };
        (grow(&first_tail, [4, 7]), grow(&second_tail, [5, 6]))
    })
}

proptest! {
    /// After at most eight exchanges the follower's log is a prefix of the leader's, and no common record was
    /// truncated.
    #[test]
    fn any_two_logs_agree_after_truncations((leader, mut follower) in logs()) {
        let common = leader.iter().zip(&follower).take_while(|(a, b)| a == b).count();
        let mut state = Follower::new(BrokerId(1), LeaderEpoch(9), at(common), None);
        for _round in 0..8 {
            let position = state.subscribe(&history(&follower), at(follower.len()));
            let decision = resolve_divergence(position, &history(&leader), at(leader.len()), COMPLETE);
            match state.on_response(LeaderEpoch(9), &decision, at(common), &history(&follower)) {
                Ok(FollowerAction::Follow(end)) => {
                    prop_assert_eq!(end, at(common));
                    prop_assert!(leader.starts_with(&follower));
                    return Ok(());
                }
                Ok(FollowerAction::Truncate(to) | FollowerAction::Bootstrap(to)) => {
                    prop_assert!(to >= at(common) && to < at(follower.len()), "truncated at {}", to);
                    follower.truncate(usize::try_from(to.get()).unwrap());
                }
                unexpected => prop_assert!(false, "{:?}", unexpected),
            }
        }
        prop_assert!(false, "the logs do not agree after 8 exchanges");
    }
}
