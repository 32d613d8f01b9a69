//! Tests of the client against a fake broker that fails according to a script.

use std::time::Duration;

use super::{
    CallError, Client, ClientOptions, ConsumeError, ConsumerOptions, NewRecord, NewTopic, OffsetResetPolicy,
    OffsetSpec, Producer, ProducerOptions, SendError,
    fake_broker::{FakeBroker, FakeResponse},
    retry_status::RetryStatus,
};
use crate::{
    model::{AckDurability, Acks, Compression, Offset},
    proto::{
        error::{ApiError, ErrorCode},
        v1,
    },
    record::BatchBuilder,
    task::test_timeout::wait_until,
};

mod expired_lease;
mod read_replica;
mod reading;

async fn client(fake: &FakeBroker) -> Client {
    Client::connect(&fake.address.to_string(), ClientOptions::default()).await.expect("the fake broker responds")
}

/// Returns options for one record per batch, so that a script applies to records.
fn one_by_one() -> ProducerOptions {
    ProducerOptions { batch_bytes: 1, ..ProducerOptions::default() }
}

async fn send_numbers(producer: &Producer, numbers: std::ops::Range<u32>) -> Vec<super::Delivery> {
    let mut deliveries = Vec::new();
    for number in numbers {
        let value = number.to_string();
        deliveries.push(producer.send("t", NewRecord::value(value.as_bytes())).await.expect("queued"));
    }
    deliveries
}

fn numbers(range: std::ops::Range<u32>) -> Vec<String> {
    range.map(|number| number.to_string()).collect()
}

/// Sends twenty records while the fake broker fails by `actions`. Checks that each is in the log once, in order, and at
/// the offset of its acknowledgement.
async fn check_records_appended_once(actions: &[FakeResponse]) {
    let fake = FakeBroker::start(1).await;
    let producer = client(&fake).await.producer(one_by_one()).await.expect("an id");
    fake.script(actions);
    let deliveries = send_numbers(&producer, 0..20).await;
    for (number, delivery) in deliveries.into_iter().enumerate() {
        let ack = delivery.await.unwrap_or_else(|error| panic!("{number} under {actions:?}: {error}"));
        assert_eq!(ack.offset, Offset::new(u64::try_from(number).expect("small")), "under {actions:?}");
        assert_eq!(ack.durability, AckDurability::Persisted(1));
    }
    assert_eq!(fake.values(0), numbers(0..20), "under {actions:?}");
}

#[tokio::test]
async fn retries_keep_order_without_duplicates() {
    use FakeResponse::{Append, AppendAndBreak, AppendAndTimeOut, Break, Refuse};
    for actions in [
        &[Refuse(ErrorCode::NotLeader)][..],
        &[Append, Refuse(ErrorCode::Overloaded), Append, Append],
        &[AppendAndTimeOut],
        &[AppendAndTimeOut, Append, AppendAndTimeOut, Refuse(ErrorCode::NotReady)],
        &[Break],
        &[Append, AppendAndBreak],
        &[AppendAndBreak, AppendAndBreak, Break, AppendAndBreak],
        &[Append, Append, AppendAndTimeOut, Break, Refuse(ErrorCode::DiskFull), AppendAndBreak],
        // The broker reports that it has no state of the producer. It did not append the refused batch, so the batch is
        // sent again under a new producer id.
        &[Append, Append, Refuse(ErrorCode::UnknownProducer)],
        &[Refuse(ErrorCode::OutOfOrderSequence)],
    ] {
        check_records_appended_once(actions).await;
    }
}

#[tokio::test]
async fn refused_batch_fails_alone_and_later_batches_move_up() {
    let fake = FakeBroker::start(1).await;
    let producer = client(&fake).await.producer(one_by_one()).await.expect("an id");
    fake.script(&[FakeResponse::Append, FakeResponse::Refuse(ErrorCode::RecordTooLarge), FakeResponse::Append]);
    let mut results = Vec::new();
    for delivery in send_numbers(&producer, 0..6).await {
        results.push(delivery.await);
    }
    assert!(matches!(&results[1], Err(SendError::Refused { error, .. }) if error.code == ErrorCode::RecordTooLarge));
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 5);
    assert_eq!(fake.values(0), ["0", "2", "3", "4", "5"]);
}

