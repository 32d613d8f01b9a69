//! Tests of reads: no partition is skipped, and none is read past records that cannot be decoded, unless the options
//! permit it.

use super::*;
use crate::{Consumer, OnUndecodable, limits, proto::error::ErrorCode};

const READ_TIMEOUT: Duration = Duration::from_secs(20);

fn at(offset: u64) -> Offset {
    Offset::new(offset).expect("small")
}

async fn write(fake: &FakeBroker, partition: u32, values: &[&str]) {
    let producer = client(fake).await.producer(one_by_one()).await.expect("an id");
    for value in values {
        let record = NewRecord::value(value.as_bytes()).partition(partition);
        producer.send("t", record).await.expect("queued").await.expect("acknowledged");
    }
}

async fn next(consumer: &mut Consumer) -> Result<(u32, Offset), ConsumeError> {
    let record = tokio::time::timeout(READ_TIMEOUT, consumer.next()).await.expect("a record arrives in time")?;
    Ok((record.partition, record.offset))
}

/// Regression: the stream of two partitions was reopened after the leader of one had changed, and the partition with
/// the new leader got no stream.
#[tokio::test]
async fn moved_partition_is_read_after_another_assignment() {
    let (old, new) = (FakeBroker::start(2).await, FakeBroker::start(2).await);
    write(&old, 1, &["0"]).await;
    write(&new, 1, &["0", "1"]).await;
    new.state().epoch = 1;
    let client = client(&old).await;
    let mut consumer = client.consumer(ConsumerOptions::default());
    consumer.assign_at("t", 1, at(0)).await.expect("assigned");
    assert_eq!(next(&mut consumer).await, Ok((1, at(0))));
    // Applies a leader hint as a producer of the same client would, before the consumer's stream fails.
    let moved = ApiError::new(ErrorCode::NotLeader, "moved").with("leader", 2).with("leader_epoch", 1);
    assert!(client.routing().apply_leader_hint("t", 1, &moved.with("address", new.address)));
    consumer.assign_at("t", 0, at(0)).await.expect("assigned");
    assert_eq!(next(&mut consumer).await, Ok((1, at(1))));
}

#[tokio::test]
async fn records_after_an_undecodable_batch_are_not_returned() {
    let (fake, client) = filled(4).await;
    fake.make_undecodable(0, 1);
    let mut consumer = client.consumer(ConsumerOptions::default());
    consumer.assign_at("t", 0, at(0)).await.expect("assigned");
    assert_eq!(next(&mut consumer).await, Ok((0, at(0))));
    let error = next(&mut consumer).await.expect_err("the batch cannot be decoded");
    let ConsumeError::Undecodable { batch, offset, next: after, skipped: false, .. } = error else { panic!("{error}") };
    assert_eq!((batch, offset, after), (at(1), at(1), at(2)));
    assert!(error.to_string().ends_with("the next batch is at offset 2"), "{error}");
    assert_eq!(consumer.position("t", 0), Ok(at(1)));
    // Batches after the undecodable one were already fetched, and another one is written: none may be returned.
    write(&fake, 0, &["4"]).await;
    let more = tokio::time::timeout(Duration::from_millis(300), consumer.next()).await;
    assert!(more.is_err(), "{more:?}");
    consumer.seek("t", 0, at(2)).await.expect("assigned");
    assert_eq!(next(&mut consumer).await, Ok((0, at(2))));
}

#[tokio::test]
async fn undecodable_batch_is_skipped_and_counted() {
    let (fake, client) = filled(4).await;
    fake.make_undecodable(0, 1);
    fake.make_undecodable(0, 3);
    let options = ConsumerOptions { on_undecodable: OnUndecodable::Skip, ..ConsumerOptions::default() };
    let mut consumer = client.consumer(options);
    consumer.assign_at("t", 0, at(0)).await.expect("assigned");
    assert_eq!(next(&mut consumer).await, Ok((0, at(0))));
    for (bad, good) in [(1, 2), (3, 4)] {
        let error = next(&mut consumer).await.expect_err("the batch is reported");
        let ConsumeError::Undecodable { offset, next: after, skipped: true, .. } = error else { panic!("{error}") };
        assert_eq!((offset, after), (at(bad), at(good)));
        assert_eq!(consumer.position("t", 0), Ok(at(good)));
        if bad == 3 {
            write(&fake, 0, &["4"]).await;
        }
        assert_eq!(next(&mut consumer).await, Ok((0, at(good))));
    }
    assert_eq!(consumer.skipped_records(), 2);
}

#[tokio::test]
async fn partitions_above_the_request_limit_are_all_read() {
    let partitions = limits::MAX_FETCH_PARTITIONS + 1;
    let fake = FakeBroker::start(partitions).await;
    let last = u32::try_from(partitions - 1).expect("few");
    write(&fake, last, &["0"]).await;
    let client = client(&fake).await;
    let mut consumer = client.consumer(ConsumerOptions::default());
    for partition in 0..=last {
        consumer.assign_at("t", partition, at(0)).await.expect("assigned");
    }
    assert_eq!(next(&mut consumer).await, Ok((last, at(0))));
}
