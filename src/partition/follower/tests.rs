//! A follower whose leader sends valid or invalid messages.

use proptest::prelude::*;

use super::*;
use crate::partition::leader::divergence::{BootstrapTables, SubscribeError};

const EPOCH: LeaderEpoch = LeaderEpoch(5);

fn at(offset: u64) -> Offset {
    Offset::new(offset).unwrap()
}

fn history(starts: &[(u32, u64)]) -> EpochHistory {
    let mut history = EpochHistory::new();
    for (epoch, start) in starts {
        assert!(history.record(LeaderEpoch(*epoch), at(*start)));
    }
    history
}

/// Returns a history with epoch 1 from offset 0 and epoch 3 from offset 4.
fn two_epochs() -> EpochHistory {
    history(&[(1, 0), (3, 4)])
}

fn header(base: u64, end: u64, epoch: u32) -> BatchHeader {
    BatchHeader { base: at(base), end: at(end), epoch: LeaderEpoch(epoch) }
}

/// Returns a follower in epoch 5 whose subscription at log end 6 was accepted. The leader sent the high watermark 4;
/// the follower's own was 2 before.
fn following() -> Follower {
    let mut follower = Follower::new(BrokerId(1), EPOCH, at(2), None);
    assert_eq!(
        follower.subscribe(&two_epochs(), at(6)),
        LogPosition { last_epoch: Some(LeaderEpoch(3)), log_end: at(6), removal_count: None }
    );
    assert_eq!(
        follower.on_response(EPOCH, &SubscribeOutcome::Accepted(at(6)), at(4), &two_epochs()),
        Ok(FollowerAction::Follow(at(6)))
    );
    follower
}

fn bootstrap(start: Offset) -> SubscribeOutcome {
    SubscribeOutcome::Bootstrap(Box::new(BootstrapTables { start, ..BootstrapTables::default() }))
}

fn diverged(epoch: u32, end: u64) -> SubscribeOutcome {
    SubscribeOutcome::Diverged { epoch: LeaderEpoch(epoch), end: at(end) }
}

#[test]
fn batches_that_continue_the_log_are_appended() {
    let mut follower = following();
    let headers = [header(6, 8, 3), header(8, 9, 5)];
    assert_eq!(follower.on_batches(EPOCH, &headers, at(9)), Ok(FollowerAction::Append));
    assert_eq!(follower.on_batches(EPOCH, &[], at(9)), Ok(FollowerAction::Ignore));
    assert_eq!(
        follower.on_batches(EPOCH, &[header(9, 10, 5)], at(9)),
        Ok(FollowerAction::Append),
        "the next batch arrived before the append"
    );
}

/// Each violation of the order of batches. After a violation, no batch is accepted before the next subscription.
#[test]
fn batches_that_do_not_continue_the_log_are_rejected() {
    for (headers, violation) in [
        (vec![header(7, 8, 5)], ProtocolViolation::Gap { expected: at(6), got: at(7) }),
        (vec![header(6, 7, 5), header(8, 9, 5)], ProtocolViolation::Gap { expected: at(7), got: at(8) }),
        (vec![header(5, 8, 5)], ProtocolViolation::Overlap { expected: at(6), got: at(5) }),
        (vec![header(6, 6, 5)], ProtocolViolation::Overlap { expected: at(6), got: at(6) }),
        (
            vec![header(6, 7, 2)],
            ProtocolViolation::EpochDecreased { at: at(6), last: LeaderEpoch(3), got: LeaderEpoch(2) },
        ),
        (
            vec![header(6, 7, 5), header(7, 8, 4)],
            ProtocolViolation::EpochDecreased { at: at(7), last: LeaderEpoch(5), got: LeaderEpoch(4) },
        ),
        (vec![header(6, 7, 6)], ProtocolViolation::EpochAboveLeader { at: at(6), got: LeaderEpoch(6), follows: EPOCH }),
    ] {
        let mut follower = following();
        assert_eq!(follower.on_batches(EPOCH, &headers, at(4)), Err(violation), "{headers:?}");
        assert_eq!(
            follower.on_batches(EPOCH, &[header(6, 7, 5)], at(4)),
            Err(ProtocolViolation::Unexpected),
            "{headers:?}"
        );
        follower.subscribe(&two_epochs(), at(6));
        assert_eq!(
            follower.on_response(EPOCH, &SubscribeOutcome::Accepted(at(6)), at(4), &two_epochs()),
            Ok(FollowerAction::Follow(at(6)))
        );
    }
}