#[tokio::test]
async fn maybe_appended_batch_is_not_repeated_under_new_id() {
    let fake = FakeBroker::start(1).await;
    let producer = client(&fake).await.producer(one_by_one()).await.expect("an id");
    // The batch is appended and its response lost; then the broker loses the producer's state.
    fake.script(&[FakeResponse::AppendAndTimeOut, FakeResponse::Refuse(ErrorCode::UnknownProducer)]);
    let first = producer.send("t", NewRecord::value(b"0")).await.expect("queued").await;
    assert!(matches!(first, Err(SendError::Unknown { .. })), "{first:?}");
    let second = producer.send("t", NewRecord::value(b"1")).await.expect("queued").await;
    assert_eq!(second.expect("under the new id").offset, Offset::new(1));
    assert_eq!(fake.values(0), ["0", "1"]);
}

#[tokio::test]
async fn responses_of_partitions_may_arrive_out_of_order() {
    let fake = FakeBroker::start(2).await;
    let producer = client(&fake).await.producer(one_by_one()).await.expect("an id");
    fake.script(&[FakeResponse::RespondLate, FakeResponse::Append]);
    let a = producer.send("t", NewRecord::value(b"a").partition(0)).await.expect("queued");
    let b = producer.send("t", NewRecord::value(b"b").partition(1)).await.expect("queued");
    assert_eq!(a.await.expect("acknowledged").partition, 0);
    assert_eq!(b.await.expect("acknowledged").partition, 1);
}

#[tokio::test]
async fn lost_response_with_acks_0_is_not_repeated() {
    let fake = FakeBroker::start(1).await;
    let options = ProducerOptions { acks: Acks::None, ..one_by_one() };
    let producer = client(&fake).await.producer(options).await.expect("started");
    fake.script(&[FakeResponse::AppendAndBreak]);
    let lost = producer.send("t", NewRecord::value(b"0")).await.expect("queued").await;
    assert!(matches!(lost, Err(SendError::Unknown { .. })), "{lost:?}");
    let ack = producer.send("t", NewRecord::value(b"1")).await.expect("queued").await.expect("accepted");
    assert_eq!(ack.offset, None, "acks=0 returns no offset");
    assert_eq!(fake.values(0), ["0", "1"]);
}

#[tokio::test]
async fn flush_sends_lingering_records_in_one_batch() {
    let fake = FakeBroker::start(1).await;
    let options = ProducerOptions { linger: Duration::from_secs(3600), ..ProducerOptions::default() };
    let producer = client(&fake).await.producer(options).await.expect("an id");
    let deliveries = send_numbers(&producer, 0..10).await;
    assert_eq!(fake.batches(0), 0, "a lingering batch is not sent");
    producer.flush().await.expect("acknowledged");
    assert_eq!(fake.batches(0), 1);
    for (number, delivery) in deliveries.into_iter().enumerate() {
        let ack = delivery.await.expect("acknowledged");
        assert_eq!((ack.offset, ack.count), (Offset::new(u64::try_from(number).expect("small")), 10));
    }
}

#[tokio::test]
async fn full_memory_sends_lingering_batches() {
    let fake = FakeBroker::start(1).await;
    let options = ProducerOptions {
        linger: Duration::from_secs(3600),
        batch_bytes: 4096,
        memory_bytes: 4096,
        ..ProducerOptions::default()
    };
    let producer = client(&fake).await.producer(options).await.expect("an id");
    for _ in 0..20 {
        let _delivery = producer.send("t", NewRecord::value(&[7; 1000])).await.expect("queued");
    }
    producer.close().await.expect("all acknowledged");
    let batches = fake.batches(0);
    assert!((5..=20).contains(&batches), "{batches} batches");
}

/// Regression: the sticky partition of keyless records changed only when a batch was full. Without a linger, a batch is
/// sent before it is full, so all records went to one partition.
#[tokio::test]
async fn keyless_records_sent_singly_reach_every_partition() {
    let fake = FakeBroker::start(4).await;
    let options = ProducerOptions { batch_bytes: 1000, ..one_by_one() };
    let producer = client(&fake).await.producer(options).await.expect("an id");
    for _ in 0..200 {
        let delivery = producer.send("t", NewRecord::value(&[b'x'; 200])).await.expect("queued");
        delivery.await.expect("acknowledged");
    }
    let counts: Vec<usize> = (0..4).map(|partition| fake.values(partition).len()).collect();
    assert!(counts.iter().all(|count| *count > 0), "{counts:?}");
    producer.close().await.expect("all acknowledged");
}

