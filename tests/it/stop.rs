//! A broker stops on request although its disk or object store prevents work, and exits by itself if its object store
//! belongs to another cluster.

use std::{fs, time::Duration};

use bytes::Bytes;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use strandline::{
    proto::error::ErrorCode,
    task::{Tasks, clock},
};

use crate::{broker::BrokerInstance, s3::S3, test_timeout::eventually, wire};

/// Returns 100 KB of random bytes, which no codec can compress.
fn payload(number: u64) -> Bytes {
    let mut bytes = vec![0; 100_000];
    StdRng::seed_from_u64(number).fill_bytes(&mut bytes);
    bytes.into()
}

/// Waits until the journal is full: until nothing was written to it for a second, in which the checkpoint is tried
/// several times. Returns the number of written bytes.
fn wait_until_journal_is_full(instance: &BrokerInstance) -> f64 {
    let (mut written, mut since) = (0.0, clock::monotonic());
    eventually("the journal is full", || {
        let now = instance.metric("strandline_journal_bytes_total");
        if now != written {
            (written, since) = (now, clock::monotonic());
        }
        (now > 4e6 && since.elapsed() >= Duration::from_secs(1)).then_some(now)
    })
}

/// With a full journal, writers wait for the journal, and the journal waits until a checkpoint can be written. A stop
/// ends these waits. Regression: a broker that could not write its checkpoint did not stop, and had to be killed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn broker_that_cannot_write_its_checkpoint_stops() {
    let mut instance = BrokerInstance::new().setting("log.journal_bytes", 16 << 20);
    let broker = tokio::task::block_in_place(|| instance.start());
    wire::create_topic(instance.grpc(), "t", 1, &[("remote.storage.enable", "false")]).await;
    // A folder at the path of the temporary checkpoint file prevents the checkpoint.
    let blocker = instance.data_dir().join("checkpoint.tmp");
    fs::create_dir(&blocker).expect("a folder");
    let log = wire::log(instance.grpc());
    let tasks = Tasks::new();
    let one_after_the_other = tasks.spawn("one-after-the-other", {
        let mut log = log.clone();
        async move {
            for taken in 0_u64.. {
                if let Err(error) = wire::append(&mut log, wire::append_plain("t", 0, vec![payload(taken)])).await {
                    return (taken, error);
                }
            }
            unreachable!("the journal has an end")
        }
    });
    let bytes = tokio::task::block_in_place(|| wait_until_journal_is_full(&instance));
    // Appends continue to arrive during the stop, so the segment always has unsynced records.
    let (many, under_way) = tokio::sync::oneshot::channel();
    let others = tasks.spawn("others", async move {
        let each = Tasks::new();
        let mut many = Some(many);
        for number in 0_u64..2000 {
            if number == 100 {
                many.take().map(|many| many.send(()));
            }
            let request = wire::append_plain("t", 0, vec![payload(number).slice(..10)]);
            let mut log = log.clone();
            each.spawn("other", async move { wire::append(&mut log, request).await });
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    under_way.await.expect("the task sends a value");
    let stop_time = clock::monotonic();
    let status = tokio::task::block_in_place(|| broker.terminate());
    println!("stop: with a journal full of {bytes} bytes it took {:?}", stop_time.elapsed());
    others.abort();
    assert_eq!(status.code(), Some(1), "{}", instance.log());
    assert_eq!(instance.log().matches("cannot write the checkpoint, retrying").count(), 1, "{}", instance.log());
    assert!(instance.log().contains("cannot write the journal: "), "{}", instance.log());
    let (taken, error) = one_after_the_other.await.expect("the task ends");
    assert!(matches!(error.code, ErrorCode::StorageFailed | ErrorCode::NotReady), "{error:?}");

    fs::remove_dir(&blocker).expect("the directory is unchanged");
    let _broker = tokio::task::block_in_place(|| instance.start());
    let mut log = wire::log(instance.grpc());
    let taken = i64::try_from(taken).expect("the number is small");
    let records = wire::read_range(&mut log, "t", 0, 0, taken).await.expect("the read succeeds");
    assert_eq!(
        records.len(),
        usize::try_from(taken).expect("the number is small"),
        "the acknowledged records are read"
    );
    assert!((0..).zip(records).all(|(number, record)| record.value == Some(payload(number))));
}

/// Regression: the broker repeated its request for the owner of an unavailable object store for ever, and could only be
/// killed.
#[test]
fn broker_stops_without_a_response_of_object_store() {
    let server = S3::begin();
    server.faults().set_down(true);
    let mut instance = BrokerInstance::new().object_store(&server);
    assert!(instance.start().terminate().success(), "{}", instance.log());
}

/// A start does not wait for the object store. When the store is available and turns out to belong to another cluster,
/// the broker exits.
#[test]
fn broker_exits_if_object_store_is_of_another_cluster() {
    let server = S3::begin();
    let mut owner = BrokerInstance::new().object_store(&server);
    assert!(owner.start().terminate().success(), "{}", owner.log());
    let mut instance = BrokerInstance::new().of_cluster("other").object_store(&server);
    server.faults().set_down(true);
    let mut broker = instance.start();
    server.faults().set_down(false);
    assert_eq!(broker.wait_for_exit().code(), Some(1), "{}", instance.log());
    let output = instance.log();
    assert!(output.contains("this broker must stop: ") && output.contains("\"other\""), "{output}");
}
