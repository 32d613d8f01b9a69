//! The gRPC interface as a client in any language observes it: the ends of streams, errors, health, reflection, and the
//! checks of batches.

use std::{io::Write as _, time::Duration};

use bytes::{BufMut as _, Bytes};
use strandline::{
    limits,
    proto::{
        codec::LargeBufferCodec,
        error::{ApiError, ErrorCode},
        v1::{self, FetchPartition, ProduceRequest, ReadRequest, produce_response},
    },
};
use tokio_stream::StreamExt as _;
use tonic::{Code, Status, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::{
    broker::{Broker, BrokerInstance},
    wire,
};

/// Maximum time that a test waits for a response.
const TEST_TIMEOUT: Duration = Duration::from_secs(30);

/// Starts a broker with topic `edge`, which has two partitions.
async fn start_broker() -> (BrokerInstance, Broker) {
    let mut instance = BrokerInstance::new();
    let broker = tokio::task::block_in_place(|| instance.start());
    // Retention by time is disabled, because the records have old timestamps.
    wire::create_topic(instance.grpc(), "edge", 2, &[("retention.ms", "-1")]).await;
    (instance, broker)
}

fn produce_request(correlation_id: u64, value: &[u8]) -> ProduceRequest {
    let append = wire::append_batch("edge", 0, wire::batch(&[value]));
    ProduceRequest { correlation_id, append: Some(append) }
}

/// Regression: a client that half-closes the stream and then reads all responses, as Python's `for answer in
/// stub.Produce(iter(requests))` does, waited for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn produce_stream_ends_after_all_responses() {
    let (instance, _broker) = start_broker().await;
    let mut log = wire::log(instance.grpc());
    for count in [0, 1, 100] {
        let requests: Vec<_> = (0..count).map(|number| produce_request(number, b"x")).collect();
        let mut responses = log.produce(tokio_stream::iter(requests)).await.expect("a stream").into_inner();
        let mut seen = Vec::new();
        while let Some(response) = tokio::time::timeout(TEST_TIMEOUT, responses.message())
            .await
            .expect("the stream ends in time")
            .expect("the stream ends without an error")
        {
            assert!(matches!(response.result, Some(produce_response::Result::Appended(_))), "{response:?}");
            seen.push(response.correlation_id);
        }
        seen.sort_unstable();
        assert_eq!(seen, (0..count).collect::<Vec<_>>());
    }
}

/// A request that the transport refuses ends the stream with a stable error code, after the responses to earlier
/// requests.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_large_message_is_refused_after_earlier_responses() {
    let (instance, _broker) = start_broker().await;
    let mut log = wire::log(instance.grpc());
    let mut large = produce_request(2, b"x");
    large.append = Some(wire::append_batch("edge", 0, vec![0; limits::MAX_MESSAGE_BYTES + 1]));
    let requests = tokio_stream::iter([produce_request(1, b"x"), large.clone()]);
    let mut responses = log.produce(requests).await.expect("a stream").into_inner();
    let first = tokio::time::timeout(TEST_TIMEOUT, responses.message()).await.expect("in time").expect("a response");
    assert_eq!(first.map(|response| response.correlation_id), Some(1));
    let status = tokio::time::timeout(TEST_TIMEOUT, responses.message()).await.expect("in time").expect_err("refused");
    check_error(&status, ErrorCode::RequestTooLarge, Code::ResourceExhausted);

    let status = log.append(large.append.expect("set")).await.expect_err("refused");
    check_error(&status, ErrorCode::RequestTooLarge, Code::ResourceExhausted);
    assert!(status.message().contains(&limits::MAX_MESSAGE_BYTES.to_string()), "{status:?}");
}

/// Checks error code, gRPC code and the presence of a message.
fn check_error(status: &Status, reason: ErrorCode, code: Code) {
    let error = ApiError::from(status);
    assert_eq!((error.code, status.code()), (reason, code), "{status:?}");
    assert!(error.message.len() > 15, "{error}");
}

/// Calls the method at a path with these bytes as the message.
async fn call(channel: &Channel, path: &'static str, message: Bytes) -> Result<(), Status> {
    let mut grpc = tonic::client::Grpc::new(channel.clone());
    grpc.ready().await.expect("a connection");
    let path = tonic::codegen::http::uri::PathAndQuery::from_static(path);
    grpc.unary(tonic::Request::new(message), path, Raw).await.map(drop)
}

