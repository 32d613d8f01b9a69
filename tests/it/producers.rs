//! Idempotent producers: the recognition of retries across restarts and changes of the topic, invalid and foreign
//! producer ids, and the expiry of producers.

use futures::StreamExt as _;
use strandline::{
    proto::{
        error::{ApiError, ErrorCode},
        v1::{
            self, Acks, AlterTopicRequest, AppendRequest, AppendResponse, InitProducerIdRequest, log_client::LogClient,
        },
    },
    task::clock,
};
use tonic::transport::Channel;

use crate::{
    broker::{Broker, BrokerInstance},
    s3::S3,
    test_timeout::eventually_async,
    wire,
};

const TOPIC: &str = "orders";

/// Starts a broker with topic [`TOPIC`], which has one partition and this configuration.
async fn start_broker(config: &[(&str, &str)]) -> (BrokerInstance, Broker) {
    let mut instance = BrokerInstance::new();
    let broker = tokio::task::block_in_place(|| instance.start());
    let config: Vec<_> = config.iter().chain(&[("retention.ms", "-1")]).copied().collect();
    wire::create_topic(instance.grpc(), TOPIC, 1, &config).await;
    (instance, broker)
}

async fn new_producer_id(log: &mut LogClient<Channel>) -> i64 {
    log.init_producer_id(InitProducerIdRequest {}).await.expect("an id").into_inner().producer_id
}

/// Returns a batch of one record with this producer id, epoch and sequence, at a timestamp.
fn stamped_at(value: &[u8], stamp: (i64, i16, i32), timestamp_ms: i64) -> Vec<u8> {
    stamp_batch(wire::batch(&[value]), stamp, timestamp_ms)
}

/// Sets producer id, epoch and sequence in the header of a batch, and both of its timestamps.
fn stamp_batch(mut batch: Vec<u8>, (id, epoch, sequence): (i64, i16, i32), timestamp_ms: i64) -> Vec<u8> {
    batch[27..35].copy_from_slice(&timestamp_ms.to_be_bytes());
    batch[35..43].copy_from_slice(&timestamp_ms.to_be_bytes());
    batch[43..51].copy_from_slice(&id.to_be_bytes());
    batch[51..53].copy_from_slice(&epoch.to_be_bytes());
    batch[53..57].copy_from_slice(&sequence.to_be_bytes());
    wire::renew_crc(&mut batch);
    batch
}

fn stamped(value: &[u8], stamp: (i64, i16, i32)) -> Vec<u8> {
    stamped_at(value, stamp, 1_700_000_000_000)
}

async fn append(log: &mut LogClient<Channel>, batch: Vec<u8>) -> Result<AppendResponse, ApiError> {
    wire::append(log, wire::append_batch(TOPIC, 0, batch)).await
}

