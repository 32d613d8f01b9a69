//! Deletion of a topic: its records on disk and in the object store are deleted, and last of all its tombstone. Data of
//! an unknown topic without a tombstone stays.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use strandline::{
    client::{Client, ClientOptions, ConsumeError, ConsumerOptions, NewRecord, ProducerOptions, SendError},
    cluster::{EmbeddedStore, Key, Keys, MetaStore, TombstoneValue, Transaction, Value},
    model::{LeaderEpoch, Offset, TopicId},
    proto::error::ErrorCode,
    task::clock,
    tier::name::ObjectId,
};

use crate::{
    broker::BrokerInstance,
    corruption::{files, lines},
    test_timeout::eventually,
    wire,
};

/// A little more than the time for which a tombstone outlives the last data of its topic, in milliseconds.
const LONG_MS: i64 = 31 * 24 * 3600 * 1000;

fn keys() -> Keys {
    Keys::new("it").expect("valid")
}

/// Runs a function on the metadata store of a stopped standalone broker.
fn metadata<T>(instance: &BrokerInstance, work: impl AsyncFnOnce(&EmbeddedStore) -> T) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let store = EmbeddedStore::open(&instance.data_dir()).await.expect("the broker has closed the directory");
        work(&store).await
    })
}

/// Reads the tombstone of a topic from the metadata store of a stopped broker.
fn tombstone(instance: &BrokerInstance, id: TopicId) -> Option<TombstoneValue> {
    let key = keys().path(&Key::Tombstone(id));
    let entry = metadata(instance, async |store| store.get(&key).await).expect("the store responds").entry;
    entry.map(|entry| TombstoneValue::decode(&key, &entry.value).expect("the value is valid"))
}

/// Writes a tombstone for a topic into the metadata store of a stopped broker.
fn put_tombstone(instance: &BrokerInstance, id: TopicId, purged_since_ms: Option<i64>) {
    let value = TombstoneValue { name: "gone".parse().expect("valid"), purged_since_ms };
    let put = Transaction::new().put(keys().path(&Key::Tombstone(id)), value.encode());
    metadata(instance, async |store| store.transact(put).await).expect("the store responds");
}

/// Waits until a garbage collection that started after this call has ended: the second to end from now on.
fn wait_for_garbage_collection(instance: &BrokerInstance) {
    let searches = || instance.metric("strandline_garbage_collections_total");
    let before = searches();
    eventually("a garbage collection", || (searches() >= before + 2.0).then_some(()));
}

#[test]
fn topic_deletion_needs_consent_and_names_remaining_objects() {
    let mut instance = BrokerInstance::new();
    let _broker = instance.start();
    let cli = instance.cli();
    cli.ok(&["topic", "create", "gone"]);
    cli.ok_with(&["produce", "gone", "--acks", "tiered"], b"a record\n");
    let refused = cli.run(&["topic", "delete", "gone"]);
    assert_eq!(refused.code, 1, "{refused:?}");
    for part in ["nothing was deleted", "--yes", "1 partition, 1 record,", "in the object store"] {
        assert!(refused.stderr.contains(part), "{part}: {refused:?}");
    }
    let inventory = cli.ok(&["topic", "delete", "gone", "--dry-run", "--output", "json"]).json();
    assert_eq!((&inventory["deleted"], &inventory["records"]), (&false.into(), &1.into()), "{inventory}");
    assert!(inventory["tiered_bytes"].as_u64().is_some_and(|bytes| bytes > 0), "{inventory}");
    assert_eq!(cli.ok(&["consume", "gone", "--from", "earliest", "--until-end"]).text(), "a record\n");
    let deleted = cli.ok(&["topic", "delete", "gone", "--yes"]).text();
    assert!(deleted.contains("are deleted within 2h (tier.garbage_grace, and"), "{deleted}");
    assert!(!files(&instance.object_store_dir(), ".segment").is_empty(), "the objects still exist");
    assert_eq!(cli.run(&["topic", "describe", "gone"]).code, 1);
}

