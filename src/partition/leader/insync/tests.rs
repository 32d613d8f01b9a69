//! Who is in sync and what that commits: by example, by table, and by chance.

use proptest::prelude::*;

use super::*;

const EPOCH: LeaderEpoch = LeaderEpoch(4);

fn at(offset: u64) -> Offset {
    Offset::new(offset).unwrap()
}

fn both(end: u64) -> Ends {
    Ends { written: at(end), persisted: at(end) }
}

fn peer(broker: u32) -> Peer {
    Peer { broker: BrokerId(broker), epoch: Revision(10) }
}

fn brokers(ids: &[u32]) -> Vec<BrokerId> {
    ids.iter().copied().map(BrokerId).collect()
}

fn value(isr: &[u32], elr: &[u32]) -> PartitionValue {
    PartitionValue { isr: brokers(isr), elr: brokers(elr), ..PartitionValue::new(brokers(&[1, 2, 3]), EPOCH) }
}

fn rule(min_insync: usize) -> Rule {
    Rule { durability: Durability::Persisted, min_insync, lag_ms: 100 }
}

/// Broker 1 leads epoch 4, which begins at offset 5; 3 is known as committed, and all brokers are registered.
fn leader(isr: &[u32], elr: &[u32], min: usize) -> InSync {
    let start = Start {
        me: BrokerId(1),
        value: value(isr, elr),
        revision: Revision(20),
        own: both(5),
        committed_end: at(3),
        rule: rule(min),
    };
    let mut leader = InSync::new(start);
    for broker in [2, 3] {
        leader.seen(BrokerId(broker), Registration::Running(Revision(10)));
    }
    leader
}

fn history() -> EpochHistory {
    let mut history = EpochHistory::new();
    assert!(history.note(LeaderEpoch(3), at(0)));
    history
}

fn claim(leader: &mut InSync, peer: Peer, end: u64) -> Join {
    let local = Local { local_start: at(0), tiered_end: None };
    leader.join(peer, EPOCH, Claim { last: Some(LeaderEpoch(3)), end: at(end), added: None }, local, &history())
}

/// The claim of a replica that is being added.
fn claim_added(leader: &mut InSync, broker: u32, end: u64, added: Option<u64>) -> Join {
    let local = Local { local_start: at(0), tiered_end: None };
    let claim = Claim { last: (end > 0).then_some(LeaderEpoch(3)), end: at(end), added };
    leader.join(peer(broker), EPOCH, claim, local, &history())
}

/// Joins and acknowledges.
fn follow(leader: &mut InSync, broker: u32, end: u64) {
    assert_eq!(claim(leader, peer(broker), end.min(5)), Join::At(at(end.min(5))));
    leader.acknowledged(peer(broker), EPOCH, both(end)).unwrap();
}

fn isr(proposal: Option<Proposal>) -> Option<(Vec<u32>, Vec<u32>)> {
    let ids = |set: &[BrokerId]| set.iter().map(|id| id.0).collect();
    proposal.map(|proposal| (ids(&proposal.value.isr), ids(&proposal.value.elr)))
}

#[test]
fn the_high_watermark_is_the_least_end_of_all_in_sync() {
    let mut leader = leader(&[1, 2, 3], &[], 2);
    assert_eq!((leader.high_watermark(), leader.latest()), (at(3), None), "nobody has said anything");
    follow(&mut leader, 2, 5);
    assert_eq!(leader.high_watermark(), at(3), "3 is in sync too");
    follow(&mut leader, 3, 4);
    assert_eq!((leader.high_watermark(), leader.is_settled()), (at(4), false));
    leader.acknowledged(peer(3), EPOCH, both(5)).unwrap();
    assert_eq!(leader.latest(), Some(at(5)));
    leader.own(both(9));
    assert_eq!(leader.high_watermark(), at(5));
}

#[test]
fn the_topics_rule_says_which_end_counts_and_may_change() {
    let mut leader = leader(&[1, 2], &[], 2);
    follow(&mut leader, 2, 5);
    leader.own(Ends { written: at(8), persisted: at(6) });
    leader.acknowledged(peer(2), EPOCH, Ends { written: at(8), persisted: at(7) }).unwrap();
    assert_eq!(leader.high_watermark(), at(6));
    leader.configure(Rule { durability: Durability::Replicated, ..rule(2) });
    assert_eq!(leader.high_watermark(), at(8));
    leader.configure(rule(2));
    assert_eq!(leader.high_watermark(), at(8), "what was committed stays so");
}

