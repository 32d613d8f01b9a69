//! One broker on a real disk, with the metadata in memory: what it does when that changes under it.

use std::{path::Path, time::Duration};

use super::*;
use crate::{
    client::Tcp,
    cluster::{
        Addresses, BrokerState, BrokerValue, DeletedValue, EmbeddedStore, Key, NewTopic, PartitionValue, Registration,
        Revision, TopicValue, Transaction, Value as _,
    },
    log::{Identity, Options, RealDisk},
    model::{LeaderEpoch, TopicId, TopicName},
    proto::fault::Reason,
    task::random,
};

struct Bench {
    broker: Arc<Broker>,
    store: EmbeddedStore,
    keys: Keys,
    tasks: Tasks,
}

impl Bench {
    async fn start(dir: &Path, alone: bool) -> Self {
        let id = BrokerId(1);
        let identity = Identity { cluster: "test".to_owned(), broker: id };
        let options = Options { journal_bytes: 8 << 20, ..Options::default() };
        let log = Log::open(Arc::new(RealDisk), dir, &identity, options).unwrap();
        let (store, keys, tasks) = (EmbeddedStore::in_memory(), Keys::new("test").unwrap(), Tasks::new());
        let value = BrokerValue {
            addresses: Addresses { grpc: "127.0.0.1:1".to_owned(), http: None },
            rack: None,
            directory_id: log.directory_id().to_string(),
            incarnation: "p".to_owned(),
            state: BrokerState::Running,
            version: "0".to_owned(),
        };
        let shared: Arc<dyn MetaStore> = Arc::new(store.clone());
        let view = View::start(Arc::clone(&shared), keys.clone(), &tasks);
        view.reached(Revision::ZERO).await;
        let settings = Settings {
            id,
            cluster: "test".to_owned(),
            topic_defaults: ConfigMap::new(),
            produce_memory_bytes: 1 << 20,
            upkeep_workers: 1,
            retention_interval: Duration::from_secs(3600),
            garbage_grace: Duration::from_secs(3600),
            upload_grace: Duration::from_secs(3600),
            default_factor: 1,
            lag_time: Duration::from_secs(10),
            catchup_bytes_per_second: None,
            controller: Limits::default(),
        };
        let registration =
            Registration { store: Arc::clone(&shared), keys: keys.clone(), id, value, time: Duration::from_secs(60) };
        let broker = Broker::open(Parts {
            settings,
            log,
            store: shared,
            keys: keys.clone(),
            view: view.clone(),
            tier: None,
            connect: Arc::new(Tcp::new(Duration::from_secs(1))),
            alone,
            incarnation: "p".to_owned(),
            metrics: Metrics::new(),
        })
        .await;
        let session = registration.register(None, &view, &tasks).await.unwrap();
        view.reached(session.epoch().unwrap()).await;
        broker.begin(&session).await;
        Self { broker, store, keys, tasks }
    }

    async fn create(&self, name: &TopicName, partitions: u32) -> TopicId {
        let (replication_factor, config) = (1, ConfigMap::new());
        let new = NewTopic { name: name.clone(), partitions, replication_factor, config, validate_only: false };
        let id = self.broker.topics.create(new).await.unwrap().value.id;
        self.broker.hosted.until(|hosted| hosted.topic(name).is_some_and(|topic| topic.id == id)).await;
        id
    }

    /// Changes the metadata behind the broker's back; returns when the broker has seen that.
    async fn change(&self, transaction: Transaction) {
        self.store.transact(transaction).await.unwrap();
        // What comes later is seen later.
        let later = TopicName::new("later").unwrap();
        self.create(&later, 1).await;
        self.broker.topics.delete(&later).await.unwrap();
        self.broker.hosted.until(|hosted| hosted.topic(&later).is_none()).await;
    }

    /// How many partitions of a topic are open, and how many replicas of it are on the disk.
    fn holds(&self, topic: TopicId) -> (usize, usize) {
        let open = self.broker.hosted.open().iter().filter(|partition| partition.id().topic == topic).count();
        (open, self.broker.log.partitions().iter().filter(|id| id.topic == topic).count())
    }

    async fn stop(self) {
        self.broker.stop().await;
        self.tasks.stop().await;
    }
}

