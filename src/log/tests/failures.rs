//! Full disks and failing syncs.

use super::*;

#[test]
fn full_disk_refuses_appends_until_there_is_space() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    let end = write(&log, &mut replica, &[batch(0, 2, 1, 1, 5000)]);
    let used: u64 = disk.files().iter().map(|(_, len)| len).sum();
    disk.set_capacity(Some(used + 3000));
    // The first batch alone would fit, but the append writes both batches or none.
    let group = [batch(2, 1, 1, 2, 2000), batch(3, 1, 1, 2, 2000)];
    assert_eq!(replica.append(&group), Err(LogAppendError::DiskFull));
    assert_eq!(replica.append(&group), Err(LogAppendError::DiskFull));
    assert!(log.status().disk_full);
    assert_eq!(replica.log_end(), end);
    assert_eq!(read_all(&replica.reader(), at(0)).unwrap().len(), 1);
    disk.set_capacity(None);
    assert_eq!(write(&log, &mut replica, &group), at(4));
    assert!(!log.status().disk_full);
    assert_eq!(read_all(&replica.reader(), at(0)).unwrap().len(), 3);
}

#[test]
fn failed_segment_sync_ends_writing_to_its_replica_only() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut first = log.open_replica(partition(0), at(0)).unwrap();
    let mut second = log.open_replica(partition(1), at(0)).unwrap();
    write(&log, &mut first, &[batch(0, 1, 1, 1, 100)]);
    first.append(&[batch(1, 1, 1, 1, 100)]).unwrap();
    disk.fail_syncs(Some("/0/"));
    log.sync_step();
    disk.fail_syncs(None);
    assert!(matches!(first.append(&[batch(2, 1, 1, 1, 100)]), Err(LogAppendError::Failed { .. })));
    assert!(matches!(persist(&mut first).recv().unwrap(), Err(PersistError::Failed { .. })));
    assert_eq!(log.status().failed_replicas.len(), 1);
    assert_eq!(read_all(&first.reader(), at(0)).unwrap().len(), 2, "reads continue");
    assert_eq!(write(&log, &mut second, &[batch(0, 1, 1, 1, 100)]), at(1));
}

#[test]
fn failed_journal_sync_ends_writing_to_the_directory() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    write(&log, &mut replica, &[batch(0, 1, 1, 1, 100)]);
    disk.fail_syncs(Some("journal"));
    replica.append(&[batch(1, 1, 1, 1, 100)]).unwrap();
    let result = persist(&mut replica);
    log.journal_step();
    assert!(matches!(result.recv().unwrap(), Err(PersistError::Failed { .. })));
    disk.fail_syncs(None);
    assert!(matches!(replica.append(&[batch(2, 1, 1, 1, 100)]), Err(LogAppendError::Failed { .. })));
    assert!(log.status().failed.is_some_and(|reason| reason.contains("journal")));
    assert_eq!(replica.persisted_end(), at(1));
}

/// A replica that cannot sync keeps its journal file in use. When the ring needs this file, the journal fails.
/// Regression: every other replica of the directory waited forever, and no other broker took over the partitions that
/// they led.
#[test]
fn journal_fails_when_full_of_entries_that_cannot_sync() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut first = log.open_replica(partition(0), at(0)).unwrap();
    let mut second = log.open_replica(partition(1), at(0)).unwrap();
    first.append(&[batch(0, 1, 1, 1, 100)]).unwrap();
    let result = persist(&mut first);
    while log.journal_step() {}
    assert_eq!(result.try_recv().unwrap(), Ok(at(1)));
    disk.fail_syncs(Some("/0/"));
    log.sync_step();
    disk.fail_syncs(None);
    assert_eq!(log.status().failed_replicas.len(), 1);
    let ring = small().journal_bytes;
    let refused = (0..2 * ring / 10_000).find(|base| {
        second.append(&[batch(*base, 1, 1, 1, 10_000)]).unwrap();
        let result = persist(&mut second);
        while log.journal_step() {}
        result.try_recv().expect("the persist call has completed").is_err()
    });
    assert!(refused.is_some_and(|base| base > 1), "other replicas continue while the journal has space: {refused:?}");
    let reason = log.status().failed.expect("the directory accepts no writes");
    assert!(reason.contains(&partition(0).to_string()), "{reason}");
    drop((first, second, log));
    disk.kill();
    let log = open(&disk);
    assert_eq!(read_all(&log.open_replica(partition(0), at(0)).unwrap().reader(), at(0)).unwrap().len(), 1);
}

