//! Operations on a small cluster over the in-memory store: writes, rejections and conflicts.

use futures::FutureExt as _;

use super::*;
use crate::{
    cluster::{
        embedded::EmbeddedStore,
        endpoints::Endpoints,
        faulty::{Fault, FaultyStore},
        keys::{BrokerState, BrokerValue, DrainValue, Key, Value},
        placement::ReplicaLimitExceeded,
        planner::{PlannerInput, PlannerLimits, plan},
        stats::{LeaderStats, ReplicaCounts},
        store::{Transaction, TxnOutcome},
    },
    model::{LeaderEpoch, Offset, TopicId},
    task::Tasks,
};

const TOPIC: &str = "orders";

struct TestCluster {
    store: EmbeddedStore,
    keys: Keys,
    operations: ClusterOperations,
    _tasks: Tasks,
}

fn ids(numbers: &[u32]) -> Vec<BrokerId> {
    numbers.iter().copied().map(BrokerId).collect()
}

fn name() -> TopicName {
    TOPIC.parse().expect("valid")
}

fn id(number: u32) -> PartitionId {
    PartitionId::new(TopicId::from_bytes([7; 16]), number)
}

fn value(replicas: &[u32], leader: Option<u32>, isr: &[u32]) -> PartitionValue {
    let base = PartitionValue::new(ids(replicas), LeaderEpoch(5));
    PartitionValue { leader: leader.map(BrokerId), isr: ids(isr), ..base }
}

fn broker_value(broker: u32, state: BrokerState) -> BrokerValue {
    BrokerValue { state, ..BrokerValue::running_at(format!("b{broker}:9460")) }
}

impl TestCluster {
    /// Returns a cluster with brokers `1..=brokers` and one topic. The topic has one partition for each of the values,
    /// and a min ISR of 2.
    async fn of(brokers: u32, factor: u32, values: Vec<PartitionValue>) -> Self {
        let store = EmbeddedStore::in_memory();
        let (keys, tasks) = (Keys::new("test").expect("valid"), Tasks::new());
        let metadata = MetadataCache::start(Arc::new(store.clone()), keys.clone(), &tasks);
        let operations = ClusterOperations::new(Arc::new(store.clone()), keys.clone(), metadata, ConfigMap::new());
        let cluster = Self { store, keys, operations, _tasks: tasks };
        for broker in 1..=brokers {
            cluster.register(broker, BrokerState::Running).await;
        }
        let partitions = u32::try_from(values.len()).expect("few");
        let config = ConfigMap::from([("min.insync.replicas".to_owned(), "2".to_owned())]);
        let topic = TopicValue { id: id(0).topic, partitions, replication_factor: factor, config };
        cluster.put(&Key::Topic(name()), &topic).await;
        for (number, value) in (0..).zip(values) {
            cluster.put(&Key::Partition(id(number)), &value).await;
        }
        cluster
    }

    async fn register(&self, broker: u32, state: BrokerState) {
        self.put(&Key::Broker(BrokerId(broker)), &broker_value(broker, state)).await;
    }

    async fn set_disk_pressure(&self, broker: u32) {
        let value = BrokerValue { disk_pressure: true, ..broker_value(broker, BrokerState::Running) };
        self.put(&Key::Broker(BrokerId(broker)), &value).await;
    }

    async fn write(&self, transaction: Transaction) -> Revision {
        let revision = match self.store.transact(transaction).await.expect("the store responds") {
            TxnOutcome::Committed { revision } => revision,
            refused @ TxnOutcome::CompareFailed { .. } => panic!("{refused:?}"),
        };
        self.operations.metadata.wait_for_revision(revision).await;
        revision
    }

    async fn put(&self, key: &Key, value: &impl Value) -> Revision {
        self.write(Transaction::new().put(self.keys.path(key), value.encode())).await
    }

    async fn unregister(&self, broker: u32) {
        self.write(Transaction::new().delete(self.keys.broker(BrokerId(broker)))).await;
    }

    /// Returns the partitions whose replica on a broker the controller's next plan removes, without its limits.
    fn planned_removals(&self, broker: u32) -> Vec<PartitionId> {
        let (metadata, no_times) = (self.operations.metadata.state(), BTreeMap::new());
        let plan = plan(&PlannerInput {
            metadata: &metadata,
            defaults: &self.operations.defaults,
            offline_ms: &no_times,
            online_ms: &no_times,
            limits: PlannerLimits {
                max_reassignments: usize::MAX,
                max_new_replicas_per_broker: usize::MAX,
                ..PlannerLimits::default()
            },
        });
        let updates = plan.changes.into_iter().map(|change| change.update);
        updates.filter(|update| update.value.removing.contains(&BrokerId(broker))).map(|update| update.id).collect()
    }

    async fn stored_value(&self, number: u32) -> PartitionValue {
        let key = self.keys.partition(id(number));
        let entry = self.store.get(&key).await.expect("the store responds").entry.expect("the partition exists");
        PartitionValue::decode(&key, &entry.value).expect("valid")
    }
}

