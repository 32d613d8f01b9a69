//! Behaviour of one broker when the metadata changes. The data directory is on a real disk, and the metadata store is
//! in memory.

use std::{path::Path, time::Duration};

use super::*;
use crate::{
    client::TcpConnector,
    cluster::{
        BrokerValue, EmbeddedStore, Endpoints, Key, Keys, LocalInventory, MetaStore, MetadataCache, PartitionValue,
        RegistrationRequest, Revision, TombstoneValue, TopicSpec, TopicValue, Transaction, Value as _,
        faulty::{self, FaultyStore},
        verify_inventory,
    },
    config::ConfigSources,
    log::{DataDir, DataDirError, DataDirIdentity, LogOptions, RealDisk},
    model::{Compression, ConfigMap, LeaderEpoch, TopicId, TopicName},
    partition::Partition,
    proto::{
        error::{ApiError, ErrorCode},
        v1,
    },
    record::BatchBuilder,
    task::{
        Tasks, clock, random,
        test_timeout::{wait_for, wait_until},
    },
    telemetry::Metrics,
};

/// One broker with id 1, and the metadata store that the test changes.
pub(super) struct TestBroker {
    pub(super) broker: Arc<Broker>,
    pub(super) store: EmbeddedStore,
    /// The same store as the broker uses it, with injected faults.
    pub(super) faulty_store: FaultyStore,
    pub(super) keys: Keys,
    pub(super) tasks: Tasks,
}

impl TestBroker {
    pub(super) async fn start(dir: &Path, standalone: bool) -> Self {
        Self::with_store(dir, standalone, EmbeddedStore::in_memory()).await
    }

    /// Starts the broker in the order of a real start: opens its replicas, verifies them, registers, and activates the
    /// broker.
    pub(super) async fn with_store(dir: &Path, standalone: bool, store: EmbeddedStore) -> Self {
        let id = BrokerId(1);
        let identity = DataDirIdentity { cluster: "test".to_owned(), broker: id };
        let options = LogOptions { journal_bytes: 8 << 20, ..LogOptions::default() };
        let open = || DataDir::open(Arc::new(RealDisk::default()), dir, &identity, options.clone());
        // A task that was cancelled when an earlier broker of the test stopped may use the directory for a moment.
        let log = wait_for("the data directory is not in use", async || match open() {
            Err(DataDirError::InUse { .. }) => None,
            opened => Some(opened.unwrap()),
        })
        .await;
        let (keys, tasks) = (Keys::new("test").unwrap(), Tasks::new());
        let directory_id = log.directory_id().to_string();
        let value = BrokerValue { directory_id, ..BrokerValue::running_at("127.0.0.1:1".to_owned()) };
        let faulty_store = FaultyStore::new(store.clone());
        let meta_store: Arc<dyn MetaStore> = Arc::new(faulty_store.clone());
        let metadata = MetadataCache::start(Arc::clone(&meta_store), keys.clone(), &tasks);
        metadata.wait_for_revision(Revision::ZERO).await;
        let mut config = ConfigSources::new().load().expect("the defaults are valid").config;
        config.cluster = "test".to_owned();
        config.broker.id = id;
        config.broker.disk_pressure_percent = 100;
        config.broker.catch_up_timeout = Duration::from_secs(60);
        config.replication.default_factor = 1;
        config.replication.max_lag_time = Duration::from_secs(10);
        config.tier.upload_concurrency = 1;
        config.tier.check_interval = Duration::from_secs(3600);
        config.limits.produce_memory_bytes = 1 << 20;
        config.limits.request_memory_bytes = 64 << 20;
        config.limits.response_memory_bytes = 64 << 20;
        config.limits.decompression_memory_bytes = 256 << 20;
        let registration = RegistrationRequest {
            store: Arc::clone(&meta_store),
            keys: keys.clone(),
            id,
            value,
            session_timeout: Duration::from_secs(60),
        };
        let ctx = NodeContext {
            config: Arc::new(config),
            id,
            log,
            store: meta_store,
            keys: keys.clone(),
            metadata: metadata.clone(),
            tier: None,
            metrics: Arc::new(Metrics::new()),
            incarnation: "p".into(),
            standalone,
            tasks: Tasks::new(),
        };
        let opened = OpenedBroker::open(ctx, Arc::new(TcpConnector::new(Duration::from_secs(1)))).await;
        let inventory = LocalInventory {
            directory_id: registration.value.directory_id.clone(),
            incarnations: vec!["p".to_owned()],
            clean: true,
            on_disk: opened.ctx.log.partitions().into_iter().collect(),
            intact: opened.intact_replicas().await,
        };
        registration.clear().await.unwrap();
        let verified = verify_inventory(&opened.ctx.store, &keys, id, &inventory, &ConfigMap::new()).await.unwrap();
        let session = registration.register(verified.directory_revision, &metadata, &tasks).await.unwrap();
        metadata.wait_for_revision(session.epoch().unwrap()).await;
        let broker = opened.activate(session, verified.unverified).await;
        Self { broker, store, faulty_store, keys, tasks }
    }

