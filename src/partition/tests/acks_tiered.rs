//! Writers that wait for the bucket.

use super::*;
use crate::record::ProducerStamp;

#[tokio::test(flavor = "multi_thread")]
async fn a_tiered_write_is_answered_by_the_bucket_without_waiting_for_a_full_segment() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), true).await;
    let partition = bench.open(&[]).await;
    let acked = bench.serve_until(&partition, append(&partition, b"x", Acks::Tiered)).await;
    assert_eq!(acked.unwrap().held, Held::Tiered(1));
}

/// Each append that waits for the bucket would be a segment of its own while uploads wait.
#[tokio::test(flavor = "multi_thread")]
async fn step_without_uploads_leaves_to_another_what_waits_for_the_bucket() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), true).await;
    let partition = bench.open(&[("segment.bytes", "16384"), ("retention.bytes", "50000")]).await;
    let mut written = Box::pin(append(&partition, b"x", Acks::Tiered));
    let due = async {
        while !bench.upkeep.step_without_uploads(&partition).await.unwrap().is_upload_due {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::select! {
        _ = &mut written => unreachable!("nobody uploads"),
        () = due => {}
    }
    assert!(upkeep::local(&partition).await.unwrap().sealed.is_empty());
    assert_eq!(bench.serve_until(&partition, written).await.unwrap().held, Held::Tiered(1));

    // Retention goes on without uploads, and not beside a step that uploads.
    for n in 0..40u8 {
        append(&partition, &[n; 4000], Acks::All).await.unwrap();
    }
    let turn = partition.upkeep.lock().await;
    let busy = bench.upkeep.step_without_uploads(&partition).await.unwrap();
    assert!(busy.is_upload_due && !busy.more && partition.marks().log_start == Offset::ZERO, "{busy:?}");
    drop(turn);
    while bench.upkeep.step_without_uploads(&partition).await.unwrap().more {}
    let marks = partition.marks();
    assert!(marks.log_start.get() > 20 && marks.tiered_end < marks.log_start, "{marks:?}");
}

/// Nothing was sealed for it: the first try had asked for less, and the retry waited until retention looked at the partition.
#[tokio::test]
async fn retry_with_acks_tiered_of_a_batch_that_only_the_disk_has_hurries_the_bucket() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), true).await;
    let partition = bench.open(&[]).await;
    let now_ms = crate::task::clock::wall_ms();
    let stamped = || {
        let mut builder = BatchBuilder::new(Compression::None);
        builder.push(now_ms, None, Some(b"x"), &[]).unwrap();
        builder.finish(Some(ProducerStamp { id: 7, epoch: 0, base_sequence: 0 })).unwrap()
    };
    append_batch(&partition, stamped(), Acks::All).await.unwrap();
    while let Ok(id) = tokio::time::timeout(Duration::ZERO, bench.queue.next()).await {
        bench.queue.done(id, false);
    }
    let acked = bench.serve_until(&partition, append_batch(&partition, stamped(), Acks::Tiered)).await.unwrap();
    assert_eq!((acked.duplicate, acked.held), (true, Held::Tiered(1)));
}