/// Regression: an operation on 100,000 partitions decided all of them without yielding to other tasks.
#[tokio::test]
async fn large_operation_yields_to_other_tasks() {
    let values = (0..MAX_DECISIONS_BEFORE_YIELD).map(|_| value(&[1, 2], Some(1), &[1, 2])).collect();
    let cluster = TestCluster::of(2, 2, values).await;
    let (topic, reversed) = (name(), ids(&[2, 1]));
    let single = cluster.operations.reassign(&topic, Some(0), &reversed).now_or_never();
    assert!(single.is_some_and(|results| results.is_ok()), "the in-memory store never waits");
    assert!(cluster.operations.reassign(&topic, None, &reversed).now_or_never().is_none());
    let results = cluster.operations.reassign(&topic, None, &reversed).await.expect("accepted");
    assert_eq!(results.len(), MAX_DECISIONS_BEFORE_YIELD);
}

#[tokio::test]
async fn reassignment_of_all_partitions_rotates_the_list() {
    let values = (0..3).map(|_| value(&[1, 2], Some(1), &[1, 2])).collect();
    let cluster = TestCluster::of(3, 2, values).await;
    let single = cluster.operations.reassign(&name(), Some(1), &ids(&[3, 2])).await.expect("accepted");
    assert_eq!((single.len(), single[0].id, single[0].changed), (1, id(1), true));
    let stored = cluster.stored_value(1).await;
    assert_eq!((stored.replicas, stored.queued_replicas), (ids(&[1, 2]), ids(&[3, 2])), "the reassignment is queued");

    cluster.operations.wait_until_cached(&single).await;
    let results = cluster.operations.reassign(&name(), None, &ids(&[2, 3])).await.expect("accepted");
    let targets: Vec<Vec<BrokerId>> = results.iter().map(|result| result.value.queued_replicas.clone()).collect();
    assert_eq!(targets, [ids(&[2, 3]), ids(&[3, 2]), ids(&[2, 3])], "preferred leaders are spread");
    assert_eq!(
        results.iter().map(|result| result.changed).collect::<Vec<_>>(),
        [true, false, true],
        "one target was queued already"
    );

    cluster.operations.wait_until_cached(&results).await;
    let reassigning = cluster.operations.list_reassignments(None, None).expect("listed");
    assert_eq!(reassigning.iter().map(|result| result.id).collect::<Vec<_>>(), [id(0), id(1), id(2)]);
    assert_eq!(cluster.operations.list_reassignments(Some(&name()), Some(2)).expect("listed").len(), 1);
}

#[tokio::test]
async fn reassignment_without_copy_or_in_progress_is_not_queued() {
    let mut reassigning = value(&[3, 2, 1], Some(1), &[1, 2]);
    (reassigning.adding, reassigning.removing) = (ids(&[3]), ids(&[1]));
    let waiting = value(&[1, 2], Some(1), &[1, 2]).queue_reassignment(&ids(&[3, 2]));
    let cluster =
        TestCluster::of(4, 2, vec![value(&[1, 2], Some(1), &[1, 2]), reassigning, waiting.clone(), waiting]).await;
    let reassign = async |number, to: &[u32]| {
        cluster.operations.reassign(&name(), Some(number), &ids(to)).await.expect("accepted")
    };
    let reversed = &reassign(0, &[2, 1]).await[0].value;
    assert_eq!((&reversed.replicas, reversed.has_queued()), (&ids(&[2, 1]), false), "only the order changes");
    let replaced = &reassign(1, &[4, 2]).await[0].value;
    assert_eq!(
        (&replaced.replicas, replaced.has_queued()),
        (&ids(&[4, 2, 1]), false),
        "a replaced reassignment keeps its slot"
    );
    assert_eq!(replaced.removal_count, 1, "3 was never in sync");
    let requeued = &reassign(2, &[4, 1]).await[0].value;
    assert_eq!(
        (&requeued.replicas, &requeued.queued_replicas),
        (&ids(&[1, 2]), &ids(&[4, 1])),
        "the last request counts"
    );
    let dequeued = &reassign(2, &[1, 2]).await[0];
    assert!(dequeued.changed && !dequeued.value.has_queued(), "the target is reached: {dequeued:?}");
    let cancelled = cluster.operations.cancel(Some(&name()), Some(3)).await.expect("cancelled");
    assert_eq!((cancelled[0].changed, cluster.stored_value(3).await), (true, value(&[1, 2], Some(1), &[1, 2])));
}

#[tokio::test]
async fn broker_under_disk_pressure_gets_no_new_replicas() {
    let cluster = TestCluster::of(3, 2, vec![value(&[1, 2], Some(1), &[1, 2]), value(&[3, 2], Some(3), &[3, 2])]).await;
    cluster.set_disk_pressure(3).await;
    let full = cluster.operations.reassign(&name(), Some(0), &ids(&[3, 2])).await.expect_err("under disk pressure");
    assert_eq!(full, ReassignError::DiskPressure { ids: ids(&[3]), partition: format!("{TOPIC}/0") });
    assert!(full.to_string().contains("broker 3, under disk pressure (broker.disk_pressure_percent)"), "{full}");
    cluster.operations.reassign(&name(), Some(1), &ids(&[3, 1])).await.expect("the broker holds a replica already");
}

