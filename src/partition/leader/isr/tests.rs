//! In-sync replicas, and the commits that follow from them: single cases, lists of cases, and a property test.

use proptest::prelude::*;

use super::*;

const EPOCH: LeaderEpoch = LeaderEpoch(4);

fn at(offset: u64) -> Offset {
    Offset::new(offset).unwrap()
}

/// Returns the progress of a log whose records below `end` are all durable.
fn synced_to(end: u64) -> ReplicaProgress {
    ReplicaProgress { log_end: at(end), persisted_end: at(end) }
}

/// Returns a broker with broker epoch 10.
fn peer(broker: u32) -> PeerId {
    PeerId { broker: BrokerId(broker), epoch: Revision(10) }
}

fn brokers(ids: &[u32]) -> Vec<BrokerId> {
    ids.iter().copied().map(BrokerId).collect()
}

/// Returns a value of epoch 4 with the replicas 1 to 3, led by broker 1.
fn value(isr: &[u32], elr: &[u32]) -> PartitionValue {
    PartitionValue { isr: brokers(isr), elr: brokers(elr), ..PartitionValue::new(brokers(&[1, 2, 3]), EPOCH) }
}

fn rules_with(min_insync: usize) -> IsrRules {
    IsrRules { durability: Durability::Persisted, min_insync, lag_ms: 100 }
}

/// Returns broker 1 as leader of epoch 4, which starts at offset 5. The records below offset 3 were committed before
/// the epoch. Brokers 2 and 3 are registered.
fn leader(isr: &[u32], elr: &[u32], min: usize) -> IsrTracker {
    let start = LeaderStart {
        me: BrokerId(1),
        value: value(isr, elr),
        revision: Revision(20),
        progress: synced_to(5),
        committed_end: at(3),
        rules: rules_with(min),
    };
    let mut leader = IsrTracker::new(start);
    for broker in [2, 3] {
        leader.on_broker_status(BrokerId(broker), BrokerStatus::Registered(Revision(10)));
    }
    leader
}

/// Returns the history of a log with records of epoch 3 only.
fn history() -> EpochHistory {
    let mut history = EpochHistory::new();
    assert!(history.record(LeaderEpoch(3), at(0)));
    history
}

/// Subscribes a replica whose log has records of epoch 3 up to `end`.
fn subscribe(leader: &mut IsrTracker, peer: PeerId, end: u64) -> SubscribeOutcome {
    let local = LocalLogBounds { local_start: at(0), tiered_end: None };
    leader.on_subscribe(
        peer,
        EPOCH,
        LogPosition { last_epoch: Some(LeaderEpoch(3)), log_end: at(end), removal_count: None },
        local,
        &history(),
    )
}

/// Subscribes a replica that reports this removal count for its addition; `None` if it is not being added.
fn subscribe_added(leader: &mut IsrTracker, broker: u32, end: u64, added: Option<u64>) -> SubscribeOutcome {
    let local = LocalLogBounds { local_start: at(0), tiered_end: None };
    let position =
        LogPosition { last_epoch: (end > 0).then_some(LeaderEpoch(3)), log_end: at(end), removal_count: added };
    leader.on_subscribe(peer(broker), EPOCH, position, local, &history())
}

/// Subscribes a replica, and acknowledges the records below `end`.
fn start_following(leader: &mut IsrTracker, broker: u32, end: u64) {
    assert_eq!(subscribe(leader, peer(broker), end.min(5)), SubscribeOutcome::Accepted(at(end.min(5))));
    leader.on_acknowledged(peer(broker), EPOCH, synced_to(end)).unwrap();
}

/// Returns the ISR and the ELR of a proposal.
fn proposed_isr_elr(proposal: Option<IsrProposal>) -> Option<(Vec<u32>, Vec<u32>)> {
    let ids = |set: &[BrokerId]| set.iter().map(|id| id.0).collect();
    proposal.map(|proposal| (ids(&proposal.value.isr), ids(&proposal.value.elr)))
}