#[test]
fn tombstone_is_deleted_last_and_data_without_one_stays() {
    let mut instance = BrokerInstance::new().setting("tier.garbage_grace", "\"1s\"");
    let broker = instance.start();
    let cli = instance.cli();
    cli.ok(&["topic", "create", "gone", "--config", "segment.ms=100"]);
    cli.ok_with(&["produce", "gone", "--acks", "tiered"], b"a record\n");
    let described = cli.ok(&["topic", "describe", "gone", "--output", "json"]).json();
    let id: TopicId = described["topic_id"].as_str().and_then(|id| id.parse().ok()).expect("an id");
    let folder = |id: TopicId| instance.object_store_dir().join("topics").join(id.to_string());
    assert!(!files(&folder(id), "").is_empty());
    // `unknown` is a topic without metadata and tombstone: its metadata may have been lost. `held` is a deleted topic
    // whose folder contains a foreign object.
    let (unknown, held) = (TopicId::from_bytes([1; 16]), TopicId::from_bytes([2; 16]));
    let at = |offset| Offset::new(offset).expect("small");
    let history = ObjectId::draw(at(0), at(9), LeaderEpoch(0)).segment();
    let remaining = [folder(unknown).join("0").join(history), folder(held).join("0/notes.txt")];
    for path in &remaining {
        fs::create_dir_all(path.parent().expect("a folder")).expect("the file is created");
        fs::write(path, "something").expect("a file");
    }
    cli.ok(&["topic", "delete", "gone", "--yes"]);
    eventually("the objects are deleted", || files(&folder(id), "").is_empty().then_some(()));
    wait_for_garbage_collection(&instance);
    assert!(broker.terminate().success(), "{}", instance.log());
    let now_ms = clock::wall_ms();
    let since_ms =
        tombstone(&instance, id).expect("the tombstone exists").purged_since_ms.expect("all objects are purged");
    assert!((now_ms - 60_000..=now_ms).contains(&since_ms), "{since_ms}");

    put_tombstone(&instance, id, Some(now_ms - LONG_MS));
    put_tombstone(&instance, held, Some(now_ms - LONG_MS));
    let broker = instance.start();
    wait_for_garbage_collection(&instance);
    assert!(broker.terminate().success(), "{}", instance.log());
    assert_eq!(tombstone(&instance, id), None);
    assert_eq!(tombstone(&instance, held).expect("the tombstone exists").purged_since_ms, None, "the count restarts");
    assert!(remaining.iter().all(|path| path.exists()), "{remaining:?}");
}

/// Returns the folder of a topic in the data directory.
fn local_folder(instance: &BrokerInstance, topic: &str) -> PathBuf {
    let described = instance.cli().ok(&["topic", "describe", topic, "--output", "json"]).json();
    instance.data_dir().join(described["topic_id"].as_str().expect("an id"))
}

#[test]
fn topic_with_unopenable_partitions_is_deleted() {
    let mut instance = BrokerInstance::new();
    let broker = instance.start();
    instance.cli().ok(&["topic", "create", "broken", "--partitions", "2"]);
    let keyed: String = (0..60).map(|number| format!("k{number}:v\n")).collect();
    instance.cli().ok_with(&["produce", "broken", "--key-separator", ":"], keyed.as_bytes());
    let folder = local_folder(&instance, "broken");
    assert!(broker.terminate().success(), "{}", instance.log());
    // After one more start and stop, the journal no longer contains the records.
    assert!(instance.start().terminate().success(), "{}", instance.log());
    let segments = files(&folder, ".log");
    assert_eq!(segments.len(), 2, "{segments:?}");
    fs::write(&segments[0], "").expect("the file is truncated");
    fs::remove_file(&segments[1]).expect("the file is removed");
    // A start reads segments only after an unclean stop, so the broker is killed.
    instance.start().kill9();

    let broker = instance.start();
    let refused = instance.log().matches("could not open the partition on this broker").count();
    assert_eq!(refused, 2, "{}", instance.log());
    instance.cli().ok(&["topic", "delete", "broken", "--yes"]);
    eventually("the files are deleted", || files_or_none(&folder).is_empty().then_some(()));
    instance.cli().ok(&["topic", "create", "broken"]);
    instance.cli().ok_with(&["produce", "broken"], b"again\n");
    assert_eq!(instance.cli().ok(&["consume", "broken", "--from", "earliest", "--until-end"]).text(), "again\n");
    assert!(broker.terminate().success(), "{}", instance.log());
}

