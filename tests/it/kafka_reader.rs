//! Runs Kafka's own reader on whole data directories of a real broker. Every segment, sealed or active and in every
//! codec, is a valid Kafka segment, and nothing follows its last batch. This holds after a clean stop, and after a kill
//! and the recovery.
//!
//! The test needs a JDK and Kafka's jars, and a second for each segment, so only `make kafka-reader` runs it.
//! `KAFKA_DUMP` is the path of a script: it takes segment files, prints the output of DumpLogSegments, and fails if
//! DumpLogSegments reports an error.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use bytes::Bytes;
use strandline::{
    client::{Client, ClientOptions, Delivery, NewRecord, Producer, ProducerOptions},
    model::Compression,
    record::Header,
    task::Tasks,
};

use crate::{broker::BrokerInstance, crash, wire};

/// Topics and their configuration: both durabilities, both timestamp types, and batches that the broker recompresses.
const TOPICS: [(&str, &[(&str, &str)]); 3] = [
    ("synced", &[]),
    ("cached", &[("durability", "replicated"), ("message.timestamp.type", "LogAppendTime")]),
    ("squeezed", &[("compression.type", "gzip")]),
];
const PARTITIONS: u32 = 2;
/// Value of `segment.bytes`, above the size of most batches and below the size of the large ones. So some segments have
/// many batches and some have one.
const SEGMENT_BYTES: &str = "100000";
const BIG_BYTES: u64 = 300_000;
const CODECS: [Compression; 5] =
    [Compression::None, Compression::Gzip, Compression::Snappy, Compression::Lz4, Compression::Zstd];
/// Number of records of each codec in each topic.
const RECORDS: u64 = 300;

/// Queues a record whose shape depends on its number. Shapes are null keys and values, duplicate headers, text, random
/// bytes, and one large record for each codec in each topic.
async fn send(producer: &Producer, topic: &str, number: u64, big: &[u8]) -> Delivery {
    let header =
        |value: Option<&'static [u8]>| Header { key: "trace".to_owned(), value: value.map(Bytes::from_static) };
    let headers = [header(None), header(Some(b"\x00\xff"))];
    let (key, noise) = (format!("key {number}"), crash::value(number));
    let text = "again and ".repeat(usize::try_from(number % 150).expect("small"));
    let record = match number % 5 {
        _ if number % RECORDS == 7 => NewRecord::value(big),
        0 => NewRecord::null(),
        1 | 2 => NewRecord::value(&noise),
        _ => NewRecord::value(text.as_bytes()),
    };
    let record = if number.is_multiple_of(3) { record } else { record.key(key.as_bytes()) };
    let record = if number.is_multiple_of(4) { record.headers(&headers) } else { record };
    producer.send(topic, record).await.expect("the record is queued")
}

/// Sends [`RECORDS`] records in one codec to each topic. Every record must be acknowledged, also if the broker is
/// killed and started again during the call.
async fn produce(client: Client, codec: Compression) {
    // The linger is long enough for batches of many records.
    let linger = Duration::from_millis(5);
    let options = ProducerOptions { compression: codec, linger, ..ProducerOptions::default() };
    let producer = client.producer(options).await.expect("an idempotent producer");
    let big: Bytes = (0..BIG_BYTES / 8).flat_map(|at| (at << 20).to_be_bytes()).collect();
    for (topic, _) in TOPICS {
        let mut deliveries = Vec::new();
        for number in 0..RECORDS {
            deliveries.push(send(&producer, topic, number, &big).await);
        }
        for delivery in deliveries {
            delivery.await.expect("acknowledged");
        }
    }
    producer.close().await.expect("every record is delivered");
}

/// Returns the end offsets of all partitions, sorted, as the broker reports them.
async fn ends(instance: &BrokerInstance) -> Vec<i64> {
    let mut log = wire::log(instance.grpc());
    let mut ends = Vec::new();
    for (topic, _) in TOPICS {
        for partition in 0..PARTITIONS {
            let partition = i32::try_from(partition).expect("few partitions");
            ends.push(wire::latest(&mut log, topic, partition).await.expect("the end offset is present"));
        }
    }
    ends.sort_unstable();
    ends
}

/// One batch in the output of Kafka's reader.
#[derive(Debug)]
struct Batch {
    base: i64,
    last: i64,
    count: i64,
    position: u64,
    size: u64,
    codec: String,
}

impl Batch {
    /// Parses a line about a batch in the output of Kafka's reader. Panics if the reader calls the batch invalid.
    fn parse(line: &str) -> Self {
        let words: Vec<&str> = line.split_whitespace().collect();
        let field = |name: &str| {
            let at = words.iter().position(|word| *word == name).unwrap_or_else(|| panic!("no {name} in {line:?}"));
            words[at + 1]
        };
        let number = |name: &str| -> i64 { field(name).parse().unwrap_or_else(|_| panic!("{name} in {line:?}")) };
        assert_eq!(field("isvalid:"), "true", "{line}");
        assert_eq!(field("magic:"), "2", "{line}");
        Self {
            base: number("baseOffset:"),
            last: number("lastOffset:"),
            count: number("count:"),
            position: number("position:").unsigned_abs(),
            size: number("size:").unsigned_abs(),
            codec: field("compresscodec:").to_owned(),
        }
    }
}

