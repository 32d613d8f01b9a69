//! Invalid input on every port. Each input gets an error with the reason, and all other clients are served meanwhile.

mod connections;
mod held;
mod http;
mod memory;
mod peers;
mod target;

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    time::Duration,
};

use bytes::Bytes;
use rand::{Rng as _, RngExt as _, SeedableRng as _, rngs::StdRng};
use strandline::{
    limits,
    proto::{
        error::{ApiError, ErrorCode},
        v1::{CreateTopicRequest, FetchPartition, ReadRequest},
    },
};

use crate::{
    broker::{Broker, BrokerInstance, Cli, Output, http_get},
    wire,
};

/// Checks that the broker serves: appends one record and reads the record.
async fn check_serves(address: SocketAddr, topic: &str) {
    let mut log = wire::log(address);
    let value = Bytes::from_static(b"still here");
    let appended = wire::append(&mut log, wire::append_plain(topic, 0, vec![value.clone()]))
        .await
        .expect("the broker accepts records");
    let records = wire::read_range(&mut log, topic, 0, appended.base_offset, appended.end_offset)
        .await
        .expect("the read succeeds");
    assert_eq!(records.len(), 1);
    assert_eq!(records[0].value, Some(value));
}

async fn start_broker(topics: &[&str]) -> (BrokerInstance, Broker) {
    let mut instance = BrokerInstance::new();
    let broker = tokio::task::block_in_place(|| instance.start());
    for topic in topics {
        wire::create_topic(instance.grpc(), topic, 1, &[]).await;
    }
    (instance, broker)
}

