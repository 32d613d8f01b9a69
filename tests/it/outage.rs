//! The object store is an S3 server that is down, refuses requests, loses responses, is slow, or loses an object. A real broker continues
//! with its own data, loses nothing, and catches up by itself.

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
    broker::{Broker, Cli, Home, http_get},
    damage::{files, lines, partition},
    s3::{Fault, Faults, Op, S3},
    test_timeout::{eventually, eventually_async},
    wire,
};

/// Configuration of a topic with small segments that are evicted as soon as the object store has them.
const EAGER: &[&str] = &["segment.bytes=65536", "segment.ms=200", "local.retention.bytes=0", "retention.ms=-1"];

fn start(with: impl FnOnce(Home) -> Home) -> (S3, Home, Broker) {
    let server = S3::begin();
    let mut home = with(Home::new().object_store(&server));
    let broker = home.start();
    (server, home, broker)
}

fn create(cli: &Cli, topic: &str, config: &[&str]) {
    let config: Vec<&str> = config.iter().flat_map(|one| ["--config", *one]).collect();
    cli.ok(&[&["topic", "create", topic][..], &config].concat());
}

fn mark(cli: &Cli, topic: &str, name: &str) -> i64 {
    partition(cli, topic)[name].as_i64().expect("a number")
}

/// Waits until only the object store holds the first `end` records, which are all records.
fn settled(cli: &Cli, topic: &str, end: i64) {
    eventually("everything is in the bucket, and there alone", || {
        let state = partition(cli, topic);
        (state["high_watermark"] == end && state["tiered_end"] == end && state["local_start"] == end).then_some(())
    });
}

fn reads(cli: &Cli, topic: &str, from: &str, expected: &str) {
    let read = cli.ok(&["consume", topic, "--from", from, "--until-end"]);
    assert!(read.stdout == expected.as_bytes(), "{} of {} bytes", read.stdout.len(), expected.len());
}

fn segments(folder: &Path) -> Vec<PathBuf> {
    files(folder, ".segment")
}

/// Returns the offsets in the name of a segment object.
fn range(object: &Path) -> (i64, i64) {
    let name = object.file_name().and_then(|name| name.to_str()).expect("a name");
    let mut parts = name.split('-').map(|part| part.parse().expect("a number"));
    (parts.next().expect("its base"), parts.next().expect("its end"))
}

#[test]
fn object_store_outage_loses_no_record_and_needs_no_restart() {
    let (server, home, mut broker) = start(|home| home);
    let (cli, text) = (home.cli(), lines(20_000));
    create(&cli, "t", EAGER);
    cli.ok_with(&["produce", "t"], text.as_bytes());
    settled(&cli, "t", 20_000);
    server.faults().set_down(true);
    for _ in 0..3 {
        cli.ok_with(&["produce", "t"], text.as_bytes());
    }
    reads(&cli, "t", "20000", &text.repeat(3));
    // The broker serves, is therefore ready, and reports the impairment.
    let page = || http_get(home.http(), "/readyz").expect("it answers");
    let away = || page().1.lines().any(|line| line.starts_with("impaired: object store away since "));
    eventually("it says that the bucket is away", || away().then_some(()));
    assert_eq!(page().0, 200);
    let health = cli.run(&["cluster", "health"]);
    assert!(health.code == 1 && health.text().contains("broker 1: object store away since "), "{health:?}");
    assert_eq!(mark(&cli, "t", "tiered_end"), 20_000);
    assert_eq!(mark(&cli, "t", "local_start"), 20_000, "nothing is evicted that the bucket has not");
    let local = files(&home.data_dir(), ".log").len();
    assert!(local > 20, "sealed segments gather on disk: {local}");
    assert_eq!(home.metric("strandline_tier_lag_records"), 60_000.0);
    assert!(broker.is_running());
    let (puts, objects) = (server.faults().requests(Op::Put), segments(&server.bucket()).len());
    server.faults().set_down(false);
    settled(&cli, "t", 80_000);
    eventually("it is over", || (page() == (200, "ok\n".to_owned())).then_some(()));
    assert_eq!(home.metric("strandline_tier_lag_records"), 0.0);
    let objects = segments(&server.bucket()).len() - objects;
    let manifests = server.faults().requests(Op::Put) - puts - objects;
    assert!(manifests * 2 < objects, "small segments are committed together: {objects} by {manifests}");
    eventually("the local files are gone", || (files(&home.data_dir(), ".log").len() < 5).then_some(()));
    reads(&cli, "t", "earliest", &text.repeat(4));
}

