//! Retention by size, also without uploads, retention by time, and the limits of timestamps. The newest records are
//! kept, disk space is freed, and neither a kill nor a restart changes the readable records.

use std::{path::Path, time::Duration};

use bytes::Bytes;
use strandline::{
    model::Compression,
    proto::{
        error::{ApiError, ErrorCode},
        v1::{
            Acks, AlterTopicRequest, AppendRequest, AppendResponse, Record, RecordList, append_request::Payload,
            log_client::LogClient,
        },
    },
    record::BatchBuilder,
    task::clock,
};
use tonic::transport::Channel;

use crate::{
    broker::{Broker, BrokerInstance, Cli},
    corruption::{files, lines, partition},
    s3::S3,
    test_timeout::eventually,
    wire,
};

/// Value of `retention.bytes`.
const LIMIT: u64 = 300_000;

/// Maximum excess over `retention.bytes`: a segment of 64 KiB, and a batch that did not fit into it.
const SLACK: u64 = 140_000;

fn segment_bytes(instance: &BrokerInstance) -> u64 {
    let size = |path: &Path| std::fs::metadata(path).map_or(0, |metadata| metadata.len());
    files(&instance.data_dir(), ".log").iter().map(|path| size(path)).sum()
}

/// Waits until the log on disk has no more than [`LIMIT`] and [`SLACK`] bytes, and the local start is the log start.
fn wait_until_freed(instance: &BrokerInstance) {
    let cli = instance.cli();
    eventually("disk space is free again", || {
        let state = partition(&cli, "t");
        (segment_bytes(instance) < LIMIT + SLACK && state["local_start"] == state["log_start"]).then_some(())
    });
}

/// Checks that the readable records are the last lines of `text`, and that all of them are on disk. At least [`LIMIT`]
/// bytes must be on disk. Returns the log start.
fn check_newest_records(instance: &BrokerInstance, text: &str) -> u64 {
    let cli = instance.cli();
    let (state, read) = eventually("the log start and the end no longer move", || {
        let before = partition(&cli, "t");
        let read = cli.ok(&["consume", "t", "--from", "earliest", "--until-end"]).text();
        (partition(&cli, "t") == before).then_some((before, read))
    });
    assert!(text.ends_with(&read), "{} bytes are not the end of the produced records", read.len());
    let bytes = segment_bytes(instance);
    assert!(bytes >= LIMIT, "{bytes} bytes are left, at least {LIMIT} expected: {state}");
    let count = read.lines().count() as u64;
    assert_eq!(state["log_end"].as_u64().expect("a number") - state["log_start"].as_u64().expect("a number"), count);
    assert_eq!((&state["tiered_end"], &state["local_start"]), (&0.into(), &state["log_start"]), "{state}");
    state["log_start"].as_u64().expect("a number")
}

/// Checks for a topic without uploads that a lowered `retention.bytes` deletes the oldest segments, across a kill and a
/// clean restart.
fn check_retention(mut instance: BrokerInstance) {
    let broker = instance.start();
    let cli = instance.cli();
    let create = ["topic", "create", "t", "--config", "segment.bytes=65536", "--config", "retention.ms=-1"];
    cli.ok(&[&create[..], &["--config", "remote.storage.enable=false"]].concat());
    let text = lines(40_000);
    cli.ok_with(&["produce", "t"], text.as_bytes());
    let before = segment_bytes(&instance);
    assert!(before > 3 * LIMIT, "{before} bytes were written");
    cli.ok(&["topic", "alter", "t", "--config", &format!("retention.bytes={LIMIT}")]);
    wait_until_freed(&instance);
    let start = check_newest_records(&instance, &text);
    assert!(start > 0);

    let restarts: [fn(Broker); 2] = [Broker::kill9, |broker| assert!(broker.terminate().success())];
    let mut broker = broker;
    for end in restarts {
        end(broker);
        broker = instance.start();
        assert_eq!(check_newest_records(&instance, &text), start, "a restart changes nothing");
    }
    // Retention also continues for later records: the oldest segments are deleted as new ones are sealed.
    let more = lines(52_000);
    instance.cli().ok_with(&["produce", "t"], &more.as_bytes()[text.len()..]);
    wait_until_freed(&instance);
    assert!(check_newest_records(&instance, &more) > start);
    drop(broker);
}

#[test]
fn topic_without_uploads_keeps_its_limit_and_frees_disk() {
    check_retention(BrokerInstance::new());
}

#[test]
fn broker_without_object_store_keeps_limit_and_frees_disk() {
    check_retention(BrokerInstance::new().without_object_store());
}

