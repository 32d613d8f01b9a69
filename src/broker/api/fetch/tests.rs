//! Content and memory of fetch responses.

use bytes::Bytes;

use super::*;
use crate::{
    broker::{Budgets, CallMemory, ProducerIdQuota, tests::TestBroker},
    cluster::EmbeddedStore,
    model::{Compression, PartitionId, TopicName},
    partition::ReadSource,
    record::BatchBuilder,
    task::{
        self,
        test_timeout::{wait_for, wait_until},
    },
};

/// A read outcome that does not fit into a response is the first of the next response. Regression: a batch as large as
/// a message was read again and again, because a small batch of another partition came first each time.
#[tokio::test]
async fn batch_that_does_not_fit_opens_next_response() {
    const MESSAGE: usize = 2500;
    let dir = tempfile::tempdir().unwrap();
    let bench = TestBroker::start(dir.path(), true).await;
    bench.create(&TopicName::new("t").unwrap(), 2).await;
    bench.append(0, 100, 0).await.unwrap();
    bench.append(1, 2400, 0).await.unwrap();
    let limits = FetchLimits { message_bytes: MESSAGE, ..FetchLimits::new(1, 0, 0) };
    let mut session = FetchSession::new(Arc::clone(&bench.broker.api.fetch), limits, bench.broker.api.call_memory());
    let want = |partition| v1::FetchPartition { topic: "t".to_owned(), partition, ..Default::default() };
    session.assign(vec![want(0), want(1)], true, false).unwrap();
    let partitions =
        |builder: &FetchResponseBuilder| builder.partitions.iter().map(|of| of.partition).collect::<Vec<_>>();

    let mut builder = FetchResponseBuilder::default();
    for (index, reader) in [0, 1].map(|index| (index, session.partitions[index].reader.clone().unwrap())) {
        let read = reader.read(Offset::ZERO, MESSAGE.into()).await;
        session.add_outcome((index, read), &mut builder);
    }
    assert!(partitions(&builder) == [0] && builder.full && builder.is_enough(limits.min_bytes));
    bench.append(0, 100, 0).await.unwrap();
    let mut builder = FetchResponseBuilder::default();
    session.gather_now(&mut builder);
    assert_eq!(partitions(&builder)[0], 1, "the large batch comes first");
    assert!(builder.bytes <= MESSAGE);

    // A new assignment drops the deferred outcome, and its partition continues at the offset of that outcome.
    session.assign(vec![want(0), want(1)], true, false).unwrap();
    let read = session.partitions[1].reader.clone().unwrap().read(Offset::ZERO, MESSAGE.into()).await;
    session.add_outcome((1, read), &mut FetchResponseBuilder { bytes: 200, ..FetchResponseBuilder::default() });
    session.assign(vec![want(1)], false, false).unwrap();
    assert_eq!(session.partitions[0].position, Offset::ZERO, "the batch was not returned yet");
    bench.stop().await;
}

/// An entry has records or an error, never both. Regression: clients that checked the error first lost the records of
/// the same entry, so the records before corrupt data were unreadable.
#[tokio::test]
async fn records_before_error_form_separate_response() {
    let dir = tempfile::tempdir().unwrap();
    let bench = TestBroker::start(dir.path(), true).await;
    bench.create(&TopicName::new("t").unwrap(), 1).await;
    bench.append(0, 100, 0).await.unwrap();
    let mut session = FetchSession::new(
        Arc::clone(&bench.broker.api.fetch),
        FetchLimits::new(1, 0, 0),
        bench.broker.api.call_memory(),
    );
    let want = v1::FetchPartition { topic: "t".to_owned(), ..Default::default() };
    session.assign(vec![want], true, false).unwrap();
    let read = session.partitions[0].reader.clone().unwrap().read(Offset::ZERO, (1 << 20).into()).await;
    let corrupt = ReadError::Corrupt { offset: Offset::new(1).unwrap(), reason: "a bit flipped".to_owned() };
    let mut responses = [FetchResponseBuilder::default(), FetchResponseBuilder::default()];
    session.add_outcome((0, read), &mut responses[0]);
    session.add_outcome((0, Err(corrupt)), &mut responses[0]);
    assert!(responses[0].is_enough(usize::MAX), "the response is sent");
    session.gather_now(&mut responses[1]);
    let has = |builder: &FetchResponseBuilder| {
        let [fetched] = &builder.partitions[..] else { panic!("one partition expected: {:?}", builder.partitions) };
        (fetched.chunks.is_empty(), fetched.next_offset, fetched.error.as_ref().map(|error| error.reason.clone()))
    };
    assert_eq!(responses.each_ref().map(has), [(false, 1, None), (true, 1, Some("DATA_CORRUPT".to_owned()))]);
    bench.stop().await;
}

