//! Files of a data directory that somebody removed, or that lie on a device which was not mounted: never taken for a new
//! start, never silence.

use super::*;

const JOURNAL: &str = "/data/journal";

fn open_with(disk: &SimDisk, options: Options) -> Result<Log, OpenError> {
    Log::open(Arc::new(disk.clone()), Path::new("/data"), &identity(), options)
}

fn refused(disk: &SimDisk, options: Options) -> OpenError {
    match open_with(disk, options) {
        Ok(_) => panic!("opened"),
        Err(error) => error,
    }
}

fn elsewhere() -> Options {
    Options { journal_dir: Some("/other".into()), ..small() }
}

fn remove_below(disk: &SimDisk, part: &str) {
    for (path, _) in disk.files() {
        if path.to_string_lossy().contains(part) {
            disk.remove(&path).unwrap();
        }
    }
}

/// Files of segments, and what is in them.
fn segments(disk: &SimDisk) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    let segment = |(path, _): (std::path::PathBuf, u64)| {
        let bytes = disk.read(&path).unwrap();
        (path.extension().is_some_and(|extension| extension == "log") && !bytes.is_empty()).then_some((path, bytes))
    };
    disk.files().into_iter().filter_map(segment).collect()
}

/// A directory with an acknowledged batch of two records. Killed, it has them in the journal and in the page cache.
fn fed(close: bool) -> SimDisk {
    let disk = SimDisk::new();
    let log = open(&disk);
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    replica.append(&[batch(0, 2, 1, 1, 5000)]).unwrap();
    let answer = persist(&mut replica);
    while log.journal_step() {}
    assert_eq!(answer.try_recv().unwrap(), Ok(at(2)));
    if close {
        log.close().unwrap();
    }
    drop((replica, log));
    disk.kill();
    disk
}

fn end(log: &Log) -> Offset {
    log.open_replica(partition(0), at(0)).unwrap().log_end()
}

/// The identity was lost and all else was there: a new one was drawn, and every segment emptied.
#[test]
fn a_directory_that_lost_its_identity_is_refused_and_nothing_in_it_is_touched() {
    for close in [true, false] {
        let disk = fed(close);
        disk.remove(Path::new("/data/strandline.json")).unwrap();
        let before = segments(&disk);
        let text = refused(&disk, small()).to_string();
        assert!(text.contains("strandline.json") && text.contains("checkpoint, a journal"), "{text}");
        let card = &text[text.find('{').unwrap()..=text.rfind('}').unwrap()];
        assert_eq!(segments(&disk), before);
        // What it proposes is right.
        disk.replace(Path::new("/data/strandline.json"), card.as_bytes()).unwrap();
        assert_eq!(end(&open(&disk)), at(2));
    }
}

#[test]
fn each_thing_that_holds_data_is_enough_to_refuse_a_directory_without_identity() {
    for (keep, says) in [("checkpoint", "checkpoint"), ("journal", "a journal"), (".log", "segments of topic")] {
        let disk = fed(false);
        for (path, _) in disk.files() {
            if !path.to_string_lossy().contains(keep) {
                disk.remove(&path).unwrap();
            }
        }
        let text = refused(&disk, small()).to_string();
        assert!(text.contains(says), "{keep}: {text}");
    }
    let disk = SimDisk::new();
    disk.create_dir_all(Path::new("/data")).unwrap();
    disk.replace(Path::new("/data/metadata.redb"), b"topics").unwrap();
    assert!(refused(&disk, small()).to_string().contains("metadata.redb"));
}

#[test]
fn a_first_start_that_was_cut_short_anywhere_comes_up() {
    for operations in 0..60 {
        for power in [true, false] {
            let disk = SimDisk::new();
            disk.fail_writes_after(Some(operations));
            drop(open_with(&disk, small()));
            if power {
                disk.crash(operations)
            } else {
                disk.kill()
            }
            let log = open_with(&disk, small()).unwrap_or_else(|error| panic!("after {operations}: {error}"));
            assert_eq!(log.partitions(), []);
        }
    }
    // Folders that somebody prepared hold nothing.
    let disk = SimDisk::new();
    disk.create_dir_all(Path::new(JOURNAL)).unwrap();
    disk.replace(&Path::new(JOURNAL).join("00000.journal"), &[0; 8192]).unwrap();
    disk.create_dir_all(&Path::new("/data").join(partition(0).topic.to_string()).join("0")).unwrap();
    open(&disk);
}

