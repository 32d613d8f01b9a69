//! Remains of a deleted topic, their places and their lifetimes. All data of the topic is deleted, its tombstone last. Data without a
//! tombstone stays.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use strandline::{
    client::{Client, ConsumeError, ConsumerOptions, NewRecord, Options, ProducerOptions, SendError},
    cluster::{DeletedValue, EmbeddedStore, Key, Keys, MetaStore, Transaction, Value},
    model::{LeaderEpoch, Offset, TopicId},
    proto::error::ErrorCode,
    task::clock,
    tier::name::Stamp,
};

use crate::{
    broker::Home,
    damage::{files, lines},
    test_timeout::eventually,
    wire,
};

/// Milliseconds, a little longer than tombstones outlive their topics.
const LONG_MS: i64 = 31 * 24 * 3600 * 1000;

fn keys() -> Keys {
    Keys::new("it").expect("valid")
}

/// Runs a function on the metadata of a stopped broker.
fn metadata<T>(home: &Home, work: impl AsyncFnOnce(&EmbeddedStore) -> T) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let store = EmbeddedStore::open(&home.data_dir()).await.expect("the broker has let go of it");
        work(&store).await
    })
}

fn mark(home: &Home, id: TopicId) -> Option<DeletedValue> {
    let key = keys().path(&Key::Deleted(id));
    let entry = metadata(home, async |store| store.get(&key).await).expect("answers").entry;
    entry.map(|entry| DeletedValue::decode(&key, &entry.value).expect("it parses"))
}

fn put_mark(home: &Home, id: TopicId, gone_since_ms: Option<i64>) {
    let value = DeletedValue { name: "gone".parse().expect("valid"), gone_since_ms };
    let put = Transaction::new().put(keys().path(&Key::Deleted(id)), value.encode());
    metadata(home, async |store| store.transact(put).await).expect("answers");
}

/// Waits until a garbage collection has started and ended after this call.
fn searched(home: &Home) {
    let searches = || home.metric("strandline_garbage_searches_total");
    let before = searches();
    eventually("a search for garbage", || (searches() >= before + 2.0).then_some(()));
}

#[test]
fn topic_deletion_needs_consent_and_names_remaining_objects() {
    let mut home = Home::new();
    let _broker = home.start();
    let cli = home.cli();
    cli.ok(&["topic", "create", "gone"]);
    cli.ok_with(&["produce", "gone", "--acks", "tiered"], b"a record\n");
    let refused = cli.run(&["topic", "delete", "gone"]);
    assert_eq!(refused.code, 1, "{refused:?}");
    for part in ["nothing was deleted", "--yes", "1 partition, 1 record,", "in the bucket"] {
        assert!(refused.stderr.contains(part), "{part}: {refused:?}");
    }
    let shown = cli.ok(&["topic", "delete", "gone", "--dry-run", "--output", "json"]).json();
    assert_eq!((&shown["deleted"], &shown["records"]), (&false.into(), &1.into()), "{shown}");
    assert!(shown["tiered_bytes"].as_u64().is_some_and(|bytes| bytes > 0), "{shown}");
    assert_eq!(cli.ok(&["consume", "gone", "--from", "earliest", "--until-end"]).text(), "a record\n");
    let deleted = cli.ok(&["topic", "delete", "gone", "--yes"]).text();
    assert!(deleted.contains("are removed within 2h (tier.garbage_grace)"), "{deleted}");
    assert!(!files(&home.bucket(), ".segment").is_empty(), "they are there still");
    assert_eq!(cli.run(&["topic", "describe", "gone"]).code, 1);
}