/// A session with many partitions holds response memory for them until another assignment. Regression: a stream that
/// named 10,000 partitions held 3 MB uncharged, and a thousand such streams 3 GB.
#[tokio::test]
async fn named_partitions_are_charged_while_named() {
    let dir = tempfile::tempdir().unwrap();
    let bench = TestBroker::start(dir.path(), true).await;
    let budgets = Budgets::new(1 << 20, 64 << 20);
    let memory = CallMemory::new(budgets.clone(), budgets.open_connection(|| {}));
    let wanted = |count| {
        (0..count)
            .map(|partition| v1::FetchPartition { topic: "absent".to_owned(), partition, ..Default::default() })
            .collect::<Vec<_>>()
    };
    let session = || FetchSession::new(Arc::clone(&bench.broker.api.fetch), FetchLimits::new(1, 0, 0), memory.clone());
    let (mut first, mut second) = (session(), session());
    first.assign(wanted(3000), true, false).unwrap();
    let error = second.assign(wanted(3000), true, false).unwrap_err();
    assert_eq!((error.code, error.retryable), (ErrorCode::Overloaded, true));
    assert!(error.message.contains("limits.response_memory_bytes"), "{error}");
    second.assign(wanted(10), true, false).unwrap();
    first.assign(wanted(10), true, false).unwrap();
    assert_eq!(budgets.taken().1, 0);
    second.assign(wanted(3000), true, false).unwrap();
    let twice = v1::GetMetadataRequest { topics: vec!["t".to_owned(); 2], all_topics: false };
    let error = bench.broker.api.describe.metadata(&twice).unwrap_err();
    assert!(error.message.contains("named twice"), "{error}");
    bench.stop().await;
}

/// Regression: a request of 6 MB that named one partition 10,000 times delayed appends for 15 s.
#[tokio::test]
async fn duplicate_partition_in_fetch_is_rejected() {
    let dir = tempfile::tempdir().unwrap();
    let bench = TestBroker::start(dir.path(), true).await;
    bench.create(&TopicName::new("t").unwrap(), 2).await;
    let mut session = FetchSession::new(
        Arc::clone(&bench.broker.api.fetch),
        FetchLimits::new(1, 0, 0),
        bench.broker.api.call_memory(),
    );
    let want = |partition| v1::FetchPartition { topic: "t".to_owned(), partition, ..Default::default() };
    session.assign(vec![want(0), want(1)], true, false).unwrap();
    let error = session.assign(vec![want(0), want(1), want(0)], true, false).unwrap_err();
    assert_eq!(error.code, ErrorCode::InvalidRequest);
    assert!(error.message.contains("\"t\", partition 0 is named twice"), "{error}");
    bench.stop().await;
}

/// Regression: each response contained only the partition in memory, which was ready first. The read of the partition
/// on disk was dropped at the end of each call.
#[tokio::test]
async fn read_of_memory_and_disk_returns_both_partitions() {
    let dir = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::in_memory();
    let bench = TestBroker::with_store(dir.path(), false, store.clone()).await;
    let topic = bench.create(&TopicName::new("t").unwrap(), 2).await;
    bench.append(1, 100, 0).await.unwrap();
    bench.stop().await;
    let bench = TestBroker::with_store(dir.path(), false, store).await;
    let leads = |id| bench.broker.partitions.by_id(id).is_some_and(|partition| partition.status().role.leads());
    let leads_both = || [0, 1].iter().all(|index| leads(PartitionId::new(topic, *index)));
    wait_until("the broker leads both partitions", leads_both).await;
    bench.append(0, 100, 0).await.unwrap();
    let want = |partition| v1::FetchPartition { topic: "t".to_owned(), partition, ..Default::default() };
    let request = v1::ReadRequest { partitions: vec![want(0), want(1)], ..Default::default() };
    wait_for("one response has both partitions", async || {
        let read = bench.broker.api.fetch.read(request.clone(), bench.broker.api.call_memory()).await.unwrap();
        read.partitions.iter().all(|of| !of.chunks.is_empty()).then_some(())
    })
    .await;
    bench.stop().await;
}

