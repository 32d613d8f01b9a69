//! Times until an outage of the object store is detected, and the responses that readers and writers get.

use super::*;

/// Creates topic `t` with this number of records, which only the object store has. Restarts the broker, so that its caches are empty.
fn history(with: impl FnOnce(Home) -> Home, records: usize) -> (S3, Home, Broker) {
    let (server, mut home, broker) = start(with);
    create(&home.cli(), "t", EAGER);
    home.cli().ok_with(&["produce", "t"], lines(records).as_bytes());
    settled(&home.cli(), "t", i64::try_from(records).expect("few"));
    assert!(broker.terminate().success(), "{}", home.log());
    let broker = home.start();
    (server, home, broker)
}

/// Reads topic `t` once from an offset. The read does not wait for records that do not exist.
async fn read_once(
    log: &mut v1::log_client::LogClient<tonic::transport::Channel>,
    offset: i64,
) -> v1::FetchedPartition {
    let place = v1::FetchPartition { topic: "t".to_owned(), offset, ..Default::default() };
    let request = v1::ReadRequest { partitions: vec![place], plain: true, ..Default::default() };
    let mut answer = log.read(request).await.expect("an answer").into_inner();
    assert_eq!(answer.partitions.len(), 1, "each partition is answered");
    answer.partitions.remove(0)
}

/// Regression: `max_wait_ms` also ended reads of the object store, and their data was dropped. 433 of 433 reads were empty, as at the end
/// of the log.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn short_reads_are_served_by_a_slow_object_store() {
    const RECORDS: i64 = 20_000;
    for cache in ["128MiB", "4MiB"] {
        let (server, home, _broker) = tokio::task::block_in_place(|| {
            history(
                |home| home.setting("cache.memory_bytes", format!("\"{cache}\"")).setting("cache.disk_bytes", "\"0\""),
                20_000,
            )
        });
        server.faults().inject(Op::Get, Fault::Delay(Duration::from_millis(400)), usize::MAX);
        let mut log = wire::log(home.grpc());
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
    let (server, home, _broker) =
        tokio::task::block_in_place(|| history(|home| home.setting("tier.fetch_max_wait", "\"1s\""), 2_000));
    // Three requests in sequence: manifest, footer, chunk.
    server.faults().inject(Op::Get, Fault::Delay(Duration::from_millis(900)), 3);
    let mut log = wire::log(home.grpc());
    let mut refused = 0;
    let read = loop {
        let read = read_once(&mut log, 0).await;
        let Some(error) = read.error else { break read };
        let refusal = ApiError::from(error);
        assert!(refusal.code == ErrorCode::ObjectStoreUnavailable && refusal.retryable, "{refusal:?}");
        assert!(refusal.message.contains("tier.fetch_max_wait"), "{refusal}");
        assert_eq!((read.high_watermark, read.next_offset), (2_000, 0), "it is not the end");
        refused += 1;
        assert!(refused < 20, "{refusal:?}");
    };
    assert!(!read.records.is_empty() && refused >= 1, "{refused}");
    let end = read_once(&mut log, 2_000).await;
    assert!(end.error.is_none() && end.next_offset == end.high_watermark, "the end looks like the end: {end:?}");
}