/// The journal was gone, the segment's tail had been in the page cache alone: what was acknowledged was called a torn tail.
#[test]
fn a_journal_that_is_gone_is_noticed_and_put_back_it_is_replayed() {
    for seed in 0..20 {
        let disk = fed(false);
        disk.crash(seed);
        let saved: Vec<_> = disk.files().into_iter().filter(|(path, _)| path.starts_with(JOURNAL)).collect();
        let saved: Vec<_> = saved.into_iter().map(|(path, _)| (disk.read(&path).unwrap(), path)).collect();
        remove_below(&disk, JOURNAL);
        let before = segments(&disk);
        let text = refused(&disk, small()).to_string();
        assert!(text.contains(JOURNAL) && text.contains("no journal file"), "{text}");
        let text = refused(&disk, elsewhere()).to_string();
        assert!(text.contains("/other") && text.contains("no such folder"), "{text}");
        assert_eq!(segments(&disk), before, "nothing is cut");
        for (bytes, path) in saved {
            disk.replace(&path, &bytes).unwrap();
        }
        assert_eq!(end(&open(&disk)), at(2), "seed {seed}");
    }
}

/// Also where the process died as soon as it had started, and where the folder holds a journal that the same directory used
/// earlier.
#[test]
fn an_older_journal_of_the_same_directory_is_not_taken_for_the_one_in_use() {
    let disk = fed(true);
    let log = open_with(&disk, elsewhere()).unwrap();
    drop(log);
    disk.kill();
    let text = refused(&disk, small()).to_string();
    assert!(text.contains("round"), "{text}");
    let log = open_with(&disk, elsewhere()).unwrap();
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    write(&log, &mut replica, &[batch(2, 1, 1, 1, 100)]);
    drop((replica, log));
    disk.crash(1);
    assert!(matches!(refused(&disk, small()), OpenError::JournalLost { .. }));
    assert_eq!(end(&open_with(&disk, elsewhere()).unwrap()), at(3));
}

#[test]
fn after_a_clean_stop_the_journal_may_move_or_go() {
    let disk = fed(true);
    remove_below(&disk, JOURNAL);
    let log = open(&disk);
    assert_eq!(end(&log), at(2));
    log.close().unwrap();
    drop(log);
    disk.kill();
    let log = open_with(&disk, elsewhere()).unwrap();
    assert!(log.opened_clean());
    assert_eq!(end(&log), at(2));
}

#[test]
fn a_loss_that_an_operator_accepts_costs_what_was_in_the_journal_alone() {
    let mut ends = Vec::new();
    for seed in 0..20 {
        let disk = fed(false);
        disk.crash(seed);
        remove_below(&disk, JOURNAL);
        let log = open_with(&disk, Options { accept_journal_loss: true, ..small() }).unwrap();
        if log.partitions().is_empty() {
            continue;
        }
        let mut replica = log.open_replica(partition(0), at(0)).unwrap();
        let first = replica.log_end().get();
        ends.push(first);
        write(&log, &mut replica, &[batch(first, 1, 2, 1, 100)]);
        drop((replica, log));
        disk.crash(seed);
        // From then on it is a directory as any other.
        assert_eq!(end(&open(&disk)).get(), first + 1, "seed {seed}");
    }
    assert!(ends.contains(&0) && ends.iter().all(|end| *end == 0 || *end == 2), "{ends:?}");
}

#[test]
fn another_directorys_journal_is_not_written_over() {
    let disk = SimDisk::new();
    let other = Log::open(Arc::new(disk.clone()), Path::new("/first"), &identity(), elsewhere()).unwrap();
    let text = refused(&disk, elsewhere()).to_string();
    assert!(text.contains("/other") && text.contains(&other.directory_id().to_string()), "{text}");
}

