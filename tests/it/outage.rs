//! The object store of a real broker is an S3 server that is down, refuses requests, loses responses, is slow, or loses
//! an object. The broker serves its local records, loses no record, and catches up without a restart.

mod known;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use futures::StreamExt as _;
use strandline::{
    proto::{
        error::{ApiError, ErrorCode},
        v1::{self, Acks},
    },
    task::clock,
};
use tonic::transport::Channel;

use crate::{
    broker::{Broker, BrokerInstance, Cli, http_get},
    corruption::{files, lines, partition},
    s3::{Fault, Faults, Op, S3},
    test_timeout::{eventually, eventually_async},
    wire,
};

/// Configuration of a topic with small segments that are evicted as soon as the object store has them.
const EAGER: &[&str] = &["segment.bytes=65536", "segment.ms=200", "local.retention.bytes=0", "retention.ms=-1"];

/// Starts an S3 server, and a broker that uses it as the object store. `with` changes the configuration of the broker.
fn start(with: impl FnOnce(BrokerInstance) -> BrokerInstance) -> (S3, BrokerInstance, Broker) {
    let server = S3::begin();
    let mut instance = with(BrokerInstance::new().object_store(&server));
    let broker = instance.start();
    (server, instance, broker)
}

fn create(cli: &Cli, topic: &str, config: &[&str]) {
    let config: Vec<&str> = config.iter().flat_map(|one| ["--config", *one]).collect();
    cli.ok(&[&["topic", "create", topic][..], &config].concat());
}

fn partition_offset(cli: &Cli, topic: &str, name: &str) -> i64 {
    partition(cli, topic)[name].as_i64().expect("a number")
}

/// Waits until the topic has `end` records and all of them are only in the object store.
fn wait_until_tiered(cli: &Cli, topic: &str, end: i64) {
    eventually("all records are only in the object store", || {
        let state = partition(cli, topic);
        (state["high_watermark"] == end && state["tiered_end"] == end && state["local_start"] == end).then_some(())
    });
}

fn check_read(cli: &Cli, topic: &str, from: &str, expected: &str) {
    let read = cli.ok(&["consume", topic, "--from", from, "--until-end"]);
    assert!(read.stdout == expected.as_bytes(), "{} of {} bytes", read.stdout.len(), expected.len());
}

fn segments(folder: &Path) -> Vec<PathBuf> {
    files(folder, ".segment")
}

/// Returns the base offset and the end offset in the name of a segment object.
fn range(object: &Path) -> (i64, i64) {
    let name = object.file_name().and_then(|name| name.to_str()).expect("a name");
    let mut parts = name.split('-').map(|part| part.parse().expect("a number"));
    (parts.next().expect("the base offset is present"), parts.next().expect("the end offset is present"))
}

#[test]
fn object_store_outage_loses_no_record_and_needs_no_restart() {
    let (server, instance, mut broker) = start(|instance| instance);
    let (cli, text) = (instance.cli(), lines(20_000));
    create(&cli, "t", EAGER);
    cli.ok_with(&["produce", "t"], text.as_bytes());
    wait_until_tiered(&cli, "t", 20_000);
    server.faults().set_down(true);
    for _ in 0..3 {
        cli.ok_with(&["produce", "t"], text.as_bytes());
    }
    check_read(&cli, "t", "20000", &text.repeat(3));
    // The broker serves requests, so it is ready, and it reports the impairment.
    let page = || http_get(instance.http(), "/readyz").expect("the broker responds");
    let is_reported = || page().1.lines().any(|line| line.starts_with("impaired: object store unavailable since "));
    eventually("the object store is reported as unavailable", || is_reported().then_some(()));
    assert_eq!(page().0, 200);
    let health = cli.run(&["cluster", "health"]);
    assert!(health.code == 1 && health.text().contains("broker 1: object store unavailable since "), "{health:?}");
    assert_eq!(partition_offset(&cli, "t", "tiered_end"), 20_000);
    assert_eq!(partition_offset(&cli, "t", "local_start"), 20_000, "only records in the object store are evicted");
    let local = files(&instance.data_dir(), ".log").len();
    assert!(local > 20, "sealed segments stay on disk: {local}");
    assert_eq!(instance.metric("strandline_tier_lag_records"), 60_000.0);
    assert!(broker.is_running());
    let (puts, objects) = (server.faults().requests(Op::Put), segments(&server.bucket()).len());
    server.faults().set_down(false);
    wait_until_tiered(&cli, "t", 80_000);
    eventually("the condition is over", || (page() == (200, "ok\n".to_owned())).then_some(()));
    assert_eq!(instance.metric("strandline_tier_lag_records"), 0.0);
    let objects = segments(&server.bucket()).len() - objects;
    let manifests = server.faults().requests(Op::Put) - puts - objects;
    assert!(manifests * 2 < objects, "small segments are committed together: {objects} by {manifests}");
    eventually("the local files are deleted", || (files(&instance.data_dir(), ".log").len() < 5).then_some(()));
    check_read(&cli, "t", "earliest", &text.repeat(4));
}