#[test]
fn high_watermark_is_the_minimum_end_of_the_isr() {
    let mut leader = leader(&[1, 2, 3], &[], 2);
    assert_eq!((leader.high_watermark(), leader.latest()), (at(3), None), "no follower has acknowledged");
    start_following(&mut leader, 2, 5);
    assert_eq!(leader.high_watermark(), at(3), "broker 3 is in sync too");
    start_following(&mut leader, 3, 4);
    assert_eq!((leader.high_watermark(), leader.is_epoch_committed()), (at(4), false));
    leader.on_acknowledged(peer(3), EPOCH, synced_to(5)).unwrap();
    assert_eq!(leader.latest(), Some(at(5)));
    leader.update_local(synced_to(9));
    assert_eq!(leader.high_watermark(), at(5));
}

#[test]
fn durability_selects_the_acknowledged_end() {
    let mut leader = leader(&[1, 2], &[], 2);
    start_following(&mut leader, 2, 5);
    leader.update_local(ReplicaProgress { log_end: at(8), persisted_end: at(6) });
    leader.on_acknowledged(peer(2), EPOCH, ReplicaProgress { log_end: at(8), persisted_end: at(7) }).unwrap();
    assert_eq!(leader.high_watermark(), at(6));
    leader.configure(IsrRules { durability: Durability::Replicated, ..rules_with(2) });
    assert_eq!(leader.high_watermark(), at(8));
    leader.configure(rules_with(2));
    assert_eq!(leader.high_watermark(), at(8), "committed records stay committed");
}

/// A removed replica deletes its log. If the replica is added again in the same epoch, it has no records, and its
/// earlier acknowledgements must not count.
#[test]
fn readded_replica_is_admitted_by_new_acknowledgements() {
    let without = PartitionValue { replicas: brokers(&[1, 3]), removal_count: 1, ..value(&[1, 3], &[]) };
    let added = PartitionValue { adding: brokers(&[2]), removal_count: 1, ..value(&[1, 3], &[]) };
    // The leader may not receive the value without the replica: after a broken watch, a list contains only the current
    // value.
    for values in [vec![(without, Revision(21)), (added.clone(), Revision(22))], vec![(added, Revision(22))]] {
        let mut leader = leader(&[1, 2, 3], &[], 1);
        start_following(&mut leader, 2, 5);
        start_following(&mut leader, 3, 5);
        for (value, revision) in &values {
            assert_eq!(leader.on_value(value, *revision), ValueUpdate::Adopted);
        }
        assert_eq!(proposed_isr_elr(leader.start_proposal()), None, "the removed replica has no records");
        assert!(
            leader.on_acknowledged(peer(2), EPOCH, synced_to(5)).is_err(),
            "the acknowledgement is of the earlier addition"
        );
        let refused = SubscribeError::OtherAddition { reported: None, known: Some(1) };
        assert_eq!(
            subscribe(&mut leader, peer(2), 5),
            SubscribeOutcome::Rejected(refused),
            "the request was sent before the removal"
        );
        assert_eq!(subscribe_added(&mut leader, 2, 0, Some(1)), SubscribeOutcome::Accepted(at(0)));
        leader.on_acknowledged(peer(2), EPOCH, synced_to(4)).unwrap();
        assert_eq!(proposed_isr_elr(leader.start_proposal()), None, "the replica lacks committed records");
        leader.on_acknowledged(peer(2), EPOCH, synced_to(5)).unwrap();
        assert_eq!(proposed_isr_elr(leader.start_proposal()), Some((vec![1, 3, 2], vec![])));
    }
}

