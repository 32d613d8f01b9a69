//! Reading from memory and from files, by offset and by time.

use super::*;

#[test]
fn memory_and_disk_give_the_same_batches_and_end_at_the_bound() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut replica = log.open_replica(partition(0), at(10)).unwrap();
    let batches: Vec<Batch> = (0..20).map(|i| batch(10 + i * 5, 5, 1, 1000 + i as i64, 700)).collect();
    replica.append(&batches[..10]).unwrap();
    replica.roll().unwrap();
    replica.append(&batches[10..]).unwrap();
    let reader = replica.reader();
    for from in 10..110 {
        let memory = reader.read_memory(at(from), at(110), 1).unwrap();
        let file = reader.read_disk(at(from), at(110), 1).unwrap();
        let index = usize::try_from((from - 10) / 5).unwrap();
        assert_eq!(join(&memory), batches[index].to_bytes(), "one batch, although it exceeds the limit");
        assert_eq!((join(&memory), memory.next), (join(&file), file.next));
    }
    assert_eq!(reader.read_memory(at(10), at(14), 1 << 20).unwrap().bytes, 0, "a batch beyond the bound");
    assert_eq!(reader.read_disk(at(10), at(14), 1 << 20).unwrap().bytes, 0);
    assert_eq!(reader.read_disk(at(10), at(110), 1 << 20).unwrap().next, at(60), "up to the end of the segment");
    assert!(matches!(reader.read_disk(at(9), at(110), 1), Err(LogReadError::OutOfRange { .. })));
    for (time, base) in [(0, 10), (1000, 10), (1001, 15), (1010, 60), (1019, 105)] {
        let batch = reader.batch_for_time(time, at(10), at(110), usize::MAX).unwrap().unwrap();
        assert_eq!((batch.base_offset(), batch.leader_epoch()), (at(base), Some(LeaderEpoch(1))), "{time}");
    }
    assert_eq!(reader.batch_for_time(1020, at(10), at(110), usize::MAX).unwrap(), None);
    assert_eq!(reader.batch_for_time(1019, at(10), at(105), usize::MAX).unwrap(), None, "beyond the bound");
    let export = replica.export(at(10)).unwrap();
    let mut buffer = vec![0; 8000];
    assert_eq!(export.read_at(&mut buffer, 0).unwrap(), 7000);
    assert_eq!(export.index[0].offset, at(10));
    // The holder of an export can still read the bytes after the eviction.
    assert_eq!(replica.evict(at(60)).unwrap(), 7000);
    assert_eq!(export.read_at(&mut buffer, 0).unwrap(), 7000);
    assert!(matches!(reader.read_disk(at(10), at(110), 1), Err(LogReadError::OutOfRange { .. })));
}

/// A batch above `max_batch_bytes` is refused before it is read. Regression: memory for a batch was reserved after the
/// read. Eight batches of 64 MiB were in memory before the first reservation.
#[test]
fn batch_above_the_limit_is_not_read() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    replica.append(&[batch(0, 1, 1, 1000, 300), batch(1, 1, 1, 1001, 50_000)]).unwrap();
    let reader = replica.reader();
    let read =
        |from, max_bytes, max_batch_bytes| reader.read_disk(at(from), at(2), ReadLimits { max_bytes, max_batch_bytes });
    assert_eq!(read(0, 1000, 1000).unwrap().next, at(1), "only the small batch is read");
    let needed = batch(1, 1, 1, 1001, 50_000).encoded_len();
    for limit in [1000, needed - 1] {
        assert!(
            matches!(read(1, 1000, limit), Err(LogReadError::BatchTooLarge { bytes }) if bytes == needed),
            "{limit}"
        );
    }
    assert_eq!(read(1, 1000, needed).unwrap().next, at(2));
    // A search by time reads up to `limits::SEARCH_BYTES` at once, so this batch needs no larger limit.
    assert!(reader.batch_for_time(1001, at(0), at(2), 1).unwrap().is_some());
}

/// An export makes the segment durable on this disk. Regression, found by review: for a `replicated` topic the object
/// store held data that a power failure removed from the disk. No replica could then lead from that disk.
#[test]
fn exported_segment_is_durable_on_the_local_disk_first() {
    for seed in 0..20 {
        let disk = SimDisk::new();
        let log = open(&disk);
        let mut replica = log.open_replica(partition(0), at(0)).unwrap();
        log.journal_step();
        let batches: Vec<Batch> = (0..20).map(|i| batch(i * 5, 5, 1, 1000, 700)).collect();
        replica.append(&batches[..10]).unwrap();
        replica.roll().unwrap();
        replica.append(&batches[10..]).unwrap();
        let export = replica.export(at(0)).unwrap();
        drop((replica, log));
        disk.crash(seed);
        let replica = open(&disk).open_replica(partition(0), at(0)).unwrap();
        assert!(replica.log_end() >= export.info.end, "seed {seed}: {} of {}", replica.log_end(), export.info.end);
    }
}

