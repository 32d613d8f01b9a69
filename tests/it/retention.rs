//! Retention of a log that is not uploaded: the newest data stays, the disk is given back, and neither a kill nor a restart
//! changes what can be read.

use std::{path::Path, time::Duration};

use bytes::Bytes;
use strandline::{
    model::Compression,
    proto::{
        fault::{Fault, Reason},
        v1::{
            Acks, AlterTopicRequest, AppendRequest, AppendResponse, PlainRecords, Record, append_request::Payload,
            log_client::LogClient,
        },
    },
    record::BatchBuilder,
    task::clock,
};
use tonic::transport::Channel;

use crate::{
    broker::{Broker, Cli, Home},
    damage::{files, lines, partition},
    s3::S3,
    test_timeout::eventually,
    wire,
};

const LIMIT: u64 = 300_000;

/// What a segment of 64 KiB and the batch that did not fit into it may add.
const SLACK: u64 = 140_000;

fn on_disk(home: &Home) -> u64 {
    let size = |path: &Path| std::fs::metadata(path).map_or(0, |metadata| metadata.len());
    files(&home.data_dir(), ".log").iter().map(|path| size(path)).sum()
}

fn given_back(home: &Home) {
    let cli = home.cli();
    eventually("the disk is given back", || {
        let state = partition(&cli, "t");
        (on_disk(home) < LIMIT + SLACK && state["local_start"] == state["log_start"]).then_some(())
    });
}

/// Everything that can be read is the end of `text`, and as much as the limit says; the disk holds no more than that.
fn keeps_the_newest(home: &Home, text: &str) -> u64 {
    let cli = home.cli();
    let (state, read) = eventually("nothing moves", || {
        let before = partition(&cli, "t");
        let read = cli.ok(&["consume", "t", "--from", "earliest", "--until-end"]).text();
        (partition(&cli, "t") == before).then_some((before, read))
    });
    assert!(text.ends_with(&read), "{} bytes are not the end of what was produced", read.len());
    let bytes = on_disk(home);
    assert!(bytes >= LIMIT, "{bytes} bytes are left of at least {LIMIT}: {state}");
    let count = read.lines().count() as u64;
    assert_eq!(state["log_end"].as_u64().expect("a number") - state["log_start"].as_u64().expect("a number"), count);
    assert_eq!((&state["tiered_end"], &state["local_start"]), (&0.into(), &state["log_start"]), "{state}");
    state["log_start"].as_u64().expect("a number")
}

fn runs(mut home: Home) {
    let broker = home.start();
    let cli = home.cli();
    let create = ["topic", "create", "t", "--config", "segment.bytes=65536", "--config", "retention.ms=-1"];
    cli.ok(&[&create[..], &["--config", "remote.storage.enable=false"]].concat());
    let text = lines(40_000);
    cli.ok_with(&["produce", "t"], text.as_bytes());
    let before = on_disk(&home);
    assert!(before > 3 * LIMIT, "{before} bytes were written");
    cli.ok(&["topic", "alter", "t", "--config", &format!("retention.bytes={LIMIT}")]);
    given_back(&home);
    let start = keeps_the_newest(&home, &text);
    assert!(start > 0);

    let restarts: [fn(Broker); 2] = [Broker::kill9, |broker| assert!(broker.terminate().success())];
    let mut broker = broker;
    for end in restarts {
        end(broker);
        broker = home.start();
        assert_eq!(keeps_the_newest(&home, &text), start, "a restart changes nothing");
    }
    // Segments are sealed, and looked at, one after the other: each lets the oldest go and no more.
    let more = lines(52_000);
    home.cli().ok_with(&["produce", "t"], &more.as_bytes()[text.len()..]);
    given_back(&home);
    assert!(keeps_the_newest(&home, &more) > start);
    drop(broker);
}

#[test]
fn a_topic_that_is_not_uploaded_keeps_its_limit_and_gives_the_disk_back() {
    runs(Home::new());
}

#[test]
fn a_broker_without_an_object_store_keeps_the_limit_and_gives_the_disk_back() {
    runs(Home::new().without_object_store());
}

