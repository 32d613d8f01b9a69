//! Plans of small clusters, which the test applies: each rule alone, and all together until no change remains.

use std::collections::BTreeSet;

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::{
    cluster::{
        endpoints::Endpoints,
        keys::{BrokerValue, DrainValue, Key, Keys, Value},
        store::{KeyValue, ListResult},
    },
    model::{LeaderEpoch, TopicId, TopicName},
};

mod offline;
mod unreachable;

/// Metadata of a simulated cluster, and the input of its planner. Plans are applied to the metadata.
#[derive(Clone, Debug)]
struct World {
    keys: Keys,
    entries: BTreeMap<String, (Bytes, Revision)>,
    revision: Revision,
    offline_ms: BTreeMap<BrokerId, u64>,
    online_ms: BTreeMap<BrokerId, u64>,
    limits: PlannerLimits,
}

fn topic() -> TopicId {
    TopicId::from_bytes([7; 16])
}

fn id(number: u32) -> PartitionId {
    PartitionId::new(topic(), number)
}

fn ids(numbers: &[u32]) -> Vec<BrokerId> {
    numbers.iter().copied().map(BrokerId).collect()
}

fn value(replicas: &[u32], leader: Option<u32>, isr: &[u32]) -> PartitionValue {
    let base = PartitionValue::new(ids(replicas), LeaderEpoch(5));
    PartitionValue { leader: leader.map(BrokerId), isr: ids(isr), ..base }
}

impl World {
    /// Returns a world with brokers `1..=racks.len()`, online for 100 s, and one topic with these partition values. A
    /// broker with the rack `""` has none.
    fn of(racks: &[&str], factor: u32, min_insync: usize, values: Vec<PartitionValue>) -> Self {
        let mut world = Self {
            keys: Keys::new("test").unwrap(),
            entries: BTreeMap::new(),
            revision: Revision(1),
            offline_ms: BTreeMap::new(),
            online_ms: BTreeMap::new(),
            limits: PlannerLimits::default(),
        };
        for (number, rack) in (1..).zip(racks) {
            world.register(number, rack);
        }
        world.set_topic(factor, min_insync, values.len());
        for (number, value) in (0..).zip(values) {
            world.put(&Key::Partition(id(number)), &value);
        }
        world
    }

    fn set_topic(&mut self, replication_factor: u32, min_insync: usize, partitions: usize) {
        let config = [("min.insync.replicas".to_owned(), min_insync.to_string())].into();
        let partitions = u32::try_from(partitions).unwrap();
        let value = TopicValue { id: topic(), partitions, replication_factor, config };
        self.put(&Key::Topic(TopicName::new("t").unwrap()), &value);
    }

    fn put(&mut self, key: &Key, value: &impl Value) {
        self.revision = self.revision.next();
        self.entries.insert(self.keys.path(key), (value.encode(), self.revision));
    }

    fn register(&mut self, number: u32, rack: &str) {
        let rack = Some(rack.to_owned()).filter(|rack| !rack.is_empty());
        let value = BrokerValue { rack, ..BrokerValue::running_at("a:1".to_owned()) };
        self.put(&Key::Broker(BrokerId(number)), &value);
        self.online_ms.insert(BrokerId(number), 100_000);
        self.offline_ms.remove(&BrokerId(number));
    }

    fn set_stopping(&mut self, number: u32) {
        self.update_flags(number, |value| value.state = BrokerState::Stopping);
    }

    fn set_disk_pressure(&mut self, number: u32) {
        self.update_flags(number, |value| value.disk_pressure = true);
    }

    fn limit_replicas(&mut self, number: u32, max: u32) {
        self.update_flags(number, |value| value.max_replicas = Some(max));
    }

    /// Removes the address for other brokers from the registration.
    fn remove_peer_address(&mut self, number: u32) {
        self.update_flags(number, |value| value.listeners = Endpoints::new("a:1".to_owned()));
    }

    fn replica_count(&self, number: u32) -> usize {
        self.metadata().partitions_on(BrokerId(number)).len()
    }

    fn update_flags(&mut self, number: u32, change: impl FnOnce(&mut BrokerValue)) {
        let path = self.keys.broker(BrokerId(number));
        let mut value = BrokerValue::decode(&path, &self.entries[&path].0).unwrap();
        change(&mut value);
        self.put(&Key::Broker(BrokerId(number)), &value);
    }