#[tokio::test]
async fn unreachable_broker_gets_no_new_replicas() {
    let cluster = TestCluster::of(3, 2, vec![value(&[1, 2], Some(1), &[1, 2]), value(&[3, 2], Some(3), &[3, 2])]).await;
    let listeners = Endpoints::new("b3:9460".to_owned());
    let hidden = BrokerValue { listeners, ..broker_value(3, BrokerState::Running) };
    cluster.put(&Key::Broker(BrokerId(3)), &hidden).await;
    let refused = cluster.operations.reassign(&name(), Some(0), &ids(&[3, 2])).await.expect_err("unreachable");
    assert_eq!(refused, ReassignError::Unreachable { ids: ids(&[3]), partition: format!("{TOPIC}/0") });
    cluster.operations.reassign(&name(), Some(1), &ids(&[3, 1])).await.expect("the broker holds a replica already");
    let drained = cluster.operations.drain(BrokerId(2), 0).await.expect("accepted");
    assert_eq!(
        (drained.blocked.len(), drained.eligible_brokers),
        (1, 1),
        "broker 1 takes the replica of partition 1 alone"
    );
}

#[tokio::test]
async fn broker_at_replica_limit_gets_no_new_replicas() {
    let values =
        vec![value(&[1, 2], Some(1), &[1, 2]), value(&[2, 3], Some(2), &[2, 3]), value(&[1, 2], Some(1), &[1, 2])];
    let cluster = TestCluster::of(3, 2, values).await;
    let bounded = BrokerValue { max_replicas: Some(2), ..broker_value(3, BrokerState::Running) };
    cluster.put(&Key::Broker(BrokerId(3)), &bounded).await;
    let reassign = async |partition, to: &[u32]| cluster.operations.reassign(&name(), partition, &ids(to)).await;
    let error = reassign(None, &[1, 3]).await.expect_err("above the replica limit");
    assert_eq!(error, ReassignError::ReplicaLimit(ReplicaLimitExceeded { broker: BrokerId(3), replicas: 3, max: 2 }));
    assert!(cluster.operations.list_reassignments(None, None).expect("listed").is_empty(), "nothing is queued");

    let first = reassign(Some(0), &[1, 3]).await.expect("within the limit");
    cluster.operations.wait_until_cached(&first).await;
    let second = reassign(Some(2), &[1, 3]).await;
    assert!(matches!(second, Err(ReassignError::ReplicaLimit(_))), "queued replicas count: {second:?}");
    reassign(Some(1), &[3, 2]).await.expect("the broker holds a replica already");
}

#[tokio::test]
async fn drain_counts_replicas_above_other_brokers_limits() {
    let values = (0..5).map(|_| value(&[1], Some(1), &[1])).collect();
    let cluster = TestCluster::of(2, 1, values).await;
    let bounded = BrokerValue { max_replicas: Some(3), ..broker_value(2, BrokerState::Running) };
    cluster.put(&Key::Broker(BrokerId(2)), &bounded).await;
    let drained = cluster.operations.drain(BrokerId(1), 0).await.expect("accepted");
    assert_eq!((drained.replicas, drained.blocked.len(), drained.eligible_brokers), (5, 2, 1));
}

#[tokio::test]
async fn invalid_reassignment_is_rejected_and_changes_nothing() {
    let cluster = TestCluster::of(3, 2, vec![value(&[1, 2], Some(1), &[1, 2]), value(&[2, 4], Some(2), &[2])]).await;
    cluster.put(&Key::Drain(BrokerId(3)), &DrainValue { since_ms: 1 }).await;
    let reassign = async |partition, replicas: &[u32]| {
        cluster.operations.reassign(&name(), partition, &ids(replicas)).await.expect_err("rejected")
    };
    assert_eq!(reassign(None, &[1, 1]).await, ReassignError::Repeated { id: BrokerId(1) });
    let unknown = reassign(Some(0), &[1, 9]).await;
    assert_eq!(unknown.to_string(), "the cluster has no broker 9: it has 1, 2, 3 and 4");
    let factor = reassign(Some(0), &[1]).await;
    assert_eq!(factor, ReassignError::WrongBrokerCount { topic: name(), factor: 2, requested: 1 });
    assert!(factor.to_string().contains("--replication-factor 1"), "{factor}");
    assert_eq!(reassign(Some(0), &[1, 3]).await, ReassignError::Draining { ids: ids(&[3]) });
    let offline = reassign(None, &[4, 2]).await;
    assert_eq!(offline, ReassignError::Offline { ids: ids(&[4]), partition: format!("{TOPIC}/0") });
    let partition = reassign(Some(2), &[1, 2]).await;
    assert_eq!(partition.to_string(), "topic \"orders\" has no partition 2: it has 2, numbered from 0");
    let order: TopicName = "order".parse().expect("valid");
    let topic = cluster.operations.reassign(&order, None, &ids(&[1, 2])).await.expect_err("rejected").to_string();
    assert_eq!(topic, "topic \"order\" does not exist");
    assert!(cluster.operations.list_reassignments(None, None).expect("listed").is_empty());
    cluster
        .operations
        .reassign(&name(), Some(1), &ids(&[4, 2]))
        .await
        .expect("an offline holder of a replica is a valid target");
}