/// Regression: a reassignment was cancelled and started again, and this leader received neither change. The values
/// before and after differ only in the removal count. The leader counted the acknowledgements of the earlier replica,
/// and proposed a replica without records.
#[test]
fn repeated_addition_resets_acknowledgements() {
    let moving = PartitionValue { adding: brokers(&[2]), ..value(&[1, 3], &[]) };
    let again = moving.cancel_reassignment().unwrap().start_reassignment(&brokers(&[1, 2, 3])).unwrap();
    assert_eq!((again.removal_count, &again.replicas), (1, &moving.replicas));
    let mut leader = leader(&[1, 3], &[], 1);
    leader.on_value(&moving, Revision(21));
    start_following(&mut leader, 3, 5);
    assert_eq!(subscribe_added(&mut leader, 2, 5, Some(0)), SubscribeOutcome::Accepted(at(5)));
    let refused = SubscribeError::OtherAddition { reported: Some(1), known: Some(0) };
    assert_eq!(
        subscribe_added(&mut leader, 2, 0, Some(1)),
        SubscribeOutcome::Rejected(refused),
        "the leader has not received the addition"
    );
    leader.on_acknowledged(peer(2), EPOCH, synced_to(4)).unwrap();
    assert_eq!(leader.on_value(&again, Revision(24)), ValueUpdate::Adopted);
    assert!(
        leader.on_acknowledged(peer(2), EPOCH, synced_to(5)).is_err(),
        "the acknowledgement is of the earlier subscription"
    );
    assert_eq!(proposed_isr_elr(leader.start_proposal()), None);
    let refused = SubscribeError::OtherAddition { reported: Some(0), known: Some(1) };
    assert_eq!(
        subscribe_added(&mut leader, 2, 5, Some(0)),
        SubscribeOutcome::Rejected(refused),
        "the request was sent before the removal"
    );
    assert_eq!(proposed_isr_elr(leader.start_proposal()), None);
    assert_eq!(subscribe_added(&mut leader, 2, 0, Some(1)), SubscribeOutcome::Accepted(at(0)));
    leader.on_acknowledged(peer(2), EPOCH, synced_to(5)).unwrap();
    assert_eq!(proposed_isr_elr(leader.start_proposal()), Some((vec![1, 3, 2], vec![])));
}

/// The end of a reassignment blocks no ISR member: the member may receive it before its leader, or after.
#[test]
fn isr_member_subscribes_around_end_of_reassignment() {
    let moving = PartitionValue { adding: brokers(&[2]), removing: brokers(&[3]), ..value(&[1, 2, 3], &[]) };
    let ended = moving.complete_reassignment().unwrap();
    for (known, reported) in [(&moving, None), (&moving, Some(0)), (&ended, None), (&ended, Some(0))] {
        let mut leader = leader(&[1, 2, 3], &[], 1);
        leader.on_value(known, Revision(21));
        assert_eq!(subscribe_added(&mut leader, 2, 5, reported), SubscribeOutcome::Accepted(at(5)), "{reported:?}");
    }
    // After the end of the reassignment, the replica was removed and added again. This leader has received only the
    // end.
    let mut leader = leader(&[1, 2, 3], &[], 1);
    leader.on_value(&ended, Revision(21));
    let refused = SubscribeError::OtherAddition { reported: Some(2), known: None };
    assert_eq!(subscribe_added(&mut leader, 2, 0, Some(2)), SubscribeOutcome::Rejected(refused));
}

#[test]
fn acknowledgement_counts_for_its_epoch_and_link_only() {
    let mut leader = leader(&[1, 2], &[], 1);
    let not_subscribed = AckError::NotSubscribed { broker: BrokerId(2), epoch: Revision(10) };
    assert_eq!(leader.on_acknowledged(peer(2), EPOCH, synced_to(5)), Err(not_subscribed));
    subscribe(&mut leader, peer(2), 5);
    for (from, epoch, progress) in [
        (peer(2), LeaderEpoch(3), synced_to(5)),
        (peer(2), LeaderEpoch(5), synced_to(5)),
        (PeerId { epoch: Revision(9), ..peer(2) }, EPOCH, synced_to(5)),
        (PeerId { epoch: Revision(11), ..peer(2) }, EPOCH, synced_to(5)),
        (peer(3), EPOCH, synced_to(5)),
        (peer(1), EPOCH, synced_to(5)),
        (peer(2), EPOCH, synced_to(6)),
        (peer(2), EPOCH, ReplicaProgress { log_end: at(4), persisted_end: at(5) }),
    ] {
        let before = leader.clone();
        assert!(leader.on_acknowledged(from, epoch, progress).is_err(), "{from:?} {epoch} {progress:?}");
        assert_eq!(leader, before, "a rejected acknowledgement changes nothing");
    }
    // A newer broker epoch is known: messages on the old link may be of a process that has exited.
    leader.on_broker_status(BrokerId(2), BrokerStatus::Registered(Revision(12)));
    assert_eq!(leader.on_acknowledged(peer(2), EPOCH, synced_to(5)), Err(not_subscribed));
    assert_eq!(subscribe(&mut leader, peer(2), 5), SubscribeOutcome::Rejected(SubscribeError::OlderBroker));
}

