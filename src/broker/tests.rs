//! One broker on a real disk with its metadata in memory: its behaviour when the metadata changes.

use std::{path::Path, time::Duration};

use super::{evidence::Evidence, peer::LinkLost as _, *};
use crate::{
    client::{
        Tcp,
        peers::{How, Peers},
    },
    cluster::{
        BrokerValue, DeletedValue, EmbeddedStore, Endpoints, Key, NewTopic, PartitionValue, Registration, Revision,
        Shown, TopicValue, Transaction, Value as _,
        faulty::{self, Faulty},
        prove,
    },
    log::{Identity, OpenError, Options, RealDisk},
    model::{Compression, LeaderEpoch, TopicId, TopicName},
    proto::{
        error::{ApiError, ErrorCode},
        v1,
    },
    record::BatchBuilder,
    task::{
        random,
        test_timeout::{wait_for, wait_until},
    },
};

pub(super) struct Bench {
    pub(super) broker: Arc<Broker>,
    store: EmbeddedStore,
    /// The store as the broker reaches it, with injected faults.
    link: Faulty,
    keys: Keys,
    tasks: Tasks,
}

impl Bench {
    pub(super) async fn start(dir: &Path, alone: bool) -> Self {
        Self::over(dir, alone, EmbeddedStore::in_memory()).await
    }

