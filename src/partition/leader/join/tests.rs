//! Starts of followers: by table, and for any two logs.

use proptest::prelude::*;

use super::*;
use crate::{
    model::BrokerId,
    partition::follower::{Act, Follower},
};

fn at(offset: usize) -> Offset {
    Offset::new(offset.try_into().unwrap()).unwrap()
}

fn history(log: &[u32]) -> EpochHistory {
    let mut history = EpochHistory::new();
    for (offset, epoch) in log.iter().enumerate() {
        assert!(history.note(LeaderEpoch(*epoch), at(offset)));
    }
    history
}

fn answer(leader: &[u32], local: Local, last: Option<u32>, end: usize) -> Join {
    place(Claim { last: last.map(LeaderEpoch), end: at(end), added: None }, &history(leader), at(leader.len()), local)
}

const WHOLE: Local = Local { local_start: Offset::ZERO, tiered_end: None };

#[test]
fn follower_continues_if_its_log_is_a_prefix() {
    let leader = [1, 1, 1, 3, 3, 5, 5, 5];
    let diverged = |epoch, end| Join::Diverged { epoch: LeaderEpoch(epoch), end: at(end) };
    for (last, end, then) in [
        (Some(1), 2, Join::At(at(2))),
        (Some(5), 8, Join::At(at(8))),
        (Some(1), 4, diverged(1, 3)),
        (Some(2), 5, diverged(1, 3)),
        (Some(4), 7, diverged(3, 5)),
        (Some(5), 9, diverged(5, 8)),
        (None, 0, Join::At(at(0))),
        (None, 4, Join::BeginAt(at(0))),
    ] {
        assert_eq!(answer(&leader, WHOLE, last, end), then, "{last:?} {end}");
    }
    assert_eq!(answer(&[3, 3], WHOLE, Some(2), 1), Join::BeginAt(at(0)), "nothing here is that old");
    assert_eq!(answer(&[], WHOLE, None, 0), Join::At(at(0)));
}

#[test]
fn log_below_local_start_bootstraps_at_tiered_end() {
    let leader = [1, 1, 1, 3, 3, 5, 5, 5];
    let tiered = Local { local_start: at(4), tiered_end: Some(at(6)) };
    for (last, end, then) in [
        (Some(1), 2, Join::BeginAt(at(6))),
        (Some(2), 6, Join::BeginAt(at(6))),
        (Some(3), 5, Join::At(at(5))),
        (None, 0, Join::BeginAt(at(6))),
        (None, 6, Join::At(at(6))),
    ] {
        assert_eq!(answer(&leader, tiered, last, end), then, "{last:?} {end}");
    }
    // Deletion overtook the uploads.
    let overtaken = Local { local_start: at(7), tiered_end: Some(at(6)) };
    assert_eq!(answer(&leader, overtaken, None, 0), Join::BeginAt(at(7)));
}

/// Returns two logs as replication makes them: leaders of growing epochs append, one after the other.
fn logs() -> impl Strategy<Value = (Vec<u32>, Vec<u32>)> {
    let common = prop::collection::vec(1u32..4, 0..6);
    let tail = || prop::collection::vec(any::<bool>(), 0..6);
    (common, tail(), tail()).prop_map(|(mut common, mine, theirs)| {
        common.sort_unstable();
        // An epoch has one leader: after the common part the logs share no epoch.
        let grow = |kinds: &[bool], epochs: [u32; 2]| {
            let mut tail: Vec<u32> = kinds.iter().map(|late| epochs[usize::from(*late)]).collect();
            tail.sort_unstable();
            common.iter().copied().chain(tail).collect()
        };
        (grow(&mine, [4, 7]), grow(&theirs, [5, 6]))
    })
}

proptest! {
    /// After a few exchanges the follower's log is a prefix of the leader's, and no common record was truncated.
    #[test]
    fn any_two_logs_agree_after_truncations((leader, mut follower) in logs()) {
        let common = leader.iter().zip(&follower).take_while(|(a, b)| a == b).count();
        let mut state = Follower::new(BrokerId(1), LeaderEpoch(9), at(common), None);
        for _round in 0..8 {
            let claim = state.claim(&history(&follower), at(follower.len()));
            let answer = place(claim, &history(&leader), at(leader.len()), WHOLE);
            match state.answered(LeaderEpoch(9), &answer, at(common), &history(&follower)) {
                Ok(Act::Follow(end)) => {
                    prop_assert_eq!(end, at(common));
                    prop_assert!(leader.starts_with(&follower));
                    return Ok(());
                }
                Ok(Act::Cut(to) | Act::Begin(to)) => {
                    prop_assert!(to >= at(common) && to < at(follower.len()), "cut at {}", to);
                    follower.truncate(usize::try_from(to.get()).unwrap());
                }
                other => prop_assert!(false, "{:?}", other),
            }
        }
        prop_assert!(false, "they never meet");
    }
}
