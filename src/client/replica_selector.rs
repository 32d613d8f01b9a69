//! Selection of the replica that a consumer reads. Pure.
//!
//! A consumer with a rack reads at the leader if the leader is in that rack, because the leader has the newest state.
//! Else the consumer reads at an in-sync follower in the rack (KIP-392), or at the leader if there is none. Several
//! followers share the partitions of a topic. All consumers of the rack read a partition at the same follower, so that
//! later reads find the data in that broker's memory.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use super::route::PartitionRoute;
use crate::model::BrokerId;

/// Returns the broker at which a consumer in `rack` reads `partition` (topic and number). `rack_of` returns the racks
/// of registered brokers. Without a rack, or without an in-sync replica in the rack, returns the leader, or `None` if
/// there is no leader.
pub(super) fn select_replica<'a>(
    rack: Option<&str>,
    partition: (&str, u32),
    route: &PartitionRoute,
    rack_of: impl Fn(BrokerId) -> Option<&'a str>,
) -> Option<BrokerId> {
    let Some(rack) = rack.filter(|rack| !rack.is_empty()) else { return route.leader };
    let is_in_rack = |broker: &BrokerId| rack_of(*broker) == Some(rack);
    if route.leader.as_ref().is_some_and(is_in_rack) {
        return route.leader;
    }
    let in_sync = |broker: &&BrokerId| route.isr.contains(broker);
    let mut in_rack: Vec<BrokerId> =
        route.replicas.iter().filter(in_sync).filter(|id| is_in_rack(id)).copied().collect();
    in_rack.sort_unstable();
    // Consecutive partitions rotate through the followers. The topic's hash selects the follower of partition 0, so
    // that topics with one partition do not all use the same broker.
    let (topic, number) = partition;
    let mut hasher = DefaultHasher::new();
    topic.hash(&mut hasher);
    let rotation = hasher.finish().wrapping_add(number.into());
    let index = rotation.checked_rem(in_rack.len() as u64).and_then(|index| usize::try_from(index).ok());
    index.and_then(|index| in_rack.get(index).copied()).or(route.leader)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn ids(numbers: &[u32]) -> Vec<BrokerId> {
        numbers.iter().copied().map(BrokerId).collect()
    }

    fn route(leader: Option<u32>, replicas: &[u32], isr: &[u32]) -> PartitionRoute {
        let leader = leader.map(BrokerId);
        PartitionRoute { leader, replicas: ids(replicas), isr: ids(isr), ..PartitionRoute::default() }
    }

    /// Returns the rack of a broker: "a", "b", "b" and "" for brokers 1 to 4; other brokers are not registered.
    fn rack_of(broker: BrokerId) -> Option<&'static str> {
        [(1, "a"), (2, "b"), (3, "b"), (4, "")].into_iter().find(|(id, _)| *id == broker.0).map(|(_, rack)| rack)
    }

    #[test]
    fn in_sync_replica_in_rack_is_read_else_the_leader() {
        let read = |rack, route: &PartitionRoute| select_replica(rack, ("t", 0), route, rack_of).map(|id| id.0);
        let in_sync = route(Some(1), &[1, 2], &[1, 2]);
        assert_eq!(read(None, &in_sync), Some(1));
        assert_eq!(read(Some(""), &route(Some(1), &[1, 4], &[1, 4])), Some(1), "an empty name is no rack");
        assert_eq!(read(Some("b"), &in_sync), Some(2));
        assert_eq!(read(Some("c"), &in_sync), Some(1), "no replica is in the rack");
        assert_eq!(read(Some("b"), &route(Some(1), &[1, 2], &[1])), Some(1), "not in sync");
        assert_eq!(read(Some("b"), &route(Some(1), &[1, 9], &[1, 9])), Some(1), "not registered");
        assert_eq!(read(Some("b"), &route(Some(3), &[2, 3], &[2, 3])), Some(3), "the leader is in the rack");
        assert_eq!(read(Some("b"), &route(None, &[1, 2], &[1, 2])), Some(2), "in sync without a leader");
        assert_eq!(read(Some("a"), &route(None, &[2], &[2])), None);
    }

    #[test]
    fn several_followers_in_rack_share_partitions() {
        let route = route(Some(1), &[1, 2, 3], &[1, 2, 3]);
        let mut shares: BTreeMap<u32, u32> = BTreeMap::new();
        for partition in 0..10 {
            *shares.entry(select_replica(Some("b"), ("t", partition), &route, rack_of).expect("one").0).or_default() +=
                1;
        }
        assert_eq!(shares, BTreeMap::from([(2, 5), (3, 5)]));
    }

    proptest! {
        #[test]
        fn selected_replica_is_leader_or_in_sync_in_rack(
            leader in proptest::option::of(1..5_u32),
            replicas in proptest::collection::btree_set(1..6_u32, 0..5),
            isr in proptest::collection::btree_set(1..6_u32, 0..5),
            partition: u32,
        ) {
            let (replicas, isr): (Vec<u32>, Vec<u32>) = (replicas.into_iter().collect(), isr.into_iter().collect());
            let route = route(leader, &replicas, &isr);
            let read = select_replica(Some("b"), ("t", partition), &route, rack_of);
            let is_candidate = |id: BrokerId| {
                let is_in_sync = route.isr.contains(&id) && route.replicas.contains(&id);
                rack_of(id) == Some("b") && (route.leader == Some(id) || is_in_sync)
            };
            let has_candidate = (1..6).map(BrokerId).any(is_candidate);
            let reads_candidate = read.is_some_and(is_candidate);
            prop_assert_eq!(has_candidate, reads_candidate, "a replica in the rack is read if there is one");
            prop_assert!(has_candidate || read == route.leader, "{read:?}");
        }
    }
}