/// It deletes its log when it is let go. Added again in the same epoch it has nothing, whatever it acknowledged before.
#[test]
fn who_was_let_go_and_is_added_again_is_admitted_only_by_what_it_acknowledges_then() {
    let without = PartitionValue { replicas: brokers(&[1, 3]), removals: 1, ..value(&[1, 3], &[]) };
    let added = PartitionValue { adding: brokers(&[2]), removals: 1, ..value(&[1, 3], &[]) };
    // The value in between may be missed: a watch that broke lists only what is there now.
    for values in [vec![(without, Revision(21)), (added.clone(), Revision(22))], vec![(added, Revision(22))]] {
        let mut leader = leader(&[1, 2, 3], &[], 1);
        follow(&mut leader, 2, 5);
        follow(&mut leader, 3, 5);
        for (value, revision) in &values {
            assert_eq!(leader.observed(value, *revision), Observed::Adopted);
        }
        assert_eq!(isr(leader.proposal()), None, "what it had is gone");
        assert!(leader.acknowledged(peer(2), EPOCH, both(5)).is_err(), "a word of before");
        let refused = JoinRefused::OtherAddition { claimed: None, known: Some(1) };
        assert_eq!(claim(&mut leader, peer(2), 5), Join::Refused(refused), "sent before it was let go");
        assert_eq!(claim_added(&mut leader, 2, 0, Some(1)), Join::At(at(0)));
        leader.acknowledged(peer(2), EPOCH, both(4)).unwrap();
        assert_eq!(isr(leader.proposal()), None, "not all that is committed");
        leader.acknowledged(peer(2), EPOCH, both(5)).unwrap();
        assert_eq!(isr(leader.proposal()), Some((vec![1, 3, 2], vec![])));
    }
}

/// The move was taken back and ordered again, and this leader saw neither: the value of before and the one of after differ in nothing but
/// the count of removals. It went on counting what the replica of before had acknowledged, and proposed one that had nothing.
#[test]
fn a_replica_whose_addition_was_taken_back_and_ordered_again_counts_anew_though_nobody_saw_it_go() {
    let moving = PartitionValue { adding: brokers(&[2]), ..value(&[1, 3], &[]) };
    let again = moving.cancel_move().unwrap().begin_move(&brokers(&[1, 2, 3])).unwrap();
    assert_eq!((again.removals, &again.replicas), (1, &moving.replicas));
    let mut leader = leader(&[1, 3], &[], 1);
    leader.observed(&moving, Revision(21));
    follow(&mut leader, 3, 5);
    assert_eq!(claim_added(&mut leader, 2, 5, Some(0)), Join::At(at(5)));
    let refused = JoinRefused::OtherAddition { claimed: Some(1), known: Some(0) };
    assert_eq!(claim_added(&mut leader, 2, 0, Some(1)), Join::Refused(refused), "its leader is to hear of it first");
    leader.acknowledged(peer(2), EPOCH, both(4)).unwrap();
    assert_eq!(leader.observed(&again, Revision(24)), Observed::Adopted);
    assert!(leader.acknowledged(peer(2), EPOCH, both(5)).is_err(), "on the link of before");
    assert_eq!(isr(leader.proposal()), None);
    let refused = JoinRefused::OtherAddition { claimed: Some(0), known: Some(1) };
    assert_eq!(claim_added(&mut leader, 2, 5, Some(0)), Join::Refused(refused), "sent before it was let go");
    assert_eq!(isr(leader.proposal()), None);
    assert_eq!(claim_added(&mut leader, 2, 0, Some(1)), Join::At(at(0)));
    leader.acknowledged(peer(2), EPOCH, both(5)).unwrap();
    assert_eq!(isr(leader.proposal()), Some((vec![1, 3, 2], vec![])));
}

