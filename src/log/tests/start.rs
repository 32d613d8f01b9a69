//! Epoch history and producer state before a log's start, with which a new replica bootstraps, and write times of
//! segments.

use std::collections::BTreeSet;

use super::*;
use crate::{
    log::format::{replica_dir, segment::name},
    task::clock,
};

/// Creates three sealed segments of three batches each, of two epochs and two producers. Returns the epoch history and
/// producer state at the end of each segment.
fn three_segments(log: &DataDir) -> (ReplicaLog, Vec<(EpochHistory, ProducerTable)>) {
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    let mut tables = Vec::new();
    for segment in 0..3 {
        for offset in segment * 3..segment * 3 + 3 {
            let producer = (i64::try_from(offset % 2).unwrap(), 0, i32::try_from(offset / 2).unwrap());
            write(log, &mut replica, &[produced(offset, 1, if offset < 4 { 1 } else { 2 }, 1, 1000, producer)]);
        }
        replica.roll().unwrap();
        let epochs = replica.epochs().clone();
        tables.push((epochs, replica.producers().clone()));
    }
    (replica, tables)
}

#[test]
fn evicted_log_returns_the_tables_before_its_start() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let (mut replica, tables) = three_segments(&log);
    assert_eq!(replica.tables_at_start().unwrap(), (at(0), EpochHistory::new(), ProducerTable::new()));
    for (evicted, (epochs, producers)) in (1..).zip(&tables) {
        replica.evict(at(evicted * 3)).unwrap();
        assert_eq!(replica.tables_at_start().unwrap(), (at(evicted * 3), epochs.clone(), producers.clone()));
    }
    // The tables at the start do not change with later appends.
    write(&log, &mut replica, &[produced(9, 1, 3, 1, 1000, (7, 0, 0))]);
    assert_eq!(replica.tables_at_start().unwrap().1, tables[2].0);
    drop(replica);
    disk.crash(1);
    let replica = open(&disk).open_replica(partition(0), at(0)).unwrap();
    let (start, epochs, producers) = replica.tables_at_start().unwrap();
    assert_eq!((start, &(epochs, producers)), (at(9), &tables[2]), "a crash loses no table");
}

/// Without any segment below the log end, the epoch history keeps the last epoch before the start. Regression: the
/// history began with the epoch of a new leader. A replica that bootstrapped from it repeated the bootstrap forever.
#[test]
fn fully_evicted_log_keeps_the_last_epoch_of_its_tables() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let (mut replica, tables) = three_segments(&log);
    replica.advance_log_start(at(9));
    replica.evict(at(9)).unwrap();
    write(&log, &mut replica, &[produced(9, 1, 3, 1, 1000, (7, 0, 0))]);
    let (start, epochs, _) = replica.tables_at_start().unwrap();
    assert_eq!((start, &epochs), (at(9), &tables[2].0));
    let ((last, _), end) = (epochs.last().unwrap(), replica.log_end());
    assert_eq!(replica.epochs().end_of(last, end), Some((last, start)));
}

#[test]
fn bootstrapped_replica_returns_the_same_tables() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let (mut replica, _) = three_segments(&log);
    replica.evict(at(6)).unwrap();
    let (start, epochs, producers) = replica.tables_at_start().unwrap();
    let mut other = log.open_replica(partition(1), at(0)).unwrap();
    other.reset_with(start, epochs.clone(), producers.clone()).unwrap();
    assert_eq!(other.tables_at_start().unwrap(), (start, epochs, producers));
}

#[test]
fn corrupt_or_missing_snapshot_is_an_error() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let (mut replica, _) = three_segments(&log);
    replica.evict(at(6)).unwrap();
    let named = |(path, _): &(std::path::PathBuf, u64)| path.to_str().is_some_and(|path| path.ends_with("06.snapshot"));
    let snapshot = disk.files().into_iter().find(named).expect("the eviction wrote the snapshot").0;
    assert!(disk.flip(&snapshot, 100));
    assert!(replica.tables_at_start().unwrap_err().to_string().contains("06.snapshot is corrupt"));
    disk.remove(&snapshot).unwrap();
    assert!(replica.tables_at_start().unwrap_err().to_string().contains("at 6 is missing"));
}