/// What no checkpoint knows of a segment is taken from its file: neither the restart nor the records' time counts.
#[test]
fn local_copy_is_as_old_as_its_file_after_a_kill() {
    const DAY: Duration = Duration::from_secs(86_400);
    let mut home = Home::new();
    let broker = home.start();
    let cli = home.cli();
    let config = ["segment.bytes=65536", "retention.ms=-1", "local.retention.ms=86400000"];
    cli.ok(&[&["topic", "create", "t"][..], &config.map(|set| ["--config", set]).concat()].concat());
    cli.ok_with(&["produce", "t"], lines(20_000).as_bytes());
    let tiered = eventually("segments are in the bucket", || {
        let tiered = partition(&cli, "t")["tiered_end"].as_u64()?;
        (tiered > 0).then_some(tiered)
    });
    assert_eq!(partition(&cli, "t")["local_start"], 0);
    broker.kill9();
    for path in files(&home.data_dir(), ".log") {
        let file = std::fs::File::options().write(true).open(path).expect("a segment");
        let modified = file.metadata().and_then(|metadata| metadata.modified()).expect("a time");
        file.set_modified(modified - 2 * DAY).expect("the time is set");
    }
    let _broker = home.start();
    let cli = home.cli();
    eventually("the disk is given back", || (partition(&cli, "t")["local_start"].as_u64()? >= tiered).then_some(()));
}

/// A timestamp that a clock never shows.
const FUTURE: i64 = 1 << 62;

fn build(timestamps: &[i64], codec: Compression) -> Bytes {
    let mut builder = BatchBuilder::new(codec);
    timestamps.iter().for_each(|ms| builder.push(*ms, None, Some(b"v"), &[]).expect("it fits"));
    builder.finish(None).expect("a batch").to_bytes()
}

/// The batch with another largest timestamp in its header.
fn with_max(batch: Bytes, timestamp_ms: i64) -> Bytes {
    let mut batch = Vec::from(batch);
    batch[35..43].copy_from_slice(&timestamp_ms.to_be_bytes());
    wire::renew_crc(&mut batch);
    batch.into()
}

/// Appends records with these timestamps to topic `t`, as they are or in a batch.
async fn append_at(
    log: &mut LogClient<Channel>,
    timestamps: &[i64],
    codec: Option<Compression>,
) -> Result<AppendResponse, Fault> {
    let payload = match codec {
        None => Payload::Records(PlainRecords {
            records: timestamps.iter().map(|ms| Record { timestamp_ms: Some(*ms), ..Record::default() }).collect(),
        }),
        Some(codec) => Payload::Batch(build(timestamps, codec)),
    };
    append_payload(log, payload).await
}

async fn append_payload(log: &mut LogClient<Channel>, payload: Payload) -> Result<AppendResponse, Fault> {
    let (topic, acks) = ("t".to_owned(), Acks::All.into());
    wire::append(log, AppendRequest { topic, acks, payload: Some(payload), ..Default::default() }).await
}

