//! Stops of a broker despite an obstacle, and an exit without a stop request.

use std::{fs, time::Duration};

use bytes::Bytes;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use strandline::{
    proto::error::ErrorCode,
    task::{Tasks, clock},
};

use crate::{broker::Home, s3::S3, test_timeout::eventually, wire};

/// Returns a payload that is small enough for the journal, and that no codec can compress.
fn payload(number: u64) -> Bytes {
    let mut bytes = vec![0; 100_000];
    StdRng::seed_from_u64(number).fill_bytes(&mut bytes);
    bytes.into()
}

/// Waits until nothing was written to the journal for a second. The checkpoint is tried several times in that second.
fn full(home: &Home) -> f64 {
    let (mut written, mut since) = (0.0, clock::monotonic());
    eventually("the journal is full", || {
        let now = home.metric("strandline_journal_bytes_total");
        if now != written {
            (written, since) = (now, clock::monotonic());
        }
        (now > 4e6 && since.elapsed() >= Duration::from_secs(1)).then_some(now)
    })
}

/// Writers wait for the journal, and the journal waits until a checkpoint can be written. Regression: a broker whose disk prevented the
/// checkpoint did not stop, and had to be killed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn broker_that_cannot_write_its_checkpoint_stops() {
    let mut home = Home::new().setting("log.journal_bytes", 16 << 20);
    let broker = tokio::task::block_in_place(|| home.start());
    wire::create_topic(home.grpc(), "t", 1, &[("remote.storage.enable", "false")]).await;
    // A folder at the path to which the checkpoint is written before its rename.
    let in_the_way = home.data_dir().join("checkpoint.tmp");
    fs::create_dir(&in_the_way).expect("a folder");
    let log = wire::log(home.grpc());
    let tasks = Tasks::new();
    let one_after_the_other = tasks.spawn("one after the other", {
        let mut log = log.clone();
        async move {
            for taken in 0_u64.. {
                if let Err(fault) = wire::append(&mut log, wire::append_plain("t", 0, vec![payload(taken)])).await {
                    return (taken, fault);
                }
            }
            unreachable!("the journal has an end")
        }
    });
    let bytes = tokio::task::block_in_place(|| full(&home));
    // More appends arrive all the time, so the log always holds records that its segment is not synced with yet.
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
    under_way.await.expect("it says so");
    let asked = clock::monotonic();
    let status = tokio::task::block_in_place(|| broker.terminate());
    println!("stop: with a journal full of {bytes} bytes it took {:?}", asked.elapsed());
    others.abort();
    assert_eq!(status.code(), Some(1), "{}", home.log());
    assert_eq!(home.log().matches("the checkpoint cannot be written").count(), 1, "{}", home.log());
    assert!(home.log().contains("the journal could not be written: "), "{}", home.log());
    let (taken, fault) = one_after_the_other.await.expect("it ends");
    assert!(matches!(fault.code, ErrorCode::StorageFailed | ErrorCode::NotReady), "{fault:?}");

    fs::remove_dir(&in_the_way).expect("it was left alone");
    let _broker = tokio::task::block_in_place(|| home.start());
    let mut log = wire::log(home.grpc());
    let taken = i64::try_from(taken).expect("few");
    let records = wire::read_range(&mut log, "t", 0, 0, taken).await.expect("it reads");
    assert_eq!(records.len(), usize::try_from(taken).expect("few"), "what was acknowledged is there");
    assert!((0..).zip(records).all(|(number, record)| record.value == Some(payload(number))));
}

/// Regression: the broker requested the owner of the object store again and again, and could only be killed.
#[test]
fn broker_whose_object_store_never_responded_stops() {
    let server = S3::begin();
    server.faults().set_down(true);
    let mut home = Home::new().object_store(&server);
    assert!(home.start().terminate().success(), "{}", home.log());
}

/// The object store names its owner only in a response, and a start does not wait for that.
#[test]
fn broker_exits_if_object_store_is_of_another_cluster() {
    let server = S3::begin();
    let mut owner = Home::new().object_store(&server);
    assert!(owner.start().terminate().success(), "{}", owner.log());
    let mut home = Home::new().of_cluster("other").object_store(&server);
    server.faults().set_down(true);
    let mut broker = home.start();
    server.faults().set_down(false);
    assert_eq!(broker.wait().code(), Some(1), "{}", home.log());
    let said = home.log();
    assert!(said.contains("this broker cannot go on: ") && said.contains("\"other\""), "{said}");
}
