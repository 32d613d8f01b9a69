//! The tables of what lies before a log's start: what a new replica elsewhere begins with.

use std::collections::BTreeSet;

use super::*;
use crate::task::clock;

/// Three sealed segments of three batches each, of two epochs and two producers, and the tables where each of them ends.
fn three(log: &Log) -> (Replica, Vec<(EpochHistory, ProducerTable)>) {
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    let mut tables = Vec::new();
    for segment in 0..3 {
        for n in segment * 3..segment * 3 + 3 {
            let producer = (i64::try_from(n % 2).unwrap(), 0, i32::try_from(n / 2).unwrap());
            write(log, &mut replica, &[produced(n, 1, if n < 4 { 1 } else { 2 }, 1, 1000, producer)]);
        }
        replica.roll().unwrap();
        let epochs = replica.epochs().clone();
        tables.push((epochs, replica.producers().clone()));
    }
    (replica, tables)
}

#[test]
fn a_log_that_lost_its_beginning_knows_what_was_before_it() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let (mut replica, tables) = three(&log);
    assert_eq!(replica.tables_at_start().unwrap(), (at(0), EpochHistory::new(), ProducerTable::new()));
    for (evicted, (epochs, producers)) in (1..).zip(&tables) {
        replica.evict(at(evicted * 3)).unwrap();
        assert_eq!(replica.tables_at_start().unwrap(), (at(evicted * 3), epochs.clone(), producers.clone()));
    }
    // What lies above the start is not in them.
    write(&log, &mut replica, &[produced(9, 1, 3, 1, 1000, (7, 0, 0))]);
    assert_eq!(replica.tables_at_start().unwrap().1, tables[2].0);
    drop(replica);
    disk.crash(1);
    let replica = open(&disk).open_replica(partition(0), at(0)).unwrap();
    let (start, epochs, producers) = replica.tables_at_start().unwrap();
    assert_eq!((start, &(epochs, producers)), (at(9), &tables[2]), "a crash costs none of it");
}

/// Retention deleted all, and a new leader wrote on: its log did not know any more which epoch wrote last before. A new replica that began
/// with these tables began again and again.
#[test]
fn a_log_of_which_all_was_deleted_knows_the_epoch_that_its_tables_end_with() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let (mut replica, tables) = three(&log);
    replica.advance_log_start(at(9));
    replica.evict(at(9)).unwrap();
    write(&log, &mut replica, &[produced(9, 1, 3, 1, 1000, (7, 0, 0))]);
    let (start, epochs, _) = replica.tables_at_start().unwrap();
    assert_eq!((start, &epochs), (at(9), &tables[2].0));
    let ((last, _), end) = (epochs.last().unwrap(), replica.log_end());
    assert_eq!(replica.epochs().end_of(last, end), Some((last, start)));
}

#[test]
fn another_replica_that_begins_with_them_gives_the_same_ones() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let (mut replica, _) = three(&log);
    replica.evict(at(6)).unwrap();
    let (start, epochs, producers) = replica.tables_at_start().unwrap();
    let mut other = log.open_replica(partition(1), at(0)).unwrap();
    other.reset_with(start, epochs.clone(), producers.clone()).unwrap();
    assert_eq!(other.tables_at_start().unwrap(), (start, epochs, producers));
}

#[test]
fn a_damaged_or_missing_snapshot_is_never_taken_for_nothing() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let (mut replica, _) = three(&log);
    replica.evict(at(6)).unwrap();
    let named = |(path, _): &(std::path::PathBuf, u64)| path.to_str().is_some_and(|path| path.ends_with("06.snapshot"));
    let snapshot = disk.files().into_iter().find(named).expect("evicting wrote it").0;
    assert!(disk.flip(&snapshot, 100));
    assert!(replica.tables_at_start().unwrap_err().to_string().contains("06.snapshot is damaged"));
    disk.remove(&snapshot).unwrap();
    assert!(replica.tables_at_start().unwrap_err().to_string().contains("at 6 is gone"));
}

/// Where a reset was done and settled it began with nothing instead.
#[test]
fn the_tables_of_a_reset_are_never_taken_for_nothing_by_a_start() {
    for missing in [false, true] {
        for evicted in [false, true] {
            let disk = SimDisk::new();
            let log = open(&disk);
            let (_, wanted) = three(&log);
            let (epochs, producers) = wanted[1].clone();
            let mut replica = log.open_replica(partition(1), at(0)).unwrap();
            replica.reset_with(at(6), epochs, producers).unwrap();
            write(&log, &mut replica, &[produced(6, 3, 2, 1, 1000, (9, 0, 0))]);
            let had = tables(&replica);
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
                    assert!(evicted && tables(&replica) == had, "it goes with what lay before a later start")
                }
                Err(error) => assert!(!evicted && error.to_string().contains("snapshot"), "{error}"),
            }
        }
    }
}

/// Bit rot where the log begins: a cut took it for a beginning without anything before it, and a retry would have been appended again.
#[test]
fn a_damaged_snapshot_of_the_first_segment_is_never_taken_for_nothing() {
    let rotten = |live: bool| {
        let disk = SimDisk::new();
        let log = open(&disk);
        let (mut replica, _) = three(&log);
        replica.evict(at(3)).unwrap();
        let snapshot = replica.shared.path(at(3), "snapshot");
        if live {
            assert!(disk.flip(&snapshot, 100));
            return replica.truncate(at(4)).unwrap_err().to_string();
        }
        drop((replica, log));
        disk.kill();
        assert!(disk.flip(&snapshot, 100));
        open(&disk).open_replica(partition(0), at(0)).map(drop).unwrap_err().to_string()
    };
    for live in [true, false] {
        let why = rotten(live);
        assert!(why.contains("03.snapshot is damaged"), "{why}");
    }
}