#[tokio::test]
async fn cancelled_reassignment_elects_an_earlier_replica() {
    let mut reassigning = value(&[3, 2, 1], Some(1), &[1, 2]);
    (reassigning.adding, reassigning.removing) = (ids(&[3]), ids(&[1]));
    let led = PartitionValue { leader: Some(BrokerId(3)), isr: ids(&[1, 2, 3]), ..reassigning.clone() };
    let only_new = PartitionValue { leader: Some(BrokerId(3)), isr: ids(&[3]), ..reassigning.clone() };
    let unchanged = value(&[1, 2], Some(1), &[1, 2]);
    let cluster = TestCluster::of(3, 2, vec![reassigning, led, only_new, unchanged]).await;

    let cancelled = cluster.operations.cancel(Some(&name()), Some(0)).await.expect("cancelled");
    assert_eq!((cancelled.len(), cancelled[0].changed), (1, true));
    let stored = cluster.stored_value(0).await;
    assert_eq!(
        (stored.replicas, stored.leader, stored.leader_epoch),
        (ids(&[2, 1]), Some(BrokerId(1)), LeaderEpoch(5))
    );

    cluster.operations.cancel(Some(&name()), Some(1)).await.expect("cancelled");
    let stored = cluster.stored_value(1).await;
    assert_eq!(
        (stored.replicas, stored.leader, stored.leader_epoch),
        (ids(&[2, 1]), Some(BrokerId(2)), LeaderEpoch(6))
    );
    assert_eq!(stored.isr, ids(&[1, 2]));

    let only = cluster.operations.cancel(Some(&name()), Some(2)).await.expect_err("no earlier replica is in sync");
    assert_eq!(only, CancelError::NoEarlierReplicaInSync { partition: format!("{TOPIC}/2") });
    let nothing = cluster.operations.cancel(Some(&name()), Some(3)).await.expect_err("no reassignment");
    assert_eq!(nothing.to_string(), "nothing to cancel: partition orders/3 is not being reassigned");
    let unknown = cluster.operations.cancel(Some(&name()), Some(4)).await.expect_err("no such partition");
    assert!(matches!(unknown, CancelError::Unknown(TargetError::Partition(_))), "{unknown}");
}

#[tokio::test]
async fn drain_reports_movable_and_blocked_replicas() {
    let values =
        vec![value(&[1, 2], Some(1), &[1, 2]), value(&[2, 1], Some(2), &[1, 2]), value(&[3, 2], Some(3), &[3, 2])];
    let cluster = TestCluster::of(3, 2, values).await;
    let drained = cluster.operations.drain(BrokerId(1), 77).await.expect("accepted");
    let wanted = BrokerDrain {
        changed: true,
        since_ms: 77,
        leaders: 1,
        replicas: 2,
        blocked: vec![],
        leaderless: 0,
        eligible_brokers: 2,
    };
    assert_eq!(drained, wanted);
    let again = cluster.operations.drain(BrokerId(1), 99).await.expect("accepted");
    assert_eq!(again, BrokerDrain { changed: false, ..wanted }, "the start time stays");

    let second = cluster.operations.drain(BrokerId(2), 100).await.expect("accepted");
    assert_eq!(second.blocked, [id(0), id(2)], "broker 3 can take one replica of partitions 0 and 1, and none of 2");
    assert_eq!(cluster.operations.count_blocked(BrokerId(2)), 2, "the count is available later");
    assert_eq!((second.eligible_brokers, second.replicas), (1, 3));

    assert_eq!(cluster.operations.undrain(BrokerId(2)).await, Ok(true));
    assert_eq!(cluster.operations.undrain(BrokerId(2)).await, Ok(false));
    let unknown = cluster.operations.drain(BrokerId(8), 1).await.expect_err("unknown").to_string();
    assert_eq!(unknown, "the cluster has no broker 8: it has 1, 2 and 3");
    assert!(cluster.operations.undrain(BrokerId(8)).await.is_err());
    cluster.unregister(3).await;
    let offline = cluster.operations.drain(BrokerId(3), 1).await.expect("an offline broker may be drained");
    assert_eq!((offline.leaders, offline.blocked), (1, vec![id(2)]));
}