/// After a kill, no checkpoint contains the age of a segment, so the age is taken from the modification time of the
/// file. Neither the time of the restart nor record timestamps determine the age.
#[test]
fn segment_is_as_old_as_its_file_after_a_kill() {
    const DAY: Duration = Duration::from_secs(86_400);
    let mut instance = BrokerInstance::new();
    let broker = instance.start();
    let cli = instance.cli();
    let config = ["segment.bytes=65536", "retention.ms=-1", "local.retention.ms=86400000"];
    cli.ok(&[&["topic", "create", "t"][..], &config.map(|set| ["--config", set]).concat()].concat());
    cli.ok_with(&["produce", "t"], lines(20_000).as_bytes());
    let tiered = eventually("segments are in the object store", || {
        let tiered = partition(&cli, "t")["tiered_end"].as_u64()?;
        (tiered > 0).then_some(tiered)
    });
    assert_eq!(partition(&cli, "t")["local_start"], 0);
    broker.kill9();
    for path in files(&instance.data_dir(), ".log") {
        let file = std::fs::File::options().write(true).open(path).expect("a segment");
        let modified = file.metadata().and_then(|metadata| metadata.modified()).expect("a time");
        file.set_modified(modified - 2 * DAY).expect("the time is set");
    }
    let _broker = instance.start();
    let cli = instance.cli();
    eventually("disk space is free again", || (partition(&cli, "t")["local_start"].as_u64()? >= tiered).then_some(()));
}

/// A timestamp in milliseconds that is millions of years in the future.
const FUTURE: i64 = 1 << 62;

fn build_batch(timestamps: &[i64], codec: Compression) -> Bytes {
    let mut builder = BatchBuilder::new(codec);
    timestamps.iter().for_each(|ms| builder.push(*ms, None, Some(b"v"), &[]).expect("the record fits"));
    builder.finish(None).expect("a batch").to_bytes()
}

/// Returns the batch with another maximum timestamp in its header.
fn with_max(batch: Bytes, timestamp_ms: i64) -> Bytes {
    let mut batch = Vec::from(batch);
    batch[35..43].copy_from_slice(&timestamp_ms.to_be_bytes());
    wire::renew_crc(&mut batch);
    batch.into()
}

/// Appends records with these timestamps to topic `t`, as a list of records or as a batch.
async fn append_at(
    log: &mut LogClient<Channel>,
    timestamps: &[i64],
    codec: Option<Compression>,
) -> Result<AppendResponse, ApiError> {
    let payload = match codec {
        None => Payload::Records(RecordList {
            records: timestamps.iter().map(|ms| Record { timestamp_ms: Some(*ms), ..Record::default() }).collect(),
        }),
        Some(codec) => Payload::Batch(build_batch(timestamps, codec)),
    };
    append_payload(log, payload).await
}

async fn append_payload(log: &mut LogClient<Channel>, payload: Payload) -> Result<AppendResponse, ApiError> {
    let (topic, acks) = ("t".to_owned(), Acks::All.into());
    wire::append(log, AppendRequest { topic, acks, payload: Some(payload), ..Default::default() }).await
}