#[tokio::test]
async fn read_returns_watermarks_of_every_partition() {
    let dir = tempfile::tempdir().unwrap();
    let bench = TestBroker::start(dir.path(), true).await;
    bench.create(&TopicName::new("t").unwrap(), 2).await;
    bench.append(1, 100, 0).await.unwrap();
    let want =
        |partition, offset| v1::FetchPartition { topic: "t".to_owned(), partition, offset, ..Default::default() };
    let request = v1::ReadRequest { partitions: vec![want(0, 0), want(1, 1)], ..Default::default() };
    let mut response = bench.broker.api.fetch.read(request, bench.broker.api.call_memory()).await.unwrap();
    response.partitions.sort_by_key(|fetched| fetched.partition);
    let watermarks =
        |fetched: &v1::FetchedPartition| (fetched.next_offset, fetched.high_watermark, fetched.error.is_none());
    assert_eq!(response.partitions.iter().map(watermarks).collect::<Vec<_>>(), [(0, 0, true), (1, 1, true)]);
    let request = v1::ReadRequest { partitions: vec![want(1, 7)], ..Default::default() };
    let response = bench.broker.api.fetch.read(request, bench.broker.api.call_memory()).await.unwrap();
    let refused = &response.partitions[0];
    assert_eq!(refused.error.as_ref().map(|error| error.reason.as_str()), Some("OFFSET_OUT_OF_RANGE"));
    assert_eq!(refused.high_watermark, 1);
    bench.stop().await;
}

/// Regression: a consumer continued at its old offset in a recreated topic, and skipped the first records of the new
/// topic.
#[tokio::test]
async fn request_with_id_of_deleted_topic_is_rejected() {
    let dir = tempfile::tempdir().unwrap();
    let bench = TestBroker::start(dir.path(), true).await;
    let name = TopicName::new("t").unwrap();
    let old = bench.create(&name, 1).await;
    bench.broker.api.topics.topics().delete(&name).await.unwrap();
    bench.broker.partitions.until(|partitions| partitions.topic(&name).is_none()).await;
    let new = bench.create(&name, 1).await;
    bench.append(0, 100, 0).await.unwrap();
    let read = async |id: String| {
        let want = v1::FetchPartition { topic: "t".to_owned(), topic_id: id, ..Default::default() };
        let request = v1::ReadRequest { partitions: vec![want], ..Default::default() };
        let mut response = bench.broker.api.fetch.read(request, bench.broker.api.call_memory()).await.unwrap();
        response.partitions.remove(0).error.map(ApiError::from)
    };
    let error = read(old.to_string()).await.expect("the id is of another topic");
    assert_eq!((error.code, error.retryable), (ErrorCode::TopicIdMismatch, false));
    assert_eq!(
        (&error.metadata["topic_id"], &error.metadata["requested_topic_id"]),
        (&new.to_string(), &old.to_string())
    );
    assert_eq!(read(new.to_string()).await, None);
    assert_eq!(read(String::new()).await, None, "without an id, the name decides");
    assert_eq!(read("x".to_owned()).await.map(|error| error.code), Some(ErrorCode::InvalidRequest));
    let (quota, memory) = (ProducerIdQuota::default(), bench.broker.api.call_memory());
    let append = |topic_id: String| {
        let records = vec![v1::Record::default()];
        let payload = Some(v1::append_request::Payload::Records(v1::RecordList { records }));
        let request = v1::AppendRequest { topic: "t".to_owned(), payload, topic_id, ..Default::default() };
        bench.broker.api.produce.append(request, &quota, &memory)
    };
    assert_eq!(append(old.to_string()).await.map_err(|error| error.code), Err(ErrorCode::TopicIdMismatch));
    assert_eq!(append(new.to_string()).await.map(|appended| appended.base_offset), Ok(1));
    bench.stop().await;
}

