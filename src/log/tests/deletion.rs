//! Segments below the log start: gone from the disk, and gone for good.

use super::*;

/// Six segments of two records each.
fn six_segments(log: &Log) -> Replica {
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    for base in (0..12).step_by(2) {
        write(log, &mut replica, &[batch(base, 2, 1, 1, 500)]);
        replica.roll().unwrap();
    }
    replica
}

/// The first offsets of the segment files that are there.
fn bases(disk: &SimDisk) -> Vec<u64> {
    let files = disk.files().into_iter().map(|(path, _)| path);
    let logs = files.filter(|path| path.extension().is_some_and(|extension| extension == "log"));
    logs.map(|path| path.file_stem().unwrap().to_str().unwrap().parse().unwrap()).collect()
}

#[test]
fn a_segment_that_lies_only_partly_below_the_log_start_stays() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut replica = six_segments(&log);
    replica.advance_log_start(at(5));
    assert_eq!(replica.evict(at(5)), Ok(1000));
    assert_eq!((replica.log_start(), replica.local_start()), (at(5), at(4)));
    assert_eq!(bases(&disk)[0], 4);
    assert_eq!(replica.evict(at(5)), Ok(0), "there is nothing left to do");
}

/// What leads elsewhere seals at other places, so that a log start lies anywhere in a segment here. Its upload and its readers
/// compare the batches before it with their epochs too.
#[test]
fn what_lies_below_the_log_start_and_stays_has_its_epochs() {
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
    // What is neither there nor last before it is forgotten.
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
    let of_the_replica = names.iter().filter(|path| path.parent().unwrap().ends_with("0"));
    let left: Vec<_> = of_the_replica.filter_map(|path| path.file_name()?.to_str()).collect();
    assert_eq!(left, ["00000000000000000012.snapshot"], "the new segment's file is made by its first append");
    assert_eq!(write(&log, &mut replica, &[batch(12, 1, 1, 1, 100)]), at(13));
}

/// The power may go at any moment of a deletion. Whatever is there afterwards opens, a second try finishes it, and neither a
/// kill nor a loss of power brings a segment back, by the journal or by the checkpoint.
#[test]
fn a_deletion_that_was_cut_short_is_done_again_and_stays_done() {
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
        // The metadata store says so again.
        replica.advance_log_start(at(6));
        replica.evict(at(6)).unwrap();
        assert!(bases(&disk).iter().all(|base| *base >= 6), "after {operations} operations: {:?}", bases(&disk));
        for (life, clean) in [(1, false), (2, true), (3, false)] {
            if clean {
                log_closes(&disk, operations);
                continue;
            }
            disk.crash(operations * 10 + life);
            let log = open(&disk);
            let replica = log.open_replica(partition(0), at(0)).unwrap();
            assert_eq!((replica.log_start(), replica.local_start()), (at(6), at(6)), "life {life}, {operations}");
            assert!(bases(&disk).iter().all(|base| *base >= 6), "life {life}, {operations}: {:?}", bases(&disk));
            assert_eq!(read_all(&replica.reader(), at(6)).unwrap().len(), 3);
        }
    }
}