#[test]
fn proposed_member_holds_the_high_watermark_back() {
    let mut leader = leader(&[1], &[], 1);
    start_following(&mut leader, 2, 5);
    let proposal = leader.start_proposal().unwrap();
    assert_eq!((proposal.expect, &proposal.added), (Revision(20), &vec![peer(2)]));
    leader.update_local(synced_to(9));
    assert_eq!(leader.high_watermark(), at(5), "the proposed member may be in the ISR already");
    assert_eq!(leader.start_proposal(), None, "one proposal is pending at a time");

    // The outcome is unknown, and the old value is still stored: the proposal may be committed.
    assert_eq!(leader.on_outcome(ProposalOutcome::Unknown), ValueUpdate::Unchanged);
    assert!(leader.needs_read_back() && leader.start_proposal().is_none());
    assert_eq!(
        leader.on_outcome(ProposalOutcome::CurrentValue(value(&[1], &[]), Revision(20))),
        ValueUpdate::Unchanged
    );
    leader.update_local(synced_to(10));
    assert_eq!(leader.high_watermark(), at(5));

    // Another value was written: the proposal can no longer be committed.
    assert_eq!(leader.on_value(&value(&[1], &[]), Revision(21)), ValueUpdate::Adopted);
    leader.update_local(synced_to(11));
    assert_eq!(leader.high_watermark(), at(11));
}

/// The store refused the proposal and returned the value that the leader already has, of revision 20. The leader
/// proposes again after the next tick.
#[test]
fn refused_proposal_is_repeated_after_a_tick() {
    let mut leader = leader(&[1], &[], 1);
    start_following(&mut leader, 2, 5);
    assert!(leader.start_proposal().is_some());
    leader.on_outcome(ProposalOutcome::CurrentValue(value(&[1], &[]), Revision(20)));
    assert!(leader.start_proposal().is_none() && leader.wants_ticks());
    leader.update_local(synced_to(6));
    assert_eq!(leader.high_watermark(), at(6), "the refused proposal can no longer be committed");
    leader.on_acknowledged(peer(2), EPOCH, synced_to(6)).unwrap();
    leader.tick(0);
    assert_eq!(proposed_isr_elr(leader.start_proposal()), Some((vec![1, 2], vec![])));
    assert_eq!(leader.on_outcome(ProposalOutcome::Committed(Revision(21))), ValueUpdate::Adopted);
    assert_eq!((leader.revision(), leader.value().isr.len()), (Revision(21), 2));
}

#[test]
fn metadata_may_arrive_before_the_outcome() {
    let mut leader = leader(&[1], &[], 1);
    start_following(&mut leader, 2, 5);
    let proposal = leader.start_proposal().unwrap();
    assert_eq!(leader.on_value(&proposal.value, Revision(21)), ValueUpdate::Adopted);
    assert_eq!(
        leader.on_value(&value(&[1], &[]), Revision(20)),
        ValueUpdate::Unchanged,
        "the value is older than the known value"
    );
    assert_eq!(leader.start_proposal(), None, "the outcome is still pending");
    assert_eq!(leader.on_outcome(ProposalOutcome::Committed(Revision(21))), ValueUpdate::Unchanged);
    leader.on_disconnected(peer(2), DisconnectCause::ProcessGone);
    assert_eq!(proposed_isr_elr(leader.start_proposal()), Some((vec![1], vec![])));
}

#[test]
fn commits_need_the_committed_isr_and_an_empty_elr() {
    let mut short = leader(&[1], &[2], 2);
    assert_eq!(short.check_min_isr(), Err(1));
    start_following(&mut short, 3, 4);
    assert_eq!(proposed_isr_elr(short.start_proposal()), None, "broker 3 lacks records that may be committed");
    assert_eq!(short.high_watermark(), at(3));

    // The min ISR was lowered: the ELR must be emptied before anything is committed without its members.
    short.configure(rules_with(1));
    assert_eq!(short.high_watermark(), at(3));
    assert_eq!(proposed_isr_elr(short.start_proposal()), Some((vec![1], vec![])));
    short.on_outcome(ProposalOutcome::Committed(Revision(21)));
    assert_eq!(short.high_watermark(), at(5));
}

