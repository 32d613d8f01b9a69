//! Tests of the client against a fake broker that fails according to a script.

use std::time::Duration;

use super::{
    CallError, Client, ConsumeError, ConsumerOptions, Held, NewRecord, NewTopic, OffsetAt, OnOutOfRange, Options,
    Producer, ProducerOptions, SendError,
    double::{Act, Double},
    trouble::Trouble,
};
use crate::{
    model::{Acks, Compression, Offset},
    proto::{
        error::{ApiError, ErrorCode},
        v1,
    },
    record::BatchBuilder,
    task::test_timeout::wait_until,
};

mod doubt;
mod near;
mod reading;

async fn client(double: &Double) -> Client {
    Client::connect(&double.address.to_string(), Options::default()).await.expect("the double answers")
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

/// Sends twenty records under a script. All must be in the log once, in order, at the offsets of their
/// acknowledgements.
async fn survives(acts: &[Act]) {
    let double = Double::start(1).await;
    let producer = client(&double).await.producer(one_by_one()).await.expect("an id");
    double.script(acts);
    let deliveries = send_numbers(&producer, 0..20).await;
    for (number, delivery) in deliveries.into_iter().enumerate() {
        let ack = delivery.await.unwrap_or_else(|error| panic!("{number} under {acts:?}: {error}"));
        assert_eq!(ack.offset, Offset::new(u64::try_from(number).expect("small")), "under {acts:?}");
        assert_eq!(ack.held, Held::Synced);
    }
    assert_eq!(double.values(0), numbers(0..20), "under {acts:?}");
}

#[tokio::test]
async fn retries_keep_order_and_never_double() {
    use Act::{Append, AppendAndBreak, AppendAndTimeOut, Break, Refuse};
    for acts in [
        &[Refuse(ErrorCode::NotLeader)][..],
        &[Append, Refuse(ErrorCode::Overloaded), Append, Append],
        &[AppendAndTimeOut],
        &[AppendAndTimeOut, Append, AppendAndTimeOut, Refuse(ErrorCode::NotReady)],
        &[Break],
        &[Append, AppendAndBreak],
        &[AppendAndBreak, AppendAndBreak, Break, AppendAndBreak],
        &[Append, Append, AppendAndTimeOut, Break, Refuse(ErrorCode::DiskFull), AppendAndBreak],
        // The broker has lost the producer's state: nothing was appended, so a new producer id is safe.
        &[Append, Append, Refuse(ErrorCode::UnknownProducer)],
        &[Refuse(ErrorCode::OutOfOrderSequence)],
    ] {
        survives(acts).await;
    }
}

#[tokio::test]
async fn a_refused_batch_fails_alone_and_the_rest_move_up() {
    let double = Double::start(1).await;
    let producer = client(&double).await.producer(one_by_one()).await.expect("an id");
    double.script(&[Act::Append, Act::Refuse(ErrorCode::RecordTooLarge), Act::Append]);
    let mut results = Vec::new();
    for delivery in send_numbers(&producer, 0..6).await {
        results.push(delivery.await);
    }
    assert!(matches!(&results[1], Err(SendError::Refused { fault, .. }) if fault.code == ErrorCode::RecordTooLarge));
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 5);
    assert_eq!(double.values(0), ["0", "2", "3", "4", "5"]);
}

#[tokio::test]
async fn maybe_appended_batch_is_not_repeated_under_new_id() {
    let double = Double::start(1).await;
    let producer = client(&double).await.producer(one_by_one()).await.expect("an id");
    // The batch is appended and its response lost; then the broker loses the producer's state.
    double.script(&[Act::AppendAndTimeOut, Act::Refuse(ErrorCode::UnknownProducer)]);
    let first = producer.send("t", NewRecord::value(b"0")).await.expect("queued").await;
    assert!(matches!(first, Err(SendError::Unknown { .. })), "{first:?}");
    let second = producer.send("t", NewRecord::value(b"1")).await.expect("queued").await;
    assert_eq!(second.expect("under the new id").offset, Offset::new(1));
    assert_eq!(double.values(0), ["0", "1"]);
}