/// Partitions beyond the 256 batches that a stream carries at a time wait in a list of the stream, each once, and all
/// are sent. Regression: the producer checked every waiting partition at each response.
#[tokio::test]
async fn partitions_above_the_stream_window_are_all_sent() {
    let fake = FakeBroker::start(600).await;
    let options = ProducerOptions { memory_bytes: 64 << 10, ..ProducerOptions::default() };
    let producer = client(&fake).await.producer(options).await.expect("an id");
    for number in 0..3 {
        for partition in 0..600 {
            let value = number.to_string();
            let record = NewRecord::value(value.as_bytes()).partition(partition);
            let _delivery = producer.send("t", record).await.expect("queued");
        }
    }
    producer.close().await.expect("all acknowledged");
    for partition in 0..600 {
        assert_eq!(fake.values(partition), ["0", "1", "2"], "partition {partition}");
    }
}

#[tokio::test]
async fn refused_record_expires_with_its_last_problem() {
    let fake = FakeBroker::start(1).await;
    let options = ProducerOptions { delivery_timeout: Duration::from_millis(300), ..one_by_one() };
    // With the default maximum of one second, the pause after the last refusal may exceed the delivery timeout of the
    // second record.
    let short_pauses = ClientOptions { backoff_max: Duration::from_millis(20), ..ClientOptions::default() };
    let client = Client::connect(&fake.address.to_string(), short_pauses).await.expect("the fake broker responds");
    let producer = client.producer(options).await.expect("an id");
    fake.script(&[FakeResponse::Refuse(ErrorCode::DiskFull); 200]);
    let error = producer.send("t", NewRecord::value(b"x")).await.expect("queued").await.expect_err("refused");
    assert!(matches!(error, SendError::Expired { maybe_appended: false, .. }), "{error}");
    assert!(error.to_string().contains("refused as scripted"), "{error}");
    // The expired record leaves no gap in the sequence: the next record is accepted.
    fake.state().script.clear();
    let ack = producer.send("t", NewRecord::value(b"y")).await.expect("queued").await.expect("accepted");
    assert_eq!(ack.offset, Offset::new(0));
}

#[tokio::test]
async fn unknown_topic_or_partition_and_large_record_fail_at_once() {
    let fake = FakeBroker::start(2).await;
    let producer = client(&fake).await.producer(one_by_one()).await.expect("an id");
    let unknown = producer.send("nope", NewRecord::value(b"x")).await.expect_err("no such topic");
    assert!(unknown.to_string().contains("nope"), "{unknown}");
    let partition = producer.send("t", NewRecord::value(b"x").partition(7)).await.expect_err("no such partition");
    assert!(matches!(partition, SendError::UnknownPartition { partition: 7, partitions: 2, .. }), "{partition}");
    let large = producer.send("t", NewRecord::value(&vec![0; 2 << 20])).await.expect_err("too large");
    assert!(matches!(large, SendError::TooLarge { limit: 1_048_576, .. }), "{large}");
}

#[tokio::test]
async fn complete_batches_and_every_codec_arrive() {
    let fake = FakeBroker::start(1).await;
    let client = client(&fake).await;
    let mut sent = Vec::new();
    for compression in [Compression::Gzip, Compression::Snappy, Compression::Lz4, Compression::Zstd] {
        let options = ProducerOptions { compression, ..ProducerOptions::default() };
        let producer = client.producer(options).await.expect("an id");
        let _delivery = producer.send("t", NewRecord::value(compression.as_str().as_bytes())).await.expect("queued");
        let mut builder = BatchBuilder::new(compression);
        builder.push(1, None, Some(b"complete"), &[]).expect("fits");
        let batch = builder.finish(None).expect("not empty");
        producer.send_batch("t", 0, batch).await.expect("queued").await.expect("acknowledged");
        producer.close().await.expect("all acknowledged");
        sent.extend([compression.as_str().to_owned(), "complete".to_owned()]);
    }
    assert_eq!(fake.values(0), sent);
}

#[tokio::test]
async fn dropped_producer_fails_unacknowledged_records() {
    let fake = FakeBroker::start(1).await;
    let options = ProducerOptions { linger: Duration::from_secs(3600), ..ProducerOptions::default() };
    let producer = client(&fake).await.producer(options).await.expect("an id");
    let delivery = producer.send("t", NewRecord::value(b"x")).await.expect("queued");
    drop(producer);
    assert_eq!(delivery.await, Err(SendError::Closed));
}

