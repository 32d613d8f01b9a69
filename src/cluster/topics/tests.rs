//! Topic administration over the in-memory store, with crashes and concurrent writers.

use std::time::Duration;

use super::*;
use crate::{
    cluster::{
        embedded::EmbeddedStore,
        endpoints::Endpoints,
        faulty::{Fault, FaultyStore},
        keys::{BrokerValue, Key},
        metadata::PartitionEntry,
        placement::ReplicaLimitExceeded,
    },
    limits,
    model::{BrokerId, TopicId},
    task::{Tasks, random},
};

struct TestCluster {
    store: EmbeddedStore,
    /// The store that `topics` uses, with injected faults.
    link: FaultyStore,
    keys: Keys,
    metadata: MetadataCache,
    topics: Topics,
    _tasks: Tasks,
}

impl TestCluster {
    async fn of(brokers: u32) -> Self {
        let store = EmbeddedStore::in_memory();
        let keys = Keys::new("test").expect("valid");
        let lease = store.grant(Duration::from_secs(10_000)).await.expect("the store responds");
        for id in 1..=brokers {
            let rack = Some(format!("rack-{}", id % 3));
            let value = BrokerValue { rack, ..BrokerValue::running_at(format!("b{id}:9460")) };
            let put = Transaction::new().put_leased(keys.broker(BrokerId(id)), value.encode(), lease);
            store.transact(put).await.expect("the store responds");
        }
        let tasks = Tasks::new();
        let metadata = MetadataCache::start(Arc::new(store.clone()), keys.clone(), &tasks);
        let defaults = ConfigMap::from([("segment.bytes".to_owned(), "1048576".to_owned())]);
        let link = FaultyStore::new(store.clone());
        let topics = Topics::new(Arc::new(link.clone()), keys.clone(), metadata.clone(), defaults);
        let cluster = Self { store, link, keys, metadata, topics, _tasks: tasks };
        if brokers > 0 {
            cluster.catch_up().await;
        }
        cluster
    }

    /// Replaces the registration of a broker by one with a replica limit.
    async fn limit_replicas(&self, broker: u32, max: u32) {
        let value = BrokerValue { max_replicas: Some(max), ..BrokerValue::running_at(format!("b{broker}:9460")) };
        self.put(&Key::Broker(BrokerId(broker)), value.encode()).await;
    }

    /// Waits until the metadata cache has the store's revision.
    async fn catch_up(&self) {
        let revision = self.store.get("").await.expect("the store responds").revision;
        self.metadata.wait_for_revision(revision).await;
    }

    async fn create(&self, name: &str, partitions: u32, replicas: u32) -> Result<TopicInfo, CreateError> {
        let created = self.topics.create(spec(name, partitions, replicas)).await;
        self.catch_up().await;
        created
    }

    async fn paths(&self, kind: &str) -> Vec<String> {
        let prefix = format!("{}{kind}", self.keys.prefix());
        let listing = self.store.list(&prefix).await.expect("the store responds");
        listing.entries.into_iter().map(|entry| entry.key).collect()
    }

    async fn put(&self, key: &Key, value: impl Into<bytes::Bytes>) {
        self.store.transact(Transaction::new().put(self.keys.path(key), value)).await.expect("the store responds");
        self.catch_up().await;
    }

    /// Runs a sweep twice without changes in between. Returns the topics whose keys the second run deleted.
    async fn sweep(&self) -> Vec<TopicId> {
        self.catch_up().await;
        let mut sweep = StaleKeySweeper::default();
        assert_eq!(sweep.run(&self.topics).await, Ok(vec![]), "the first run deletes nothing");
        let swept = sweep.run(&self.topics).await.expect("the store responds");
        self.catch_up().await;
        swept
    }
}

fn name(name: &str) -> TopicName {
    name.parse().expect("valid")
}

fn spec(topic: &str, partitions: u32, replication_factor: u32) -> TopicSpec {
    TopicSpec { name: name(topic), partitions, replication_factor, config: ConfigMap::new(), validate_only: false }
}

fn config(key: &str, value: &str) -> ConfigMap {
    ConfigMap::from([(key.to_owned(), value.to_owned())])
}