#[tokio::test]
async fn responses_of_partitions_may_arrive_out_of_order() {
    let double = Double::start(2).await;
    let producer = client(&double).await.producer(one_by_one()).await.expect("an id");
    double.script(&[Act::AnswerLate, Act::Append]);
    let a = producer.send("t", NewRecord::value(b"a").partition(0)).await.expect("queued");
    let b = producer.send("t", NewRecord::value(b"b").partition(1)).await.expect("queued");
    assert_eq!(a.await.expect("answered").partition, 0);
    assert_eq!(b.await.expect("answered").partition, 1);
}

#[tokio::test]
async fn lost_response_with_acks_0_is_not_repeated() {
    let double = Double::start(1).await;
    let options = ProducerOptions { acks: Acks::None, ..one_by_one() };
    let producer = client(&double).await.producer(options).await.expect("started");
    double.script(&[Act::AppendAndBreak]);
    let lost = producer.send("t", NewRecord::value(b"0")).await.expect("queued").await;
    assert!(matches!(lost, Err(SendError::Unknown { .. })), "{lost:?}");
    let ack = producer.send("t", NewRecord::value(b"1")).await.expect("queued").await.expect("accepted");
    assert_eq!(ack.offset, None, "acks=0 knows no offset");
    assert_eq!(double.values(0), ["0", "1"]);
}

#[tokio::test]
async fn flush_sends_lingering_records_in_one_batch() {
    let double = Double::start(1).await;
    let options = ProducerOptions { linger: Duration::from_secs(3600), ..ProducerOptions::default() };
    let producer = client(&double).await.producer(options).await.expect("an id");
    let deliveries = send_numbers(&producer, 0..10).await;
    assert_eq!(double.batches(0), 0, "nothing goes out while the batch lingers");
    producer.flush().await.expect("acknowledged");
    assert_eq!(double.batches(0), 1);
    for (number, delivery) in deliveries.into_iter().enumerate() {
        let ack = delivery.await.expect("acknowledged");
        assert_eq!((ack.offset, ack.count), (Offset::new(u64::try_from(number).expect("small")), 10));
    }
}

#[tokio::test]
async fn full_memory_sends_lingering_batches() {
    let double = Double::start(1).await;
    let options = ProducerOptions {
        linger: Duration::from_secs(3600),
        batch_bytes: 4096,
        memory_bytes: 4096,
        ..ProducerOptions::default()
    };
    let producer = client(&double).await.producer(options).await.expect("an id");
    for _ in 0..20 {
        let _delivery = producer.send("t", NewRecord::value(&[7; 1000])).await.expect("queued");
    }
    producer.close().await.expect("all acknowledged");
    let state_batches = double.batches(0);
    assert!((5..=20).contains(&state_batches), "{state_batches} batches");
}

/// Regression: a batch that is sent at once is never full. Keyless records changed partitions only with a full batch,
/// so they never did.
#[tokio::test]
async fn keyless_records_sent_singly_reach_every_partition() {
    let double = Double::start(4).await;
    let options = ProducerOptions { batch_bytes: 1000, ..one_by_one() };
    let producer = client(&double).await.producer(options).await.expect("an id");
    for _ in 0..200 {
        let delivery = producer.send("t", NewRecord::value(&[b'x'; 200])).await.expect("queued");
        delivery.await.expect("acknowledged");
    }
    let counts: Vec<usize> = (0..4).map(|partition| double.values(partition).len()).collect();
    assert!(counts.iter().all(|count| *count > 0), "{counts:?}");
    producer.close().await.expect("all acknowledged");
}