/// The journal still holds their records: to write them once more is to need room for nothing.
#[test]
fn replay_does_not_even_make_deleted_segments_for_a_moment() {
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

/// A snapshot that found no room when its segment was sealed keeps the segments before it, and those alone.
#[test]
fn on_a_disk_without_one_byte_a_deletion_makes_its_own_room() {
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
    assert_eq!(replica.evict(at(6)), Ok(500), "now there is room");
    assert_eq!((replica.local_start(), bases(&disk)[0]), (at(6), 6));
}

fn log_closes(disk: &SimDisk, operations: u64) {
    disk.kill();
    let log = open(disk);
    let replica = log.open_replica(partition(0), at(0)).unwrap();
    assert_eq!(replica.local_start(), at(6), "after {operations} operations");
    drop(replica);
    log.close().unwrap();
}

/// Each stop in order leaves a snapshot at the log end, which begins no segment later: nothing removed it.
#[test]
fn snapshots_of_former_stops_go_with_what_they_lie_in() {
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
    let snapshots =
        || disk.files().iter().filter(|(path, _)| path.extension().is_some_and(|of| of == "snapshot")).count();
    assert!(snapshots() >= 5, "{:?}", disk.files());
    let log = open(&disk);
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    replica.advance_log_start(at(10));
    replica.evict(at(10)).unwrap();
    assert_eq!((bases(&disk), snapshots()), (vec![10], 2), "where the log begins, and where it ends");
    assert_eq!(read_all(&replica.reader(), at(10)).unwrap().len(), 1);
}

/// Found by review: the replica was known no more, neither to the checkpoint nor to the journal, and its files stayed for ever, unnamed.
#[test]
fn what_a_failed_deletion_leaves_is_known_at_the_next_start_and_can_be_deleted() {
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
            let left = bases(&disk);
            if log.partitions().is_empty() && !left.is_empty() {
                assert_eq!(log.unclaimed(), [partition(0)], "after {operations} operations: {left:?}");
                found += 1;
            }
            log.delete_replica(partition(0)).unwrap();
            assert!(log.delete_unclaimed(&[partition(0)]).is_empty());
            assert!(log.partitions().is_empty() && log.unclaimed().is_empty(), "after {operations} operations");
            assert!(bases(&disk).is_empty(), "after {operations} operations: {:?}", bases(&disk));
        }
    }
    assert!(found > 5, "{found} deletions left something behind");
}

/// Whose files a start finds it cannot tell: they may be the only copy of a replica that the journal never heard of. A partition that
/// begins anew in their place keeps them aside, and only the metadata's word lets them go.
#[test]
fn what_a_start_finds_is_kept_where_its_partition_begins_anew() {
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
        if log.unclaimed().is_empty() {
            return false;
        }
        log.delete_replica(partition(0)).unwrap();
        assert_eq!(bases(&disk), before, "it is not known, so there is nothing to delete");
        drop(log.open_replica(partition(0), at(0)).unwrap());
        let is_aside = |path: &std::path::Path| path.to_string_lossy().contains(".log.aside-");
        let aside = disk.files().into_iter().filter(|(path, _)| is_aside(path)).count();
        assert_eq!((aside, log.unclaimed().len()), (before.len(), 0));
        assert!(log.delete_unclaimed(&[partition(0)]).is_empty());
        assert_eq!(bases(&disk), [0], "it is known, and in use");
        true
    });
    assert!(found.count() > 2, "no deletion left anything behind");
}

/// A topic of 100,000 partitions took two rounds of the journal and one sync of its folder for each of them.
#[test]
fn replicas_deleted_together_share_rounds_and_syncs() {
    let (disk, options) = (SimDisk::new(), small());
    let rounds = options.metrics.journal_rounds.clone();
    let log = Log::open(Arc::new(disk.clone()), Path::new("/data"), &identity(), options).unwrap();
    let ids: Vec<_> = (0..100).map(partition).collect();
    ids.iter().for_each(|id| drop(log.open_replica(*id, at(0)).unwrap()));
    settle(&log);
    let held = log.open_replica(partition(7), at(0)).unwrap();
    let (before, operations) = (rounds.get(), disk.operations());
    let failures = log.delete_replicas(&ids);
    assert!(matches!(failures[..], [(id, ReplicaError::Open { .. })] if id == held.id()), "{failures:?}");
    assert_eq!((rounds.get() - before, log.partitions()), (2, vec![held.id()]));
    let operations = disk.operations() - operations;
    assert!(operations < 2 * 100 + 20, "{operations} for a file and a folder of each");
}

/// The power may go at any moment of a deletion of many: each of them is known afterwards, or nothing of it is left once it was deleted
/// a second time.
#[test]
fn deletion_of_many_that_was_cut_short_can_be_finished() {
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
        let known = log.partitions();
        let failed = |id: &PartitionId| failures.iter().any(|(failed, _)| failed == id);
        assert!(known.iter().all(failed), "after {operations} operations: {known:?} came back");
        assert!(log.delete_replicas(&ids).is_empty() && log.delete_unclaimed(&ids).is_empty());
        assert!(log.partitions().is_empty() && bases(&disk).is_empty(), "after {operations} operations");
    }
}