/// A stop does not write the snapshot at the local start again: after an eviction only this file holds the earlier
/// producer state. Regression: an interrupted stop destroyed the file. A retry of a producer was then accepted as a new
/// batch.
#[test]
fn interrupted_stop_keeps_the_producer_state() {
    for operations in 0..12 {
        let disk = SimDisk::new();
        let log = open(&disk);
        let mut replica = log.open_replica(partition(0), at(0)).unwrap();
        write(&log, &mut replica, &[produced(0, 2, 1, 1, 100, (9, 0, 0))]);
        replica.roll().unwrap();
        replica.evict(at(2)).unwrap();
        disk.fail_writes_after(Some(operations));
        drop(log.close());
        drop((replica, log));
        disk.kill();
        let log = open(&disk);
        let replica = log.open_replica(partition(0), at(0)).unwrap();
        assert_eq!(replica.local_start(), at(2));
        let retry = crate::record::ProducerSequence { id: 9, epoch: 0, base_sequence: 0 };
        let duplicate = SequenceCheck::Duplicate { base: at(0), end: at(2) };
        assert_eq!(replica.producers().check(retry, 2, None), duplicate, "after {operations} operations");
    }
}

/// A start on a full disk uses the space of the reserve, because even a deletion of segments needs space. The reserve
/// is created again when the disk has space.
#[test]
fn full_disk_can_be_opened_and_regains_its_reserve() {
    let options = || LogOptions { reserve_bytes: 64 << 10, ..small() };
    let reserve = Path::new("/data/reserve");
    let has_reserve = |disk: &SimDisk| disk.files().iter().any(|(path, _)| path == reserve);
    let start = |disk: &SimDisk| DataDir::open(Arc::new(disk.clone()), Path::new("/data"), &identity(), options());
    let disk = SimDisk::new();
    let log = start(&disk).unwrap();
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    for base in (0..8).step_by(2) {
        write(&log, &mut replica, &[batch(base, 2, 1, 1, 5000)]);
        replica.roll().unwrap();
    }
    assert!(has_reserve(&disk));
    drop((replica, log));
    disk.kill();
    disk.set_capacity(Some(disk.files().iter().map(|(_, len)| len).sum()));

    let log = start(&disk).unwrap();
    assert!(!has_reserve(&disk));
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    assert_eq!(read_all(&replica.reader(), at(0)).unwrap().len(), 4);
    replica.advance_log_start(at(4));
    assert_eq!(replica.evict(at(4)), Ok(10_000), "deleted files leave the disk");
    log.sync_step();
    assert!(!has_reserve(&disk), "the disk has little space");
    disk.set_capacity(None);
    write(&log, &mut replica, &[batch(8, 1, 1, 1, 5000)]);
    assert!(has_reserve(&disk));
}

/// On a full disk an eviction waits for the journal, and the journal waits for a checkpoint. So the checkpoint uses the
/// space of the reserve.
#[test]
fn checkpoint_on_a_full_disk_uses_the_reserve() {
    let disk = SimDisk::new();
    let options = LogOptions { reserve_bytes: 64 << 10, ..small() };
    let log = DataDir::open(Arc::new(disk.clone()), Path::new("/data"), &identity(), options).unwrap();
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    write(&log, &mut replica, &[batch(0, 2, 1, 1, 5000)]);
    let has_reserve = |disk: &SimDisk| disk.files().iter().any(|(path, _)| path == Path::new("/data/reserve"));
    assert!(has_reserve(&disk));
    disk.set_capacity(Some(disk.files().iter().map(|(_, len)| len).sum()));
    log.recycle_now();
    assert!(!has_reserve(&disk), "the reserve was released");
    drop((replica, log));
    disk.kill();
    disk.set_capacity(None);
    let log = open(&disk);
    assert_eq!(log.open_replica(partition(0), at(0)).unwrap().log_end(), at(2));
}