#[tokio::test]
async fn topic_is_created_with_leaders_at_epoch_zero() {
    let cluster = TestCluster::of(3).await;
    let created = cluster.create("orders", 250, 2).await.expect("created");
    let state = cluster.metadata.state();
    let topic = state.topic(&name("orders")).expect("the topic exists");
    assert_eq!((topic.value.clone(), topic.mod_revision), (created.value.clone(), created.revision));
    let mut count = 0;
    for (_, entry) in state.partitions_of(&topic.value) {
        let value = &entry.partition.as_ref().expect("every partition exists").value;
        assert_eq!((value.replicas.len(), &value.isr, value.leader_epoch), (2, &value.replicas, LeaderEpoch(0)));
        assert_eq!(value.leader, value.replicas.first().copied());
        count += 1;
    }
    assert_eq!(count, 250);
}

#[tokio::test]
async fn invalid_creation_fails_with_numbers_and_writes_nothing() {
    let cluster = TestCluster::of(2).await;
    let error = cluster.create("a", 1, 3).await.expect_err("three replicas on two brokers");
    assert_eq!(
        error,
        CreateError::Brokers { requested: 3, counts: BrokerCounts { live: 2, leaving: 0, full: 0, unreachable: 0 } }
    );
    assert!(error.to_string().contains('3') && error.to_string().contains('2'), "{error}");
    assert_eq!(cluster.create("a", 0, 1).await, Err(CreateError::Partitions { requested: 0 }));
    let requested = limits::MAX_PARTITIONS + 1;
    assert_eq!(cluster.create("a", requested, 1).await, Err(CreateError::Partitions { requested }));
    assert_eq!(cluster.create("a", 1, 0).await, Err(CreateError::Replicas { requested: 0 }));
    let bad = TopicSpec { config: config("retention.ms", "soon"), ..spec("a", 1, 1) };
    let error = cluster.topics.create(bad).await.expect_err("no number").to_string();
    assert!(error.contains("retention.ms") && error.contains("soon"), "{error}");
    let validated = cluster.topics.create(TopicSpec { validate_only: true, ..spec("a", 1, 1) }).await.expect("valid");
    assert_eq!(validated.revision, Revision::ZERO);
    assert_eq!((cluster.paths("topics/").await.len(), cluster.paths("partitions/").await.len()), (0, 0));
}

/// Regression: without a replica limit, a topic of 100,000 partitions took 6 GB of memory on a standalone broker, and
/// again at each start.
#[tokio::test]
async fn replica_limit_rejects_creation_with_both_numbers() {
    let cluster = TestCluster::of(1).await;
    cluster.limit_replicas(1, 500).await;
    let bound = ReplicaLimitExceeded { broker: BrokerId(1), replicas: 100_000, max: 500 };
    let error = cluster.create("a", 100_000, 1).await.expect_err("above the replica limit");
    assert_eq!(error, CreateError::ReplicaLimit(bound));
    let text = error.to_string();
    assert!(["100000", "500", "broker.max_replicas"].iter().all(|part| text.contains(part)), "{text}");
    let checked = cluster.topics.create(TopicSpec { validate_only: true, ..spec("a", 501, 1) }).await;
    assert_eq!(checked, Err(CreateError::ReplicaLimit(ReplicaLimitExceeded { replicas: 501, ..bound })));
    assert_eq!((cluster.paths("topics/").await.len(), cluster.paths("partitions/").await.len()), (0, 0));

    cluster.create("a", 400, 1).await.expect("created");
    let extended = cluster.topics.add_partitions(&name("a"), 501).await;
    assert_eq!(extended, Err(AddPartitionsError::ReplicaLimit(ReplicaLimitExceeded { replicas: 501, ..bound })));
    cluster.topics.add_partitions(&name("a"), 500).await.expect("at the replica limit");
    cluster.catch_up().await;
    let rejected = cluster.create("b", 1, 1).await;
    assert_eq!(rejected, Err(CreateError::ReplicaLimit(ReplicaLimitExceeded { replicas: 501, ..bound })));
    cluster.topics.delete(&name("a")).await.expect("deleted");
    cluster.catch_up().await;
    cluster.create("b", 1, 1).await.expect("below the limit again");
}