    pub(super) async fn create(&self, name: &TopicName, partitions: u32) -> TopicId {
        self.create_with(name, partitions, ConfigMap::new()).await
    }

    /// Creates a topic with this configuration, and waits until this broker hosts it.
    pub(super) async fn create_with(&self, name: &TopicName, partitions: u32, config: ConfigMap) -> TopicId {
        let replication_factor = 1;
        let spec = TopicSpec { name: name.clone(), partitions, replication_factor, config, validate_only: false };
        let created = self.broker.api.topics.topics().create(spec).await.unwrap();
        self.broker
            .partitions
            .until(|hosted| hosted.topic(name).is_some_and(|topic| topic.revision >= created.revision))
            .await;
        created.value.id
    }

    /// Runs a transaction on the metadata store directly, and returns when the broker has applied the change.
    pub(super) async fn change(&self, transaction: Transaction) {
        self.store.transact(transaction).await.unwrap();
        // The broker applies changes in order. So this change is applied once the creation and deletion of another
        // topic are.
        let later = TopicName::new("later").unwrap();
        self.create(&later, 1).await;
        self.broker.api.topics.topics().delete(&later).await.unwrap();
        self.broker.partitions.until(|hosted| hosted.topic(&later).is_none()).await;
    }

    /// Appends one record of this size to a partition of topic `t`. A timeout of 0 means the default.
    pub(super) async fn append(
        &self,
        partition: i32,
        bytes: usize,
        timeout_ms: u32,
    ) -> Result<v1::AppendResponse, ApiError> {
        let records = vec![v1::Record { value: Some(vec![7; bytes].into()), ..Default::default() }];
        let payload = Some(v1::append_request::Payload::Records(v1::RecordList { records }));
        let topic = "t".to_owned();
        let request = v1::AppendRequest { topic, partition, timeout_ms, payload, ..Default::default() };
        self.broker.api.produce.append(request, &ProducerIdQuota::default(), &self.broker.api.call_memory()).await
    }

    /// Returns partition 0 of topic `t`, if this broker leads it.
    fn partition_0(&self) -> Result<Arc<Partition>, ApiError> {
        self.broker.api.fetch.lookup().partition("t", 0)
    }

    /// Returns the number of open partitions of a topic, and the number of its replicas on the disk.
    fn holds(&self, topic: TopicId) -> (usize, usize) {
        let open = self.broker.partitions.open().iter().filter(|partition| partition.id().topic == topic).count();
        (open, self.broker.ctx.log.partitions().iter().filter(|id| id.topic == topic).count())
    }

    pub(super) async fn stop(self) {
        self.broker.stop().await;
        self.tasks.stop().await;
    }
}

#[tokio::test]
async fn only_a_tombstone_deletes_files_of_a_topic() {
    let dir = tempfile::tempdir().unwrap();
    let bench = TestBroker::start(dir.path(), true).await;
    let name = TopicName::new("t").unwrap();
    let key = bench.keys.path(&Key::Topic(name.clone()));

    let id = bench.create(&name, 2).await;
    let value = bench.store.get(&key).await.unwrap().entry.unwrap().value;
    bench.change(Transaction::new().put(key.clone(), "a newer release's")).await;
    assert_eq!(bench.holds(id), (2, 2), "an unreadable value changes nothing");
    bench.change(Transaction::new().put(key.clone(), value.clone())).await;
    assert_eq!(bench.holds(id), (2, 2), "the restored value changes nothing");

    bench.change(Transaction::new().delete(key.clone())).await;
    assert_eq!(bench.holds(id), (0, 2), "a topic without metadata is not served, and its files stay");
    bench.change(Transaction::new().put(key.clone(), value.clone())).await;
    assert_eq!(bench.holds(id), (2, 2), "the restored topic is served again");

    let other = TopicValue { id: TopicId::new(random::uuid()), ..TopicValue::decode(&key, &value).unwrap() };
    bench.change(Transaction::new().put(key.clone(), other.encode())).await;
    assert_eq!(bench.holds(id), (0, 2), "another topic has the name");

    let tombstone = TombstoneValue { name: name.clone(), purged_since_ms: None };
    bench.change(Transaction::new().put(key.clone(), value)).await;
    bench.change(Transaction::new().delete(key).put(bench.keys.tombstone(id), tombstone.encode())).await;
    assert_eq!(bench.holds(id), (0, 0), "the tombstone deletes the files");
    bench.stop().await;
}

