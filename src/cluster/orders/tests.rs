//! Operations on a small cluster over the in-memory store: writes, rejections and conflicts.

use futures::FutureExt as _;

use super::*;
use crate::{
    cluster::{
        census::{Carried, Duty},
        embedded::EmbeddedStore,
        endpoints::Endpoints,
        faulty::{Fault, Faulty},
        keys::{BrokerState, BrokerValue, DrainValue, Key, Value},
        placement::ReplicaBound,
        store::{Outcome, Transaction},
    },
    model::{LeaderEpoch, Offset, TopicId},
    task::Tasks,
};

const TOPIC: &str = "orders";

struct Cluster {
    store: EmbeddedStore,
    keys: Keys,
    orders: Orders,
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
    let whole = PartitionValue::new(ids(replicas), LeaderEpoch(5));
    PartitionValue { leader: leader.map(BrokerId), isr: ids(isr), ..whole }
}

fn registered(broker: u32, state: BrokerState) -> BrokerValue {
    BrokerValue { state, ..BrokerValue::running_at(format!("b{broker}:9460")) }
}

impl Cluster {
    /// Returns a cluster with brokers `1..=brokers` and one topic.
    async fn of(brokers: u32, factor: u32, values: Vec<PartitionValue>) -> Self {
        let store = EmbeddedStore::in_memory();
        let (keys, tasks) = (Keys::new("test").expect("valid"), Tasks::new());
        let view = View::start(Arc::new(store.clone()), keys.clone(), &tasks);
        let orders = Orders::new(Arc::new(store.clone()), keys.clone(), view, ConfigMap::new());
        let cluster = Self { store, keys, orders, _tasks: tasks };
        for broker in 1..=brokers {
            cluster.come(broker, BrokerState::Running).await;
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

    async fn come(&self, broker: u32, state: BrokerState) {
        self.put(&Key::Broker(BrokerId(broker)), &registered(broker, state)).await;
    }

    async fn fill(&self, broker: u32) {
        let value = BrokerValue { disk_full: true, ..registered(broker, BrokerState::Running) };
        self.put(&Key::Broker(BrokerId(broker)), &value).await;
    }

    async fn write(&self, transaction: Transaction) -> Revision {
        let revision = match self.store.transact(transaction).await.expect("answers") {
            Outcome::Done { revision } => revision,
            refused @ Outcome::Refused { .. } => panic!("{refused:?}"),
        };
        self.orders.view.reached(revision).await;
        revision
    }

    async fn put(&self, key: &Key, value: &impl Value) -> Revision {
        self.write(Transaction::new().put(self.keys.path(key), value.encode())).await
    }

    async fn go(&self, broker: u32) {
        self.write(Transaction::new().delete(self.keys.broker(BrokerId(broker)))).await;
    }

    async fn stored(&self, number: u32) -> PartitionValue {
        let key = self.keys.partition(id(number));
        let entry = self.store.get(&key).await.expect("answers").entry.expect("there");
        PartitionValue::decode(&key, &entry.value).expect("valid")
    }
}

/// Regression: an operation on 100,000 partitions was decided without yielding.
#[tokio::test]
async fn large_operation_yields_to_other_tasks() {
    let values = (0..DECISIONS_TOGETHER).map(|_| value(&[1, 2], Some(1), &[1, 2])).collect();
    let cluster = Cluster::of(2, 2, values).await;
    let (topic, turned) = (name(), ids(&[2, 1]));
    let one = cluster.orders.reassign(&topic, Some(0), &turned).now_or_never();
    assert!(one.is_some_and(|ordered| ordered.is_ok()), "the store in memory waits for nothing");
    assert!(cluster.orders.reassign(&topic, None, &turned).now_or_never().is_none());
    let all = cluster.orders.reassign(&topic, None, &turned).await.expect("ordered");
    assert_eq!(all.len(), DECISIONS_TOGETHER);
}

#[tokio::test]
async fn reassignment_of_all_partitions_rotates_the_list() {
    let values = (0..3).map(|_| value(&[1, 2], Some(1), &[1, 2])).collect();
    let cluster = Cluster::of(3, 2, values).await;
    let one = cluster.orders.reassign(&name(), Some(1), &ids(&[3, 2])).await.expect("ordered");
    assert_eq!((one.len(), one[0].id, one[0].changed), (1, id(1), true));
    let stored = cluster.stored(1).await;
    assert_eq!((stored.replicas, stored.ordered), (ids(&[1, 2]), ids(&[3, 2])), "it begins when it is its turn");

    cluster.orders.seen(&one).await;
    let all = cluster.orders.reassign(&name(), None, &ids(&[2, 3])).await.expect("ordered");
    let targets: Vec<Vec<BrokerId>> = all.iter().map(|one| one.value.ordered.clone()).collect();
    assert_eq!(targets, [ids(&[2, 3]), ids(&[3, 2]), ids(&[2, 3])], "each broker is preferred by as many");
    assert_eq!(all.iter().map(|one| one.changed).collect::<Vec<_>>(), [true, false, true], "one was on its way there");

    cluster.orders.seen(&all).await;
    let moving = cluster.orders.moving(None, None).expect("listed");
    assert_eq!(moving.iter().map(|one| one.id).collect::<Vec<_>>(), [id(0), id(1), id(2)]);
    assert_eq!(cluster.orders.moving(Some(&name()), Some(2)).expect("listed").len(), 1);
}

#[tokio::test]
async fn reassignment_without_copy_or_in_progress_is_not_queued() {
    let mut moving = value(&[3, 2, 1], Some(1), &[1, 2]);
    (moving.adding, moving.removing) = (ids(&[3]), ids(&[1]));
    let waiting = value(&[1, 2], Some(1), &[1, 2]).order_move(&ids(&[3, 2]));
    let cluster = Cluster::of(4, 2, vec![value(&[1, 2], Some(1), &[1, 2]), moving, waiting.clone(), waiting]).await;
    let reassign =
        async |number, to: &[u32]| cluster.orders.reassign(&name(), Some(number), &ids(to)).await.expect("ordered");
    let turned = &reassign(0, &[2, 1]).await[0].value;
    assert_eq!((&turned.replicas, turned.is_ordered()), (&ids(&[2, 1]), false), "only their order changes");
    let replaced = &reassign(1, &[4, 2]).await[0].value;
    assert_eq!((&replaced.replicas, replaced.is_ordered()), (&ids(&[4, 2, 1]), false), "one move is one move");
    assert_eq!(replaced.removals, 1, "3 was never in sync");
    let other = &reassign(2, &[4, 1]).await[0].value;
    assert_eq!((&other.replicas, &other.ordered), (&ids(&[1, 2]), &ids(&[4, 1])), "the last order counts");
    let stays = &reassign(2, &[1, 2]).await[0];
    assert!(stays.changed && !stays.value.is_ordered(), "it is where it is wanted: {stays:?}");
    let back = cluster.orders.cancel(Some(&name()), Some(3)).await.expect("taken back");
    assert_eq!((back[0].changed, cluster.stored(3).await), (true, value(&[1, 2], Some(1), &[1, 2])));
}

#[tokio::test]
async fn broker_under_disk_pressure_gets_no_new_replicas() {
    let cluster = Cluster::of(3, 2, vec![value(&[1, 2], Some(1), &[1, 2]), value(&[3, 2], Some(3), &[3, 2])]).await;
    cluster.fill(3).await;
    let full = cluster.orders.reassign(&name(), Some(0), &ids(&[3, 2])).await.expect_err("no room");
    assert_eq!(full, ReassignError::Full { ids: ids(&[3]), partition: format!("{TOPIC}/0") });
    assert!(full.to_string().contains("the disk of broker 3 is full (broker.disk_full_percent)"), "{full}");
    cluster.orders.reassign(&name(), Some(1), &ids(&[3, 1])).await.expect("it holds that one");
}

#[tokio::test]
async fn unreachable_broker_gets_no_new_replicas() {
    let cluster = Cluster::of(3, 2, vec![value(&[1, 2], Some(1), &[1, 2]), value(&[3, 2], Some(3), &[3, 2])]).await;
    let listeners = Endpoints::new("b3:9460".to_owned());
    let hidden = BrokerValue { listeners, ..registered(3, BrokerState::Running) };
    cluster.put(&Key::Broker(BrokerId(3)), &hidden).await;
    let refused = cluster.orders.reassign(&name(), Some(0), &ids(&[3, 2])).await.expect_err("never in sync there");
    assert_eq!(refused, ReassignError::Unreachable { ids: ids(&[3]), partition: format!("{TOPIC}/0") });
    cluster.orders.reassign(&name(), Some(1), &ids(&[3, 1])).await.expect("it holds that one");
    let drained = cluster.orders.drain(BrokerId(2), 0).await.expect("ordered");
    assert_eq!((drained.stuck.len(), drained.takers), (1, 1), "broker 1 takes the replica of partition 1 alone");
}

#[tokio::test]
async fn broker_at_replica_limit_gets_no_new_replicas() {
    let values =
        vec![value(&[1, 2], Some(1), &[1, 2]), value(&[2, 3], Some(2), &[2, 3]), value(&[1, 2], Some(1), &[1, 2])];
    let cluster = Cluster::of(3, 2, values).await;
    let bounded = BrokerValue { max_replicas: Some(2), ..registered(3, BrokerState::Running) };
    cluster.put(&Key::Broker(BrokerId(3)), &bounded).await;
    let reassign = async |partition, to: &[u32]| cluster.orders.reassign(&name(), partition, &ids(to)).await;
    let all = reassign(None, &[1, 3]).await.expect_err("three on a broker that takes two");
    assert_eq!(all, ReassignError::Bound(ReplicaBound { broker: BrokerId(3), replicas: 3, max: 2 }));
    assert!(cluster.orders.moving(None, None).expect("listed").is_empty(), "nothing is ordered");

    let first = reassign(Some(0), &[1, 3]).await.expect("a second one fits");
    cluster.orders.seen(&first).await;
    let second = reassign(Some(2), &[1, 3]).await;
    assert!(matches!(second, Err(ReassignError::Bound(_))), "what waits for its turn counts: {second:?}");
    reassign(Some(1), &[3, 2]).await.expect("it holds that one");
}

#[tokio::test]
async fn drain_counts_replicas_above_other_brokers_limits() {
    let values = (0..5).map(|_| value(&[1], Some(1), &[1])).collect();
    let cluster = Cluster::of(2, 1, values).await;
    let bounded = BrokerValue { max_replicas: Some(3), ..registered(2, BrokerState::Running) };
    cluster.put(&Key::Broker(BrokerId(2)), &bounded).await;
    let drained = cluster.orders.drain(BrokerId(1), 0).await.expect("ordered");
    assert_eq!((drained.replicas, drained.stuck.len(), drained.takers), (5, 2, 1));
}

#[tokio::test]
async fn invalid_reassignment_is_rejected_and_changes_nothing() {
    let cluster = Cluster::of(3, 2, vec![value(&[1, 2], Some(1), &[1, 2]), value(&[2, 4], Some(2), &[2])]).await;
    cluster.put(&Key::Drain(BrokerId(3)), &DrainValue { since_ms: 1 }).await;
    let reassign = async |partition, replicas: &[u32]| {
        cluster.orders.reassign(&name(), partition, &ids(replicas)).await.expect_err("refused")
    };
    assert_eq!(reassign(None, &[1, 1]).await, ReassignError::Repeated { id: BrokerId(1) });
    let unknown = reassign(Some(0), &[1, 9]).await;
    assert_eq!(unknown.to_string(), "the cluster has no broker 9: it has 1, 2, 3 and 4");
    let factor = reassign(Some(0), &[1]).await;
    assert_eq!(factor, ReassignError::Factor { topic: name(), factor: 2, asked: 1 });
    assert!(factor.to_string().contains("--replication-factor 1"), "{factor}");
    assert_eq!(reassign(Some(0), &[1, 3]).await, ReassignError::Draining { ids: ids(&[3]) });
    let gone = reassign(None, &[4, 2]).await;
    assert_eq!(gone, ReassignError::Gone { ids: ids(&[4]), partition: format!("{TOPIC}/0") });
    let partition = reassign(Some(2), &[1, 2]).await;
    assert_eq!(partition.to_string(), "topic \"orders\" has no partition 2: it has 2, numbered from 0");
    let order: TopicName = "order".parse().expect("valid");
    let topic = cluster.orders.reassign(&order, None, &ids(&[1, 2])).await.expect_err("refused").to_string();
    assert_eq!(topic, "topic \"order\" does not exist; did you mean \"orders\"?");
    assert!(cluster.orders.moving(None, None).expect("listed").is_empty());
    cluster
        .orders
        .reassign(&name(), Some(1), &ids(&[4, 2]))
        .await
        .expect("who holds it may be named though it is gone");
}

#[tokio::test]
async fn cancelled_reassignment_elects_an_earlier_replica() {
    let mut moving = value(&[3, 2, 1], Some(1), &[1, 2]);
    (moving.adding, moving.removing) = (ids(&[3]), ids(&[1]));
    let led = PartitionValue { leader: Some(BrokerId(3)), isr: ids(&[1, 2, 3]), ..moving.clone() };
    let alone = PartitionValue { leader: Some(BrokerId(3)), isr: ids(&[3]), ..moving.clone() };
    let still = value(&[1, 2], Some(1), &[1, 2]);
    let cluster = Cluster::of(3, 2, vec![moving, led, alone, still]).await;

    let back = cluster.orders.cancel(Some(&name()), Some(0)).await.expect("taken back");
    assert_eq!((back.len(), back[0].changed), (1, true));
    let stored = cluster.stored(0).await;
    assert_eq!(
        (stored.replicas, stored.leader, stored.leader_epoch),
        (ids(&[2, 1]), Some(BrokerId(1)), LeaderEpoch(5))
    );

    cluster.orders.cancel(Some(&name()), Some(1)).await.expect("taken back");
    let stored = cluster.stored(1).await;
    assert_eq!(
        (stored.replicas, stored.leader, stored.leader_epoch),
        (ids(&[2, 1]), Some(BrokerId(2)), LeaderEpoch(6))
    );
    assert_eq!(stored.isr, ids(&[1, 2]));

    let only = cluster.orders.cancel(Some(&name()), Some(2)).await.expect_err("nobody else is in sync");
    assert_eq!(only, CancelError::OnlyNew { partition: format!("{TOPIC}/2") });
    let nothing = cluster.orders.cancel(Some(&name()), Some(3)).await.expect_err("it does not move");
    assert_eq!(nothing.to_string(), "nothing to cancel: partition orders/3 is not being moved");
    let unknown = cluster.orders.cancel(Some(&name()), Some(4)).await.expect_err("no such partition");
    assert!(matches!(unknown, CancelError::Unknown(FindError::Partition(_))), "{unknown}");
}

#[tokio::test]
async fn drain_reports_movable_and_blocked_replicas() {
    let values =
        vec![value(&[1, 2], Some(1), &[1, 2]), value(&[2, 1], Some(2), &[1, 2]), value(&[3, 2], Some(3), &[3, 2])];
    let cluster = Cluster::of(3, 2, values).await;
    let drained = cluster.orders.drain(BrokerId(1), 77).await.expect("ordered");
    let wanted =
        Drained { changed: true, since_ms: 77, leaders: 1, replicas: 2, stuck: vec![], leaderless: 0, takers: 2 };
    assert_eq!(drained, wanted);
    let again = cluster.orders.drain(BrokerId(1), 99).await.expect("ordered");
    assert_eq!(again, Drained { changed: false, ..wanted }, "it began when it began");

    let second = cluster.orders.drain(BrokerId(2), 100).await.expect("ordered");
    assert_eq!(second.stuck, [id(0), id(1), id(2)], "two replicas need two brokers, and one is left");
    assert_eq!(cluster.orders.stuck(BrokerId(2)), 3, "and that can be asked for later");
    assert_eq!((second.takers, second.replicas), (1, 3));

    assert_eq!(cluster.orders.restore(BrokerId(2)).await, Ok(true));
    assert_eq!(cluster.orders.restore(BrokerId(2)).await, Ok(false));
    let unknown = cluster.orders.drain(BrokerId(8), 1).await.expect_err("unknown").to_string();
    assert_eq!(unknown, "the cluster has no broker 8: it has 1, 2 and 3");
    assert!(cluster.orders.restore(BrokerId(8)).await.is_err());
    cluster.go(3).await;
    let gone = cluster.orders.drain(BrokerId(3), 1).await.expect("one that is gone may be drained");
    assert_eq!((gone.leaders, gone.stuck), (1, vec![id(2)]));
}

/// Regression: `broker drain --wait` waited forever for a partition whose only replica was lost with its broker.
#[tokio::test]
async fn drain_counts_leaderless_partitions_as_blocked() {
    let lost = value(&[1], None, &[1]);
    let moving = PartitionValue { replicas: ids(&[1, 3]), adding: ids(&[3]), removing: ids(&[1]), ..lost.clone() };
    let cluster = Cluster::of(3, 1, vec![lost, moving, value(&[2], Some(2), &[2])]).await;
    cluster.go(1).await;
    let drained = cluster.orders.drain(BrokerId(1), 0).await.expect("ordered");
    assert_eq!((drained.replicas, drained.stuck, drained.leaderless), (2, vec![], 2), "others would take them");
    assert_eq!(cluster.orders.stuck(BrokerId(1)), 2);
}

/// Regression: `broker drain --wait` waited half an hour without output, until the controller retargeted the
/// reassignment.
#[tokio::test]
async fn drain_is_blocked_while_needed_broker_is_offline() {
    let moving = PartitionValue { adding: ids(&[3]), removing: ids(&[1]), ..value(&[1, 2, 3], Some(1), &[1, 2]) };
    let cluster = Cluster::of(3, 2, vec![moving]).await;
    let drained = cluster.orders.drain(BrokerId(1), 0).await.expect("ordered");
    assert_eq!((drained.replicas, drained.stuck), (1, vec![]), "it is on its way");
    cluster.go(3).await;
    assert_eq!(cluster.orders.stuck(BrokerId(1)), 1);
    cluster.come(4, BrokerState::Running).await;
    assert_eq!(
        cluster.orders.stuck(BrokerId(1)),
        1,
        "the controller takes the new one only when the other is lost for good"
    );
    cluster.come(3, BrokerState::Running).await;
    assert_eq!(cluster.orders.stuck(BrokerId(1)), 0, "it is back");

    // Broker 3 has copied everything. Until broker 2 is in sync again, broker 1 is one of the two that the min ISR
    // needs.
    let needed = PartitionValue { adding: ids(&[3]), removing: ids(&[1]), ..value(&[1, 2, 3], Some(1), &[1, 3]) };
    let cluster = Cluster::of(3, 2, vec![needed]).await;
    cluster.orders.drain(BrokerId(1), 0).await.expect("ordered");
    assert_eq!(cluster.orders.stuck(BrokerId(1)), 0, "broker 2 catches up");
    cluster.go(2).await;
    assert_eq!(cluster.orders.stuck(BrokerId(1)), 1);
}

/// Regression: a drain was reported as blocked during the last copies because a staying replica was offline.
#[tokio::test]
async fn drain_is_not_blocked_by_dispensable_offline_replica() {
    let moving = PartitionValue { adding: ids(&[4]), removing: ids(&[1]), ..value(&[4, 2, 3, 1], Some(1), &[1, 3]) };
    let cluster = Cluster::of(4, 2, vec![moving]).await;
    cluster.go(2).await;
    let drained = cluster.orders.drain(BrokerId(1), 0).await.expect("ordered");
    assert_eq!((drained.replicas, drained.stuck), (1, vec![]), "brokers 3 and 4 are two in sync soon");
}

/// Regression: a drain waited without output while an earlier reassignment of the partition was blocked.
#[tokio::test]
async fn drain_is_blocked_by_earlier_blocked_reassignment() {
    let moving = PartitionValue { adding: ids(&[3]), removing: ids(&[2]), ..value(&[1, 3, 2], Some(1), &[1, 2]) };
    let cluster = Cluster::of(4, 1, vec![moving]).await;
    cluster.orders.drain(BrokerId(1), 0).await.expect("ordered");
    assert_eq!(cluster.orders.stuck(BrokerId(1)), 0, "broker 1 gives its replica to broker 4 then");
    cluster.go(3).await;
    assert_eq!(cluster.orders.stuck(BrokerId(1)), 1);
    let gone = cluster.orders.drain(BrokerId(3), 0).await.expect("ordered");
    assert_eq!((gone.replicas, gone.stuck), (1, vec![]), "one that is gone and drained is replaced at once");
    assert_eq!(cluster.orders.stuck(BrokerId(1)), 0);
}

/// Regression: the drain seemed to exist already, and no replica moved.
#[tokio::test]
async fn unreadable_drain_is_overwritten() {
    let cluster = Cluster::of(2, 1, vec![value(&[1], Some(1), &[1])]).await;
    let key = cluster.keys.drain(BrokerId(1));
    cluster.store.transact(Transaction::new().put(key.as_str(), "rubbish")).await.expect("answers");
    let drained = cluster.orders.drain(BrokerId(1), 77).await.expect("ordered");
    assert_eq!((drained.changed, drained.since_ms), (true, 77));
    let entry = cluster.store.get(&key).await.expect("answers").entry.expect("it is there");
    assert_eq!(DrainValue::decode(&key, &entry.value), Ok(DrainValue { since_ms: 77 }));
}

#[tokio::test]
async fn preferred_leader_is_elected_if_it_may_lead() {
    let cluster =
        Cluster::of(3, 3, vec![value(&[1, 2, 3], Some(2), &[2, 1]), value(&[3, 2, 1], Some(2), &[2, 1])]).await;
    let elected = cluster.orders.elect(&name(), 0).await.expect("elected");
    assert_eq!((elected.value.leader, elected.value.leader_epoch), (Some(BrokerId(1)), LeaderEpoch(6)));
    assert_eq!(cluster.stored(0).await, elected.value);
    cluster.orders.seen(std::slice::from_ref(&elected)).await;
    assert!(!cluster.orders.elect(&name(), 0).await.expect("it leads").changed);

    let unfit = |why| ElectError::Unfit { partition: format!("{TOPIC}/1"), id: BrokerId(3), leader: BrokerId(2), why };
    assert_eq!(cluster.orders.elect(&name(), 1).await, Err(unfit(Unfit::Behind)));
    cluster.put(&Key::Partition(id(1)), &value(&[3, 2, 1], Some(2), &[2, 1, 3])).await;
    cluster.come(3, BrokerState::Stopping).await;
    assert_eq!(cluster.orders.elect(&name(), 1).await, Err(unfit(Unfit::Leaving)));
    cluster.go(3).await;
    assert_eq!(cluster.orders.elect(&name(), 1).await, Err(unfit(Unfit::Gone)));
    cluster.go(2).await;
    let another = cluster.orders.elect(&name(), 1).await.expect("somebody else can");
    assert_eq!((another.value.leader, another.value.isr), (Some(BrokerId(1)), ids(&[1])));
    assert_eq!(another.value.elr, ids(&[2, 3]), "below the minimum the others stay eligible");
}

#[tokio::test]
async fn unclean_election_requires_need_and_unchanged_value() {
    let mut waiting = value(&[1, 2, 3], None, &[1]);
    waiting.elr = ids(&[2]);
    let cluster = Cluster::of(3, 3, vec![waiting.clone(), value(&[1, 2, 3], Some(2), &[2])]).await;
    let led = cluster.orders.forsaken(&name(), 1).expect_err("it has a leader");
    assert_eq!(led, ElectError::Led { partition: format!("{TOPIC}/1"), leader: BrokerId(2) });
    let clean = cluster.orders.forsaken(&name(), 0).expect_err("1 can lead");
    assert_eq!(clean, ElectError::Clean { partition: format!("{TOPIC}/0"), id: BrokerId(1) });
    cluster.go(1).await;
    let clean = cluster.orders.elect_unclean(&name(), 0, BrokerId(3), None, false).await.expect_err("2 can lead");
    assert_eq!(clean, ElectError::Clean { partition: format!("{TOPIC}/0"), id: BrokerId(2) });
    cluster.go(2).await;
    let nobody = cluster.orders.elect(&name(), 0).await.expect_err("nobody holds everything");
    assert_eq!(nobody, ElectError::Nobody { partition: format!("{TOPIC}/0"), waited: ids(&[1, 2]) });

    let seen = cluster.orders.forsaken(&name(), 0).expect("nobody is there");
    let dead = cluster
        .orders
        .elect_unclean(&name(), 0, BrokerId(1), Some(seen.revision), false)
        .await
        .expect_err("it is gone");
    assert!(dead.to_string().contains("of its replicas, 3 are alive"), "{dead}");
    let later = cluster.put(&Key::Partition(id(0)), &PartitionValue { leader_epoch: LeaderEpoch(6), ..waiting }).await;
    let changed = cluster.orders.elect_unclean(&name(), 0, BrokerId(3), Some(seen.revision), false).await;
    assert_eq!(changed, Err(ElectError::Changed { partition: format!("{TOPIC}/0") }));
    let elected = cluster.orders.elect_unclean(&name(), 0, BrokerId(3), Some(later), false).await.expect("elected");
    let stored = cluster.stored(0).await;
    assert_eq!((stored.leader, &stored.isr, stored.elr.len()), (Some(BrokerId(3)), &ids(&[3]), 0));
    assert_eq!((stored.unclean, elected.changed), (Some(LeaderEpoch(7)), true));
}

/// The only replica's disk was replaced: its broker left ISR and ELR, so there is no broker to wait for.
#[tokio::test]
async fn election_without_complete_replica_names_no_broker() {
    let cluster = Cluster::of(2, 1, vec![value(&[1], None, &[])]).await;
    let nobody = cluster.orders.elect(&name(), 0).await.expect_err("it may hold nothing");
    assert_eq!(nobody, ElectError::Nobody { partition: format!("{TOPIC}/0"), waited: vec![] });
    let said = nobody.to_string();
    assert!(said.contains("no replica is known to hold everything; elect with --unclean"), "{said}");
    let seen = cluster.orders.forsaken(&name(), 0).expect("nobody may lead");
    let elected =
        cluster.orders.elect_unclean(&name(), 0, BrokerId(1), Some(seen.revision), false).await.expect("elected");
    assert_eq!((elected.value.leader, &elected.value.isr), (Some(BrokerId(1)), &ids(&[1])));
}

#[test]
fn error_texts_use_singular_for_one_broker() {
    let silent =
        |replicas: &[u32]| ElectError::Silent { partition: "a/0".to_owned(), replicas: ids(replicas) }.to_string();
    assert!(silent(&[3]).ends_with("start broker 3"), "{}", silent(&[3]));
    assert!(silent(&[1, 2, 3]).ends_with("start one of the brokers 1, 2 and 3"), "{}", silent(&[1, 2, 3]));
    let factor = |asked| ReassignError::Factor { topic: name(), factor: 2, asked }.to_string();
    assert!(factor(1).contains("and 1 broker is named: name 2"), "{}", factor(1));
    assert!(factor(3).contains("and 3 brokers are named: name 2"), "{}", factor(3));
}

/// The metadata cache may not show yet that an in-sync replica is back.
#[tokio::test]
async fn unclean_election_fails_after_return_of_in_sync_replica() {
    let cluster = Cluster::of(2, 2, vec![value(&[1, 2], None, &[1])]).await;
    cluster.go(1).await;
    let faulty = Faulty::new(cluster.store.clone());
    faulty.break_watches();
    let (tasks, store): (Tasks, Arc<dyn MetaStore>) = (Tasks::new(), Arc::new(faulty));
    let stale = View::start(Arc::clone(&store), cluster.keys.clone(), &tasks);
    stale.reached(Revision::ZERO).await;
    let orders = Orders::new(store, cluster.keys.clone(), stale, ConfigMap::new());
    let seen = orders.forsaken(&name(), 0).expect("as far as it knows");
    cluster.come(1, BrokerState::Running).await;
    let refused =
        orders.elect_unclean(&name(), 0, BrokerId(2), Some(seen.revision), false).await.expect_err("1 is back");
    assert!(refused.retryable() || matches!(refused, ElectError::Clean { .. }), "{refused}");
    assert_eq!(cluster.stored(0).await.leader, None);
}

#[tokio::test]
async fn conflicting_write_is_read_back() {
    let cluster = Cluster::of(3, 2, vec![value(&[1, 2], Some(1), &[1, 2])]).await;
    let looked = cluster.orders.look(&[id(0)]).expect("there");
    let elected = PartitionValue { leader: Some(BrokerId(2)), leader_epoch: LeaderEpoch(6), ..cluster.stored(0).await };
    cluster.put(&Key::Partition(id(0)), &elected).await;
    // The change of the old value fails and returns the stored value.
    let change = Change { id: id(0), expect: looked[0].revision, value: looked[0].value.leaderless(), also: vec![] };
    let left = cluster.orders.write(vec![change], &mut vec![]).await.expect("answers");
    assert_eq!((left.len(), &left[0].value), (1, &elected));
    assert_eq!(cluster.stored(0).await, elected);
}

#[tokio::test]
async fn unknown_outcome_is_read_back() {
    for (fault, done) in [(Fault::AnswerLost, true), (Fault::Lost, true), (Fault::Refused, false)] {
        let cluster = Cluster::of(3, 2, vec![value(&[1, 2], Some(1), &[1, 2])]).await;
        let faulty = Faulty::new(cluster.store.clone());
        let store: Arc<dyn MetaStore> = Arc::new(faulty.clone());
        let orders = Orders::new(store, cluster.keys.clone(), cluster.orders.view.clone(), ConfigMap::new());
        faulty.transactions([Some(fault)]);
        let ordered = orders.reassign(&name(), Some(0), &ids(&[3, 2])).await;
        assert_eq!(cluster.stored(0).await.is_ordered(), done, "{fault:?}");
        match ordered {
            Ok(ordered) => assert!(done && ordered[0].changed, "{fault:?}"),
            Err(error) => assert!(!done && error.retryable(), "{fault:?}: {error}"),
        }
    }
}

#[test]
fn successor_prefers_newest_epoch_over_longest_log() {
    let offset = |value| Offset::new(value).expect("small");
    let held = |broker, epoch: Option<u32>, end, committed| Held {
        broker: BrokerId(broker),
        last_epoch: epoch.map(LeaderEpoch),
        log_end: offset(end),
        high_watermark: offset(committed),
    };
    let replicas = ids(&[1, 2, 3]);
    let best = |held: &[Held], tiered| successor(&replicas, held, offset(tiered));
    assert_eq!(best(&[], 0), None);
    assert_eq!(best(&[held(9, Some(9), 99, 99)], 0), None, "it is no replica any more");
    let two = [held(2, Some(4), 50, 40), held(3, Some(5), 30, 30)];
    let loss = Some(Loss { from: offset(30), to: offset(40) });
    assert_eq!(best(&two, 0), Some(Successor { broker: BrokerId(3), loss }));
    assert_eq!(best(&two, 35).and_then(|best| best.loss).map(|loss| loss.from), Some(offset(35)), "the bucket has it");
    assert_eq!(best(&two, 45).expect("one").loss, None);
    let same = [held(3, Some(4), 50, 40), held(1, Some(4), 50, 50), held(2, None, 0, 0)];
    assert_eq!(best(&same, 0), Some(Successor { broker: BrokerId(1), loss: None }), "the first of the replicas");
}

#[tokio::test]
async fn census_counts_partitions_that_need_attention() {
    let mut moving = value(&[3, 2, 1], Some(1), &[1, 2]);
    (moving.adding, moving.removing) = (ids(&[3]), ids(&[1]));
    let values =
        vec![value(&[1, 2], Some(1), &[1, 2]), moving, value(&[4, 2], Some(4), &[4]), value(&[2, 1], None, &[2])];
    let cluster = Cluster::of(3, 2, values).await;
    let key = cluster.keys.path(&Key::Topic("broken".parse().expect("valid")));
    cluster.write(Transaction::new().put(key.clone(), "{")).await;
    let census = cluster.orders.census();
    assert_eq!((census.topics, census.partitions, census.moving), (1, 4, 1));
    assert_eq!((census.leaderless, census.under_replicated, census.below_minimum), (2, 3, 2));
    let numbers: Vec<u32> = census.unavailable.iter().map(|(_, number)| *number).collect();
    assert_eq!(numbers, [2, 3], "each once");
    assert_eq!(census.brokers.len(), 4, "the one that is gone holds a replica");
    let duty = |me, controls| Duty::of(&cluster.orders.view.state(), BrokerId(me), controls, |_| 3);
    let led = Duty { led: 2, under_replicated: 1, below_minimum: 2, ..Duty::default() };
    assert_eq!(duty(1, false), led, "each leader counts what it leads");
    assert_eq!(duty(1, true), Duty { leaderless: 2, moving: 1, ..led }, "and the controller what nobody does");
    assert_eq!(duty(4, false).led, 1, "what it leads by its own mirror, whoever else thinks it gone");
    assert_eq!(duty(2, false), Duty::default());
    assert_eq!(census.brokers[&BrokerId(2)], Carried { leaders: 0, replicas: 4, in_sync: 3 });
    assert_eq!(cluster.orders.unreadable().into_iter().map(|(key, _)| key).collect::<Vec<_>>(), [key]);
}
