//! Every change of a partition's sets by table, and the invariants after any order of changes.

use proptest::prelude::*;

use super::*;
use crate::cluster::Value as _;

fn brokers(ids: &[u32]) -> Vec<BrokerId> {
    ids.iter().copied().map(BrokerId).collect()
}

fn set(ids: &[u32]) -> BTreeSet<BrokerId> {
    ids.iter().copied().map(BrokerId).collect()
}

/// Returns a value with replicas 1, 2 and 3 in epoch 4.
fn value(leader: Option<u32>, isr: &[u32], elr: &[u32]) -> PartitionValue {
    let base = PartitionValue::new(brokers(&[1, 2, 3]), LeaderEpoch(4));
    PartitionValue { leader: leader.map(BrokerId), isr: brokers(isr), elr: brokers(elr), ..base }
}

/// Returns leader, epoch, ISR and ELR as text.
fn sets(value: &PartitionValue) -> String {
    let of = |set: &[BrokerId]| set.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let leader = value.leader.map_or("none".to_owned(), |id| id.to_string());
    format!("{leader}@{} isr {} elr {}", value.leader_epoch, of(&value.isr), of(&value.elr))
}

#[test]
fn shrink_below_min_isr_moves_members_to_elr() {
    for (isr, elr, out, min, then) in [
        (&[1, 2, 3][..], &[][..], &[3][..], 2, "1@4 isr 1,2 elr "),
        (&[1, 2, 3], &[], &[2, 3], 2, "1@4 isr 1 elr 2,3"),
        (&[1, 2], &[], &[2], 1, "1@4 isr 1 elr "),
        (&[1, 2], &[3], &[2], 3, "1@4 isr 1 elr 3,2"),
        // The leader stays, and a broker outside the ISR is ignored.
        (&[1, 2], &[], &[1, 3], 2, "1@4 isr 1,2 elr "),
    ] {
        assert_eq!(sets(&value(Some(1), isr, elr).shrink(&set(out), min)), then, "{isr:?} {elr:?} {out:?} {min}");
    }
}

#[test]
fn elr_is_emptied_when_min_isr_is_in_sync() {
    for (isr, elr, add, min, then) in [
        (&[1][..], &[2, 3][..], &[2][..], 2, "1@4 isr 1,2 elr "),
        (&[1], &[2, 3], &[2], 3, "1@4 isr 1,2 elr 3"),
        // The min ISR was lowered.
        (&[1], &[2, 3], &[], 1, "1@4 isr 1 elr "),
        // Brokers without a replica are not admitted, and members are not added twice.
        (&[1], &[], &[1, 9], 2, "1@4 isr 1 elr "),
    ] {
        assert_eq!(sets(&value(Some(1), isr, elr).expand(&set(add), min)), then, "{isr:?} {elr:?} {add:?} {min}");
    }
}

#[test]
fn election_prefers_isr_over_elr() {
    for (leader, isr, elr, live, to, min, then) in [
        (Some(1), &[1, 2, 3][..], &[][..], &[2, 3][..], 2, 2, Some("2@5 isr 2,3 elr ")),
        (Some(1), &[1, 2, 3], &[], &[2], 2, 2, Some("2@5 isr 2 elr 1,3")),
        (Some(1), &[1, 2], &[], &[2], 2, 1, Some("2@5 isr 2 elr ")),
        (Some(1), &[1, 2], &[], &[1, 2], 2, 2, Some("2@5 isr 1,2 elr ")),
        (Some(1), &[1], &[2], &[2, 3], 2, 2, Some("2@5 isr 2 elr 1")),
        (None, &[], &[2], &[2], 2, 2, Some("2@5 isr 2 elr ")),
        // An ELR member cannot lead while an ISR member is live.
        (None, &[1], &[2], &[1, 2], 2, 2, None),
        (Some(1), &[1], &[], &[2, 3], 2, 2, None),
        (Some(1), &[1, 2], &[], &[3], 2, 2, None),
        (Some(1), &[1, 2], &[], &[1, 2], 1, 2, None),
    ] {
        let elected = value(leader, isr, elr).elect(BrokerId(to), |id| set(live).contains(&id), min);
        assert_eq!(elected.as_ref().map(sets).as_deref(), then, "{leader:?} {isr:?} {elr:?} {live:?} {to} {min}");
    }
}

