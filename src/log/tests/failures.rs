//! A full disk, a failing sync.

use super::*;

#[test]
fn a_full_disk_refuses_appends_and_they_go_on_when_there_is_room() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    let end = write(&log, &mut replica, &[batch(0, 2, 1, 1, 5000)]);
    let used: u64 = disk.files().iter().map(|(_, len)| len).sum();
    disk.set_capacity(Some(used + 3000));
    // The first batch would fit: nothing of the group stays.
    let group = [batch(2, 1, 1, 2, 2000), batch(3, 1, 1, 2, 2000)];
    assert_eq!(replica.append(&group), Err(AppendError::DiskFull));
    assert_eq!(replica.append(&group), Err(AppendError::DiskFull));
    assert!(log.status().disk_full);
    assert_eq!(replica.log_end(), end);
    assert_eq!(read_all(&replica.reader(), at(0)).unwrap().len(), 1);
    disk.set_capacity(None);
    assert_eq!(write(&log, &mut replica, &group), at(4));
    assert!(!log.status().disk_full);
    assert_eq!(read_all(&replica.reader(), at(0)).unwrap().len(), 3);
}

#[test]
fn a_failed_sync_of_a_segment_ends_writing_to_its_replica_only() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut first = log.open_replica(partition(0), at(0)).unwrap();
    let mut second = log.open_replica(partition(1), at(0)).unwrap();
    write(&log, &mut first, &[batch(0, 1, 1, 1, 100)]);
    first.append(&[batch(1, 1, 1, 1, 100)]).unwrap();
    disk.fail_syncs(Some("/0/"));
    log.sync_step();
    disk.fail_syncs(None);
    assert!(matches!(first.append(&[batch(2, 1, 1, 1, 100)]), Err(AppendError::Failed { .. })));
    assert!(matches!(persist(&mut first).recv().unwrap(), Err(PersistError::Failed { .. })));
    assert_eq!(log.status().failed_replicas.len(), 1);
    assert_eq!(read_all(&first.reader(), at(0)).unwrap().len(), 2, "reading goes on");
    assert_eq!(write(&log, &mut second, &[batch(0, 1, 1, 1, 100)]), at(1));
}

#[test]
fn a_failed_sync_of_the_journal_ends_writing_to_the_directory() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    write(&log, &mut replica, &[batch(0, 1, 1, 1, 100)]);
    disk.fail_syncs(Some("journal"));
    replica.append(&[batch(1, 1, 1, 1, 100)]).unwrap();
    let answer = persist(&mut replica);
    log.journal_step();
    assert!(matches!(answer.recv().unwrap(), Err(PersistError::Failed { .. })));
    disk.fail_syncs(None);
    assert!(matches!(replica.append(&[batch(2, 1, 1, 1, 100)]), Err(AppendError::Failed { .. })));
    assert!(log.status().failed.is_some_and(|reason| reason.contains("journal")));
    assert_eq!(replica.persisted_end(), at(1));
}

/// The ring could never go round again, and every other replica of the directory waited for ever: nobody took over what they led.
#[test]
fn what_a_replica_cannot_sync_stays_in_the_journal_until_that_has_no_room_and_says_so() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut first = log.open_replica(partition(0), at(0)).unwrap();
    let mut second = log.open_replica(partition(1), at(0)).unwrap();
    first.append(&[batch(0, 1, 1, 1, 100)]).unwrap();
    let answer = persist(&mut first);
    while log.journal_step() {}
    assert_eq!(answer.try_recv().unwrap(), Ok(at(1)));
    disk.fail_syncs(Some("/0/"));
    log.sync_step();
    disk.fail_syncs(None);
    assert_eq!(log.status().failed_replicas.len(), 1);
    let ring = small().journal_bytes;
    let refused = (0..2 * ring / 10_000).find(|base| {
        second.append(&[batch(*base, 1, 1, 1, 10_000)]).unwrap();
        let answer = persist(&mut second);
        while log.journal_step() {}
        answer.try_recv().expect("answered").is_err()
    });
    assert!(refused.is_some_and(|base| base > 1), "others go on as long as there is room: {refused:?}");
    let why = log.status().failed.expect("nothing is taken any more");
    assert!(why.contains(&partition(0).to_string()), "{why}");
    drop((first, second, log));
    disk.kill();
    let log = open(&disk);
    assert_eq!(read_all(&log.open_replica(partition(0), at(0)).unwrap().reader(), at(0)).unwrap().len(), 1);
}

/// After an eviction the snapshot at the local start is all that is known of what lay before. A stop once wrote it anew, and one that
/// was cut short left nothing of it: a producer's retry was then taken for a new batch.
#[test]
fn a_stop_that_fails_half_way_forgets_no_producer() {
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
        let retry = crate::record::ProducerStamp { id: 9, epoch: 0, base_sequence: 0 };
        let known = Verdict::Duplicate { base: at(0), end: at(2) };
        assert_eq!(replica.producers().check(retry, 2, None), known, "after {operations} operations");
    }
}