/// A reader of records in an unavailable object store reports its wait, and fails after its timeout. Regression, found
/// by a user: such a reader printed nothing until the object store was available again.
#[test]
fn reader_of_tiered_records_reports_its_wait_and_timeout() {
    let (server, mut instance, broker) = start(|instance| instance);
    create(&instance.cli(), "t", EAGER);
    instance.cli().ok_with(&["produce", "t"], lines(20_000).as_bytes());
    wait_until_tiered(&instance.cli(), "t", 20_000);
    eventually("all local segments are evicted", || {
        (partition_offset(&instance.cli(), "t", "local_start") == 20_000).then_some(())
    });
    assert!(broker.terminate().success(), "{}", instance.log());
    server.faults().set_down(true);
    let _broker = instance.start();
    let output = instance.cli().run(&["consume", "t", "--until-end", "--timeout", "8"]);
    assert_eq!(output.code, 1, "{output:?}");
    let reason = "the object store has been unavailable for";
    for expected in
        ["still trying: ", reason, "giving up in", "error: timed out after 8 s without a record", "--timeout"]
    {
        assert!(output.stderr.contains(expected), "{expected:?}: {output:?}");
    }
}

#[test]
fn object_store_outage_delays_uploads_and_not_the_start() {
    let (server, mut instance, broker) = start(|instance| instance);
    let text = lines(10_000);
    create(&instance.cli(), "t", EAGER);
    instance.cli().ok_with(&["produce", "t"], text.as_bytes());
    wait_until_tiered(&instance.cli(), "t", 10_000);
    assert!(broker.terminate().success(), "{}", instance.log());
    server.faults().set_down(true);
    let _broker = instance.start();
    instance.cli().ok_with(&["produce", "t"], text.as_bytes());
    check_read(&instance.cli(), "t", "10000", &text);
    server.faults().set_down(false);
    wait_until_tiered(&instance.cli(), "t", 20_000);
    check_read(&instance.cli(), "t", "earliest", &text.repeat(2));
}

#[test]
fn refused_requests_and_lost_responses_lose_no_records() {
    let (server, instance, _broker) = start(|instance| instance);
    let (cli, text) = (instance.cli(), lines(20_000));
    create(&cli, "t", EAGER);
    for op in [Op::Put, Op::Get, Op::Head, Op::List] {
        server.faults().inject(op, Fault::Status(503), 5);
        server.faults().inject(op, Fault::LostResponse, 5);
        server.faults().inject(op, Fault::Refuse, 2);
        server.faults().inject(op, Fault::Status(500), 2);
    }
    server.faults().inject(Op::Put, Fault::Twice, 10);
    for _ in 0..2 {
        cli.ok_with(&["produce", "t"], text.as_bytes());
    }
    check_read(&cli, "t", "earliest", &text.repeat(2));
    wait_until_tiered(&cli, "t", 40_000);
    assert!(server.faults().hits() > 20, "{}", server.faults().hits());
    server.faults().clear();
    check_read(&cli, "t", "earliest", &text.repeat(2));
}