#[test]
fn unclean_election_is_recorded() {
    let elected = value(None, &[1], &[2]).elect_unclean(BrokerId(3), false).unwrap();
    assert_eq!((sets(&elected).as_str(), elected.unclean_epoch), ("3@5 isr 3 elr ", Some(LeaderEpoch(5))));
    assert_eq!(value(None, &[1], &[]).elect_unclean(BrokerId(9), false), None);
}

#[test]
fn resigned_leader_leaves_isr_unless_last_member() {
    assert_eq!(sets(&value(Some(1), &[1, 2], &[]).leaderless()), "none@5 isr 1,2 elr ");
    assert_eq!(sets(&value(None, &[1, 2], &[]).leaderless()), "none@4 isr 1,2 elr ");
    assert_eq!(sets(&value(Some(1), &[1, 2, 3], &[]).resign(BrokerId(1), 2)), "none@5 isr 2,3 elr ");
    assert_eq!(sets(&value(Some(1), &[1, 2], &[]).resign(BrokerId(1), 2)), "none@5 isr 2 elr 1");
    assert_eq!(sets(&value(Some(1), &[1], &[2]).resign(BrokerId(1), 2)), "none@5 isr 1 elr 2");
    assert_eq!(sets(&value(Some(1), &[1, 2], &[]).resign(BrokerId(2), 2)), "1@4 isr 1,2 elr ");
}

#[test]
fn unverified_replica_leaves_all_sets_without_substitute() {
    for (leader, isr, elr, integrity, then) in [
        (Some(1), &[1, 2][..], &[][..], ReplicaIntegrity::Intact, Some("none@5 isr 1,2 elr ")),
        (Some(2), &[1, 2], &[], ReplicaIntegrity::Intact, None),
        (Some(1), &[1, 2], &[], ReplicaIntegrity::Unverified, Some("none@5 isr 2 elr ")),
        (Some(2), &[1, 2], &[], ReplicaIntegrity::Unverified, Some("2@4 isr 2 elr ")),
        (Some(2), &[2], &[1], ReplicaIntegrity::Unverified, Some("2@4 isr 2 elr ")),
        (Some(1), &[1], &[], ReplicaIntegrity::Unverified, Some("none@5 isr  elr ")),
        (Some(2), &[2], &[], ReplicaIntegrity::Unverified, None),
        (Some(1), &[1, 2], &[], ReplicaIntegrity::UncleanShutdown, Some("none@5 isr 2 elr ")),
        (Some(1), &[1], &[2], ReplicaIntegrity::UncleanShutdown, Some("none@5 isr  elr 2")),
        (None, &[], &[], ReplicaIntegrity::UncleanShutdown, None),
    ] {
        let restarted = value(leader, isr, elr).after_restart(BrokerId(1), integrity);
        assert_eq!(restarted.as_ref().map(sets).as_deref(), then, "{leader:?} {isr:?} {elr:?} {integrity:?}");
        assert!(
            restarted.is_none_or(|restarted| restarted.unclean_epoch.is_none()
                && restarted.after_restart(BrokerId(1), integrity).is_none())
        );
    }
}

/// The records in the page cache may be lost, but no other replica has more. A `replicated` topic with one replica
/// would otherwise stay leaderless after each crash. `unclean_epoch` shows the possible loss. A second restart before
/// the next election changes nothing.
#[test]
fn last_holder_stays_after_unclean_shutdown_as_unclean() {
    for (leader, isr, elr) in [(Some(1), &[1][..], &[][..]), (None, &[], &[1])] {
        let stays = value(leader, isr, elr).after_restart(BrokerId(1), ReplicaIntegrity::UncleanShutdown).unwrap();
        assert_eq!((&stays.isr, &stays.elr), (&brokers(isr), &brokers(elr)));
        assert_eq!((stays.leader, stays.unclean_epoch), (None, Some(stays.leader_epoch)));
        assert_eq!(
            stays.after_restart(BrokerId(1), ReplicaIntegrity::UncleanShutdown),
            None,
            "a second restart changes nothing"
        );
    }
}