/// Nobody waits for the other where only the end of a move is new: one in sync may have heard of it first, or last.
#[test]
fn who_is_in_sync_joins_whether_or_not_it_has_heard_of_the_end_of_its_move() {
    let moving = PartitionValue { adding: brokers(&[2]), removing: brokers(&[3]), ..value(&[1, 2, 3], &[]) };
    let ended = moving.end_move().unwrap();
    for (known, claimed) in [(&moving, None), (&moving, Some(0)), (&ended, None), (&ended, Some(0))] {
        let mut leader = leader(&[1, 2, 3], &[], 1);
        leader.observed(known, Revision(21));
        assert_eq!(claim_added(&mut leader, 2, 5, claimed), Join::At(at(5)), "{claimed:?}");
    }
    // It was let go and added again after that end, of which this leader knows.
    let mut leader = leader(&[1, 2, 3], &[], 1);
    leader.observed(&ended, Revision(21));
    let refused = JoinRefused::OtherAddition { claimed: Some(2), known: None };
    assert_eq!(claim_added(&mut leader, 2, 0, Some(2)), Join::Refused(refused));
}

#[test]
fn an_acknowledgement_counts_for_this_epoch_and_this_link_only() {
    let mut leader = leader(&[1, 2], &[], 1);
    let not_joined = Stale::NotJoined { broker: BrokerId(2), epoch: Revision(10) };
    assert_eq!(leader.acknowledged(peer(2), EPOCH, both(5)), Err(not_joined));
    claim(&mut leader, peer(2), 5);
    for (from, epoch, ends) in [
        (peer(2), LeaderEpoch(3), both(5)),
        (peer(2), LeaderEpoch(5), both(5)),
        (Peer { epoch: Revision(9), ..peer(2) }, EPOCH, both(5)),
        (Peer { epoch: Revision(11), ..peer(2) }, EPOCH, both(5)),
        (peer(3), EPOCH, both(5)),
        (peer(1), EPOCH, both(5)),
        (peer(2), EPOCH, both(6)),
        (peer(2), EPOCH, Ends { written: at(4), persisted: at(5) }),
    ] {
        let before = leader.clone();
        assert!(leader.acknowledged(from, epoch, ends).is_err(), "{from:?} {epoch} {ends:?}");
        assert_eq!(leader, before, "it changed nothing");
    }
    // A newer uptime is known: what comes over the old link is of a process that may be gone.
    leader.seen(BrokerId(2), Registration::Running(Revision(12)));
    assert_eq!(leader.acknowledged(peer(2), EPOCH, both(5)), Err(not_joined));
    assert_eq!(claim(&mut leader, peer(2), 5), Join::Refused(JoinRefused::OlderBroker));
}

#[test]
fn who_is_to_be_in_sync_holds_the_high_watermark_before_and_until_that_is_out_of_the_question() {
    let mut leader = leader(&[1], &[], 1);
    follow(&mut leader, 2, 5);
    let proposal = leader.proposal().unwrap();
    assert_eq!((proposal.expect, &proposal.added), (Revision(20), &vec![peer(2)]));
    leader.own(both(9));
    assert_eq!(leader.high_watermark(), at(5), "it may be in the ISR already");
    assert_eq!(leader.proposal(), None, "one at a time");

    // Nobody knows, and the old value still stands there: it may yet be done.
    assert_eq!(leader.agreed(Agreed::Unknown), Observed::Same);
    assert!(leader.awaits_reading() && leader.proposal().is_none());
    assert_eq!(leader.agreed(Agreed::Found(value(&[1], &[]), Revision(20))), Observed::Same);
    leader.own(both(10));
    assert_eq!(leader.high_watermark(), at(5));

    // Something else was written: now it cannot be done any more.
    assert_eq!(leader.observed(&value(&[1], &[]), Revision(21)), Observed::Adopted);
    leader.own(both(11));
    assert_eq!(leader.high_watermark(), at(11));
}

#[test]
fn a_refused_proposal_waits_for_the_views_word() {
    let mut leader = leader(&[1], &[], 1);
    follow(&mut leader, 2, 5);
    assert!(leader.proposal().is_some());
    leader.agreed(Agreed::Found(value(&[1], &[]), Revision(20)));
    assert!(leader.proposal().is_none() && leader.is_behind());
    leader.own(both(6));
    assert_eq!(leader.high_watermark(), at(6), "it can never be done");
    leader.acknowledged(peer(2), EPOCH, both(6)).unwrap();
    leader.tick(0);
    assert_eq!(isr(leader.proposal()), Some((vec![1, 2], vec![])));
    assert_eq!(leader.agreed(Agreed::Done(Revision(21))), Observed::Adopted);
    assert_eq!((leader.revision(), leader.value().isr.len()), (Revision(21), 2));
}