/// A partition of a recreated topic starts at the requested offset. Regression: the new assignment continued at the
/// position in the deleted topic, if the reader of the deleted topic had not failed yet.
#[tokio::test]
async fn recreated_topic_starts_at_requested_offset() {
    let dir = tempfile::tempdir().unwrap();
    let bench = TestBroker::start(dir.path(), true).await;
    let name = TopicName::new("t").unwrap();
    bench.create(&name, 1).await;
    let mut session = FetchSession::new(
        Arc::clone(&bench.broker.api.fetch),
        FetchLimits::new(1, 0, 0),
        bench.broker.api.call_memory(),
    );
    let want = || v1::FetchPartition { topic: "t".to_owned(), ..Default::default() };
    session.assign(vec![want()], true, false).unwrap();
    session.partitions[0].position = Offset::new(7).unwrap();
    session.assign(vec![want()], false, false).unwrap();
    assert_eq!(session.partitions[0].position, Offset::new(7).unwrap(), "the same topic: the position stays");
    bench.broker.api.topics.topics().delete(&name).await.unwrap();
    bench.broker.partitions.until(|partitions| partitions.topic(&name).is_none()).await;
    bench.create(&name, 1).await;
    session.assign(vec![want()], false, false).unwrap();
    assert_eq!(session.partitions[0].position, Offset::ZERO);
    bench.stop().await;
}

fn decoded_read() -> v1::ReadRequest {
    let want = v1::FetchPartition { topic: "t".to_owned(), ..Default::default() };
    v1::ReadRequest { partitions: vec![want], decode: true, ..Default::default() }
}

/// Regression: the memory for a record above 16 MiB exceeded the rest of the connection's share beside the response. So
/// the record was rejected on every retry.
#[tokio::test]
async fn decoded_record_above_connection_share_is_read() {
    const BYTES: usize = 17 << 20;
    let dir = tempfile::tempdir().unwrap();
    let bench = TestBroker::start(dir.path(), true).await;
    let name = TopicName::new("t").unwrap();
    let settings = [("max.message.bytes", "67108864"), ("compression.type", "zstd")];
    let config = settings.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    bench.create_with(&name, 1, config).await;
    bench.append(0, BYTES, 0).await.unwrap();
    for response_bytes in [16 << 20, 128 << 20] {
        let budgets = Budgets::new(1 << 20, response_bytes);
        let memory = CallMemory::new(budgets.clone(), budgets.open_connection(|| {}));
        let response = bench.broker.api.fetch.read(decoded_read(), memory).await.unwrap();
        let fetched = &response.partitions[0];
        assert_eq!(fetched.error, None);
        assert_eq!(fetched.records[0].value.as_ref().map(Bytes::len), Some(BYTES));
        assert_eq!(budgets.taken().1, 0, "all memory is freed");
    }
    bench.stop().await;
}

/// Starts a broker that leads both partitions of topic `t`. The records of the first partition are only on disk.
async fn with_records_on_disk(dir: &std::path::Path) -> TestBroker {
    let store = EmbeddedStore::in_memory();
    let bench = TestBroker::with_store(dir, false, store.clone()).await;
    let config = [("compression.type".to_owned(), "zstd".to_owned())].into_iter().collect();
    let topic = bench.create_with(&TopicName::new("t").unwrap(), 2, config).await;
    bench.append(0, 100, 0).await.unwrap();
    bench.stop().await;
    let bench = TestBroker::with_store(dir, false, store).await;
    let leads = |id| bench.broker.partitions.by_id(id).is_some_and(|partition| partition.status().role.leads());
    let leads_both = || [0, 1].iter().all(|index| leads(PartitionId::new(topic, *index)));
    wait_until("the broker leads both partitions", leads_both).await;
    bench
}

