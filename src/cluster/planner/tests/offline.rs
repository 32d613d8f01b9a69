//! Permanently offline brokers: reassignments that need them, and replacement with few brokers.

use super::*;

/// Value of `PlannerLimits::replace_after_ms` by default, after which an offline broker counts as permanently offline.
const REPLACE_AFTER_MS: u64 = 30 * 60 * 1000;

/// Regression: a reassignment to a permanently offline broker waited forever, counted towards the limit, and prevented
/// the replacement of other lost replicas of the partition.
#[test]
fn reassignment_to_lost_broker_is_retargeted() {
    let started = value(&[1, 2, 3], Some(1), &[1, 2, 3]).start_reassignment(&ids(&[1, 2, 4])).unwrap();
    let mut world = World::of(&["", "", "", "", ""], 3, 2, vec![started]);
    world.drain(3);
    world.unregister(4, REPLACE_AFTER_MS - 1000);
    let plan = world.plan();
    assert_eq!((plan.changes.len(), plan.next_plan_ms), (0, Some(1000)), "the broker may return");
    world.unregister(4, REPLACE_AFTER_MS);
    // The limit of one counts this reassignment already, so it does not prevent the retargeting.
    world.limits.max_reassignments = 1;
    let (reason, value) = only_change(&world);
    assert_eq!(
        (reason, &value.adding, &value.removing),
        (ChangeReason::ReassignmentRetargeted, &ids(&[5]), &ids(&[3]))
    );
    assert_eq!(
        (value.removal_count, &value.isr),
        (1, &ids(&[1, 2, 3])),
        "4 was never in sync; no other replica is removed"
    );
    world.plan_until_stable(2);
    assert_eq!(world.partition(0).replicas, ids(&[1, 2, 5]));
}

/// The operator's target is permanently offline, and the replica to remove is in sync on a live broker: it stays.
#[test]
fn reassignment_to_lost_broker_is_reverted_if_old_may_stay() {
    let started = value(&[1, 2, 3], Some(1), &[1, 2, 3]).start_reassignment(&ids(&[1, 2, 4])).unwrap();
    let mut world = World::of(&["", "", "", "", ""], 3, 2, vec![started.clone()]);
    world.unregister(4, REPLACE_AFTER_MS);
    let (reason, value) = only_change(&world);
    assert_eq!(
        (reason, &value.replicas, value.is_reassigning()),
        (ChangeReason::ReassignmentRetargeted, &ids(&[1, 2, 3]), false)
    );
    world.plan_until_stable(2);
    world.unregister(3, REPLACE_AFTER_MS);
    world.plan_until_stable(2);
    assert_eq!(world.partition(0).replicas, ids(&[1, 2, 5]), "later losses are handled");

    // An offline drained broker counts as permanently offline at once.
    let mut world = World::of(&["", "", "", ""], 3, 2, vec![started]);
    world.limits.replace_after_ms = None;
    world.unregister(4, 0);
    assert_eq!(world.plan().changes, []);
    world.drain(4);
    assert_eq!(only_change(&world).1.replicas, ids(&[1, 2, 3]));
}

/// A new and a removed replica are on permanently offline brokers, and there is no other broker. The removed replica is
/// listed again, because it may hold committed records.
#[test]
fn reassignment_between_lost_brokers_is_reverted_and_blocked() {
    let started = value(&[1, 2, 3], Some(1), &[1, 2]).start_reassignment(&ids(&[1, 2, 4])).unwrap();
    let mut world = World::of(&["", "", "", ""], 3, 2, vec![started]);
    world.unregister(3, REPLACE_AFTER_MS);
    world.unregister(4, REPLACE_AFTER_MS);
    world.plan_until_stable(2);
    let value = world.partition(0);
    assert_eq!((value.replicas.clone(), value.is_reassigning()), (ids(&[1, 2, 3]), false));
    assert_eq!(world.plan().blocked, [(id(0), BlockedReason::NoBrokers)]);
    world.register(5, "");
    world.plan_until_stable(2);
    assert_eq!(world.partition(0).replicas, ids(&[1, 2, 5]));
}

/// Regression: a staying replica that never returned blocked the completion, because the min ISR needed the removed
/// replica.
#[test]
fn reassignment_completes_without_lost_staying_replica() {
    let started = || value(&[1, 2], Some(2), &[2]).start_reassignment(&ids(&[1, 3])).unwrap();
    let mut world = World::of(&["", "", "", ""], 2, 2, vec![started()]);
    world.drain(2);
    world.unregister(1, REPLACE_AFTER_MS);
    world.plan_until_stable(2);
    let stable = world.partition(0);
    assert_eq!((stable.replicas, stable.isr.len()), (ids(&[4, 3]), 2));

    // Without a fourth broker the replica on the drained broker stays, so that two replicas are in sync.
    let mut world = World::of(&["", "", ""], 2, 2, vec![started()]);
    world.drain(2);
    world.unregister(1, REPLACE_AFTER_MS);
    world.plan_until_stable(2);
    let stable = world.partition(0);
    assert_eq!((stable.replicas.clone(), stable.is_reassigning()), (ids(&[2, 3]), false));
    assert_eq!(stable.isr.len(), 2);
    assert_eq!(world.plan().blocked, [(id(0), BlockedReason::NoBrokers)]);
    world.register(4, "");
    world.plan_until_stable(2);
    assert_eq!(world.partition(0).replicas, ids(&[4, 3]), "then the drained broker is emptied too");
}