/// Regression: a replica on a broker without a peer address never entered the ISR. With two of three replicas on such
/// brokers, `acks=all` waited forever.
#[tokio::test]
async fn brokers_without_peer_address_get_no_replicas() {
    let cluster = TestCluster::of(3).await;
    let hidden =
        BrokerValue { listeners: Endpoints::new("b3:9460".to_owned()), ..BrokerValue::running_at(String::new()) };
    cluster.put(&Key::Broker(BrokerId(3)), hidden.encode()).await;
    cluster.create("a", 12, 2).await.expect("created");
    assert!(cluster.metadata.state().partitions_on(BrokerId(3)).is_empty());
    let error = cluster.create("b", 1, 3).await.expect_err("two brokers accept replicas");
    let counts = BrokerCounts { live: 3, leaving: 0, full: 0, unreachable: 1 };
    assert_eq!(error, CreateError::Brokers { requested: 3, counts });
    let text = error.to_string();
    assert!(text.contains("3 are online, of which 1 is registered without an address for other brokers"), "{text}");

    let single = TestCluster::of(1).await;
    let hidden = BrokerValue { listeners: Endpoints::new("b1:9460".to_owned()), ..hidden };
    single.put(&Key::Broker(BrokerId(1)), hidden.encode()).await;
    single.create("a", 1, 1).await.expect("a single broker needs no such address");
}

#[tokio::test]
async fn factor_above_replica_limits_is_rejected() {
    let cluster = TestCluster::of(3).await;
    cluster.create("a", 12, 1).await.expect("created");
    for broker in 1..=3 {
        cluster.limit_replicas(broker, 9).await;
    }
    let raise = async |factor| cluster.topics.alter(&name("a"), ConfigMap::new(), vec![], Some(factor)).await;
    assert!(matches!(raise(3).await, Err(AlterError::ReplicaLimit(ReplicaLimitExceeded { replicas: 12, max: 9, .. }))));
    raise(2).await.expect("eight replicas per broker");
}

/// Regression: concurrent creations counted only the replicas in the metadata cache, and not those of each other. Three
/// creations of 300 replicas fit into the limit of 1000.
#[tokio::test]
async fn concurrent_creations_respect_replica_limits() {
    let cluster = TestCluster::of(1).await;
    cluster.limit_replicas(1, 1000).await;
    let names: Vec<String> = (0..20).map(|number| format!("t{number}")).collect();
    let created = futures::future::join_all(names.iter().map(|name| cluster.topics.create(spec(name, 300, 1)))).await;
    assert_eq!(created.iter().filter(|created| created.is_ok()).count(), 3, "{created:?}");
    cluster.catch_up().await;
    assert_eq!(cluster.paths("partitions/").await.len(), 900, "rejected creations wrote nothing");
    cluster.create("small", 100, 1).await.expect("rejected creations hold no reservation");
    assert!(matches!(cluster.create("more", 1, 1).await, Err(CreateError::ReplicaLimit(_))));
}

#[tokio::test]
async fn concurrent_creations_of_one_name_create_one_topic() {
    let cluster = TestCluster::of(1).await;
    let attempts = (0..8).map(|_| cluster.topics.create(spec("same", 3, 1)));
    let created = futures::future::join_all(attempts).await;
    assert_eq!(created.iter().filter(|created| created.is_ok()).count(), 1);
    let exists = CreateError::Exists { name: name("same") };
    assert!(created.iter().all(|created| created.is_ok() || created.as_ref().err() == Some(&exists)), "{created:?}");
    cluster.catch_up().await;
    assert_eq!(cluster.create("same", 1, 1).await, Err(exists));
    let id = cluster.topics.find(&name("same")).expect("the topic exists").value.id;
    cluster.sweep().await;
    let paths = cluster.paths("partitions/").await;
    assert_eq!(paths.len(), 3, "the keys of failed creations are swept");
    assert!(paths.iter().all(|path| path.contains(&id.to_string())));
}