    fn unregister(&mut self, number: u32, offline_ms: u64) {
        self.entries.remove(&self.keys.broker(BrokerId(number)));
        self.revision = self.revision.next();
        self.offline_ms.insert(BrokerId(number), offline_ms);
    }

    fn drain(&mut self, number: u32) {
        self.put(&Key::Drain(BrokerId(number)), &DrainValue { since_ms: 0 });
    }

    fn metadata(&self) -> MetadataSnapshot {
        let entries = self.entries.iter().map(|(key, (value, revision))| KeyValue {
            key: key.clone(),
            value: value.clone(),
            create_revision: *revision,
            mod_revision: *revision,
            lease: None,
        });
        let mut metadata = MetadataSnapshot::default();
        metadata.replace(&self.keys, ListResult { revision: self.revision, entries: entries.collect() });
        metadata
    }

    fn plan(&self) -> ClusterPlan {
        let (metadata, defaults) = (self.metadata(), ConfigMap::new());
        let Self { offline_ms, online_ms, limits, .. } = self;
        plan(&PlannerInput { metadata: &metadata, defaults: &defaults, offline_ms, online_ms, limits: *limits })
    }

    fn partition(&self, number: u32) -> PartitionValue {
        let path = self.keys.partition(id(number));
        PartitionValue::decode(&path, &self.entries[&path].0).unwrap()
    }

    fn is_live(&self, id: BrokerId) -> bool {
        self.entries.contains_key(&self.keys.broker(id))
    }

    /// Applies a plan, and checks that each change has a valid value and the stored revision.
    fn apply_plan(&mut self, plan: &ClusterPlan) {
        let mut seen = BTreeSet::new();
        for PlannedChange { update, .. } in &plan.changes {
            assert!(seen.insert(update.id), "two changes of {}", update.id);
            assert_eq!(update.value.contradiction(), None, "{:?}", update.value);
            let path = self.keys.partition(update.id);
            assert_eq!(self.entries[&path].1, update.expected_revision);
            self.put(&Key::Partition(update.id), &update.value);
        }
    }

    /// Acts as the leaders: removes offline replicas from the ISR and admits live ones.
    fn replicate(&mut self, min_insync: usize) {
        for number in 0.. {
            let path = self.keys.partition(id(number));
            let Some((bytes, _)) = self.entries.get(&path) else { return };
            let value = PartitionValue::decode(&path, bytes).unwrap();
            if !value.leader.is_some_and(|leader| self.is_live(leader)) {
                continue;
            }
            let (live, offline): (BTreeSet<_>, BTreeSet<_>) = value.replicas.iter().partition(|id| self.is_live(**id));
            let next = value.shrink(&offline, min_insync).expand(&live, min_insync);
            if next != value {
                self.put(&Key::Partition(id(number)), &next);
            }
        }
    }

    /// Plans and replicates until no change remains. Returns the number of passes before that.
    fn plan_until_stable(&mut self, min_insync: usize) -> usize {
        for pass in 0..200 {
            let (plan, before) = (self.plan(), self.revision);
            self.apply_plan(&plan);
            self.replicate(min_insync);
            if self.revision == before {
                return pass;
            }
        }
        panic!("the plans do not end: {:?}", self.plan());
    }
}

fn changes(plan: &ClusterPlan) -> Vec<(ChangeReason, PartitionValue)> {
    plan.changes.iter().map(|change| (change.reason, change.update.value.clone())).collect()
}

/// Returns the only change of a plan.
fn only_change(world: &World) -> (ChangeReason, PartitionValue) {
    let changes = changes(&world.plan());
    assert_eq!(changes.len(), 1, "{changes:?}");
    changes[0].clone()
}

#[test]
fn healthy_cluster_needs_no_changes() {
    let values = vec![value(&[1, 2, 3], Some(1), &[1, 2, 3]), value(&[2, 3, 1], Some(2), &[2, 3, 1])];
    assert_eq!(World::of(&["a", "b", "c"], 3, 2, values).plan(), ClusterPlan::default());
}