async fn alter(instance: &BrokerInstance, key: &str, value: &str) {
    let config = [(key.to_owned(), value.to_owned())].into();
    let request = AlterTopicRequest { name: TOPIC.to_owned(), set: config, ..Default::default() };
    wire::admin(instance.grpc()).alter_topic(request).await.expect("altered");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_client_with_a_producers_sequence_hides_no_record() {
    let (instance, _broker) = start_broker(&[]).await;
    let mut log = wire::log(instance.grpc());
    let id = new_producer_id(&mut log).await;
    assert_eq!(append(&mut log, stamped(b"first", (id, 0, 0))).await.expect("stored").base_offset, 0);
    // A foreign client, which may have read the id in a stored batch, uses the next sequence of the producer.
    assert_eq!(append(&mut log, stamped(b"from another producer", (id, 0, 1))).await.expect("stored").base_offset, 1);
    let victim = append(&mut log, stamped(b"second", (id, 0, 1))).await.expect_err("the record is not stored");
    assert_eq!(victim.code, ErrorCode::OutOfOrderSequence, "{victim:?}");
    assert!(victim.message.contains("stored at offset 1"), "{victim:?}");
    let retry = append(&mut log, stamped(b"from another producer", (id, 0, 1))).await.expect("a retry");
    assert!(retry.duplicate && retry.base_offset == 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retry_is_a_duplicate_after_alter_and_restart() {
    let (mut instance, mut broker) = start_broker(&[]).await;
    let id = new_producer_id(&mut wire::log(instance.grpc())).await;
    let changes =
        [("compression.type", "zstd"), ("message.timestamp.type", "LogAppendTime"), ("compression.type", "producer")];
    let changes = [("min.insync.replicas", "1")].into_iter().chain(changes);
    for (sent, (key, value)) in (0_i32..).zip(changes) {
        alter(&instance, key, value).await;
        let mut log = wire::log(instance.grpc());
        for sequence in 0..sent {
            let again = append(&mut log, stamped(b"own", (id, 0, sequence))).await.expect("a retry");
            assert!(again.duplicate && again.base_offset == i64::from(sequence), "{key}={value}: {again:?}");
        }
        let new = append(&mut log, stamped(b"own", (id, 0, sent))).await.expect("the next");
        assert_eq!((new.base_offset, new.duplicate), (i64::from(sent), false));
        tokio::task::block_in_place(|| broker.kill9());
        broker = tokio::task::block_in_place(|| instance.start());
    }
}

/// A retry of a stored batch is recognised although the topic now refuses a batch of its size. Regression: after the
/// response was lost and `max.message.bytes` was lowered, the retry was refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retry_of_a_batch_above_a_lowered_limit_is_a_duplicate() {
    let (instance, _broker) = start_broker(&[]).await;
    let mut log = wire::log(instance.grpc());
    let id = new_producer_id(&mut log).await;
    let large = |sequence| stamped(&[7; 3000], (id, 0, sequence));
    let zipped = |sequence| {
        let plain = wire::batch(&[&[7; 3000]]);
        let records = zstd::bulk::compress(&plain[61..], 1).expect("compression succeeds");
        stamp_batch(wire::raw_batch(&records, 1, 4), (id, 0, sequence), 1_700_000_000_000)
    };
    append(&mut log, large(0)).await.expect("stored");
    append(&mut log, zipped(1)).await.expect("stored");
    alter(&instance, "max.message.bytes", "1024").await;
    alter(&instance, "compression.type", "uncompressed").await;
    for (sequence, retry) in [(0, large(0)), (1, zipped(1))] {
        let again = append(&mut log, retry).await.expect("a retry");
        assert!(again.duplicate && again.base_offset == sequence, "{again:?}");
    }
    for new in [large(2), zipped(2)] {
        let refused = append(&mut log, new).await.expect_err("the batch is above the limit");
        assert_eq!((refused.code, refused.retryable), (ErrorCode::RecordTooLarge, false), "{refused:?}");
        assert!(refused.message.contains("max.message.bytes"), "{refused:?}");
    }
}

/// During an outage of the object store, a retry with `acks=tiered` of a stored batch is recognised. Regression: the
/// retry was refused like a new batch, so the producer reported a stored record as failed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retry_with_acks_tiered_is_found_during_an_outage() {
    let server = S3::begin();
    let mut instance = BrokerInstance::new().object_store(&server);
    let _broker = tokio::task::block_in_place(|| instance.start());
    wire::create_topic(instance.grpc(), TOPIC, 1, &[("retention.ms", "-1")]).await;
    let mut log = wire::log(instance.grpc());
    let id = new_producer_id(&mut log).await;
    // The batches have current timestamps, as the records of the other writer do. Older timestamps would expire the
    // producer.
    let now_ms = clock::wall_ms();
    let own = |sequence| stamped_at(b"own", (id, 0, sequence), now_ms);
    let tiered = |sequence: i32, timeout_ms| {
        let append = wire::append_batch(TOPIC, 0, own(sequence));
        AppendRequest { acks: Acks::Tiered.into(), timeout_ms, ..append }
    };
    wire::append(&mut log, tiered(0, 30_000)).await.expect("the record is in the object store");
    server.faults().set_down(true);
    append(&mut log, own(1)).await.expect("the batch is on the disk");
    eventually_async("the object store is reported as unavailable", || {
        let mut log = log.clone();
        let append = wire::append_plain(TOPIC, 0, vec![bytes::Bytes::from_static(b"other")]);
        let append = AppendRequest { acks: Acks::Tiered.into(), timeout_ms: 100, ..append };
        async move {
            let refusal = wire::append(&mut log, append).await.expect_err("the object store rejects uploads");
            (refusal.code == ErrorCode::ObjectStoreUnavailable).then_some(())
        }
    })
    .await;
    let uploaded = wire::append(&mut log, tiered(0, 30_000)).await.expect("the object store has the batch");
    assert!(uploaded.duplicate && uploaded.base_offset == 0, "{uploaded:?}");
    let waits = wire::append(&mut log, tiered(1, 5_000)).await.expect_err("the object store does not have the record");
    assert_eq!((waits.code, waits.number("base_offset")), (ErrorCode::Timeout, Some(1)), "{waits:?}");
    for sequence in [2, 3] {
        let new = wire::append(&mut log, tiered(sequence, 30_000)).await.expect_err("the append would only wait");
        assert_eq!(new.code, ErrorCode::ObjectStoreUnavailable, "{sequence}: {new:?}");
    }
    // A refused append on a stream gets its error directly, without a notice before.
    let streamed = v1::ProduceRequest { correlation_id: 7, append: Some(tiered(2, 30_000)) };
    let requests = futures::stream::iter([streamed]).chain(futures::stream::pending());
    let mut responses = log.produce(requests).await.expect("a stream").into_inner();
    let response = responses.message().await.expect("a response").expect("the stream continues");
    assert!(
        matches!(&response.result, Some(v1::produce_response::Result::Error(error)) if error.retryable),
        "{response:?}"
    );
    server.faults().set_down(false);
    let waited = wire::append(&mut log, tiered(1, 30_000)).await.expect("the object store is available again");
    assert!(waited.duplicate && waited.base_offset == 1, "{waited:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn invalid_producer_fields_are_refused() {
    let (instance, _broker) = start_broker(&[]).await;
    let mut log = wire::log(instance.grpc());
    let id = new_producer_id(&mut log).await;
    for stamp in [
        (id, -1, 0),
        (id, 0, -1),
        (id, -1, -1),
        (id, -2, 0),
        (id, 0, i32::MIN),
        (-2, 0, 0),
        (-2, -1, -1),
        (-1, 1, 0),
        (-1, 0, 1),
    ] {
        let refused = append(&mut log, stamped(b"x", stamp)).await.expect_err("impossible");
        assert_eq!((refused.code, refused.retryable), (ErrorCode::MalformedBatch, false), "{stamp:?}: {refused:?}");
    }
    // The clients for Java, Sarama and KafkaJS write these values in batches without idempotence. The last stamp is of
    // an assigned id.
    for stamp in [(-1, -1, -1), (-1, -1, 0), (-1, 0, 0), (id, 0, 0)] {
        append(&mut log, stamped(b"x", stamp)).await.expect("possible");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn invented_producer_ids_are_refused_and_expire_no_producer() {
    let mut instance = BrokerInstance::new().setting("limits.producer_ids_per_minute", 100);
    let _broker = tokio::task::block_in_place(|| instance.start());
    wire::create_topic(instance.grpc(), TOPIC, 1, &[("retention.ms", "-1")]).await;
    let (mut honest, mut hostile) = (wire::log(instance.grpc()), wire::log(instance.grpc()));
    let id = new_producer_id(&mut honest).await;
    append(&mut honest, stamped(b"own", (id, 0, 0))).await.expect("stored");
    let mut reasons = Vec::new();
    for invented in 0..200 {
        // Invented ids are near an assigned id, or small numbers.
        let invented = if invented % 2 == 0 { id ^ (invented + 1) } else { invented };
        let refused = append(&mut hostile, stamped(b"x", (invented, 0, 0)))
            .await
            .expect_err("the producer id was never assigned");
        reasons.push(refused.code);
        if refused.code == ErrorCode::Overloaded {
            assert!(refused.message.contains("limits.producer_ids_per_minute") && refused.retryable, "{refused:?}");
        }
    }
    let count = |reason| reasons.iter().filter(|found| **found == reason).count();
    assert!(count(ErrorCode::UnknownProducer) >= 100 && count(ErrorCode::Overloaded) > 0, "{reasons:?}");
    assert_eq!(count(ErrorCode::UnknownProducer) + count(ErrorCode::Overloaded), 200, "{reasons:?}");
    // Per connection, `InitProducerId` requests and appends with unassigned producer ids share one quota.
    let mut refusal = None;
    for _ in 0..5 {
        // The quota admits another request every 600 ms, so one of several requests may succeed.
        refusal = refusal.or(hostile.init_producer_id(InitProducerIdRequest {}).await.err());
    }
    let status = refusal.expect("the quota is used up");
    assert_eq!(ApiError::from(&status).code, ErrorCode::Overloaded);
    new_producer_id(&mut honest).await;
    let retry = append(&mut honest, stamped(b"own", (id, 0, 0))).await.expect("a retry");
    assert!(retry.duplicate, "the producer state is kept");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn future_timestamp_expires_no_producer() {
    const FUTURE: i64 = 1 << 62;
    for lifted in [false, true] {
        let bound = if lifted { "-1" } else { "3600000" };
        let (mut instance, mut broker) =
            start_broker(&[("producer.id.expiration.ms", "1"), ("message.timestamp.after.max.ms", bound)]).await;
        let mut log = wire::log(instance.grpc());
        let (id, other) = (new_producer_id(&mut log).await, new_producer_id(&mut log).await);
        append(&mut log, stamped(b"own", (id, 0, 0))).await.expect("stored");
        let future = append(&mut log, stamped_at(b"other", (other, 0, 0), FUTURE)).await;
        assert_eq!(future.err().map(|error| error.code), (!lifted).then_some(ErrorCode::InvalidTimestamp));
        for sequence in 1..3 {
            let next = append(&mut log, stamped(b"own", (id, 0, sequence))).await.expect("the producer is known");
            assert!(!next.duplicate);
            tokio::task::block_in_place(|| broker.kill9());
            broker = tokio::task::block_in_place(|| instance.start());
            log = wire::log(instance.grpc());
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn producer_expires_by_timestamps_and_not_by_a_clock() {
    let (mut instance, mut broker) = start_broker(&[("producer.id.expiration.ms", "1")]).await;
    let mut log = wire::log(instance.grpc());
    let (id, other) = (new_producer_id(&mut log).await, new_producer_id(&mut log).await);
    let start = 1_700_000_000_000;
    append(&mut log, stamped_at(b"own", (id, 0, 0), start)).await.expect("stored");
    // Expiry depends on record timestamps only, so a retry of the last batch is recognised at any time.
    assert!(append(&mut log, stamped_at(b"own", (id, 0, 0), start)).await.expect("a retry").duplicate);
    append(&mut log, stamped_at(b"other", (other, 0, 0), start + 2)).await.expect("stored");
    for restarted in [false, true] {
        if restarted {
            tokio::task::block_in_place(|| broker.kill9());
            broker = tokio::task::block_in_place(|| instance.start());
            log = wire::log(instance.grpc());
        }
        let next = append(&mut log, stamped_at(b"own", (id, 0, 1), start)).await.expect_err("the producer expired");
        assert_eq!(next.code, ErrorCode::UnknownProducer, "restarted: {restarted}, {next:?}");
        let retry = append(&mut log, stamped_at(b"other", (other, 0, 0), start + 2)).await.expect("a response");
        assert!(retry.duplicate);
    }
    drop(broker);
}