/// Runs `test` in a runtime with one thread for blocking work.
fn with_one_blocking_thread(test: impl Future<Output = ()>) {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_all().max_blocking_threads(1).build().unwrap().block_on(test);
}

/// Occupies the only thread for blocking work until the test sends on the returned channel.
fn occupy_thread() -> std::sync::mpsc::SyncSender<()> {
    let (free, freed) = std::sync::mpsc::sync_channel(1);
    assert!(Box::pin(task::run_blocking(move || freed.recv())).now_or_never().is_none());
    free
}

/// A call that its client resets stays charged until its blocking work ends. Regression: such calls freed their memory
/// at once, while 32 of their reads of 10 MiB each continued uncharged.
#[test]
fn reset_call_is_charged_until_blocking_work_ends() {
    with_one_blocking_thread(async {
        let dir = tempfile::tempdir().unwrap();
        let bench = with_records_on_disk(dir.path()).await;
        bench.append(1, 200 << 10, 0).await.unwrap();
        let free = occupy_thread();
        let want = |partition| v1::FetchPartition { topic: "t".to_owned(), partition, ..Default::default() };
        let query = v1::OffsetQuery {
            topic: "t".to_owned(),
            at: Some(v1::offset_query::At::TimestampMs(1)),
            ..Default::default()
        };
        let budgets = [0, 1, 2].map(|_| Budgets::new(1 << 20, 128 << 20));
        let memory = budgets.each_ref().map(|budgets| CallMemory::new(budgets.clone(), budgets.open_connection(|| {})));
        for (decode, partition) in [(false, 0), (true, 1)] {
            let request = v1::ReadRequest { partitions: vec![want(partition)], decode, ..Default::default() };
            let memory = memory[usize::from(decode)].clone();
            assert!(bench.broker.api.fetch.read(request, memory).now_or_never().is_none());
        }
        let request = v1::ListOffsetsRequest { queries: vec![query] };
        assert!(bench.broker.api.offsets.list_offsets(request, &memory[2]).now_or_never().is_none());
        let taken = budgets.each_ref().map(|budgets| budgets.taken().1);
        assert!(taken.iter().all(|taken| *taken >= 1 << 20), "{taken:?} for a read, a decompression and a look-up");
        free.send(()).unwrap();
        wait_for("all memory is freed", async || budgets.iter().all(|budgets| budgets.taken().1 == 0).then_some(()))
            .await;
        bench.stop().await;
    });
}

/// Reads that a new assignment drops stay charged until their blocking work ends. Regression: a client that sent its
/// partitions again and again started any number of reads within the memory of one response.
#[test]
fn dropped_reads_stay_charged_until_they_end() {
    with_one_blocking_thread(async {
        let dir = tempfile::tempdir().unwrap();
        let bench = with_records_on_disk(dir.path()).await;
        let free = occupy_thread();
        let budgets = Budgets::new(1 << 20, 128 << 20);
        let memory = CallMemory::new(budgets.clone(), budgets.open_connection(|| {}));
        let mut session = FetchSession::new(Arc::clone(&bench.broker.api.fetch), FetchLimits::new(1, 0, 0), memory);
        let want = v1::FetchPartition { topic: "t".to_owned(), ..Default::default() };
        let mut builder = FetchResponseBuilder::default();
        for dropped in 0..3 {
            session.assign(vec![want.clone()], true, false).unwrap();
            if session.needs_memory() {
                session.reserve(false).await;
            }
            session.gather_now(&mut builder);
            assert_eq!((session.reads.len(), budgets.taken().1), (1, (2 + dropped) << 20));
        }
        // The response is sent, and its read continues.
        session.on_response_built(0, 0);
        drop(session.memory.begin_sending(0));
        assert_eq!(budgets.taken().1, 3 << 20);
        free.send(()).unwrap();
        wait_for("the dropped reads end", async || (budgets.taken().1 == 1 << 20).then_some(())).await;
        session.reserve(false).await;
        while builder.bytes == 0 {
            session.wait_for_data(&mut builder).await;
        }
        assert_eq!((builder.partitions.len(), budgets.taken().1), (1, 2 << 20));
        drop(session);
        assert_eq!(budgets.taken().1, 0);
        bench.stop().await;
    });
}