#[tokio::test]
async fn configuration_is_set_unset_and_checked() {
    let cluster = TestCluster::of(1).await;
    cluster.create("a", 1, 1).await.expect("created");
    let altered =
        cluster.topics.alter(&name("a"), config("retention.ms", "1000"), vec![], None).await.expect("altered");
    assert_eq!(altered.value.config, config("retention.ms", "1000"));
    let both =
        cluster.topics.alter(&name("a"), config("segment.ms", "500"), vec!["retention.ms".to_owned()], None).await;
    assert_eq!(both.expect("altered").value.config, config("segment.ms", "500"));
    let wrong =
        cluster.topics.alter(&name("a"), config("segment.bytes", "12"), vec![], None).await.expect_err("too small");
    assert!(matches!(wrong, AlterError::Config(_)), "{wrong}");
    let unknown = cluster.topics.alter(&name("a"), ConfigMap::new(), vec!["segment.byte".to_owned()], None).await;
    assert!(matches!(unknown, Err(AlterError::Config(InvalidConfig::UnknownKey { .. }))), "{unknown:?}");
    let twice = cluster.topics.alter(&name("a"), config("segment.ms", "1"), vec!["segment.ms".to_owned()], None).await;
    assert!(matches!(twice, Err(AlterError::SetAndUnset { .. })), "{twice:?}");
    cluster.catch_up().await;
    assert_eq!(cluster.topics.find(&name("a")).expect("the topic exists").value.config, config("segment.ms", "500"));
}

#[tokio::test]
async fn concurrent_alterations_are_all_applied() {
    let cluster = TestCluster::of(1).await;
    cluster.create("a", 1, 1).await.expect("created");
    let keys =
        [("retention.ms", "-1"), ("retention.bytes", "5000"), ("segment.ms", "777"), ("durability", "replicated")];
    let topic = name("a");
    let alterations = keys.map(|(key, value)| cluster.topics.alter(&topic, config(key, value), vec![], None));
    assert!(futures::future::join_all(alterations).await.iter().all(Result::is_ok));
    cluster.catch_up().await;
    assert_eq!(cluster.topics.find(&topic).expect("the topic exists").value.config.len(), 4);
}

#[tokio::test]
async fn added_partitions_leave_existing_ones_unchanged() {
    let cluster = TestCluster::of(3).await;
    cluster.create("a", 2, 3).await.expect("created");
    let before: Vec<_> =
        cluster.store.list(&format!("{}partitions/", cluster.keys.prefix())).await.expect("the store responds").entries;
    let extended = cluster.topics.add_partitions(&name("a"), 150).await.expect("extended");
    assert_eq!(extended.value.partitions, 150);
    cluster.catch_up().await;
    let after =
        cluster.store.list(&format!("{}partitions/", cluster.keys.prefix())).await.expect("the store responds").entries;
    assert_eq!(after.len(), 150);
    assert!(before.iter().all(|entry| after.contains(entry)), "existing partitions are unchanged");
    let less = cluster.topics.add_partitions(&name("a"), 150).await;
    assert_eq!(less, Err(AddPartitionsError::NotAnIncrease { name: name("a"), current: 150, requested: 150 }));
    let many = cluster.topics.add_partitions(&name("a"), limits::MAX_PARTITIONS + 1).await;
    assert!(matches!(many, Err(AddPartitionsError::TooMany { .. })), "{many:?}");
    cluster
        .store
        .transact(Transaction::new().delete(cluster.keys.broker(BrokerId(3))))
        .await
        .expect("the store responds");
    cluster.catch_up().await;
    let too_few = cluster.topics.add_partitions(&name("a"), 151).await;
    let counts = BrokerCounts { live: 2, leaving: 0, full: 0, unreachable: 0 };
    assert_eq!(too_few, Err(AddPartitionsError::Brokers { requested: 3, counts }), "three replicas on two brokers");
}

#[tokio::test]
async fn concurrent_additions_never_rewrite_counted_partitions() {
    let cluster = TestCluster::of(3).await;
    cluster.create("a", 1, 1).await.expect("created");
    let topic = name("a");
    let (small, large) =
        tokio::join!(cluster.topics.add_partitions(&topic, 110), cluster.topics.add_partitions(&topic, 230));
    assert!(large.is_ok() || small.is_ok());
    cluster.catch_up().await;
    let state = cluster.metadata.state();
    let value = &state.topic(&topic).expect("the topic exists").value;
    assert!(state.partitions_of(value).all(|(_, entry)| entry.partition.is_some()));
    let committed = state.topic(&topic).expect("the topic exists").mod_revision;
    let rewritten =
        |entry: &PartitionEntry| entry.partition.as_ref().is_some_and(|partition| partition.mod_revision > committed);
    assert!(!state.partitions_of(value).any(|(_, entry)| rewritten(entry)));
}