/// Sends bytes, and reads the response until the other side closes the connection or sends nothing more.
fn send_bytes(address: SocketAddr, bytes: &[u8]) {
    let mut stream = TcpStream::connect(address).expect("the port is open");
    stream.set_read_timeout(Some(Duration::from_millis(200))).expect("a timeout can be set");
    // The broker may close the connection in the middle.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut response = [0; 4096];
    while stream.read(&mut response).is_ok_and(|read| read > 0) {}
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_bytes_on_every_port_affect_no_client() {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let (instance, mut broker) = start_broker(&["calm"]).await;
    let seed = 0x57a4_d11e;
    let mut rng = StdRng::seed_from_u64(seed);
    for address in [instance.grpc(), instance.http()] {
        for prefix in [
            &b""[..],
            PREFACE,
            b"GET / HTTP/1.1\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00",
            b"POST /strandline.v1.Log/Append",
        ] {
            for _ in 0..5 {
                let mut bytes = prefix.to_vec();
                let start = bytes.len();
                bytes.resize(start + rng.random_range(0..20_000_usize), 0);
                rng.fill_bytes(&mut bytes[start..]);
                tokio::task::block_in_place(|| send_bytes(address, &bytes));
            }
        }
        check_serves(instance.grpc(), "calm").await;
    }
    // An HTTP/2 settings frame, and a frame that announces headers of 16 MB, which never arrive.
    let promises = [PREFACE, &[0, 0, 0, 4, 0, 0, 0, 0, 0], &[0xff, 0xff, 0xff, 1, 4, 0, 0, 0, 1]].concat();
    tokio::task::block_in_place(|| send_bytes(instance.grpc(), &promises));
    // A hundred connections that send nothing.
    let silent: Vec<TcpStream> = (0..100)
        .map(|n| {
            TcpStream::connect(if n % 2 == 0 { instance.grpc() } else { instance.http() }).expect("the port is open")
        })
        .collect();
    check_serves(instance.grpc(), "calm").await;
    assert_eq!(http_get(instance.http(), "/healthz").expect("a response").0, 200);
    drop(silent);
    assert!(broker.is_running());
}

/// Each changed batch is refused as malformed, with a reason. The unchanged batch is then accepted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_batch_is_refused_and_not_stored() {
    let (instance, mut broker) = start_broker(&["batches"]).await;
    let mut log = wire::log(instance.grpc());
    let good = wire::batch(&[b"one", b"two"]);
    let changed = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        change(&mut bytes);
        bytes
    };
    let put = |at: usize, value: i32| {
        move |bytes: &mut Vec<u8>| {
            bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
            wire::renew_crc(bytes);
        }
    };
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("a wrong CRC", changed(&|bytes| bytes[17] ^= 1)),
        ("a flipped bit in a value", changed(&|bytes| *bytes.last_mut().expect("bytes") ^= 0x10)),
        ("magic 0", changed(&|bytes| bytes[16] = 0)),
        ("magic 1", changed(&|bytes| bytes[16] = 1)),
        ("magic 3", changed(&|bytes| bytes[16] = 3)),
        ("a length of zero", changed(&put(8, 0))),
        ("a negative length", changed(&put(8, -1))),
        ("the least length", changed(&put(8, i32::MIN))),
        ("the largest length", changed(&put(8, i32::MAX))),
        ("a length that is one short", changed(&put(8, i32::try_from(good.len()).expect("small") - 13))),
        ("a length that is one long", changed(&put(8, i32::try_from(good.len()).expect("small") - 11))),
        ("no records", changed(&put(57, 0))),
        ("a negative count", changed(&put(57, -1))),
        ("a count above the last delta", changed(&put(57, 3))),
        (
            "the largest count",
            changed(&|bytes| {
                put(23, i32::MAX - 1)(bytes);
                put(57, i32::MAX)(bytes);
            }),
        ),
        ("a negative last delta", changed(&put(23, -2))),
        ("a negative offset", changed(&|bytes| bytes[..8].copy_from_slice(&(-5_i64).to_be_bytes()))),
        ("an offset that overflows", changed(&|bytes| bytes[..8].copy_from_slice(&i64::MAX.to_be_bytes()))),
        ("an unknown codec", wire::raw_batch(&good[61..], 2, 7)),
        ("a control batch", wire::raw_batch(&good[61..], 2, 1 << 5)),
        ("a transaction", wire::raw_batch(&good[61..], 2, 1 << 4)),
        ("the broker's own timestamp type", wire::raw_batch(&good[61..], 2, 1 << 3)),
        ("unknown attributes", wire::raw_batch(&good[61..], 2, 1 << 9)),
        ("half a batch", good[..good.len() / 2].to_vec()),
        ("half a header", good[..30].to_vec()),
        ("one byte", vec![0]),
        ("two batches", [good.clone(), good.clone()].concat()),
        ("text", b"this is no batch at all, though it is long enough to hold the header of one".to_vec()),
    ];
    for (name, bytes) in cases {
        let error = wire::append(&mut log, wire::append_batch("batches", 0, bytes)).await.expect_err(name);
        assert_eq!(error.code, ErrorCode::MalformedBatch, "{name}: {error}");
        assert!(!error.retryable && error.message.len() > 15, "the error of {name} has a reason: {error}");
    }
    let error =
        wire::append(&mut log, wire::append_batch("batches", 0, Bytes::new())).await.expect_err("the batch is empty");
    assert!(matches!(error.code, ErrorCode::MalformedBatch | ErrorCode::InvalidRequest), "{error:?}");
    assert_eq!(wire::latest(&mut log, "batches", 0).await, Ok(0), "no record was stored");
    wire::append(&mut log, wire::append_batch("batches", 0, good)).await.expect("the valid batch is accepted");
    let records = wire::read_range(&mut log, "batches", 0, 0, 2).await.expect("the read succeeds");
    assert_eq!(records.iter().filter_map(|record| record.value.as_deref()).collect::<Vec<_>>(), [b"one", b"two"]);
    assert!(broker.is_running());
}