/// A stream takes no read outcomes while it waits for memory. If the stream did not drop its own reads, it would wait
/// for memory that these reads hold.
#[test]
fn stream_waiting_for_memory_drops_its_reads() {
    with_one_blocking_thread(async {
        let dir = tempfile::tempdir().unwrap();
        let bench = with_records_on_disk(dir.path()).await;
        let free = occupy_thread();
        let budgets = Budgets::new(1 << 20, 8 << 20);
        let connection = budgets.open_connection(|| {});
        let memory = CallMemory::new(budgets.clone(), connection.clone());
        let mut session =
            FetchSession::new(Arc::clone(&bench.broker.api.fetch), FetchLimits::new(1, 256 << 10, 0), memory.clone());
        session.assign(vec![v1::FetchPartition { topic: "t".to_owned(), ..Default::default() }], true, false).unwrap();
        session.reserve(false).await;
        session.gather_now(&mut FetchResponseBuilder::default());
        assert_eq!(session.reads.len(), 1);
        session.on_response_built(0, 0);
        drop(session.memory.begin_sending(0));
        let others: Vec<_> = std::iter::from_fn(|| memory.try_response(64 << 10, 64 << 10)).collect();
        assert!(session.reserve(false).now_or_never().is_none());
        assert!(session.reads.is_empty() && session.ready.is_marked());
        drop(others);
        free.send(()).unwrap();
        let deadline = clock::monotonic() + Duration::from_secs(10);
        assert!(session.gather(false, deadline).await.unwrap().bytes > 0, "the partition is read again");
        bench.stop().await;
    });
}

/// Decoding of large data yields before it completes. Regression: a read of the last records of a large batch decoded
/// all preceding records without a yield.
#[tokio::test]
async fn decoding_yields_to_other_tasks() {
    const RECORDS: i64 = 100_000;
    let dir = tempfile::tempdir().unwrap();
    let bench = TestBroker::start(dir.path(), true).await;
    bench.create(&TopicName::new("t").unwrap(), 2).await;
    let mut batch = BatchBuilder::new(Compression::None);
    (0..RECORDS).for_each(|_| batch.push(clock::wall_ms(), None, None, &[]).unwrap());
    let payload = Some(v1::append_request::Payload::Batch(batch.finish(None).unwrap().to_bytes()));
    let request = v1::AppendRequest { topic: "t".to_owned(), payload, ..Default::default() };
    bench
        .broker
        .api
        .produce
        .append(request, &ProducerIdQuota::default(), &bench.broker.api.call_memory())
        .await
        .unwrap();
    for _ in 0..8 {
        bench.append(1, 20 << 10, 0).await.unwrap();
    }
    for (partition, offset, count) in [(0, RECORDS - 2, 2), (1, 0, 8)] {
        let want = v1::FetchPartition { topic: "t".to_owned(), partition, offset, ..Default::default() };
        let mut session = FetchSession::new(
            Arc::clone(&bench.broker.api.fetch),
            FetchLimits::new(1, 0, 0),
            bench.broker.api.call_memory(),
        );
        session.assign(vec![want], true, false).unwrap();
        let mut builder = session.gather(true, clock::monotonic() + Duration::from_secs(10)).await.unwrap();
        let mut decoding = Box::pin(session.decode(&mut builder));
        assert!(decoding.as_mut().now_or_never().is_none(), "partition {partition}");
        assert!(decoding.await.is_ok());
        let offsets: Vec<i64> = builder.partitions[0].records.iter().map(|record| record.offset).collect();
        assert_eq!(offsets, (offset..offset + count).collect::<Vec<_>>());
    }
    bench.stop().await;
}