    /// Starts as a broker of a cluster does: opens its replicas, verifies them, registers, and becomes active.
    pub(super) async fn over(dir: &Path, alone: bool, store: EmbeddedStore) -> Self {
        let id = BrokerId(1);
        let identity = Identity { cluster: "test".to_owned(), broker: id };
        let options = Options { journal_bytes: 8 << 20, ..Options::default() };
        let open = || Log::open(Arc::new(RealDisk::default()), dir, &identity, options.clone());
        // A task that was cancelled at the previous stop may hold the directory for a moment.
        let mut log = open();
        for _ in 0..6_000 {
            if !matches!(log, Err(OpenError::InUse { .. })) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
            log = open();
        }
        let log = log.unwrap();
        let (keys, tasks) = (Keys::new("test").unwrap(), Tasks::new());
        let directory_id = log.directory_id().to_string();
        let value = BrokerValue { directory_id, ..BrokerValue::running_at("127.0.0.1:1".to_owned()) };
        let link = Faulty::new(store.clone());
        let shared: Arc<dyn MetaStore> = Arc::new(link.clone());
        let view = View::start(Arc::clone(&shared), keys.clone(), &tasks);
        view.reached(Revision::ZERO).await;
        let settings = Settings {
            disk_full_percent: 100,
            catch_up_timeout: Duration::from_secs(60),
            id,
            cluster: "test".to_owned(),
            topic_defaults: ConfigMap::new(),
            produce_memory_bytes: 1 << 20,
            request_memory_bytes: 64 << 20,
            response_memory_bytes: 64 << 20,
            decompression_memory_bytes: 256 << 20,
            producer_ids_per_minute: 1000,
            upkeep_workers: 1,
            retention_interval: Duration::from_secs(3600),
            fetch_max_wait: Duration::from_secs(5),
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
        let shown = Shown {
            directory_id: registration.value.directory_id.clone(),
            uptimes: vec!["p".to_owned()],
            clean: true,
            on_disk: broker.log.partitions().into_iter().collect(),
            whole: broker.whole().await,
        };
        registration.clear().await.unwrap();
        let proof = prove(&broker.store, &keys, id, &shown, &ConfigMap::new()).await.unwrap();
        let session = registration.register(proof.judged, &view, &tasks).await.unwrap();
        view.reached(session.epoch().unwrap()).await;
        broker.begin(&session, proof.unread).await;
        Self { broker, store, link, keys, tasks }
    }

    pub(super) async fn create(&self, name: &TopicName, partitions: u32) -> TopicId {
        self.create_with(name, partitions, ConfigMap::new()).await
    }

    pub(super) async fn create_with(&self, name: &TopicName, partitions: u32, config: ConfigMap) -> TopicId {
        let replication_factor = 1;
        let new = NewTopic { name: name.clone(), partitions, replication_factor, config, validate_only: false };
        let made = self.broker.topics.create(new).await.unwrap();
        self.broker
            .hosted
            .until(|hosted| hosted.topic(name).is_some_and(|topic| topic.revision >= made.revision))
            .await;
        made.value.id
    }

    /// Changes the metadata directly in the store, and returns when the broker has applied that.
    async fn change(&self, transaction: Transaction) {
        self.store.transact(transaction).await.unwrap();
        // A later change is applied later, so its end shows that this change is applied.
        let later = TopicName::new("later").unwrap();
        self.create(&later, 1).await;
        self.broker.topics.delete(&later).await.unwrap();
        self.broker.hosted.until(|hosted| hosted.topic(&later).is_none()).await;
    }

    /// Appends one record of this size to topic `t`.
    pub(super) async fn append(
        &self,
        partition: i32,
        bytes: usize,
        timeout_ms: u32,
    ) -> Result<v1::AppendResponse, ApiError> {
        let records = vec![v1::Record { value: Some(vec![7; bytes].into()), ..Default::default() }];
        let payload = Some(v1::append_request::Payload::Records(v1::PlainRecords { records }));
        let topic = "t".to_owned();
        let request = v1::AppendRequest { topic, partition, timeout_ms, payload, ..Default::default() };
        self.broker.append(request, &ProducerIdQuota::default(), &self.broker.call_memory()).await
    }

    /// Returns the number of open partitions of a topic, and of its replicas on the disk.
    fn holds(&self, topic: TopicId) -> (usize, usize) {
        let open = self.broker.hosted.open().iter().filter(|partition| partition.id().topic == topic).count();
        (open, self.broker.log.partitions().iter().filter(|id| id.topic == topic).count())
    }

    pub(super) async fn stop(self) {
        self.broker.stop().await;
        self.tasks.stop().await;
    }
}

#[tokio::test]
async fn only_a_tombstone_deletes_files_of_a_topic() {
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
async fn moved_replica_is_deleted_only_by_its_own_key() {
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
    wait_until("its files go", || bench.holds(id) == (1, 1)).await;
    bench.stop().await;
}

#[tokio::test]
async fn request_for_foreign_partition_returns_leader() {
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
    let listeners = Endpoints::new("broker-2:9460".to_owned());
    let theirs = BrokerValue { listeners, incarnation: "q".to_owned(), ..registered };
    let replicas = vec![BrokerId(1), other];
    let (isr, leader_epoch) = (replicas.clone(), LeaderEpoch(before.leader_epoch.0 + 1));
    let led = PartitionValue { replicas, isr, leader: Some(other), leader_epoch, ..before };
    let put = Transaction::new().put(bench.keys.broker(other), theirs.encode()).put(key.clone(), led.encode());
    bench.change(put).await;

    let fault = bench.broker.partition("t", 0).err().unwrap();
    assert_eq!((fault.code, fault.number("leader")), (ErrorCode::NotLeader, Some(2)));
    assert_eq!(fault.number("leader_epoch"), Some(i64::from(led.leader_epoch.as_i32())));
    assert_eq!(fault.metadata.get("address").map(String::as_str), Some("broker-2:9460"));
    assert!(fault.message.contains("broker 2 at broker-2:9460"), "{fault}");
    // Broker 2 is gone, and no other replica is in sync, so the controller elects no leader.
    let nobody = PartitionValue { isr: vec![other], ..led.leaderless() };
    bench.change(Transaction::new().delete(bench.keys.broker(other)).put(key, nobody.encode())).await;
    let fault = bench.broker.partition("t", 0).err().unwrap();
    assert_eq!((fault.code, fault.metadata.get("leader")), (ErrorCode::NotLeader, None), "{fault}");
    bench.stop().await;
}

/// Regression: one check in a leaderless moment ended the start for good. The rolling restart continued before any replica here was in
/// sync.
#[tokio::test]
async fn start_continues_while_partition_is_leaderless() {
    let dir = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::in_memory();
    let bench = Bench::over(dir.path(), false, store.clone()).await;
    let name = TopicName::new("t").unwrap();
    let id = PartitionId::new(bench.create(&name, 1).await, 0);
    wait_for("it is led here", async || bench.broker.partition("t", 0).ok()).await;
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

    let bench = Bench::over(dir.path(), false, store).await;
    assert_eq!(bench.broker.catching_up(), 1, "one may be elected");
    assert!(!bench.broker.is_started());
    // The listener accepts connections and sends nothing, so the broker is not declared gone.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let theirs = BrokerValue::running_at(silent.local_addr().unwrap().to_string());
    bench.change(Transaction::new().put(bench.keys.broker(other), theirs.encode()).put(key, led.encode())).await;
    wait_for("it is behind", async || (bench.broker.catching_up() == 1).then_some(())).await;
    let Readiness::NotReady(why) = bench.broker.readiness() else { panic!("it is not in sync") };
    assert!(why.contains("replicas of this broker that have not been in sync yet: 1"), "{why}");
    bench.stop().await;
}

#[tokio::test]
async fn broker_with_failed_directory_is_ready_while_serving() {
    const WHY: &str = "the data directory takes no writes: the journal could not be written";
    for partitions in [0, 1] {
        let dir = tempfile::tempdir().unwrap();
        let bench = Bench::start(dir.path(), true).await;
        if partitions > 0 {
            bench.create(&TopicName::new("t").unwrap(), partitions).await;
        }
        assert!(bench.broker.health().is_ok());
        assert_eq!(bench.broker.readiness(), Readiness::Ready(Vec::new()));
        bench.broker.log.fail_journal();
        let why = bench.broker.health().expect_err("the process should be restarted");
        assert!(why.starts_with(WHY), "{why}");
        match bench.broker.readiness() {
            Readiness::NotReady(line) => {
                assert_eq!((partitions, line), (0, format!("serves nothing: {why}")));
            }
            Readiness::Ready(impaired) => assert_eq!((partitions, &impaired[0]), (1, &why)),
        }
        bench.stop().await;
    }
}

#[tokio::test]
async fn watermarks_of_unresponsive_leader_are_unknown() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::start(dir.path(), false).await;
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
    // No process listens at that port.
    let silent = BrokerValue { incarnation: "q".to_owned(), ..BrokerValue::decode("brokers/1", &registered).unwrap() };
    bench.change(Transaction::new().put(bench.keys.broker(other), silent.encode()).put(key, theirs.encode())).await;

    // Partition 0 is led here as soon as it is open.
    let described = wait_for("partition 0 is served", async || {
        let described = bench.broker.describe_topic("t").await.unwrap().partitions;
        described[0].unanswered.is_none().then_some(described)
    })
    .await;
    assert_eq!(described[0].leader, Some(1));
    let unknown = described[1].unanswered.as_ref().unwrap();
    assert!(unknown.message.contains("broker 2 does not answer: 127.0.0.1:1"), "{unknown:?}");
    assert_eq!((described[1].leader, &described[1].isr), (Some(2), &vec![2]), "the metadata knows who");
    let cluster = bench.broker.describe_cluster().await;
    let [mine, silent] = cluster.brokers.as_slice() else { panic!("two: {cluster:?}") };
    assert!(mine.figures.is_some() && silent.figures.is_none() && silent.unanswered.is_some(), "{cluster:?}");
    assert_eq!((mine.leaders, silent.leaders, cluster.partitions), (1, 1, 2));
    bench.stop().await;
}

/// A suspended process resumes, and its broker id leads in a newer epoch. The leader is a process that was started on a copy of its
/// directory.
#[tokio::test]
async fn superseded_broker_leads_no_partition() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::start(dir.path(), false).await;
    let id = bench.create(&TopicName::new("t").unwrap(), 1).await;
    let (key, me) = (bench.keys.partition(PartitionId::new(id, 0)), bench.keys.broker(BrokerId(1)));
    wait_for("it is led here", async || bench.broker.partition("t", 0).ok()).await;
    let before = PartitionValue::decode(&key, &bench.store.get(&key).await.unwrap().entry.unwrap().value).unwrap();
    let registered = bench.store.get(&me).await.unwrap().entry.unwrap();
    let mine = BrokerValue::decode(&me, &registered.value).unwrap();
    let theirs = BrokerValue { incarnation: "q".to_owned(), ..mine };
    let given = PartitionValue { leader_epoch: LeaderEpoch(before.leader_epoch.0 + 1), ..before };
    let put = Transaction::new().put(me, theirs.encode()).put(key, given.encode());
    bench.store.transact(put).await.unwrap();
    let refused = wait_for("it leads no more", async || bench.broker.partition("t", 0).err()).await;
    assert_eq!(refused.code, ErrorCode::NotLeader);
    let epoch = bench.broker.hosted.by_id(PartitionId::new(id, 0)).unwrap().epoch();
    assert_eq!(epoch, given.leader_epoch, "by what was given, and not by what it had");
    bench.change(Transaction::new()).await;
    assert!(bench.broker.partition("t", 0).is_err(), "and so it stays");
    bench.stop().await;
}