/// Below the min ISR only an admission can move the high watermark. A leader that admits no member before its epoch is
/// committed would never commit.
#[test]
fn leader_below_min_isr_admits_a_complete_replica() {
    let mut short = leader(&[1], &[], 2);
    assert!(!short.is_epoch_committed());
    start_following(&mut short, 2, 4);
    assert_eq!(proposed_isr_elr(short.start_proposal()), None, "the replica lacks records that may be committed");
    short.on_acknowledged(peer(2), EPOCH, synced_to(5)).unwrap();
    assert_eq!(proposed_isr_elr(short.start_proposal()), Some((vec![1, 2], vec![])));
    short.on_outcome(ProposalOutcome::Committed(Revision(21)));
    assert_eq!(short.latest(), Some(at(5)));
}

#[test]
fn admission_needs_epoch_start_and_registration() {
    for (end, status, removing, admitted) in [
        (5, BrokerStatus::Registered(Revision(10)), false, true),
        (4, BrokerStatus::Registered(Revision(10)), false, false),
        (5, BrokerStatus::ShuttingDown, false, false),
        (5, BrokerStatus::Unregistered, false, false),
        (5, BrokerStatus::Registered(Revision(10)), true, false),
    ] {
        let mut leader = leader(&[1], &[], 1);
        let removing = if removing { vec![BrokerId(2)] } else { vec![] };
        leader.on_value(&PartitionValue { removing, ..value(&[1], &[]) }, Revision(21));
        start_following(&mut leader, 2, end);
        leader.on_broker_status(BrokerId(2), status);
        assert_eq!(leader.start_proposal().is_some(), admitted, "{end} {status:?}");
    }
}

#[test]
fn exited_member_is_removed_and_lost_link_is_not() {
    for (cause, dropped) in [
        (DisconnectCause::ProcessGone, true),
        (DisconnectCause::ShuttingDown, true),
        (DisconnectCause::LinkLost, false),
    ] {
        let mut leader = leader(&[1, 2, 3], &[], 2);
        start_following(&mut leader, 2, 5);
        start_following(&mut leader, 3, 5);
        leader.on_disconnected(peer(2), cause);
        assert_eq!(leader.start_proposal().is_some(), dropped, "{cause:?}");
    }
    // A late report about an earlier incarnation is ignored.
    let mut back = leader(&[1, 2], &[], 1);
    start_following(&mut back, 2, 5);
    back.on_disconnected(PeerId { epoch: Revision(9), ..peer(2) }, DisconnectCause::ProcessGone);
    assert_eq!((back.start_proposal(), back.follows(BrokerId(2))), (None, Some(Revision(10))));
    let mut leader = leader(&[1, 2, 3], &[], 2);
    leader.on_broker_status(BrokerId(2), BrokerStatus::Unregistered);
    leader.on_broker_status(BrokerId(3), BrokerStatus::ShuttingDown);
    assert_eq!(
        proposed_isr_elr(leader.start_proposal()),
        Some((vec![1], vec![2, 3])),
        "one proposal removes several members, which stay eligible below the min ISR"
    );
}

#[test]
fn member_may_be_behind_by_a_constant_distance() {
    let mut leader = leader(&[1, 2], &[], 1);
    start_following(&mut leader, 2, 5);
    leader.tick(0);
    assert!(!leader.wants_ticks());
    // In each round the member acknowledges the log end of the round before.
    for round in 1..5 {
        leader.update_local(synced_to(5 + round));
        leader.tick(round * 90);
        leader.on_acknowledged(peer(2), EPOCH, synced_to(4 + round)).unwrap();
        assert_eq!(leader.start_proposal(), None, "round {round}");
    }
    // The member stops; a broken link and a new subscription give it no more time.
    leader.update_local(synced_to(20));
    leader.tick(1000);
    leader.on_disconnected(peer(2), DisconnectCause::LinkLost);
    assert_eq!(subscribe(&mut leader, peer(2), 8), SubscribeOutcome::Accepted(at(8)));
    leader.tick(1099);
    assert_eq!(leader.start_proposal(), None);
    leader.tick(1100);
    assert_eq!(proposed_isr_elr(leader.start_proposal()), Some((vec![1], vec![])));
}