#[test]
fn message_of_another_epoch_changes_nothing() {
    let mut follower = following();
    let before = follower.clone();
    let old = ProtocolViolation::OldEpoch { got: LeaderEpoch(4), follows: EPOCH };
    let new = ProtocolViolation::NewEpoch { got: LeaderEpoch(6), follows: EPOCH };
    for (epoch, violation) in [(4, old), (6, new)] {
        assert_eq!(follower.on_batches(LeaderEpoch(epoch), &[header(6, 7, 3)], at(6)), Err(violation));
        assert_eq!(follower.on_response(LeaderEpoch(epoch), &diverged(1, 4), at(6), &two_epochs()), Err(violation));
    }
    assert_eq!(follower, before);
}

#[test]
fn high_watermark_is_minimum_of_leaders_and_log_end() {
    let mut follower = following();
    assert_eq!(follower.high_watermark(), at(4));
    follower.on_batches(EPOCH, &[header(6, 9, 5)], at(8)).unwrap();
    assert_eq!(follower.high_watermark(), at(6), "the batch is not appended yet");
    follower.on_appended(at(9));
    assert_eq!(follower.high_watermark(), at(8));
    follower.on_batches(EPOCH, &[], at(5)).unwrap();
    assert_eq!(follower.high_watermark(), at(8), "the high watermark never falls");
    follower.on_disconnected();
    assert_eq!(follower.high_watermark(), at(8));
    // Until the leader accepts the subscription, records of this log may differ from those that the leader committed.
    let mut subscribing = Follower::new(BrokerId(1), EPOCH, at(2), None);
    subscribing.subscribe(&two_epochs(), at(6));
    subscribing.on_response(EPOCH, &diverged(1, 4), at(9), &two_epochs()).unwrap();
    assert_eq!(subscribing.high_watermark(), at(2));
}

#[test]
fn follower_truncates_where_the_epochs_diverge() {
    for (decision, to) in [
        (diverged(3, 5), 5),
        // The follower's own epoch 1 ends before the leader's.
        (diverged(1, 5), 4),
        (diverged(1, 3), 3),
        (diverged(2, 6), 4),
        // The follower has none of the leader's epochs: its whole log is removed.
        (diverged(0, 3), 0),
    ] {
        let mut follower = Follower::new(BrokerId(1), EPOCH, at(0), None);
        follower.subscribe(&two_epochs(), at(6));
        assert_eq!(
            follower.on_response(EPOCH, &decision, at(9), &two_epochs()),
            Ok(FollowerAction::Truncate(at(to))),
            "{decision:?}"
        );
        assert!(!follower.is_following());
    }
}

#[test]
fn wrong_response_leaves_the_log_unchanged() {
    for decision in
        [SubscribeOutcome::Accepted(at(5)), SubscribeOutcome::Accepted(at(7)), diverged(3, 6), diverged(9, 9)]
    {
        let mut follower = Follower::new(BrokerId(1), EPOCH, at(0), None);
        follower.subscribe(&two_epochs(), at(6));
        let result = follower.on_response(EPOCH, &decision, at(9), &two_epochs());
        assert!(matches!(result, Err(ProtocolViolation::InvalidResponse { .. })), "{decision:?}: {result:?}");
        assert_eq!(
            follower.on_response(EPOCH, &SubscribeOutcome::Accepted(at(6)), at(9), &two_epochs()),
            Err(ProtocolViolation::Unexpected)
        );
    }
}