/// Regression: appends may wait for hours for replicas that are offline. A producer that retried took all of the produce memory, and
/// blocked all writes.
#[tokio::test]
async fn timed_out_append_holds_no_memory() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::start(dir.path(), false).await;
    let id = bench.create(&TopicName::new("t").unwrap(), 2).await;
    let key = bench.keys.partition(PartitionId::new(id, 0));
    let value = bench.store.get(&key).await.unwrap().entry.unwrap().value;
    let value = PartitionValue::decode(&key, &value).unwrap();
    let both = vec![BrokerId(1), BrokerId(2)];
    let shared = PartitionValue { replicas: both.clone(), isr: both, ..value };
    let silent = BrokerValue::running_at("127.0.0.1:1".to_owned()).encode();
    bench.change(Transaction::new().put(bench.keys.broker(BrokerId(2)), silent)).await;
    // No member can be removed from the ISR meanwhile.
    bench.link.transactions(vec![Some(faulty::Fault::Refused); 100_000]);
    bench.store.transact(Transaction::new().put(key, shared.encode())).await.unwrap();
    let append = async |partition, timeout_ms| {
        let append = bench.append(partition, 300_000, timeout_ms);
        tokio::time::timeout(Duration::from_secs(20), append).await.expect("there is room")
    };
    wait_for("both are led here", async || {
        let waits = append(0, 50).await.is_err_and(|fault| fault.code == ErrorCode::Timeout);
        (waits && append(1, 30_000).await.is_ok()).then_some(())
    })
    .await;
    // These appends exceed the produce memory of 1 MiB.
    for _ in 0..8 {
        assert_eq!(append(0, 50).await.expect_err("broker 2 is not there").code, ErrorCode::Timeout);
    }
    append(1, 30_000).await.expect("nobody else has to hold this one");
    wait_for("all of it is given back", async || (bench.broker.produce_memory.taken() == 0).then_some(())).await;

    // The wait for memory counts: only the rest of the time is for the acknowledgement.
    let since = clock::monotonic();
    let holding = futures::future::join_all((0..3).map(|_| bench.append(0, 300_000, 3000)));
    let (_held, late) = futures::join!(holding, bench.append(0, 300_000, 4000));
    assert_eq!(late.expect_err("broker 2 is not there").code, ErrorCode::Timeout);
    let waited = since.elapsed();
    assert!(waited >= Duration::from_secs(4) && waited < Duration::from_secs(6), "{waited:?} of 4 s");
    bench.stop().await;
}