#[test]
fn reassignment_completes_with_new_in_sync_and_leader_kept() {
    let reassigning = value(Some(1), &[1, 2, 3], &[]).start_reassignment(&brokers(&[4, 1])).unwrap();
    assert_eq!((&reassigning.replicas, &reassigning.adding), (&brokers(&[4, 1, 2, 3]), &brokers(&[4])));
    assert_eq!(reassigning.removing, brokers(&[2, 3]));
    assert_eq!(reassigning.complete_reassignment(), None, "4 is not in sync yet");
    let completed = reassigning.expand(&set(&[4]), 2).complete_reassignment().unwrap();
    assert_eq!((sets(&completed).as_str(), &completed.replicas), ("1@4 isr 1,4 elr ", &brokers(&[4, 1])));
    assert_eq!(completed.complete_reassignment(), None, "no reassignment is in progress");

    let led_elsewhere = PartitionValue { leader: Some(BrokerId(2)), ..reassigning.expand(&set(&[4]), 2) };
    assert_eq!(led_elsewhere.complete_reassignment(), None, "the leader would be removed");
    let cancelled = reassigning.expand(&set(&[4]), 2).cancel_reassignment().unwrap();
    assert_eq!((sets(&cancelled).as_str(), &cancelled.replicas), ("1@4 isr 1,2,3 elr ", &brokers(&[1, 2, 3])));
    assert_eq!(value(Some(1), &[1], &[]).cancel_reassignment(), None);
    for target in [&[][..], &[1, 1]] {
        assert_eq!(value(Some(1), &[1], &[]).start_reassignment(&brokers(target)), None);
    }
}

/// A replica that was being added, is not in the new target and was never in sync is dropped at once. A replica from
/// before the first reassignment that is in the new target does not count as added.
#[test]
fn second_reassignment_replaces_the_first() {
    let first = value(Some(1), &[1, 2, 3], &[]).start_reassignment(&brokers(&[1, 4, 5])).unwrap();
    let second = first.start_reassignment(&brokers(&[1, 2, 5])).unwrap();
    assert_eq!((&second.adding, &second.removing), (&brokers(&[5]), &brokers(&[3])));
    assert_eq!((&second.replicas, second.removal_count), (&brokers(&[1, 2, 5, 3]), 1), "4 was never in sync");
    assert_eq!(second.cancel_reassignment().unwrap().replicas, brokers(&[1, 2, 3]));
    // A replica that was being added and is in sync enters `removing` instead.
    let third = first.expand(&set(&[4]), 2).start_reassignment(&brokers(&[1, 2, 5])).unwrap();
    assert_eq!((&third.removing, third.removal_count), (&brokers(&[4, 3]), 0));
}

/// The broker of a dropped replica deletes its data. If the same broker gets a replica again, a leader that missed the
/// values in between must recognise the new replica by another `removal_count`.
#[test]
fn dropped_replica_returns_with_another_removal_count() {
    let target = brokers(&[1, 2, 4]);
    let first = value(Some(1), &[1, 2, 3], &[]).start_reassignment(&target).unwrap();
    assert_eq!((first.added_after(BrokerId(4)), first.added_after(BrokerId(1))), (Some(0), None));
    let second = first.cancel_reassignment().unwrap().start_reassignment(&target).unwrap();
    assert_eq!(second, PartitionValue { removal_count: 1, ..first.clone() });
    assert_eq!(second.added_after(BrokerId(4)), Some(1));
    // A replaced reassignment and a completed one have the same effect.
    let back = first.start_reassignment(&brokers(&[1, 2, 3])).unwrap();
    assert_eq!(
        (back.is_reassigning(), back.start_reassignment(&target).unwrap().added_after(BrokerId(4))),
        (false, Some(1))
    );
    let completed = first.expand(&set(&[4]), 2).complete_reassignment().unwrap();
    assert_eq!((completed.removal_count, completed.added_after(BrokerId(4))), (1, None));
    assert_eq!(completed.start_reassignment(&brokers(&[1, 2, 3])).unwrap().added_after(BrokerId(3)), Some(1));
}

#[derive(Clone, Debug)]
enum ValueChange {
    Shrink(BTreeSet<BrokerId>),
    Expand(BTreeSet<BrokerId>),
    Elect(BrokerId, BTreeSet<BrokerId>),
    Unclean(BrokerId),
    Leaderless,
    Resign(BrokerId),
    Restart(BrokerId, ReplicaIntegrity),
    StartReassignment(Vec<BrokerId>),
    CompleteReassignment,
    CancelReassignment,
}

fn integrity() -> impl Strategy<Value = ReplicaIntegrity> {
    prop_oneof![
        Just(ReplicaIntegrity::Intact),
        Just(ReplicaIntegrity::UncleanShutdown),
        Just(ReplicaIntegrity::Unverified)
    ]
}