#[tokio::test]
async fn moved_replica_is_deleted_only_by_its_own_key() {
    let dir = tempfile::tempdir().unwrap();
    let bench = TestBroker::start(dir.path(), false).await;
    let name = TopicName::new("t").unwrap();
    let id = bench.create(&name, 2).await;
    assert_eq!(bench.holds(id), (2, 2));
    let key = bench.keys.partition(PartitionId::new(id, 0));
    let value = bench.store.get(&key).await.unwrap().entry.unwrap().value;

    bench.change(Transaction::new().put(key.clone(), "a newer release's")).await;
    assert_eq!(bench.holds(id), (1, 2), "a partition with an unreadable value is not served, and its files stay");
    bench.change(Transaction::new().put(key.clone(), value.clone())).await;
    assert_eq!(bench.holds(id), (2, 2), "the restored partition is served again");
    bench.change(Transaction::new().delete(key.clone())).await;
    assert_eq!(bench.holds(id), (1, 2), "a missing key does not delete the files either");

    let other = BrokerId(2);
    let moved = PartitionValue {
        replicas: vec![other],
        leader: Some(other),
        isr: vec![other],
        ..PartitionValue::decode(&key, &value).unwrap()
    };
    bench.change(Transaction::new().put(key, moved.encode())).await;
    wait_until("the files are deleted", || bench.holds(id) == (1, 1)).await;
    bench.stop().await;
}

#[tokio::test]
async fn request_for_foreign_partition_returns_leader() {
    let dir = tempfile::tempdir().unwrap();
    let bench = TestBroker::start(dir.path(), false).await;
    let name = TopicName::new("t").unwrap();
    let id = bench.create(&name, 1).await;
    assert!(bench.partition_0().is_ok());
    let key = bench.keys.partition(PartitionId::new(id, 0));
    let before = bench.store.get(&key).await.unwrap().entry.unwrap().value;
    let before = PartitionValue::decode(&key, &before).unwrap();

    let other = BrokerId(2);
    let registered = bench.store.get(&bench.keys.broker(BrokerId(1))).await.unwrap().entry.unwrap().value;
    let registered = BrokerValue::decode("brokers/1", &registered).unwrap();
    let listeners = Endpoints::new("broker-2:9460".to_owned());
    let theirs = BrokerValue { listeners, incarnation: "q".to_owned(), ..registered };
    let replicas = vec![BrokerId(1), other];
    let (isr, leader_epoch) = (replicas.clone(), LeaderEpoch(before.leader_epoch.0 + 1));
    let led = PartitionValue { replicas, isr, leader: Some(other), leader_epoch, ..before };
    let put = Transaction::new().put(bench.keys.broker(other), theirs.encode()).put(key.clone(), led.encode());
    bench.change(put).await;

    let error = bench.partition_0().err().unwrap();
    assert_eq!((error.code, error.number("leader")), (ErrorCode::NotLeader, Some(2)));
    assert_eq!(error.number("leader_epoch"), Some(i64::from(led.leader_epoch.as_i32())));
    assert_eq!(error.metadata.get("address").map(String::as_str), Some("broker-2:9460"));
    assert!(error.message.contains("broker 2 at broker-2:9460"), "{error}");
    // Broker 2 is no longer registered, and no other replica is in the ISR, so the controller elects no leader.
    let leaderless = PartitionValue { isr: vec![other], ..led.leaderless() };
    bench.change(Transaction::new().delete(bench.keys.broker(other)).put(key, leaderless.encode())).await;
    let error = bench.partition_0().err().unwrap();
    assert_eq!((error.code, error.metadata.get("leader")), (ErrorCode::NotLeader, None), "{error}");
    bench.stop().await;
}

/// A start is not over while a partition is leaderless only for a moment. Regression: one check at such a moment ended
/// the start, and a rolling restart continued before any local replica was in sync.
#[tokio::test]
async fn start_continues_while_partition_is_leaderless() {
    let dir = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::in_memory();
    let bench = TestBroker::with_store(dir.path(), false, store.clone()).await;
    let name = TopicName::new("t").unwrap();
    let id = PartitionId::new(bench.create(&name, 1).await, 0);
    wait_for("the broker leads the partition", async || bench.partition_0().ok()).await;
    let (key, topic, other) = (bench.keys.partition(id), bench.keys.topic(&name), BrokerId(2));
    let value = async |key: &str| store.get(key).await.unwrap().entry.unwrap().value;
    let before = PartitionValue::decode(&key, &value(&key).await).unwrap();
    let of_two = TopicValue { replication_factor: 2, ..TopicValue::decode(&topic, &value(&topic).await).unwrap() };
    let replicas = vec![BrokerId(1), other];
    let unled = PartitionValue { replicas, isr: vec![other], ..before.leaderless() };
    let epoch = LeaderEpoch(unled.leader_epoch.0 + 1);
    let led = PartitionValue { leader: Some(other), leader_epoch: epoch, ..unled.clone() };
    bench.change(Transaction::new().put(key.clone(), unled.encode()).put(topic, of_two.encode())).await;
    bench.stop().await;

    let bench = TestBroker::with_store(dir.path(), false, store).await;
    assert_eq!(bench.broker.health.count_catching_up(), 1, "a leader may be elected");
    assert!(!bench.broker.health.is_started());
    // Broker 2 is registered at a listener that accepts connections and sends nothing, so probes are inconclusive and
    // its registration stays.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let theirs = BrokerValue::running_at(silent.local_addr().unwrap().to_string());
    bench.change(Transaction::new().put(bench.keys.broker(other), theirs.encode()).put(key, led.encode())).await;
    wait_for("the replica is catching up", async || (bench.broker.health.count_catching_up() == 1).then_some(())).await;
    let Readiness::NotReady(reason) = bench.broker.readiness() else { panic!("the replica is not in sync") };
    assert!(reason.contains("local replicas that have not been in sync yet: 1"), "{reason}");
    bench.stop().await;
}