#[test]
fn the_views_word_may_overtake_the_outcome() {
    let mut leader = leader(&[1], &[], 1);
    follow(&mut leader, 2, 5);
    let proposal = leader.proposal().unwrap();
    assert_eq!(leader.observed(&proposal.value, Revision(21)), Observed::Adopted);
    assert_eq!(leader.observed(&value(&[1], &[]), Revision(20)), Observed::Same, "older than what is known");
    assert_eq!(leader.proposal(), None, "the outcome is still to come");
    assert_eq!(leader.agreed(Agreed::Done(Revision(21))), Observed::Same);
    leader.left(peer(2), Departure::Gone);
    assert_eq!(isr(leader.proposal()), Some((vec![1], vec![])));
}

#[test]
fn only_the_committed_isr_makes_the_minimum_and_an_elr_holds_all_back() {
    let mut short = leader(&[1], &[2], 2);
    assert_eq!(short.has_minimum(), Err(1));
    follow(&mut short, 3, 4);
    assert_eq!(isr(short.proposal()), None, "3 lacks what may be committed");
    assert_eq!(short.high_watermark(), at(3));

    // The minimum was lowered: the ELR must go before anything is committed without it.
    short.configure(rule(1));
    assert_eq!(short.high_watermark(), at(3));
    assert_eq!(isr(short.proposal()), Some((vec![1], vec![])));
    short.agreed(Agreed::Done(Revision(21)));
    assert_eq!(short.high_watermark(), at(5));
}

/// Below the minimum only an admission can move the high watermark: a leader that waited for it to reach the epoch's start before it
/// admits anybody would wait for ever.
#[test]
fn a_leader_below_the_minimum_is_made_whole_by_a_member_that_has_all() {
    let mut short = leader(&[1], &[], 2);
    assert!(!short.is_settled());
    follow(&mut short, 2, 4);
    assert_eq!(isr(short.proposal()), None, "it lacks what may be committed");
    short.acknowledged(peer(2), EPOCH, both(5)).unwrap();
    assert_eq!(isr(short.proposal()), Some((vec![1, 2], vec![])));
    short.agreed(Agreed::Done(Revision(21)));
    assert_eq!(short.latest(), Some(at(5)));
}

#[test]
fn admission_asks_for_the_epochs_start_the_registration_and_a_place() {
    for (end, registration, removing, admitted) in [
        (5, Registration::Running(Revision(10)), false, true),
        (4, Registration::Running(Revision(10)), false, false),
        (5, Registration::Stopping, false, false),
        (5, Registration::None, false, false),
        (5, Registration::Running(Revision(10)), true, false),
    ] {
        let mut leader = leader(&[1], &[], 1);
        let removing = if removing { vec![BrokerId(2)] } else { vec![] };
        leader.observed(&PartitionValue { removing, ..value(&[1], &[]) }, Revision(21));
        follow(&mut leader, 2, end);
        leader.seen(BrokerId(2), registration);
        assert_eq!(leader.proposal().is_some(), admitted, "{end} {registration:?}");
    }
}

#[test]
fn who_is_gone_or_stops_is_dropped_at_once_and_a_lost_link_is_not_gone() {
    for (why, dropped) in [(Departure::Gone, true), (Departure::Stopping, true), (Departure::LinkLost, false)] {
        let mut leader = leader(&[1, 2, 3], &[], 2);
        follow(&mut leader, 2, 5);
        follow(&mut leader, 3, 5);
        leader.left(peer(2), why);
        assert_eq!(leader.proposal().is_some(), dropped, "{why:?}");
    }
    // News of its uptime before this one comes late.
    let mut back = leader(&[1, 2], &[], 1);
    follow(&mut back, 2, 5);
    back.left(Peer { epoch: Revision(9), ..peer(2) }, Departure::Gone);
    assert_eq!((back.proposal(), back.follows(BrokerId(2))), (None, Some(Revision(10))));
    let mut leader = leader(&[1, 2, 3], &[], 2);
    leader.seen(BrokerId(2), Registration::None);
    leader.seen(BrokerId(3), Registration::Stopping);
    assert_eq!(
        isr(leader.proposal()),
        Some((vec![1], vec![2, 3])),
        "several in one proposal, and eligible below the minimum"
    );
}

