//! Files of a data directory that were removed, or that are on a device that is not mounted. Their absence never counts
//! as a first start, and is always reported.

use super::*;

const JOURNAL: &str = "/data/journal";

fn open_with(disk: &SimDisk, options: LogOptions) -> Result<DataDir, DataDirError> {
    DataDir::open(Arc::new(disk.clone()), Path::new("/data"), &identity(), options)
}

/// Returns the error of an opening that must fail.
fn refused(disk: &SimDisk, options: LogOptions) -> DataDirError {
    match open_with(disk, options) {
        Ok(_) => panic!("opened"),
        Err(error) => error,
    }
}

/// Returns options with the journal in another directory.
fn other_journal_dir() -> LogOptions {
    LogOptions { journal_dir: Some("/other".into()), ..small() }
}

/// Removes all files whose path contains `part`.
fn remove_matching(disk: &SimDisk, part: &str) {
    for (path, _) in disk.files() {
        if path.to_string_lossy().contains(part) {
            disk.remove(&path).unwrap();
        }
    }
}

/// Returns the segment files that are not empty, with their content.
fn segments(disk: &SimDisk) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    let segment = |(path, _): (std::path::PathBuf, u64)| {
        let bytes = disk.read(&path).unwrap();
        (path.extension().is_some_and(|extension| extension == "log") && !bytes.is_empty()).then_some((path, bytes))
    };
    disk.files().into_iter().filter_map(segment).collect()
}

/// Returns a disk whose data directory has an acknowledged batch of two records. With `close` the shutdown was clean.
/// Otherwise the records are only in the journal and in the page cache.
fn disk_with_batch(close: bool) -> SimDisk {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    replica.append(&[batch(0, 2, 1, 1, 5000)]).unwrap();
    let result = persist(&mut replica);
    while log.journal_step() {}
    assert_eq!(result.try_recv().unwrap(), Ok(at(2)));
    if close {
        log.close().unwrap();
    }
    drop((replica, log));
    disk.kill();
    disk
}

/// Opens the replica and returns its log end.
fn end(log: &DataDir) -> Offset {
    log.open_replica(partition(0), at(0)).unwrap().log_end()
}

/// A directory with data and without an identity file is refused, and its files stay unchanged. Regression: the
/// directory got a new identity, and every segment was emptied.
#[test]
fn directory_without_identity_is_refused_and_unchanged() {
    for close in [true, false] {
        let disk = disk_with_batch(close);
        disk.remove(Path::new("/data/strandline.json")).unwrap();
        let before = segments(&disk);
        let text = refused(&disk, small()).to_string();
        assert!(text.contains("strandline.json") && text.contains("checkpoint, a journal"), "{text}");
        let identity_file = &text[text.find('{').unwrap()..=text.rfind('}').unwrap()];
        assert_eq!(segments(&disk), before);
        // The identity file that the error proposes makes the directory usable again.
        disk.replace(Path::new("/data/strandline.json"), identity_file.as_bytes()).unwrap();
        assert_eq!(end(&open(&disk)), at(2));
    }
}

#[test]
fn any_data_refuses_a_directory_without_identity() {
    for (keep, message) in [("checkpoint", "checkpoint"), ("journal", "a journal"), (".log", "segments of topic")] {
        let disk = disk_with_batch(false);
        for (path, _) in disk.files() {
            if !path.to_string_lossy().contains(keep) {
                disk.remove(&path).unwrap();
            }
        }
        let text = refused(&disk, small()).to_string();
        assert!(text.contains(message), "{keep}: {text}");
    }
    let disk = SimDisk::new();
    disk.create_dir_all(Path::new("/data")).unwrap();
    disk.replace(Path::new("/data/metadata.redb"), b"topics").unwrap();
    assert!(refused(&disk, small()).to_string().contains("metadata.redb"));
}

