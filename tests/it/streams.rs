//! Measures how much many fetch streams delay appends. `make streams` runs this test with a release build; the test
//! takes some minutes.

use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use strandline::{
    proto::v1::{self, log_client::LogClient},
    task::{Tasks, clock},
};
use tonic::{Streaming, transport::Channel};

use crate::{broker::BrokerInstance, wire};

/// Maximum number of streams on one connection.
const PER_CONNECTION: usize = 100;

/// Appends records to one partition, each after the acknowledgement of the previous one and a pause. Returns the 99th
/// percentile of the time until the acknowledgement.
async fn measure_append_p99(log: &mut LogClient<Channel>, appends: usize, pause: Duration) -> Duration {
    let mut took = Vec::new();
    for _ in 0..appends {
        tokio::time::sleep(pause).await;
        let begin = clock::monotonic();
        wire::append(log, wire::append_plain("t", 0, vec![Bytes::from_static(b"x")])).await.expect("acknowledged");
        took.push(begin.elapsed());
    }
    took.sort_unstable();
    took[took.len() * 99 / 100]
}

/// Appends until no stream gets another response, because the HTTP/2 windows of all streams are full. Later appends
/// then cause no responses. Returns the number of appends.
async fn fill_windows(instance: &BrokerInstance, log: &mut LogClient<Channel>) -> usize {
    let responses = || tokio::task::block_in_place(|| instance.metric("strandline_fetch_requests_total"));
    let (begin, mut appends, mut made) = (clock::monotonic(), 0, responses());
    loop {
        measure_append_p99(log, 100, Duration::ZERO).await;
        appends += 100;
        let now = responses();
        if now == made {
            return appends;
        }
        made = now;
        assert!(
            begin.elapsed() < Duration::from_secs(300),
            "{made} responses after {appends} appends, and the number still grows"
        );
    }
}

/// Opens this number of fetch streams on partition 0, which start at `offset`.
async fn open(instance: &BrokerInstance, count: usize, offset: i64) -> Vec<Streaming<v1::FetchResponse>> {
    let mut opened = Vec::new();
    for _ in 0..count.div_ceil(PER_CONNECTION) {
        let log = wire::log(instance.grpc());
        let left = PER_CONNECTION.min(count - opened.len());
        let streams = (0..left).map(|_| {
            let mut log = log.clone();
            async move {
                let partition = v1::FetchPartition { topic: "t".to_owned(), offset, ..Default::default() };
                let request = v1::FetchRequest { partitions: vec![partition], ..Default::default() };
                let requests = stream::iter([request]).chain(stream::pending());
                log.fetch(requests).await.expect("a stream").into_inner()
            }
        });
        opened.extend(futures::future::join_all(streams).await);
    }
    opened
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "10,000 streams: make streams"]
async fn ten_thousand_streams_delay_no_acknowledgement() {
    let mut instance = BrokerInstance::new();
    let _broker = tokio::task::block_in_place(|| instance.start());
    wire::create_topic(instance.grpc(), "t", 1, &[("durability", "replicated")]).await;
    let mut log = wire::log(instance.grpc());
    let _warm = measure_append_p99(&mut log, 500, Duration::ZERO).await;

    let ten = open(&instance, 10, 0).await;
    fill_windows(&instance, &mut log).await;
    let few = measure_append_p99(&mut log, 5_000, Duration::ZERO).await;
    drop(ten);
    let end = wire::latest(&mut log, "t", 0).await.expect("a response");
    let idle = open(&instance, 10_000, end).await;
    let filled = fill_windows(&instance, &mut log).await;
    println!("the windows of 10,000 streams were full after {filled} appends");
    let many = measure_append_p99(&mut log, 5_000, Duration::ZERO).await;
    println!("streams that read nothing: p99 of an append with 10: {few:?}, with 10,000: {many:?}");
    drop(idle);

    let end = wire::latest(&mut log, "t", 0).await.expect("a response");
    let tasks = Tasks::new();
    for mut stream in open(&instance, 10_000, end).await {
        tasks.spawn("reader", async move { while let Ok(Some(_)) = stream.message().await {} });
    }
    let reading = measure_append_p99(&mut log, 60, Duration::from_secs(1)).await;
    println!("streams that continue to read: p99 of an append a second with 10,000: {reading:?}");
    tasks.cancel();
    assert!(many <= few * 12 / 10, "{many:?} instead of {few:?}");
    assert!(reading < Duration::from_millis(50), "{reading:?}");
}