#[test]
fn a_member_may_be_a_constant_distance_behind_but_not_fall_back() {
    let mut leader = leader(&[1, 2], &[], 1);
    follow(&mut leader, 2, 5);
    leader.tick(0);
    assert!(!leader.is_behind());
    // Each tick it has what the log end was at the tick before.
    for round in 1..5 {
        leader.own(both(5 + round));
        leader.tick(round * 90);
        leader.acknowledged(peer(2), EPOCH, both(4 + round)).unwrap();
        assert_eq!(leader.proposal(), None, "round {round}");
    }
    // It stops where it is; breaking the link and joining again gives it no more time.
    leader.own(both(20));
    leader.tick(1000);
    leader.left(peer(2), Departure::LinkLost);
    assert_eq!(claim(&mut leader, peer(2), 8), Join::At(at(8)));
    leader.tick(1099);
    assert_eq!(leader.proposal(), None);
    leader.tick(1100);
    assert_eq!(isr(leader.proposal()), Some((vec![1], vec![])));
}

#[test]
fn a_member_that_lost_what_it_acknowledged_is_struck_and_not_eligible() {
    let mut leader = leader(&[1, 2, 3], &[], 3);
    follow(&mut leader, 2, 5);
    follow(&mut leader, 3, 5);
    assert_eq!(leader.latest(), Some(at(5)));
    // Back with an older copy of its disk, within one uptime of the machine that nobody can tell from the last.
    assert_eq!(claim(&mut leader, peer(2), 4), Join::At(at(4)), "it may follow, to become whole");
    assert_eq!(isr(leader.proposal()), Some((vec![1, 3], vec![])));
    assert_eq!(leader.agreed(Agreed::Done(Revision(21))), Observed::Adopted);
    assert_eq!(leader.proposal(), None, "it lacks what is committed");
    leader.acknowledged(peer(2), EPOCH, both(5)).unwrap();
    assert_eq!(isr(leader.proposal()), Some((vec![1, 3, 2], vec![])));
}

#[test]
fn another_epoch_or_a_deleted_key_ends_it() {
    let newer = PartitionValue { leader_epoch: LeaderEpoch(5), ..value(&[1, 2], &[]) };
    let other = PartitionValue { leader: Some(BrokerId(2)), leader_epoch: LeaderEpoch(6), ..value(&[1, 2], &[]) };
    for (value, epoch) in [(newer, LeaderEpoch(5)), (other, LeaderEpoch(6))] {
        let mut leader = leader(&[1, 2], &[], 1);
        leader.left(peer(2), Departure::Gone);
        assert!(leader.proposal().is_some());
        assert_eq!(leader.agreed(Agreed::Found(value, Revision(30))), Observed::Deposed { epoch });
        assert_eq!(leader.proposal(), None);
    }
    let mut leader = leader(&[1, 2], &[], 1);
    leader.left(peer(2), Departure::Gone);
    leader.proposal();
    assert_eq!((leader.agreed(Agreed::Gone), leader.proposal()), (Observed::Gone, None));
}

#[test]
fn joining_is_refused_with_the_reason() {
    let mut leader = leader(&[1, 2], &[], 1);
    let local = Local { local_start: at(0), tiered_end: None };
    let mut join =
        |peer, epoch, last| leader.join(peer, epoch, Claim { last, end: at(5), added: None }, local, &history());
    let refused = |asked| Join::Refused(JoinRefused::OtherEpoch { asked, leads: EPOCH });
    assert_eq!(join(peer(2), LeaderEpoch(3), None), refused(LeaderEpoch(3)));
    assert_eq!(join(peer(2), LeaderEpoch(5), None), refused(LeaderEpoch(5)));
    for stranger in [1, 9] {
        assert_eq!(join(peer(stranger), EPOCH, None), Join::Refused(JoinRefused::NoReplica));
    }
    let newer = JoinRefused::NewerLog { claimed: LeaderEpoch(7), leads: EPOCH };
    assert_eq!(join(peer(2), EPOCH, Some(LeaderEpoch(7))), Join::Refused(newer));
}

#[derive(Clone, Debug)]
enum Event {
    Own(u64, u64),
    Join(u32, u64, u64),
    Ack(u32, u64, u32, u64, u64),
    Left(u32, u64, u8),
    Seen(u32, u64),
    Tick(u64),
    Propose,
    Agreed(u8),
    Configure(bool, usize),
}