#[test]
fn tombstone_is_deleted_last_and_data_without_one_stays() {
    let mut home = Home::new().setting("tier.garbage_grace", "\"1s\"");
    let broker = home.start();
    let cli = home.cli();
    cli.ok(&["topic", "create", "gone", "--config", "segment.ms=100"]);
    cli.ok_with(&["produce", "gone", "--acks", "tiered"], b"a record\n");
    let described = cli.ok(&["topic", "describe", "gone", "--output", "json"]).json();
    let id: TopicId = described["id"].as_str().and_then(|id| id.parse().ok()).expect("an id");
    let folder = |id: TopicId| home.bucket().join("topics").join(id.to_string());
    assert!(!files(&folder(id), "").is_empty());
    // The first topic is unknown, and no operator deleted it: its metadata may have been lost. The second topic was deleted, and a foreign
    // object remains in its folder.
    let (unknown, held) = (TopicId::from_bytes([1; 16]), TopicId::from_bytes([2; 16]));
    let at = |offset| Offset::new(offset).expect("small");
    let history = Stamp::draw(at(0), at(9), LeaderEpoch(0)).segment();
    let left = [folder(unknown).join("0").join(history), folder(held).join("0/notes.txt")];
    for path in &left {
        fs::create_dir_all(path.parent().expect("a folder")).expect("it is made");
        fs::write(path, "something").expect("a file");
    }
    cli.ok(&["topic", "delete", "gone", "--yes"]);
    eventually("its objects are gone", || files(&folder(id), "").is_empty().then_some(()));
    searched(&home);
    assert!(broker.terminate().success(), "{}", home.log());
    let now_ms = clock::wall_ms();
    let since_ms = mark(&home, id).expect("it was deleted a moment ago").gone_since_ms.expect("nothing is left of it");
    assert!((now_ms - 60_000..=now_ms).contains(&since_ms), "{since_ms}");

    put_mark(&home, id, Some(now_ms - LONG_MS));
    put_mark(&home, held, Some(now_ms - LONG_MS));
    let broker = home.start();
    searched(&home);
    assert!(broker.terminate().success(), "{}", home.log());
    assert_eq!(mark(&home, id), None);
    assert_eq!(mark(&home, held).expect("something is left").gone_since_ms, None, "the count starts again");
    assert!(left.iter().all(|path| path.exists()), "{left:?}");
}

/// Returns the folder of a topic in the data directory.
fn local_folder(home: &Home, topic: &str) -> PathBuf {
    let described = home.cli().ok(&["topic", "describe", topic, "--output", "json"]).json();
    home.data_dir().join(described["id"].as_str().expect("an id"))
}

#[test]
fn topic_whose_partitions_cannot_be_opened_is_deleted() {
    let mut home = Home::new();
    let broker = home.start();
    home.cli().ok(&["topic", "create", "broken", "--partitions", "2"]);
    let keyed: String = (0..60).map(|number| format!("k{number}:v\n")).collect();
    home.cli().ok_with(&["produce", "broken", "--key-separator", ":"], keyed.as_bytes());
    let folder = local_folder(&home, "broken");
    assert!(broker.terminate().success(), "{}", home.log());
    // The journal of the next start does not hold the records.
    assert!(home.start().terminate().success(), "{}", home.log());
    let segments = files(&folder, ".log");
    assert_eq!(segments.len(), 2, "{segments:?}");
    fs::write(&segments[0], "").expect("it is cut");
    fs::remove_file(&segments[1]).expect("it is removed");
    // Segments are read only after an unclean stop.
    home.start().kill9();

    let broker = home.start();
    let refused = home.log().matches("the partition cannot be opened on this broker").count();
    assert_eq!(refused, 2, "{}", home.log());
    home.cli().ok(&["topic", "delete", "broken", "--yes"]);
    eventually("its files are gone", || files_or_none(&folder).is_empty().then_some(()));
    home.cli().ok(&["topic", "create", "broken"]);
    home.cli().ok_with(&["produce", "broken"], b"anew\n");
    assert_eq!(home.cli().ok(&["consume", "broken", "--from", "earliest", "--until-end"]).text(), "anew\n");
    assert!(broker.terminate().success(), "{}", home.log());
}