#[tokio::test]
async fn broker_with_failed_directory_is_ready_while_serving() {
    const REASON: &str = "the data directory accepts no writes: cannot write the journal";
    for partitions in [0, 1] {
        let dir = tempfile::tempdir().unwrap();
        let bench = TestBroker::start(dir.path(), true).await;
        if partitions > 0 {
            bench.create(&TopicName::new("t").unwrap(), partitions).await;
        }
        assert!(bench.broker.health().is_ok());
        assert_eq!(bench.broker.readiness(), Readiness::Ready(Vec::new()));
        bench.broker.ctx.log.fail_journal();
        let reason = bench.broker.health().expect_err("the journal failed");
        assert!(reason.starts_with(REASON), "{reason}");
        match bench.broker.readiness() {
            Readiness::NotReady(line) => {
                assert_eq!((partitions, line), (0, format!("no partition can be served: {reason}")));
            }
            Readiness::Ready(impaired) => assert_eq!((partitions, &impaired[0]), (1, &reason)),
        }
        bench.stop().await;
    }
}

#[tokio::test]
async fn watermarks_of_unresponsive_leader_are_unknown() {
    let dir = tempfile::tempdir().unwrap();
    let bench = TestBroker::start(dir.path(), false).await;
    let name = TopicName::new("t").unwrap();
    let id = bench.create(&name, 2).await;
    let key = bench.keys.partition(PartitionId::new(id, 1));
    let before = bench.store.get(&key).await.unwrap().entry.unwrap().value;
    let other = BrokerId(2);
    let theirs = PartitionValue {
        replicas: vec![other],
        isr: vec![other],
        leader: Some(other),
        ..PartitionValue::decode(&key, &before).unwrap()
    };
    let registered = bench.store.get(&bench.keys.broker(BrokerId(1))).await.unwrap().entry.unwrap().value;
    // Broker 2 is registered with the addresses of broker 1: port 1 of this host, where no process listens.
    let silent = BrokerValue { incarnation: "q".to_owned(), ..BrokerValue::decode("brokers/1", &registered).unwrap() };
    bench.change(Transaction::new().put(bench.keys.broker(other), silent.encode()).put(key, theirs.encode())).await;

    // Broker 1 reports partition 0 as soon as it is open.
    let described = wait_for("partition 0 is served", async || {
        let described = bench.broker.api.describe.describe_topic("t").await.unwrap().partitions;
        described[0].leader_error.is_none().then_some(described)
    })
    .await;
    assert_eq!(described[0].leader, Some(1));
    let unknown = described[1].leader_error.as_ref().unwrap();
    assert!(unknown.message.contains("broker 2 does not respond: 127.0.0.1:1"), "{unknown:?}");
    assert_eq!((described[1].leader, &described[1].isr), (Some(2), &vec![2]), "the leader is in the metadata");
    let cluster = bench.broker.api.operations.describe_cluster().await;
    let [mine, silent] = cluster.brokers.as_slice() else { panic!("two brokers expected: {cluster:?}") };
    assert!(mine.stats.is_some() && silent.stats.is_none() && silent.error.is_some(), "{cluster:?}");
    assert_eq!((mine.leader_count, silent.leader_count, cluster.partitions), (1, 1, 2));
    bench.stop().await;
}