#[test]
fn first_staying_in_sync_replica_is_elected() {
    let mut world = World::of(&["a", "b", "c"], 3, 1, vec![value(&[1, 2, 3], Some(1), &[1, 2, 3])]);
    world.unregister(1, 0);
    let (reason, elected) = only_change(&world);
    assert_eq!((reason, elected.leader, &elected.isr), (ChangeReason::Elected, Some(BrokerId(2)), &ids(&[2, 3])));
    assert_eq!(elected.leader_epoch, LeaderEpoch(6));
    world.set_stopping(2);
    assert_eq!(only_change(&world).1.leader, Some(BrokerId(3)), "a stopping broker would transfer leadership at once");
    world.unregister(3, 0);
    assert_eq!(only_change(&world).1.leader, Some(BrokerId(2)), "a stopping broker is better than no leader");
}

#[test]
fn partition_without_candidate_is_leaderless_and_blocked() {
    let mut lost = value(&[1, 2, 3], Some(1), &[1]);
    lost.elr = ids(&[2]);
    let mut world = World::of(&["a", "b", "c"], 3, 2, vec![lost]);
    world.unregister(1, 0);
    world.unregister(2, 0);
    let plan = world.plan();
    assert_eq!(plan.blocked, [(id(0), BlockedReason::NoLeader)]);
    assert_eq!(only_change(&world).0, ChangeReason::Leaderless);
    world.apply_plan(&plan);
    let plan = world.plan();
    assert_eq!((plan.changes.len(), plan.blocked.len()), (0, 1), "3 lacks committed records");
    world.register(2, "b");
    let (reason, elected) = only_change(&world);
    assert_eq!((reason, elected.leader, elected.isr), (ChangeReason::Elected, Some(BrokerId(2)), ids(&[2])));
}

#[test]
fn stopping_leader_transfers_to_running_replica() {
    let values = vec![value(&[1, 2, 3], Some(1), &[1, 2, 3]), value(&[2, 1, 3], Some(2), &[2, 1, 3])];
    let mut world = World::of(&["a", "b", "c"], 3, 2, values);
    world.set_stopping(1);
    let (reason, transferred) = only_change(&world);
    assert_eq!(
        (reason, transferred.leader, transferred.isr),
        (ChangeReason::ControlledShutdown, Some(BrokerId(2)), ids(&[1, 2, 3]))
    );
    world.set_stopping(2);
    world.set_stopping(3);
    assert_eq!(world.plan().changes, [], "no other broker can lead");
}

/// Regression: a leader with a full disk rejected every write while two in-sync replicas had space.
#[test]
fn full_disk_leader_transfers_unless_no_other_can_lead() {
    let mut world = World::of(&["", "", ""], 3, 1, vec![value(&[1, 2, 3], Some(1), &[1, 2, 3])]);
    world.update_flags(1, |value| value.disk_full = true);
    let (reason, transferred) = only_change(&world);
    assert_eq!(
        (reason, transferred.leader, transferred.isr.len()),
        (ChangeReason::ControlledShutdown, Some(BrokerId(2)), 3)
    );
    world.plan_until_stable(1);
    assert_eq!(world.partition(0).leader, Some(BrokerId(2)), "leadership does not return to the preferred leader");
    for number in [2, 3] {
        world.update_flags(number, |value| value.disk_full = true);
    }
    assert_eq!(world.plan().changes, [], "no other leader would be better");
    world.update_flags(3, |value| value.disk_full = false);
    world.unregister(2, 0);
    assert_eq!(only_change(&world).1.leader, Some(BrokerId(3)), "a broker with disk space is elected first");
    world.plan_until_stable(1);
    world.update_flags(1, |value| value.disk_full = false);
    world.plan_until_stable(1);
    assert_eq!(world.partition(0).leader, Some(BrokerId(1)));

    let mut single_in_sync = World::of(&["", ""], 2, 1, vec![value(&[1, 2], Some(1), &[1])]);
    single_in_sync.update_flags(1, |value| value.disk_full = true);
    assert_eq!(single_in_sync.plan().changes, [], "no other replica can lead");
}

#[test]
fn reassignment_copies_before_it_removes() {
    let mut world = World::of(&["", "", "", ""], 3, 2, vec![value(&[1, 2, 3], Some(1), &[1, 2, 3])]);
    let started = world.partition(0).start_reassignment(&ids(&[4, 2, 3])).unwrap();
    world.put(&Key::Partition(id(0)), &started);
    assert_eq!(world.plan().changes, [], "4 has not caught up");
    world.replicate(2);
    let (reason, value) = only_change(&world);
    assert_eq!(
        (reason, value.leader),
        (ChangeReason::ControlledShutdown, Some(BrokerId(4))),
        "the leader is removed: another one is elected first"
    );
    world.plan_until_stable(2);
    let value = world.partition(0);
    assert_eq!((value.replicas, value.leader), (ids(&[4, 2, 3]), Some(BrokerId(4))));
}