/// Regression, found by a user: a reader of old records printed nothing until the object store returned, however long that took.
#[test]
fn reader_of_tiered_records_reports_its_wait_and_timeout() {
    let (server, mut home, broker) = start(|home| home);
    create(&home.cli(), "t", EAGER);
    home.cli().ok_with(&["produce", "t"], lines(20_000).as_bytes());
    settled(&home.cli(), "t", 20_000);
    eventually("it is evicted", || (mark(&home.cli(), "t", "local_start") == 20_000).then_some(()));
    assert!(broker.terminate().success(), "{}", home.log());
    server.faults().set_down(true);
    let _broker = home.start();
    let output = home.cli().run(&["consume", "t", "--until-end", "--timeout", "8"]);
    assert_eq!(output.code, 1, "{output:?}");
    let why = "the store has served nothing for";
    for said in ["still trying: ", why, "giving up in", "error: given up after 8 s without a record", "--timeout"] {
        assert!(output.stderr.contains(said), "{said:?}: {output:?}");
    }
}

#[test]
fn object_store_outage_delays_uploads_and_not_the_start() {
    let (server, mut home, broker) = start(|home| home);
    let text = lines(10_000);
    create(&home.cli(), "t", EAGER);
    home.cli().ok_with(&["produce", "t"], text.as_bytes());
    settled(&home.cli(), "t", 10_000);
    assert!(broker.terminate().success(), "{}", home.log());
    server.faults().set_down(true);
    let _broker = home.start();
    home.cli().ok_with(&["produce", "t"], text.as_bytes());
    reads(&home.cli(), "t", "10000", &text);
    server.faults().set_down(false);
    settled(&home.cli(), "t", 20_000);
    reads(&home.cli(), "t", "earliest", &text.repeat(2));
}

#[test]
fn refused_requests_and_lost_responses_lose_no_records() {
    let (server, home, _broker) = start(|home| home);
    let (cli, text) = (home.cli(), lines(20_000));
    create(&cli, "t", EAGER);
    for op in [Op::Put, Op::Get, Op::Head, Op::List] {
        server.faults().inject(op, Fault::Status(503), 5);
        server.faults().inject(op, Fault::LostAnswer, 5);
        server.faults().inject(op, Fault::Refuse, 2);
        server.faults().inject(op, Fault::Status(500), 2);
    }
    server.faults().inject(Op::Put, Fault::Twice, 10);
    for _ in 0..2 {
        cli.ok_with(&["produce", "t"], text.as_bytes());
    }
    reads(&cli, "t", "earliest", &text.repeat(2));
    settled(&cli, "t", 40_000);
    assert!(server.faults().hits() > 20, "{}", server.faults().hits());
    server.faults().clear();
    reads(&cli, "t", "earliest", &text.repeat(2));
}

#[test]
fn slow_object_store_delays_no_acknowledgement() {
    let (server, home, _broker) = start(|home| home);
    let (cli, text) = (home.cli(), lines(20_000));
    create(&cli, "t", EAGER);
    for op in [Op::Put, Op::Get, Op::Head, Op::List] {
        server.faults().inject(op, Fault::Delay(Duration::from_secs(10)), usize::MAX);
    }
    cli.ok_with(&["produce", "t"], text.as_bytes());
    eventually("an upload is under way", || (server.faults().hits() > 0).then_some(()));
    cli.ok_with(&["produce", "t"], text.as_bytes());
    assert_eq!(mark(&cli, "t", "tiered_end"), 0, "all are acknowledged before the bucket has answered once");
    server.faults().clear();
    settled(&cli, "t", 40_000);
    reads(&cli, "t", "earliest", &text.repeat(2));
}