/// After it is built, a response is charged only its own size. Regression: a decoded response with one small record
/// kept 32 MiB until it was sent.
#[tokio::test]
async fn decoded_response_is_charged_its_size() {
    let dir = tempfile::tempdir().unwrap();
    let bench = TestBroker::start(dir.path(), true).await;
    bench.create(&TopicName::new("t").unwrap(), 1).await;
    bench.append(0, 100, 0).await.unwrap();
    let budgets = Budgets::new(1 << 20, 128 << 20);
    let memory = CallMemory::new(budgets.clone(), budgets.open_connection(|| {}));
    bench.broker.api.fetch.read(decoded_read(), memory.clone()).await.unwrap();
    let taken = budgets.taken().1;
    assert!((1..=16 << 10).contains(&taken), "{taken}");
    drop(memory);
    assert_eq!(budgets.taken().1, 0);
    bench.stop().await;
}

/// A response that waits for `min_bytes` frees the memory that it does not need. Regression: a consumer of eight
/// partitions held 9 MiB during the wait.
#[tokio::test]
async fn delayed_response_frees_unused_memory() {
    let dir = tempfile::tempdir().unwrap();
    let bench = TestBroker::start(dir.path(), true).await;
    bench.create(&TopicName::new("t").unwrap(), 8).await;
    bench.append(0, 100, 0).await.unwrap();
    let budgets = Budgets::new(1 << 20, 128 << 20);
    let connection = budgets.open_connection(|| {});
    let memory = CallMemory::new(budgets.clone(), connection.clone());
    let mut session = FetchSession::new(Arc::clone(&bench.broker.api.fetch), FetchLimits::new(1 << 20, 0, 0), memory);
    let want = |partition| v1::FetchPartition { topic: "t".to_owned(), partition, ..Default::default() };
    session.assign((0..8).map(want).collect(), true, false).unwrap();
    let mut builder = FetchResponseBuilder::default();
    session.reserve(false).await;
    assert_eq!(budgets.taken().1, 9 << 20);
    while builder.bytes == 0 || !session.reads.is_empty() || session.ready.is_marked() {
        session.gather_now(&mut builder);
        tokio::task::yield_now().await;
    }
    assert!(session.wait_for_data(&mut builder).now_or_never().is_none());
    let taken = budgets.taken().1;
    assert!((1..=4 << 10).contains(&taken), "{taken}");

    // When more records arrive, the response takes the memory back. If other responses hold the memory, the response is
    // sent as it is.
    bench.append(1, 100, 0).await.unwrap();
    session.wait_for_data(&mut builder).await;
    session.gather_now(&mut builder);
    assert_eq!((budgets.taken().1, builder.full), (9 << 20, false));
    while !session.reads.is_empty() || session.ready.is_marked() {
        session.gather_now(&mut builder);
        tokio::task::yield_now().await;
    }
    assert!(session.wait_for_data(&mut builder).now_or_never().is_none());
    let others = CallMemory::new(budgets.clone(), connection);
    let _held = others.response(24 << 20, 1 << 20).await;
    let _small = others.response(16 << 20, 1 << 20).await;
    bench.append(2, 100, 0).await.unwrap();
    session.wait_for_data(&mut builder).await;
    session.gather_now(&mut builder);
    assert!(builder.full && builder.is_enough(session.min_bytes()));
    bench.stop().await;
}

/// A small response starts with memory for a batch of 64 KiB, and takes more after a read has found a larger batch.
/// Regression: every small response took more at its start, so the small pool served only 26 readers at a time.
#[tokio::test]
async fn small_response_grows_for_larger_batch() {
    let dir = tempfile::tempdir().unwrap();
    let bench = TestBroker::start(dir.path(), true).await;
    bench.create(&TopicName::new("t").unwrap(), 1).await;
    bench.append(0, 200 << 10, 0).await.unwrap();
    let budgets = Budgets::new(1 << 20, 128 << 20);
    let memory = CallMemory::new(budgets.clone(), budgets.open_connection(|| {}));
    let _others = memory.response(24 << 20, 0).await;
    let before = budgets.taken().1;
    let mut session = FetchSession::new(Arc::clone(&bench.broker.api.fetch), FetchLimits::new(1, 0, 0), memory);
    session.assign(decoded_read().partitions, true, false).unwrap();
    session.reserve(false).await;
    assert_eq!(budgets.taken().1 - before, 2 * (64 << 10));
    let deadline = clock::monotonic() + Duration::from_secs(10);
    let builder = session.gather(false, deadline).await.unwrap();
    assert!(builder.bytes > 200 << 10, "{} bytes", builder.bytes);
    assert!(budgets.taken().1 - before < 1 << 20);
    bench.stop().await;
}

