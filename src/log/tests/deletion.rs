//! Evicted segments and deleted replicas: their files are removed, and never reappear.

use super::*;

/// Creates a replica with six sealed segments of two records each.
fn six_segments(log: &DataDir) -> ReplicaLog {
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    for base in (0..12).step_by(2) {
        write(log, &mut replica, &[batch(base, 2, 1, 1, 500)]);
        replica.roll().unwrap();
    }
    replica
}

/// Returns the base offsets of the segment files on the disk.
fn bases(disk: &SimDisk) -> Vec<u64> {
    let files = disk.files().into_iter().map(|(path, _)| path);
    let logs = files.filter(|path| path.extension().is_some_and(|extension| extension == "log"));
    logs.map(|path| path.file_stem().unwrap().to_str().unwrap().parse().unwrap()).collect()
}

#[test]
fn segment_partly_below_the_log_start_is_kept() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut replica = six_segments(&log);
    replica.advance_log_start(at(5));
    assert_eq!(replica.evict(at(5)), Ok(1000));
    assert_eq!((replica.log_start(), replica.local_start()), (at(5), at(4)));
    assert_eq!(bases(&disk)[0], 4);
    assert_eq!(replica.evict(at(5)), Ok(0), "the eviction is complete");
}

/// Another leader seals segments at other offsets, so the log start may lie anywhere in a segment of this replica. The
/// batches of this segment below the log start are kept. Uploads and reads compare the epochs of these batches,
/// too, with the epoch history.
#[test]
fn kept_batches_below_the_log_start_have_their_epochs() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    for (base, epoch) in [(0, 1), (2, 2), (4, 3), (6, 3)] {
        write(&log, &mut replica, &[batch(base, 2, epoch, 1, 500)]);
        if base != 2 {
            replica.roll().unwrap();
        }
    }
    replica.advance_log_start(at(5));
    replica.evict(at(5)).unwrap();
    assert_eq!((replica.log_start(), replica.local_start()), (at(5), at(2)));
    let epochs = |starts: &[(u32, u64)]| {
        EpochHistory::from_starts(starts.iter().map(|(epoch, start)| (LeaderEpoch(*epoch), at(*start)))).unwrap()
    };
    assert_eq!(replica.export(at(2)).unwrap().epochs, epochs(&[(2, 2), (3, 4)]));
    // Of the epochs below the local start, only the last one remains.
    assert_eq!(*replica.epochs(), epochs(&[(1, 1), (2, 2), (3, 4)]));
    replica.evict(at(6)).unwrap();
    assert_eq!(*replica.epochs(), epochs(&[(3, 4)]));
}

#[test]
fn deleted_segments_leave_no_file_behind() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut replica = six_segments(&log);
    replica.advance_log_start(at(12));
    assert_eq!(replica.evict(at(12)), Ok(3000));
    let names: Vec<_> = disk.files().into_iter().map(|(path, _)| path).collect();
    let replica_files = names.iter().filter(|path| path.parent().unwrap().ends_with("0"));
    let remaining: Vec<_> = replica_files.filter_map(|path| path.file_name()?.to_str()).collect();
    assert_eq!(remaining, ["00000000000000000012.snapshot"], "the first append creates the file of the new segment");
    assert_eq!(write(&log, &mut replica, &[batch(12, 1, 1, 1, 100)]), at(13));
}

/// The power may fail at any operation of an eviction. The log then opens, and a second attempt completes the eviction.
/// After that neither a kill nor a power failure restores a segment, from the journal or from the checkpoint.
#[test]
fn interrupted_eviction_is_repeated_and_stays_complete() {
    for operations in 0..30 {
        let disk = SimDisk::new();
        let log = open(&disk);
        let mut replica = six_segments(&log);
        disk.fail_writes_after(Some(operations));
        replica.advance_log_start(at(6));
        drop(replica.evict(at(6)));
        drop((replica, log));
        disk.crash(operations);

        let log = open(&disk);
        let mut replica = log.open_replica(partition(0), at(0)).unwrap();
        assert!(replica.local_start() <= at(6), "after {operations} operations");
        assert_eq!(replica.log_end(), at(12), "after {operations} operations");
        // The log start is set again, as after a restart of the broker.
        replica.advance_log_start(at(6));
        replica.evict(at(6)).unwrap();
        assert!(bases(&disk).iter().all(|base| *base >= 6), "after {operations} operations: {:?}", bases(&disk));
        for (incarnation, clean) in [(1, false), (2, true), (3, false)] {
            if clean {
                reopen_and_close(&disk, operations);
                continue;
            }
            disk.crash(operations * 10 + incarnation);
            let log = open(&disk);
            let replica = log.open_replica(partition(0), at(0)).unwrap();
            assert_eq!(
                (replica.log_start(), replica.local_start()),
                (at(6), at(6)),
                "incarnation {incarnation}, {operations}"
            );
            let bases = bases(&disk);
            assert!(bases.iter().all(|base| *base >= 6), "incarnation {incarnation}, {operations}: {bases:?}");
            assert_eq!(read_all(&replica.reader(), at(6)).unwrap().len(), 3);
        }
    }
}