/// Both brokers crashed before the completion. The broker of the removed replica may return with all the data, and that
/// of the new replica may not. So the reassignment must not complete without a live leader.
#[test]
fn reassignment_completes_only_with_a_live_leader() {
    let mut world = World::of(&["", "", ""], 1, 1, vec![value(&[1], Some(1), &[1])]);
    let started = world.partition(0).start_reassignment(&ids(&[2])).unwrap();
    let copied = PartitionValue { isr: ids(&[1, 2]), leader: None, ..started };
    world.put(&Key::Partition(id(0)), &copied);
    world.unregister(1, 1000);
    world.unregister(2, 1000);
    assert_eq!(world.plan().changes, []);
    world.register(1, "");
    let (reason, value) = only_change(&world);
    assert_eq!((reason, value.leader, value.replicas.len()), (ChangeReason::Elected, Some(BrokerId(1)), 2));
}

/// Two topic names have values with one topic id, because a value was copied to another name. Each partition is planned
/// once.
#[test]
fn topic_with_two_names_gets_one_change_per_partition() {
    let mut world = World::of(&["", ""], 2, 1, vec![value(&[1, 2], None, &[1, 2])]);
    let metadata = world.metadata();
    let copied = metadata.topics().values().next().unwrap().value.clone();
    world.put(&Key::Topic(TopicName::new("u").unwrap()), &copied);
    assert_eq!(world.plan().changes.len(), 1);
}

/// Regression: a reassignment completed while a staying replica was not in sync. With a min ISR of two, only one copy
/// remained of records that two brokers had acknowledged.
#[test]
fn reassignment_keeps_replicas_that_min_isr_needs() {
    let mut world = World::of(&["", "", ""], 2, 2, vec![value(&[1, 2, 3], Some(1), &[1, 3])]);
    let started = world.partition(0).start_reassignment(&ids(&[1, 2])).unwrap();
    assert_eq!((&started.adding, &started.removing), (&ids(&[]), &ids(&[3])), "2 is an earlier replica");
    world.put(&Key::Partition(id(0)), &started);
    assert_eq!(world.plan().changes, [], "2 has not caught up");
    // Replica 3 has left the ISR, so the min ISR does not need it: it is removed, although replica 2 is not in sync.
    let dropped = started.shrink(&BTreeSet::from([BrokerId(3)]), 2);
    world.put(&Key::Partition(id(0)), &dropped);
    assert_eq!(only_change(&world).0, ChangeReason::ReassignmentCompleted);
    world.put(&Key::Partition(id(0)), &started);
    world.replicate(2);
    let (reason, value) = only_change(&world);
    assert_eq!((reason, value.replicas, value.isr), (ChangeReason::ReassignmentCompleted, ids(&[1, 2]), ids(&[1, 2])));
}

#[test]
fn queued_reassignments_start_first_and_within_limits() {
    let queued = |_| value(&[1, 2], Some(1), &[1, 2]).queue_reassignment(&ids(&[1, 4]));
    let mut values: Vec<_> = (0..5).map(queued).collect();
    values.push(value(&[1, 3], Some(1), &[1, 3]));
    let mut world = World::of(&["", "", "", ""], 2, 1, values);
    world.limits.balance = false;
    world.drain(3);
    let started = changes(&world.plan());
    assert_eq!(started.len(), 2, "the limit per broker: {started:?}");
    for (reason, value) in started {
        assert_eq!((reason, value.adding.as_slice()), (ChangeReason::ReassignmentStarted, &*ids(&[4])));
        assert!(!value.has_queued(), "a started reassignment is no longer queued");
    }
    world.limits.max_reassignments = 1;
    assert_eq!(only_change(&world).0, ChangeReason::ReassignmentStarted, "the drained broker waits longer");
    world.plan_until_stable(1);
    assert!((0..5).all(|number| world.partition(number).replicas == ids(&[1, 4])));
    assert!(!world.partition(5).replicas.contains(&BrokerId(3)));

    let mut world =
        World::of(&["", "", ""], 2, 1, vec![value(&[1, 2], Some(1), &[1, 2]).queue_reassignment(&ids(&[1, 3]))]);
    world.unregister(3, 0);
    let plan = world.plan();
    assert_eq!((plan.changes.len(), &*plan.blocked), (0, &[(id(0), BlockedReason::QueuedTarget)][..]));
    world.register(3, "");
    world.plan_until_stable(1);
    assert_eq!(world.partition(0).replicas, ids(&[1, 3]), "the reassignment starts when the broker is online");
}

