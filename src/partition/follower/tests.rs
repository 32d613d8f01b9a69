//! A follower under correct and wrong leaders.

use proptest::prelude::*;

use super::*;

const EPOCH: LeaderEpoch = LeaderEpoch(5);

fn at(offset: u64) -> Offset {
    Offset::new(offset).unwrap()
}

fn history(starts: &[(u32, u64)]) -> EpochHistory {
    let mut history = EpochHistory::new();
    for (epoch, start) in starts {
        assert!(history.note(LeaderEpoch(*epoch), at(*start)));
    }
    history
}

/// Returns epoch 1 from offset 0 and epoch 3 from offset 4.
fn two_epochs() -> EpochHistory {
    history(&[(1, 0), (3, 4)])
}

fn head(base: u64, end: u64, epoch: u32) -> Head {
    Head { base: at(base), end: at(end), epoch: LeaderEpoch(epoch) }
}

/// Returns a follower in epoch 5 from offset 6 on, which had the high watermark 2 before.
fn following() -> Follower {
    let mut follower = Follower::new(BrokerId(1), EPOCH, at(2), None);
    assert_eq!(follower.claim(&two_epochs(), at(6)), Claim { last: Some(LeaderEpoch(3)), end: at(6), added: None });
    assert_eq!(follower.answered(EPOCH, &Join::At(at(6)), at(4), &two_epochs()), Ok(Act::Follow(at(6))));
    follower
}

fn diverged(epoch: u32, end: u64) -> Join {
    Join::Diverged { epoch: LeaderEpoch(epoch), end: at(end) }
}

#[test]
fn batches_that_continue_the_log_are_appended() {
    let mut follower = following();
    let heads = [head(6, 8, 3), head(8, 9, 5)];
    assert_eq!(follower.received(EPOCH, &heads, at(9)), Ok(Act::Append));
    assert_eq!(follower.received(EPOCH, &[], at(9)), Ok(Act::Pass));
    assert_eq!(
        follower.received(EPOCH, &[head(9, 10, 5)], at(9)),
        Ok(Act::Append),
        "the next one came before the append"
    );
}

/// Every way not to continue the log, with its violation. After it, nothing is accepted before the next subscription.
#[test]
fn batches_that_do_not_continue_the_log_are_rejected() {
    for (heads, violation) in [
        (vec![head(7, 8, 5)], Violation::Gap { expected: at(6), got: at(7) }),
        (vec![head(6, 7, 5), head(8, 9, 5)], Violation::Gap { expected: at(7), got: at(8) }),
        (vec![head(5, 8, 5)], Violation::Overlap { expected: at(6), got: at(5) }),
        (vec![head(6, 6, 5)], Violation::Overlap { expected: at(6), got: at(6) }),
        (vec![head(6, 7, 2)], Violation::EpochFalls { at: at(6), last: LeaderEpoch(3), got: LeaderEpoch(2) }),
        (
            vec![head(6, 7, 5), head(7, 8, 4)],
            Violation::EpochFalls { at: at(7), last: LeaderEpoch(5), got: LeaderEpoch(4) },
        ),
        (vec![head(6, 7, 6)], Violation::AboveLink { at: at(6), got: LeaderEpoch(6), follows: EPOCH }),
    ] {
        let mut follower = following();
        assert_eq!(follower.received(EPOCH, &heads, at(4)), Err(violation), "{heads:?}");
        assert_eq!(follower.received(EPOCH, &[head(6, 7, 5)], at(4)), Err(Violation::NotAsked), "{heads:?}");
        follower.claim(&two_epochs(), at(6));
        assert_eq!(follower.answered(EPOCH, &Join::At(at(6)), at(4), &two_epochs()), Ok(Act::Follow(at(6))));
    }
}

#[test]
fn message_of_another_epoch_changes_nothing() {
    let mut follower = following();
    let before = follower.clone();
    let old = Violation::OldEpoch { got: LeaderEpoch(4), follows: EPOCH };
    let new = Violation::NewEpoch { got: LeaderEpoch(6), follows: EPOCH };
    for (epoch, violation) in [(4, old), (6, new)] {
        assert_eq!(follower.received(LeaderEpoch(epoch), &[head(6, 7, 3)], at(6)), Err(violation));
        assert_eq!(follower.answered(LeaderEpoch(epoch), &diverged(1, 4), at(6), &two_epochs()), Err(violation));
    }
    assert_eq!(follower, before);
}