/// What it knows where it ends.
fn tables(replica: &Replica) -> (EpochHistory, ProducerTable) {
    let epochs = replica.epochs().clone();
    (epochs, replica.producers().clone())
}

/// What was known below its start was lost when a crash came between the journal's word and the snapshot: a retry of what lies in the
/// bucket was then not recognised.
#[test]
fn a_reset_that_a_crash_cut_short_never_begins_with_other_tables() {
    let mut ends = BTreeSet::new();
    for operations in 0.. {
        let mut done = false;
        for seed in 0..20 {
            let disk = SimDisk::new();
            let log = open(&disk);
            let (_, wanted) = three(&log);
            let mut replica = log.open_replica(partition(1), at(0)).unwrap();
            write(&log, &mut replica, &[produced(0, 6, 1, 1, 1000, (9, 0, 0))]);
            // A snapshot of its own where it will begin anew.
            replica.roll().unwrap();
            write(&log, &mut replica, &[produced(6, 6, 1, 1, 1000, (9, 0, 6))]);
            let had = tables(&replica);
            let (epochs, producers) = wanted[1].clone();
            disk.fail_writes_after(Some(operations));
            done = replica.reset_with(at(6), epochs, producers).is_ok();
            disk.fail_writes_after(None);
            if seed % 2 == 0 && log.status().failed.is_none() {
                // A checkpoint comes, and the journal goes on: the file with its word about the reset would be used again.
                let mut other = log.open_replica(partition(2), at(0)).unwrap();
                for base in 0..20 {
                    write(&log, &mut other, &[batch(base, 1, 1, 1, 10_000)]);
                }
                log.sync_step();
                log.inner_recycle();
            }
            drop((replica, log));
            disk.crash(seed);
            // The start that does it again is cut short too.
            disk.fail_writes_after(Some(seed));
            let data = Path::new("/data");
            let _cut_short = Log::open(Arc::new(disk.clone()), data, &identity(), small()).map(drop);
            disk.crash(seed + 1);
            let replica = open(&disk).open_replica(partition(1), at(0)).unwrap();
            let (start, end) = (replica.local_start(), replica.log_end());
            let tables = tables(&replica);
            match (start.get(), end.get()) {
                (0, 12) => assert_eq!(tables, had, "{operations} {seed}"),
                (6, 6) => {
                    assert_eq!(tables, wanted[1], "{operations} {seed}");
                    assert_eq!(replica.tables_at_start().unwrap().2, wanted[1].1, "{operations} {seed}");
                }
                other => panic!("after {operations} operations and crash {seed} it holds {other:?}"),
            }
            assert!(!done || start == at(6), "{operations} {seed}");
            ends.insert((start, done));
        }
        if done {
            break;
        }
    }
    assert_eq!(ends, BTreeSet::from([(at(0), false), (at(6), false), (at(6), true)]));
}

/// Waits until the wall clock shows a later time.
fn later() -> i64 {
    let before = clock::wall_ms();
    while clock::wall_ms() <= before {
        std::hint::spin_loop();
    }
    clock::wall_ms()
}

/// A restart made each segment as young as the restart where it was known by its records alone.
#[test]
fn written_time_of_a_segment_outlives_a_stop_and_a_crash() {
    let times = |replica: &Replica| {
        let segments = replica.sealed().into_iter().chain([replica.active()]);
        segments.map(|info| (info.created_ms, info.written_ms)).collect::<Vec<_>>()
    };
    for clean in [true, false] {
        let disk = SimDisk::new();
        let log = open(&disk);
        let mut replica = log.open_replica(partition(0), at(0)).unwrap();
        let made = replica.active().written_ms;
        let began = later();
        write(&log, &mut replica, &[batch(0, 1, 1, 1 << 62, 1000)]);
        later();
        write(&log, &mut replica, &[batch(1, 1, 1, 1 << 62, 1000)]);
        replica.roll().unwrap();
        let sealed = later();
        write(&log, &mut replica, &[batch(2, 1, 1, 5, 1000)]);
        let before = times(&replica);
        assert!(made < began && began <= before[0].0 && before[0].0 < before[0].1 && before[0].1 < sealed);
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
fn written_time_outlives_a_cut() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    write(&log, &mut replica, &[batch(0, 1, 1, 5, 1000)]);
    write(&log, &mut replica, &[batch(1, 1, 1, 5, 1000)]);
    let before = replica.active();
    later();
    replica.truncate(at(1)).unwrap();
    let after = replica.active();
    assert_eq!((after.created_ms, after.written_ms), (before.created_ms, before.written_ms));
    assert_eq!(after.end, at(1));
}

/// A broker whose clock stood years ahead for an hour kept what it wrote then for these years.
#[test]
fn written_time_in_the_future_is_taken_for_now_and_never_goes_back_by_itself() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    write(&log, &mut replica, &[batch(0, 1, 1, 5, 1000)]);
    replica.roll().unwrap();
    write(&log, &mut replica, &[batch(1, 1, 1, 5, 1000)]);
    let written = |replica: &Replica| [replica.sealed()[0].written_ms, replica.active().written_ms];
    let before = written(&replica);
    replica.correct_written_times(before[1] + 1);
    assert_eq!(written(&replica), before, "none lies in the future");
    let now_ms = before[0] - 1_000_000;
    replica.correct_written_times(now_ms);
    assert_eq!(written(&replica), [now_ms; 2]);
}