/// Starts a fake broker with this number of records in topic "t".
async fn filled(records: u32) -> (FakeBroker, Client) {
    let fake = FakeBroker::start(1).await;
    let client = client(&fake).await;
    let producer = client.producer(one_by_one()).await.expect("an id");
    send_numbers(&producer, 0..records).await;
    producer.close().await.expect("all acknowledged");
    (fake, client)
}

#[tokio::test]
async fn broken_stream_neither_skips_nor_repeats_records() {
    let (fake, client) = filled(30).await;
    fake.state().fetches_until_break = Some(7);
    fake.state().corrupt_fetches = 2;
    let mut consumer = client.consumer(ConsumerOptions::default());
    consumer.assign("t", 0, OffsetSpec::Earliest).await.expect("assigned");
    for number in 0..30_u64 {
        if number == 20 {
            fake.state().fetches_until_break = Some(0);
        }
        let record = consumer.next().await.expect("read");
        assert_eq!(record.offset, Offset::new(number).expect("small"));
        assert_eq!(record.record.value.as_deref(), Some(number.to_string().as_bytes()));
        assert_eq!(consumer.position("t", 0).expect("assigned"), record.offset.plus(1));
    }
}

#[tokio::test]
async fn consumer_follows_log_and_seek_drops_old_records() {
    let (fake, client) = filled(10).await;
    let mut consumer = client.consumer(ConsumerOptions::default());
    consumer.assign("t", 0, OffsetSpec::Earliest).await.expect("assigned");
    assert_eq!(consumer.next().await.expect("read").offset, Offset::new(0).expect("small"));
    consumer.seek("t", 0, Offset::new(7).expect("small")).await.expect("assigned");
    assert_eq!(consumer.next().await.expect("read").offset, Offset::new(7).expect("small"));
    consumer.seek_to("t", 0, OffsetSpec::Latest).await.expect("assigned");
    let producer = client.producer(one_by_one()).await.expect("an id");
    let (next, ack) = tokio::join!(consumer.next(), async {
        producer.send("t", NewRecord::value(b"new")).await.expect("queued").await.expect("acknowledged")
    });
    assert_eq!(Some(next.expect("followed").offset), ack.offset);
    drop(fake);
}

#[tokio::test]
async fn out_of_range_position_fails_or_is_reset() {
    let (fake, client) = filled(10).await;
    fake.set_start(0, 4);
    let offset = |n| Offset::new(n).expect("small");
    let mut consumer = client.consumer(ConsumerOptions::default());
    consumer.assign_at("t", 0, offset(1)).await.expect("assigned");
    let error = consumer.next().await.expect_err("below the start");
    assert_eq!(
        error,
        ConsumeError::OutOfRange {
            topic: "t".into(),
            partition: 0,
            offset: offset(1),
            start: offset(4),
            end: offset(10)
        }
    );
    let options = ConsumerOptions { on_out_of_range: OffsetResetPolicy::Earliest, ..ConsumerOptions::default() };
    let mut consumer = client.consumer(options);
    consumer.assign_at("t", 0, offset(1)).await.expect("assigned");
    assert_eq!(consumer.next().await.expect("moved").offset, offset(4));
}

#[tokio::test]
async fn permanent_corruption_is_reported_and_not_returned() {
    let (fake, client) = filled(3).await;
    fake.state().corrupt_fetches = u32::MAX;
    let mut consumer = client.consumer(ConsumerOptions::default());
    consumer.assign("t", 0, OffsetSpec::Earliest).await.expect("assigned");
    let error = consumer.next().await.expect_err("corrupt");
    assert!(matches!(error, ConsumeError::Corrupt { .. }), "{error}");
}

/// Waits until the client's retry status satisfies `condition`, and returns it.
async fn status(client: &Client, condition: impl Fn(Option<&RetryStatus>) -> bool) -> Option<RetryStatus> {
    let mut watch = client.retries();
    let shown = watch.wait_for(|status| condition(status.as_ref()));
    let shown = tokio::time::timeout(Duration::from_secs(20), shown).await.expect("the status changes in time");
    shown.expect("the client exists").clone()
}