#[test]
fn member_that_lost_records_is_removed_and_not_eligible() {
    let mut leader = leader(&[1, 2, 3], &[], 3);
    start_following(&mut leader, 2, 5);
    start_following(&mut leader, 3, 5);
    assert_eq!(leader.latest(), Some(at(5)));
    // The replica returns with an older copy of its disk, in an incarnation that the leader cannot distinguish from the
    // last one.
    assert_eq!(
        subscribe(&mut leader, peer(2), 4),
        SubscribeOutcome::Accepted(at(4)),
        "the replica may copy the lost records"
    );
    assert_eq!(proposed_isr_elr(leader.start_proposal()), Some((vec![1, 3], vec![])));
    assert_eq!(leader.on_outcome(ProposalOutcome::Committed(Revision(21))), ValueUpdate::Adopted);
    assert_eq!(leader.start_proposal(), None, "the replica lacks committed records");
    leader.on_acknowledged(peer(2), EPOCH, synced_to(5)).unwrap();
    assert_eq!(proposed_isr_elr(leader.start_proposal()), Some((vec![1, 3, 2], vec![])));
}

#[test]
fn another_epoch_or_a_deleted_key_ends_the_leader() {
    let newer = PartitionValue { leader_epoch: LeaderEpoch(5), ..value(&[1, 2], &[]) };
    let other = PartitionValue { leader: Some(BrokerId(2)), leader_epoch: LeaderEpoch(6), ..value(&[1, 2], &[]) };
    for (value, epoch) in [(newer, LeaderEpoch(5)), (other, LeaderEpoch(6))] {
        let mut leader = leader(&[1, 2], &[], 1);
        leader.on_disconnected(peer(2), DisconnectCause::ProcessGone);
        assert!(leader.start_proposal().is_some());
        assert_eq!(
            leader.on_outcome(ProposalOutcome::CurrentValue(value, Revision(30))),
            ValueUpdate::Deposed { epoch }
        );
        assert_eq!(leader.start_proposal(), None);
    }
    let mut leader = leader(&[1, 2], &[], 1);
    leader.on_disconnected(peer(2), DisconnectCause::ProcessGone);
    leader.start_proposal();
    assert_eq!((leader.on_outcome(ProposalOutcome::Deleted), leader.start_proposal()), (ValueUpdate::Deleted, None));
}

#[test]
fn subscription_is_rejected_with_the_reason() {
    let mut leader = leader(&[1, 2], &[], 1);
    let local = LocalLogBounds { local_start: at(0), tiered_end: None };
    let mut subscribe = |peer, epoch, last| {
        leader.on_subscribe(
            peer,
            epoch,
            LogPosition { last_epoch: last, log_end: at(5), removal_count: None },
            local,
            &history(),
        )
    };
    let rejected =
        |requested| SubscribeOutcome::Rejected(SubscribeError::OtherEpoch { requested, leader_epoch: EPOCH });
    assert_eq!(subscribe(peer(2), LeaderEpoch(3), None), rejected(LeaderEpoch(3)));
    assert_eq!(subscribe(peer(2), LeaderEpoch(5), None), rejected(LeaderEpoch(5)));
    for broker in [1, 9] {
        assert_eq!(subscribe(peer(broker), EPOCH, None), SubscribeOutcome::Rejected(SubscribeError::NoReplica));
    }
    let newer = SubscribeError::NewerLog { last_epoch: LeaderEpoch(7), leader_epoch: EPOCH };
    assert_eq!(subscribe(peer(2), EPOCH, Some(LeaderEpoch(7))), SubscribeOutcome::Rejected(newer));
}

/// Input of a tracker. The fields have this order: broker, its broker epoch, leader epoch, log end, persisted end. A
/// last `u8` selects the disconnect cause or the outcome. `UpdateConfig` has `persisted` and the min ISR, `Tick` the
/// time.
#[derive(Clone, Debug)]
enum Event {
    Local(u64, u64),
    Subscribe(u32, u64, u64),
    Ack(u32, u64, u32, u64, u64),
    Disconnected(u32, u64, u8),
    Registered(u32, u64),
    Tick(u64),
    Propose,
    Outcome(u8),
    UpdateConfig(bool, usize),
}