/// Regression: files of a topic that the broker does not serve stayed on its disk until the next start.
#[test]
fn topic_with_invalid_configuration_is_deleted_with_files() {
    let mut home = Home::new();
    let broker = home.start();
    home.cli().ok(&["topic", "create", "odd", "--config", "local.retention.ms=3600000"]);
    home.cli().ok_with(&["produce", "odd"], b"one\n");
    let folder = local_folder(&home, "odd");
    assert!(broker.terminate().success(), "{}", home.log());

    home = home.topic_default("retention.ms", 60_000);
    let broker = home.start();
    assert!(home.log().contains("the topic's stored configuration is not valid"), "{}", home.log());
    assert!(!files_or_none(&folder).is_empty());
    home.cli().ok(&["topic", "delete", "odd", "--yes"]);
    eventually("its files are gone", || files_or_none(&folder).is_empty().then_some(()));
    assert!(broker.terminate().success(), "{}", home.log());
}

/// Returns the content of a folder, which may not exist.
fn files_or_none(folder: &Path) -> Vec<PathBuf> {
    match fs::read_dir(folder) {
        Ok(entries) => entries.filter_map(|entry| Some(entry.ok()?.path())).collect(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => panic!("{}: {error}", folder.display()),
    }
}

/// Regression, found by a user of another system: a consumer that was away meanwhile continued at its old offset in the new topic. The
/// consumer silently skipped the first records.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn consumer_of_a_recreated_topic_fails_and_skips_nothing() {
    let mut home = Home::new();
    let _broker = tokio::task::block_in_place(|| home.start());
    let cli = home.cli();
    let make = |records| {
        tokio::task::block_in_place(|| {
            cli.ok(&["topic", "create", "t"]);
            cli.ok_with(&["produce", "t"], lines(records).as_bytes());
        });
    };
    make(10);
    let client = Client::connect(&home.grpc().to_string(), Options::default()).await.expect("the broker is there");
    let mut consumer = client.consumer(ConsumerOptions::default());
    consumer.assign_at("t", 0, Offset::ZERO).await.expect("it is there");
    for _ in 0..10 {
        consumer.next().await.expect("a record");
    }
    tokio::task::block_in_place(|| cli.ok(&["topic", "delete", "t", "--yes"]));
    make(30);
    let next = tokio::time::timeout(Duration::from_secs(20), consumer.next()).await.expect("it ends");
    let Err(ConsumeError::Refused { fault, .. }) = next else { panic!("{next:?}") };
    // A request between the two commands finds no topic at all.
    assert!(matches!(fault.code, ErrorCode::TopicIdMismatch | ErrorCode::UnknownTopic), "{fault:?}");
    // A consumer that is assigned again reads the new topic from the beginning.
    consumer.assign_at("t", 0, Offset::ZERO).await.expect("it is there");
    for offset in 0..30 {
        assert_eq!(consumer.next().await.expect("a record").offset.get(), offset);
    }
}

/// Regression: a producer that was active meanwhile silently continued to write into the new topic.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn producer_to_a_recreated_topic_fails_and_writes_nothing() {
    let mut home = Home::new();
    let _broker = tokio::task::block_in_place(|| home.start());
    let cli = home.cli();
    tokio::task::block_in_place(|| cli.ok(&["topic", "create", "t"]));
    let client = Client::connect(&home.grpc().to_string(), Options::default()).await.expect("the broker is there");
    let producer = client.producer(ProducerOptions::default()).await.expect("an idempotent producer");
    let send = async || producer.send("t", NewRecord::value(b"x")).await.expect("it is taken").await;
    assert_eq!(send().await.expect("stored").offset.map(Offset::get), Some(0));
    tokio::task::block_in_place(|| {
        cli.ok(&["topic", "delete", "t", "--yes"]);
        cli.ok(&["topic", "create", "t"]);
    });
    let Err(SendError::Refused { fault, .. }) = send().await else { panic!("it is another topic") };
    assert_eq!(fault.code, ErrorCode::TopicIdMismatch, "{fault:?}");
    let mut log = wire::log(home.grpc());
    assert_eq!(wire::latest(&mut log, "t", 0).await.expect("answered"), 0, "nothing was written");
    assert_eq!(send().await.expect("stored").offset.map(Offset::get), Some(0), "now the producer knows");
}