fn contains(text: impl Into<String>) -> impl Fn(Option<&RetryStatus>) -> bool {
    let text = text.into();
    move |status| status.is_some_and(|status| status.problem.contains(&text))
}

/// Regression, found by a user: the retry status showed nothing until the delivery timeout of two minutes, although
/// each attempt had an error.
#[tokio::test]
async fn producer_shows_retry_status_until_success() {
    let fake = FakeBroker::start(1).await;
    let client = client(&fake).await;
    let producer = client.producer(one_by_one()).await.expect("an id");
    assert_eq!(*client.retries().borrow(), None);
    fake.script(&[FakeResponse::Refuse(ErrorCode::DiskFull); 1000]);
    let delivery = producer.send("t", NewRecord::value(b"x")).await.expect("queued");
    let shown = status(&client, contains("t/0: refused as scripted")).await.expect("shown");
    assert!(shown.until.is_some_and(|until| until > shown.since), "the status has a deadline: {shown:?}");
    fake.state().script.clear();
    delivery.await.expect("accepted");
    status(&client, |status| status.is_none()).await;
}

#[tokio::test]
async fn expired_record_clears_the_retry_status() {
    let fake = FakeBroker::start(1).await;
    let client = client(&fake).await;
    let options = ProducerOptions { delivery_timeout: Duration::from_millis(200), ..one_by_one() };
    let producer = client.producer(options).await.expect("an id");
    fake.script(&[FakeResponse::Refuse(ErrorCode::DiskFull); 1000]);
    let delivery = producer.send("t", NewRecord::value(b"x")).await.expect("queued");
    status(&client, contains("refused as scripted")).await;
    delivery.await.expect_err("refused");
    status(&client, |status| status.is_none()).await;
}

#[tokio::test]
async fn unresponsive_broker_is_reported_before_expiry() {
    let fake = FakeBroker::start(1).await;
    let client = client(&fake).await;
    let options = ProducerOptions { acks: Acks::Tiered, ..one_by_one() };
    let producer = client.producer(options).await.expect("an id");
    fake.script(&[FakeResponse::Hold]);
    let _delivery = producer.send("t", NewRecord::value(b"x")).await.expect("queued");
    let shown = status(&client, contains("has not responded")).await.expect("shown");
    let address = fake.address.to_string();
    assert!(shown.problem.contains(&address) && shown.problem.contains("object store"), "{shown:?}");
}

/// The broker advertises an address that no client can reach. The retry status of producers, consumers and calls must
/// name this address and the broker that advertises it.
#[tokio::test]
async fn unreachable_leader_is_named_in_every_retry_status() {
    let fake = FakeBroker::start(1).await;
    let unused = std::net::TcpListener::bind("127.0.0.1:0").expect("bind").local_addr().expect("bound").to_string();
    fake.state().advertised = unused.clone();
    let options = ClientOptions { request_timeout: Duration::from_secs(2), ..ClientOptions::default() };
    let address = fake.address.to_string();
    let connect = || Client::connect(&address, options.clone());
    let producing = connect().await.expect("the fake broker responds");
    let producer = producing.producer(one_by_one()).await.expect("an id");
    let _delivery = producer.send("t", NewRecord::value(b"x")).await.expect("queued");
    let source = "(advertised by broker 1: grpc.advertise)";
    status(&producing, contains(format!("t/0: no broker responds at {unused}: connection refused {source}"))).await;

    let consuming = connect().await.expect("the fake broker responds");
    let mut consumer = consuming.consumer(ConsumerOptions::default());
    consumer.assign_at("t", 0, Offset::ZERO).await.expect("assigned");
    status(&consuming, contains(format!("t/0: {unused}: connection refused"))).await;

    let querying = connect().await.expect("the fake broker responds");
    let admin = querying.admin();
    let (shown, refused) = tokio::join!(
        status(&querying, contains(format!("the leader of t/0, {unused}: connection refused"))),
        admin.offset("t", 0, OffsetSpec::Latest),
    );
    assert!(shown.is_some_and(|shown| shown.until.is_some()));
    assert!(refused.expect_err("no broker listens").to_string().contains(&unused));
    assert_eq!(*querying.retries().borrow(), None, "a failed call leaves no retry status");
}