/// Regression: a stream carries 256 batches at a time. A producer checked every waiting partition at each response, so
/// a thousand partitions cost a thousand checks per batch. Each partition must wait once, for its turn.
#[tokio::test]
async fn partitions_above_the_stream_window_are_all_sent() {
    let double = Double::start(600).await;
    let options = ProducerOptions { memory_bytes: 64 << 10, ..ProducerOptions::default() };
    let producer = client(&double).await.producer(options).await.expect("an id");
    for round in 0..3 {
        for partition in 0..600 {
            let value = round.to_string();
            let record = NewRecord::value(value.as_bytes()).partition(partition);
            let _delivery = producer.send("t", record).await.expect("queued");
        }
    }
    producer.close().await.expect("all acknowledged");
    for partition in 0..600 {
        assert_eq!(double.values(partition), ["0", "1", "2"], "partition {partition}");
    }
}

#[tokio::test]
async fn refused_record_expires_with_its_last_problem() {
    let double = Double::start(1).await;
    let options = ProducerOptions { delivery_timeout: Duration::from_millis(300), ..one_by_one() };
    // With the default of one second, the pause after the last refusal may exceed the timeout of the second record.
    let pauses = Options { backoff_max: Duration::from_millis(20), ..Options::default() };
    let client = Client::connect(&double.address.to_string(), pauses).await.expect("the double answers");
    let producer = client.producer(options).await.expect("an id");
    double.script(&[Act::Refuse(ErrorCode::DiskFull); 200]);
    let error = producer.send("t", NewRecord::value(b"x")).await.expect("queued").await.expect_err("never taken");
    assert!(matches!(error, SendError::Expired { maybe_appended: false, .. }), "{error}");
    assert!(error.to_string().contains("as the script says"), "{error}");
    // The sequence has no gap afterwards.
    double.state().script.clear();
    let ack = producer.send("t", NewRecord::value(b"y")).await.expect("queued").await.expect("taken");
    assert_eq!(ack.offset, Offset::new(0));
}

#[tokio::test]
async fn unknown_topic_or_partition_and_large_record_fail_at_once() {
    let double = Double::start(2).await;
    let producer = client(&double).await.producer(one_by_one()).await.expect("an id");
    let unknown = producer.send("nope", NewRecord::value(b"x")).await.expect_err("no such topic");
    assert!(unknown.to_string().contains("nope"), "{unknown}");
    let partition = producer.send("t", NewRecord::value(b"x").partition(7)).await.expect_err("no such partition");
    assert!(matches!(partition, SendError::UnknownPartition { partition: 7, partitions: 2, .. }), "{partition}");
    let large = producer.send("t", NewRecord::value(&vec![0; 2 << 20])).await.expect_err("too large");
    assert!(matches!(large, SendError::TooLarge { limit: 1_048_576, .. }), "{large}");
}

#[tokio::test]
async fn complete_batches_and_every_codec_arrive() {
    let double = Double::start(1).await;
    let client = client(&double).await;
    let mut sent = Vec::new();
    for compression in [Compression::Gzip, Compression::Snappy, Compression::Lz4, Compression::Zstd] {
        let options = ProducerOptions { compression, ..ProducerOptions::default() };
        let producer = client.producer(options).await.expect("an id");
        let _delivery = producer.send("t", NewRecord::value(compression.as_str().as_bytes())).await.expect("queued");
        let mut builder = BatchBuilder::new(compression);
        builder.push(1, None, Some(b"whole"), &[]).expect("fits");
        let batch = builder.finish(None).expect("not empty");
        producer.send_batch("t", 0, batch).await.expect("queued").await.expect("acknowledged");
        producer.close().await.expect("all acknowledged");
        sent.extend([compression.as_str().to_owned(), "whole".to_owned()]);
    }
    assert_eq!(double.values(0), sent);
}

#[tokio::test]
async fn dropped_producer_fails_unacknowledged_records() {
    let double = Double::start(1).await;
    let options = ProducerOptions { linger: Duration::from_secs(3600), ..ProducerOptions::default() };
    let producer = client(&double).await.producer(options).await.expect("an id");
    let delivery = producer.send("t", NewRecord::value(b"x")).await.expect("queued");
    drop(producer);
    assert_eq!(delivery.await, Err(SendError::Closed));
}

