//! Times until an outage of the object store is detected, and the responses that readers and writers get.

use super::*;

/// Starts an S3 server and a broker, and creates topic `t` with this number of records, which only the object store
/// has. Then restarts the broker, so that its caches are empty.
fn start_with_history(
    with: impl FnOnce(BrokerInstance) -> BrokerInstance,
    records: usize,
) -> (S3, BrokerInstance, Broker) {
    let (server, mut instance, broker) = start(with);
    create(&instance.cli(), "t", EAGER);
    instance.cli().ok_with(&["produce", "t"], lines(records).as_bytes());
    wait_until_tiered(&instance.cli(), "t", i64::try_from(records).expect("the number is small"));
    assert!(broker.terminate().success(), "{}", instance.log());
    let broker = instance.start();
    (server, instance, broker)
}

/// Reads topic `t` once from an offset. The read does not wait for records that do not exist.
async fn read_once(
    log: &mut v1::log_client::LogClient<tonic::transport::Channel>,
    offset: i64,
) -> v1::FetchedPartition {
    let partition = v1::FetchPartition { topic: "t".to_owned(), offset, ..Default::default() };
    let request = v1::ReadRequest { partitions: vec![partition], decode: true, ..Default::default() };
    let mut response = log.read(request).await.expect("a response").into_inner();
    assert_eq!(response.partitions.len(), 1, "each partition has a response");
    response.partitions.remove(0)
}