/// A replay restores no batch of an evicted segment that the journal still holds: such a batch would use disk space
/// without a purpose.
#[test]
fn replay_never_creates_evicted_segments() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut replica = six_segments(&log);
    replica.advance_log_start(at(6));
    replica.evict(at(6)).unwrap();
    drop((replica, log));
    disk.kill();
    let log = open(&disk);
    assert_eq!(bases(&disk), [6, 8, 10]);
    assert_eq!(log.open_replica(partition(0), at(0)).unwrap().log_end(), at(12));
}

/// The start of a segment without a snapshot cannot become the local start while the disk has no space for that
/// snapshot. The segment before it stays then, and all earlier ones are evicted.
#[test]
fn eviction_on_a_full_disk_makes_its_own_space() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut replica = six_segments(&log);
    let files = disk.files();
    let snapshot = files.iter().find(|(path, _)| path.ends_with("00000000000000000006.snapshot")).unwrap();
    disk.remove(&snapshot.0).unwrap();
    disk.set_capacity(Some(disk.files().iter().map(|(_, len)| len).sum()));
    replica.advance_log_start(at(6));
    assert_eq!(replica.evict(at(6)), Ok(1000));
    assert_eq!(replica.local_start(), at(4));
    assert_eq!(replica.evict(at(6)), Ok(500), "the disk has space now");
    assert_eq!((replica.local_start(), bases(&disk)[0]), (at(6), 6));
}

/// Opens the directory after a kill, checks that the eviction up to offset 6 is complete, and closes the directory
/// cleanly.
fn reopen_and_close(disk: &SimDisk, operations: u64) {
    disk.kill();
    let log = open(disk);
    let replica = log.open_replica(partition(0), at(0)).unwrap();
    assert_eq!(replica.local_start(), at(6), "after {operations} operations");
    drop(replica);
    log.close().unwrap();
}

/// An eviction removes all snapshots below the local start. Regression: each clean shutdown wrote a snapshot at the log
/// end. If no segment started at that offset later, the snapshot was never removed.
#[test]
fn snapshots_of_earlier_stops_are_evicted_with_segments() {
    let disk = SimDisk::new();
    for base in (0..12).step_by(2) {
        let log = open(&disk);
        let mut replica = log.open_replica(partition(0), at(0)).unwrap();
        if base == 10 {
            replica.roll().unwrap();
        }
        write(&log, &mut replica, &[batch(base, 2, 1, 1, 500)]);
        drop(replica);
        log.close().unwrap();
    }
    let snapshots = || {
        disk.files()
            .iter()
            .filter(|(path, _)| path.extension().is_some_and(|extension| extension == "snapshot"))
            .count()
    };
    assert!(snapshots() >= 5, "{:?}", disk.files());
    let log = open(&disk);
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    replica.advance_log_start(at(10));
    replica.evict(at(10)).unwrap();
    assert_eq!((bases(&disk), snapshots()), (vec![10], 2), "one at the log start and one at the log end");
    assert_eq!(read_all(&replica.reader(), at(10)).unwrap().len(), 1);
}