#[test]
fn slow_object_store_delays_no_acknowledgement() {
    let (server, instance, _broker) = start(|instance| instance);
    let (cli, text) = (instance.cli(), lines(20_000));
    create(&cli, "t", EAGER);
    for op in [Op::Put, Op::Get, Op::Head, Op::List] {
        server.faults().inject(op, Fault::Delay(Duration::from_secs(10)), usize::MAX);
    }
    cli.ok_with(&["produce", "t"], text.as_bytes());
    eventually("an upload is under way", || (server.faults().hits() > 0).then_some(()));
    cli.ok_with(&["produce", "t"], text.as_bytes());
    assert_eq!(
        partition_offset(&cli, "t", "tiered_end"),
        0,
        "all records are acknowledged before the first response of the object store"
    );
    server.faults().clear();
    wait_until_tiered(&cli, "t", 40_000);
    check_read(&cli, "t", "earliest", &text.repeat(2));
}

/// Regression: while one request of a produce stream waited for memory, the stream processed no responses. So appends
/// that had timed out kept their memory, and no client could write to any topic until the object store was available
/// again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_that_wait_for_object_store_block_no_others() {
    const RESPONSE_TIMEOUT: Duration = Duration::from_secs(20);
    let (server, instance, _broker) =
        tokio::task::block_in_place(|| start(|instance| instance.setting("limits.produce_memory_bytes", 1 << 20)));
    tokio::task::block_in_place(|| ["t", "other"].map(|topic| create(&instance.cli(), topic, EAGER)));
    server.faults().set_down(true);
    let mut log = wire::log(instance.grpc());
    let waiting = |correlation_id| {
        let append = wire::append_plain("t", 0, vec![Bytes::from(vec![7; 300_000])]);
        let append = v1::AppendRequest { acks: Acks::Tiered.into(), timeout_ms: 500, ..append };
        v1::ProduceRequest { correlation_id, append: Some(append) }
    };
    let mut streams = Vec::new();
    for _ in 0..3 {
        let requests = futures::stream::iter((0..8).map(waiting)).chain(futures::stream::pending());
        streams.push(log.produce(requests).await.expect("a stream").into_inner());
    }
    let other = wire::append(&mut log, wire::append_plain("other", 0, vec![Bytes::from_static(b"x")]));
    tokio::time::timeout(RESPONSE_TIMEOUT, other).await.expect("memory is free").expect("acknowledged");
    for responses in &mut streams {
        for _ in 0..8 {
            let reason =
                final_response(responses, RESPONSE_TIMEOUT).await.expect_err("the object store is unavailable").code;
            assert!(matches!(reason, ErrorCode::Timeout | ErrorCode::ObjectStoreUnavailable), "{reason:?}");
        }
    }
}