fn change() -> impl Strategy<Value = ValueChange> {
    let broker = || (1u32..6).prop_map(BrokerId);
    let some = || prop::collection::btree_set(broker(), 0..4);
    prop_oneof![
        some().prop_map(ValueChange::Shrink),
        some().prop_map(ValueChange::Expand),
        (broker(), some()).prop_map(|(to, live)| ValueChange::Elect(to, live)),
        broker().prop_map(ValueChange::Unclean),
        Just(ValueChange::Leaderless),
        broker().prop_map(ValueChange::Resign),
        (broker(), integrity()).prop_map(|(broker, integrity)| ValueChange::Restart(broker, integrity)),
        prop::collection::vec(broker(), 0..4).prop_map(ValueChange::StartReassignment),
        Just(ValueChange::CompleteReassignment),
        Just(ValueChange::CancelReassignment),
    ]
}

fn apply(value: &PartitionValue, change: &ValueChange, min: usize) -> PartitionValue {
    let same = || value.clone();
    match change {
        // Only a leader changes the ISR.
        ValueChange::Shrink(_) | ValueChange::Expand(_) if value.leader.is_none() => same(),
        ValueChange::Shrink(out) => value.shrink(out, min),
        ValueChange::Expand(add) => value.expand(add, min),
        ValueChange::Elect(to, live) => value.elect(*to, |id| live.contains(&id), min).unwrap_or_else(same),
        ValueChange::Unclean(to) => value.elect_unclean(*to, false).unwrap_or_else(same),
        ValueChange::Leaderless => value.leaderless(),
        ValueChange::Resign(me) => value.resign(*me, min),
        ValueChange::Restart(broker, integrity) => value.after_restart(*broker, *integrity).unwrap_or_else(same),
        ValueChange::StartReassignment(target) => value.start_reassignment(target).unwrap_or_else(same),
        ValueChange::CompleteReassignment => value.complete_reassignment().unwrap_or_else(same),
        ValueChange::CancelReassignment => value.cancel_reassignment().unwrap_or_else(same),
    }
}

proptest! {
    /// Any changes in any order, each with a random min ISR.
    #[test]
    fn sets_and_epoch_keep_their_rules(changes in prop::collection::vec((change(), 1usize..4), 1..30)) {
        let mut value = value(Some(1), &[1, 2, 3], &[]);
        for (change, min) in changes {
            let next = apply(&value, &change, min);
            prop_assert_eq!(next.contradiction(), None, "{:?}: {:?} became {:?}", change, value, next);
            let all = |value: &PartitionValue| -> BTreeSet<_> { value.isr.iter().chain(&value.elr).copied().collect() };
            prop_assert_eq!(all(&next).len(), next.isr.len() + next.elr.len(), "disjoint, without duplicates");
            let epochs = u32::from(next.leader != value.leader || matches!(change, ValueChange::Unclean(_)) && next != value);
            prop_assert_eq!(next.leader_epoch.0, value.leader_epoch.0 + epochs, "{:?}", change);
            let grows = next.elr.iter().any(|id| !value.elr.contains(id));
            let may = matches!(change, ValueChange::Shrink(_) | ValueChange::Elect(..) | ValueChange::Resign(_));
            prop_assert!(may || !grows, "{:?}", change);
            prop_assert!(!grows || next.isr.len() < min, "only below the min ISR: {:?}", change);
            // A clean election keeps every replica that may have committed records in ISR or ELR, or keeps the min ISR.
            if let ValueChange::Elect(..) = change {
                prop_assert!(next.isr.len() >= min || all(&next).is_superset(&all(&value)), "{:?}", change);
            }
            value = next;
        }
    }

    /// A restart removes at most the restarted broker from leadership, ISR and ELR. A second restart changes nothing.
    #[test]
    fn after_restart_is_idempotent(
        changes in prop::collection::vec((change(), 1usize..4), 0..20),
        broker in 1u32..6,
        integrity in integrity(),
    ) {
        let start = value(Some(1), &[1, 2, 3], &[]);
        let value = changes.iter().fold(start, |value, (change, min)| apply(&value, change, *min));
        let Some(restarted) = value.after_restart(BrokerId(broker), integrity) else { return Ok(()) };
        prop_assert_eq!(restarted.after_restart(BrokerId(broker), integrity), None);
        prop_assert_ne!(restarted.leader, Some(BrokerId(broker)));
        for (before, after) in [(&value.isr, &restarted.isr), (&value.elr, &restarted.elr)] {
            prop_assert!(after.iter().all(|id| before.contains(id)));
            prop_assert!(before.iter().all(|id| id.0 == broker || after.contains(id)));
        }
    }
}