/// A failed deletion leaves a stray replica, which is reported and can be deleted. Regression, found by review: neither
/// the checkpoint nor the journal contained the replica, and its files stayed forever, unreported.
#[test]
fn failed_deletion_leaves_a_stray_that_can_be_deleted() {
    let mut found = 0;
    for operations in 0..40 {
        for clean in [true, false] {
            let disk = SimDisk::new();
            let log = open(&disk);
            drop(six_segments(&log));
            disk.fail_writes_after(Some(operations));
            drop(log.delete_replica(partition(0)));
            disk.fail_writes_after(None);
            if clean {
                drop(log.close());
            }
            drop(log);
            disk.kill();
            let log = open(&disk);
            let remaining = bases(&disk);
            if log.partitions().is_empty() && !remaining.is_empty() {
                assert_eq!(log.stray_partitions(), [partition(0)], "after {operations} operations: {remaining:?}");
                found += 1;
            }
            log.delete_replica(partition(0)).unwrap();
            assert!(log.delete_stray(&[partition(0)]).is_empty());
            assert!(log.partitions().is_empty() && log.stray_partitions().is_empty(), "after {operations} operations");
            assert!(bases(&disk).is_empty(), "after {operations} operations: {:?}", bases(&disk));
        }
    }
    assert!(found > 5, "{found} deletions left files");
}

/// A start cannot identify the owner of stray files. They may be the only copy of a replica whose creation never became
/// durable. A new replica of the same partition quarantines them, and only the metadata permits their deletion.
#[test]
fn new_replica_quarantines_stray_segments() {
    let found = (0..40).filter(|operations| {
        let disk = SimDisk::new();
        let log = open(&disk);
        drop(six_segments(&log));
        disk.fail_writes_after(Some(*operations));
        drop(log.delete_replica(partition(0)));
        disk.fail_writes_after(None);
        drop(log.close());
        drop(log);
        let log = open(&disk);
        let before = bases(&disk);
        if log.stray_partitions().is_empty() {
            return false;
        }
        log.delete_replica(partition(0)).unwrap();
        assert_eq!(bases(&disk), before, "an unregistered replica is not deleted");
        drop(log.open_replica(partition(0), at(0)).unwrap());
        let is_quarantined = |path: &std::path::Path| path.to_string_lossy().contains(".log.quarantined-");
        let quarantined = disk.files().into_iter().filter(|(path, _)| is_quarantined(path)).count();
        assert_eq!((quarantined, log.stray_partitions().len()), (before.len(), 0));
        assert!(log.delete_stray(&[partition(0)]).is_empty());
        assert_eq!(bases(&disk), [0], "a registered replica is not deleted");
        true
    });
    assert!(found.count() > 2, "no deletion left files");
}

/// Replicas that are deleted in one call share frames and directory syncs. Regression: a topic of 100,000 partitions
/// took two frames of the journal and one directory sync for each partition.
#[test]
fn replicas_deleted_together_share_frames_and_syncs() {
    let (disk, options) = (SimDisk::new(), small());
    let frames = options.metrics.journal_writes.clone();
    let log = DataDir::open(Arc::new(disk.clone()), Path::new("/data"), &identity(), options).unwrap();
    let ids: Vec<_> = (0..100).map(partition).collect();
    ids.iter().for_each(|id| drop(log.open_replica(*id, at(0)).unwrap()));
    settle(&log);
    let opened = log.open_replica(partition(7), at(0)).unwrap();
    let (before, operations) = (frames.get(), disk.operations());
    let failures = log.delete_replicas(&ids);
    assert!(matches!(failures[..], [(id, ReplicaError::Open { .. })] if id == opened.id()), "{failures:?}");
    assert_eq!((frames.get() - before, log.partitions()), (2, vec![opened.id()]));
    let operations = disk.operations() - operations;
    assert!(operations < 2 * 100 + 20, "{operations} operations for a file and a directory of each replica");
}

/// The power may fail at any operation of a deletion of many replicas. Afterwards no replica that was reported as
/// deleted is registered, and a second deletion removes all remaining files.
#[test]
fn interrupted_deletion_of_many_can_be_completed() {
    for operations in 0..40 {
        let disk = SimDisk::new();
        let log = open(&disk);
        let ids: Vec<_> = (0..5).map(partition).collect();
        for id in &ids {
            let mut replica = log.open_replica(*id, at(0)).unwrap();
            write(&log, &mut replica, &[batch(0, 2, 1, 1, 500)]);
        }
        disk.fail_writes_after(Some(operations));
        let failures = log.delete_replicas(&ids);
        drop(log);
        disk.crash(operations);
        let log = open(&disk);
        let registered = log.partitions();
        let has_failed = |id: &PartitionId| failures.iter().any(|(failed, _)| failed == id);
        assert!(registered.iter().all(has_failed), "after {operations} operations: {registered:?} reappeared");
        assert!(log.delete_replicas(&ids).is_empty() && log.delete_stray(&ids).is_empty());
        assert!(log.partitions().is_empty() && bases(&disk).is_empty(), "after {operations} operations");
    }
}