/// Regression: a queued reassignment that started filled its new broker up to the replica limit. The plan then also
/// replaced the replica on a drained broker of the same partition. Two changes of one partition in a plan ended the
/// controller's process, and the next controller planned the same.
#[test]
fn started_reassignment_is_the_only_change_of_its_partition() {
    let queued = value(&[1, 2], Some(1), &[1, 2]).queue_reassignment(&ids(&[1, 3]));
    let mut world = World::of(&["", "", "", ""], 2, 1, vec![queued]);
    world.limit_replicas(3, 1);
    world.drain(2);
    let (reason, started) = only_change(&world);
    assert_eq!((reason, started.adding), (ChangeReason::ReassignmentStarted, ids(&[3])));
    world.plan_until_stable(1);
    assert_eq!(world.partition(0).replicas, ids(&[1, 3]));
}

#[test]
fn changed_factor_is_applied() {
    let values = (0..6).map(|_| value(&[1], Some(1), &[1])).collect();
    let mut world = World::of(&["a", "b", "a", "b"], 1, 1, values);
    world.set_topic(3, 1, 6);
    world.plan_until_stable(1);
    for number in 0..6 {
        let value = world.partition(number);
        assert_eq!((value.replicas.len(), value.isr.len()), (3, 3));
        assert!(value.replicas.iter().any(|id| id.0 % 2 == 0), "both racks: {value:?}");
    }
    world.set_topic(2, 1, 6);
    world.plan_until_stable(1);
    for number in 0..6 {
        let value = world.partition(number);
        assert_eq!((value.replicas.len(), value.isr.len()), (2, 2));
        assert_ne!(value.replicas[0].0 % 2, value.replicas[1].0 % 2, "both racks remain: {value:?}");
    }
}

#[test]
fn replicas_are_replaced_only_after_replace_delay() {
    let values = (0..4).map(|_| value(&[1, 2, 3], Some(1), &[1, 2, 3])).collect();
    let mut world = World::of(&["", "", "", ""], 3, 2, values);
    world.limits.balance = false;
    world.unregister(3, 1000);
    world.replicate(2);
    let plan = world.plan();
    assert_eq!((plan.changes.len(), plan.next_plan_ms), (0, Some(30 * 60 * 1000 - 1000)));
    world.unregister(3, 30 * 60 * 1000);
    let plan = world.plan();
    assert!(plan.changes.iter().all(|change| change.reason == ChangeReason::BrokerReplaced));
    assert_eq!(plan.changes.len(), 2, "the limit per broker");
    world.plan_until_stable(2);
    assert!((0..4).all(|number| world.partition(number).replicas == ids(&[1, 2, 4])));
    world.unregister(4, 30 * 60 * 1000);
    let plan = world.plan();
    assert_eq!((plan.changes.len(), plan.blocked.len()), (0, 4), "no broker is available: {plan:?}");
}

#[test]
fn drained_broker_is_emptied_and_stays_empty() {
    let values =
        vec![value(&[1, 2], Some(1), &[1, 2]), value(&[2, 3], Some(2), &[2, 3]), value(&[3, 1], Some(3), &[3, 1])];
    let mut world = World::of(&["", "", ""], 2, 1, values);
    world.drain(1);
    world.plan_until_stable(1);
    for number in 0..3 {
        let value = world.partition(number);
        assert!(!value.replicas.contains(&BrokerId(1)) && value.replicas.len() == 2, "{value:?}");
    }
}