async fn alter(home: &Home, key: &str, value: &str) {
    let set = [(key.to_owned(), value.to_owned())].into();
    let request = AlterTopicRequest { name: "t".to_owned(), set, ..Default::default() };
    wire::admin(home.grpc()).alter_topic(request).await.expect("altered");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn timestamps_beyond_the_topics_limits_are_refused_in_every_form() {
    let mut home = Home::new();
    let _broker = tokio::task::block_in_place(|| home.start());
    wire::create_topic(home.grpc(), "t", 1, &[("message.timestamp.before.max.ms", "86400000")]).await;
    let mut log = wire::log(home.grpc());
    let now = clock::wall_ms();
    let forms = [None, Some(Compression::None), Some(Compression::Gzip)];
    for form in forms {
        for (wrong, setting, limit) in [
            (FUTURE, "message.timestamp.after.max.ms", "3600000"),
            (now + 3_700_000, "message.timestamp.after.max.ms", "3600000"),
            (now - 90_000_000, "message.timestamp.before.max.ms", "86400000"),
        ] {
            let fault = append_at(&mut log, &[wrong, now], form).await.expect_err("out of bounds");
            assert_eq!((fault.reason, fault.retryable), (Reason::InvalidTimestamp, false), "{fault:?}");
            let details = ["timestamp", "setting", "max"].map(|name| fault.metadata[name].clone());
            assert_eq!(details, [wrong.to_string(), setting.to_owned(), limit.to_owned()], "{form:?}");
            assert!(details.iter().all(|detail| fault.message.contains(detail)), "{fault}");
        }
    }
    // A header that hides what the first record says.
    for codec in [Compression::None, Compression::Gzip] {
        let batch = with_max(build(&[FUTURE], codec), now);
        let fault = append_payload(&mut log, Payload::Batch(batch)).await.expect_err("out of bounds");
        assert_eq!(fault.reason, Reason::InvalidTimestamp);
    }
    assert_eq!(wire::latest(&mut log, "t", 0).await.expect("known"), 0, "nothing was stored");

    // Without a timestamp, and within the limits.
    for form in forms {
        append_at(&mut log, &[-1, now, now + 3_500_000, now - 80_000_000], form).await.expect("stored");
    }
    for (key, value) in [("message.timestamp.after.max.ms", "-1"), ("message.timestamp.before.max.ms", "-1")] {
        alter(&home, key, value).await;
    }
    append_at(&mut log, &[FUTURE, 0], None).await.expect("stored");
    for (key, value) in [("message.timestamp.after.max.ms", "0"), ("message.timestamp.type", "LogAppendTime")] {
        alter(&home, key, value).await;
    }
    append_at(&mut log, &[FUTURE], None).await.expect("the broker sets the timestamp");
}

/// Of a compressed batch that is stored as it came only the header counts; one that is opened anyway is checked whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn compressed_batch_cannot_move_the_partitions_time_past_the_limit() {
    let mut home = Home::new();
    let _broker = tokio::task::block_in_place(|| home.start());
    wire::create_topic(home.grpc(), "t", 1, &[]).await;
    let mut log = wire::log(home.grpc());
    let now = clock::wall_ms();
    let batch = with_max(build(&[now, FUTURE], Compression::Gzip), now);
    append_payload(&mut log, Payload::Batch(batch.clone())).await.expect("the header is within the limits");
    let segment = files(&home.data_dir(), ".log").remove(0);
    let found = home.cli().ok(&["segment", "dump", segment.to_str().expect("a path"), "--output", "json"]);
    let found: serde_json::Value = serde_json::from_str(found.text().lines().next().expect("a line")).expect("JSON");
    assert_eq!(found["max_timestamp"], now, "{found}");
    alter(&home, "compression.type", "zstd").await;
    let fault = append_payload(&mut log, Payload::Batch(batch)).await.expect_err("the broker opens it");
    assert_eq!(fault.reason, Reason::InvalidTimestamp);
    assert_eq!(fault.metadata["timestamp"], FUTURE.to_string());
}

/// An upload that was begun before a limit was passed was tried again and again, and the partition was not looked at meanwhile. Where the
/// bucket held something, the log start waited for the manifest.
#[test]
fn bucket_that_is_away_keeps_nothing_that_nobody_may_read() {
    retention_goes_on_without_the_bucket(false);
}

/// The broker did not know which segments the bucket had, and deleted nothing until the bucket was back.
#[test]
fn bucket_that_is_away_at_a_start_keeps_nothing_that_nobody_may_read() {
    retention_goes_on_without_the_bucket(true);
}

fn retention_goes_on_without_the_bucket(after_a_start: bool) {
    let server = S3::begin();
    let mut home = Home::new().object_store(&server);
    let mut broker = home.start();
    let cli = home.cli();
    let limit = format!("retention.bytes={LIMIT}");
    let create = ["topic", "create", "t", "--config", "segment.bytes=65536", "--config", "retention.ms=-1"];
    cli.ok(&[&create[..], &["--config", &limit]].concat());
    let mut text = lines(5_000);
    cli.ok_with(&["produce", "t"], text.as_bytes());
    let mark = |name: &str| partition(&cli, "t")[name].as_i64().expect("a number");
    eventually("segments are in the bucket", || (mark("tiered_end") > 0).then_some(()));
    assert_eq!(mark("log_start"), 0);
    server.faults().set_down(true);
    if after_a_start {
        broker.kill9();
        broker = home.start();
    }
    let more = lines(45_000);
    cli.ok_with(&["produce", "t"], &more.as_bytes()[text.len()..]);
    text = more;
    given_back(&home);
    let tiered = mark("tiered_end");
    assert!(mark("log_start") > tiered, "retention waits for no upload");
    server.faults().set_down(false);
    eventually("uploads go on", || (mark("tiered_end") > mark("log_start")).then_some(()));
    let (from, read) = eventually("nothing moves", || {
        let start = mark("log_start");
        let read = cli.ok(&["consume", "t", "--from", "earliest", "--until-end"]).text();
        (mark("log_start") == start).then_some((start, read))
    });
    assert!(text.ends_with(&read) && i64::try_from(read.lines().count()) == Ok(mark("log_end") - from));
    drop(broker);
}

