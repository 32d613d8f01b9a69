//! Flipped bits, at every place: found or harmless, never other data.

use super::*;

/// A directory with two segments and a checkpoint, killed or closed, and what it holds.
fn filled(close: bool) -> (SimDisk, Vec<Batch>) {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    let produced = |i: u8| produced(u64::from(i) * 3, 3, 1, 100 + i64::from(i), 90, (5, 0, i32::from(i) * 3));
    let batches: Vec<Batch> = (0..4).map(produced).collect();
    write(&log, &mut replica, &batches[..2]);
    replica.roll().unwrap();
    write(&log, &mut replica, &batches[2..]);
    if close {
        log.close().unwrap();
    }
    disk.kill();
    (disk, batches)
}

/// Opens what is left and reads it: the batches as they were, or an error.
fn serve(disk: &SimDisk, batches: &[Batch], what: &str) {
    let options = small();
    let Ok(log) = Log::open(Arc::new(disk.clone()), Path::new("/data"), &identity(), options) else { return };
    if !log.partitions().contains(&partition(0)) {
        panic!("{what}: the replica is gone without a word");
    }
    let Ok(replica) = log.open_replica(partition(0), at(0)) else { return };
    let Ok(read) = read_all(&replica.reader(), replica.local_start()) else { return };
    let have: Vec<_> = read.iter().map(Batch::to_bytes).collect();
    let want: Vec<_> = batches.iter().map(Batch::to_bytes).collect();
    assert!(have == want, "{what}: other data was served");
}

fn flip_everywhere(close: bool, part: &str) {
    let (disk, batches) = filled(close);
    let found: Vec<_> = disk.files().into_iter().filter(|(path, _)| path.to_string_lossy().contains(part)).collect();
    assert!(found.iter().any(|(_, len)| *len > 0), "{part}");
    for (path, len) in found {
        for byte in 0..len.min(600) {
            let (disk, _) = filled(close);
            assert!(disk.flip(&path, byte * 8 + byte % 8));
            serve(&disk, &batches, &format!("{}, byte {byte}, closed {close}", path.display()));
        }
    }
}

#[test]
fn a_flipped_bit_in_a_segment_is_found() {
    flip_everywhere(true, ".log");
    flip_everywhere(false, ".log");
}

#[test]
fn a_flipped_bit_in_an_index_or_snapshot_is_harmless() {
    for part in [".index", ".timeindex", ".snapshot"] {
        flip_everywhere(true, part);
        flip_everywhere(false, part);
    }
}

#[test]
fn a_flipped_bit_in_the_checkpoint_is_found() {
    flip_everywhere(true, "checkpoint");
    flip_everywhere(false, "checkpoint");
}

#[test]
fn a_flipped_bit_in_the_journal_is_harmless_while_the_segments_are_whole_or_is_found() {
    flip_everywhere(false, ".journal");
}

/// The power fails, a journaled round that was acknowledged is damaged: its replica is refused, the other is served.
#[test]
fn a_damaged_round_of_the_journal_refuses_only_whose_data_it_held() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut first = log.open_replica(partition(0), at(0)).unwrap();
    let mut second = log.open_replica(partition(1), at(0)).unwrap();
    log.sync_step();
    let batches = [batch(0, 3, 1, 5, 3000), batch(3, 3, 1, 6, 3000)];
    for (is_first, batch) in [(true, &batches[0]), (false, &batches[0]), (false, &batches[1])] {
        let replica = if is_first { &mut first } else { &mut second };
        replica.append(std::slice::from_ref(batch)).unwrap();
        let answer = persist(replica);
        while log.journal_step() {}
        answer.recv().unwrap().unwrap();
    }
    drop((first, second, log));
    disk.crash(1);
    // The first round holds the two creations or comes after theirs; its payload is the first replica's.
    let journal =
        disk.files().into_iter().find(|(path, _)| path.extension().is_some_and(|e| e == "journal")).unwrap().0;
    let bytes = disk.read(&journal).unwrap();
    let payload = batches[0].records_bytes();
    let place = bytes.windows(64).position(|window| window == &payload[..64]).unwrap();
    assert!(disk.flip(&journal, place as u64 * 8));
    // Of the segment nothing was synced: what is there of it is damaged too.
    let segment = replica_file(0);
    if disk.read(&segment).is_ok_and(|bytes| !bytes.is_empty()) {
        disk.flip(&segment, 800);
    }
    let log = open(&disk);
    let Err(error) = log.open_replica(partition(0), at(0)) else { panic!("served") };
    assert!(matches!(error, ReplicaError::Lost { .. }), "{error}");
    let second = log.open_replica(partition(1), at(0)).unwrap();
    assert_eq!(read_all(&second.reader(), at(0)).unwrap().len(), 2);
    // To copy the partition again it is deleted first.
    log.delete_replica(partition(0)).unwrap();
    assert_eq!(log.open_replica(partition(0), at(6)).unwrap().log_end(), at(6));
}