/// What lets segments go needs room itself: a broker that could not start on a full disk could never be helped.
#[test]
fn a_disk_that_others_filled_to_the_last_byte_can_be_opened_and_takes_its_reserve_again_later() {
    let options = || Options { reserve_bytes: 64 << 10, ..small() };
    let reserve = Path::new("/data/reserve");
    let held = |disk: &SimDisk| disk.files().iter().any(|(path, _)| path == reserve);
    let start = |disk: &SimDisk| Log::open(Arc::new(disk.clone()), Path::new("/data"), &identity(), options());
    let disk = SimDisk::new();
    let log = start(&disk).unwrap();
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    for base in (0..8).step_by(2) {
        write(&log, &mut replica, &[batch(base, 2, 1, 1, 5000)]);
        replica.roll().unwrap();
    }
    assert!(held(&disk));
    drop((replica, log));
    disk.kill();
    disk.set_capacity(Some(disk.files().iter().map(|(_, len)| len).sum()));

    let log = start(&disk).unwrap();
    assert!(!held(&disk));
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    assert_eq!(read_all(&replica.reader(), at(0)).unwrap().len(), 4);
    replica.advance_log_start(at(4));
    assert_eq!(replica.evict(at(4)), Ok(10_000), "what is deleted leaves the disk");
    log.sync_step();
    assert!(!held(&disk), "there is no plenty yet");
    disk.set_capacity(None);
    write(&log, &mut replica, &[batch(8, 1, 1, 1, 5000)]);
    assert!(held(&disk));
}

/// While the disk has not one byte, whoever removes segments waits for the journal, and the journal for a checkpoint.
#[test]
fn a_checkpoint_that_finds_no_room_takes_that_of_the_reserve() {
    let disk = SimDisk::new();
    let options = Options { reserve_bytes: 64 << 10, ..small() };
    let log = Log::open(Arc::new(disk.clone()), Path::new("/data"), &identity(), options).unwrap();
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    write(&log, &mut replica, &[batch(0, 2, 1, 1, 5000)]);
    let reserve = |disk: &SimDisk| disk.files().iter().any(|(path, _)| path == Path::new("/data/reserve"));
    assert!(reserve(&disk));
    disk.set_capacity(Some(disk.files().iter().map(|(_, len)| len).sum()));
    log.inner_recycle();
    assert!(!reserve(&disk), "it was given up");
    drop((replica, log));
    disk.kill();
    disk.set_capacity(None);
    let log = open(&disk);
    assert_eq!(log.open_replica(partition(0), at(0)).unwrap().log_end(), at(2));
}

/// Appends until the journal has no room: no checkpoint can be written that would free its files.
fn fill_journal(disk: &SimDisk, log: &Log, replica: &mut Replica) {
    disk.fail_syncs(Some("checkpoint"));
    for base in replica.log_end().get().. {
        replica.append(&[batch(base, 1, 1, 1, 10_000)]).unwrap();
        let answer = persist(replica);
        while log.journal_step() {}
        if answer.try_recv().is_err() {
            return;
        }
    }
}

/// What is wrong with the log when so much time has passed.
async fn later(log: &Log, seconds: u64) -> Option<String> {
    tokio::time::advance(Duration::from_secs(seconds)).await;
    while log.journal_step() {}
    log.status().failed
}

/// Everybody waited, the leader's followers too, and no other broker took over.
#[tokio::test(start_paused = true)]
async fn a_journal_that_has_no_room_because_checkpoints_fail_says_so_after_some_seconds() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    fill_journal(&disk, &log, &mut replica);
    let answer = persist(&mut replica);
    assert_eq!(later(&log, 9).await, None);
    disk.fail_syncs(None);
    settle(&log);
    assert_eq!(answer.try_recv().unwrap(), Ok(replica.log_end()), "it goes on when they can be written again");
    fill_journal(&disk, &log, &mut replica);
    let answer = persist(&mut replica);
    assert_eq!(later(&log, 9).await, None, "it counts from when there was no room");
    let why = later(&log, 2).await.expect("it has waited long enough");
    assert!(why.contains("no room for 10 s because the checkpoint cannot be written: "), "{why}");
    assert!(why.contains("checkpoint.tmp: simulated"), "{why}");
    assert!(matches!(answer.try_recv().unwrap(), Err(PersistError::Failed { .. })));
}

