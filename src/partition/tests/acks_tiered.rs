//! Writes that wait for the object store.

use super::*;
use crate::{record::ProducerSequence, task::test_timeout::wait_for};

#[tokio::test(flavor = "multi_thread")]
async fn tiered_write_does_not_wait_for_a_full_segment() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), true).await;
    let partition = bench.open(&[]).await;
    let acked = bench.serve_until(&partition, append(&partition, b"x", Acks::Tiered)).await;
    assert_eq!(acked.unwrap().durability, AckDurability::Tiered(1));
}

/// A step without uploads must not roll the active segment for a write with `acks=tiered`. Otherwise each such write
/// would get a segment of its own. The step reports that an upload is due.
#[tokio::test(flavor = "multi_thread")]
async fn step_without_uploads_leaves_tiered_writes_to_another() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), true).await;
    let partition = bench.open(&[("segment.bytes", "16384"), ("retention.bytes", "50000")]).await;
    let mut written = Box::pin(append(&partition, b"x", Acks::Tiered));
    let upload_due = wait_for("an upload is due", async || {
        bench.maintenance.step_without_uploads(&partition).await.unwrap().is_upload_due.then_some(())
    });
    tokio::select! {
        _ = &mut written => unreachable!("no step uploads"),
        () = upload_due => {}
    }
    assert!(partition.describe_segments().await.unwrap().sealed.is_empty());
    assert_eq!(bench.serve_until(&partition, written).await.unwrap().durability, AckDurability::Tiered(1));

    // Steps without uploads move the log start, unless another step of the partition is in progress.
    for n in 0..40u8 {
        append(&partition, &[n; 4000], Acks::All).await.unwrap();
    }
    let step_in_progress = partition.maintenance_lock.lock().await;
    let skipped = bench.maintenance.step_without_uploads(&partition).await.unwrap();
    assert!(skipped.is_upload_due && !skipped.more && partition.watermarks().log_start == Offset::ZERO, "{skipped:?}");
    drop(step_in_progress);
    while bench.maintenance.step_without_uploads(&partition).await.unwrap().more {}
    let watermarks = partition.watermarks();
    assert!(watermarks.log_start.get() > 20 && watermarks.tiered_end < watermarks.log_start, "{watermarks:?}");
}

/// Regression: no upload was started for a retry with `acks=tiered` after an attempt with `acks=all`. The retry waited
/// until the next periodic check of retention.
#[tokio::test]
async fn tiered_retry_of_a_local_batch_starts_an_upload() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), true).await;
    let partition = bench.open(&[]).await;
    let now_ms = crate::task::clock::wall_ms();
    let batch_with_sequence = || {
        let mut builder = BatchBuilder::new(Compression::None);
        builder.push(now_ms, None, Some(b"x"), &[]).unwrap();
        builder.finish(Some(ProducerSequence { id: 7, epoch: 0, base_sequence: 0 })).unwrap()
    };
    append_batch(&partition, batch_with_sequence(), Acks::All).await.unwrap();
    while let Ok(id) = tokio::time::timeout(Duration::ZERO, bench.queue.next()).await {
        bench.queue.done(id, false);
    }
    let acked =
        bench.serve_until(&partition, append_batch(&partition, batch_with_sequence(), Acks::Tiered)).await.unwrap();
    assert_eq!((acked.duplicate, acked.durability), (true, AckDurability::Tiered(1)));
}