/// Regression: a batch without remaining time was written all the same. The client got a timeout and sent the batch again.
#[tokio::test]
async fn append_past_its_deadline_is_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::start(dir.path(), false).await;
    let name = TopicName::new("t").unwrap();
    let created = async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        bench.create(&name, 1).await
    };
    // A broker waits a moment for an unknown topic.
    let (late, id) = futures::join!(bench.append(0, 10, 1), created);
    let fault = late.expect_err("its time was over before there was such a topic");
    assert!(matches!(fault.code, ErrorCode::Overloaded | ErrorCode::UnknownTopic), "{fault}");
    let partition = bench.broker.hosted.by_id(PartitionId::new(id, 0)).expect("it is led here");
    assert_eq!(partition.marks().log_end, Offset::ZERO);
    bench.stop().await;
}

/// Regression: the store was unavailable for a moment after the metadata cache showed the deletion. The files stayed until the next start.
#[tokio::test]
async fn topic_deletion_is_completed_after_store_outage() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::start(dir.path(), true).await;
    let name = TopicName::new("t").unwrap();
    let id = bench.create(&name, 2).await;
    assert_eq!(bench.holds(id), (2, 2));
    bench.link.fail_gets(1);
    let mark = DeletedValue { name: name.clone(), gone_since_ms: None };
    let deleted = Transaction::new().delete(bench.keys.topic(&name)).put(bench.keys.deleted(id), mark.encode());
    bench.store.transact(deleted).await.unwrap();
    wait_until("its files go", || bench.holds(id) == (0, 0)).await;
    bench.stop().await;
}