/// Room may come, and who cannot write for want of it hands over what others can lead.
#[tokio::test(start_paused = true)]
async fn a_journal_that_has_no_room_because_the_disk_is_full_waits_for_it() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    write(&log, &mut replica, &[batch(0, 1, 1, 1, 10_000)]);
    let answer = (1..).find_map(|base| {
        let used = disk.files().iter().map(|(_, len)| len).sum::<u64>();
        disk.set_capacity(Some(used + 10_000));
        replica.append(&[batch(base, 1, 1, 1, 10_000)]).unwrap();
        let answer = persist(&mut replica);
        while log.journal_step() {}
        answer.try_recv().is_err().then_some(answer)
    });
    assert_eq!(later(&log, 3600).await, None);
    disk.set_capacity(None);
    settle(&log);
    assert_eq!(answer.unwrap().try_recv().unwrap(), Ok(replica.log_end()));
}

/// Whoever writes waits for the journal, and it waited without an end until a checkpoint could be written: such a broker was asked to stop
/// and never did.
#[tokio::test(start_paused = true)]
async fn a_stop_waits_for_room_in_the_journal_for_some_seconds_and_no_longer() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    fill_journal(&disk, &log, &mut replica);
    let (persisted, stuck) = (replica.persisted_end(), persist(&mut replica));
    log.expect_close();
    assert_eq!(later(&log, 4).await, None);
    assert!(stuck.try_recv().is_err());
    let why = later(&log, 2).await.expect("it has waited long enough");
    assert!(why.contains("the log stops, and no file of the journal came free for 5 s"), "{why}");
    assert!(matches!(stuck.try_recv().unwrap(), Err(PersistError::Failed { .. })));
    assert!(log.close().is_err());
    drop((replica, log));
    disk.fail_syncs(None);
    let log = open(&disk);
    assert!(log.open_replica(partition(0), at(0)).unwrap().log_end() >= persisted, "what was acknowledged is there");
}

/// Without threads nobody makes room while a change waits for its round: it waited for ever. Then it failed, and the replica with it,
/// when the disk had room again.
#[test]
fn a_change_that_finds_no_room_in_a_journal_stepped_by_hand_says_so_and_works_later() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    fill_journal(&disk, &log, &mut replica);
    let end = replica.log_end();
    assert_eq!(replica.truncate(at(1)), Err(ChangeError::DiskFull), "{:?}", log.status());
    assert_eq!(replica.reset(at(5)), Err(ChangeError::DiskFull));
    assert_eq!(replica.log_end(), end, "nothing was changed");
    disk.fail_syncs(None);
    settle(&log);
    assert_eq!(replica.truncate(at(1)), Ok(at(1)));
    assert_eq!(replica.reset(at(5)), Ok(()));
    assert_eq!(replica.log_end(), at(5));
}

/// A replica that begins anew writes a file. Where others have filled the disk it stays as it is, and begins when there is room.
#[test]
fn a_replica_begins_anew_when_the_disk_has_room_again() {
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

/// What the journal says of its making was written after the one sync that it would ever have asked for: that file of the ring was never
/// given up, and when the others were full everybody waited for ever.
#[test]
fn a_replica_that_gets_no_records_does_not_hold_the_journal_up() {
    let log = open(&SimDisk::new());
    let mut busy = log.open_replica(partition(0), at(0)).unwrap();
    write(&log, &mut busy, &[batch(0, 1, 1, 1, 10_000)]);
    let quiet = log.open_replica(partition(1), at(0)).unwrap();
    log.sync_step();
    assert!(log.journal_step(), "the journal comes later");
    for base in 1..3 * small().journal_bytes / 10_000 {
        write(&log, &mut busy, &[batch(base, 1, 1, 1, 10_000)]);
    }
    assert_eq!(quiet.log_end(), at(0));
}

/// What was cut is never synced, and the file of the ring that held it was never given up.
#[test]
fn a_replica_that_was_cut_does_not_hold_the_journal_up() {
    let log = open(&SimDisk::new());
    let mut busy = log.open_replica(partition(0), at(0)).unwrap();
    let mut cut = log.open_replica(partition(1), at(0)).unwrap();
    settle(&log);
    cut.append(&[batch(0, 1, 1, 1, 1000), batch(1, 1, 1, 1, 1000)]).unwrap();
    let answer = persist(&mut cut);
    assert!(log.journal_step(), "before the segment is synced");
    assert_eq!(answer.try_recv().unwrap(), Ok(at(2)));
    assert_eq!(cut.truncate(at(1)), Ok(at(1)));
    for base in 0..3 * small().journal_bytes / 10_000 {
        write(&log, &mut busy, &[batch(base, 1, 1, 1, 10_000)]);
    }
    assert_eq!(cut.log_end(), at(1));
}

/// Its segments were forgotten first: their files stayed until the next start, just when there was no room.
#[test]
fn an_eviction_that_fails_is_tried_again() {
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