/// The header and the CRC are right. Only a decoder of the records finds the error. The decoder must survive the
/// records, and other topics must not be affected.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn invalid_records_behind_a_valid_header_are_survived() {
    let (instance, mut broker) = start_broker(&["plain", "calm"]).await;
    wire::create_topic(instance.grpc(), "recompressed", 1, &[("compression.type", "gzip")]).await;
    let mut log = wire::log(instance.grpc());
    let hostile_length = |length: i64| {
        let mut records = Vec::new();
        wire::varint(&mut records, length);
        records.extend_from_slice(&[0; 20]);
        wire::raw_batch(&records, 1, 0)
    };
    let cases = [
        ("a record of 2 GiB", hostile_length(i64::from(i32::MAX))),
        ("a record of a negative length", hostile_length(-1)),
        ("a length that never ends", wire::raw_batch(&[0xff; 40], 1, 0)),
        ("a million records in no bytes", wire::raw_batch(&[], 1 << 20, 0)),
        ("zstd that is none", wire::raw_batch(b"certainly no zstd frame", 1, 4)),
        ("lz4 that is none", wire::raw_batch(&[0xff; 64], 1, 3)),
        ("snappy that claims 4 GiB", wire::raw_batch(&[0xff, 0xff, 0xff, 0xff, 0x0f, 0, 0, 0], 1, 2)),
        ("a zstd bomb", wire::raw_batch(&bomb(), 1, 4)),
    ];
    // The memory for decompression depends on the machine.
    let is_named = |error: &ApiError| matches!(error.code, ErrorCode::MalformedBatch | ErrorCode::RecordTooLarge);
    for (name, bytes) in cases {
        for topic in ["plain", "recompressed"] {
            let append = wire::append(&mut log, wire::append_batch(topic, 0, bytes.clone())).await;
            match append {
                // Refused by the append, which is best.
                Err(error) => assert!(is_named(&error), "{name} into {topic}: {error}"),
                // Stored without decoding. A read of decoded records then fails with a named error.
                Ok(appended) => {
                    assert_eq!(topic, "plain", "{name}: a broker that recompresses has decoded the batch");
                    let read = wire::read_range(&mut log, topic, 0, appended.base_offset, appended.end_offset).await;
                    let error = read.expect_err(name);
                    assert!(is_named(&error) || error.code == ErrorCode::DataCorrupt, "{name}: {error:?}");
                }
            }
        }
        check_serves(instance.grpc(), "calm").await;
    }
    assert!(broker.is_running());
}