/// Makes checkpoints fail, so that no journal file is released, and appends until the journal has no space.
fn fill_journal(disk: &SimDisk, log: &DataDir, replica: &mut ReplicaLog) {
    disk.fail_syncs(Some("checkpoint"));
    for base in replica.log_end().get().. {
        replica.append(&[batch(base, 1, 1, 1, 10_000)]).unwrap();
        let result = persist(replica);
        while log.journal_step() {}
        if result.try_recv().is_err() {
            return;
        }
    }
}

/// Advances the time by `seconds`, runs the journal, and returns the reason why the directory accepts no writes; `None`
/// if it does.
async fn failure_after(log: &DataDir, seconds: u64) -> Option<String> {
    tokio::time::advance(Duration::from_secs(seconds)).await;
    while log.journal_step() {}
    log.status().failed
}

/// A journal without space fails if checkpoints have failed for 10 s. Regression: all writers and the followers of this
/// leader waited forever, and no other broker took over.
#[tokio::test(start_paused = true)]
async fn full_journal_fails_if_checkpoints_keep_failing() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    fill_journal(&disk, &log, &mut replica);
    let result = persist(&mut replica);
    assert_eq!(failure_after(&log, 9).await, None);
    disk.fail_syncs(None);
    settle(&log);
    assert_eq!(result.try_recv().unwrap(), Ok(replica.log_end()), "the persist call completes after a checkpoint");
    fill_journal(&disk, &log, &mut replica);
    let result = persist(&mut replica);
    assert_eq!(failure_after(&log, 9).await, None, "the limit counts from the start of the wait");
    let reason = failure_after(&log, 2).await.expect("the limit of the wait has passed");
    assert!(reason.contains("no journal space for 10 s because the checkpoint cannot be written: "), "{reason}");
    assert!(reason.contains("checkpoint.tmp: simulated"), "{reason}");
    assert!(matches!(result.try_recv().unwrap(), Err(PersistError::Failed { .. })));
}

/// While the disk is full, a journal without space waits and does not fail, because the disk may get space. Meanwhile
/// the broker transfers its leadership to other brokers.
#[tokio::test(start_paused = true)]
async fn full_journal_on_a_full_disk_waits_for_space() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    write(&log, &mut replica, &[batch(0, 1, 1, 1, 10_000)]);
    let result = (1..).find_map(|base| {
        let used = disk.files().iter().map(|(_, len)| len).sum::<u64>();
        disk.set_capacity(Some(used + 10_000));
        replica.append(&[batch(base, 1, 1, 1, 10_000)]).unwrap();
        let result = persist(&mut replica);
        while log.journal_step() {}
        result.try_recv().is_err().then_some(result)
    });
    assert_eq!(failure_after(&log, 3600).await, None);
    disk.set_capacity(None);
    settle(&log);
    assert_eq!(result.unwrap().try_recv().unwrap(), Ok(replica.log_end()));
}

/// A stop waits at most 5 s for journal space. Regression: it waited until a checkpoint could be written, possibly
/// forever.
#[tokio::test(start_paused = true)]
async fn stop_waits_for_journal_space_for_a_bounded_time() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    fill_journal(&disk, &log, &mut replica);
    let (persisted, waiting) = (replica.persisted_end(), persist(&mut replica));
    log.begin_shutdown();
    assert_eq!(failure_after(&log, 4).await, None);
    assert!(waiting.try_recv().is_err());
    let reason = failure_after(&log, 2).await.expect("the limit of the wait has passed");
    assert!(reason.contains("the log is closing, and no journal file was released for 5 s"), "{reason}");
    assert!(matches!(waiting.try_recv().unwrap(), Err(PersistError::Failed { .. })));
    assert!(log.close().is_err());
    drop((replica, log));
    disk.fail_syncs(None);
    let log = open(&disk);
    assert!(log.open_replica(partition(0), at(0)).unwrap().log_end() >= persisted, "acknowledged data is kept");
}