/// While a broker's process is suspended, another process is started on a copy of its data directory. This process
/// registers with the same id, and leads in a newer epoch. The resumed process must not lead, although the metadata
/// names its id as the leader.
#[tokio::test]
async fn superseded_broker_leads_no_partition() {
    let dir = tempfile::tempdir().unwrap();
    let bench = TestBroker::start(dir.path(), false).await;
    let id = bench.create(&TopicName::new("t").unwrap(), 1).await;
    let (key, me) = (bench.keys.partition(PartitionId::new(id, 0)), bench.keys.broker(BrokerId(1)));
    wait_for("the broker leads the partition", async || bench.partition_0().ok()).await;
    let before = PartitionValue::decode(&key, &bench.store.get(&key).await.unwrap().entry.unwrap().value).unwrap();
    let registered = bench.store.get(&me).await.unwrap().entry.unwrap();
    let mine = BrokerValue::decode(&me, &registered.value).unwrap();
    let theirs = BrokerValue { incarnation: "q".to_owned(), ..mine };
    let assigned = PartitionValue { leader_epoch: LeaderEpoch(before.leader_epoch.0 + 1), ..before };
    let put = Transaction::new().put(me, theirs.encode()).put(key, assigned.encode());
    bench.store.transact(put).await.unwrap();
    let refused = wait_for("the broker no longer leads", async || bench.partition_0().err()).await;
    assert_eq!(refused.code, ErrorCode::NotLeader);
    let epoch = bench.broker.partitions.by_id(PartitionId::new(id, 0)).unwrap().epoch();
    assert_eq!(epoch, assigned.leader_epoch, "the epoch is that of the new assignment");
    bench.change(Transaction::new()).await;
    assert!(bench.partition_0().is_err(), "the broker stays without leadership");
    bench.stop().await;
}

/// An append frees its memory after its timeout. Regression: appends kept their memory for as long as replicas were
/// offline. A producer that retried took all of the produce memory, and blocked all writes.
#[tokio::test]
async fn timed_out_append_holds_no_memory() {
    let dir = tempfile::tempdir().unwrap();
    let bench = TestBroker::start(dir.path(), false).await;
    let id = bench.create(&TopicName::new("t").unwrap(), 2).await;
    let key = bench.keys.partition(PartitionId::new(id, 0));
    let value = bench.store.get(&key).await.unwrap().entry.unwrap().value;
    let value = PartitionValue::decode(&key, &value).unwrap();
    let both = vec![BrokerId(1), BrokerId(2)];
    let replicated = PartitionValue { replicas: both.clone(), isr: both, ..value };
    let silent = BrokerValue::running_at("127.0.0.1:1".to_owned()).encode();
    bench.change(Transaction::new().put(bench.keys.broker(BrokerId(2)), silent)).await;
    // The store rejects the leader's transactions, so no member is removed from the ISR.
    bench.faulty_store.fail_transactions(vec![Some(faulty::Fault::Refused); 100_000]);
    bench.store.transact(Transaction::new().put(key, replicated.encode())).await.unwrap();
    let append = async |partition, timeout_ms| {
        let append = bench.append(partition, 300_000, timeout_ms);
        tokio::time::timeout(Duration::from_secs(20), append).await.expect("memory was freed")
    };
    wait_for("the broker leads both partitions", async || {
        let waits = append(0, 50).await.is_err_and(|error| error.code == ErrorCode::Timeout);
        (waits && append(1, 30_000).await.is_ok()).then_some(())
    })
    .await;
    // These appends exceed the produce memory of 1 MiB.
    for _ in 0..8 {
        assert_eq!(append(0, 50).await.expect_err("broker 2 does not run").code, ErrorCode::Timeout);
    }
    append(1, 30_000).await.expect("the ISR is this broker alone");
    wait_for("all memory is freed", async || (bench.broker.api.produce.memory().taken() == 0).then_some(())).await;

    // The timeout includes the wait for memory: an append that waited for memory waits for the acknowledgement only for
    // the rest.
    let since = clock::monotonic();
    let holding = futures::future::join_all((0..3).map(|_| bench.append(0, 300_000, 3000)));
    let (_held, late) = futures::join!(holding, bench.append(0, 300_000, 4000));
    assert_eq!(late.expect_err("broker 2 does not run").code, ErrorCode::Timeout);
    let waited = since.elapsed();
    assert!(waited >= Duration::from_secs(4) && waited < Duration::from_secs(6), "{waited:?} of 4 s");
    bench.stop().await;
}

/// Regression: a batch was written although the timeout of its append had passed. The client got a timeout error and
/// sent the batch again.
#[tokio::test]
async fn append_past_its_deadline_is_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let bench = TestBroker::start(dir.path(), false).await;
    let name = TopicName::new("t").unwrap();
    let created = async {
        // The append below starts first, and waits for the unknown topic until this task creates it.
        let since = clock::monotonic();
        wait_until("the timeout of the append has passed", || since.elapsed() > Duration::from_millis(1)).await;
        bench.create(&name, 1).await
    };
    let (late, id) = futures::join!(bench.append(0, 10, 1), created);
    let error = late.expect_err("the timeout passed before the topic existed");
    assert!(matches!(error.code, ErrorCode::Overloaded | ErrorCode::UnknownTopic), "{error}");
    let partition = bench.broker.partitions.by_id(PartitionId::new(id, 0)).expect("the partition is open");
    assert_eq!(partition.watermarks().log_end, Offset::ZERO);
    bench.stop().await;
}