async fn filled(records: u32) -> (Double, Client) {
    let double = Double::start(1).await;
    let client = client(&double).await;
    let producer = client.producer(one_by_one()).await.expect("an id");
    send_numbers(&producer, 0..records).await;
    producer.close().await.expect("all acknowledged");
    (double, client)
}

#[tokio::test]
async fn broken_stream_neither_skips_nor_repeats_records() {
    let (double, client) = filled(30).await;
    double.state().fetches_until_break = Some(7);
    double.state().damage = 2;
    let mut consumer = client.consumer(ConsumerOptions::default());
    consumer.assign("t", 0, OffsetAt::Earliest).await.expect("assigned");
    for number in 0..30_u64 {
        if number == 20 {
            double.state().fetches_until_break = Some(0);
        }
        let record = consumer.next().await.expect("read");
        assert_eq!(record.offset, Offset::new(number).expect("small"));
        assert_eq!(record.record.value.as_deref(), Some(number.to_string().as_bytes()));
        assert_eq!(consumer.position("t", 0).expect("assigned"), record.offset.plus(1));
    }
}

#[tokio::test]
async fn consumer_follows_log_and_seek_drops_old_records() {
    let (double, client) = filled(10).await;
    let mut consumer = client.consumer(ConsumerOptions::default());
    consumer.assign("t", 0, OffsetAt::Earliest).await.expect("assigned");
    assert_eq!(consumer.next().await.expect("read").offset, Offset::new(0).expect("small"));
    consumer.seek("t", 0, Offset::new(7).expect("small")).await.expect("assigned");
    assert_eq!(consumer.next().await.expect("read").offset, Offset::new(7).expect("small"));
    consumer.seek_to("t", 0, OffsetAt::Latest).await.expect("assigned");
    let producer = client.producer(one_by_one()).await.expect("an id");
    let (next, ack) = tokio::join!(consumer.next(), async {
        producer.send("t", NewRecord::value(b"new")).await.expect("queued").await.expect("acknowledged")
    });
    assert_eq!(Some(next.expect("followed").offset), ack.offset);
    drop(double);
}

#[tokio::test]
async fn out_of_range_position_fails_or_is_reset() {
    let (double, client) = filled(10).await;
    double.set_start(0, 4);
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
    let options = ConsumerOptions { on_out_of_range: OnOutOfRange::Earliest, ..ConsumerOptions::default() };
    let mut consumer = client.consumer(options);
    consumer.assign_at("t", 0, offset(1)).await.expect("assigned");
    assert_eq!(consumer.next().await.expect("moved").offset, offset(4));
}

#[tokio::test]
async fn permanent_corruption_is_reported_and_not_returned() {
    let (double, client) = filled(3).await;
    double.state().damage = u32::MAX;
    let mut consumer = client.consumer(ConsumerOptions::default());
    consumer.assign("t", 0, OffsetAt::Earliest).await.expect("assigned");
    let error = consumer.next().await.expect_err("damaged");
    assert!(matches!(error, ConsumeError::Damaged { .. }), "{error}");
}

/// Waits until the client's retry status satisfies `is`, and returns it.
async fn trouble(client: &Client, is: impl Fn(Option<&Trouble>) -> bool) -> Option<Trouble> {
    let mut watch = client.trouble();
    let shown = watch.wait_for(|trouble| is(trouble.as_ref()));
    let shown = tokio::time::timeout(Duration::from_secs(20), shown).await.expect("the trouble comes in time");
    shown.expect("the client is there").clone()
}

fn says(words: impl Into<String>) -> impl Fn(Option<&Trouble>) -> bool {
    let words = words.into();
    move |trouble| trouble.is_some_and(|trouble| trouble.problem.contains(&words))
}

