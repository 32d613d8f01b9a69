//! Brokers that are gone for good: moves that need them, and replacement where brokers are few.

use super::*;

/// As long as the default waits for a broker.
const FOR_GOOD_MS: u64 = 30 * 60 * 1000;

/// Such a move waited for ever, kept its slot, and no later loss of the partition was looked at.
#[test]
fn a_move_to_a_broker_that_is_gone_for_good_goes_to_another_one() {
    let begun = value(&[1, 2, 3], Some(1), &[1, 2, 3]).begin_move(&ids(&[1, 2, 4])).unwrap();
    let mut world = World::of(&["", "", "", "", ""], 3, 2, vec![begun]);
    world.drain(3);
    world.go(4, FOR_GOOD_MS - 1000);
    let plan = world.plan();
    assert_eq!((plan.steps.len(), plan.again_in_ms), (0, Some(1000)), "it may come back");
    world.go(4, FOR_GOOD_MS);
    // It has its turn already.
    world.limits.moves = 1;
    let (why, value) = only(&world);
    assert_eq!((why, &value.adding, &value.removing), (Why::Redirected, &ids(&[5]), &ids(&[3])));
    assert_eq!((value.removals, &value.isr), (1, &ids(&[1, 2, 3])), "4 never had what counts; nobody else is let go");
    world.settle(2);
    assert_eq!(world.partition(0).replicas, ids(&[1, 2, 5]));
}

/// What an operator ordered cannot be done, and who was to go holds everything.
#[test]
fn a_move_whose_new_replica_is_gone_for_good_is_taken_back_where_the_old_one_may_stay() {
    let begun = value(&[1, 2, 3], Some(1), &[1, 2, 3]).begin_move(&ids(&[1, 2, 4])).unwrap();
    let mut world = World::of(&["", "", "", "", ""], 3, 2, vec![begun.clone()]);
    world.go(4, FOR_GOOD_MS);
    let (why, value) = only(&world);
    assert_eq!((why, &value.replicas, value.is_moving()), (Why::Redirected, &ids(&[1, 2, 3]), false));
    world.settle(2);
    world.go(3, FOR_GOOD_MS);
    world.settle(2);
    assert_eq!(world.partition(0).replicas, ids(&[1, 2, 5]), "later losses are seen to");

    // Who is gone and drained is not waited for, whatever the time.
    let mut world = World::of(&["", "", "", ""], 3, 2, vec![begun]);
    world.limits.replace_after_ms = None;
    world.go(4, 0);
    assert_eq!(world.plan().steps, []);
    world.drain(4);
    assert_eq!(only(&world).1.replicas, ids(&[1, 2, 3]));
}

/// With nobody else the replicas of before stay listed: who is gone may hold what counts.
#[test]
fn a_move_from_one_lost_broker_to_another_one_is_taken_back_and_waits() {
    let begun = value(&[1, 2, 3], Some(1), &[1, 2]).begin_move(&ids(&[1, 2, 4])).unwrap();
    let mut world = World::of(&["", "", "", ""], 3, 2, vec![begun]);
    world.go(3, FOR_GOOD_MS);
    world.go(4, FOR_GOOD_MS);
    world.settle(2);
    let value = world.partition(0);
    assert_eq!((value.replicas.clone(), value.is_moving()), (ids(&[1, 2, 3]), false));
    assert_eq!(world.plan().waiting, [(id(0), Waiting::ForBrokers)]);
    world.come(5, "");
    world.settle(2);
    assert_eq!(world.partition(0).replicas, ids(&[1, 2, 5]));
}

/// A replica that stays and never comes back held the end of the move up, because the one that goes is needed for the minimum.
#[test]
fn a_move_ends_though_a_replica_that_stays_is_gone_for_good() {
    let begun = || value(&[1, 2], Some(2), &[2]).begin_move(&ids(&[1, 3])).unwrap();
    let mut world = World::of(&["", "", "", ""], 2, 2, vec![begun()]);
    world.drain(2);
    world.go(1, FOR_GOOD_MS);
    world.settle(2);
    let settled = world.partition(0);
    assert_eq!((settled.replicas, settled.isr.len()), (ids(&[4, 3]), 2));

    // With no other broker the drained one stays, so that two are in sync.
    let mut world = World::of(&["", "", ""], 2, 2, vec![begun()]);
    world.drain(2);
    world.go(1, FOR_GOOD_MS);
    world.settle(2);
    let settled = world.partition(0);
    assert_eq!((settled.replicas.clone(), settled.is_moving()), (ids(&[2, 3]), false));
    assert_eq!(settled.isr.len(), 2);
    assert_eq!(world.plan().waiting, [(id(0), Waiting::ForBrokers)]);
    world.come(4, "");
    world.settle(2);
    assert_eq!(world.partition(0).replicas, ids(&[4, 3]), "then it is emptied as well");
}