/// Returns a few kilobytes that decompress to more zeros than any limit allows.
fn bomb() -> Vec<u8> {
    let mut encoder = zstd::stream::Encoder::new(Vec::new(), 1).expect("an encoder");
    let zeros = vec![0; 1 << 20];
    for _ in 0..=limits::MAX_DECOMPRESSED_BYTES >> 20 {
        encoder.write_all(&zeros).expect("writing to a vector succeeds");
    }
    encoder.finish().expect("writing to a vector succeeds")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_for_absent_topics_get_named_errors() {
    let (instance, _broker) = start_broker(&["small"]).await;
    let mut log = wire::log(instance.grpc());
    let value = || vec![Bytes::from_static(b"x")];
    for topic in ["nobody", "", "a/b", "..", "\u{1f980}", &"n".repeat(100_000)] {
        let error = wire::append(&mut log, wire::append_plain(topic, 0, value())).await.expect_err("no such topic");
        assert!(matches!(error.code, ErrorCode::UnknownTopic | ErrorCode::InvalidTopic), "{error:?}");
        assert!(error.message.len() < 2000, "the error does not repeat the long name: {}", error.message.len());
        let error = wire::latest(&mut log, topic, 0).await.expect_err("no such topic");
        assert!(matches!(error.code, ErrorCode::UnknownTopic | ErrorCode::InvalidTopic), "{error:?}");
    }
    for partition in [1, -1, i32::MAX, i32::MIN] {
        let error =
            wire::append(&mut log, wire::append_plain("small", partition, value())).await.expect_err("no partition");
        assert_eq!(error.code, ErrorCode::UnknownPartition, "{error:?}");
        assert!(error.message.contains(&partition.to_string()), "{error}");
    }
    let error = wire::append(&mut log, wire::append_plain("small", 0, vec![])).await.expect_err("no records");
    assert_eq!(error.code, ErrorCode::InvalidRequest, "{error:?}");
    wire::append(&mut log, wire::append_plain("small", 0, value())).await.expect("one record");
    for offset in [2, i64::MAX - 1, -1, i64::MIN] {
        let error = wire::read_range(&mut log, "small", 0, offset, i64::MAX).await;
        let error = error.expect_err("the offset does not exist");
        assert!(matches!(error.code, ErrorCode::OffsetOutOfRange | ErrorCode::InvalidRequest), "{offset}: {error:?}");
        if offset == 2 {
            assert_eq!(
                (error.code, error.number("start"), error.number("end")),
                (ErrorCode::OffsetOutOfRange, Some(0), Some(1))
            );
        }
    }
    let partitions =
        vec![FetchPartition { topic: "small".into(), ..Default::default() }; limits::MAX_FETCH_PARTITIONS + 1];
    let status = log.read(ReadRequest { partitions, ..Default::default() }).await.expect_err("too many");
    assert_eq!(ApiError::from(&status).code, ErrorCode::InvalidRequest, "{status:?}");
    for (name, partitions) in [("", 1), ("a b", 1), ("..", 1), ("huge", limits::MAX_PARTITIONS + 1)] {
        let request = CreateTopicRequest { name: name.into(), partitions, ..Default::default() };
        let status = wire::admin(instance.grpc()).create_topic(request).await.expect_err("not possible");
        let error = ApiError::from(&status);
        assert!(matches!(error.code, ErrorCode::InvalidTopic | ErrorCode::InvalidRequest), "{name:?}: {error:?}");
    }
    check_serves(instance.grpc(), "small").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_large_request_is_refused_and_the_next_accepted() {
    let (instance, mut broker) = start_broker(&["calm"]).await;
    wire::create_topic(instance.grpc(), "narrow", 1, &[("max.message.bytes", "2000")]).await;
    let mut log = wire::log(instance.grpc());
    let large = vec![7_u8; 3000];
    let plain = wire::append_plain("narrow", 0, vec![large.clone().into()]);
    for request in [wire::append_batch("narrow", 0, wire::batch(&[&large])), plain] {
        let error = wire::append(&mut log, request).await.expect_err("too large");
        assert_eq!(error.code, ErrorCode::RecordTooLarge, "{error:?}");
        assert!(error.message.contains("2000"), "the error contains the allowed values: {error}");
    }
    wire::append(&mut log, wire::append_batch("narrow", 0, wire::batch(&[b"fits"]))).await.expect("small enough");
    let over = wire::append_batch("calm", 0, vec![0; limits::MAX_MESSAGE_BYTES + 1]);
    let error = wire::append(&mut log, over).await.expect_err("over the message limit");
    assert!(!matches!(error.code, ErrorCode::Internal), "{error:?}");
    check_serves(instance.grpc(), "calm").await;
    assert!(broker.is_running());
}

/// Checks that a broker does not start: the process exits with code 1 and logs the reason.
fn check_start_refused(instance: &BrokerInstance, expected: &[&str]) {
    let before = instance.log().len();
    let status = instance.spawn().wait_for_exit();
    let log = instance.log().split_off(before);
    assert_eq!(status.code(), Some(1), "{log}");
    for word in expected {
        assert!(log.contains(word), "the log contains {word:?}: {log}");
    }
    assert!(!log.contains("panicked") && !log.contains("stack backtrace"), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn data_directory_in_use_is_refused() {
    let (instance, broker) = start_broker(&["calm"]).await;
    let second = BrokerInstance::new();
    let output = start(second.path(), &config(&second, &instance.data_dir(), ""));
    assert_eq!(output.code, 1, "{output:?}");
    let directory = instance.data_dir().display().to_string();
    assert!(output.stderr.contains(&directory) && output.stderr.contains("in use"), "{output:?}");
    assert!(output.stderr.contains(&broker.pid().to_string()), "the error names the broker: {output:?}");
    check_serves(instance.grpc(), "calm").await;
}

/// Returns a configuration for the ports of an instance, with another data directory, and more lines at its end.
fn config(instance: &BrokerInstance, data: &Path, more: &str) -> String {
    format!(
        "[broker]\nid = 1\ndata_dir = {data:?}\n[grpc]\nlisten = \"{}\"\n[http]\nlisten = \"{}\"\n{more}",
        instance.grpc(),
        instance.http()
    )
}

/// Runs `strandline broker` with this configuration. The process is expected to exit by itself.
fn start(folder: &Path, config: &str) -> Output {
    let file = folder.join("bad.toml");
    fs::write(&file, config).expect("written");
    Cli::without_broker(folder).run(&["broker", "--config", file.to_str().expect("the path is UTF-8")])
}

/// A start checks the identity file of the data directory.
#[test]
fn foreign_or_newer_data_directory_is_not_changed() {
    let mut instance = BrokerInstance::new();
    assert!(instance.start().terminate().success(), "{}", instance.log());
    let other = start(instance.path(), &config(&instance, &instance.data_dir(), "").replace("id = 1", "id = 2"));
    assert_eq!(other.code, 1, "{other:?}");
    assert!(other.stderr.contains(&instance.data_dir().display().to_string()), "{other:?}");
    let path = instance.data_dir().join("strandline.json");
    let mut marker: serde_json::Value =
        serde_json::from_slice(&fs::read(&path).expect("a cluster marker")).expect("the text is JSON");
    marker["format"] = 99.into();
    let newer = marker.to_string();
    fs::write(&path, &newer).expect("written");
    check_start_refused(&instance, &[&instance.data_dir().display().to_string(), "99"]);
    assert_eq!(fs::read_to_string(&path).expect("a cluster marker"), newer, "the state is unchanged");
}

#[test]
fn unusable_data_directory_is_named() {
    let instance = BrokerInstance::new();
    let file = instance.path().join("a-file");
    fs::write(&file, "not a folder").expect("written");
    // Not even root can create a folder in /proc.
    for path in [file.as_path(), &file.join("below"), Path::new("/proc/strandline")] {
        let output = start(instance.path(), &config(&instance, path, ""));
        assert_eq!(output.code, 1, "{output:?}");
        assert!(
            output.stderr.contains(&path.display().to_string()),
            "the error names no {}: {output:?}",
            path.display()
        );
        assert!(!output.stderr.contains("panicked"), "{output:?}");
    }
}

#[test]
fn port_in_use_is_named() {
    let instance = BrokerInstance::new();
    let taken = TcpListener::bind(instance.grpc()).expect("free");
    check_start_refused(&instance, &[&instance.grpc().port().to_string(), "127.0.0.1", "in use"]);
    drop(taken);
    let _taken = TcpListener::bind(instance.http()).expect("free");
    check_start_refused(&instance, &[&instance.http().port().to_string(), "127.0.0.1", "in use"]);
}

/// Every mistake is found before data is written, with its file, line and key.
#[test]
fn invalid_configuration_names_file_line_and_key() {
    let instance = BrokerInstance::new();
    let data = instance.path().join("never-made");
    for (more, line, expected) in [
        ("[object_stor]\nurl = \"memory://\"\n", 8, &["object_stor", "object_store"][..]),
        ("[object_store]\nurll = \"memory://\"\n", 9, &["urll", "url"]),
        ("[object_store]\nurl = 7\n", 9, &["url"]),
        ("[object_store]\nurl = \"memory://\n", 9, &[]),
        ("[topic_defaults]\n\"segment.byte\" = 1000000\n", 9, &["segment.byte", "segment.bytes"]),
        ("[topic_defaults]\n\"segment.bytes\" = 5\n", 9, &["segment.bytes", "5", "16384"]),
        ("[topic_defaults]\n\"durability\" = \"maybe\"\n", 9, &["durability", "maybe", "persisted"]),
        ("[metadata]\netcd = \"not a list\"\n", 9, &["etcd"]),
    ] {
        let output = start(instance.path(), &config(&instance, &data, more));
        assert_eq!(output.code, 1, "{more}: {output:?}");
        assert!(output.stderr.contains("bad.toml"), "the error names the file: {more}: {output:?}");
        assert!(output.stderr.contains(&line.to_string()), "the error names line {line}: {more}: {output:?}");
        for word in expected {
            assert!(output.stderr.contains(word), "the error contains {word:?}: {more}: {output:?}");
        }
        assert!(!data.exists(), "no directory was created: {more}");
    }
    // A command-line option gets the same error as the line of the file.
    let dev = ["dev", "--data-dir", data.to_str().expect("the path is UTF-8"), "--listen", "localhost:29464"];
    let listen = Cli::without_broker(instance.path()).run(&dev);
    assert_eq!(listen.code, 1, "{listen:?}");
    for word in ["grpc.listen", "localhost:29464", "an IP address and a port"] {
        assert!(listen.stderr.contains(word), "the error contains {word:?}: {listen:?}");
    }
    let missing = Cli::without_broker(instance.path()).run(&["broker", "--config", "/nowhere/broker.toml"]);
    assert_eq!(missing.code, 1, "{missing:?}");
    assert!(missing.stderr.contains("/nowhere/broker.toml"), "{missing:?}");
    let store = start(instance.path(), &config(&instance, &data, "[object_store]\nurl = \"ftp://host/x\"\n"));
    assert_eq!(store.code, 1, "{store:?}");
    assert!(store.stderr.contains("ftp://host/x"), "{store:?}");
}

#[test]
fn bomb_decompresses_to_its_size() {
    let bomb = bomb();
    assert!(bomb.len() < 100_000, "{} bytes", bomb.len());
    let mut grown: u64 = 0;
    let mut decoder = zstd::stream::Decoder::new(&bomb[..]).expect("a decoder");
    grown += std::io::copy(&mut decoder, &mut std::io::sink()).expect("decompression succeeds");
    assert!(usize::try_from(grown).expect("64 bits") > limits::MAX_DECOMPRESSED_BYTES);
}