/// Regression, found by a user: a problem was not reported for two minutes although its cause was known.
#[tokio::test]
async fn producer_shows_retry_status_until_success() {
    let double = Double::start(1).await;
    let client = client(&double).await;
    let producer = client.producer(one_by_one()).await.expect("an id");
    assert_eq!(*client.trouble().borrow(), None);
    double.script(&[Act::Refuse(ErrorCode::DiskFull); 1000]);
    let delivery = producer.send("t", NewRecord::value(b"x")).await.expect("queued");
    let shown = trouble(&client, says("t/0: as the script says")).await.expect("shown");
    assert!(shown.until.is_some_and(|until| until > shown.since), "it says when it is given up: {shown:?}");
    double.state().script.clear();
    delivery.await.expect("taken at last");
    trouble(&client, |trouble| trouble.is_none()).await;
}

#[tokio::test]
async fn expired_record_clears_the_retry_status() {
    let double = Double::start(1).await;
    let client = client(&double).await;
    let options = ProducerOptions { delivery_timeout: Duration::from_millis(200), ..one_by_one() };
    let producer = client.producer(options).await.expect("an id");
    double.script(&[Act::Refuse(ErrorCode::DiskFull); 1000]);
    let delivery = producer.send("t", NewRecord::value(b"x")).await.expect("queued");
    trouble(&client, says("as the script says")).await;
    delivery.await.expect_err("never taken");
    trouble(&client, |trouble| trouble.is_none()).await;
}

#[tokio::test]
async fn unresponsive_broker_is_reported_before_expiry() {
    let double = Double::start(1).await;
    let client = client(&double).await;
    let options = ProducerOptions { acks: Acks::Tiered, ..one_by_one() };
    let producer = client.producer(options).await.expect("an id");
    double.script(&[Act::Hold]);
    let _delivery = producer.send("t", NewRecord::value(b"x")).await.expect("queued");
    let shown = trouble(&client, says("has not answered")).await.expect("shown");
    let address = double.address.to_string();
    assert!(shown.problem.contains(&address) && shown.problem.contains("bucket"), "{shown:?}");
}

/// The broker advertises an address that no client can reach. The address is known, so the retry status must name it.
#[tokio::test]
async fn unreachable_leader_is_named_in_every_retry_status() {
    let double = Double::start(1).await;
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").expect("bind").local_addr().expect("bound").to_string();
    double.state().advertised = nobody.clone();
    let options = Options { request_timeout: Duration::from_secs(2), ..Options::default() };
    let address = double.address.to_string();
    let connect = || Client::connect(&address, options.clone());
    let producing = connect().await.expect("the double answers");
    let producer = producing.producer(one_by_one()).await.expect("an id");
    let _delivery = producer.send("t", NewRecord::value(b"x")).await.expect("queued");
    let source = "(that is what broker 1 advertises: grpc.advertise)";
    trouble(&producing, says(format!("t/0: no broker answers at {nobody}: connection refused {source}"))).await;

    let consuming = connect().await.expect("the double answers");
    let mut consumer = consuming.consumer(ConsumerOptions::default());
    consumer.assign_at("t", 0, Offset::ZERO).await.expect("assigned");
    trouble(&consuming, says(format!("t/0: {nobody}: connection refused"))).await;

    let asking = connect().await.expect("the double answers");
    let admin = asking.admin();
    let (shown, refused) = tokio::join!(
        trouble(&asking, says(format!("the leader of t/0, {nobody}: connection refused"))),
        admin.offset("t", 0, OffsetAt::Latest),
    );
    assert!(shown.is_some_and(|shown| shown.until.is_some()));
    assert!(refused.expect_err("nobody there").to_string().contains(&nobody));
    assert_eq!(*asking.trouble().borrow(), None, "a call that was given up is no trouble");
}

#[tokio::test]
async fn consumer_shows_retry_status_until_records_arrive() {
    let (double, client) = filled(1).await;
    double.state().unreadable = Some(ErrorCode::ObjectStoreUnavailable);
    let mut consumer = client.consumer(ConsumerOptions::default());
    consumer.assign_at("t", 0, Offset::ZERO).await.expect("assigned");
    trouble(&client, says("t/0: unreadable as the test says")).await;
    double.state().unreadable = None;
    consumer.next().await.expect("read");
    trouble(&client, |trouble| trouble.is_none()).await;
}