/// If the tombstone cannot be read, the read is retried. Regression: the metadata store was unavailable for a moment
/// after a topic was deleted, and the topic's files stayed until the next start.
#[tokio::test]
async fn topic_deletion_is_completed_after_store_outage() {
    let dir = tempfile::tempdir().unwrap();
    let bench = TestBroker::start(dir.path(), true).await;
    let name = TopicName::new("t").unwrap();
    let id = bench.create(&name, 2).await;
    assert_eq!(bench.holds(id), (2, 2));
    bench.faulty_store.fail_gets(1);
    let tombstone = TombstoneValue { name: name.clone(), purged_since_ms: None };
    let deleted = Transaction::new().delete(bench.keys.topic(&name)).put(bench.keys.tombstone(id), tombstone.encode());
    bench.store.transact(deleted).await.unwrap();
    wait_until("the files are deleted", || bench.holds(id) == (0, 0)).await;
    bench.stop().await;
}

/// Starts a broker, creates topic `t` with one partition that the broker leads, and stops the broker. Returns the
/// partition's value before the stop.
async fn led_before(dir: &Path, store: &EmbeddedStore) -> (TopicName, PartitionId, PartitionValue) {
    let bench = TestBroker::with_store(dir, false, store.clone()).await;
    let name = TopicName::new("t").unwrap();
    let id = PartitionId::new(bench.create(&name, 1).await, 0);
    wait_until("the broker leads", || {
        bench.broker.partitions.by_id(id).is_some_and(|partition| partition.status().role.leads())
    })
    .await;
    let value = stored_value(store, &bench.keys, id).await;
    assert_eq!((value.leader, value.isr.as_slice()), (Some(BrokerId(1)), &[BrokerId(1)][..]));
    bench.stop().await;
    (name, id, value)
}

async fn stored_value(store: &EmbeddedStore, keys: &Keys, id: PartitionId) -> PartitionValue {
    let entry = store.get(&keys.partition(id)).await.unwrap().entry.unwrap();
    PartitionValue::decode(&entry.key, &entry.value).unwrap()
}

/// Regression: a partition value was unreadable at the start, so the startup verification did not release its
/// leadership. After the value was restored, the broker led in an epoch from before its process, and assigned the
/// offsets of lost records again.
#[tokio::test]
async fn restored_value_grants_no_leadership_until_restart() {
    let (dir, store) = (tempfile::tempdir().unwrap(), EmbeddedStore::in_memory());
    let (_, id, before) = led_before(dir.path(), &store).await;
    let key = Keys::new("test").unwrap().partition(id);
    store.transact(Transaction::new().put(key.clone(), UNREADABLE)).await.unwrap();
    let bench = TestBroker::with_store(dir.path(), false, store.clone()).await;
    bench.change(Transaction::new().put(key, before.encode())).await;
    let error = bench.partition_0().err().expect("the replica is held back");
    assert_eq!(error.code, ErrorCode::StorageFailed);
    assert!(error.message.contains("restart the broker"), "{error}");
    assert!(bench.broker.partitions.by_id(id).is_none(), "the replica is not open");
    let Readiness::Ready(impaired) = bench.broker.readiness() else { panic!("the broker is ready") };
    assert!(impaired.iter().any(|line| line.contains("unreadable at the start: 1")), "{impaired:?}");
    bench.stop().await;

    let bench = TestBroker::with_store(dir.path(), false, store.clone()).await;
    wait_until("the broker leads again", || {
        bench.broker.partitions.by_id(id).is_some_and(|partition| partition.status().role.leads())
    })
    .await;
    let after = stored_value(&store, &bench.keys, id).await;
    // After the restart, the startup verification released the old leadership, and the broker was elected again: two
    // epochs later.
    assert_eq!((after.leader_epoch.0, &after.isr), (before.leader_epoch.0 + 2, &before.isr));
    assert_eq!(bench.broker.partitions.by_id(id).unwrap().epoch(), after.leader_epoch);
    bench.stop().await;
}

const UNREADABLE: &str = "{\"replicas\":[";

/// Creates a topic as [`led_before`] does, with a replication factor of 2. Returns its partition value with broker 2 as
/// a second in-sync replica. This value is not stored.
async fn led_with_peer(dir: &Path, store: &EmbeddedStore) -> (Keys, PartitionId, PartitionValue) {
    let (name, id, before) = led_before(dir, store).await;
    let keys = Keys::new("test").unwrap();
    let key = keys.topic(&name);
    let topic = TopicValue::decode(&key, &store.get(&key).await.unwrap().entry.unwrap().value).unwrap();
    let topic = TopicValue { replication_factor: 2, ..topic };
    store.transact(Transaction::new().put(key, topic.encode())).await.unwrap();
    let members = vec![BrokerId(1), BrokerId(2)];
    (keys, id, PartitionValue { replicas: members.clone(), isr: members, ..before })
}

async fn register_peer(store: &EmbeddedStore, keys: &Keys, id: BrokerId) {
    let value = BrokerValue::running_at("127.0.0.1:1".to_owned());
    store.transact(Transaction::new().put(keys.broker(id), value.encode())).await.unwrap();
}