/// Codec whose requests are encoded already. Responses are decoded as [`v1::AppendResponse`].
#[derive(Clone, Copy)]
struct Raw;

impl tonic::codec::Codec for Raw {
    type Encode = Bytes;
    type Decode = v1::AppendResponse;
    type Encoder = Self;
    type Decoder = <LargeBufferCodec<v1::AppendRequest, v1::AppendResponse> as tonic::codec::Codec>::Decoder;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self::Decoder {
        LargeBufferCodec::<v1::AppendRequest, v1::AppendResponse>::default().decoder()
    }
}

impl tonic::codec::Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, into: &mut tonic::codec::EncodeBuf<'_>) -> Result<(), Status> {
        into.put(item);
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn errors_of_the_transport_have_stable_names() {
    let (instance, _broker) = start_broker().await;
    let channel = Channel::from_shared(format!("http://{}", instance.grpc())).expect("a URI").connect_lazy();
    const APPEND: &str = "/strandline.v1.Log/Append";
    for (name, path, message, reason, code) in [
        ("a field that is cut", APPEND, &b"\x0a\xff"[..], ErrorCode::InvalidRequest, Code::InvalidArgument),
        ("a topic that is no UTF-8", APPEND, b"\x0a\x02\xff\xfe", ErrorCode::InvalidRequest, Code::InvalidArgument),
        ("a wrong wire type", APPEND, b"\x0d\x00\x00\x00\x00", ErrorCode::InvalidRequest, Code::InvalidArgument),
        (
            "a method of a newer version",
            "/strandline.v1.Log/Rewind",
            b"",
            ErrorCode::UnknownMethod,
            Code::Unimplemented,
        ),
        ("a service that is not here", "/strandline.v9.Log/Append", b"", ErrorCode::UnknownMethod, Code::Unimplemented),
        ("a path that is no method", "/", b"", ErrorCode::UnknownMethod, Code::Unimplemented),
    ] {
        let status = call(&channel, path, Bytes::copy_from_slice(message)).await.expect_err(name);
        let error = ApiError::from(&status);
        assert_eq!((error.code, status.code()), (reason, code), "{name}: {status:?}");
        if reason == ErrorCode::UnknownMethod {
            assert!(error.message.contains(path), "{name}: {error}");
        }
    }
    let mut request = tonic::Request::new(wire::append_plain("edge", 0, vec![Bytes::from_static(b"x")]));
    request.metadata_mut().insert("grpc-encoding", "gzip".parse().expect("ASCII"));
    let status = wire::log(instance.grpc()).append(request).await.expect_err("compressed by gRPC");
    check_error(&status, ErrorCode::UnsupportedEncoding, Code::Unimplemented);
    // An error that the service itself returns keeps its code.
    let status = wire::log(instance.grpc()).append(wire::append_plain("nobody", 0, vec![])).await.expect_err("unknown");
    check_error(&status, ErrorCode::UnknownTopic, Code::NotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_reports_the_server_and_each_service() {
    let (instance, broker) = start_broker().await;
    let channel = Channel::from_shared(format!("http://{}", instance.grpc())).expect("a URI").connect_lazy();
    let mut health = HealthClient::new(channel);
    for service in ["", "strandline.v1.Log", "strandline.v1.Admin"] {
        let request = HealthCheckRequest { service: service.to_owned() };
        let response = health.check(request).await.unwrap_or_else(|status| panic!("{service:?}: {status:?}"));
        assert_eq!(response.into_inner().status, 1, "{service:?} is healthy");
    }
    let request = HealthCheckRequest { service: "strandline.v1.Other".to_owned() };
    assert_eq!(health.check(request).await.expect_err("unknown").code(), Code::NotFound);
    assert!(tokio::task::block_in_place(|| broker.terminate()).success());
}

/// Sends one query to the reflection service of a version, `v1` or `v1alpha`. The query `(true, _)` returns the names
/// of all services. The query `(false, symbol)` returns the number of files that describe the symbol.
macro_rules! reflect {
    ($version:ident, $channel:expr, $query:expr) => {{
        use tonic_reflection::pb::$version::{
            ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
            server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
        };
        let (list, symbol): (bool, &str) = $query;
        let message = if list {
            MessageRequest::ListServices(String::new())
        } else {
            MessageRequest::FileContainingSymbol(symbol.to_owned())
        };
        let request = ServerReflectionRequest { message_request: Some(message), ..Default::default() };
        let stream = ServerReflectionClient::new($channel).server_reflection_info(tokio_stream::once(request)).await;
        match stream {
            Err(status) => Err(status),
            Ok(responses) => match responses.into_inner().next().await.expect("a response") {
                Err(status) => Err(status),
                Ok(response) => match response.message_response {
                    Some(MessageResponse::ListServicesResponse(list)) => {
                        Ok(list.service.into_iter().map(|service| service.name).collect::<Vec<_>>())
                    }
                    Some(MessageResponse::FileDescriptorResponse(files)) => {
                        Ok(vec![files.file_descriptor_proto.len().to_string()])
                    }
                    other => panic!("{other:?}"),
                },
            },
        }
    }};
}

/// Reflection lists only services for clients. Regression: it listed the `Peer` service, also on a broker that does not
/// serve it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reflection_lists_client_services_in_both_versions() {
    let (instance, _broker) = start_broker().await;
    let channel = Channel::from_shared(format!("http://{}", instance.grpc())).expect("a URI").connect_lazy();
    for names in [reflect!(v1, channel.clone(), (true, "")), reflect!(v1alpha, channel.clone(), (true, ""))] {
        let names = names.expect("the service responds");
        for name in ["strandline.v1.Log", "strandline.v1.Admin", "grpc.health.v1.Health"] {
            assert!(names.iter().any(|known| known == name), "{name} is not in {names:?}");
        }
        assert!(!names.iter().any(|name| name.contains("Peer")), "{names:?}");
    }
    reflect!(v1, channel.clone(), (false, "strandline.v1.AppendRequest")).expect("the type is described");
    for hidden in ["strandline.v1.Peer", "strandline.v1.ReplicateRequest", "strandline.v1.GetBrokerStatsResponse"] {
        let status = reflect!(v1, channel.clone(), (false, hidden)).expect_err(hidden);
        assert_eq!(status.code(), Code::NotFound, "{hidden}: {status:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reflection_can_be_switched_off() {
    let mut instance = BrokerInstance::new().setting("grpc.reflection", false);
    let _broker = tokio::task::block_in_place(|| instance.start());
    let channel = Channel::from_shared(format!("http://{}", instance.grpc())).expect("a URI").connect_lazy();
    for response in [reflect!(v1, channel.clone(), (true, "")), reflect!(v1alpha, channel.clone(), (true, ""))] {
        assert_eq!(response.expect_err("the service is disabled").code(), Code::Unimplemented);
    }
}

/// Regression: one undecodable batch failed the entire call, with all of its partitions.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn undecodable_batch_fails_only_its_partition() {
    let (instance, _broker) = start_broker().await;
    let mut log = wire::log(instance.grpc());
    let good = |partition| wire::append_batch("edge", partition, wire::batch(&[b"good"]));
    // The corrupt record is the last one. An append decodes only the first records, and does not detect the corruption.
    let mut records = wire::batch(&[&[b'x'; 4096], b"two", b"three"])[61..].to_vec();
    *records.last_mut().expect("records") = 0x55;
    let bad = wire::append_batch("edge", 0, wire::raw_batch(&gzip(&records), 3, 1));
    for request in [good(0), bad, good(0), good(1)] {
        wire::append(&mut log, request).await.expect("the batch is stored without a check");
    }
    let fetch_partition =
        |partition, offset| FetchPartition { topic: "edge".to_owned(), partition, offset, ..Default::default() };
    let mut read = async |partitions| {
        let request = ReadRequest { partitions, max_wait_ms: 1000, decode: true, ..Default::default() };
        let mut partitions = log.read(request).await.expect("the call succeeds").into_inner().partitions;
        partitions.sort_by_key(|part| part.partition);
        partitions
    };
    // The first read returns the record before the corrupt batch, and the next read starts at that batch.
    let parts = read(vec![fetch_partition(0, 0)]).await;
    assert_eq!((parts[0].records.len(), parts[0].next_offset, parts[0].error.clone()), (1, 1, None));
    let parts = read(vec![fetch_partition(0, 1), fetch_partition(1, 0)]).await;
    assert_eq!(parts.len(), 2, "{parts:?}");
    let error = ApiError::from(parts[0].error.clone().expect("partition 0 has an error"));
    assert_eq!((error.code, error.number("offset"), error.number("next")), (ErrorCode::DataCorrupt, Some(1), Some(4)));
    assert!(error.message.contains("edge") && error.message.contains("offset 1"), "{error}");
    assert!(parts[0].records.is_empty());
    assert_eq!((parts[1].error.clone(), parts[1].records.len()), (None, 1), "{parts:?}");
    // A read that starts after the corrupt batch succeeds.
    let parts = read(vec![fetch_partition(0, 4)]).await;
    assert_eq!((parts[0].records.len(), parts[0].next_offset), (1, 5), "{parts:?}");
}

/// Recompression of decompression bombs takes bounded memory. Regression: six batches of 255 KB, each of which
/// decompresses to 250 MiB, took 2.7 GB in a topic that sets `compression.type`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bombs_into_a_recompressing_topic_take_bounded_memory() {
    let (instance, broker) = start_broker().await;
    for (topic, codec) in [("zstd", "zstd"), ("plain", "uncompressed")] {
        wire::create_topic(instance.grpc(), topic, 1, &[("compression.type", codec), ("retention.ms", "-1")]).await;
    }
    // The batch is compressed as several gzip members. So the length in the trailer of the last member is not the
    // length of the whole.
    let mut record = Vec::new();
    let value_bytes = 249 << 20;
    wire::varint(&mut record, value_bytes + 20);
    record.extend_from_slice(&[0; 3]);
    wire::varint(&mut record, -1);
    wire::varint(&mut record, value_bytes);
    let bomb = [gzip(&record), gzip_of_zeros(249 << 20), gzip_of_zeros(1 << 20)].concat();
    let bomb = wire::raw_batch(&bomb, 1, 1);
    assert!(bomb.len() < 300_000, "{}", bomb.len());
    let before = peak_resident_bytes(broker.pid());
    for (topic, reason) in [("zstd", ErrorCode::MalformedBatch), ("plain", ErrorCode::RecordTooLarge)] {
        let calls = (0..6).map(|_| {
            let (mut log, request) = (wire::log(instance.grpc()), wire::append_batch(topic, 0, bomb.clone()));
            async move { wire::append(&mut log, request).await }
        });
        for response in futures::future::join_all(calls).await {
            assert_eq!(response.expect_err("a bomb").code, reason, "{topic}");
        }
        let honest = wire::append_batch(topic, 0, wire::raw_batch(&gzip(&wire::batch(&[b"one", b"two"])[61..]), 2, 1));
        let mut log = wire::log(instance.grpc());
        wire::append(&mut log, honest).await.expect("a batch that is not a bomb is accepted");
        assert_eq!(wire::read_range(&mut log, topic, 0, 0, 2).await.expect("read").len(), 2);
    }
    let grown = peak_resident_bytes(broker.pid()).saturating_sub(before);
    assert!(grown < 600 << 20, "{} MiB more than before", grown >> 20);
}

/// A read of decoded records from a batch that decompresses to 60 MiB returns a response of bounded size. The next read
/// continues at the end of that response.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn decoded_reads_of_bombs_have_bounded_responses() {
    let (instance, broker) = start_broker().await;
    let value = vec![0_u8; 1 << 20];
    let values = vec![&value[..]; 60];
    let stored = wire::raw_batch(&gzip(&wire::batch(&values)[61..]), 60, 1);
    assert!(stored.len() < 100_000, "{}", stored.len());
    let mut log = wire::log(instance.grpc());
    wire::append(&mut log, wire::append_batch("edge", 0, stored)).await.expect("the batch is stored without a check");
    let before = peak_resident_bytes(broker.pid());
    let (mut next, mut responses) = (0, 0);
    while next < 60 {
        let partitions = vec![FetchPartition { topic: "edge".to_owned(), offset: next, ..Default::default() }];
        let request = ReadRequest { partitions, decode: true, max_wait_ms: 1000, ..Default::default() };
        let parts = log.read(request).await.expect("a response").into_inner().partitions;
        assert!(!parts[0].records.is_empty() && parts[0].records.len() <= 16, "{} records", parts[0].records.len());
        assert_eq!(parts[0].records[0].offset, next);
        next = parts[0].next_offset;
        responses += 1;
    }
    assert!((4..=6).contains(&responses), "{responses} responses");
    let grown = peak_resident_bytes(broker.pid()).saturating_sub(before);
    assert!(grown < 600 << 20, "{} MiB more than before", grown >> 20);
}