#[test]
fn interrupted_first_start_can_be_repeated() {
    for operations in 0..60 {
        for power_failure in [true, false] {
            let disk = SimDisk::new();
            disk.fail_writes_after(Some(operations));
            drop(open_with(&disk, small()));
            if power_failure {
                disk.crash(operations)
            } else {
                disk.kill()
            }
            let log = open_with(&disk, small()).unwrap_or_else(|error| panic!("after {operations}: {error}"));
            assert_eq!(log.partitions(), []);
        }
    }
    // Empty topic directories and a journal of zeros count as no data. An operator may have created them.
    let disk = SimDisk::new();
    disk.create_dir_all(Path::new(JOURNAL)).unwrap();
    disk.replace(&Path::new(JOURNAL).join("00000.journal"), &[0; 8192]).unwrap();
    disk.create_dir_all(&Path::new("/data").join(partition(0).topic.to_string()).join("0")).unwrap();
    open(&disk);
}

/// A start without the journal is refused and changes no segment. When the journal is restored, no data is lost.
/// Regression: acknowledged data that was durable only in the journal was treated as a torn tail.
#[test]
fn missing_journal_is_detected_and_replayed_when_restored() {
    for seed in 0..20 {
        let disk = disk_with_batch(false);
        disk.crash(seed);
        let journal_files = disk.files().into_iter().filter(|(path, _)| path.starts_with(JOURNAL));
        let saved: Vec<_> = journal_files.map(|(path, _)| (disk.read(&path).unwrap(), path)).collect();
        remove_matching(&disk, JOURNAL);
        let before = segments(&disk);
        let text = refused(&disk, small()).to_string();
        assert!(text.contains(JOURNAL) && text.contains("no journal file"), "{text}");
        let text = refused(&disk, other_journal_dir()).to_string();
        assert!(text.contains("/other") && text.contains("the directory does not exist"), "{text}");
        assert_eq!(segments(&disk), before, "the segments are unchanged");
        for (bytes, path) in saved {
            disk.replace(&path, &bytes).unwrap();
        }
        assert_eq!(end(&open(&disk)), at(2), "seed {seed}");
    }
}

/// An earlier journal of the same data directory is refused like a missing one, also if the process ended right after
/// its start.
#[test]
fn older_journal_of_the_same_directory_is_refused() {
    let disk = disk_with_batch(true);
    let log = open_with(&disk, other_journal_dir()).unwrap();
    drop(log);
    disk.kill();
    let text = refused(&disk, small()).to_string();
    assert!(text.contains("frame"), "{text}");
    let log = open_with(&disk, other_journal_dir()).unwrap();
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    write(&log, &mut replica, &[batch(2, 1, 1, 1, 100)]);
    drop((replica, log));
    disk.crash(1);
    assert!(matches!(refused(&disk, small()), DataDirError::JournalLost { .. }));
    assert_eq!(end(&open_with(&disk, other_journal_dir()).unwrap()), at(3));
}

#[test]
fn journal_may_be_moved_or_removed_after_a_clean_stop() {
    let disk = disk_with_batch(true);
    remove_matching(&disk, JOURNAL);
    let log = open(&disk);
    assert_eq!(end(&log), at(2));
    log.close().unwrap();
    drop(log);
    disk.kill();
    let log = open_with(&disk, other_journal_dir()).unwrap();
    assert!(log.was_clean_shutdown());
    assert_eq!(end(&log), at(2));
}

#[test]
fn accepted_journal_loss_loses_only_the_journals_data() {
    let mut ends = Vec::new();
    for seed in 0..20 {
        let disk = disk_with_batch(false);
        disk.crash(seed);
        remove_matching(&disk, JOURNAL);
        let log = open_with(&disk, LogOptions { accept_journal_loss: true, ..small() }).unwrap();
        if log.partitions().is_empty() {
            continue;
        }
        let mut replica = log.open_replica(partition(0), at(0)).unwrap();
        let first = replica.log_end().get();
        ends.push(first);
        write(&log, &mut replica, &[batch(first, 1, 2, 1, 100)]);
        drop((replica, log));
        disk.crash(seed);
        // After the accepted loss, later starts need no `accept_journal_loss`.
        assert_eq!(end(&open(&disk)).get(), first + 1, "seed {seed}");
    }
    assert!(ends.contains(&0) && ends.iter().all(|end| *end == 0 || *end == 2), "{ends:?}");
}

#[test]
fn journal_of_another_directory_is_not_overwritten() {
    let disk = SimDisk::new();
    let other = DataDir::open(Arc::new(disk.clone()), Path::new("/first"), &identity(), other_journal_dir()).unwrap();
    let text = refused(&disk, other_journal_dir()).to_string();
    assert!(text.contains("/other") && text.contains(&other.directory_id().to_string()), "{text}");
}