async fn alter(instance: &BrokerInstance, key: &str, value: &str) {
    let set = [(key.to_owned(), value.to_owned())].into();
    let request = AlterTopicRequest { name: "t".to_owned(), set, ..Default::default() };
    wire::admin(instance.grpc()).alter_topic(request).await.expect("altered");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn timestamps_beyond_topic_limits_are_refused() {
    let mut instance = BrokerInstance::new();
    let _broker = tokio::task::block_in_place(|| instance.start());
    wire::create_topic(instance.grpc(), "t", 1, &[("message.timestamp.before.max.ms", "86400000")]).await;
    let mut log = wire::log(instance.grpc());
    let now = clock::wall_ms();
    let forms = [None, Some(Compression::None), Some(Compression::Gzip)];
    for form in forms {
        for (wrong, setting, limit) in [
            (FUTURE, "message.timestamp.after.max.ms", "3600000"),
            (now + 3_700_000, "message.timestamp.after.max.ms", "3600000"),
            (now - 90_000_000, "message.timestamp.before.max.ms", "86400000"),
        ] {
            let error = append_at(&mut log, &[wrong, now], form).await.expect_err("out of bounds");
            assert_eq!((error.code, error.retryable), (ErrorCode::InvalidTimestamp, false), "{error:?}");
            let details = ["timestamp", "setting", "max"].map(|name| error.metadata[name].clone());
            assert_eq!(details, [wrong.to_string(), setting.to_owned(), limit.to_owned()], "{form:?}");
            assert!(details.iter().all(|detail| error.message.contains(detail)), "{error}");
        }
    }
    // The maximum timestamp in the header is within the limits, and the timestamp of the first record is not.
    for codec in [Compression::None, Compression::Gzip] {
        let batch = with_max(build_batch(&[FUTURE], codec), now);
        let error = append_payload(&mut log, Payload::Batch(batch)).await.expect_err("out of bounds");
        assert_eq!(error.code, ErrorCode::InvalidTimestamp);
    }
    assert_eq!(wire::latest(&mut log, "t", 0).await.expect("a response"), 0, "no record was stored");

    // Records without a timestamp (-1), or with one within the limits, are accepted.
    for form in forms {
        append_at(&mut log, &[-1, now, now + 3_500_000, now - 80_000_000], form).await.expect("stored");
    }
    for (key, value) in [("message.timestamp.after.max.ms", "-1"), ("message.timestamp.before.max.ms", "-1")] {
        alter(&instance, key, value).await;
    }
    append_at(&mut log, &[FUTURE, 0], None).await.expect("stored");
    for (key, value) in [("message.timestamp.after.max.ms", "0"), ("message.timestamp.type", "LogAppendTime")] {
        alter(&instance, key, value).await;
    }
    append_at(&mut log, &[FUTURE], None).await.expect("the broker sets the timestamp");
}

/// If a compressed batch is stored unchanged, only its header and first record are checked. So a wrong timestamp of
/// another record is stored but does not count. If the broker recompresses the batch, all of its timestamps are
/// checked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn compressed_batch_cannot_exceed_the_timestamp_limit() {
    let mut instance = BrokerInstance::new();
    let _broker = tokio::task::block_in_place(|| instance.start());
    wire::create_topic(instance.grpc(), "t", 1, &[]).await;
    let mut log = wire::log(instance.grpc());
    let now = clock::wall_ms();
    let batch = with_max(build_batch(&[now, FUTURE], Compression::Gzip), now);
    append_payload(&mut log, Payload::Batch(batch.clone())).await.expect("the header is within the limits");
    let segment = files(&instance.data_dir(), ".log").remove(0);
    let found = instance.cli().ok(&["segment", "dump", segment.to_str().expect("a path"), "--output", "json"]);
    let found: serde_json::Value = serde_json::from_str(found.text().lines().next().expect("a line")).expect("JSON");
    assert_eq!(found["max_timestamp"], now, "{found}");
    alter(&instance, "compression.type", "zstd").await;
    let error = append_payload(&mut log, Payload::Batch(batch)).await.expect_err("the broker decompresses the batch");
    assert_eq!(error.code, ErrorCode::InvalidTimestamp);
    assert_eq!(error.metadata["timestamp"], FUTURE.to_string());
}

/// Regression: while an upload was retried during an outage, the retention of its partition was not checked. If the
/// object store contained segments of the partition, the log start also waited for the manifest.
#[test]
fn retention_continues_during_an_object_store_outage() {
    check_retention_without_object_store(false);
}

/// Regression: after a start during an outage, the broker could not read which segments the object store has. The
/// broker deleted nothing until the store was available again.
#[test]
fn retention_continues_after_a_start_during_an_outage() {
    check_retention_without_object_store(true);
}

/// Checks that retention deletes records which are not uploaded during an outage of the object store, and that uploads
/// continue afterwards. With `after_a_start`, the broker is killed and started during the outage.
fn check_retention_without_object_store(after_a_start: bool) {
    let server = S3::begin();
    let mut instance = BrokerInstance::new().object_store(&server);
    let mut broker = instance.start();
    let cli = instance.cli();
    let limit = format!("retention.bytes={LIMIT}");
    let create = ["topic", "create", "t", "--config", "segment.bytes=65536", "--config", "retention.ms=-1"];
    cli.ok(&[&create[..], &["--config", &limit]].concat());
    let mut text = lines(5_000);
    cli.ok_with(&["produce", "t"], text.as_bytes());
    let mark = |name: &str| partition(&cli, "t")[name].as_i64().expect("a number");
    eventually("segments are in the object store", || (mark("tiered_end") > 0).then_some(()));
    assert_eq!(mark("log_start"), 0);
    server.faults().set_down(true);
    if after_a_start {
        broker.kill9();
        broker = instance.start();
    }
    let more = lines(45_000);
    cli.ok_with(&["produce", "t"], &more.as_bytes()[text.len()..]);
    text = more;
    wait_until_freed(&instance);
    let tiered = mark("tiered_end");
    assert!(mark("log_start") > tiered, "retention does not wait for uploads");
    server.faults().set_down(false);
    eventually("uploads continue", || (mark("tiered_end") > mark("log_start")).then_some(()));
    let (from, read) = eventually("the log start and the end no longer move", || {
        let start = mark("log_start");
        let read = cli.ok(&["consume", "t", "--from", "earliest", "--until-end"]).text();
        (mark("log_start") == start).then_some((start, read))
    });
    assert!(text.ends_with(&read) && i64::try_from(read.lines().count()) == Ok(mark("log_end") - from));
    drop(broker);
}

