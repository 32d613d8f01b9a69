//! Attackers that hold many small things: connections, calls, request headers, metadata. Also batches that are large
//! although little was requested. Resident memory stays bounded meanwhile, and honest clients are served.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use futures::future::{self, FutureExt};
use http_body_util::BodyExt as _;
use prost::Message as _;
use strandline::proto::v1::{
    Acks, AppendRequest, DescribeTopicRequest, FetchPartition, FetchRequest, GetMetadataRequest, ListOffsetsRequest,
    OffsetQuery, ProduceRequest, ReadRequest, offset_query::At,
};
use tokio::{io::AsyncWriteExt as _, net::TcpSocket, sync::oneshot, task::JoinSet};
use tonic::transport::Channel;

use super::target::{
    APPEND, FILLED, PREFACE, READ, Scale, Target, call, call_with, call_without_reading, complete_body,
    fetch_partition, framed, open_body, resident_bytes, withheld_body,
};
use crate::{
    broker::BrokerInstance,
    s3::{Fault, Op, S3},
    wire,
};

const METADATA: &str = "/strandline.v1.Admin/GetMetadata";

/// Partitions of the topic `t` with one batch of 56 MiB each.
const LARGE: [i32; 2] = [FILLED, FILLED + 1];

/// Calls again and again, and reads the responses.
async fn repeat(channel: Channel, path: &'static str, message: Bytes) {
    while let Some(response) = call(channel.clone(), path, complete_body(&message)).await {
        let _ = response.into_body().collect().await;
    }
}