#[test]
fn without_its_checkpoint_a_directory_is_read_again_and_without_its_journal_as_well_it_is_refused() {
    for close in [true, false] {
        let disk = fed(close);
        disk.remove(Path::new("/data/checkpoint")).unwrap();
        assert_eq!(end(&open(&disk)), at(2), "closed {close}");
    }
    let disk = fed(false);
    disk.remove(Path::new("/data/checkpoint")).unwrap();
    remove_below(&disk, JOURNAL);
    assert!(matches!(refused(&disk, small()), OpenError::JournalLost { .. }));
}

/// A lost checkpoint says nothing of what was acknowledged. The next one once forgot that, and the start after it cut what this
/// one had refused.
#[test]
fn what_is_refused_without_a_checkpoint_is_refused_by_later_starts_too() {
    let disk = fed(true);
    remove_below(&disk, JOURNAL);
    // The journal that is there now holds nothing that would make good the damage.
    open(&disk).close().unwrap();
    disk.kill();
    disk.remove(Path::new("/data/checkpoint")).unwrap();
    let (segment, bytes) = segments(&disk).remove(0);
    assert!(disk.flip(&segment, 3000 * 8));
    for stop in ["kill", "recycle", "close", "close", "kill"] {
        let log = open(&disk);
        assert!(matches!(log.open_replica(partition(0), at(0)), Err(ReplicaError::Lost { .. })), "{stop}");
        match stop {
            "recycle" => log.inner_recycle(),
            "close" => log.close().unwrap(),
            _ => {}
        }
        drop(log);
        disk.kill();
        assert_eq!(disk.read(&segment).unwrap().len(), bytes.len());
    }
}

/// A clean stop vouched for replicas that nobody had opened: the next start believed the recovery point to be the end.
#[test]
fn a_clean_stop_does_not_vouch_for_what_was_never_opened() {
    let disk = fed(false);
    let log = open(&disk);
    log.close().unwrap();
    drop(log);
    disk.kill();
    remove_below(&disk, JOURNAL);
    assert_eq!(end(&open(&disk)), at(2));
}

#[test]
fn a_new_replica_keeps_what_its_folder_holds_under_another_name() {
    let disk = SimDisk::new();
    let log = open(&disk);
    let dir = Path::new("/data").join(partition(0).topic.to_string()).join("0");
    disk.create_dir_all(&dir).unwrap();
    for content in [&b"first"[..], b"second"] {
        disk.replace(&dir.join(format!("{:020}.log", 0)), content).unwrap();
        let mut replica = log.open_replica(partition(0), at(0)).unwrap();
        let aside = |n: u32| disk.read(&dir.join(format!("{:020}.log.aside-{n}", 0))).ok();
        assert_eq!(aside(1).unwrap(), b"first");
        assert_eq!(aside(2).is_some(), content == b"second");
        assert_eq!(write(&log, &mut replica, &[batch(0, 1, 1, 1, 100)]), at(1));
        drop(replica);
        if content == b"first" {
            // Forgotten once more, as if its creation had never been written.
            log.inner_forget(partition(0));
            disk.remove(&dir.join(format!("{:020}.log", 0))).unwrap();
        }
    }
    // Deleting the partition is what removes them.
    log.delete_replica(partition(0)).unwrap();
    assert_eq!(disk.files().iter().filter(|(path, _)| path.starts_with(&dir)).count(), 0);
}

#[test]
fn a_journal_that_the_disk_has_no_room_for_is_refused_before_anything_is_written() {
    let disk = SimDisk::new();
    disk.set_capacity(Some(300 << 20));
    let text = refused(&disk, Options { journal_bytes: 1 << 40, ..small() }).to_string();
    assert!(text.contains("log.journal_bytes = 1099511627776") && text.contains("314572800 bytes are free"), "{text}");
    assert!(disk.files().iter().all(|(path, _)| path.ends_with("lock")), "{:?}", disk.files());
    open(&disk);
    // A large one that can be had is made in parts, as it is needed.
    let disk = SimDisk::new();
    let log = open_with(&disk, Options { journal_bytes: 1 << 40, ..small() }).unwrap();
    assert_eq!(log.status().journal_bytes, 64 << 20);
}