/// Nothing was replaced before all could be: the partition refused writes beside a broker that could have helped.
#[test]
fn as_many_lost_replicas_are_replaced_as_there_are_brokers() {
    let mut world = World::of(&["", "", "", ""], 3, 2, vec![value(&[1, 2, 3], Some(1), &[1, 2, 3])]);
    world.go(2, FOR_GOOD_MS);
    world.go(3, FOR_GOOD_MS);
    world.replicate(2);
    let (why, value) = only(&world);
    assert_eq!((why, &value.adding, &value.removing), (Why::Replaced, &ids(&[4]), &ids(&[2])));
    world.settle(2);
    let value = world.partition(0);
    assert_eq!((value.replicas, value.isr), (ids(&[1, 4, 3]), ids(&[1, 4])));
    assert_eq!(world.plan().waiting, [(id(0), Waiting::ForBrokers)]);
    world.come(5, "");
    world.settle(2);
    assert_eq!(world.partition(0).replicas, ids(&[1, 4, 5]));
}

/// The only broker that held them was being drained when it died. Their moves copy nothing any more, and nobody waits for their turn.
#[test]
fn moves_that_nobody_leads_keep_no_other_from_beginning() {
    let mut values = vec![value(&[1], Some(1), &[1]); 2];
    values.push(value(&[1, 2, 3], Some(2), &[1, 2, 3]));
    let mut world = World::of(&["", "", "", ""], 3, 2, values);
    for number in [0, 1] {
        let begun = world.partition(number).begin_move(&ids(&[4])).unwrap();
        world.put(&Key::Partition(id(number)), &PartitionValue { leader: None, ..begun });
    }
    world.limits.moves_to_one = 2;
    world.go(1, FOR_GOOD_MS);
    let (why, step) = only(&world);
    assert_eq!((why, step.adding), (Why::Replaced, ids(&[4])));
}

#[test]
fn with_too_few_brokers_who_is_gone_is_replaced_before_who_is_drained() {
    let mut world = World::of(&["", "", "", ""], 3, 2, vec![value(&[1, 2, 3], Some(1), &[1, 2, 3])]);
    world.drain(2);
    world.go(3, FOR_GOOD_MS);
    world.replicate(2);
    assert_eq!(only(&world).0, Why::Replaced);
    world.settle(2);
    assert_eq!(world.partition(0).replicas, ids(&[1, 2, 4]));
    assert_eq!(world.plan().waiting, [(id(0), Waiting::ForBrokers)]);

    let mut world = World::of(&["", ""], 3, 1, vec![value(&[1], Some(1), &[1])]);
    world.settle(1);
    assert_eq!(world.partition(0).replicas, ids(&[1, 2]), "a raised factor is followed as far as possible, too");
    assert_eq!(world.plan().waiting, [(id(0), Waiting::ForBrokers)]);
}

/// The advice to lower the factor led nowhere: with too many replicas nobody looked for lost ones, and none goes while too few are in sync.
#[test]
fn a_lowered_factor_is_followed_though_too_few_replicas_are_in_sync() {
    for spares in [1, 2] {
        let racks = &["", "", "", "", ""][..3 + spares];
        let mut world = World::of(racks, 3, 2, vec![value(&[1, 2, 3], Some(1), &[1, 2, 3])]);
        world.go(2, FOR_GOOD_MS);
        world.go(3, FOR_GOOD_MS);
        world.replicate(2);
        world.topic(2, 2, 1);
        let (why, value) = only(&world);
        assert_eq!((why, value.adding.len(), &value.removing), (Why::Replaced, 1, &ids(&[2, 3])));
        world.settle(2);
        let value = world.partition(0);
        assert_eq!((value.replicas.len(), value.isr.len()), (2, 2), "{value:?}");
        assert_eq!(world.plan(), Plan::default());
    }

    let mut world = World::of(&["", "", ""], 3, 2, vec![value(&[1, 2, 3], Some(1), &[1, 2, 3])]);
    world.go(2, FOR_GOOD_MS);
    world.go(3, FOR_GOOD_MS);
    world.replicate(2);
    world.topic(2, 2, 1);
    world.settle(2);
    assert_eq!(world.plan().waiting, [(id(0), Waiting::ForBrokers)]);
    world.come(3, "");
    world.settle(2);
    assert_eq!(world.partition(0).replicas, ids(&[1, 3]), "one that comes back will do");
}

proptest! {
    /// Nobody catches up while moves begin, then brokers go: no move of a partition that is led waits for them.
    #[test]
    fn no_move_waits_for_a_broker_that_is_gone_for_good(
        (mut world, min_insync) in worlds(),
        gone in prop::collection::vec(1_u32..7, 1..4),
    ) {
        (world.limits.moves, world.limits.moves_to_one) = (100, 100);
        for _ in 0..3 {
            let plan = world.plan();
            world.carry_out(&plan);
        }
        for number in gone {
            if world.is_live(BrokerId(number)) {
                world.go(number, FOR_GOOD_MS);
            }
        }
        world.settle(min_insync);
        for number in 0..32 {
            let Some((bytes, _)) = world.entries.get(&world.keys.partition(id(number))) else { break };
            let value = PartitionValue::decode("k", bytes).unwrap();
            let lost = |id: &BrokerId| world.gone_ms.get(id).is_some_and(|ms| *ms >= FOR_GOOD_MS);
            prop_assert!(value.leader.is_none() || !value.adding.iter().any(lost), "{:?}", value);
        }
    }
}