#[test]
fn high_watermark_is_minimum_of_leaders_and_log_end() {
    let mut follower = following();
    assert_eq!(follower.high_watermark(), at(4));
    follower.received(EPOCH, &[head(6, 9, 5)], at(8)).unwrap();
    assert_eq!(follower.high_watermark(), at(6), "not appended yet");
    follower.appended(at(9));
    assert_eq!(follower.high_watermark(), at(8));
    follower.received(EPOCH, &[], at(5)).unwrap();
    assert_eq!(follower.high_watermark(), at(8), "it never falls");
    follower.interrupted();
    assert_eq!(follower.high_watermark(), at(8));
    // Before the logs are compared, records here may differ from those that the leader committed.
    let mut unsure = Follower::new(BrokerId(1), EPOCH, at(2), None);
    unsure.claim(&two_epochs(), at(6));
    unsure.answered(EPOCH, &diverged(1, 4), at(9), &two_epochs()).unwrap();
    assert_eq!(unsure.high_watermark(), at(2));
}

#[test]
fn follower_truncates_where_the_epochs_diverge() {
    for (answer, cut) in [
        (diverged(3, 5), 5),
        // The follower's own epoch 1 ends before the leader's.
        (diverged(1, 5), 4),
        (diverged(1, 3), 3),
        (diverged(2, 6), 4),
        // The follower has none of the leader's epochs: its whole log is removed.
        (diverged(0, 3), 0),
    ] {
        let mut follower = Follower::new(BrokerId(1), EPOCH, at(0), None);
        follower.claim(&two_epochs(), at(6));
        assert_eq!(follower.answered(EPOCH, &answer, at(9), &two_epochs()), Ok(Act::Cut(at(cut))), "{answer:?}");
        assert!(!follower.is_following());
    }
}

#[test]
fn wrong_response_leaves_the_log_unchanged() {
    for answer in [Join::At(at(5)), Join::At(at(7)), diverged(3, 6), diverged(9, 9)] {
        let mut follower = Follower::new(BrokerId(1), EPOCH, at(0), None);
        follower.claim(&two_epochs(), at(6));
        let refused = follower.answered(EPOCH, &answer, at(9), &two_epochs());
        assert!(matches!(refused, Err(Violation::WrongAnswer { .. })), "{answer:?}: {refused:?}");
        assert_eq!(follower.answered(EPOCH, &Join::At(at(6)), at(9), &two_epochs()), Err(Violation::NotAsked));
    }
}

/// Committed records stay, unless an unclean election after the last of them explains why the leader lacks them.
#[test]
fn committed_records_are_lost_only_by_unclean_election() {
    for (unclean, may) in [(None, false), (Some(3), false), (Some(4), true), (Some(5), true)] {
        let high_watermark = at(5);
        let cut = Violation::CutBelowCommitted { to: at(3), high_watermark };
        let begun = Violation::BeginBelowCommitted { at: at(1), high_watermark };
        for (answer, to, refused) in [(diverged(1, 3), 3, cut), (Join::BeginAt(at(1)), 1, begun)] {
            let mut follower = Follower::new(BrokerId(1), EPOCH, at(5), unclean.map(LeaderEpoch));
            follower.claim(&two_epochs(), at(6));
            let answered = follower.answered(EPOCH, &answer, at(1), &two_epochs());
            assert_eq!(answered.is_ok(), may, "{unclean:?} {answer:?}: {answered:?}");
            assert!(may || answered == Err(refused));
            assert_eq!(follower.high_watermark(), at(if may { to } else { 5 }));
        }
    }
}

/// Regression: if retention has deleted all records of the object store, a leader responds with its local start. That lies below its log
/// start until the segments there are removed. A replica that had just bootstrapped at the tiered end then stopped following for ever.
#[test]
fn bootstrap_below_the_high_watermark_is_retried() {
    let mut follower = Follower::new(BrokerId(1), EPOCH, at(0), None);
    follower.claim(&EpochHistory::new(), at(0));
    assert_eq!(
        follower.answered(EPOCH, &Join::BeginAt(at(351)), at(400), &EpochHistory::new()),
        Ok(Act::Begin(at(351)))
    );
    follower.begun(at(351));
    follower.claim(&two_epochs(), at(351));
    let early = follower.answered(EPOCH, &Join::BeginAt(at(315)), at(410), &two_epochs());
    assert_eq!(early, Err(Violation::BeginBelowCommitted { at: at(315), high_watermark: at(351) }));
    follower.interrupted();
    follower.claim(&two_epochs(), at(351));
    let later = follower.answered(EPOCH, &Join::BeginAt(at(406)), at(410), &two_epochs());
    assert_eq!(later, Ok(Act::Begin(at(406))));
}

/// After the first truncation the log looks older than it was; that alone makes no record less committed.
#[test]
fn allowed_loss_is_decided_at_the_first_subscription() {
    let mut follower = Follower::new(BrokerId(1), LeaderEpoch(6), at(3), Some(LeaderEpoch(3)));
    follower.claim(&history(&[(1, 0), (4, 5)]), at(6));
    let first = follower.answered(LeaderEpoch(6), &diverged(1, 5), at(0), &history(&[(1, 0), (4, 5)]));
    assert_eq!(first, Ok(Act::Cut(at(5))));
    follower.claim(&history(&[(1, 0)]), at(5));
    let second = follower.answered(LeaderEpoch(6), &diverged(1, 2), at(0), &history(&[(1, 0)]));
    assert_eq!(second, Err(Violation::CutBelowCommitted { to: at(2), high_watermark: at(3) }));
}