/// Regression: one record had a timestamp in the far future. This record prevented the deletion of its segment and of
/// all later segments, on disk and in the object store.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn future_timestamp_does_not_stop_retention() {
    check_future_records_expire(|_, _| {}).await;
}

/// If the manifest has no creation time for a segment, the creation time of the segment object is used.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn future_record_expires_by_creation_time_of_its_object() {
    check_future_records_expire(|instance, broker| {
        assert!(broker.take().expect("the process is running").terminate().success());
        let manifests = files(&instance.object_store_dir(), "")
            .into_iter()
            .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("manifest-")));
        let forgotten: usize = manifests.map(|manifest| forget_creation(&manifest, &[FUTURE, i64::MAX])).sum();
        assert!(forgotten > 0, "a manifest contains the segments");
        *broker = Some(instance.start());
    })
    .await;
}

/// Sets the creation time to 0 in each manifest entry of a segment with one of these maximum timestamps. In an entry,
/// the creation time follows the maximum timestamp. Returns the number of changed entries.
fn forget_creation(manifest: &Path, largest: &[i64]) -> usize {
    let mut bytes = std::fs::read(manifest).expect("the manifest");
    let mut forgotten = 0;
    for timestamp_ms in largest {
        let timestamp = timestamp_ms.to_be_bytes();
        let starts: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at..].starts_with(&timestamp)).collect();
        for start in starts {
            bytes[start + 8..start + 16].fill(0);
            forgotten += 1;
        }
    }
    let content = bytes.len() - 4;
    let crc = crc32c::crc32c(&bytes[..content]);
    bytes[content..].copy_from_slice(&crc.to_be_bytes());
    std::fs::write(manifest, bytes).expect("the manifest is replaced");
    forgotten
}

/// Stores two records with timestamps in the far future and a current one, and waits until they are evicted from the
/// disk by time. Then calls `meanwhile`, and waits until they are deleted by time.
async fn check_future_records_expire(meanwhile: impl FnOnce(&mut BrokerInstance, &mut Option<Broker>)) {
    let mut instance = BrokerInstance::new();
    let mut broker = Some(tokio::task::block_in_place(|| instance.start()));
    let config = [("message.timestamp.after.max.ms", "-1"), ("retention.ms", "-1"), ("segment.ms", "200")];
    wire::create_topic(instance.grpc(), "t", 1, &config).await;
    let mut log = wire::log(instance.grpc());
    for timestamp_ms in [FUTURE, clock::wall_ms(), i64::MAX] {
        append_at(&mut log, &[timestamp_ms], None).await.expect("stored");
    }
    let wait_for_end = |cli: &Cli, name: &str| {
        let what = format!("{name} reaches the end");
        tokio::task::block_in_place(|| eventually(&what, || (partition(cli, "t")[name] == 3).then_some(())));
    };
    let cli = instance.cli();
    wait_for_end(&cli, "tiered_end");
    assert_eq!(partition(&cli, "t")["local_start"], 0);
    tokio::task::block_in_place(|| {
        eventually("the metric counts them", || {
            (instance.metric("strandline_segments_with_future_timestamps") >= 1.0).then_some(())
        });
        let text = cli.ok(&["cluster", "describe"]).text();
        assert!(
            text.contains("broker 1 has records with future timestamps: ") && text.contains("most in t/0"),
            "{text}"
        );
    });
    alter(&instance, "local.retention.ms", "1").await;
    wait_for_end(&cli, "local_start");
    assert_eq!(partition(&cli, "t")["log_start"], 0);
    // Only the object store has the records now.
    tokio::task::block_in_place(|| meanwhile(&mut instance, &mut broker));
    alter(&instance, "retention.ms", "1").await;
    wait_for_end(&instance.cli(), "log_start");
}