/// A broker that holds back its replica stays the leader in the metadata if no other ISR member is certain to be
/// verified. Regression: it resigned although the replicas of all other members were offline or held back too. Its
/// intact replica left the ISR, and no restart made it the leader again.
#[tokio::test]
async fn held_back_leader_stays_without_verified_successor() {
    for peer_restarted in [false, true] {
        let (dir, store) = (tempfile::tempdir().unwrap(), EmbeddedStore::in_memory());
        let (keys, id, value) = led_with_peer(dir.path(), &store).await;
        store.transact(Transaction::new().put(keys.partition(id), UNREADABLE)).await.unwrap();
        if peer_restarted {
            register_peer(&store, &keys, BrokerId(2)).await;
        }
        let bench = TestBroker::with_store(dir.path(), false, store.clone()).await;
        bench.change(Transaction::new().put(keys.partition(id), value.encode())).await;
        assert!(bench.broker.partitions.by_id(id).is_none(), "the replica is not open");
        bench.stop().await;
        assert_eq!(stored_value(&store, &keys, id).await, value);

        let bench = TestBroker::with_store(dir.path(), false, store.clone()).await;
        wait_until("the broker leads again", || {
            bench.broker.partitions.by_id(id).is_some_and(|partition| partition.status().role.leads())
        })
        .await;
        bench.stop().await;
    }
}

/// If another ISR member registered before the unreadable value was written, that member has verified its replica. So
/// the broker that holds back its replica resigns, and then follows.
#[tokio::test]
async fn held_back_leader_resigns_for_verified_peer_and_follows() {
    let (dir, store) = (tempfile::tempdir().unwrap(), EmbeddedStore::in_memory());
    let (keys, id, value) = led_with_peer(dir.path(), &store).await;
    register_peer(&store, &keys, BrokerId(2)).await;
    store.transact(Transaction::new().put(keys.partition(id), UNREADABLE)).await.unwrap();
    let bench = TestBroker::with_store(dir.path(), false, store.clone()).await;
    bench.change(Transaction::new().put(keys.partition(id), value.encode())).await;
    // After the resignation, the broker is in neither ISR nor ELR, so its replica needs no verification.
    wait_until("the replica is open", || bench.broker.partitions.by_id(id).is_some()).await;
    let after = stored_value(&store, &keys, id).await;
    assert_eq!(after.isr, [BrokerId(2)]);
    assert!(after.leader_epoch > value.leader_epoch, "{after:?}");
    bench.stop().await;
}

/// An unverified replica outside ISR and ELR is not held back. Regression: a replica that a reassignment added was held
/// back, so the reassignment did not complete.
#[tokio::test]
async fn restored_value_opens_replica_outside_isr_and_elr() {
    let (dir, other, store) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), EmbeddedStore::in_memory());
    let (keys, id, before) = led_with_peer(dir.path(), &store).await;
    let (me, peer) = (BrokerId(1), BrokerId(2));
    let (replicas, isr) = (vec![peer, me], vec![peer]);
    let value = PartitionValue { replicas, isr, leader: Some(peer), adding: vec![me], ..before };
    store.transact(Transaction::new().put(keys.partition(id), UNREADABLE)).await.unwrap();
    register_peer(&store, &keys, peer).await;
    let bench = TestBroker::with_store(other.path(), false, store.clone()).await;
    bench.change(Transaction::new().put(keys.partition(id), value.encode())).await;
    assert!(bench.broker.partitions.by_id(id).is_some(), "the replica is created");
    let Readiness::Ready(impaired) = bench.broker.readiness() else { panic!("the broker is ready") };
    assert!(!impaired.iter().any(|line| line.contains("unreadable")), "{impaired:?}");
    bench.stop().await;
}

/// Replicas of a topic with an unreadable value stay in the ISR and ELR at a start. Regression: a starting broker did
/// not open them, treated them as lost, and left the ISR and ELR. After a start of all brokers, no replica could lead
/// without loss.
#[tokio::test]
async fn unreadable_topic_at_start_keeps_isr_membership() {
    let (dir, store) = (tempfile::tempdir().unwrap(), EmbeddedStore::in_memory());
    let (name, id, before) = led_before(dir.path(), &store).await;
    let key = Keys::new("test").unwrap().topic(&name);
    let topic = store.get(&key).await.unwrap().entry.unwrap().value;
    store.transact(Transaction::new().put(key.clone(), "[1, 2]")).await.unwrap();
    let bench = TestBroker::with_store(dir.path(), false, store.clone()).await;
    assert_eq!(stored_value(&store, &bench.keys, id).await, before.leaderless());
    store.transact(Transaction::new().put(key, topic)).await.unwrap();
    wait_until("the broker leads again", || {
        bench.broker.partitions.by_id(id).is_some_and(|partition| partition.status().role.leads())
    })
    .await;
    bench.stop().await;
}