/// Regression: of two lost replicas, none was replaced while there was a broker for only one. The partition rejected
/// writes below the min ISR.
#[test]
fn lost_replicas_are_replaced_as_far_as_brokers_permit() {
    let mut world = World::of(&["", "", "", ""], 3, 2, vec![value(&[1, 2, 3], Some(1), &[1, 2, 3])]);
    world.unregister(2, REPLACE_AFTER_MS);
    world.unregister(3, REPLACE_AFTER_MS);
    world.replicate(2);
    let (reason, value) = only_change(&world);
    assert_eq!((reason, &value.adding, &value.removing), (ChangeReason::BrokerReplaced, &ids(&[4]), &ids(&[2])));
    world.plan_until_stable(2);
    let value = world.partition(0);
    assert_eq!((value.replicas, value.isr), (ids(&[1, 4, 3]), ids(&[1, 4])));
    assert_eq!(world.plan().blocked, [(id(0), BlockedReason::NoBrokers)]);
    world.register(5, "");
    world.plan_until_stable(2);
    assert_eq!(world.partition(0).replicas, ids(&[1, 4, 5]));
}

/// The only broker with data of two partitions under reassignment is permanently offline. Their reassignments copy
/// nothing, so they must not count towards the limits.
#[test]
fn leaderless_reassignments_do_not_block_others() {
    let mut values = vec![value(&[1], Some(1), &[1]); 2];
    values.push(value(&[1, 2, 3], Some(2), &[1, 2, 3]));
    let mut world = World::of(&["", "", "", ""], 3, 2, values);
    for number in [0, 1] {
        let started = world.partition(number).start_reassignment(&ids(&[4])).unwrap();
        world.put(&Key::Partition(id(number)), &PartitionValue { leader: None, ..started });
    }
    world.limits.max_new_replicas_per_broker = 2;
    world.unregister(1, REPLACE_AFTER_MS);
    let (reason, value) = only_change(&world);
    assert_eq!((reason, value.adding), (ChangeReason::BrokerReplaced, ids(&[4])));
}

#[test]
fn lost_replicas_are_replaced_before_drained_ones() {
    let mut world = World::of(&["", "", "", ""], 3, 2, vec![value(&[1, 2, 3], Some(1), &[1, 2, 3])]);
    world.drain(2);
    world.unregister(3, REPLACE_AFTER_MS);
    world.replicate(2);
    assert_eq!(only_change(&world).0, ChangeReason::BrokerReplaced);
    world.plan_until_stable(2);
    assert_eq!(world.partition(0).replicas, ids(&[1, 2, 4]));
    assert_eq!(world.plan().blocked, [(id(0), BlockedReason::NoBrokers)]);

    let mut world = World::of(&["", ""], 3, 1, vec![value(&[1], Some(1), &[1])]);
    world.plan_until_stable(1);
    assert_eq!(world.partition(0).replicas, ids(&[1, 2]), "a raised factor is applied as far as possible");
    assert_eq!(world.plan().blocked, [(id(0), BlockedReason::NoBrokers)]);
}

/// Regression: lowering the factor had no effect while too few replicas were in sync. A partition with more replicas
/// than the factor got no replacement for lost ones, and none was removed.
#[test]
fn lowered_factor_is_applied_with_too_few_in_sync_replicas() {
    for spares in [1, 2] {
        let racks = &["", "", "", "", ""][..3 + spares];
        let mut world = World::of(racks, 3, 2, vec![value(&[1, 2, 3], Some(1), &[1, 2, 3])]);
        world.unregister(2, REPLACE_AFTER_MS);
        world.unregister(3, REPLACE_AFTER_MS);
        world.replicate(2);
        world.set_topic(2, 2, 1);
        let (reason, value) = only_change(&world);
        assert_eq!((reason, value.adding.len(), &value.removing), (ChangeReason::BrokerReplaced, 1, &ids(&[2, 3])));
        world.plan_until_stable(2);
        let value = world.partition(0);
        assert_eq!((value.replicas.len(), value.isr.len()), (2, 2), "{value:?}");
        assert_eq!(world.plan(), ClusterPlan::default());
    }

    let mut world = World::of(&["", "", ""], 3, 2, vec![value(&[1, 2, 3], Some(1), &[1, 2, 3])]);
    world.unregister(2, REPLACE_AFTER_MS);
    world.unregister(3, REPLACE_AFTER_MS);
    world.replicate(2);
    world.set_topic(2, 2, 1);
    world.plan_until_stable(2);
    assert_eq!(world.plan().blocked, [(id(0), BlockedReason::NoBrokers)]);
    world.register(3, "");
    world.plan_until_stable(2);
    assert_eq!(world.partition(0).replicas, ids(&[1, 3]), "a returning broker suffices");
}

proptest! {
    /// Reassignments start, and no replica catches up. Then brokers go offline permanently. In the end, no reassignment
    /// of a partition with a leader adds a replica on one of these brokers.
    #[test]
    fn no_reassignment_waits_for_offline_broker(
        (mut world, min_insync) in worlds(),
        offline in prop::collection::vec(1_u32..7, 1..4),
    ) {
        (world.limits.max_reassignments, world.limits.max_new_replicas_per_broker) = (100, 100);
        for _ in 0..3 {
            let plan = world.plan();
            world.apply_plan(&plan);
        }
        for number in offline {
            if world.is_live(BrokerId(number)) {
                world.unregister(number, REPLACE_AFTER_MS);
            }
        }
        world.plan_until_stable(min_insync);
        for number in 0..32 {
            let Some((bytes, _)) = world.entries.get(&world.keys.partition(id(number))) else { break };
            let value = PartitionValue::decode("k", bytes).unwrap();
            let lost = |id: &BrokerId| world.offline_ms.get(id).is_some_and(|ms| *ms >= REPLACE_AFTER_MS);
            prop_assert!(value.leader.is_none() || !value.adding.iter().any(lost), "{:?}", value);
        }
    }
}