/// A reset writes a snapshot at its offset. If that file is missing or corrupt at a start, the replica is refused,
/// unless an eviction has removed the file. Regression: the log started with empty tables.
#[test]
fn start_without_the_tables_of_a_reset_is_refused() {
    for missing in [false, true] {
        for evicted in [false, true] {
            let disk = SimDisk::new();
            let log = open(&disk);
            let (_, expected_tables) = three_segments(&log);
            let (epochs, producers) = expected_tables[1].clone();
            let mut replica = log.open_replica(partition(1), at(0)).unwrap();
            replica.reset_with(at(6), epochs, producers).unwrap();
            write(&log, &mut replica, &[produced(6, 3, 2, 1, 1000, (9, 0, 0))]);
            let old_tables = tables(&replica);
            if evicted {
                replica.roll().unwrap();
                assert!(replica.evict(at(9)).unwrap() > 0);
            }
            drop((replica, log));
            disk.kill();
            let snapshot =
                Path::new("/data").join(partition(1).topic.to_string()).join("1").join(format!("{:020}.snapshot", 6));
            if !evicted && missing {
                disk.remove(&snapshot).unwrap();
            } else if !evicted {
                assert!(disk.flip(&snapshot, 100));
            }
            match open(&disk).open_replica(partition(1), at(0)) {
                Ok(replica) => {
                    assert!(
                        evicted && tables(&replica) == old_tables,
                        "an eviction removes the snapshot below its start"
                    )
                }
                Err(error) => assert!(!evicted && error.to_string().contains("snapshot"), "{error}"),
            }
        }
    }
}

/// A truncation or an opening fails if the snapshot at the local start is corrupt. Regression: the truncation continued
/// with empty tables, and a retry would have been appended again.
#[test]
fn corrupt_snapshot_of_the_first_segment_is_an_error() {
    let error_of = |is_open: bool| {
        let disk = SimDisk::new();
        let log = open(&disk);
        let (mut replica, _) = three_segments(&log);
        replica.evict(at(3)).unwrap();
        let snapshot = replica_dir(Path::new("/data"), partition(0)).join(name(at(3), "snapshot"));
        if is_open {
            assert!(disk.flip(&snapshot, 100));
            return replica.truncate(at(4)).unwrap_err().to_string();
        }
        drop((replica, log));
        disk.kill();
        assert!(disk.flip(&snapshot, 100));
        open(&disk).open_replica(partition(0), at(0)).map(drop).unwrap_err().to_string()
    };
    for is_open in [true, false] {
        let reason = error_of(is_open);
        assert!(reason.contains("03.snapshot is corrupt"), "{reason}");
    }
}

/// Returns the epoch history and the producer state at the log end.
fn tables(replica: &ReplicaLog) -> (EpochHistory, ProducerTable) {
    let epochs = replica.epochs().clone();
    (epochs, replica.producers().clone())
}

/// After a crash at any operation of a reset, the log has either its old content or the complete tables of the reset.
/// Regressions: a crash between the journal entry and the snapshot lost the tables. A retry of a batch in the object
/// store was then not recognised. The start that repeated the reset removed quarantined files.
#[test]
fn interrupted_reset_has_the_old_or_the_new_tables() {
    let mut ends = BTreeSet::new();
    for operations in 0.. {
        let mut is_complete = false;
        for seed in 0..20 {
            let disk = SimDisk::new();
            let log = open(&disk);
            let (_, expected_tables) = three_segments(&log);
            // The creation of the replica quarantines this file.
            let dir = Path::new("/data").join(partition(1).topic.to_string()).join(partition(1).number.to_string());
            disk.create_dir_all(&dir).unwrap();
            disk.replace(&dir.join(format!("{:020}.log", 0)), b"foreign").unwrap();
            let mut replica = log.open_replica(partition(1), at(0)).unwrap();
            write(&log, &mut replica, &[produced(0, 6, 1, 1, 1000, (9, 0, 0))]);
            // The log has a snapshot at offset 6 already, to which the reset below goes.
            replica.roll().unwrap();
            write(&log, &mut replica, &[produced(6, 6, 1, 1, 1000, (9, 0, 6))]);
            let old_tables = tables(&replica);
            let (epochs, producers) = expected_tables[1].clone();
            disk.fail_writes_after(Some(operations));
            is_complete = replica.reset_with(at(6), epochs, producers).is_ok();
            disk.fail_writes_after(None);
            if seed % 2 == 0 && log.status().failed.is_none() {
                // Many later entries and a checkpoint follow. They would reuse the journal file with the entry of an
                // incomplete reset, if the reset did not keep that file.
                let mut other = log.open_replica(partition(2), at(0)).unwrap();
                for base in 0..20 {
                    write(&log, &mut other, &[batch(base, 1, 1, 1, 10_000)]);
                }
                log.sync_step();
                log.recycle_now();
            }
            drop((replica, log));
            disk.crash(seed);
            // The next start, which repeats the reset, is interrupted too.
            disk.fail_writes_after(Some(seed));
            let data = Path::new("/data");
            let _interrupted = DataDir::open(Arc::new(disk.clone()), data, &identity(), small()).map(drop);
            disk.crash(seed + 1);
            let replica = open(&disk).open_replica(partition(1), at(0)).unwrap();
            let (start, end) = (replica.local_start(), replica.log_end());
            let tables = tables(&replica);
            match (start.get(), end.get()) {
                (0, 12) => assert_eq!(tables, old_tables, "{operations} {seed}"),
                (6, 6) => {
                    assert_eq!(tables, expected_tables[1], "{operations} {seed}");
                    assert_eq!(replica.tables_at_start().unwrap().2, expected_tables[1].1, "{operations} {seed}");
                }
                range => panic!("after {operations} operations and crash {seed} the log is {range:?}"),
            }
            assert!(!is_complete || start == at(6), "{operations} {seed}");
            let quarantined = disk.read(&dir.join(format!("{:020}.log.quarantined-1", 0))).ok();
            assert_eq!(quarantined.as_deref(), Some(&b"foreign"[..]), "{operations} {seed}");
            ends.insert((start, is_complete));
        }
        if is_complete {
            break;
        }
    }
    assert_eq!(ends, BTreeSet::from([(at(0), false), (at(6), false), (at(6), true)]));
}