#[test]
fn leadership_returns_to_stable_preferred_leader() {
    let mut world = World::of(&["", ""], 2, 1, vec![value(&[1, 2], Some(2), &[2, 1])]);
    world.online_ms.insert(BrokerId(1), 10_000);
    let plan = world.plan();
    assert_eq!((plan.changes.len(), plan.next_plan_ms), (0, Some(20_000)));
    world.online_ms.insert(BrokerId(1), 30_000);
    let (reason, value) = only_change(&world);
    assert_eq!((reason, value.leader), (ChangeReason::PreferredLeader, Some(BrokerId(1))));
}

#[test]
fn new_broker_gets_its_share_within_racks() {
    let values = (0..12).map(|_| value(&[1, 2], Some(1), &[1, 2])).collect();
    let mut world = World::of(&["a", "b", "b"], 2, 1, values);
    world.plan_until_stable(1);
    let replica_count = |broker| (0..12).filter(|n| world.partition(*n).replicas.contains(&BrokerId(broker))).count();
    assert_eq!(replica_count(1), 12, "alone in its rack");
    assert!(replica_count(3) >= 5, "{}", replica_count(3));
    let mut world = World::of(&["a", "b", "b"], 2, 1, (0..12).map(|_| value(&[1, 2], Some(1), &[1, 2])).collect());
    world.set_disk_pressure(3);
    assert_eq!(world.plan().changes, [], "no replica moves to a broker under disk pressure");
}

#[test]
fn broker_at_replica_limit_is_skipped_by_every_rule() {
    // Replacement of lost replicas, up to the limit of broker 4.
    let values = (0..4).map(|_| value(&[1, 2, 3], Some(1), &[1, 2, 3])).collect();
    let mut world = World::of(&["", "", "", ""], 3, 2, values);
    world.limit_replicas(4, 3);
    world.unregister(3, 30 * 60 * 1000);
    world.replicate(2);
    world.plan_until_stable(2);
    assert_eq!(world.replica_count(4), 3);
    assert_eq!(world.plan().blocked, [(id(3), BlockedReason::NoBrokers)]);
    world.limit_replicas(4, 4);
    world.plan_until_stable(2);
    assert_eq!((world.replica_count(4), world.plan().blocked), (4, vec![]), "the raised limit suffices");

    // A raised factor, and a drain, up to the limit of broker 2.
    let mut world = World::of(&["", ""], 1, 1, (0..4).map(|_| value(&[1], Some(1), &[1])).collect());
    world.limits.balance = false;
    world.limit_replicas(2, 3);
    world.set_topic(2, 1, 4);
    world.plan_until_stable(1);
    assert_eq!(world.replica_count(2), 3);
    let mut world = World::of(&["", ""], 1, 1, (0..4).map(|_| value(&[1], Some(1), &[1])).collect());
    world.limit_replicas(2, 1);
    world.drain(1);
    world.plan_until_stable(1);
    assert_eq!((world.replica_count(1), world.replica_count(2)), (3, 1));

    // Of two queued reassignments to broker 2, which has capacity for one replica, the second waits.
    let queued = |_| value(&[1], Some(1), &[1]).queue_reassignment(&ids(&[2]));
    let mut world = World::of(&["", ""], 1, 1, (0..2).map(queued).collect());
    world.limits.balance = false;
    world.limit_replicas(2, 1);
    world.plan_until_stable(1);
    assert_eq!((world.replica_count(2), world.plan().blocked), (1, vec![(id(1), BlockedReason::QueuedTarget)]));

    // Balance: no replica moves to broker 2, the least loaded one, at its limit of 0. Broker 1, at its limit of 12,
    // still gives replicas to broker 3.
    let mut world = World::of(&["", "", ""], 1, 1, (0..12).map(|_| value(&[1], Some(1), &[1])).collect());
    world.limit_replicas(1, 12);
    world.limit_replicas(2, 0);
    world.plan_until_stable(1);
    assert_eq!((world.replica_count(1) + world.replica_count(3), world.replica_count(2)), (12, 0));
    assert!(world.replica_count(3) >= 5, "{}", world.replica_count(3));
}