/// The leader may lack committed records only after an unclean election that is newer than the log.
#[test]
fn committed_records_are_lost_only_by_unclean_election() {
    for (unclean, may_lose) in [(None, false), (Some(3), false), (Some(4), true), (Some(5), true)] {
        let high_watermark = at(5);
        let truncation = ProtocolViolation::TruncateBelowCommitted { to: at(3), high_watermark };
        let below_committed = ProtocolViolation::BootstrapBelowCommitted { at: at(1), high_watermark };
        for (decision, to, error) in [(diverged(1, 3), 3, truncation), (bootstrap(at(1)), 1, below_committed)] {
            let mut follower = Follower::new(BrokerId(1), EPOCH, at(5), unclean.map(LeaderEpoch));
            follower.subscribe(&two_epochs(), at(6));
            let result = follower.on_response(EPOCH, &decision, at(1), &two_epochs());
            assert_eq!(result.is_ok(), may_lose, "{unclean:?} {decision:?}: {result:?}");
            assert!(may_lose || result == Err(error));
            assert_eq!(follower.high_watermark(), at(if may_lose { to } else { 5 }));
        }
    }
}

/// Regression: if retention has deleted all records of the partition from the object store, a leader responds with its
/// local start. That offset lies below its log start until the segments there are removed. A replica that had just
/// bootstrapped at the tiered end then never followed again. It must keep its log, and accept a later response with a
/// higher offset.
#[test]
fn bootstrap_below_the_high_watermark_is_retried() {
    let mut follower = Follower::new(BrokerId(1), EPOCH, at(0), None);
    follower.subscribe(&EpochHistory::new(), at(0));
    assert_eq!(
        follower.on_response(EPOCH, &bootstrap(at(351)), at(400), &EpochHistory::new()),
        Ok(FollowerAction::Bootstrap(at(351)))
    );
    follower.on_reset(at(351));
    follower.subscribe(&two_epochs(), at(351));
    let early = follower.on_response(EPOCH, &bootstrap(at(315)), at(410), &two_epochs());
    assert_eq!(early, Err(ProtocolViolation::BootstrapBelowCommitted { at: at(315), high_watermark: at(351) }));
    follower.on_disconnected();
    follower.subscribe(&two_epochs(), at(351));
    let later = follower.on_response(EPOCH, &bootstrap(at(406)), at(410), &two_epochs());
    assert_eq!(later, Ok(FollowerAction::Bootstrap(at(406))));
}

/// The first truncation removes the last epoch of the log. The unclean election is then newer than the remaining log,
/// and must still not allow the removal of committed records.
#[test]
fn allowed_loss_is_decided_at_the_first_subscription() {
    let mut follower = Follower::new(BrokerId(1), LeaderEpoch(6), at(3), Some(LeaderEpoch(3)));
    follower.subscribe(&history(&[(1, 0), (4, 5)]), at(6));
    let first = follower.on_response(LeaderEpoch(6), &diverged(1, 5), at(0), &history(&[(1, 0), (4, 5)]));
    assert_eq!(first, Ok(FollowerAction::Truncate(at(5))));
    follower.subscribe(&history(&[(1, 0)]), at(5));
    let second = follower.on_response(LeaderEpoch(6), &diverged(1, 2), at(0), &history(&[(1, 0)]));
    assert_eq!(second, Err(ProtocolViolation::TruncateBelowCommitted { to: at(2), high_watermark: at(3) }));
}

#[test]
fn reset_replica_subscribes_again_at_its_start() {
    let mut follower = Follower::new(BrokerId(1), EPOCH, at(0), None);
    assert_eq!(
        follower.subscribe(&EpochHistory::new(), at(0)),
        LogPosition { last_epoch: None, log_end: at(0), removal_count: None }
    );
    let bootstraps = follower.on_response(EPOCH, &bootstrap(at(20)), at(25), &EpochHistory::new());
    assert_eq!(
        (bootstraps, follower.high_watermark()),
        (Ok(FollowerAction::Bootstrap(at(20))), at(0)),
        "records in the log may be of another leader"
    );
    follower.on_reset(at(20));
    assert_eq!(follower.high_watermark(), at(20));
    follower.subscribe(&history(&[(3, 12)]), at(20));
    let follows = follower.on_response(EPOCH, &SubscribeOutcome::Accepted(at(20)), at(25), &history(&[(3, 12)]));
    assert_eq!((follows, follower.is_following()), (Ok(FollowerAction::Follow(at(20))), true));
}