fn event() -> impl Strategy<Value = Event> {
    let (broker, epoch) = (1u32..5, 9u64..12);
    prop_oneof![
        (0u64..12, 0u64..12).prop_map(|(a, b)| Event::Local(a.max(b), a.min(b))),
        (broker.clone(), epoch.clone(), 0u64..12).prop_map(|(id, epoch, end)| Event::Subscribe(id, epoch, end)),
        (broker.clone(), epoch.clone(), 3u32..6, 0u64..12, 0u64..12)
            .prop_map(|(id, epoch, leader, a, b)| Event::Ack(id, epoch, leader, a, b)),
        (broker.clone(), epoch, 0u8..3).prop_map(|(id, epoch, reason)| Event::Disconnected(id, epoch, reason)),
        (broker, 8u64..12).prop_map(|(id, epoch)| Event::Registered(id, epoch)),
        (0u64..500).prop_map(Event::Tick),
        Just(Event::Propose),
        (0u8..4).prop_map(Event::Outcome),
        (any::<bool>(), 1usize..4).prop_map(|(persisted, min)| Event::UpdateConfig(persisted, min)),
    ]
}

fn apply(leader: &mut IsrTracker, event: Event) {
    let peer = |broker, epoch| PeerId { broker: BrokerId(broker), epoch: Revision(epoch) };
    match event {
        Event::Local(written, persisted) => {
            leader.update_local(ReplicaProgress { log_end: at(written), persisted_end: at(persisted) })
        }
        Event::Subscribe(id, epoch, end) => drop(subscribe(leader, peer(id, epoch), end)),
        Event::Ack(id, epoch, of, written, persisted) => {
            let progress = ReplicaProgress { log_end: at(written), persisted_end: at(persisted) };
            let _stale = leader.on_acknowledged(peer(id, epoch), LeaderEpoch(of), progress);
        }
        Event::Disconnected(id, epoch, cause) => {
            let causes = [DisconnectCause::LinkLost, DisconnectCause::ProcessGone, DisconnectCause::ShuttingDown];
            leader.on_disconnected(peer(id, epoch), causes[usize::from(cause)]);
        }
        // Epoch 8 stands for no registration.
        Event::Registered(id, 8) => leader.on_broker_status(BrokerId(id), BrokerStatus::Unregistered),
        Event::Registered(id, epoch) => {
            leader.on_broker_status(BrokerId(id), BrokerStatus::Registered(Revision(epoch)))
        }
        Event::Tick(now_ms) => leader.tick(now_ms),
        Event::Propose => drop(leader.start_proposal()),
        Event::Outcome(outcome) => {
            let next = leader.revision().next();
            let same = (leader.value().clone(), leader.revision());
            let outcome = match outcome {
                0 => ProposalOutcome::Committed(next),
                1 => ProposalOutcome::Unknown,
                2 => ProposalOutcome::CurrentValue(same.0, same.1),
                _ => ProposalOutcome::CurrentValue(same.0.remove_from_sets(BrokerId(2)), next),
            };
            leader.on_outcome(outcome);
        }
        Event::UpdateConfig(persisted, min_insync) => {
            let durability = if persisted { Durability::Persisted } else { Durability::Replicated };
            leader.configure(IsrRules { durability, min_insync, lag_ms: 100 });
        }
    }
}

proptest! {
    /// For any events in any order, valid or not: nothing panics, and the high watermark never falls. It never passes
    /// the acknowledged end of the leader's own log or of a member of the committed ISR. It moves only while the
    /// committed ISR has the min ISR and the committed ELR is empty.
    #[test]
    fn high_watermark_keeps_its_rules(events in prop::collection::vec(event(), 1..60)) {
        use crate::cluster::Value as _;
        let mut leader = leader(&[1, 2], &[], 2);
        for event in events {
            let before = leader.high_watermark();
            let text = format!("{event:?}");
            apply(&mut leader, event);
            prop_assert_eq!(leader.value().contradiction(), None);
            prop_assert!(leader.value().isr.contains(&BrokerId(1)), "the leader is in the ISR: {}", text);
            let after = leader.high_watermark();
            prop_assert!(after >= before, "{}", text);
            if after == before {
                continue;
            }
            let durability = leader.rules().durability;
            prop_assert!(after <= leader.local_acked(), "{}", text);
            prop_assert!(leader.check_min_isr().is_ok() && leader.value().elr.is_empty(), "{}", text);
            for id in leader.value().isr.iter().filter(|id| id.0 != 1) {
                let acked = leader.acknowledged_by(*id).map(|progress| progress.acked_for(durability));
                prop_assert!(acked >= Some(after), "{}: {} has {:?}", text, id, acked);
            }
        }
    }
}