/// The files of a topic are deleted also if the broker does not serve the topic, because its configuration is invalid.
/// Regression: such files stayed on the disk until the next start.
#[test]
fn topic_with_invalid_configuration_is_deleted_with_files() {
    let mut instance = BrokerInstance::new();
    let broker = instance.start();
    instance.cli().ok(&["topic", "create", "odd", "--config", "local.retention.ms=3600000"]);
    instance.cli().ok_with(&["produce", "odd"], b"one\n");
    let folder = local_folder(&instance, "odd");
    assert!(broker.terminate().success(), "{}", instance.log());

    instance = instance.topic_default("retention.ms", 60_000);
    let broker = instance.start();
    assert!(instance.log().contains("the stored configuration of the topic is invalid"), "{}", instance.log());
    assert!(!files_or_none(&folder).is_empty());
    instance.cli().ok(&["topic", "delete", "odd", "--yes"]);
    eventually("the files are deleted", || files_or_none(&folder).is_empty().then_some(()));
    assert!(broker.terminate().success(), "{}", instance.log());
}

/// Returns the content of a folder; empty if the folder does not exist.
fn files_or_none(folder: &Path) -> Vec<PathBuf> {
    match fs::read_dir(folder) {
        Ok(entries) => entries.filter_map(|entry| Some(entry.ok()?.path())).collect(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => panic!("{}: {error}", folder.display()),
    }
}

/// A consumer whose topic was deleted and recreated gets an error. Regression, found by a user of another system: the
/// consumer continued at its old offset in the new topic, and silently skipped the first records.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn consumer_of_a_recreated_topic_fails_and_skips_nothing() {
    let mut instance = BrokerInstance::new();
    let _broker = tokio::task::block_in_place(|| instance.start());
    let cli = instance.cli();
    let make = |records| {
        tokio::task::block_in_place(|| {
            cli.ok(&["topic", "create", "t"]);
            cli.ok_with(&["produce", "t"], lines(records).as_bytes());
        });
    };
    make(10);
    let client =
        Client::connect(&instance.grpc().to_string(), ClientOptions::default()).await.expect("the broker is running");
    let mut consumer = client.consumer(ConsumerOptions::default());
    consumer.assign_at("t", 0, Offset::ZERO).await.expect("the topic exists");
    for _ in 0..10 {
        consumer.next().await.expect("a record");
    }
    tokio::task::block_in_place(|| cli.ok(&["topic", "delete", "t", "--yes"]));
    make(30);
    let next =
        tokio::time::timeout(Duration::from_secs(20), consumer.next()).await.expect("a result within the timeout");
    let Err(ConsumeError::Refused { error: failure, .. }) = next else { panic!("{next:?}") };
    // A request that the broker handles after the deletion and before the creation finds no topic with this name.
    assert!(matches!(failure.code, ErrorCode::TopicIdMismatch | ErrorCode::UnknownTopic), "{failure:?}");
    // A consumer that is assigned again reads the new topic from the beginning.
    consumer.assign_at("t", 0, Offset::ZERO).await.expect("the topic exists");
    for offset in 0..30 {
        assert_eq!(consumer.next().await.expect("a record").offset.get(), offset);
    }
}

/// A producer whose topic was deleted and recreated gets an error. Regression: it silently continued to write into the
/// new topic.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn producer_to_a_recreated_topic_fails_and_writes_nothing() {
    let mut instance = BrokerInstance::new();
    let _broker = tokio::task::block_in_place(|| instance.start());
    let cli = instance.cli();
    tokio::task::block_in_place(|| cli.ok(&["topic", "create", "t"]));
    let client =
        Client::connect(&instance.grpc().to_string(), ClientOptions::default()).await.expect("the broker is running");
    let producer = client.producer(ProducerOptions::default()).await.expect("an idempotent producer");
    let send = async || producer.send("t", NewRecord::value(b"x")).await.expect("the record is accepted").await;
    assert_eq!(send().await.expect("stored").offset.map(Offset::get), Some(0));
    tokio::task::block_in_place(|| {
        cli.ok(&["topic", "delete", "t", "--yes"]);
        cli.ok(&["topic", "create", "t"]);
    });
    let Err(SendError::Refused { error: failure, .. }) = send().await else {
        panic!("the send to a recreated topic succeeded")
    };
    assert_eq!(failure.code, ErrorCode::TopicIdMismatch, "{failure:?}");
    let mut log = wire::log(instance.grpc());
    assert_eq!(wire::latest(&mut log, "t", 0).await.expect("a response"), 0, "no record was written");
    assert_eq!(send().await.expect("stored").offset.map(Offset::get), Some(0), "the producer has new metadata");
}