fn event() -> impl Strategy<Value = Event> {
    let (broker, epoch) = (1u32..5, 9u64..12);
    prop_oneof![
        (0u64..12, 0u64..12).prop_map(|(a, b)| Event::Own(a.max(b), a.min(b))),
        (broker.clone(), epoch.clone(), 0u64..12).prop_map(|(id, epoch, end)| Event::Join(id, epoch, end)),
        (broker.clone(), epoch.clone(), 3u32..6, 0u64..12, 0u64..12)
            .prop_map(|(id, epoch, leader, a, b)| Event::Ack(id, epoch, leader, a, b)),
        (broker.clone(), epoch, 0u8..3).prop_map(|(id, epoch, why)| Event::Left(id, epoch, why)),
        (broker, 8u64..12).prop_map(|(id, epoch)| Event::Seen(id, epoch)),
        (0u64..500).prop_map(Event::Tick),
        Just(Event::Propose),
        (0u8..4).prop_map(Event::Agreed),
        (any::<bool>(), 1usize..4).prop_map(|(persisted, min)| Event::Configure(persisted, min)),
    ]
}

fn apply(leader: &mut InSync, event: Event) {
    let peer = |broker, epoch| Peer { broker: BrokerId(broker), epoch: Revision(epoch) };
    match event {
        Event::Own(written, persisted) => leader.own(Ends { written: at(written), persisted: at(persisted) }),
        Event::Join(id, epoch, end) => drop(claim(leader, peer(id, epoch), end)),
        Event::Ack(id, epoch, of, written, persisted) => {
            let ends = Ends { written: at(written), persisted: at(persisted) };
            let _stale = leader.acknowledged(peer(id, epoch), LeaderEpoch(of), ends);
        }
        Event::Left(id, epoch, why) => {
            let whys = [Departure::LinkLost, Departure::Gone, Departure::Stopping];
            leader.left(peer(id, epoch), whys[usize::from(why)]);
        }
        Event::Seen(id, 8) => leader.seen(BrokerId(id), Registration::None),
        Event::Seen(id, epoch) => leader.seen(BrokerId(id), Registration::Running(Revision(epoch))),
        Event::Tick(now_ms) => leader.tick(now_ms),
        Event::Propose => drop(leader.proposal()),
        Event::Agreed(outcome) => {
            let next = leader.revision().next();
            let same = (leader.value().clone(), leader.revision());
            let outcome = match outcome {
                0 => Agreed::Done(next),
                1 => Agreed::Unknown,
                2 => Agreed::Found(same.0, same.1),
                _ => Agreed::Found(same.0.strike(BrokerId(2)), next),
            };
            leader.agreed(outcome);
        }
        Event::Configure(persisted, min_insync) => {
            let durability = if persisted { Durability::Persisted } else { Durability::Replicated };
            leader.configure(Rule { durability, min_insync, lag_ms: 100 });
        }
    }
}

proptest! {
    /// Whatever is told in whatever order, right or wrong: nothing panics, and the high watermark moves forward only, never past the
    /// own log nor past what a committed member acknowledged, and only with the minimum in sync and no ELR.
    #[test]
    fn the_high_watermark_keeps_its_rules(events in prop::collection::vec(event(), 1..60)) {
        use crate::cluster::Value as _;
        let mut leader = leader(&[1, 2], &[], 2);
        for event in events {
            let before = leader.high_watermark();
            let text = format!("{event:?}");
            apply(&mut leader, event);
            prop_assert_eq!(leader.value().contradiction(), None);
            prop_assert!(leader.value().isr.contains(&BrokerId(1)), "the leader stays: {}", text);
            let after = leader.high_watermark();
            prop_assert!(after >= before, "{}", text);
            if after == before {
                continue;
            }
            let durability = leader.rule().durability;
            prop_assert!(after <= leader.own_end(), "{}", text);
            prop_assert!(leader.has_minimum().is_ok() && leader.value().elr.is_empty(), "{}", text);
            for id in leader.value().isr.iter().filter(|id| id.0 != 1) {
                let acked = leader.acknowledged_by(*id).map(|ends| ends.by(durability));
                prop_assert!(acked >= Some(after), "{}: {} has {:?}", text, id, acked);
            }
        }
    }
}