/// A reader at the start was told that offset 0 is damaged, and got nothing.
#[test]
fn what_lies_before_damage_is_served_and_the_damaged_batch_is_the_one_named() {
    for (byte, says) in [(100, "CRC"), (8, ""), (3, "begins at offset"), (13, "its leader epoch is 65537, not 1")] {
        let disk = SimDisk::new();
        let log = open(&disk);
        let mut replica = log.open_replica(partition(0), at(0)).unwrap();
        let batches: Vec<Batch> = (0..8).map(|i| batch(i * 3, 3, 1, 1, 1000)).collect();
        write(&log, &mut replica, &batches);
        log.close().unwrap();
        drop((replica, log));
        disk.kill();
        assert!(disk.flip(&replica_file(0), (5 * 1000 + byte) * 8));
        let log = open(&disk);
        let reader = log.open_replica(partition(0), at(0)).unwrap().reader();
        let read = reader.read_disk(at(0), at(24), 1 << 20).unwrap();
        assert_eq!((read.next, read.bytes), (at(15), 5000), "{says}");
        let Err(ReadError::Damaged { offset, why, .. }) = reader.read_disk(at(15), at(24), 1 << 20) else {
            panic!("{says}: served")
        };
        assert_eq!(offset, at(15));
        assert!(why.contains(says), "{says}: {why}");
    }
}

fn replica_file(number: u32) -> std::path::PathBuf {
    Path::new("/data").join(partition(number).topic.to_string()).join(number.to_string()).join(format!("{:020}.log", 0))
}

#[test]
fn a_synced_segment_that_is_missing_or_short_is_lost_and_its_files_are_kept() {
    let (disk, _) = filled(false);
    drop(open(&disk));
    disk.kill();
    let log = open(&disk);
    drop(log.open_replica(partition(0), at(0)).unwrap());
    settle(&log);
    log.inner_recycle();
    drop(log);
    disk.kill();
    let file = disk.open(&replica_file(0), disk::Mode::Write).unwrap();
    file.truncate(100).unwrap();
    let log = open(&disk);
    let Err(ReplicaError::Lost { persisted, why, .. }) = log.open_replica(partition(0), at(0)) else {
        panic!("it was opened")
    };
    assert_eq!(persisted, at(12));
    assert!(why.contains("100 of 180 bytes"), "{why}");
    assert_eq!(disk.read(&replica_file(0)).unwrap().len(), 100);
    // A clean stop once took the record of what nobody had read for what is there, and the next start served it.
    log.close().unwrap();
    drop(log);
    let log = open(&disk);
    assert!(!log.opened_clean());
    assert!(matches!(log.open_replica(partition(0), at(0)), Err(ReplicaError::Lost { .. })), "still lost");
}

/// A replica that nobody was told of leaves files behind when it is forgotten. Made again, its new file once did not yet
/// replace the old one for good, and a loss of power brought back the old records in the place of the new ones.
#[test]
fn a_replica_made_anew_holds_nothing_of_one_that_was_forgotten() {
    for seed in 0..40 {
        let disk = SimDisk::new();
        drop(open(&disk));
        let log = open(&disk);
        let mut replica = log.open_replica(partition(0), at(0)).unwrap();
        replica.append(&[batch(0, 7, 1, 1, 300)]).unwrap();
        // As if its file had come to rest and its creation had not: the journal never heard of it.
        replica.shared.sync().unwrap();
        drop((replica, log));
        disk.kill();
        let log = open(&disk);
        assert_eq!(log.partitions(), [], "its creation was not written");
        let mut replica = log.open_replica(partition(0), at(0)).unwrap();
        assert!(log.journal_step(), "the new one's creation is");
        replica.append(&[batch(0, 1, 1, 1, 100)]).unwrap();
        drop((replica, log));
        disk.crash(seed);
        let log = open(&disk);
        let replica = log.open_replica(partition(0), at(0)).unwrap();
        assert!(replica.log_end() <= at(1), "seed {seed}: old records up to {}", replica.log_end());
    }
}