/// Regression: with several drained brokers and too few others, a drain counted replicas as blocked that the controller
/// moved. `broker drain` of the lost broker then failed, because no replica seemed to move.
#[tokio::test]
async fn drains_of_several_brokers_count_only_replicas_that_stay() {
    let cluster = TestCluster::of(4, 3, vec![value(&[1, 2, 3], Some(1), &[1, 2]); 2]).await;
    cluster.unregister(3).await;
    let live = cluster.operations.drain(BrokerId(2), 0).await.expect("accepted");
    assert_eq!((live.blocked, cluster.planned_removals(2)), (vec![], vec![id(0), id(1)]), "broker 3 may return");
    let lost = cluster.operations.drain(BrokerId(3), 0).await.expect("accepted");
    assert_eq!((lost.replicas, lost.blocked), (2, vec![]), "replicas on offline brokers are replaced first");
    assert_eq!(cluster.planned_removals(3), [id(0), id(1)]);
    assert_eq!((cluster.operations.count_blocked(BrokerId(2)), cluster.planned_removals(2)), (2, vec![]));

    // Both brokers are live. In each partition, the first of their replicas moves to broker 3.
    let values = vec![value(&[1, 2], Some(1), &[1, 2]), value(&[2, 1], Some(2), &[1, 2])];
    let cluster = TestCluster::of(3, 2, values).await;
    for (broker, stays) in [(1, vec![]), (2, vec![id(0)])] {
        let drained = cluster.operations.drain(BrokerId(broker), 0).await.expect("accepted");
        assert_eq!(drained.blocked, stays, "broker {broker}");
    }
    assert_eq!((cluster.planned_removals(1), cluster.planned_removals(2)), (vec![id(0)], vec![id(1)]));
    assert_eq!(cluster.operations.count_blocked(BrokerId(1)), 1, "partition 1");
}

/// Regression: until the controller had applied a lowered replication factor, a drain needed a new broker for a replica
/// that only had to be removed.
#[tokio::test]
async fn drain_after_lowered_factor_needs_no_new_broker() {
    let cluster = TestCluster::of(3, 2, vec![value(&[1, 2, 3], Some(2), &[1, 2, 3])]).await;
    let drained = cluster.operations.drain(BrokerId(1), 0).await.expect("accepted");
    assert_eq!((drained.replicas, drained.blocked), (1, vec![]));
    assert_eq!(cluster.planned_removals(1), [id(0)]);
}

/// Regression: `broker drain --wait` waited forever for a partition whose only replica was lost with its broker.
/// Replicas of partitions without a leader are counted separately, as replicas that cannot move.
#[tokio::test]
async fn drain_counts_leaderless_partitions_as_blocked() {
    let lost = value(&[1], None, &[1]);
    let reassigning = PartitionValue { replicas: ids(&[1, 3]), adding: ids(&[3]), removing: ids(&[1]), ..lost.clone() };
    let cluster = TestCluster::of(3, 1, vec![lost, reassigning, value(&[2], Some(2), &[2])]).await;
    cluster.unregister(1).await;
    let drained = cluster.operations.drain(BrokerId(1), 0).await.expect("accepted");
    assert_eq!((drained.replicas, drained.blocked, drained.leaderless), (2, vec![], 2), "no leader to copy from");
    assert_eq!(cluster.operations.count_blocked(BrokerId(1)), 2);
}

/// Regression: `broker drain --wait` waited half an hour without output, until the controller retargeted the
/// reassignment. While a broker that the reassignment needs is offline, the replica counts as blocked.
#[tokio::test]
async fn drain_is_blocked_while_needed_broker_is_offline() {
    let reassigning = PartitionValue { adding: ids(&[3]), removing: ids(&[1]), ..value(&[1, 2, 3], Some(1), &[1, 2]) };
    let cluster = TestCluster::of(3, 2, vec![reassigning]).await;
    let drained = cluster.operations.drain(BrokerId(1), 0).await.expect("accepted");
    assert_eq!((drained.replicas, drained.blocked), (1, vec![]), "the reassignment is in progress");
    cluster.unregister(3).await;
    assert_eq!(cluster.operations.count_blocked(BrokerId(1)), 1);
    cluster.register(4, BrokerState::Running).await;
    assert_eq!(
        cluster.operations.count_blocked(BrokerId(1)),
        1,
        "the controller uses the new broker only after the other is gone permanently"
    );
    cluster.register(3, BrokerState::Running).await;
    assert_eq!(cluster.operations.count_blocked(BrokerId(1)), 0, "the broker is online again");

    // Broker 3 is in sync, and broker 2 is not. Until broker 2 is in sync again, the min ISR of two needs broker 1.
    let needed = PartitionValue { adding: ids(&[3]), removing: ids(&[1]), ..value(&[1, 2, 3], Some(1), &[1, 3]) };
    let cluster = TestCluster::of(3, 2, vec![needed]).await;
    cluster.operations.drain(BrokerId(1), 0).await.expect("accepted");
    assert_eq!(cluster.operations.count_blocked(BrokerId(1)), 0, "broker 2 catches up");
    cluster.unregister(2).await;
    assert_eq!(cluster.operations.count_blocked(BrokerId(1)), 1);
}

/// Regression: while the last replicas were copied, an offline staying replica made a drain count as blocked, although
/// the other replicas satisfied the min ISR.
#[tokio::test]
async fn drain_is_not_blocked_by_dispensable_offline_replica() {
    let reassigning =
        PartitionValue { adding: ids(&[4]), removing: ids(&[1]), ..value(&[4, 2, 3, 1], Some(1), &[1, 3]) };
    let cluster = TestCluster::of(4, 2, vec![reassigning]).await;
    cluster.unregister(2).await;
    let drained = cluster.operations.drain(BrokerId(1), 0).await.expect("accepted");
    assert_eq!((drained.replicas, drained.blocked), (1, vec![]), "brokers 3 and 4 satisfy the min ISR");
}