/// Returns the segments below a folder, by the folder of their partition. The segments of a partition are sorted by
/// name, and so by base offset.
fn segments(folder: &Path) -> BTreeMap<PathBuf, Vec<PathBuf>> {
    let mut found: BTreeMap<PathBuf, Vec<PathBuf>> = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("the folder exists") {
            let path = entry.expect("the folder is readable").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "log") {
                found.entry(folder.clone()).or_default().push(path);
            }
        }
    }
    found.values_mut().for_each(|segments| segments.sort());
    found
}

/// Runs Kafka's reader on these files, which it must accept, and returns its output.
fn dump(files: &[PathBuf]) -> String {
    let script = std::env::var("KAFKA_DUMP").expect("KAFKA_DUMP is the path of the script");
    let output = Command::new(script).args(files).output().expect("the script starts");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let summary: String = text.lines().filter(|line| line.len() < 500).collect::<Vec<_>>().join("\n");
    assert!(output.status.success(), "{summary}\n{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// Checks all segments of a data directory with Kafka's reader. Adds the codecs and record shapes in its output to
/// `seen`. Returns the end offsets of the partitions according to that output, sorted.
fn check(instance: &BrokerInstance, seen: &mut BTreeSet<String>) -> Vec<i64> {
    let (mut ends, mut files, mut batches) = (Vec::new(), 0, 0);
    for (folder, segments) in segments(&instance.data_dir()) {
        assert!(segments.len() > 1, "{}: sealed segments and an active one", folder.display());
        let mut end = 0;
        for segment in segments {
            let text = dump(std::slice::from_ref(&segment));
            let records = text.lines().filter(|line| line.starts_with("| offset: ")).count();
            let found: Vec<Batch> =
                text.lines().filter(|line| line.starts_with("baseOffset: ")).map(Batch::parse).collect();
            let base = segment.file_stem().expect("a name").to_string_lossy().parse::<i64>().expect("the base offset");
            assert_eq!(base, end, "{} continues the previous segment", segment.display());
            let mut position = 0;
            for batch in &found {
                assert_eq!((batch.base, batch.position), (end, position), "{}: {batch:?}", segment.display());
                assert_eq!(batch.count, batch.last - batch.base + 1, "{}: {batch:?}", segment.display());
                (end, position) = (batch.last + 1, position + batch.size);
                seen.insert(batch.codec.clone());
            }
            let bytes = std::fs::metadata(&segment).expect("the file exists").len();
            assert_eq!(position, bytes, "{}: nothing follows the last batch", segment.display());
            assert_eq!(
                i64::try_from(records).expect("the number is small"),
                end - base,
                "{}: every record",
                segment.display()
            );
            for shape in ["keySize: -1 ", "valueSize: -1 ", "headerKeys: [trace,trace]"] {
                seen.extend(text.contains(shape).then(|| shape.to_owned()));
            }
            (files, batches) = (files + 1, batches + found.len());
        }
        ends.push(end);
    }
    ends.sort_unstable();
    let records: i64 = ends.iter().sum();
    println!("kafka's reader: {files} segments of {} partitions, {batches} batches, {records} records", ends.len());
    ends
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a JDK and Kafka's jars: make kafka-reader KAFKA_DUMP=script"]
async fn kafkas_own_reader_accepts_a_data_directory() {
    let mut instance = BrokerInstance::new();
    let broker = tokio::task::block_in_place(|| instance.start());
    for (topic, config) in TOPICS {
        let config: Vec<_> = config.iter().copied().chain([("segment.bytes", SEGMENT_BYTES)]).collect();
        wire::create_topic(instance.grpc(), topic, PARTITIONS, &config).await;
    }
    let client =
        Client::connect(&instance.grpc().to_string(), ClientOptions::default()).await.expect("the broker is running");
    for codec in CODECS {
        produce(client.clone(), codec).await;
    }
    let ends_before = ends(&instance).await;
    let sent = i64::try_from(RECORDS).expect("the number is small") * 15;
    assert_eq!(ends_before.iter().sum::<i64>(), sent, "five codecs, three topics");
    let status = tokio::task::block_in_place(|| broker.terminate());
    assert!(status.success(), "{}", instance.log());
    let mut seen = BTreeSet::new();
    assert_eq!(tokio::task::block_in_place(|| check(&instance, &mut seen)), ends_before);
    let expected =
        ["gzip", "headerKeys: [trace,trace]", "keySize: -1 ", "lz4", "none", "snappy", "valueSize: -1 ", "zstd"];
    assert_eq!(seen.iter().map(String::as_str).collect::<Vec<_>>(), expected);

    // The broker is killed while batches of all codecs are in flight. Recovery truncates torn batches, and the
    // producers send unacknowledged batches again.
    let broker = tokio::task::block_in_place(|| instance.start());
    let tasks = Tasks::new();
    let producers: Vec<_> =
        CODECS.map(|codec| tasks.spawn("producer", produce(client.clone(), codec))).into_iter().collect();
    while ends(&instance).await.iter().sum::<i64>() < sent + 100 {
        tokio::task::yield_now().await;
    }
    tokio::task::block_in_place(|| broker.kill9());
    let broker = tokio::task::block_in_place(|| instance.start());
    for producer in producers {
        producer.await.expect("every record was acknowledged");
    }
    let ends_before = ends(&instance).await;
    assert_eq!(ends_before.iter().sum::<i64>(), 2 * sent, "no record is lost or duplicated");
    assert!(tokio::task::block_in_place(|| broker.terminate()).success(), "{}", instance.log());
    assert_eq!(tokio::task::block_in_place(|| check(&instance, &mut seen)), ends_before);
}