/// Returns the next final response of a produce stream. Skips notices of appends that wait for the object store.
async fn final_response(
    responses: &mut tonic::Streaming<v1::ProduceResponse>,
    within: Duration,
) -> Result<v1::AppendResponse, ApiError> {
    use v1::produce_response::Result as ProduceResult;
    loop {
        let response = tokio::time::timeout(within, responses.message()).await.expect("in time").expect("a response");
        match response.and_then(|response| response.result).expect("the stream continues") {
            ProduceResult::Appended(appended) => return Ok(appended),
            ProduceResult::Error(error) => return Err(error.into()),
            ProduceResult::Waiting(_) => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn missing_object_makes_only_its_own_offsets_unreadable() {
    let (server, instance, _broker) = tokio::task::block_in_place(|| start(|instance| instance));
    let (cli, text) = (instance.cli(), lines(20_000));
    let deleted = tokio::task::block_in_place(|| {
        create(&cli, "t", EAGER);
        cli.ok_with(&["produce", "t"], text.as_bytes());
        wait_until_tiered(&cli, "t", 20_000);
        segments(&server.bucket()).remove(2)
    });
    let (base, end) = range(&deleted);
    std::fs::remove_file(&deleted).expect("the object is deleted");
    let mut log = wire::log(instance.grpc());
    assert_eq!(wire::read_range(&mut log, "t", 0, 0, base).await.expect("before it").len() as i64, base);
    let error = wire::read_range(&mut log, "t", 0, base, end).await.expect_err("the object does not exist");
    assert_eq!(error.code, ErrorCode::DataCorrupt, "{error:?}");
    let name = deleted.file_name().and_then(|name| name.to_str()).expect("a name");
    assert!(error.message.contains(name) && error.message.contains(&base.to_string()), "{error:?}");
    let after = wire::read_range(&mut log, "t", 0, end, 20_000).await.expect("after it");
    assert_eq!(after.len() as i64, 20_000 - end);
    let appended = wire::append(&mut log, wire::append_plain("t", 0, vec![Bytes::from_static(b"goes on")])).await;
    assert_eq!(appended.expect("the broker accepts records").base_offset, 20_000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acks_tiered_does_not_wait_for_a_full_segment() {
    let (server, instance, _broker) = tokio::task::block_in_place(|| start(|instance| instance));
    // The segment neither fills nor reaches its maximum age within this test.
    wire::create_topic(instance.grpc(), "t", 1, &[("segment.ms", "86400000")]).await;
    let mut log = wire::log(instance.grpc());
    let tiered = |value: &'static [u8], timeout_ms| {
        let mut request = wire::append_plain("t", 0, vec![Bytes::from_static(value)]);
        (request.acks, request.timeout_ms) = (Acks::Tiered.into(), timeout_ms);
        request
    };
    let first = wire::append(&mut log, tiered(b"one", 10_000)).await.expect("the object store works");
    assert_eq!(first.base_offset, 0);
    assert_eq!(tokio::task::block_in_place(|| partition_offset(&instance.cli(), "t", "tiered_end")), 1);
    assert_eq!(segments(&server.bucket()).len(), 1);

    server.faults().set_down(true);
    let error =
        wire::append(&mut log, tiered(b"two", 10_000)).await.expect_err("the record is not in the object store");
    assert_eq!(error.code, ErrorCode::Timeout, "{error:?}");
    assert_eq!((error.number("base_offset"), error.number("end_offset")), (Some(1), Some(2)), "{error:?}");
    assert!(error.metadata["cause"].contains("has been unavailable"), "{error:?}");
    let there = wire::read_range(&mut log, "t", 0, 1, 2).await.expect("the record is written");
    assert_eq!(there[0].value.as_deref(), Some(&b"two"[..]));
    server.faults().set_down(false);
    let third = eventually_async("the object store is available again", || {
        let (mut log, append) = (log.clone(), tiered(b"three", 40_000));
        async move { wire::append(&mut log, append).await.ok() }
    });
    assert_eq!(third.await.base_offset, 2);
    assert_eq!(tokio::task::block_in_place(|| partition_offset(&instance.cli(), "t", "tiered_end")), 3);
}

#[test]
fn objects_of_a_deleted_topic_are_deleted_after_grace() {
    let (server, instance, _broker) = start(|instance| instance.setting("tier.garbage_grace", "\"1s\""));
    let (cli, text) = (instance.cli(), lines(5_000));
    let mut folders = Vec::new();
    for topic in ["goes", "stays"] {
        create(&cli, topic, EAGER);
        cli.ok_with(&["produce", topic], text.as_bytes());
        wait_until_tiered(&cli, topic, 5_000);
        let described = cli.ok(&["topic", "describe", topic, "--output", "json"]).json();
        let id = described["topic_id"].as_str().expect("an id").to_owned();
        folders.push(server.bucket().join("it/topics").join(id));
    }
    let stay = segments(&folders[1]);
    assert!(!segments(&folders[0]).is_empty() && !stay.is_empty());
    cli.ok(&["topic", "delete", "goes", "--yes"]);
    eventually("the objects are deleted", || (!folders[0].exists() || files(&folders[0], "").is_empty()).then_some(()));
    assert_eq!(segments(&folders[1]), stay);
    check_read(&cli, "stays", "earliest", &text);
}

#[test]
fn size_retention_covers_both_tiers_and_deletes_objects() {
    let (server, instance, _broker) =
        start(|instance| instance.setting("tier.garbage_grace", "\"1s\"").setting("tier.check_interval", "\"1s\""));
    let (cli, text) = (instance.cli(), lines(40_000));
    create(&cli, "t", &[EAGER, &["retention.bytes=400000"]].concat());
    cli.ok_with(&["produce", "t"], text.as_bytes());
    let start = eventually("the log start no longer moves", || {
        let state = partition(&cli, "t");
        let bytes = state["tiered_bytes"].as_u64().expect("a number");
        let start = state["log_start"].as_i64().expect("a number");
        (state["tiered_end"] == 40_000 && start > 0 && bytes < 400_000 + 70_000).then_some(start)
    });
    let bytes = partition(&cli, "t")["tiered_bytes"].as_u64().expect("a number");
    assert!(bytes >= 400_000, "no more than the excess is deleted: {bytes}");
    eventually("the objects below the log start are deleted", || {
        segments(&server.bucket()).iter().all(|object| range(object).1 > start).then_some(())
    });
    let rest: String = text.split_inclusive('\n').skip(usize::try_from(start).expect("positive")).collect();
    check_read(&cli, "t", "earliest", &rest);
}

/// Retention continues while the object store serves reads and rejects every upload. Regression: each upload is retried
/// for 20 s, and the same four workers ran uploads and retention, so retention ran once in three minutes.
#[test]
fn retention_continues_while_uploads_fail() {
    const PARTITIONS: u32 = 40;
    let (server, instance, _broker) = start(|instance| instance.setting("tier.check_interval", "\"1s\""));
    let cli = instance.cli();
    cli.ok(&["topic", "create", "uploads", "--partitions", &PARTITIONS.to_string(), "--config", "segment.ms=200"]);
    let bounded = ["segment.bytes=65536", "retention.bytes=100000"];
    create(&cli, "kept", &[&["remote.storage.enable=false"][..], &bounded].concat());
    create(&cli, "waits", &bounded);
    for op in [Op::Put, Op::StartUpload] {
        server.faults().inject(op, Fault::Status(500), usize::MAX);
    }
    for partition in 0..PARTITIONS {
        cli.ok_with(&["produce", "uploads", "--partition", &partition.to_string()], b"x\n");
    }
    eventually("uploads fail", || (server.faults().hits() > 4).then_some(()));
    for topic in ["kept", "waits"] {
        cli.ok_with(&["produce", topic], lines(40_000).as_bytes());
    }
    for topic in ["kept", "waits"] {
        eventually("retention has moved the log start", || {
            (partition_offset(&cli, topic, "log_start") > 30_000).then_some(())
        });
    }
    assert_eq!(
        partition_offset(&cli, "waits", "tiered_end"),
        0,
        "records deleted by retention are not in the object store"
    );
    server.faults().clear();
    for number in 0..PARTITIONS as usize {
        eventually("all records are in the object store", || {
            let topic = cli.ok(&["topic", "describe", "uploads", "--output", "json"]).json();
            (topic["partitions"][number]["tiered_end"] == 1).then_some(())
        });
    }
}

/// Returns an append of one record with `acks=tiered` to topic `t`.
fn tiered(timeout_ms: u32) -> v1::AppendRequest {
    let append = wire::append_plain("t", 0, vec![Bytes::from_static(b"x")]);
    v1::AppendRequest { acks: Acks::Tiered.into(), timeout_ms, ..append }
}

/// An object store whose folder has disappeared accepts no records. Regression: after `mv object-store away`, or when
/// its disk was unmounted, the broker created the folder again. This folder had no cluster marker, and the broker
/// acknowledged records with `acks=tiered`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn missing_folder_accepts_no_tiered_record() {
    let mut instance = BrokerInstance::new();
    let _broker = tokio::task::block_in_place(|| instance.start());
    let config = [("segment.ms", "200"), ("remote.storage.enable", "true")];
    wire::create_topic(instance.grpc(), "t", 1, &config).await;
    let mut log = wire::log(instance.grpc());
    wire::append(&mut log, tiered(30_000)).await.expect("the object store exists");
    let moved = instance.path().join("away");
    std::fs::rename(instance.object_store_dir(), &moved).expect("moved");
    let error = wire::append(&mut log, tiered(3_000)).await.expect_err("the object store is missing");
    assert_eq!(error.code, ErrorCode::Timeout, "{error}");
    assert!(!instance.object_store_dir().exists(), "no new folder is created");
    wire::append(&mut log, wire::append_plain("t", 0, vec![Bytes::from_static(b"y")]))
        .await
        .expect("the append needs no object store");
    let output = instance.log();
    assert!(output.contains("has no cluster.json"), "the log contains the reason: {output}");
    std::fs::rename(&moved, instance.object_store_dir()).expect("the file is moved back");
    let appended = wire::append(&mut log, tiered(30_000)).await.expect("the object store is available again");
    assert_eq!((appended.base_offset, appended.durability()), (3, strandline::proto::v1::AckDurability::Tiered));
}

/// Regression: at a restart, the broker used an empty folder as a new object store, and treated the tiered records in
/// the metadata as corrupt.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn empty_object_store_at_a_restart_is_not_claimed() {
    let mut instance = BrokerInstance::new();
    let broker = tokio::task::block_in_place(|| instance.start());
    let cli = instance.cli();
    let text = lines(2_000);
    tokio::task::block_in_place(|| {
        create(&cli, "t", EAGER);
        cli.ok_with(&["produce", "t"], text.as_bytes());
        wait_until_tiered(&cli, "t", 2_000);
        assert!(broker.terminate().success(), "{}", instance.log());
    });
    let moved = instance.path().join("away");
    std::fs::rename(instance.object_store_dir(), &moved).expect("moved");
    std::fs::create_dir(instance.object_store_dir()).expect("the folder is created");
    let _broker = tokio::task::block_in_place(|| instance.start());
    let mut log = wire::log(instance.grpc());
    let error = wire::append(&mut log, tiered(2_000)).await.expect_err("the object store is missing");
    assert_eq!(error.code, ErrorCode::Timeout, "{error}");
    assert!(files(&instance.object_store_dir(), "").is_empty(), "no file is written");
    let output = instance.log();
    assert!(output.contains("has no cluster.json"), "the log contains the reason: {output}");
    let blocked = "uploads or retention fail on broker 1, and are retried:\n  1 partition, t/0 for ";
    tokio::task::block_in_place(|| {
        eventually("the description contains the partition", || {
            cli.ok(&["cluster", "describe"]).text().contains(blocked).then_some(())
        });
    });
    let read = tokio::task::block_in_place(|| {
        cli.run(&["consume", "t", "--from", "earliest", "--until-end", "--timeout", "2"])
    });
    assert!(read.code == 1 && read.stdout.is_empty() && read.stderr.contains("cluster.json"), "{read:?}");
    std::fs::remove_dir(instance.object_store_dir()).expect("empty");
    std::fs::rename(&moved, instance.object_store_dir()).expect("the mount succeeds");
    wire::append(&mut log, tiered(30_000)).await.expect("the object store is available again");
    tokio::task::block_in_place(|| {
        check_read(&cli, "t", "earliest", &format!("{text}x\nx\n"));
        eventually("the partition works again", || {
            (!cli.ok(&["cluster", "describe"]).text().contains(blocked)).then_some(())
        });
    });
}