/// Regression: a stream with a request that waited for memory processed none of its responses meanwhile. Appends that had timed out kept
/// their memory, and no client could write to any topic before the object store returned.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_that_wait_for_object_store_block_no_others() {
    const SOON: Duration = Duration::from_secs(20);
    let (server, home, _broker) =
        tokio::task::block_in_place(|| start(|home| home.setting("limits.produce_memory_bytes", 1 << 20)));
    tokio::task::block_in_place(|| ["t", "other"].map(|topic| create(&home.cli(), topic, EAGER)));
    server.faults().set_down(true);
    let mut log = wire::log(home.grpc());
    let waiting = |correlation| {
        let append = wire::append_plain("t", 0, vec![Bytes::from(vec![7; 300_000])]);
        let append = v1::AppendRequest { acks: Acks::Tiered.into(), timeout_ms: 500, ..append };
        v1::ProduceRequest { correlation, append: Some(append) }
    };
    let mut streams = Vec::new();
    for _ in 0..3 {
        let requests = futures::stream::iter((0..8).map(waiting)).chain(futures::stream::pending());
        streams.push(log.produce(requests).await.expect("a stream").into_inner());
    }
    let other = wire::append(&mut log, wire::append_plain("other", 0, vec![Bytes::from_static(b"x")]));
    tokio::time::timeout(SOON, other).await.expect("there is room").expect("acknowledged");
    for answers in &mut streams {
        for _ in 0..8 {
            let reason = final_answer(answers, SOON).await.expect_err("the bucket is away").code;
            assert!(matches!(reason, ErrorCode::Timeout | ErrorCode::ObjectStoreUnavailable), "{reason:?}");
        }
    }
}