#[test]
fn directory_without_checkpoint_and_journal_is_refused() {
    for close in [true, false] {
        let disk = disk_with_batch(close);
        disk.remove(Path::new("/data/checkpoint")).unwrap();
        assert_eq!(end(&open(&disk)), at(2), "closed {close}");
    }
    let disk = disk_with_batch(false);
    disk.remove(Path::new("/data/checkpoint")).unwrap();
    remove_matching(&disk, JOURNAL);
    assert!(matches!(refused(&disk, small()), DataDirError::JournalLost { .. }));
}

/// Without a checkpoint the persisted end is unknown, so a corrupt replica is refused at every later start. Regression:
/// the next checkpoint did not contain that the end is unknown. The following start truncated the refused data.
#[test]
fn replica_refused_without_checkpoint_stays_refused() {
    let disk = disk_with_batch(true);
    remove_matching(&disk, JOURNAL);
    // After this clean shutdown the journal holds no batch that could repair the corruption.
    open(&disk).close().unwrap();
    disk.kill();
    disk.remove(Path::new("/data/checkpoint")).unwrap();
    let (segment, bytes) = segments(&disk).remove(0);
    assert!(disk.flip(&segment, 3000 * 8));
    for stop in ["kill", "recycle", "close", "close", "kill"] {
        let log = open(&disk);
        assert!(matches!(log.open_replica(partition(0), at(0)), Err(ReplicaError::Lost { .. })), "{stop}");
        match stop {
            "recycle" => log.recycle_now(),
            "close" => log.close().unwrap(),
            _ => {}
        }
        drop(log);
        disk.kill();
        assert_eq!(disk.read(&segment).unwrap().len(), bytes.len());
    }
}

/// A clean shutdown without opening a replica keeps the replica's need for a scan. Regression: the next start used the
/// recovery point as the log end.
#[test]
fn clean_stop_does_not_cover_unopened_replicas() {
    let disk = disk_with_batch(false);
    let log = open(&disk);
    log.close().unwrap();
    drop(log);
    disk.kill();
    remove_matching(&disk, JOURNAL);
    assert_eq!(end(&open(&disk)), at(2));
}

#[test]
fn new_replica_quarantines_files_of_its_directory() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let dir = Path::new("/data").join(partition(0).topic.to_string()).join("0");
    disk.create_dir_all(&dir).unwrap();
    for content in [&b"first"[..], b"second"] {
        disk.replace(&dir.join(format!("{:020}.log", 0)), content).unwrap();
        let mut replica = log.open_replica(partition(0), at(0)).unwrap();
        let quarantined = |n: u32| disk.read(&dir.join(format!("{:020}.log.quarantined-{n}", 0))).ok();
        assert_eq!(quarantined(1).unwrap(), b"first");
        assert_eq!(quarantined(2).is_some(), content == b"second");
        assert_eq!(write(&log, &mut replica, &[batch(0, 1, 1, 1, 100)]), at(1));
        drop(replica);
        if content == b"first" {
            // The registry no longer contains the replica, as if its creation had never been written.
            log.unregister(partition(0));
            disk.remove(&dir.join(format!("{:020}.log", 0))).unwrap();
        }
    }
    // The deletion of the partition removes the quarantined files.
    log.delete_replica(partition(0)).unwrap();
    assert_eq!(disk.files().iter().filter(|(path, _)| path.starts_with(&dir)).count(), 0);
}

#[test]
fn journal_larger_than_the_disk_is_refused_before_writes() {
    let disk = SimDisk::new();
    disk.set_capacity(Some(300 << 20));
    let text = refused(&disk, LogOptions { journal_bytes: 1 << 40, ..small() }).to_string();
    assert!(text.contains("log.journal_bytes = 1099511627776") && text.contains("314572800 bytes are free"), "{text}");
    assert!(disk.files().iter().all(|(path, _)| path.ends_with("lock")), "{:?}", disk.files());
    open(&disk);
    // A large journal that fits on the disk is not created at once: its first file is.
    let disk = SimDisk::new();
    let log = open_with(&disk, LogOptions { journal_bytes: 1 << 40, ..small() }).unwrap();
    assert_eq!(log.status().journal_bytes, 64 << 20);
}