/// Regression: a process exited while the store had no leader. The partitions waited until the lease of that process expired, although all
/// peers had detected the exit.
#[tokio::test]
async fn failed_deletion_of_registration_is_retried() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::start(dir.path(), false).await;
    bench.broker.view.until(|state| state.controller() == Some(BrokerId(1))).await;
    let key = bench.keys.broker(BrokerId(2));
    // No process listens at that port.
    let gone = BrokerValue::running_at("127.0.0.1:1".to_owned());
    bench.store.transact(Transaction::new().put(key.clone(), gone.encode())).await.unwrap();
    let epoch = bench.store.get(&key).await.unwrap().entry.unwrap().create_revision;
    bench.broker.view.reached(epoch).await;
    let wait = Duration::from_secs(1);
    let peers = Peers::new(Arc::new(Tcp::between_brokers(wait)), wait);
    let evidence = Evidence::new(Arc::downgrade(&bench.broker), peers, bench.tasks.clone());
    bench.link.transactions([Some(faulty::Fault::Refused); 4]);
    evidence.link_lost(BrokerId(2), epoch, How::Refused);
    wait_for("its registration is taken away", async || {
        bench.store.get(&key).await.unwrap().entry.is_none().then_some(())
    })
    .await;
    // The same process is registered again, so the report was false, and further reports are ignored.
    bench.change(Transaction::new().put(key.clone(), gone.encode())).await;
    let epoch = bench.store.get(&key).await.unwrap().entry.unwrap().create_revision;
    let report = peer::Report { reporter: BrokerId(1), broker: BrokerId(2), epoch, seen: String::new() };
    assert_eq!(bench.broker.judge(report, &evidence).await, Ok(false));
    bench.stop().await;
}

/// Creates one topic of one partition, which was led in an incarnation that has ended.
async fn led_before(dir: &Path, store: &EmbeddedStore) -> (TopicName, PartitionId, PartitionValue) {
    let bench = Bench::over(dir, false, store.clone()).await;
    let name = TopicName::new("t").unwrap();
    let id = PartitionId::new(bench.create(&name, 1).await, 0);
    wait_until("it leads", || bench.broker.hosted.by_id(id).is_some_and(|partition| partition.standing().role.leads()))
        .await;
    let value = stands(store, &bench.keys, id).await;
    assert_eq!((value.leader, value.isr.as_slice()), (Some(BrokerId(1)), &[BrokerId(1)][..]));
    bench.stop().await;
    (name, id, value)
}

async fn stands(store: &EmbeddedStore, keys: &Keys, id: PartitionId) -> PartitionValue {
    let entry = store.get(&keys.partition(id)).await.unwrap().entry.unwrap();
    PartitionValue::decode(&entry.key, &entry.value).unwrap()
}

/// Regression: the value was unreadable at the start, so nothing was verified or released. Once the value was restored, the broker led in
/// an epoch from before its process, and assigned the offsets of lost records again.
#[tokio::test]
async fn restored_value_grants_no_leadership_of_old_epoch() {
    let (dir, store) = (tempfile::tempdir().unwrap(), EmbeddedStore::in_memory());
    let (_, id, before) = led_before(dir.path(), &store).await;
    let key = Keys::new("test").unwrap().partition(id);
    store.transact(Transaction::new().put(key.clone(), "{\"replicas\":[")).await.unwrap();
    let bench = Bench::over(dir.path(), false, store.clone()).await;
    assert!(bench.broker.unproven.holds_back(id));
    store.transact(Transaction::new().put(key, before.encode())).await.unwrap();
    wait_until("it leads again", || {
        bench.broker.hosted.by_id(id).is_some_and(|partition| partition.standing().role.leads())
    })
    .await;
    let after = stands(&store, &bench.keys, id).await;
    // The broker released that leadership and was elected again.
    assert_eq!((after.leader_epoch.0, &after.isr), (before.leader_epoch.0 + 2, &before.isr));
    assert_eq!(bench.broker.hosted.by_id(id).unwrap().epoch(), after.leader_epoch);
    bench.stop().await;
}