/// At the end of a log no record arrives that would clear the problem.
#[tokio::test]
async fn leader_recovery_at_log_end_clears_the_retry_status() {
    let (double, client) = filled(1).await;
    double.state().unreadable = Some(ErrorCode::NotLeader);
    let mut consumer = client.consumer(ConsumerOptions::default());
    consumer.assign_at("t", 0, Offset::new(1).expect("small")).await.expect("assigned");
    trouble(&client, says("t/0: unreadable as the test says")).await;
    double.state().unreadable = None;
    trouble(&client, |trouble| trouble.is_none()).await;
    drop(consumer);
}

/// Regression, found by a user: a first address with another server's port hid the valid second address.
#[tokio::test]
async fn every_bootstrap_address_is_tried_and_named() {
    let double = Double::start(1).await;
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let silent_address = silent.local_addr().expect("bound");
    let other = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let other_address = other.local_addr().expect("bound");
    let tasks = crate::task::Tasks::new();
    // A gRPC server without the Admin service.
    let server = tonic::transport::Server::builder()
        .add_service(crate::proto::v1::log_server::LogServer::new(double.clone()))
        .serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(other));
    tasks.spawn("another server", server);
    let options = || Options { request_timeout: Duration::from_millis(500), ..Options::default() };
    let bad = format!("{other_address},{}", silent_address);
    let all = format!("{bad},{}", double.address);
    let client = Client::connect(&all, options()).await.expect("the third one answers");
    client.topic("t").await.expect("known");
    let error = Client::connect(&bad, options()).await.expect_err("neither is a broker").to_string();
    drop(silent);
    for said in
        [format!("{other_address}: the server is not a Strandline broker"), format!("{}: no answer in", silent_address)]
    {
        assert!(error.contains(&said), "{said:?} is in {error:?}");
    }
    tasks.cancel();
}

/// Regression, found by a user: a topic may accept records larger than a producer's memory, and no producer could send
/// them.
#[tokio::test]
async fn a_record_larger_than_the_memory_takes_all_of_it() {
    let double = Double::start(1).await;
    let options = ProducerOptions { memory_bytes: 4096, batch_bytes: 1, ..ProducerOptions::default() };
    let producer = client(&double).await.producer(options).await.expect("an id");
    for bytes in [100, 100_000, 4096, 500_000, 7] {
        let _delivery = producer.send("t", NewRecord::value(&vec![b'x'; bytes])).await.expect("queued");
    }
    producer.close().await.expect("all acknowledged");
    let lengths: Vec<usize> = double.values(0).iter().map(String::len).collect();
    assert_eq!(lengths, [100, 100_000, 4096, 500_000, 7]);
}

#[tokio::test]
async fn refused_address_fails_at_once() {
    let double = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = double.local_addr().expect("bound").to_string();
    drop(double);
    let error = Client::connect(&address, Options::default()).await.expect_err("nobody listens");
    assert_eq!(error.to_string(), format!("no broker answers at {address}: connection refused"));
}

/// Regression: a host that disappears breaks no connection. Its producers waited until the connection's pings timed
/// out.
#[tokio::test]
async fn unresponsive_leader_is_left_for_the_new_leader() {
    let (old, new) = (Double::start(1).await, Double::start(1).await);
    let producer = client(&old).await.producer(one_by_one()).await.expect("an id");
    old.script(&[Act::Hold; 3]);
    let sent = send_numbers(&producer, 0..3).await;
    old.state().advertised = new.address.to_string();
    let acknowledged = tokio::time::timeout(Duration::from_secs(4), futures::future::join_all(sent)).await;
    assert!(acknowledged.expect("the new leader answers soon").iter().all(Result::is_ok));
    assert_eq!(new.values(0), numbers(0..3));
}