/// While a topic value is unreadable, changes of its partition values are still applied. Regression: the first change,
/// for example of the ISR, closed the replica on every broker.
#[tokio::test]
async fn partitions_of_unreadable_topic_follow_their_values() {
    let (dir, store) = (tempfile::tempdir().unwrap(), EmbeddedStore::in_memory());
    let bench = TestBroker::with_store(dir.path(), false, store.clone()).await;
    let name = TopicName::new("t").unwrap();
    let id = PartitionId::new(bench.create(&name, 1).await, 0);
    wait_for("the broker leads the partition", async || bench.partition_0().ok()).await;
    let before = stored_value(&store, &bench.keys, id).await;
    let epoch = LeaderEpoch(before.leader_epoch.0 + 1);
    let after = PartitionValue { leader_epoch: epoch, ..before };
    bench.change(Transaction::new().put(bench.keys.topic(&name), UNREADABLE)).await;
    bench.change(Transaction::new().put(bench.keys.partition(id), after.encode())).await;
    wait_until("the broker leads in the new epoch", || {
        let status = bench.broker.partitions.by_id(id).map(|partition| partition.status());
        status.is_some_and(|status| status.role.leads() && status.epoch == epoch)
    })
    .await;
    bench.stop().await;
}

/// Regression: batches were recompressed first and waited for produce memory afterwards. Thousands of small batches
/// were in memory in their larger form, uncharged.
#[tokio::test]
async fn recompression_takes_memory_before_decompression() {
    let dir = tempfile::tempdir().unwrap();
    let bench = TestBroker::start(dir.path(), true).await;
    let config = ConfigMap::from([("compression.type".to_owned(), "zstd".to_owned())]);
    bench.create_with(&TopicName::new("t").unwrap(), 1, config).await;
    let append = async |timeout_ms| {
        let mut batch = BatchBuilder::new(Compression::None);
        batch.push(clock::wall_ms(), None, Some(&[7; 100]), &[]).unwrap();
        let payload = Some(v1::append_request::Payload::Batch(batch.finish(None).unwrap().to_bytes()));
        let request = v1::AppendRequest { topic: "t".to_owned(), timeout_ms, payload, ..Default::default() };
        bench.broker.api.produce.append(request, &ProducerIdQuota::default(), &bench.broker.api.call_memory()).await
    };
    let memory = bench.broker.api.produce.memory().of(1 << 20);
    let taken = memory.take(memory.bytes() - (8 << 10)).await;
    let error = append(300).await.expect_err("there is memory for the batch, but not for the recompressed batch");
    assert_eq!((error.code, error.retryable), (ErrorCode::Overloaded, true));
    assert!(error.message.contains("limits.produce_memory_bytes"), "{error}");
    drop(taken);
    append(20_000).await.expect("memory was freed");
    wait_for("all memory is freed", async || (memory.taken() == 0).then_some(())).await;
    bench.stop().await;
}

/// Regression: lists of records were compressed on the thread of the call, up to 64 MiB at once, without a limit per
/// connection.
#[tokio::test]
async fn large_record_list_waits_for_compression_permit() {
    let dir = tempfile::tempdir().unwrap();
    let bench = TestBroker::start(dir.path(), true).await;
    let config = ConfigMap::from([("compression.type".to_owned(), "gzip".to_owned())]);
    bench.create_with(&TopicName::new("t").unwrap(), 1, config).await;
    let memory = bench.broker.api.call_memory();
    let append = async |value: Vec<u8>, timeout_ms| {
        let records = vec![v1::Record { value: Some(value.into()), ..Default::default() }];
        let payload = Some(v1::append_request::Payload::Records(v1::RecordList { records }));
        let request = v1::AppendRequest { topic: "t".to_owned(), timeout_ms, payload, ..Default::default() };
        bench.broker.api.produce.append(request, &ProducerIdQuota::default(), &memory).await
    };
    let permit = memory.rewriter(bench.broker.api.produce.decompressor()).with_caller_permit().await;
    append(vec![7; 1000], 20_000).await.expect("a small list is compressed at once");
    let error = append(vec![7; 2 << 20], 300).await.expect_err("another batch of the connection has the permit");
    assert_eq!((error.code, error.retryable), (ErrorCode::Overloaded, true));
    drop(permit);
    append(vec![7; 2 << 20], 20_000).await.expect("2 MiB compress to a few kilobytes");
    let mut noise = vec![0; 2 << 20];
    random::fill(&mut noise);
    let error = append(noise, 20_000).await.expect_err("random data stays larger than max.message.bytes");
    assert_eq!(error.code, ErrorCode::RecordTooLarge);
    assert!(["1048588", "max.message.bytes"].iter().all(|part| error.message.contains(part)), "{error}");
    bench.stop().await;
}