#[tokio::test]
async fn consumer_shows_retry_status_until_records_arrive() {
    let (fake, client) = filled(1).await;
    fake.state().unreadable = Some(ErrorCode::ObjectStoreUnavailable);
    let mut consumer = client.consumer(ConsumerOptions::default());
    consumer.assign_at("t", 0, Offset::ZERO).await.expect("assigned");
    status(&client, contains("t/0: unreadable as configured")).await;
    fake.state().unreadable = None;
    consumer.next().await.expect("read");
    status(&client, |status| status.is_none()).await;
}

/// At the end of a log no record arrives that would clear the problem: a stream that stays open clears it.
#[tokio::test]
async fn leader_recovery_at_log_end_clears_the_retry_status() {
    let (fake, client) = filled(1).await;
    fake.state().unreadable = Some(ErrorCode::NotLeader);
    let mut consumer = client.consumer(ConsumerOptions::default());
    consumer.assign_at("t", 0, Offset::new(1).expect("small")).await.expect("assigned");
    status(&client, contains("t/0: unreadable as configured")).await;
    fake.state().unreadable = None;
    status(&client, |status| status.is_none()).await;
    drop(consumer);
}

/// Regression, found by a user: if another server listened at the first bootstrap address, the client failed without
/// trying the other addresses.
#[tokio::test]
async fn every_bootstrap_address_is_tried_and_named() {
    let fake = FakeBroker::start(1).await;
    let unresponsive = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let unresponsive_address = unresponsive.local_addr().expect("bound");
    let other = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let other_address = other.local_addr().expect("bound");
    let tasks = crate::task::Tasks::new();
    // A gRPC server without the Admin service.
    let server = tonic::transport::Server::builder()
        .add_service(crate::proto::v1::log_server::LogServer::new(fake.clone()))
        .serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(other));
    tasks.spawn("another-server", server);
    let options = || ClientOptions { request_timeout: Duration::from_millis(500), ..ClientOptions::default() };
    let without_broker = format!("{other_address},{unresponsive_address}");
    let with_broker = format!("{without_broker},{}", fake.address);
    let client = Client::connect(&with_broker, options()).await.expect("the third address responds");
    client.topic("t").await.expect("known");
    let error = Client::connect(&without_broker, options()).await.expect_err("no address of a broker").to_string();
    drop(unresponsive);
    for text in [
        format!("{other_address}: the server is not a Strandline broker"),
        format!("{unresponsive_address}: no response in"),
    ] {
        assert!(error.contains(&text), "{text:?} is in {error:?}");
    }
    tasks.cancel();
}

/// Regression, found by a user: a topic may accept records larger than a producer's memory, and no producer could send
/// them.
#[tokio::test]
async fn record_larger_than_the_memory_is_sent() {
    let fake = FakeBroker::start(1).await;
    let options = ProducerOptions { memory_bytes: 4096, batch_bytes: 1, ..ProducerOptions::default() };
    let producer = client(&fake).await.producer(options).await.expect("an id");
    for bytes in [100, 100_000, 4096, 500_000, 7] {
        let _delivery = producer.send("t", NewRecord::value(&vec![b'x'; bytes])).await.expect("queued");
    }
    producer.close().await.expect("all acknowledged");
    let lengths: Vec<usize> = fake.values(0).iter().map(String::len).collect();
    assert_eq!(lengths, [100, 100_000, 4096, 500_000, 7]);
}

#[tokio::test]
async fn refused_address_fails_at_once() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = listener.local_addr().expect("bound").to_string();
    drop(listener);
    let error = Client::connect(&address, ClientOptions::default()).await.expect_err("no broker listens");
    assert_eq!(error.to_string(), format!("no broker responds at {address}: connection refused"));
}

/// Regression: a host that disappears breaks no connection. Producers of its partitions moved to the new leader only
/// after the pings of the connection had timed out.
#[tokio::test]
async fn unresponsive_leader_is_left_for_the_new_leader() {
    let (old, new) = (FakeBroker::start(1).await, FakeBroker::start(1).await);
    let producer = client(&old).await.producer(one_by_one()).await.expect("an id");
    old.script(&[FakeResponse::Hold; 3]);
    let sent = send_numbers(&producer, 0..3).await;
    old.state().advertised = new.address.to_string();
    let acknowledged = tokio::time::timeout(Duration::from_secs(4), futures::future::join_all(sent)).await;
    assert!(acknowledged.expect("the new leader responds soon").iter().all(Result::is_ok));
    assert_eq!(new.values(0), numbers(0..3));
}