#[test]
fn rejected_subscription_is_retried() {
    let mut follower = Follower::new(BrokerId(1), EPOCH, at(0), None);
    follower.subscribe(&two_epochs(), at(6));
    let rejected = SubscribeOutcome::Rejected(SubscribeError::NoReplica);
    assert_eq!(follower.on_response(EPOCH, &rejected, at(0), &two_epochs()), Ok(FollowerAction::RetryLater));
    assert!(!follower.is_subscribing());
    follower.subscribe(&two_epochs(), at(6));
    assert_eq!(
        follower.on_batches(EPOCH, &[header(6, 7, 5)], at(6)),
        Err(ProtocolViolation::Unexpected),
        "the batch was sent before the link broke"
    );
    assert!(follower.is_subscribing(), "the response is still due");
}

fn decision() -> impl Strategy<Value = SubscribeOutcome> {
    let offset = || (0u64..12).prop_map(at);
    prop_oneof![
        offset().prop_map(SubscribeOutcome::Accepted),
        offset().prop_map(bootstrap),
        (0u32..7, offset()).prop_map(|(epoch, end)| SubscribeOutcome::Diverged { epoch: LeaderEpoch(epoch), end }),
        Just(SubscribeOutcome::Rejected(SubscribeError::NoReplica)),
    ]
}

proptest! {
    /// For any messages of a leader: nothing panics, and the log stays contiguous with epochs that do not decrease. No
    /// record below the follower's high watermark is removed: the value records no unclean election.
    #[test]
    fn no_leader_message_breaks_the_log(
        steps in prop::collection::vec((decision(), any::<bool>(), 4u32..7, prop::collection::vec((0u64..12, 0u64..4, 0u32..7), 0..3), 0u64..12), 1..40),
    ) {
        let mut log: Vec<u32> = vec![1, 1, 1, 1, 3, 3];
        let mut follower = Follower::new(BrokerId(1), EPOCH, at(2), None);
        for (decision, subscribes, epoch, batches, high_watermark) in steps {
            let mut history_of_log = EpochHistory::new();
            for (offset, epoch) in (0u64..).zip(&log) {
                prop_assert!(history_of_log.record(LeaderEpoch(*epoch), at(offset)), "{:?}", log);
            }
            let end = at(log.len().try_into().unwrap());
            let committed = follower.high_watermark();
            prop_assert!(committed <= end);
            if subscribes {
                follower.subscribe(&history_of_log, end);
            }
            let headers: Vec<_> = batches.iter().map(|(base, count, epoch)| header(*base, base + count, *epoch)).collect();
            let action = if subscribes || headers.is_empty() {
                follower.on_response(LeaderEpoch(epoch), &decision, at(high_watermark), &history_of_log)
            } else {
                follower.on_batches(LeaderEpoch(epoch), &headers, at(high_watermark))
            };
            match action {
                Ok(FollowerAction::Truncate(to)) => {
                    prop_assert!(committed <= to && to < end);
                    log.truncate(usize::try_from(to.get()).unwrap());
                }
                Ok(FollowerAction::Bootstrap(to)) => {
                    prop_assert!(committed <= to);
                    // The real log has no records below its new start. This one fills the offsets with records of epoch
                    // 1.
                    log = vec![1; usize::try_from(to.get()).unwrap()];
                    follower.on_reset(to);
                }
                Ok(FollowerAction::Append) => {
                    prop_assert_eq!(epoch, EPOCH.0);
                    for header in &headers {
                        prop_assert_eq!(usize::try_from(header.base.get()).unwrap(), log.len());
                        prop_assert!(header.epoch <= EPOCH && log.last().is_none_or(|last| *last <= header.epoch.0));
                        log.resize(usize::try_from(header.end.get()).unwrap(), header.epoch.0);
                    }
                    follower.on_appended(at(log.len().try_into().unwrap()));
                }
                Ok(_) | Err(_) => {}
            }
            prop_assert!(follower.high_watermark() >= committed);
        }
    }
}