#[test]
fn reset_replica_subscribes_again_at_its_start() {
    let mut follower = Follower::new(BrokerId(1), EPOCH, at(0), None);
    assert_eq!(follower.claim(&EpochHistory::new(), at(0)), Claim { last: None, end: at(0), added: None });
    let begins = follower.answered(EPOCH, &Join::BeginAt(at(20)), at(25), &EpochHistory::new());
    assert_eq!(
        (begins, follower.high_watermark()),
        (Ok(Act::Begin(at(20))), at(0)),
        "what it still has may be another's"
    );
    follower.begun(at(20));
    assert_eq!(follower.high_watermark(), at(20));
    follower.claim(&history(&[(3, 12)]), at(20));
    let follows = follower.answered(EPOCH, &Join::At(at(20)), at(25), &history(&[(3, 12)]));
    assert_eq!((follows, follower.is_following()), (Ok(Act::Follow(at(20))), true));
}

#[test]
fn rejected_subscription_is_retried() {
    let mut follower = Follower::new(BrokerId(1), EPOCH, at(0), None);
    follower.claim(&two_epochs(), at(6));
    let refused = Join::Refused(JoinRefused::NoReplica);
    assert_eq!(follower.answered(EPOCH, &refused, at(0), &two_epochs()), Ok(Act::Wait(JoinRefused::NoReplica)));
    assert!(!follower.is_claiming());
    follower.claim(&two_epochs(), at(6));
    assert_eq!(
        follower.received(EPOCH, &[head(6, 7, 5)], at(6)),
        Err(Violation::NotAsked),
        "sent before the link broke"
    );
    assert!(follower.is_claiming(), "the answer is still due");
}

fn answer() -> impl Strategy<Value = Join> {
    let offset = || (0u64..12).prop_map(at);
    prop_oneof![
        offset().prop_map(Join::At),
        offset().prop_map(Join::BeginAt),
        (0u32..7, offset()).prop_map(|(epoch, end)| Join::Diverged { epoch: LeaderEpoch(epoch), end }),
        Just(Join::Refused(JoinRefused::NoReplica)),
    ]
}

proptest! {
    /// For any messages of a leader: nothing panics, and the log stays contiguous with epochs that do not decrease. No record that is
    /// known as committed is removed without an unclean election.
    #[test]
    fn no_leader_message_breaks_the_log(
        steps in prop::collection::vec((answer(), any::<bool>(), 4u32..7, prop::collection::vec((0u64..12, 0u64..4, 0u32..7), 0..3), 0u64..12), 1..40),
    ) {
        let mut log: Vec<u32> = vec![1, 1, 1, 1, 3, 3];
        let mut follower = Follower::new(BrokerId(1), EPOCH, at(2), None);
        for (answer, asks, epoch, batches, told) in steps {
            let mut known = EpochHistory::new();
            for (offset, epoch) in (0u64..).zip(&log) {
                prop_assert!(known.note(LeaderEpoch(*epoch), at(offset)), "{:?}", log);
            }
            let end = at(log.len().try_into().unwrap());
            let committed = follower.high_watermark();
            prop_assert!(committed <= end);
            if asks {
                follower.claim(&known, end);
            }
            let heads: Vec<_> = batches.iter().map(|(base, count, epoch)| head(*base, base + count, *epoch)).collect();
            let act = if asks || heads.is_empty() {
                follower.answered(LeaderEpoch(epoch), &answer, at(told), &known)
            } else {
                follower.received(LeaderEpoch(epoch), &heads, at(told))
            };
            match act {
                Ok(Act::Cut(to)) => {
                    prop_assert!(committed <= to && to < end);
                    log.truncate(usize::try_from(to.get()).unwrap());
                }
                Ok(Act::Begin(to)) => {
                    prop_assert!(committed <= to);
                    // The records before are elsewhere, and of some epoch.
                    log = vec![1; usize::try_from(to.get()).unwrap()];
                    follower.begun(to);
                }
                Ok(Act::Append) => {
                    prop_assert_eq!(epoch, EPOCH.0);
                    for head in &heads {
                        prop_assert_eq!(usize::try_from(head.base.get()).unwrap(), log.len());
                        prop_assert!(head.epoch <= EPOCH && log.last().is_none_or(|last| *last <= head.epoch.0));
                        log.resize(usize::try_from(head.end.get()).unwrap(), head.epoch.0);
                    }
                    follower.appended(at(log.len().try_into().unwrap()));
                }
                Ok(_) | Err(_) => {}
            }
            prop_assert!(follower.high_watermark() >= committed);
        }
    }
}