/// One record of the far future kept itself and all that followed, on the disk and in the bucket.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn record_from_the_future_does_not_stop_retention() {
    records_from_the_future_expire(|_, _| {}).await;
}

/// The segment's object tells when it was made where the manifest does not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn record_from_the_future_expires_by_the_time_of_its_object_alone() {
    records_from_the_future_expire(|home, broker| {
        assert!(broker.take().expect("it runs").terminate().success());
        let manifests = files(&home.bucket(), "")
            .into_iter()
            .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("manifest-")));
        let forgotten: usize = manifests.map(|manifest| forget_creation(&manifest, &[FUTURE, i64::MAX])).sum();
        assert!(forgotten > 0, "a manifest lists them");
        *broker = Some(home.start());
    })
    .await;
}

/// Sets `created at` to 0 in the lines of segments with these largest timestamps, which stand before it; how many there are.
fn forget_creation(manifest: &Path, largest: &[i64]) -> usize {
    let mut bytes = std::fs::read(manifest).expect("the manifest");
    let mut forgotten = 0;
    for timestamp_ms in largest {
        let timestamp = timestamp_ms.to_be_bytes();
        let places: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at..].starts_with(&timestamp)).collect();
        for place in places {
            bytes[place + 8..place + 16].fill(0);
            forgotten += 1;
        }
    }
    let content = bytes.len() - 4;
    let crc = crc32c::crc32c(&bytes[..content]);
    bytes[content..].copy_from_slice(&crc.to_be_bytes());
    std::fs::write(manifest, bytes).expect("the manifest is replaced");
    forgotten
}

/// Stores records of the far future around one of now and has them expire from the disk. Then `meanwhile` happens, and they expire from
/// the bucket.
async fn records_from_the_future_expire(meanwhile: impl FnOnce(&mut Home, &mut Option<Broker>)) {
    let mut home = Home::new();
    let mut broker = Some(tokio::task::block_in_place(|| home.start()));
    let config = [("message.timestamp.after.max.ms", "-1"), ("retention.ms", "-1"), ("segment.ms", "200")];
    wire::create_topic(home.grpc(), "t", 1, &config).await;
    let mut log = wire::log(home.grpc());
    for timestamp_ms in [FUTURE, clock::wall_ms(), i64::MAX] {
        append_at(&mut log, &[timestamp_ms], None).await.expect("stored");
    }
    let settled = |cli: &Cli, name: &str| {
        let what = format!("{name} reaches the end");
        tokio::task::block_in_place(|| eventually(&what, || (partition(cli, "t")[name] == 3).then_some(())));
    };
    let cli = home.cli();
    settled(&cli, "tiered_end");
    assert_eq!(partition(&cli, "t")["local_start"], 0);
    tokio::task::block_in_place(|| {
        eventually("the metric counts them", || {
            (home.metric("strandline_segments_with_future_timestamps") >= 1.0).then_some(())
        });
        let text = cli.ok(&["cluster", "describe"]).text();
        assert!(text.contains("broker 1 holds timestamps in the future: ") && text.contains("most in t/0"), "{text}");
    });
    alter(&home, "local.retention.ms", "1").await;
    settled(&cli, "local_start");
    assert_eq!(partition(&cli, "t")["log_start"], 0);
    // The bucket alone has them now.
    tokio::task::block_in_place(|| meanwhile(&mut home, &mut broker));
    alter(&home, "retention.ms", "1").await;
    settled(&home.cli(), "log_start");
}