/// Returns a frame of HTTP/2.
fn http2_frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a small frame").to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// Calls again and again on a connection of which nothing is read, not even response headers, which have no
/// flow-control window. Each call requests a topic whose name the error repeats in its header.
async fn call_and_read_nothing(address: SocketAddr) {
    const DATA: u8 = 0;
    const HEADERS: u8 = 1;
    const END_STREAM: u8 = 1;
    const END_HEADERS: u8 = 4;
    let head = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/strandline.v1.Admin/DescribeTopic"),
        (":authority", "broker"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ];
    // Each header field is a literal with a new name.
    let short = |text: &str| [&[u8::try_from(text.len()).expect("a short text")], text.as_bytes()].concat();
    let head = head.map(|(name, value)| [vec![0], short(name), short(value)].concat()).concat();
    let request = framed(&DescribeTopicRequest { name: "\"\u{1}".repeat(2000) }.encode_to_vec());
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_recv_buffer_size(2048).expect("a small buffer");
    let mut stream = socket.connect(address).await.expect("the port is open");
    stream.write_all(PREFACE).await.expect("the request is sent");
    for id in (1..10_000).step_by(2) {
        let call = [http2_frame(HEADERS, END_HEADERS, id, &head), http2_frame(DATA, END_STREAM, id, &request)].concat();
        if stream.write_all(&call).await.is_err() {
            break;
        }
        if id % 40 == 1 {
            tokio::time::sleep(Duration::from_millis(4)).await;
        }
    }
    future::pending().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_is_bounded_under_open_connections_and_calls() {
    let target = Target::start(Scale::of_environment()).await;
    target.fill().await;
    let mut log = wire::log(target.address());
    for partition in LARGE {
        let batch = wire::batch(&vec![&vec![7; 1 << 20][..]; 56]);
        wire::append(&mut log, wire::append_batch("t", partition, batch)).await.expect("the broker accepts records");
    }
    let before = resident_bytes(target.broker.pid());
    let (streams, connections) = (target.scale.streams, target.scale.streams / 10);

    let attack = |_channel: Channel| future::pending();
    target.attack_for_a_while("connections without a call", target.on_connections(3 * connections, 0, attack)).await;
    // Each connection has a window of 1 MiB.
    let windows = |channel: Channel| async move {
        call_without_reading(channel, APPEND, |closed| withheld_body(60 << 20, 4 << 20, closed)).await;
    };
    target.attack_for_a_while("windows of many connections", target.on_connections(connections, 0, windows)).await;
    let all = Bytes::from(GetMetadataRequest { all_topics: true, ..Default::default() }.encode_to_vec());
    let attack = {
        let all = all.clone();
        move |channel: Channel| {
            let all = all.clone();
            async move {
                let mut calls = JoinSet::new();
                for _ in 0..16 {
                    let (channel, all) = (channel.clone(), all.clone());
                    calls.spawn(async move { call_without_reading(channel, METADATA, |_| complete_body(&all)).await });
                }
                for _ in 0..2 {
                    let channel = channel.clone();
                    calls.spawn(async move {
                        call_without_reading(channel, METADATA, |closed| withheld_body(4 << 20, 1 << 20, closed)).await
                    });
                }
                calls.join_all().await;
            }
        }
    };
    target.attack_for_a_while("metadata that no client reads", target.on_connections(connections, 0, attack)).await;

    let attack = (0..connections).map(|_| call_and_read_nothing(target.address())).collect();
    target.attack_for_a_while("headers of responses that no client reads", attack).await;

    // Each stream takes 26 KiB.
    let head = "a".repeat(12_000);
    let attack = |channel: Channel| {
        let head = head.clone();
        async move {
            let (_alive, closed) = oneshot::channel();
            let _answer = call_with(channel, APPEND, &head, withheld_body(1000, 10, closed)).await;
            future::pending().await
        }
    };
    target.attack_for_a_while("streams with large heads", target.on_streams(streams, attack).await).await;
    let attack = |channel: Channel| async move {
        let (_alive, closed) = oneshot::channel();
        let _answer = call(channel, APPEND, withheld_body(1000, 10, closed)).await;
        future::pending().await
    };
    target.attack_for_a_while("streams on many connections", target.on_streams(4 * streams, attack).await).await;
    let attack = |channel: Channel| async move {
        let (_alive, closed) = oneshot::channel();
        let _answer = call(channel, "/grpc.health.v1.Health/Check", open_body(Vec::new(), closed)).await;
        future::pending().await
    };
    target.attack_for_a_while("probes without a request", target.on_streams(4 * streams, attack).await).await;

    // HTTP/2 keeps memory for as many streams as a connection ever had: up to 1.5 MB for each connection.
    let attack = |channel: Channel| async move {
        let (alive, closed): (Vec<_>, Vec<_>) = (0..900).map(|_| oneshot::channel()).unzip();
        let calls = closed.into_iter().map(|closed| call(channel.clone(), APPEND, withheld_body(1000, 10, closed)));
        let _open = tokio::time::timeout(Duration::from_secs(1), future::join_all(calls)).await;
        drop(alive);
        future::pending().await
    };
    target
        .attack_for_a_while("connections that had many streams", target.on_connections(connections, 65_535, attack))
        .await;

    // Each stream takes 3 MB.
    let absent = |partition| FetchPartition { topic: "absent".to_owned(), partition, ..Default::default() };
    let fetch = FetchRequest { partitions: (0..10_000).map(absent).collect(), ..Default::default() };
    let fetch = framed(&fetch.encode_to_vec());
    let attack = |channel: Channel| {
        let fetch = fetch.clone();
        async move {
            call_without_reading(channel, "/strandline.v1.Log/Fetch", |closed| open_body(vec![fetch.clone()], closed))
                .await
        }
    };
    target.attack_for_a_while("fetches of absent partitions", target.on_streams(streams / 10, attack).await).await;

    // Regression: each stream kept the buffers of its largest request and of its last response: 1.7 and 1.3 GB.
    let absent = wire::append_plain("absent", 0, vec![Bytes::from(vec![7; 30 << 20])]);
    let produce = framed(&ProduceRequest { append: Some(absent), ..Default::default() }.encode_to_vec());
    let attack = move |channel: Channel| {
        let produce = produce.clone();
        async move {
            call_without_reading(channel, "/strandline.v1.Log/Produce", |closed| {
                open_body(vec![produce.clone()], closed)
            })
            .await
        }
    };
    target.attack_for_a_while("producers that were loud once", target.on_connections(60, 65_535, attack)).await;
    let last = FetchPartition { offset: 3, ..fetch_partition(0) };
    let fetch = framed(&FetchRequest { partitions: vec![last], ..Default::default() }.encode_to_vec());
    let attack = |channel: Channel| {
        let fetch = fetch.clone();
        async move {
            let (_alive, closed) = oneshot::channel();
            let response = call(channel, "/strandline.v1.Log/Fetch", open_body(vec![fetch], closed)).await;
            let mut body = response.expect("the read succeeds").into_body();
            while body.frame().await.is_some() {}
        }
    };
    target.attack_for_a_while("consumers that are at the end", target.on_streams(300, attack).await).await;

    // Regression: eight batches at a time were read before there was memory for one.
    for (name, partitions) in [("batches of 4 MiB", (0..FILLED).collect()), ("batches of 56 MiB", LARGE.to_vec())] {
        let fetches = partitions.iter().map(|partition| fetch_partition(*partition)).collect();
        let read = ReadRequest { partitions: fetches, max_bytes: 1, ..Default::default() };
        let read = Bytes::from(read.encode_to_vec());
        let query = |partition| {
            let at = Some(At::TimestampMs(0));
            OffsetQuery { topic: "t".to_owned(), partition, at }
        };
        let queries = partitions.iter().map(|partition| query(*partition)).cycle().take(64).collect();
        let search = Bytes::from(ListOffsetsRequest { queries }.encode_to_vec());
        let attack = |channel: Channel| repeat(channel, READ, read.clone());
        target.attack_for_a_while(&format!("{name} read small"), target.on_streams(100, attack).await).await;
        let attack = |channel: Channel| repeat(channel, "/strandline.v1.Log/ListOffsets", search.clone());
        target.attack_for_a_while(&format!("{name} searched by time"), target.on_streams(100, attack).await).await;
    }

    let mut attacks =
        target.on_connections(connections / 2, 0, windows).into_iter().map(FutureExt::boxed).collect::<Vec<_>>();
    let attack = |channel: Channel| async move {
        call_without_reading(channel, APPEND, |closed| withheld_body(60_000, 59_999, closed)).await
    };
    attacks.extend(target.on_streams(streams / 2, attack).await.into_iter().map(FutureExt::boxed));
    let read = ReadRequest {
        partitions: (0..FILLED).map(fetch_partition).collect(),
        max_bytes: 16 << 20,
        ..Default::default()
    };
    let read = Bytes::from(read.encode_to_vec());
    let attack = |channel: Channel| {
        let read = read.clone();
        async move { call_without_reading(channel, READ, |_| complete_body(&read)).await }
    };
    attacks.extend(target.on_streams(100, attack).await.into_iter().map(FutureExt::boxed));
    let append = wire::append_batch("t", 9, wire::batch(&[&vec![7; 4 << 20]]));
    let append = Bytes::from(append.encode_to_vec());
    let attack = move |channel: Channel| repeat(channel, APPEND, append.clone());
    attacks.extend(target.on_connections(8, 65_535, attack).into_iter().map(FutureExt::boxed));
    let attack = |channel: Channel| {
        let all = all.clone();
        async move { call_without_reading(channel, METADATA, |_| complete_body(&all)).await }
    };
    attacks.extend(target.on_streams(1000, attack).await.into_iter().map(FutureExt::boxed));
    target.attack_for_a_while("everything at once", attacks).await;
    target.check_freed(before);
}

/// The object store serves reads and accepts no object, so that appends wait for it until they time out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_is_bounded_under_waiting_tiered_appends() {
    const APPENDS: i32 = 20;
    let server = tokio::task::block_in_place(S3::begin);
    let target = Target::start_on(BrokerInstance::new().object_store(&server), Scale::of_environment()).await;
    target.fill().await;
    wire::create_topic(target.address(), "waits", 8, &[("segment.ms", "200")]).await;
    for op in [Op::Put, Op::StartUpload] {
        server.faults().inject(op, Fault::Status(500), usize::MAX);
    }
    let single = wire::append_plain("waits", 0, vec![Bytes::from_static(b"one")]);
    let single = AppendRequest { acks: Acks::Tiered.into(), timeout_ms: 5_000, ..single };
    let refusal =
        wire::append(&mut wire::log(target.address()), single).await.expect_err("the object store rejects uploads");
    assert_eq!(refusal.number("base_offset"), Some(0), "the record is stored, and the append waited: {refusal:?}");
    let before = resident_bytes(target.broker.pid());
    let append = |number: i32| {
        let append = wire::append_plain("waits", number % 8, vec![Bytes::from(vec![7; 100])]);
        let append = AppendRequest { acks: Acks::Tiered.into(), timeout_ms: 60_000, ..append };
        let request = ProduceRequest { correlation_id: u64::from(number.unsigned_abs()), append: Some(append) };
        framed(&request.encode_to_vec())
    };
    let appends: Vec<Bytes> = (0..APPENDS).map(append).collect();
    let attack = |channel: Channel| {
        let appends = appends.clone();
        async move {
            call_without_reading(channel, "/strandline.v1.Log/Produce", |closed| open_body(appends.clone(), closed))
                .await
        }
    };
    target
        .attack_for_a_while("appends that wait for the bucket", target.on_streams(target.scale.streams, attack).await)
        .await;
    target.check_freed(before);
}