/// Regression: `broker drain --wait` waited without output while an earlier reassignment of the partition waited for an
/// offline broker. The drained replica counts as blocked then, unless the offline broker is drained too.
#[tokio::test]
async fn drain_is_blocked_by_earlier_blocked_reassignment() {
    let reassigning = PartitionValue { adding: ids(&[3]), removing: ids(&[2]), ..value(&[1, 3, 2], Some(1), &[1, 2]) };
    let cluster = TestCluster::of(4, 2, vec![reassigning]).await;
    cluster.operations.drain(BrokerId(1), 0).await.expect("accepted");
    assert_eq!(cluster.operations.count_blocked(BrokerId(1)), 0, "broker 1 moves its replica to broker 4 afterwards");
    cluster.unregister(3).await;
    assert_eq!(cluster.operations.count_blocked(BrokerId(1)), 1);
    let offline = cluster.operations.drain(BrokerId(3), 0).await.expect("accepted");
    assert_eq!((offline.replicas, offline.blocked), (1, vec![]), "an offline drained broker is replaced at once");
    assert_eq!(cluster.operations.count_blocked(BrokerId(1)), 0);
}

/// Regression: a key with an unreadable value counted as an existing drain, so the request was ignored and no replica
/// moved.
#[tokio::test]
async fn unreadable_drain_is_overwritten() {
    let cluster = TestCluster::of(2, 1, vec![value(&[1], Some(1), &[1])]).await;
    let key = cluster.keys.drain(BrokerId(1));
    cluster.store.transact(Transaction::new().put(key.as_str(), "invalid")).await.expect("the store responds");
    let drained = cluster.operations.drain(BrokerId(1), 77).await.expect("accepted");
    assert_eq!((drained.changed, drained.since_ms), (true, 77));
    let entry = cluster.store.get(&key).await.expect("the store responds").entry.expect("the key exists");
    assert_eq!(DrainValue::decode(&key, &entry.value), Ok(DrainValue { since_ms: 77 }));
}

#[tokio::test]
async fn preferred_leader_is_elected_if_it_may_lead() {
    let cluster =
        TestCluster::of(3, 3, vec![value(&[1, 2, 3], Some(2), &[2, 1]), value(&[3, 2, 1], Some(2), &[2, 1])]).await;
    let elected = cluster.operations.elect(&name(), 0).await.expect("elected");
    assert_eq!((elected.value.leader, elected.value.leader_epoch), (Some(BrokerId(1)), LeaderEpoch(6)));
    assert_eq!(cluster.stored_value(0).await, elected.value);
    cluster.operations.wait_until_cached(std::slice::from_ref(&elected)).await;
    assert!(!cluster.operations.elect(&name(), 0).await.expect("it leads").changed);

    let not_eligible = |reason| ElectError::PreferredNotEligible {
        partition: format!("{TOPIC}/1"),
        id: BrokerId(3),
        leader: BrokerId(2),
        reason,
    };
    assert_eq!(cluster.operations.elect(&name(), 1).await, Err(not_eligible(PreferredLeaderIssue::NotInSync)));
    cluster.put(&Key::Partition(id(1)), &value(&[3, 2, 1], Some(2), &[2, 1, 3])).await;
    cluster.register(3, BrokerState::Stopping).await;
    assert_eq!(cluster.operations.elect(&name(), 1).await, Err(not_eligible(PreferredLeaderIssue::ShuttingDown)));
    cluster.unregister(3).await;
    assert_eq!(cluster.operations.elect(&name(), 1).await, Err(not_eligible(PreferredLeaderIssue::Offline)));
    cluster.unregister(2).await;
    let another = cluster.operations.elect(&name(), 1).await.expect("another replica can lead");
    assert_eq!((another.value.leader, another.value.isr), (Some(BrokerId(1)), ids(&[1])));
    assert_eq!(another.value.elr, ids(&[2, 3]), "below the min ISR the other members stay eligible");
}