/// Waits until the wall clock shows a later millisecond, and returns the time.
fn later() -> i64 {
    let before = clock::wall_ms();
    while clock::wall_ms() <= before {
        std::hint::spin_loop();
    }
    clock::wall_ms()
}

/// A restart does not move write times forward. Regression: after a crash, a segment that no checkpoint described had
/// the time of the restart as its write time.
#[test]
fn written_time_of_a_segment_survives_stop_and_crash() {
    let times = |replica: &ReplicaLog| {
        let segments = replica.sealed().into_iter().chain([replica.active_segment()]);
        segments.map(|info| (info.created_ms, info.written_ms)).collect::<Vec<_>>()
    };
    for clean in [true, false] {
        let disk = SimDisk::new();
        let log = open(&disk);
        let mut replica = log.open_replica(partition(0), at(0)).unwrap();
        let created = replica.active_segment().written_ms;
        let first_write = later();
        write(&log, &mut replica, &[batch(0, 1, 1, 1 << 62, 1000)]);
        later();
        write(&log, &mut replica, &[batch(1, 1, 1, 1 << 62, 1000)]);
        replica.roll().unwrap();
        let sealed = later();
        write(&log, &mut replica, &[batch(2, 1, 1, 5, 1000)]);
        let before = times(&replica);
        assert!(
            created < first_write && first_write <= before[0].0 && before[0].0 < before[0].1 && before[0].1 < sealed
        );
        let stopped = later();
        drop(replica);
        if clean {
            log.close().unwrap();
            drop(log);
        } else {
            disk.crash(1);
        }
        let replica = open(&disk).open_replica(partition(0), at(0)).unwrap();
        let after = times(&replica);
        assert_eq!(after.len(), 2);
        if clean {
            assert_eq!(after, before);
        }
        assert!(after[0].1 <= sealed && after[1].1 <= stopped, "{after:?} were {before:?}");
    }
}

#[test]
fn written_time_survives_truncation() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    write(&log, &mut replica, &[batch(0, 1, 1, 5, 1000)]);
    write(&log, &mut replica, &[batch(1, 1, 1, 5, 1000)]);
    let before = replica.active_segment();
    later();
    replica.truncate(at(1)).unwrap();
    let after = replica.active_segment();
    assert_eq!((after.created_ms, after.written_ms), (before.created_ms, before.written_ms));
    assert_eq!(after.end, at(1));
}

/// A write time in the future is set to the present. Regression: a broker whose clock was years ahead for an hour kept
/// the data of that hour for these years.
#[test]
fn written_time_in_the_future_is_set_to_now() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    write(&log, &mut replica, &[batch(0, 1, 1, 5, 1000)]);
    replica.roll().unwrap();
    write(&log, &mut replica, &[batch(1, 1, 1, 5, 1000)]);
    let written = |replica: &ReplicaLog| [replica.sealed()[0].written_ms, replica.active_segment().written_ms];
    let before = written(&replica);
    replica.correct_written_times(before[1] + 1);
    assert_eq!(written(&replica), before, "no time is in the future");
    let now_ms = before[0] - 1_000_000;
    replica.correct_written_times(now_ms);
    assert_eq!(written(&replica), [now_ms; 2]);
}