/// In step mode nothing makes journal space while a truncation or reset waits for its frame. So a truncation or reset
/// without journal space fails before it changes anything, and works once there is space. Regressions: the change
/// waited forever; later it failed and made the replica fail too.
#[test]
fn change_without_journal_space_fails_and_works_later() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    fill_journal(&disk, &log, &mut replica);
    let end = replica.log_end();
    assert_eq!(replica.truncate(at(1)), Err(ChangeError::DiskFull), "{:?}", log.status());
    assert_eq!(replica.reset(at(5)), Err(ChangeError::DiskFull));
    assert_eq!(replica.log_end(), end, "the log is unchanged");
    disk.fail_syncs(None);
    settle(&log);
    assert_eq!(replica.truncate(at(1)), Ok(at(1)));
    assert_eq!(replica.reset(at(5)), Ok(()));
    assert_eq!(replica.log_end(), at(5));
}

/// A reset writes a snapshot. On a full disk it fails and leaves the replica unchanged. It works when there is space.
#[test]
fn reset_works_when_the_disk_has_space_again() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    write(&log, &mut replica, &[batch(0, 2, 1, 1, 5000)]);
    disk.set_capacity(Some(disk.files().iter().map(|(_, len)| len).sum()));
    assert_eq!(replica.reset(at(9)), Err(ChangeError::DiskFull));
    assert_eq!(read_all(&replica.reader(), at(0)).unwrap().len(), 1);
    disk.set_capacity(None);
    assert_eq!(replica.reset(at(9)), Ok(()));
    write(&log, &mut replica, &[batch(9, 2, 1, 1, 5000)]);
}

/// A replica without data releases the journal file of its creation. Regression: the creation entry was written after
/// the only sync that the replica requested. The file was never released, and when all other files were full, all
/// writers waited forever.
#[test]
fn replica_without_records_does_not_block_the_journal() {
    let log = open(&SimDisk::new());
    let mut busy = log.open_replica(partition(0), at(0)).unwrap();
    write(&log, &mut busy, &[batch(0, 1, 1, 1, 10_000)]);
    let quiet = log.open_replica(partition(1), at(0)).unwrap();
    log.sync_step();
    assert!(log.journal_step(), "the journal is written after the sync");
    for base in 1..3 * small().journal_bytes / 10_000 {
        write(&log, &mut busy, &[batch(base, 1, 1, 1, 10_000)]);
    }
    assert_eq!(quiet.log_end(), at(0));
}

/// A truncation releases the journal files of truncated batches. Regression: the files waited for a sync of these
/// batches, which never came.
#[test]
fn truncated_replica_does_not_block_the_journal() {
    let log = open(&SimDisk::new());
    let mut busy = log.open_replica(partition(0), at(0)).unwrap();
    let mut truncated = log.open_replica(partition(1), at(0)).unwrap();
    settle(&log);
    truncated.append(&[batch(0, 1, 1, 1, 1000), batch(1, 1, 1, 1, 1000)]).unwrap();
    let result = persist(&mut truncated);
    assert!(log.journal_step(), "the journal is written before the sync");
    assert_eq!(result.try_recv().unwrap(), Ok(at(2)));
    assert_eq!(truncated.truncate(at(1)), Ok(at(1)));
    for base in 0..3 * small().journal_bytes / 10_000 {
        write(&log, &mut busy, &[batch(base, 1, 1, 1, 10_000)]);
    }
    assert_eq!(truncated.log_end(), at(1));
}

/// A failed eviction leaves the segments in the log, and can be retried. Regression: the segments were no longer in the
/// log, and their files stayed on the full disk until the next start.
#[test]
fn failed_eviction_can_be_retried() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    write(&log, &mut replica, &[batch(0, 2, 1, 1, 5000)]);
    replica.roll().unwrap();
    fill_journal(&disk, &log, &mut replica);
    assert!(matches!(replica.evict(at(2)), Err(ChangeError::Failed { .. })));
    assert_eq!(replica.local_start(), at(0));
    assert_eq!(read_all(&replica.reader(), at(0)).unwrap()[0].base_offset(), at(0));
    disk.fail_syncs(None);
    settle(&log);
    assert_eq!(replica.evict(at(2)), Ok(5000));
    assert!(!disk.files().iter().any(|(path, _)| path.ends_with(format!("{:020}.log", 0))));
}