/// A read of a batch on disk fails if its memory does not suffice for the batch, and is repeated with enough memory.
/// Regression: the first reads of large batches ran without memory for them, eight at a time.
#[tokio::test]
async fn large_batch_on_disk_waits_for_memory() {
    const BYTES: usize = 5 << 20;
    let dir = tempfile::tempdir().unwrap();
    // The appends below evict the batch of partition 0 from the tail cache, so its read needs the disk.
    let bench = TestBroker::start(dir.path(), true).await;
    let config = [("max.message.bytes".to_owned(), "67108864".to_owned())].into_iter().collect();
    bench.create_with(&TopicName::new("t").unwrap(), 2, config).await;
    bench.append(0, BYTES, 0).await.unwrap();
    let partition = bench.broker.api.fetch.lookup().partition("t", 0).unwrap();
    let reader = partition.reader().clone();
    let in_memory = |from| matches!(from, Some(FetchedBatches { source: ReadSource::Memory, .. }));
    while in_memory(reader.read(Offset::ZERO, 1.into()).await.unwrap()) {
        bench.append(1, BYTES, 0).await.unwrap();
    }
    let budgets = Budgets::new(1 << 20, 128 << 20);
    let memory = CallMemory::new(budgets.clone(), budgets.open_connection(|| {}));
    let mut session = FetchSession::new(Arc::clone(&bench.broker.api.fetch), FetchLimits::new(1, 0, 0), memory);
    session.assign(decoded_read().partitions, true, false).unwrap();
    session.reserve(false).await;
    let limits =
        ReadLimits { max_bytes: 1 << 20, max_batch_bytes: session.response_memory.as_ref().unwrap().batch_bytes };
    let refused = reader.read(Offset::ZERO, limits).await.unwrap_err();
    assert!(matches!(refused, ReadError::BatchTooLarge { bytes } if bytes > BYTES), "{refused}");
    let deadline = clock::monotonic() + Duration::from_secs(10);
    let builder = session.gather(false, deadline).await.unwrap();
    assert!(builder.bytes > BYTES && budgets.taken().1 > 2 * BYTES, "{} {:?}", builder.bytes, budgets.taken());
    bench.stop().await;
}

/// The records of a decoded response fit into one message. Regression: the records of one partition and the first
/// record of the next one exceeded a message, so the call failed on each retry.
#[tokio::test]
async fn decoded_response_ends_before_record_that_does_not_fit() {
    let dir = tempfile::tempdir().unwrap();
    let bench = TestBroker::start(dir.path(), true).await;
    let settings = [("max.message.bytes", "67108864"), ("compression.type", "zstd")];
    let config = settings.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    bench.create_with(&TopicName::new("t").unwrap(), 2, config).await;
    bench.append(0, 15 << 20, 0).await.unwrap();
    bench.append(1, 50 << 20, 0).await.unwrap();
    let want = |partition| v1::FetchPartition { topic: "t".to_owned(), partition, ..Default::default() };
    let read = async |partitions| {
        let request = v1::ReadRequest { partitions, decode: true, max_bytes: 16 << 20, ..Default::default() };
        let budgets = Budgets::new(1 << 20, 2 << 30);
        let memory = CallMemory::new(budgets.clone(), budgets.open_connection(|| {}));
        bench.broker.api.fetch.read(request, memory).await.unwrap().partitions
    };
    let both = read(vec![want(0), want(1)]).await;
    let bytes: usize =
        both.iter().flat_map(|of| &of.records).filter_map(|record| record.value.as_ref()).map(Bytes::len).sum();
    assert!(bytes > 0 && bytes < limits::MAX_MESSAGE_BYTES, "{bytes}");
    assert_eq!(read(vec![want(1)]).await[0].records.len(), 1, "the record is returned alone");
    bench.stop().await;
}
