//! The tables of what lies before a log's start: what a new replica elsewhere begins with.

use super::*;

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
    assert!(replica.tables_at_start().unwrap_err().to_string().contains("at 6 is damaged"));
    disk.remove(&snapshot).unwrap();
    assert!(replica.tables_at_start().unwrap_err().to_string().contains("at 6 is gone"));
}