/// Returns the peak resident memory of a process in bytes.
fn peak_resident_bytes(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the process is running");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("the peak is present");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

fn gzip(plain: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(plain).expect("writing to a vector succeeds");
    encoder.finish().expect("writing to a vector succeeds")
}

fn gzip_of_zeros(bytes: usize) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    let zeros = vec![0; 1 << 20];
    for _ in 0..bytes >> 20 {
        encoder.write_all(&zeros).expect("writing to a vector succeeds");
    }
    encoder.finish().expect("writing to a vector succeeds")
}

/// The broker corrects `maxTimestamp`, which a producer may set wrongly. Regression: with a value in 1970, a new record
/// was deleted within seconds. With a value of 2^62, the record was the result of every search by timestamp.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_max_timestamp_of_a_batch_is_corrected() {
    let (instance, _broker) = start_broker().await;
    let mut log = wire::log(instance.grpc());
    for timestamp in [1000, 1 << 62] {
        let mut batch = wire::batch(&[b"x"]);
        batch[35..43].copy_from_slice(&i64::to_be_bytes(timestamp));
        wire::renew_crc(&mut batch);
        wire::append(&mut log, wire::append_batch("edge", 0, batch)).await.expect("the batch is accepted");
    }
    let partitions = vec![FetchPartition { topic: "edge".to_owned(), ..Default::default() }];
    let request = ReadRequest { partitions, max_wait_ms: 1000, ..Default::default() };
    let parts = log.read(request).await.expect("a response").into_inner().partitions;
    let mut stored = Bytes::from(parts[0].chunks.concat());
    while !stored.is_empty() {
        let batch = strandline::record::Batch::split_from(&mut stored).expect("a batch");
        assert_eq!(batch.max_timestamp(), 1_700_000_000_000);
    }
    for (time, expected) in [(1_700_000_000_000, (0, 1_700_000_000_000)), (1_700_000_000_001, (2, -1))] {
        let at = Some(v1::offset_query::At::TimestampMs(time));
        let query = v1::OffsetQuery { topic: "edge".to_owned(), partition: 0, at };
        let request = v1::ListOffsetsRequest { queries: vec![query] };
        let response = log.list_offsets(request).await.expect("a response").into_inner().results.remove(0);
        assert_eq!((response.offset, response.timestamp_ms), expected, "{time}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_refused_request_counts_as_request_and_error() {
    let (instance, _broker) = start_broker().await;
    let mut log = wire::log(instance.grpc());
    let bad = wire::append_batch("edge", 0, vec![0; 100]);
    for request in [wire::append_batch("edge", 0, wire::batch(&[b"x"])), bad, wire::append_plain("nobody", 0, vec![])] {
        let _response = log.append(request).await;
    }
    let names = [("nobody", 0), ("edge", 7), ("edge", 0)];
    let partitions =
        names.map(|(topic, partition)| FetchPartition { topic: topic.to_owned(), partition, ..Default::default() });
    log.read(ReadRequest { partitions: partitions.to_vec(), ..Default::default() }).await.expect("a response");
    tokio::task::block_in_place(|| {
        assert_eq!(instance.metric("strandline_produce_requests_total"), 3.0);
        for name in [
            "strandline_produce_errors_total{reason=\"MALFORMED_BATCH\"}",
            "strandline_produce_errors_total{reason=\"UNKNOWN_TOPIC\"}",
            "strandline_fetch_errors_total{reason=\"UNKNOWN_TOPIC\"}",
            "strandline_fetch_errors_total{reason=\"UNKNOWN_PARTITION\"}",
        ] {
            assert_eq!(instance.metric(name), 1.0, "{name}");
        }
    });
}
