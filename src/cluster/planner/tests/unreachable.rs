//! Brokers without a registered address for other brokers: a replica there is never in sync.

use super::*;

#[test]
fn unreachable_broker_is_skipped_by_every_rule() {
    // Replacement of lost replicas.
    let values = (0..4).map(|_| value(&[1, 2, 3], Some(1), &[1, 2, 3])).collect();
    let mut world = World::of(&["", "", "", ""], 3, 2, values);
    world.remove_peer_address(4);
    world.unregister(3, 30 * 60 * 1000);
    world.replicate(2);
    world.plan_until_stable(2);
    assert_eq!((world.replica_count(4), world.plan().blocked.len()), (0, 4));

    // A raised factor; a drain; balance.
    let values = || (0..4).map(|_| value(&[1], Some(1), &[1])).collect();
    let mut world = World::of(&["", ""], 1, 1, values());
    world.remove_peer_address(2);
    world.set_topic(2, 1, 4);
    world.plan_until_stable(1);
    assert_eq!(world.replica_count(2), 0);
    world.set_topic(1, 1, 4);
    world.drain(1);
    world.plan_until_stable(1);
    assert_eq!((world.replica_count(1), world.replica_count(2)), (4, 0));
    let mut world = World::of(&["", ""], 1, 1, values());
    world.remove_peer_address(2);
    assert_eq!(world.plan().changes, []);

    // A queued reassignment waits until the broker is reachable.
    let mut world = World::of(&["", ""], 1, 1, vec![value(&[1], Some(1), &[1]).queue_reassignment(&ids(&[2]))]);
    world.remove_peer_address(2);
    world.plan_until_stable(1);
    assert_eq!((world.replica_count(2), world.plan().blocked), (0, vec![(id(0), BlockedReason::QueuedTarget)]));
    world.register(2, "");
    world.plan_until_stable(1);
    assert_eq!((world.replica_count(2), world.plan().blocked), (1, vec![]));
}