#[tokio::test]
async fn deleted_topic_leaves_no_partitions_and_frees_its_name() {
    let cluster = TestCluster::of(1).await;
    let first = cluster.create("a", 130, 1).await.expect("created").value.id;
    let tier = r#"{"manifest":null,"tiered_end":0,"log_start":0,"epoch":0}"#;
    cluster.put(&Key::Tier(PartitionId::new(first, 7)), tier).await;
    assert_eq!(cluster.topics.delete(&name("a")).await, Ok(first));
    for kind in ["topics/", "partitions/", "tier/"] {
        assert_eq!(cluster.paths(kind).await, Vec::<String>::new());
    }
    cluster.catch_up().await;
    assert!(cluster.create("a", 1, 1).await.expect("created").value.id != first);
}

#[tokio::test(start_paused = true)]
async fn unknown_outcomes_are_resolved_by_retries() {
    let outcomes = [None, Some(Fault::Lost), Some(Fault::ResponseLost)];
    let two = outcomes.map(|first| outcomes.map(|second| [first, second])).into_iter().flatten();
    for [first, second] in two {
        let cluster = TestCluster::of(3).await;
        let faults = [first, second, Some(Fault::ResponseLost), None, first, second];
        cluster.link.fail_transactions(faults);
        let created = cluster.create("a", 230, 3).await.unwrap_or_else(|error| panic!("{faults:?}: {error}"));
        assert_eq!(cluster.paths("partitions/").await.len(), 230);
        let topic = name("a");

        cluster.link.fail_transactions(faults);
        let set = config("retention.ms", "5");
        cluster.topics.alter(&topic, set, vec![], None).await.unwrap_or_else(|error| panic!("{faults:?}: {error}"));

        cluster.link.fail_transactions(faults);
        cluster.catch_up().await;
        let extended = cluster.topics.add_partitions(&topic, 350).await;
        assert_eq!(extended.map(|topic| topic.value.partitions), Ok(350), "{faults:?}");
        cluster.catch_up().await;
        assert!(cluster.sweep().await.is_empty(), "{faults:?}: every partition counts");

        cluster.link.fail_transactions(faults);
        assert_eq!(cluster.topics.delete(&topic).await, Ok(created.value.id), "{faults:?}");
        assert_eq!(cluster.paths("partitions/").await, Vec::<String>::new(), "{faults:?}");
        assert_eq!(cluster.topics.was_deleted(created.value.id).await, Ok(true));
    }
}

#[tokio::test(start_paused = true)]
async fn permanently_unknown_outcome_is_returned() {
    let cluster = TestCluster::of(1).await;
    cluster.link.fail_transactions([Some(Fault::Lost); 100]);
    let created = cluster.create("a", 1, 1).await;
    assert!(matches!(&created, Err(CreateError::Store(error)) if error.outcome_unknown()), "{created:?}");
}

#[tokio::test]
async fn sweep_deletes_only_interrupted_creation() {
    let cluster = TestCluster::of(1).await;
    cluster.create("whole", 3, 1).await.expect("created");
    let interrupted = TopicId::new(random::uuid());
    let (puts, _reservation) = cluster.topics.place_partitions(interrupted, 1..150, 1).await.expect("enough brokers");
    assert_eq!(cluster.topics.transact_in_chunks(&[], puts).await, Ok(true));
    assert_eq!(cluster.sweep().await, [interrupted]);
    assert_eq!(cluster.paths("partitions/").await.len(), 3);
    assert_eq!(cluster.sweep().await, []);
}