/// Returns the final response to an append of a stream. Skips notices.
async fn final_answer(
    answers: &mut tonic::Streaming<v1::ProduceResponse>,
    within: Duration,
) -> Result<v1::AppendResponse, ApiError> {
    use v1::produce_response::Result as Answer;
    loop {
        let answer = tokio::time::timeout(within, answers.message()).await.expect("in time").expect("an answer");
        match answer.and_then(|answer| answer.result).expect("the stream goes on") {
            Answer::Appended(appended) => return Ok(appended),
            Answer::Error(error) => return Err(error.into()),
            Answer::Waiting(_) => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn missing_object_makes_only_its_own_offsets_unreadable() {
    let (server, home, _broker) = tokio::task::block_in_place(|| start(|home| home));
    let (cli, text) = (home.cli(), lines(20_000));
    let gone = tokio::task::block_in_place(|| {
        create(&cli, "t", EAGER);
        cli.ok_with(&["produce", "t"], text.as_bytes());
        settled(&cli, "t", 20_000);
        segments(&server.bucket()).remove(2)
    });
    let (base, end) = range(&gone);
    std::fs::remove_file(&gone).expect("deleted behind the broker's back");
    let mut log = wire::log(home.grpc());
    assert_eq!(wire::read_range(&mut log, "t", 0, 0, base).await.expect("before it").len() as i64, base);
    let fault = wire::read_range(&mut log, "t", 0, base, end).await.expect_err("not there");
    assert_eq!(fault.code, ErrorCode::DataDamaged, "{fault:?}");
    let name = gone.file_name().and_then(|name| name.to_str()).expect("a name");
    assert!(fault.message.contains(name) && fault.message.contains(&base.to_string()), "{fault:?}");
    let after = wire::read_range(&mut log, "t", 0, end, 20_000).await.expect("after it");
    assert_eq!(after.len() as i64, 20_000 - end);
    let appended = wire::append(&mut log, wire::append_plain("t", 0, vec![Bytes::from_static(b"goes on")])).await;
    assert_eq!(appended.expect("it takes records").base_offset, 20_000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acks_tiered_does_not_wait_for_a_full_segment() {
    let (server, home, _broker) = tokio::task::block_in_place(|| start(|home| home));
    // A segment that neither fills nor ages within this test.
    wire::create_topic(home.grpc(), "t", 1, &[("segment.ms", "86400000")]).await;
    let mut log = wire::log(home.grpc());
    let tiered = |value: &'static [u8], timeout_ms| {
        let mut request = wire::append_plain("t", 0, vec![Bytes::from_static(value)]);
        (request.acks, request.timeout_ms) = (Acks::Tiered.into(), timeout_ms);
        request
    };
    let first = wire::append(&mut log, tiered(b"one", 10_000)).await.expect("the bucket works");
    assert_eq!(first.base_offset, 0);
    assert_eq!(tokio::task::block_in_place(|| mark(&home.cli(), "t", "tiered_end")), 1);
    assert_eq!(segments(&server.bucket()).len(), 1);

    server.faults().set_down(true);
    let fault = wire::append(&mut log, tiered(b"two", 10_000)).await.expect_err("it is not in the bucket");
    assert_eq!(fault.code, ErrorCode::Timeout, "{fault:?}");
    assert_eq!((fault.number("base_offset"), fault.number("end_offset")), (Some(1), Some(2)), "{fault:?}");
    assert!(fault.metadata["cause"].contains("served nothing"), "{fault:?}");
    let there = wire::read_range(&mut log, "t", 0, 1, 2).await.expect("it is written all the same");
    assert_eq!(there[0].value.as_deref(), Some(&b"two"[..]));
    server.faults().set_down(false);
    let third = eventually_async("the bucket works again", || {
        let (mut log, append) = (log.clone(), tiered(b"three", 40_000));
        async move { wire::append(&mut log, append).await.ok() }
    });
    assert_eq!(third.await.base_offset, 2);
    assert_eq!(tokio::task::block_in_place(|| mark(&home.cli(), "t", "tiered_end")), 3);
}

#[test]
fn objects_of_a_deleted_topic_are_deleted_after_grace() {
    let (server, home, _broker) = start(|home| home.setting("tier.garbage_grace", "\"1s\""));
    let (cli, text) = (home.cli(), lines(5_000));
    let mut folders = Vec::new();
    for topic in ["goes", "stays"] {
        create(&cli, topic, EAGER);
        cli.ok_with(&["produce", topic], text.as_bytes());
        settled(&cli, topic, 5_000);
        let described = cli.ok(&["topic", "describe", topic, "--output", "json"]).json();
        let id = described["topic_id"].as_str().or(described["id"].as_str()).expect("an id").to_owned();
        folders.push(server.bucket().join("it/topics").join(id));
    }
    let stay = segments(&folders[1]);
    assert!(!segments(&folders[0]).is_empty() && !stay.is_empty());
    cli.ok(&["topic", "delete", "goes", "--yes"]);
    eventually("its objects are gone", || (!folders[0].exists() || files(&folders[0], "").is_empty()).then_some(()));
    assert_eq!(segments(&folders[1]), stay);
    reads(&cli, "stays", "earliest", &text);
}

#[test]
fn size_retention_covers_both_tiers_and_deletes_objects() {
    let (server, home, _broker) =
        start(|home| home.setting("tier.garbage_grace", "\"1s\"").setting("tier.check_interval", "\"1s\""));
    let (cli, text) = (home.cli(), lines(40_000));
    create(&cli, "t", &[EAGER, &["retention.bytes=400000"]].concat());
    cli.ok_with(&["produce", "t"], text.as_bytes());
    let start = eventually("the log start has moved as far as it goes", || {
        let state = partition(&cli, "t");
        let bytes = state["tiered_bytes"].as_u64().expect("a number");
        let start = state["log_start"].as_i64().expect("a number");
        (state["tiered_end"] == 40_000 && start > 0 && bytes < 400_000 + 70_000).then_some(start)
    });
    let bytes = partition(&cli, "t")["tiered_bytes"].as_u64().expect("a number");
    assert!(bytes >= 400_000, "no more goes than must: {bytes}");
    eventually("what lies below the log start is deleted", || {
        segments(&server.bucket()).iter().all(|object| range(object).1 > start).then_some(())
    });
    let rest: String = text.split_inclusive('\n').skip(usize::try_from(start).expect("positive")).collect();
    reads(&cli, "t", "earliest", &rest);
}

/// The object store serves reads and accepts no object. Each upload retries for 20 s. Regression: with four workers and this number of
/// partitions, retention ran once in three minutes.
#[test]
fn retention_continues_while_uploads_fail() {
    const PARTITIONS: u32 = 40;
    let (server, home, _broker) = start(|home| home.setting("tier.check_interval", "\"1s\""));
    let cli = home.cli();
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
        eventually("retention has moved the log start", || (mark(&cli, topic, "log_start") > 30_000).then_some(()));
    }
    assert_eq!(mark(&cli, "waits", "tiered_end"), 0, "what retention takes away is not in the bucket");
    server.faults().clear();
    for number in 0..PARTITIONS as usize {
        eventually("all is in the bucket", || {
            let topic = cli.ok(&["topic", "describe", "uploads", "--output", "json"]).json();
            (topic["partitions"][number]["tiered_end"] == 1).then_some(())
        });
    }
}

/// Returns an append of one record that waits for the object store.
fn tiered(timeout_ms: u32) -> v1::AppendRequest {
    let append = wire::append_plain("t", 0, vec![Bytes::from_static(b"x")]);
    v1::AppendRequest { acks: Acks::Tiered.into(), timeout_ms, ..append }
}

/// Regression: after `mv bucket away`, as when a disk is unmounted, the folder was created again without its cluster marker. `acks=tiered`
/// then reported records as tiered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_record_counts_as_tiered_in_a_missing_folder() {
    let mut home = Home::new();
    let _broker = tokio::task::block_in_place(|| home.start());
    let config = [("segment.ms", "200"), ("remote.storage.enable", "true")];
    wire::create_topic(home.grpc(), "t", 1, &config).await;
    let mut log = wire::log(home.grpc());
    wire::append(&mut log, tiered(30_000)).await.expect("the bucket is there");
    let away = home.path().join("away");
    std::fs::rename(home.bucket(), &away).expect("moved");
    let fault = wire::append(&mut log, tiered(3_000)).await.expect_err("there is no bucket");
    assert_eq!(fault.code, ErrorCode::Timeout, "{fault}");
    assert!(!home.bucket().exists(), "no new bucket is made in its place");
    wire::append(&mut log, wire::append_plain("t", 0, vec![Bytes::from_static(b"y")]))
        .await
        .expect("without the bucket");
    let said = home.log();
    assert!(said.contains("cluster.json is not there"), "the log names it: {said}");
    std::fs::rename(&away, home.bucket()).expect("moved back");
    let appended = wire::append(&mut log, tiered(30_000)).await.expect("it is back");
    assert_eq!((appended.base_offset, appended.durability()), (3, strandline::proto::v1::Durability::Tiered));
}

/// Regression: at a restart, an empty folder was claimed as a new object store, and the tiered records in the metadata counted as corrupt.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn empty_object_store_at_a_restart_is_not_claimed() {
    let mut home = Home::new();
    let broker = tokio::task::block_in_place(|| home.start());
    let cli = home.cli();
    let text = lines(2_000);
    tokio::task::block_in_place(|| {
        create(&cli, "t", EAGER);
        cli.ok_with(&["produce", "t"], text.as_bytes());
        settled(&cli, "t", 2_000);
        assert!(broker.terminate().success(), "{}", home.log());
    });
    let away = home.path().join("away");
    std::fs::rename(home.bucket(), &away).expect("moved");
    std::fs::create_dir(home.bucket()).expect("where the other one was mounted");
    let _broker = tokio::task::block_in_place(|| home.start());
    let mut log = wire::log(home.grpc());
    let fault = wire::append(&mut log, tiered(2_000)).await.expect_err("there is no bucket");
    assert_eq!(fault.code, ErrorCode::Timeout, "{fault}");
    assert!(files(&home.bucket(), "").is_empty(), "nothing is written there");
    let said = home.log();
    assert!(said.contains("cluster.json is not there"), "the log names it: {said}");
    let told = "broker 1 cannot upload or trim: 1 partition, t/0 for ";
    tokio::task::block_in_place(|| {
        eventually("the description names it", || cli.ok(&["cluster", "describe"]).text().contains(told).then_some(()));
    });
    let read = tokio::task::block_in_place(|| {
        cli.run(&["consume", "t", "--from", "earliest", "--until-end", "--timeout", "2"])
    });
    assert!(read.code == 1 && read.stdout.is_empty() && read.stderr.contains("cluster.json"), "{read:?}");
    std::fs::remove_dir(home.bucket()).expect("empty");
    std::fs::rename(&away, home.bucket()).expect("mounted again");
    wire::append(&mut log, tiered(30_000)).await.expect("it is back");
    tokio::task::block_in_place(|| {
        reads(&cli, "t", "earliest", &format!("{text}x\nx\n"));
        eventually("it works again", || (!cli.ok(&["cluster", "describe"]).text().contains(told)).then_some(()));
    });
}