#[tokio::test]
async fn unclean_election_requires_need_and_unchanged_value() {
    let mut waiting = value(&[1, 2, 3], None, &[1]);
    waiting.elr = ids(&[2]);
    let cluster = TestCluster::of(3, 3, vec![waiting.clone(), value(&[1, 2, 3], Some(2), &[2])]).await;
    let led = cluster.operations.leaderless_partition(&name(), 1).expect_err("it has a leader");
    assert_eq!(led, ElectError::HasLeader { partition: format!("{TOPIC}/1"), leader: BrokerId(2) });
    let clean = cluster.operations.leaderless_partition(&name(), 0).expect_err("1 can lead");
    assert_eq!(clean, ElectError::CleanPossible { partition: format!("{TOPIC}/0"), id: BrokerId(1) });
    cluster.unregister(1).await;
    let clean = cluster.operations.elect_unclean(&name(), 0, BrokerId(3), None, false).await.expect_err("2 can lead");
    assert_eq!(clean, ElectError::CleanPossible { partition: format!("{TOPIC}/0"), id: BrokerId(2) });
    cluster.unregister(2).await;
    let refused = cluster.operations.elect(&name(), 0).await.expect_err("no replica can lead");
    assert_eq!(refused, ElectError::NoCandidate { partition: format!("{TOPIC}/0"), waited_for: ids(&[1, 2]) });

    let seen = cluster.operations.leaderless_partition(&name(), 0).expect("no replica can lead");
    let offline = cluster
        .operations
        .elect_unclean(&name(), 0, BrokerId(1), Some(seen.revision), false)
        .await
        .expect_err("offline");
    assert!(offline.to_string().contains("has no replica of the partition (online replicas: 3)"), "{offline}");
    let later = cluster.put(&Key::Partition(id(0)), &PartitionValue { leader_epoch: LeaderEpoch(6), ..waiting }).await;
    let changed = cluster.operations.elect_unclean(&name(), 0, BrokerId(3), Some(seen.revision), false).await;
    assert_eq!(changed, Err(ElectError::Changed { partition: format!("{TOPIC}/0") }));
    let elected = cluster.operations.elect_unclean(&name(), 0, BrokerId(3), Some(later), false).await.expect("elected");
    let stored = cluster.stored_value(0).await;
    assert_eq!((stored.leader, &stored.isr, stored.elr.len()), (Some(BrokerId(3)), &ids(&[3]), 0));
    assert_eq!((stored.unclean_epoch, elected.changed), (Some(LeaderEpoch(7)), true));
}

/// The disk of the only replica was replaced, so its broker left ISR and ELR. The error then names no broker to wait
/// for, and an unclean election can elect this replica.
#[tokio::test]
async fn election_without_complete_replica_names_no_broker() {
    let cluster = TestCluster::of(2, 1, vec![value(&[1], None, &[])]).await;
    let refused = cluster.operations.elect(&name(), 0).await.expect_err("no eligible replica");
    assert_eq!(refused, ElectError::NoCandidate { partition: format!("{TOPIC}/0"), waited_for: vec![] });
    let text = refused.to_string();
    assert!(text.contains("no replica is known to hold all committed records; elect with --unclean"), "{text}");
    let seen = cluster.operations.leaderless_partition(&name(), 0).expect("no replica can lead");
    let elected =
        cluster.operations.elect_unclean(&name(), 0, BrokerId(1), Some(seen.revision), false).await.expect("elected");
    assert_eq!((elected.value.leader, &elected.value.isr), (Some(BrokerId(1)), &ids(&[1])));
}

#[test]
fn error_texts_use_singular_for_one_broker() {
    let no_response =
        |replicas: &[u32]| ElectError::NoResponse { partition: "a/0".to_owned(), replicas: ids(replicas) }.to_string();
    assert!(no_response(&[3]).ends_with("start broker 3"), "{}", no_response(&[3]));
    assert!(no_response(&[1, 2, 3]).ends_with("start one of the brokers 1, 2 and 3"), "{}", no_response(&[1, 2, 3]));
    let factor = |requested| ReassignError::WrongBrokerCount { topic: name(), factor: 2, requested }.to_string();
    assert!(factor(1).contains("and 1 broker is named: name 2"), "{}", factor(1));
    assert!(factor(3).contains("and 3 brokers are named: name 2"), "{}", factor(3));
}

/// An in-sync replica registers, and the metadata cache does not show it yet. The compares of the write reject the
/// election.
#[tokio::test]
async fn unclean_election_fails_after_return_of_in_sync_replica() {
    let cluster = TestCluster::of(2, 2, vec![value(&[1, 2], None, &[1])]).await;
    cluster.unregister(1).await;
    let faulty = FaultyStore::new(cluster.store.clone());
    faulty.break_watches();
    let (tasks, store): (Tasks, Arc<dyn MetaStore>) = (Tasks::new(), Arc::new(faulty));
    let stale = MetadataCache::start(Arc::clone(&store), cluster.keys.clone(), &tasks);
    stale.wait_for_revision(Revision::ZERO).await;
    let operations = ClusterOperations::new(store, cluster.keys.clone(), stale, ConfigMap::new());
    let seen = operations.leaderless_partition(&name(), 0).expect("leaderless in the stale cache");
    cluster.register(1, BrokerState::Running).await;
    let refused = operations
        .elect_unclean(&name(), 0, BrokerId(2), Some(seen.revision), false)
        .await
        .expect_err("broker 1 is online again");
    assert!(refused.retryable() || matches!(refused, ElectError::CleanPossible { .. }), "{refused}");
    assert_eq!(cluster.stored_value(0).await.leader, None);
}

