//! Segments are written to the disk as they grow, long before their sync.

use super::*;
use crate::{
    log::{
        disk::{LARGE_PIECE_BYTES, PIECE_BYTES},
        format::replica_dir,
    },
    task::clock,
};

const LARGE: usize = 100_000;

/// Returns the ranges of a segment that were written out, in order.
fn write_outs(disk: &SimDisk, base: u64) -> Vec<(u64, u64)> {
    let path = replica_dir(Path::new("/data"), partition(0)).join(format!("{base:020}.log"));
    disk.write_outs(&path).into_iter().map(|range| (range.start, range.end)).collect()
}

/// Appends `batches` batches of `LARGE` bytes with one record each, and writes out full pieces as the sync thread does.
fn append(log: &DataDir, replica: &mut ReplicaLog, batches: u64) {
    for _ in 0..batches {
        let base = replica.log_end().get();
        replica.append(&[batch(base, 1, 1, 0, LARGE)]).unwrap();
    }
    log.write_out_pieces();
}

#[test]
fn segment_is_written_out_in_pieces_before_its_sync() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    append(&log, &mut replica, 2);
    assert!(write_outs(&disk, 0).is_empty(), "a partial piece is not written out");
    append(&log, &mut replica, 1);
    let first = 300_000 / 4096 * 4096;
    assert!(first > PIECE_BYTES as u64);
    assert_eq!(write_outs(&disk, 0), [(0, first)], "the last page is not written out");
    append(&log, &mut replica, 2);
    replica.roll().unwrap();
    append(&log, &mut replica, 1);
    assert_eq!(write_outs(&disk, 0), [(0, first), (first, 500_000)], "a sealed segment is written out to its end");
    assert_eq!(write_outs(&disk, 5), [(0, LARGE as u64 / 4096 * 4096)]);
    let durable = disk.durable(&replica_dir(Path::new("/data"), partition(0)));
    assert!(durable.iter().all(|(_, bytes)| bytes.is_empty()), "a write-out is no sync");
    log.sync_step();
    assert_eq!(write_outs(&disk, 5).len(), 1, "less than a page is left for the sync");
    // A truncation moves the start of the next write-out back, so bytes at the same positions are written out again.
    replica.truncate(at(5)).unwrap();
    append(&log, &mut replica, 3);
    assert_eq!(write_outs(&disk, 5).last(), Some(&(0, first)));
}

/// Pieces become large after 5 s without a write to the journal. Regression: small pieces cost three replicas on one
/// machine a tenth of their throughput, while nothing waited for the device.
#[tokio::test(start_paused = true)]
async fn pieces_are_large_while_nothing_is_written_to_the_journal() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    append(&log, &mut replica, 3);
    assert_eq!(write_outs(&disk, 0).len(), 1);
    tokio::time::advance(std::time::Duration::from_secs(5)).await;
    append(&log, &mut replica, 3);
    assert_eq!(write_outs(&disk, 0).len(), 2, "the next write-out detects the idle journal");
    let pieces = LARGE_PIECE_BYTES as u64 / PIECE_BYTES as u64;
    append(&log, &mut replica, 3 * (pieces - 4));
    assert_eq!(write_outs(&disk, 0).len(), 2, "a partial large piece is not written out");
    append(&log, &mut replica, 12);
    assert_eq!(write_outs(&disk, 0).len(), 3);
    let end = replica.log_end().get();
    write(&log, &mut replica, &[batch(end, 1, 1, 0, 100)]);
    append(&log, &mut replica, 3 * pieces);
    let before = write_outs(&disk, 0).len();
    append(&log, &mut replica, 3);
    assert_eq!(write_outs(&disk, 0).len(), before + 1, "pieces are small while acknowledgements wait");
}

#[test]
fn evicted_segment_keeps_its_content_for_its_readers() {
    const BATCHES: u64 = 6;
    let folder = tempfile::tempdir().unwrap();
    let log = DataDir::open(Arc::new(RealDisk::default()), folder.path(), &identity(), small()).unwrap();
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    for base in 0..BATCHES {
        replica.append(&[batch(base, 1, 1, 0, 1 << 20)]).unwrap();
    }
    replica.roll().unwrap();
    replica.append(&[batch(BATCHES, 1, 1, 0, 100)]).unwrap();
    let export = replica.export(at(0)).unwrap();
    assert_eq!(replica.evict(at(BATCHES)).unwrap(), export.info.bytes);
    assert!(!export.path.exists());
    let mut last = vec![0; 1 << 20];
    let read = export.read_at(&mut last, (BATCHES - 1) << 20).unwrap();
    assert!(read == last.len() && last[100..].iter().any(|byte| *byte != 0), "{read} bytes of the last batch");
}

/// Large removed files are kept open and freed in steps, even many of them. Regression: a deleted topic of 20 GB had
/// 300 files. All but 32 were closed at once, and the journal waited for the device for most of a second.
#[test]
fn space_of_large_removed_files_is_freed_in_steps() {
    const SEGMENTS: u64 = 40;
    let folder = tempfile::tempdir().unwrap();
    let options = LogOptions { step_mode: false, ..small() };
    let log = DataDir::open(Arc::new(RealDisk::default()), folder.path(), &identity(), options).unwrap();
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    for base in 0..=SEGMENTS {
        replica.append(&[batch(base, 1, 1, 0, 5 << 20)]).unwrap();
        replica.roll().unwrap();
    }
    let open = |base: u64| std::fs::File::open(replica.export(at(base)).unwrap().path).unwrap();
    let handles: Vec<_> = (0..=SEGMENTS).map(open).collect();
    assert!(handles.iter().all(|file| file.metadata().unwrap().len() >= 5 << 20));
    // The handles of this test stay open, so only the steps of the log's thread make a file shorter.
    let wait_until_shorter = |files: &[std::fs::File]| {
        let started = clock::monotonic();
        while files.iter().any(|file| file.metadata().unwrap().len() > 4 << 20) {
            assert!(started.elapsed() < Duration::from_secs(60), "space is freed before the last handles are closed");
            std::thread::yield_now();
        }
    };
    replica.evict(at(SEGMENTS)).unwrap();
    wait_until_shorter(&handles[..40]);
    drop(replica);
    assert!(log.delete_replicas(&[partition(0)]).is_empty());
    wait_until_shorter(&handles);
}