/// Starts outages of the object store until one is detected within `most`, so that other load on this machine does not count. One read of
/// old records from one of these offsets observes each outage. Each offset is in another object, of which no earlier read has left data in
/// memory.
async fn is_known_within(most: Duration, server: &S3, home: &Home, offsets: &[i64], begin: impl Fn(&Faults)) {
    let (mut log, mut took) = (wire::log(home.grpc()), Vec::new());
    for offset in offsets {
        begin(server.faults());
        let sent = clock::monotonic();
        let refusal = ApiError::from(read_once(&mut log, *offset).await.error.expect("the bucket serves nothing"));
        took.push(sent.elapsed());
        assert_eq!(refusal.code, ErrorCode::ObjectStoreUnavailable, "{refusal:?}");
        assert!(refusal.message.contains("served nothing"), "{refusal}");
        server.faults().clear();
        eventually_async("it is back", || {
            let mut log = log.clone();
            async move { Some(read_once(&mut log, *offset).await).filter(|read| read.error.is_none()) }
        })
        .await;
        if took.last().is_some_and(|took| *took < most) {
            return;
        }
    }
    panic!("known after {took:?}, and never within {most:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failing_object_store_is_detected_within_a_second() {
    let (server, home, _broker) = tokio::task::block_in_place(|| history(|home| home, 100_000));
    let second = Duration::from_secs(1);
    let offsets = [0, 10_000, 20_000, 30_000, 40_000];
    is_known_within(second, &server, &home, &offsets, |faults| faults.set_down(true)).await;
    let fails = |faults: &Faults| faults.inject(Op::Get, Fault::Status(500), usize::MAX);
    is_known_within(second, &server, &home, &offsets.map(|offset| offset + 50_000), fails).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tiered_reads_fail_at_once_until_object_store_returns() {
    let (server, home, _broker) = tokio::task::block_in_place(|| history(|home| home, 2_000));
    server.faults().set_down(true);
    let mut log = wire::log(home.grpc());
    let begin = clock::monotonic();
    for tries in 0..20 {
        let read = read_once(&mut log, 0).await;
        let refusal = ApiError::from(read.error.expect("the bucket is away"));
        assert!(refusal.code == ErrorCode::ObjectStoreUnavailable && refusal.retryable, "{tries}: {refusal:?}");
        assert!(refusal.message.contains("served nothing"), "{refusal}");
        assert_eq!(read.high_watermark, 2_000);
    }
    // The first read returns when the outage is certain, and nineteen return at once. Otherwise each would take five seconds.
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
    let place = v1::FetchPartition { topic: "t".to_owned(), ..Default::default() };
    let request = v1::FetchRequest { partitions: vec![place], ..Default::default() };
    let requests = futures::stream::iter([request]).chain(futures::stream::pending());
    let mut stream = log.fetch(requests).await.expect("a stream").into_inner();
    let said = tokio::time::timeout(Duration::from_secs(20), stream.message()).await.expect("soon").expect("an answer");
    let said = said.expect("it goes on").partitions.remove(0);
    assert_eq!(said.error.map(|error| error.reason).as_deref(), Some("OBJECT_STORE_UNAVAILABLE"));

    server.faults().set_down(false);
    let read = eventually_async("it is back", || {
        let mut log = log.clone();
        async move { Some(read_once(&mut log, 0).await).filter(|read| read.error.is_none()) }
    });
    assert!(!read.await.records.is_empty());
}

/// An object store that accepts every request and responds to none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_object_store_is_detected_before_a_read_times_out() {
    let (server, home, _broker) =
        tokio::task::block_in_place(|| history(|home| home.setting("tier.fetch_max_wait", "\"60s\""), 50_000));
    let silent = |faults: &Faults| faults.inject(Op::Get, Fault::Delay(Duration::from_secs(3_600)), usize::MAX);
    is_known_within(Duration::from_secs(5), &server, &home, &[0, 10_000, 20_000, 30_000], silent).await;
    silent(server.faults());
    let mut log = wire::log(home.grpc());
    let _first = read_once(&mut log, 40_000).await;
    let begin = clock::monotonic();
    for _ in 0..10 {
        let refusal = ApiError::from(read_once(&mut log, 40_000).await.error.expect("the bucket is silent"));
        assert_eq!(refusal.code, ErrorCode::ObjectStoreUnavailable, "{refusal:?}");
    }
    assert!(begin.elapsed() < Duration::from_secs(20), "all of them at once: {:?}", begin.elapsed());
}

/// Appends with `acks=tiered` in a stream. Returns the stream of responses, and the cause of the wait in the first response.
async fn cause_of_the_wait(
    log: &mut v1::log_client::LogClient<Channel>,
    timeout_ms: u32,
) -> (tonic::Streaming<v1::ProduceResponse>, v1::Error) {
    let first = v1::ProduceRequest { correlation: 7, append: Some(tiered(timeout_ms)) };
    let requests = futures::stream::iter([first]).chain(futures::stream::pending());
    let mut answers = log.produce(requests).await.expect("a stream").into_inner();
    let notice =
        tokio::time::timeout(Duration::from_secs(20), answers.message()).await.expect("soon").expect("a notice");
    let notice = notice.expect("it goes on");
    let Some(v1::produce_response::Result::Waiting(why)) = notice.result else { panic!("{notice:?}") };
    assert_eq!((notice.correlation, why.reason.as_str()), (7, "OBJECT_STORE_UNAVAILABLE"));
    (answers, why)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tiered_appends_report_outage_and_later_ones_are_refused() {
    let (server, home, _broker) = tokio::task::block_in_place(|| start(|home| home));
    wire::create_topic(home.grpc(), "t", 1, &[("segment.ms", "86400000")]).await;
    let mut log = wire::log(home.grpc());
    wire::append(&mut log, tiered(30_000)).await.expect("the bucket is there");
    // The first attempt that is fast enough counts, so that other load on this machine does not matter.
    let mut took = Vec::new();
    let (mut answers, end) = loop {
        server.faults().set_down(true);
        let begin = clock::monotonic();
        let (mut answers, why) = cause_of_the_wait(&mut log, 6_000).await;
        took.push(begin.elapsed());
        assert!(why.message.contains("served nothing"), "{why:?}");
        let end = wire::latest(&mut log, "t", 0).await.expect("answered");
        if took.last().is_some_and(|took| *took < Duration::from_secs(1)) {
            break (answers, end);
        }
        assert!(took.len() < 5, "told after {took:?}, and never within a second");
        server.faults().set_down(false);
        // The append may time out before the upload is retried.
        if let Err(late) = final_answer(&mut answers, Duration::from_secs(30)).await {
            assert_eq!(late.code, ErrorCode::Timeout, "{late:?}");
        }
        eventually_async("the bucket takes objects again", || {
            let mut log = log.clone();
            async move { wire::append(&mut log, tiered(30_000)).await.ok() }
        })
        .await;
    };
    let refusal = wire::append(&mut log, tiered(30_000)).await.expect_err("it could only wait");
    assert!(refusal.code == ErrorCode::ObjectStoreUnavailable && refusal.retryable, "{refusal:?}");
    assert_eq!(wire::latest(&mut log, "t", 0).await.expect("answered"), end, "it was not appended");

    let refusal = final_answer(&mut answers, Duration::from_secs(20)).await.expect_err("its time is up");
    assert_eq!(refusal.code, ErrorCode::Timeout, "{refusal:?}");
    assert_eq!(
        (refusal.number("base_offset"), refusal.number("end_offset")),
        (Some(end - 1), Some(end)),
        "{refusal:?}"
    );
    assert!(refusal.metadata["cause"].contains("served nothing"), "{refusal:?}");
    let output = tokio::task::block_in_place(|| {
        home.cli().run_with(&["produce", "t", "--acks", "tiered", "--timeout", "4"], b"x\n")
    });
    assert!(output.code == 1 && output.stderr.contains("served nothing"), "{output:?}");
}

/// Regression: the object store served reads, so no problem was detected, and the cause was reported only with the timeout.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tiered_append_reports_why_uploads_fail() {
    let (server, home, _broker) = tokio::task::block_in_place(|| start(|home| home));
    wire::create_topic(home.grpc(), "t", 1, &[]).await;
    let mut log = wire::log(home.grpc());
    wire::append(&mut log, tiered(30_000)).await.expect("the bucket is there");
    for op in [Op::Put, Op::StartUpload] {
        server.faults().inject(op, Fault::Status(403), usize::MAX);
    }
    let (mut answers, why) = cause_of_the_wait(&mut log, 60_000).await;
    assert!(why.message.contains("the upload failed"), "{why:?}");
    server.faults().clear();
    final_answer(&mut answers, Duration::from_secs(60)).await.expect("it is in the bucket");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn appends_that_wait_for_object_store_hold_no_memory() {
    let (server, home, _broker) =
        tokio::task::block_in_place(|| start(|home| home.setting("limits.produce_memory_bytes", 1 << 20)));
    tokio::task::block_in_place(|| create(&home.cli(), "t", &["segment.bytes=1073741824"]));
    // No problem is detected: the object store is only slow.
    server.faults().inject(Op::Put, Fault::Delay(Duration::from_secs(20)), usize::MAX);
    let mut log = wire::log(home.grpc());
    let append = |correlation| {
        let append = wire::append_plain("t", 0, vec![Bytes::from(vec![7; 300_000])]);
        let append = v1::AppendRequest { acks: Acks::Tiered.into(), timeout_ms: 30_000, ..append };
        v1::ProduceRequest { correlation, append: Some(append) }
    };
    let requests = futures::stream::iter((0..20).map(append)).chain(futures::stream::pending());
    let _answers = log.produce(requests).await.expect("a stream").into_inner();
    eventually_async("all are stored, six times what the memory holds", || {
        let mut log = log.clone();
        async move { (wire::latest(&mut log, "t", 0).await.ok()? == 20).then_some(()) }
    })
    .await;
    let began = clock::monotonic();
    let other = wire::append_plain("t", 0, vec![Bytes::from(vec![7; 900_000])]);
    wire::append(&mut log, other).await.expect("there is room");
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    let refusal = wire::append(&mut log, tiered(600_001)).await.expect_err("no append waits for so long");
    assert!(refusal.code == ErrorCode::InvalidRequest && refusal.message.contains("600000"), "{refusal:?}");
}