#[tokio::test]
async fn only_a_deletions_mark_deletes_what_the_disk_holds() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::start(dir.path(), true).await;
    let name = TopicName::new("t").unwrap();
    let key = bench.keys.path(&Key::Topic(name.clone()));

    let id = bench.create(&name, 2).await;
    let value = bench.store.get(&key).await.unwrap().entry.unwrap().value;
    bench.change(Transaction::new().put(key.clone(), "a newer release's")).await;
    assert_eq!(bench.holds(id), (2, 2), "what cannot be read changes nothing");
    bench.change(Transaction::new().put(key.clone(), value.clone())).await;
    assert_eq!(bench.holds(id), (2, 2), "and neither does its return");

    bench.change(Transaction::new().delete(key.clone())).await;
    assert_eq!(bench.holds(id), (0, 2), "lost metadata is not served, and costs no data");
    bench.change(Transaction::new().put(key.clone(), value.clone())).await;
    assert_eq!(bench.holds(id), (2, 2), "what comes back is served again");

    let other = TopicValue { id: TopicId::new(random::uuid()), ..TopicValue::decode(&key, &value).unwrap() };
    bench.change(Transaction::new().put(key.clone(), other.encode())).await;
    assert_eq!(bench.holds(id), (0, 2), "another topic in its place");

    let mark = DeletedValue { name: name.clone(), gone_since_ms: None };
    bench.change(Transaction::new().put(key.clone(), value)).await;
    bench.change(Transaction::new().delete(key).put(bench.keys.deleted(id), mark.encode())).await;
    assert_eq!(bench.holds(id), (0, 0), "a deletion");
    bench.stop().await;
}

#[tokio::test]
async fn a_replica_that_moved_away_is_deleted_by_its_own_key_and_by_nothing_less() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::start(dir.path(), false).await;
    let name = TopicName::new("t").unwrap();
    let id = bench.create(&name, 2).await;
    assert_eq!(bench.holds(id), (2, 2));
    let key = bench.keys.partition(PartitionId::new(id, 0));
    let value = bench.store.get(&key).await.unwrap().entry.unwrap().value;

    bench.change(Transaction::new().put(key.clone(), "a newer release's")).await;
    assert_eq!(bench.holds(id), (1, 2), "what cannot be read is not served, and costs no data");
    bench.change(Transaction::new().put(key.clone(), value.clone())).await;
    assert_eq!(bench.holds(id), (2, 2), "mended, it is served again");
    bench.change(Transaction::new().delete(key.clone())).await;
    assert_eq!(bench.holds(id), (1, 2), "a key that was lost is no licence either");

    let others = BrokerId(2);
    let moved = PartitionValue {
        replicas: vec![others],
        leader: Some(others),
        isr: vec![others],
        ..PartitionValue::decode(&key, &value).unwrap()
    };
    bench.change(Transaction::new().put(key, moved.encode())).await;
    let gone = async {
        while bench.holds(id) != (1, 1) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), gone).await.expect("its files go");
    bench.stop().await;
}

#[tokio::test]
async fn who_is_asked_for_anothers_partition_says_who_leads_it() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::start(dir.path(), false).await;
    let name = TopicName::new("t").unwrap();
    let id = bench.create(&name, 1).await;
    assert!(bench.broker.partition("t", 0).is_ok());
    let key = bench.keys.partition(PartitionId::new(id, 0));
    let before = bench.store.get(&key).await.unwrap().entry.unwrap().value;
    let before = PartitionValue::decode(&key, &before).unwrap();

    let other = BrokerId(2);
    let registered = bench.store.get(&bench.keys.broker(BrokerId(1))).await.unwrap().entry.unwrap().value;
    let registered = BrokerValue::decode("brokers/1", &registered).unwrap();
    let addresses = Addresses { grpc: "broker-2:9460".to_owned(), http: None };
    let theirs = BrokerValue { addresses, incarnation: "q".to_owned(), ..registered };
    let replicas = vec![BrokerId(1), other];
    let (isr, leader_epoch) = (replicas.clone(), LeaderEpoch(before.leader_epoch.0 + 1));
    let led = PartitionValue { replicas, isr, leader: Some(other), leader_epoch, ..before };
    let put = Transaction::new().put(bench.keys.broker(other), theirs.encode()).put(key.clone(), led.encode());
    bench.change(put).await;

    let fault = bench.broker.partition("t", 0).err().unwrap();
    assert_eq!((fault.reason, fault.number("leader")), (Reason::NotLeader, Some(2)));
    assert_eq!(fault.number("leader_epoch"), Some(i64::from(led.leader_epoch.as_i32())));
    assert_eq!(fault.metadata.get("address").map(String::as_str), Some("broker-2:9460"));
    assert!(fault.message.contains("broker 2 at broker-2:9460"), "{fault}");
    bench.change(Transaction::new().put(key, led.leaderless().encode())).await;
    let fault = bench.broker.partition("t", 0).err().unwrap();
    assert_eq!((fault.reason, fault.metadata.get("leader")), (Reason::NotLeader, None), "{fault}");
    bench.stop().await;
}