#[tokio::test]
async fn sweep_deletes_interrupted_addition_and_deletion() {
    let cluster = TestCluster::of(1).await;
    let id = cluster.create("a", 2, 1).await.expect("created").value.id;
    let value = r#"{"replicas":[1],"leader":1,"leader_epoch":0,"isr":[1]}"#;
    cluster.put(&Key::Partition(PartitionId::new(id, 2)), value).await;
    let deleted = TopicId::new(random::uuid());
    cluster.put(&Key::Partition(PartitionId::new(deleted, 5)), value).await;
    cluster
        .put(&Key::Tier(PartitionId::new(deleted, 0)), r#"{"manifest":null,"tiered_end":0,"log_start":0,"epoch":0}"#)
        .await;
    let mut swept = cluster.sweep().await;
    swept.sort_unstable();
    let mut expected = [id, deleted];
    expected.sort_unstable();
    assert_eq!(swept, expected);
    assert_eq!((cluster.paths("partitions/").await.len(), cluster.paths("tier/").await.len()), (2, 0));
}

#[tokio::test]
async fn sweep_keeps_partitions_of_unreadable_topic() {
    let cluster = TestCluster::of(1).await;
    cluster.create("a", 150, 1).await.expect("created");
    cluster.put(&Key::Topic(name("a")), "{broken").await;
    assert_eq!(cluster.sweep().await, []);
    assert_eq!(cluster.paths("partitions/").await.len(), 150);
}

#[tokio::test]
async fn sweep_keeps_topic_created_meanwhile() {
    let cluster = TestCluster::of(1).await;
    let created = cluster.create("a", 5, 1).await.expect("created").value.id;
    let state = cluster.metadata.state();
    // The keys that a sweep finds before the last transaction of the creation: those of all partitions but 0.
    let topic = &state.topic(&name("a")).expect("the topic exists").value;
    let stale: Vec<_> = state.partitions_of(topic).skip(1).map(|(number, entry)| (number, entry.clone())).collect();
    cluster
        .store
        .transact(Transaction::new().delete(cluster.keys.topic(&name("a"))))
        .await
        .expect("the store responds");
    cluster.catch_up().await;
    assert_eq!(
        cluster.topics.sweep_topic(created, &stale).await,
        Ok(false),
        "partition 0 exists, so the topic was created"
    );
    assert_eq!(cluster.paths("partitions/").await.len(), 5);
}

/// An interrupted addition is repeated between the read of a sweep and its deletion. The keys that the sweep read then
/// belong to the topic.
#[tokio::test]
async fn sweep_keeps_partitions_that_count_meanwhile() {
    let cluster = TestCluster::of(1).await;
    let id = cluster.create("a", 2, 1).await.expect("created").value.id;
    let value = r#"{"replicas":[1],"leader":1,"leader_epoch":0,"isr":[1]}"#;
    cluster.put(&Key::Partition(PartitionId::new(id, 2)), value).await;
    let stale = cluster.metadata.state().stale_partitions().remove(&id).expect("one partition too many");
    cluster.topics.add_partitions(&name("a"), 3).await.expect("extended");
    cluster.catch_up().await;
    assert_eq!(cluster.topics.sweep_topic(id, &stale).await, Ok(false));
    assert_eq!(cluster.paths("partitions/").await.len(), 3);
}

/// Regression: a repeated addition wrote the keys again between two transactions of a sweep, and the second transaction
/// deleted some of the new keys.
#[tokio::test]
async fn sweep_keeps_keys_that_a_repeated_addition_wrote() {
    let cluster = TestCluster::of(1).await;
    let id = cluster.create("a", 2, 1).await.expect("created").value.id;
    let (puts, _reservation) = cluster.topics.place_partitions(id, 2..350, 1).await.expect("enough brokers");
    assert_eq!(cluster.topics.transact_in_chunks(&[], puts.clone()).await, Ok(true));
    cluster.catch_up().await;
    let state = cluster.metadata.state();
    let stale = state.stale_partitions().remove(&id).expect("the addition is incomplete");
    let topic =
        Compare::ModRevision(cluster.keys.topic(&name("a")), state.topic(&name("a")).expect("created").mod_revision);
    let rewritten = puts.into_iter().skip(250);
    assert_eq!(cluster.topics.transact_in_chunks(&[], rewritten).await, Ok(true));
    assert_eq!(cluster.topics.delete_stale_keys(id, &stale, &topic).await, Ok(false));
    assert_eq!(
        cluster.paths("partitions/").await.len(),
        2 + 148,
        "200 unchanged keys were deleted, in two transactions"
    );
}

#[tokio::test]
async fn producer_ids_are_issued_once() {
    let cluster = TestCluster::of(0).await;
    let blocks = futures::future::join_all((0..5).map(|_| cluster.topics.reserve_producer_ids(0))).await;
    let mut starts: Vec<_> =
        blocks.into_iter().map(|block| block.expect("the store responds")).map(|ids| ids.start).collect();
    starts.sort_unstable();
    assert_eq!(starts, [0, 1000, 2000, 3000, 4000]);
    // A broker that received ids up to 7500 before the store was restored to an older counter.
    assert_eq!(cluster.topics.reserve_producer_ids(7500).await, Ok(7500..8500));
    assert_eq!(cluster.topics.reserve_producer_ids(1000).await, Ok(8500..9500));
    assert!(
        cluster.topics.reserve_producer_ids(PRODUCER_ID_COUNTER_END - 999).await.is_err(),
        "the counter exceeds an id"
    );
}

#[tokio::test]
async fn producer_id_key_is_created_once() {
    let cluster = TestCluster::of(0).await;
    let keys = futures::future::join_all((0..5).map(|_| cluster.topics.producer_id_key())).await;
    let first = keys[0].clone().expect("the store responds");
    assert!(keys.iter().all(|key| key.as_ref() == Ok(&first)));
    cluster.catch_up().await;
    assert_eq!(cluster.metadata.state().producer_id_key(), Some(&first), "every broker caches the key");
    // A broker keeps the cached key if the stored value becomes unreadable.
    cluster.put(&Key::ProducerIdKey, "invalid").await;
    cluster.catch_up().await;
    assert_eq!(cluster.topics.producer_id_key().await.as_ref(), Ok(&first));
}

#[tokio::test]
async fn tombstone_is_deleted_only_long_after_last_remains() {
    const EXPIRY_DELAY: Duration = Duration::from_millis(1000);
    let cluster = TestCluster::of(1).await;
    let id = cluster.create("gone", 3, 1).await.expect("created").value.id;
    assert_eq!(cluster.topics.tombstones().await, Ok(vec![]));
    cluster.topics.delete(&name("gone")).await.expect("deleted");
    cluster.catch_up().await;
    // Each call reads all tombstones, as a restarted broker would.
    let expire = async |data_remains: bool, now_ms: i64| {
        let tombstones = cluster.topics.tombstones().await.expect("the store responds");
        let [tombstone] = tombstones.as_slice() else { panic!("one tombstone: {tombstones:?}") };
        assert_eq!(tombstone.id, id);
        cluster.topics.expire(tombstone, data_remains, now_ms, EXPIRY_DELAY).await.expect("the store responds")
    };
    for (data_remains, now_ms) in
        [(true, 0), (true, 5000), (false, 6000), (false, 6999), (true, 7001), (false, 7002), (false, 8001)]
    {
        assert!(!expire(data_remains, now_ms).await, "data remains: {data_remains}, at {now_ms}");
        assert_eq!(cluster.topics.was_deleted(id).await, Ok(true));
    }
    // A partition key of the deleted topic appears, as from an interrupted creation or deletion. The sweep must delete
    // it first.
    let stale_key = Key::Partition(PartitionId::new(id, 2));
    let value = PartitionValue::new(vec![BrokerId(1)], LeaderEpoch(0));
    cluster.put(&stale_key, value.encode()).await;
    assert!(!expire(false, 9000).await);
    assert_eq!(cluster.sweep().await, [id]);
    assert!(!expire(false, 10_000).await, "the time restarts");

    // Two brokers expire the same tombstone: the first deletes it, and the second has a failed compare.
    let tombstones = cluster.topics.tombstones().await.expect("the store responds");
    assert_eq!(cluster.topics.expire(&tombstones[0], false, 11_000, EXPIRY_DELAY).await, Ok(true));
    assert_eq!(cluster.topics.expire(&tombstones[0], false, 11_000, EXPIRY_DELAY).await, Ok(false));
    assert_eq!(cluster.topics.was_deleted(id).await, Ok(false));
    assert_eq!(cluster.paths("deleted/").await, Vec::<String>::new());
}

#[tokio::test]
async fn tombstone_without_new_fields_is_read_and_invalid_is_kept() {
    let cluster = TestCluster::of(1).await;
    let (old, torn) = (TopicId::from_bytes([1; 16]), TopicId::from_bytes([2; 16]));
    cluster.put(&Key::Tombstone(old), &b"{\"name\":\"old\"}"[..]).await;
    cluster.put(&Key::Tombstone(torn), &b"{"[..]).await;
    let tombstones = cluster.topics.tombstones().await.expect("the store responds");
    assert_eq!(tombstones.iter().map(|tombstone| tombstone.id).collect::<Vec<_>>(), [old]);
    for (now_ms, ended) in [(1, false), (2, true)] {
        let tombstones = cluster.topics.tombstones().await.expect("the store responds");
        assert_eq!(cluster.topics.expire(&tombstones[0], false, now_ms, Duration::from_millis(1)).await, Ok(ended));
    }
    assert_eq!(cluster.topics.was_deleted(torn).await, Ok(true));
}