prop_compose! {
    fn worlds()(
        racks in prop::collection::vec(prop::sample::select(vec!["", "a", "b", "c"]), 3..7),
        factor in 1_u32..4,
        min_insync in 1_usize..3,
        partitions in prop::collection::vec((prop::sample::subsequence((1_u32..7).collect::<Vec<_>>(), 1..4), any::<u8>()), 1..12),
        offline in prop::collection::vec((1_u32..7, prop::bool::ANY), 0..3),
        stops in prop::collection::vec(1_u32..7, 0..2),
        drains in prop::collection::vec(1_u32..7, 0..2),
        bounds in prop::collection::vec((1_u32..7, 0_u32..8), 0..4),
        queued in prop::collection::vec(prop::option::of(prop::sample::subsequence((1_u32..7).collect::<Vec<_>>(), 1..4)), 12),
    ) -> (World, usize) {
        let count = u32::try_from(racks.len()).unwrap();
        let mut targets = queued.into_iter();
        let values = partitions.into_iter().map(|(replicas, bits)| {
            let mut replicas: Vec<u32> = replicas.into_iter().map(|id| (id - 1) % count + 1).collect();
            replicas.sort_unstable();
            replicas.dedup();
            let rotation = usize::from(bits) % replicas.len();
            replicas.rotate_left(rotation);
            let isr: Vec<u32> = replicas.iter().copied().enumerate().filter(|(n, _)| *n == 0 || bits >> n & 1 == 1).map(|(_, id)| id).collect();
            let leader = (bits & 0x80 == 0).then_some(isr[0]);
            let value = value(&replicas, leader, &isr);
            match targets.next().flatten() {
                Some(mut target) => {
                    target.retain(|id| *id <= count);
                    if target.is_empty() { value } else { value.queue_reassignment(&ids(&target)) }
                }
                None => value,
            }
        }).collect();
        let mut world = World::of(&racks, factor.min(count), min_insync, values);
        for (number, lost) in offline.into_iter().filter(|(number, _)| *number <= count) {
            world.unregister(number, if lost { 1 << 40 } else { 0 });
        }
        for number in stops.into_iter().filter(|number| world.is_live(BrokerId(*number))).collect::<Vec<_>>() {
            world.set_stopping(number);
        }
        drains.into_iter().for_each(|number| world.drain(number));
        for (number, max) in bounds.into_iter().filter(|(number, _)| world.is_live(BrokerId(*number))).collect::<Vec<_>>() {
            world.limit_replicas(number, max);
        }
        (world, min_insync)
    }
}

proptest! {
    #[test]
    fn plans_terminate_and_keep_in_sync_replicas((mut world, min_insync) in worlds()) {
        for _ in 0..200 {
            let (plan, before) = (world.plan(), world.clone());
            for PlannedChange { update, reason } in &plan.changes {
                let old = before.partition(update.id.number);
                let new = &update.value;
                let live = |set: &[BrokerId]| -> BTreeSet<BrokerId> { set.iter().copied().filter(|id| before.is_live(*id)).collect() };
                let lost: Vec<_> = live(&old.isr).difference(&live(&new.isr)).copied().collect();
                prop_assert!(lost.iter().all(|id| *reason == ChangeReason::ReassignmentCompleted && old.removing.contains(id)), "{reason:?} {old:?} → {new:?}");
                let epochs = (old.leader_epoch.0, new.leader_epoch.0);
                prop_assert_eq!(epochs.1 - epochs.0, u32::from(old.leader != new.leader));
                if let Some(leader) = new.leader.filter(|_| old.leader != new.leader) {
                    prop_assert!(before.is_live(leader) && (old.isr.contains(&leader) || old.elr.contains(&leader)));
                }
            }
            world.apply_plan(&plan);
            for (broker, entry) in before.metadata().brokers() {
                let (before_count, after_count) = (before.replica_count(broker.0), world.replica_count(broker.0));
                let max = entry.value.max_replicas.map_or(usize::MAX, |max| max as usize);
                prop_assert!(
                    after_count <= before_count.max(max),
                    "broker {broker} had {before_count} replicas and has {after_count}, limit {max}"
                );
            }
            world.replicate(min_insync);
            if world.revision == before.revision {
                // In a stable state, every partition with a live ISR or ELR member has a leader.
                for number in 0..32 {
                    let Some((bytes, _)) = world.entries.get(&world.keys.partition(id(number))) else { break };
                    let value = PartitionValue::decode("k", bytes).unwrap();
                    let may = value.isr.iter().chain(&value.elr).any(|id| world.is_live(*id));
                    prop_assert_eq!(value.leader.is_some(), may, "{:?}", value);
                }
                return Ok(());
            }
        }
        prop_assert!(false, "the plans do not end: {:?}", world.plan());
    }
}