#[test]
fn tail_cache_keeps_its_budget_and_evicts_the_oldest() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut first = log.open_replica(partition(0), at(0)).unwrap();
    let mut second = log.open_replica(partition(1), at(0)).unwrap();
    first.append(&[batch(0, 1, 1, 1, 10_000)]).unwrap();
    for i in 0..10 {
        second.append(&[batch(i, 1, 1, 1, 10_000)]).unwrap();
        assert!(log.status().tail_bytes <= small().tail_bytes);
    }
    assert_eq!(first.reader().read_memory(at(0), at(1), 1), None);
    assert_eq!(second.reader().read_memory(at(0), at(10), 1), None);
    assert!(second.reader().read_memory(at(9), at(10), 1).is_some());
    assert_eq!(second.truncate(at(9)).unwrap(), at(9));
    assert_eq!(second.reader().read_memory(at(9), at(10), 1), None, "truncated batches are not in memory");
}

#[test]
fn retry_is_recognised_after_restart_and_truncation() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    let end = (crate::limits::MAX_BATCHES_PER_PRODUCER as u64 + 3) * 2;
    let sequence = |offset: u64| i32::try_from(offset).unwrap();
    for base in (0..end).step_by(2) {
        write(&log, &mut replica, &[produced(base, 2, 1, 1, 100, (9, 0, sequence(base)))]);
    }
    let check = |replica: &ReplicaLog, base: u64| {
        let stamp = crate::record::ProducerSequence { id: 9, epoch: 0, base_sequence: sequence(base) };
        replica.producers().check(stamp, 2, None)
    };
    assert_eq!(check(&replica, end - 2), SequenceCheck::Duplicate { base: at(end - 2), end: at(end) });
    assert_eq!(check(&replica, 4), SequenceCheck::OutOfOrder { expected: sequence(end) }, "older than the window");
    drop((replica, log));
    disk.crash(3);
    let log = open(&disk);
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    assert_eq!(check(&replica, end), SequenceCheck::New);
    replica.truncate(at(end - 4)).unwrap();
    assert_eq!(check(&replica, end - 4), SequenceCheck::New, "truncated batches may be written again");
    assert_eq!(check(&replica, end - 6), SequenceCheck::Duplicate { base: at(end - 6), end: at(end - 4) });
}

/// A truncation removes the snapshots above the new log end, such as that of a stop. Regression: the log grew to the
/// offset of such a snapshot, and used it if the power failed before the new snapshot was synced. The log then had
/// producers of truncated batches.
#[test]
fn snapshot_of_a_truncated_log_is_not_used_again() {
    for seed in 0..60 {
        let disk = SimDisk::new();
        let log = open(&disk);
        let mut replica = log.open_replica(partition(0), at(0)).unwrap();
        write(&log, &mut replica, &[produced(0, 2, 1, 1, 100, (1, 0, 0))]);
        write(&log, &mut replica, &[produced(2, 2, 1, 1, 100, (1, 0, 2))]);
        log.close().unwrap();
        drop((replica, log));
        disk.crash(seed);
        let log = open(&disk);
        let mut replica = log.open_replica(partition(0), at(0)).unwrap();
        replica.truncate(at(2)).unwrap();
        write(&log, &mut replica, &[produced(2, 2, 2, 1, 100, (2, 0, 0))]);
        replica.roll().unwrap();
        write(&log, &mut replica, &[batch(4, 1, 2, 1, 100)]);
        drop((replica, log));
        disk.crash(1000 + seed);
        let log = open(&disk);
        let mut replica = log.open_replica(partition(0), at(0)).unwrap();
        // The truncation to 4 uses the snapshot there, if the crash kept it, else the batches below 4.
        replica.truncate(at(4)).unwrap();
        let stamp = |id, base_sequence| crate::record::ProducerSequence { id, epoch: 0, base_sequence };
        let check = |stamp| replica.producers().check(stamp, 2, None);
        assert_eq!(check(stamp(1, 2)), SequenceCheck::New, "seed {seed}: the batch was truncated");
        assert_eq!(check(stamp(2, 0)), SequenceCheck::Duplicate { base: at(2), end: at(4) }, "seed {seed}");
    }
}