/// Regression: the broker could not open the replicas of a topic with an unreadable value, took them for lost, and left the ISR and ELR. If
/// all brokers started so, no replica could lead without loss.
#[tokio::test]
async fn unreadable_topic_at_start_keeps_isr_membership() {
    let (dir, store) = (tempfile::tempdir().unwrap(), EmbeddedStore::in_memory());
    let (name, id, before) = led_before(dir.path(), &store).await;
    let key = Keys::new("test").unwrap().topic(&name);
    let topic = store.get(&key).await.unwrap().entry.unwrap().value;
    store.transact(Transaction::new().put(key.clone(), "[1, 2]")).await.unwrap();
    let bench = Bench::over(dir.path(), false, store.clone()).await;
    assert_eq!(stands(&store, &bench.keys, id).await, before.leaderless());
    store.transact(Transaction::new().put(key, topic)).await.unwrap();
    wait_until("it leads again", || {
        bench.broker.hosted.by_id(id).is_some_and(|partition| partition.standing().role.leads())
    })
    .await;
    bench.stop().await;
}

/// Regression: thousands of small batches waited for memory in their large form, uncharged.
#[tokio::test]
async fn recompression_takes_memory_before_decompression() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::start(dir.path(), true).await;
    let config = ConfigMap::from([("compression.type".to_owned(), "zstd".to_owned())]);
    bench.create_with(&TopicName::new("t").unwrap(), 1, config).await;
    let append = async |timeout_ms| {
        let mut batch = BatchBuilder::new(Compression::None);
        batch.push(clock::wall_ms(), None, Some(&[7; 100]), &[]).unwrap();
        let payload = Some(v1::append_request::Payload::Batch(batch.finish(None).unwrap().to_bytes()));
        let request = v1::AppendRequest { topic: "t".to_owned(), timeout_ms, payload, ..Default::default() };
        bench.broker.append(request, &ProducerIdQuota::default(), &bench.broker.call_memory()).await
    };
    let memory = bench.broker.produce_memory.of(1 << 20);
    let held = memory.take(memory.bytes() - (8 << 10)).await;
    let fault = append(300).await.expect_err("there is memory for what came, and not for what it may become");
    assert_eq!((fault.code, fault.retryable), (ErrorCode::Overloaded, true));
    assert!(fault.message.contains("limits.produce_memory_bytes"), "{fault}");
    drop(held);
    append(20_000).await.expect("there is memory");
    wait_for("all of it is given back", async || (memory.taken() == 0).then_some(())).await;
    bench.stop().await;
}

/// Regression: records were compressed on the thread of the call, up to 64 MiB at once.
#[tokio::test]
async fn large_record_list_waits_for_its_compression_turn() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::start(dir.path(), true).await;
    let config = ConfigMap::from([("compression.type".to_owned(), "gzip".to_owned())]);
    bench.create_with(&TopicName::new("t").unwrap(), 1, config).await;
    let memory = bench.broker.call_memory();
    let append = async |value: Vec<u8>, timeout_ms| {
        let records = vec![v1::Record { value: Some(value.into()), ..Default::default() }];
        let payload = Some(v1::append_request::Payload::Records(v1::PlainRecords { records }));
        let request = v1::AppendRequest { topic: "t".to_owned(), timeout_ms, payload, ..Default::default() };
        bench.broker.append(request, &ProducerIdQuota::default(), &memory).await
    };
    let turn = memory.rewriter(&bench.broker.opener).in_turn().await;
    append(vec![7; 1000], 20_000).await.expect("few are compressed at once");
    let fault = append(vec![7; 2 << 20], 300).await.expect_err("another batch of the connection has the turn");
    assert_eq!((fault.code, fault.retryable), (ErrorCode::Overloaded, true));
    drop(turn);
    append(vec![7; 2 << 20], 20_000).await.expect("2 MiB that become a few kilobytes");
    let mut noise = vec![0; 2 << 20];
    random::fill(&mut noise);
    let fault = append(noise, 20_000).await.expect_err("they stay larger than max.message.bytes");
    assert_eq!(fault.code, ErrorCode::RecordTooLarge);
    assert!(["1048588", "max.message.bytes"].iter().all(|part| fault.message.contains(part)), "{fault}");
    bench.stop().await;
}