/// Regression: with a full stream to an unresponsive leader, queues that waited for capacity in the stream never moved
/// to the new leader.
#[tokio::test]
async fn waiting_queues_leave_an_unresponsive_leader() {
    let (old, new) = (FakeBroker::start(40).await, FakeBroker::start(40).await);
    let producer = client(&old).await.producer(one_by_one()).await.expect("an id");
    old.script(&[FakeResponse::Hold; 1000]);
    let mut sent = Vec::new();
    for number in 0..640 {
        let record = NewRecord::value(b"x").partition(number % 40);
        sent.push(producer.send("t", record).await.expect("queued"));
    }
    old.state().advertised = new.address.to_string();
    let acknowledged = tokio::time::timeout(Duration::from_secs(8), futures::future::join_all(sent)).await;
    assert!(acknowledged.expect("the new leader responds soon").iter().all(Result::is_ok));
    assert!((0..40).all(|partition| new.batches(partition) == 16));
}

/// Regression: queues waited for capacity in the stream of an unresponsive leader. No metadata was requested for them,
/// once the queues with batches in flight had moved to a new leader.
#[tokio::test]
async fn queues_that_only_wait_refresh_metadata() {
    let (old, new) = (FakeBroker::start(40).await, FakeBroker::start(40).await);
    new.state().advertised = old.address.to_string();
    let client = client(&old).await;
    let producer = client.producer(one_by_one()).await.expect("an id");
    old.script(&[FakeResponse::Hold; 1000]);
    let mut sent = Vec::new();
    for number in 0..256 {
        sent.push(producer.send("t", NewRecord::value(b"x").partition(number % 16)).await.expect("queued"));
    }
    wait_until("the stream is full", || (0..16).all(|partition| old.batches(partition) == 16)).await;
    for partition in 16..40 {
        sent.push(producer.send("t", NewRecord::value(b"x").partition(partition)).await.expect("queued"));
    }
    for partition in 0..16 {
        let moved =
            ApiError::new(ErrorCode::NotLeader, "the partition moved").with("leader", 2).with("leader_epoch", 1);
        assert!(client.routing().apply_leader_hint("t", partition, &moved.with("address", new.address)));
    }
    wait_until("the busy queues have moved", || (0..16).all(|partition| new.batches(partition) == 16)).await;
    let requests = || old.state().metadata_requests + new.state().metadata_requests;
    let before = requests();
    wait_until("the waiting queues refresh metadata", || requests() > before + 5).await;
    for fake in [&old, &new] {
        fake.state().advertised = new.address.to_string();
    }
    let acknowledged = tokio::time::timeout(Duration::from_secs(8), futures::future::join_all(sent)).await;
    assert!(acknowledged.expect("the new leader responds soon").iter().all(Result::is_ok));
}

/// Regression: a leader that is partitioned from the other brokers, but not from its clients, names itself as the
/// leader. A client that preferred this broker for metadata requests sent to it until the partition ended.
#[tokio::test]
async fn unresponsive_leader_is_last_source_of_metadata() {
    let (old, new) = (FakeBroker::start(1).await, FakeBroker::start(1).await);
    let bootstrap = format!("{},{}", old.address, new.address);
    let client = Client::connect(&bootstrap, ClientOptions::default()).await.expect("the first broker responds");
    let producer = client.producer(one_by_one()).await.expect("an id");
    old.script(&[FakeResponse::Hold; 3]);
    let sent = send_numbers(&producer, 0..3).await;
    let acknowledged = tokio::time::timeout(Duration::from_secs(4), futures::future::join_all(sent)).await;
    assert!(acknowledged.expect("the new leader responds soon").iter().all(Result::is_ok));
    assert_eq!((old.values(0), new.values(0)), (numbers(0..3), numbers(0..3)), "sent again to the new leader");
}

/// A call that any broker can serve is sent to the next broker after the hedge delay, and does not wait for an
/// unresponsive one.
#[tokio::test]
async fn unresponsive_broker_is_bypassed_by_another() {
    let unresponsive = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let fake = FakeBroker::start(1).await;
    let bootstrap = format!("{},{}", unresponsive.local_addr().expect("bound"), fake.address);
    let connected =
        tokio::time::timeout(Duration::from_secs(3), Client::connect(&bootstrap, ClientOptions::default())).await;
    assert!(connected.expect("the other broker responds soon").is_ok());
}