/// Regression: `max_wait_ms` also ended reads of the object store, and their data was dropped. 433 of 433 reads were
/// empty, as at the end of the log.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn short_reads_are_served_by_a_slow_object_store() {
    const RECORDS: i64 = 20_000;
    for cache in ["128MiB", "4MiB"] {
        let (server, instance, _broker) = tokio::task::block_in_place(|| {
            start_with_history(
                |instance| {
                    instance.setting("cache.memory_bytes", format!("\"{cache}\"")).setting("cache.disk_bytes", "\"0\"")
                },
                20_000,
            )
        });
        server.faults().inject(Op::Get, Fault::Delay(Duration::from_millis(400)), usize::MAX);
        let mut log = wire::log(instance.grpc());
        let mut next = 0;
        for _ in 0..10 {
            let read = read_once(&mut log, next).await;
            assert!(read.error.is_none() && !read.records.is_empty(), "{cache}: at {next}: {:?}", read.error);
            assert_eq!((read.log_start, read.high_watermark), (0, RECORDS));
            next = read.next_offset;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn read_reports_its_timeout_and_keeps_fetched_data() {
    let (server, instance, _broker) = tokio::task::block_in_place(|| {
        start_with_history(|instance| instance.setting("tier.fetch_max_wait", "\"1s\""), 2_000)
    });
    // Three requests in sequence: manifest, footer, chunk.
    server.faults().inject(Op::Get, Fault::Delay(Duration::from_millis(900)), 3);
    let mut log = wire::log(instance.grpc());
    let mut refused = 0;
    let read = loop {
        let read = read_once(&mut log, 0).await;
        let Some(error) = read.error else { break read };
        let refusal = ApiError::from(error);
        assert!(refusal.code == ErrorCode::ObjectStoreUnavailable && refusal.retryable, "{refusal:?}");
        assert!(refusal.message.contains("tier.fetch_max_wait"), "{refusal}");
        assert_eq!((read.high_watermark, read.next_offset), (2_000, 0), "this is not the last batch");
        refused += 1;
        assert!(refused < 20, "{refusal:?}");
    };
    assert!(!read.records.is_empty() && refused >= 1, "{refused}");
    let end = read_once(&mut log, 2_000).await;
    assert!(end.error.is_none() && end.next_offset == end.high_watermark, "the end is plausible: {end:?}");
}

/// Starts outages of the object store by `begin` until one is detected within `max`, so that other load on this machine
/// does not count. Panics if none is. One read of old records from one of these offsets observes each outage. Each
/// offset is in another object, of which no earlier read has left data in memory.
async fn check_detected_within(
    max: Duration,
    server: &S3,
    instance: &BrokerInstance,
    offsets: &[i64],
    begin: impl Fn(&Faults),
) {
    let (mut log, mut took) = (wire::log(instance.grpc()), Vec::new());
    for offset in offsets {
        begin(server.faults());
        let sent = clock::monotonic();
        let refusal =
            ApiError::from(read_once(&mut log, *offset).await.error.expect("the object store fails every request"));
        took.push(sent.elapsed());
        assert_eq!(refusal.code, ErrorCode::ObjectStoreUnavailable, "{refusal:?}");
        assert!(refusal.message.contains("has been unavailable"), "{refusal}");
        server.faults().clear();
        eventually_async("the object store is available again", || {
            let mut log = log.clone();
            async move { Some(read_once(&mut log, *offset).await).filter(|read| read.error.is_none()) }
        })
        .await;
        if took.last().is_some_and(|took| *took < max) {
            return;
        }
    }
    panic!("known after {took:?}, and never within {max:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failing_object_store_is_detected_within_a_second() {
    let (server, instance, _broker) = tokio::task::block_in_place(|| start_with_history(|instance| instance, 100_000));
    let second = Duration::from_secs(1);
    let offsets = [0, 10_000, 20_000, 30_000, 40_000];
    check_detected_within(second, &server, &instance, &offsets, |faults| faults.set_down(true)).await;
    let fails = |faults: &Faults| faults.inject(Op::Get, Fault::Status(500), usize::MAX);
    check_detected_within(second, &server, &instance, &offsets.map(|offset| offset + 50_000), fails).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tiered_reads_fail_at_once_until_object_store_returns() {
    let (server, instance, _broker) = tokio::task::block_in_place(|| start_with_history(|instance| instance, 2_000));
    server.faults().set_down(true);
    let mut log = wire::log(instance.grpc());
    let begin = clock::monotonic();
    for tries in 0..20 {
        let read = read_once(&mut log, 0).await;
        let refusal = ApiError::from(read.error.expect("the object store is unavailable"));
        assert!(refusal.code == ErrorCode::ObjectStoreUnavailable && refusal.retryable, "{tries}: {refusal:?}");
        assert!(refusal.message.contains("has been unavailable"), "{refusal}");
        assert_eq!(read.high_watermark, 2_000);
    }
    // The first read returns when the outage is certain, and nineteen return at once. Otherwise each would take five
    // seconds.
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
    let partition = v1::FetchPartition { topic: "t".to_owned(), ..Default::default() };
    let request = v1::FetchRequest { partitions: vec![partition], ..Default::default() };
    let requests = futures::stream::iter([request]).chain(futures::stream::pending());
    let mut stream = log.fetch(requests).await.expect("a stream").into_inner();
    let response = tokio::time::timeout(Duration::from_secs(20), stream.message())
        .await
        .expect("a response within the timeout")
        .expect("a response");
    let response = response.expect("the stream continues").partitions.remove(0);
    assert_eq!(response.error.map(|error| error.reason).as_deref(), Some("OBJECT_STORE_UNAVAILABLE"));

    server.faults().set_down(false);
    let read = eventually_async("the object store is available again", || {
        let mut log = log.clone();
        async move { Some(read_once(&mut log, 0).await).filter(|read| read.error.is_none()) }
    });
    assert!(!read.await.records.is_empty());
}

/// An object store that accepts every request and responds to none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_object_store_is_detected_before_a_read_times_out() {
    let (server, instance, _broker) = tokio::task::block_in_place(|| {
        start_with_history(|instance| instance.setting("tier.fetch_max_wait", "\"60s\""), 50_000)
    });
    let silent = |faults: &Faults| faults.inject(Op::Get, Fault::Delay(Duration::from_secs(3_600)), usize::MAX);
    check_detected_within(Duration::from_secs(5), &server, &instance, &[0, 10_000, 20_000, 30_000], silent).await;
    silent(server.faults());
    let mut log = wire::log(instance.grpc());
    let _first = read_once(&mut log, 40_000).await;
    let begin = clock::monotonic();
    for _ in 0..10 {
        let refusal =
            ApiError::from(read_once(&mut log, 40_000).await.error.expect("the object store does not respond"));
        assert_eq!(refusal.code, ErrorCode::ObjectStoreUnavailable, "{refusal:?}");
    }
    assert!(begin.elapsed() < Duration::from_secs(20), "the reads fail at once: {:?}", begin.elapsed());
}

/// Appends with `acks=tiered` in a stream. Returns the stream of responses, and the cause of the wait in the first
/// response.
async fn cause_of_the_wait(
    log: &mut v1::log_client::LogClient<Channel>,
    timeout_ms: u32,
) -> (tonic::Streaming<v1::ProduceResponse>, v1::Error) {
    let first = v1::ProduceRequest { correlation_id: 7, append: Some(tiered(timeout_ms)) };
    let requests = futures::stream::iter([first]).chain(futures::stream::pending());
    let mut responses = log.produce(requests).await.expect("a stream").into_inner();
    let notice = tokio::time::timeout(Duration::from_secs(20), responses.message())
        .await
        .expect("a response within the timeout")
        .expect("a notice");
    let notice = notice.expect("the stream continues");
    let Some(v1::produce_response::Result::Waiting(reason)) = notice.result else { panic!("{notice:?}") };
    assert_eq!((notice.correlation_id, reason.reason.as_str()), (7, "OBJECT_STORE_UNAVAILABLE"));
    (responses, reason)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tiered_appends_report_outage_and_later_ones_are_refused() {
    let (server, instance, _broker) = tokio::task::block_in_place(|| start(|instance| instance));
    wire::create_topic(instance.grpc(), "t", 1, &[("segment.ms", "86400000")]).await;
    let mut log = wire::log(instance.grpc());
    wire::append(&mut log, tiered(30_000)).await.expect("the object store exists");
    // The first attempt that is fast enough counts, so that other load on this machine does not matter.
    let mut took = Vec::new();
    let (mut responses, end) = loop {
        server.faults().set_down(true);
        let begin = clock::monotonic();
        let (mut responses, reason) = cause_of_the_wait(&mut log, 6_000).await;
        took.push(begin.elapsed());
        assert!(reason.message.contains("has been unavailable"), "{reason:?}");
        let end = wire::latest(&mut log, "t", 0).await.expect("a response");
        if took.last().is_some_and(|took| *took < Duration::from_secs(1)) {
            break (responses, end);
        }
        assert!(took.len() < 5, "known after {took:?}, and never within a second");
        server.faults().set_down(false);
        // The append may time out before the upload is retried.
        if let Err(late) = final_response(&mut responses, Duration::from_secs(30)).await {
            assert_eq!(late.code, ErrorCode::Timeout, "{late:?}");
        }
        eventually_async("uploads succeed again", || {
            let mut log = log.clone();
            async move { wire::append(&mut log, tiered(30_000)).await.ok() }
        })
        .await;
    };
    let refusal = wire::append(&mut log, tiered(30_000)).await.expect_err("the append would only wait");
    assert!(refusal.code == ErrorCode::ObjectStoreUnavailable && refusal.retryable, "{refusal:?}");
    assert_eq!(wire::latest(&mut log, "t", 0).await.expect("a response"), end, "the record was not appended");

    let refusal = final_response(&mut responses, Duration::from_secs(20)).await.expect_err("the timeout passed");
    assert_eq!(refusal.code, ErrorCode::Timeout, "{refusal:?}");
    assert_eq!(
        (refusal.number("base_offset"), refusal.number("end_offset")),
        (Some(end - 1), Some(end)),
        "{refusal:?}"
    );
    assert!(refusal.metadata["cause"].contains("has been unavailable"), "{refusal:?}");
    let output = tokio::task::block_in_place(|| {
        instance.cli().run_with(&["produce", "t", "--acks", "tiered", "--timeout", "4"], b"x\n")
    });
    assert!(output.code == 1 && output.stderr.contains("has been unavailable"), "{output:?}");
}

/// Regression: the object store served reads, so no problem was detected, and the cause was reported only with the
/// timeout.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tiered_append_reports_why_uploads_fail() {
    let (server, instance, _broker) = tokio::task::block_in_place(|| start(|instance| instance));
    wire::create_topic(instance.grpc(), "t", 1, &[]).await;
    let mut log = wire::log(instance.grpc());
    wire::append(&mut log, tiered(30_000)).await.expect("the object store exists");
    for op in [Op::Put, Op::StartUpload] {
        server.faults().inject(op, Fault::Status(403), usize::MAX);
    }
    let (mut responses, reason) = cause_of_the_wait(&mut log, 60_000).await;
    assert!(reason.message.contains("the upload failed"), "{reason:?}");
    server.faults().clear();
    final_response(&mut responses, Duration::from_secs(60)).await.expect("the record is in the object store");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn appends_that_wait_for_object_store_hold_no_memory() {
    let (server, instance, _broker) =
        tokio::task::block_in_place(|| start(|instance| instance.setting("limits.produce_memory_bytes", 1 << 20)));
    tokio::task::block_in_place(|| create(&instance.cli(), "t", &["segment.bytes=1073741824"]));
    // No problem is detected: the object store is only slow.
    server.faults().inject(Op::Put, Fault::Delay(Duration::from_secs(20)), usize::MAX);
    let mut log = wire::log(instance.grpc());
    let append = |correlation_id| {
        let append = wire::append_plain("t", 0, vec![Bytes::from(vec![7; 300_000])]);
        let append = v1::AppendRequest { acks: Acks::Tiered.into(), timeout_ms: 30_000, ..append };
        v1::ProduceRequest { correlation_id, append: Some(append) }
    };
    let requests = futures::stream::iter((0..20).map(append)).chain(futures::stream::pending());
    let _responses = log.produce(requests).await.expect("a stream").into_inner();
    eventually_async("all records are stored, six times the memory limit", || {
        let mut log = log.clone();
        async move { (wire::latest(&mut log, "t", 0).await.ok()? == 20).then_some(()) }
    })
    .await;
    let began = clock::monotonic();
    let other = wire::append_plain("t", 0, vec![Bytes::from(vec![7; 900_000])]);
    wire::append(&mut log, other).await.expect("memory is free");
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    let refusal = wire::append(&mut log, tiered(600_001)).await.expect_err("the timeout is above the limit");
    assert!(refusal.code == ErrorCode::InvalidRequest && refusal.message.contains("600000"), "{refusal:?}");
}