/// Regression: with many batches in flight to the leader, further batches waited for room in the stream, without
/// end.
#[tokio::test]
async fn waiting_queues_leave_an_unresponsive_leader() {
    let (old, new) = (Double::start(40).await, Double::start(40).await);
    let producer = client(&old).await.producer(one_by_one()).await.expect("an id");
    old.script(&[Act::Hold; 1000]);
    let mut sent = Vec::new();
    for number in 0..640 {
        let record = NewRecord::value(b"x").partition(number % 40);
        sent.push(producer.send("t", record).await.expect("queued"));
    }
    old.state().advertised = new.address.to_string();
    let acknowledged = tokio::time::timeout(Duration::from_secs(8), futures::future::join_all(sent)).await;
    assert!(acknowledged.expect("the new leader answers soon").iter().all(Result::is_ok));
    assert!((0..40).all(|partition| new.batches(partition) == 16));
}

/// Regression: queues with batches in flight had moved, and no metadata was requested for queues that only waited for
/// room.
#[tokio::test]
async fn queues_that_only_wait_refresh_metadata() {
    let (old, new) = (Double::start(40).await, Double::start(40).await);
    new.state().advertised = old.address.to_string();
    let client = client(&old).await;
    let producer = client.producer(one_by_one()).await.expect("an id");
    old.script(&[Act::Hold; 1000]);
    let mut sent = Vec::new();
    for number in 0..256 {
        sent.push(producer.send("t", NewRecord::value(b"x").partition(number % 16)).await.expect("queued"));
    }
    wait_until("the stream is full", || (0..16).all(|partition| old.batches(partition) == 16)).await;
    for partition in 16..40 {
        sent.push(producer.send("t", NewRecord::value(b"x").partition(partition)).await.expect("queued"));
    }
    for partition in 0..16 {
        let moved = ApiError::new(ErrorCode::NotLeader, "it moved").with("leader", 2).with("leader_epoch", 1);
        assert!(client.routing().told("t", partition, &moved.with("address", new.address)));
    }
    wait_until("the busy ones have moved", || (0..16).all(|partition| new.batches(partition) == 16)).await;
    let asked = || old.state().asked + new.state().asked;
    let before = asked();
    wait_until("the others ask again and again", || asked() > before + 5).await;
    for double in [&old, &new] {
        double.state().advertised = new.address.to_string();
    }
    let acknowledged = tokio::time::timeout(Duration::from_secs(8), futures::future::join_all(sent)).await;
    assert!(acknowledged.expect("the new leader answers soon").iter().all(Result::is_ok));
}

/// Regression: a leader that is partitioned from the other brokers, but not from its clients, names itself as the
/// leader. A client that sent all its metadata requests to it stayed there until the partition ended.
#[tokio::test]
async fn unresponsive_leader_is_last_source_of_metadata() {
    let (old, new) = (Double::start(1).await, Double::start(1).await);
    let bootstrap = format!("{},{}", old.address, new.address);
    let client = Client::connect(&bootstrap, Options::default()).await.expect("the first one answers");
    let producer = client.producer(one_by_one()).await.expect("an id");
    old.script(&[Act::Hold; 3]);
    let sent = send_numbers(&producer, 0..3).await;
    let acknowledged = tokio::time::timeout(Duration::from_secs(4), futures::future::join_all(sent)).await;
    assert!(acknowledged.expect("the new leader answers soon").iter().all(Result::is_ok));
    assert_eq!((old.values(0), new.values(0)), (numbers(0..3), numbers(0..3)), "what is held is sent again");
}

/// The same for a call that any broker can serve.
#[tokio::test]
async fn unresponsive_broker_is_bypassed_by_another() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let double = Double::start(1).await;
    let bootstrap = format!("{},{}", silent.local_addr().expect("bound"), double.address);
    let connected = tokio::time::timeout(Duration::from_secs(3), Client::connect(&bootstrap, Options::default())).await;
    assert!(connected.expect("the other one answers soon").is_ok());
}