#[tokio::test]
async fn conflicting_write_is_read_back() {
    let cluster = TestCluster::of(3, 2, vec![value(&[1, 2], Some(1), &[1, 2])]).await;
    let edits = cluster.operations.load_partitions(&[id(0)]).expect("the partition exists");
    let elected =
        PartitionValue { leader: Some(BrokerId(2)), leader_epoch: LeaderEpoch(6), ..cluster.stored_value(0).await };
    cluster.put(&Key::Partition(id(0)), &elected).await;
    // This change is based on the old value, so it has a conflict, and `write` returns the stored value.
    let change = PartitionUpdate {
        id: id(0),
        expected_revision: edits[0].revision,
        value: edits[0].value.leaderless(),
        guards: vec![],
    };
    let remaining = cluster.operations.write(vec![change], &mut vec![]).await.expect("the store responds");
    assert_eq!((remaining.len(), &remaining[0].value), (1, &elected));
    assert_eq!(cluster.stored_value(0).await, elected);
}

#[tokio::test]
async fn unknown_outcome_is_read_back() {
    for (fault, done) in [(Fault::ResponseLost, true), (Fault::Lost, true), (Fault::Refused, false)] {
        let cluster = TestCluster::of(3, 2, vec![value(&[1, 2], Some(1), &[1, 2])]).await;
        let faulty = FaultyStore::new(cluster.store.clone());
        let store: Arc<dyn MetaStore> = Arc::new(faulty.clone());
        let operations =
            ClusterOperations::new(store, cluster.keys.clone(), cluster.operations.metadata.clone(), ConfigMap::new());
        faulty.fail_transactions([Some(fault)]);
        let results = operations.reassign(&name(), Some(0), &ids(&[3, 2])).await;
        assert_eq!(cluster.stored_value(0).await.has_queued(), done, "{fault:?}");
        match results {
            Ok(results) => assert!(done && results[0].changed, "{fault:?}"),
            Err(error) => assert!(!done && error.retryable(), "{fault:?}: {error}"),
        }
    }
}

#[test]
fn successor_prefers_newest_epoch_over_longest_log() {
    let offset = |value| Offset::new(value).expect("small");
    let position = |broker, epoch: Option<u32>, end, committed| ReplicaPosition {
        broker: BrokerId(broker),
        last_epoch: epoch.map(LeaderEpoch),
        log_end: offset(end),
        high_watermark: offset(committed),
    };
    let replicas = ids(&[1, 2, 3]);
    let best = |position: &[ReplicaPosition], tiered| best_unclean_candidate(&replicas, position, offset(tiered));
    assert_eq!(best(&[], 0), None);
    assert_eq!(best(&[position(9, Some(9), 99, 99)], 0), None, "not a replica");
    let two = [position(2, Some(4), 50, 40), position(3, Some(5), 30, 30)];
    let loss = Some(LostOffsets { from: offset(30), to: offset(40) });
    assert_eq!(best(&two, 0), Some(UncleanCandidate { broker: BrokerId(3), loss }));
    assert_eq!(best(&two, 35).and_then(|best| best.loss).map(|loss| loss.from), Some(offset(35)), "tiered");
    assert_eq!(best(&two, 45).expect("one").loss, None);
    let same = [position(3, Some(4), 50, 40), position(1, Some(4), 50, 50), position(2, None, 0, 0)];
    assert_eq!(best(&same, 0), Some(UncleanCandidate { broker: BrokerId(1), loss: None }), "the first of the replicas");
}

#[tokio::test]
async fn stats_count_partitions_that_need_attention() {
    let mut reassigning = value(&[3, 2, 1], Some(1), &[1, 2]);
    (reassigning.adding, reassigning.removing) = (ids(&[3]), ids(&[1]));
    let values =
        vec![value(&[1, 2], Some(1), &[1, 2]), reassigning, value(&[4, 2], Some(4), &[4]), value(&[2, 1], None, &[2])];
    let cluster = TestCluster::of(3, 2, values).await;
    let key = cluster.keys.path(&Key::Topic("broken".parse().expect("valid")));
    cluster.write(Transaction::new().put(key.clone(), "{")).await;
    let stats = cluster.operations.stats();
    assert_eq!((stats.topics, stats.partitions, stats.reassigning), (1, 4, 1));
    assert_eq!((stats.leaderless, stats.under_replicated, stats.under_min_isr), (2, 3, 2));
    let numbers: Vec<u32> = stats.unavailable.iter().map(|(_, number)| *number).collect();
    assert_eq!(numbers, [2, 3], "each once");
    assert_eq!(stats.brokers.len(), 4, "the offline broker holds a replica");
    let leader_stats =
        |me, controls| LeaderStats::of(&cluster.operations.metadata.state(), BrokerId(me), controls, |_| 3);
    let led = LeaderStats { led: 2, under_replicated: 1, under_min_isr: 2, ..LeaderStats::default() };
    assert_eq!(leader_stats(1, false), led, "each leader counts its partitions");
    assert_eq!(
        leader_stats(1, true),
        LeaderStats { leaderless: 2, reassigning: 1, ..led },
        "the controller counts the rest"
    );
    assert_eq!(leader_stats(4, false).led, 1, "the leader by its own cache");
    assert_eq!(leader_stats(2, false), LeaderStats::default());
    assert_eq!(stats.brokers[&BrokerId(2)], ReplicaCounts { leaders: 0, replicas: 4, in_sync: 3 });
    assert_eq!(cluster.operations.unreadable().into_iter().map(|(key, _)| key).collect::<Vec<_>>(), [key]);
}
