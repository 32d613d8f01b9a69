//! Owner of a data directory, and the real disk.

use super::*;

#[test]
fn directory_in_use_foreign_or_newer_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let options = || LogOptions { journal_bytes: 1 << 20, ..LogOptions::default() };
    let log = DataDir::open(Arc::new(RealDisk::default()), dir.path(), &identity(), options()).unwrap();
    let refused = |identity: &DataDirIdentity| match DataDir::open(
        Arc::new(RealDisk::default()),
        dir.path(),
        identity,
        options(),
    ) {
        Ok(_) => panic!("opened"),
        Err(error) => error.to_string(),
    };
    let text = refused(&identity());
    assert!(text.contains(&format!("pid {}", std::process::id())), "{text}");
    drop(log);
    let text = refused(&DataDirIdentity { cluster: "other".to_owned(), broker: BrokerId(1) });
    assert!(text.contains("broker 1 of cluster \"test\""), "{text}");
    let text = refused(&DataDirIdentity { cluster: "test".to_owned(), broker: BrokerId(2) });
    assert!(text.contains("broker 2"), "{text}");
    let identity_file = dir.path().join("strandline.json");
    let disk = RealDisk::default();
    let text = String::from_utf8(disk.read(&identity_file).unwrap()).unwrap();
    let newer = text.replace("\"format\": 1", "\"format\": 99");
    disk.replace(&identity_file, newer.as_bytes()).unwrap();
    let text = refused(&identity());
    assert!(text.contains("has format 99"), "{text}");
}

#[test]
fn appends_on_a_real_disk_are_durable_and_stop_is_clean() {
    let dir = tempfile::tempdir().unwrap();
    let options = LogOptions { journal_bytes: 4 << 20, sync_bytes: 1 << 20, ..LogOptions::default() };
    let log = DataDir::open(Arc::new(RealDisk::default()), dir.path(), &identity(), options.clone()).unwrap();
    let results = PersistResults::default();
    let mut replicas: Vec<_> = (0..4).map(|n| log.open_replica(partition(n), at(0)).unwrap()).collect();
    // The data exceeds the size of the ring several times, so its files are released and reused.
    for number in 0..200_u64 {
        for replica in &mut replicas {
            replica.append(&[batch(number * 2, 2, 1, i64::try_from(number).unwrap(), 20_000)]).unwrap();
            replica.persist(results.done());
            if number == 120 {
                replica.roll().unwrap();
            }
        }
    }
    for replica in &mut replicas {
        persist(replica).recv().unwrap().unwrap();
        assert_eq!(replica.persisted_end(), at(400));
    }
    assert!(results.take().iter().all(Result::is_ok));
    drop(replicas);
    log.close().unwrap();
    drop(log);
    for clean in [true, false] {
        let log = DataDir::open(Arc::new(RealDisk::default()), dir.path(), &identity(), options.clone()).unwrap();
        assert_eq!(log.was_clean_shutdown(), clean, "a clean shutdown holds for one start");
        let replica = log.open_replica(partition(3), at(0)).unwrap();
        let batches = read_all(&replica.reader(), at(0)).unwrap();
        assert_eq!(batches.len(), 200);
        for (number, found) in (0..).zip(&batches) {
            assert!(*found == batch(number * 2, 2, 1, i64::try_from(number).unwrap(), 20_000));
        }
    }
}

/// The journal creates its files in the background. A close ends this, and leaves no partial file.
#[test]
fn stop_during_journal_growth_leaves_complete_files() {
    let dir = tempfile::tempdir().unwrap();
    let options = LogOptions { journal_bytes: 256 << 20, ..LogOptions::default() };
    let file_bytes = (256 << 20) / 16;
    let log = DataDir::open(Arc::new(RealDisk::default()), dir.path(), &identity(), options).unwrap();
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    replica.append(&[batch(0, 1, 1, 0, 100)]).unwrap();
    persist(&mut replica).recv().unwrap().unwrap();
    drop(replica);
    log.close().unwrap();
    let files = std::fs::read_dir(dir.path().join("journal")).unwrap();
    let sizes: Vec<u64> = files.map(|entry| entry.unwrap().metadata().unwrap().len()).collect();
    assert!(!sizes.is_empty() && sizes.iter().all(|size| *size == file_bytes), "{sizes:?}");
}

/// A symbolic link in the directory is refused or ignored, and its target stays unchanged. Regression: the log wrote
/// through links. A user who could create a link there could have any file of the broker's user overwritten.
#[test]
fn link_in_place_of_a_log_file_is_not_written_through() {
    let theirs = tempfile::tempdir().unwrap();
    let victim = theirs.path().join("victim");
    std::fs::write(&victim, "theirs").unwrap();
    for name in ["checkpoint.tmp", "strandline.tmp", "reserve", "lock", "journal"] {
        let dir = tempfile::tempdir().unwrap();
        let target = if name == "journal" { theirs.path() } else { victim.as_path() };
        std::os::unix::fs::symlink(target, dir.path().join(name)).unwrap();
        let options = LogOptions { journal_bytes: 1 << 20, ..LogOptions::default() };
        match DataDir::open(Arc::new(RealDisk::default()), dir.path(), &identity(), options) {
            Err(error) => assert!(error.to_string().contains("symbolic link"), "{name}: {error}"),
            // The start succeeds only for `reserve`: a failed creation of the reserve is ignored.
            Ok(log) => drop(log.close()),
        }
        assert_eq!(std::fs::read(&victim).unwrap(), b"theirs", "{name}");
        assert_eq!(std::fs::read_dir(theirs.path()).unwrap().count(), 1, "{name}");
    }
}

/// The configured journal directory itself may be a symbolic link, like any configured path.
#[test]
fn configured_journal_directory_may_be_a_link() {
    let (dir, device) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let link = dir.path().join("elsewhere");
    std::os::unix::fs::symlink(device.path(), &link).unwrap();
    let options = LogOptions { journal_bytes: 1 << 20, journal_dir: Some(link), ..LogOptions::default() };
    for _ in 0..2 {
        let log = DataDir::open(Arc::new(RealDisk::default()), dir.path(), &identity(), options.clone()).unwrap();
        let mut replica = log.open_replica(partition(0), at(0)).unwrap();
        let end = replica.log_end().get();
        replica.append(&[batch(end, 1, 1, 0, 100)]).unwrap();
        persist(&mut replica).recv().unwrap().unwrap();
        drop(replica);
        log.close().unwrap();
    }
    assert!(std::fs::read_dir(device.path()).unwrap().count() > 0, "the journal is in the linked directory");
}

/// Without threads nothing writes the queued entries when the log is dropped. Their persist calls then fail with
/// `Closed`, and all memory is released.
#[test]
fn dropped_log_completes_queued_entries_and_holds_nothing() {
    let disk: Arc<dyn Disk> = Arc::new(SimDisk::new());
    let log = DataDir::open(Arc::clone(&disk), Path::new("/data"), &identity(), small()).unwrap();
    let mut replica = log.open_replica(partition(0), at(0)).unwrap();
    replica.append(&[batch(0, 1, 1, 0, 100)]).unwrap();
    let result = persist(&mut replica);
    drop(replica);
    drop(log);
    assert!(matches!(result.try_recv().unwrap(), Err(PersistError::Closed)));
    assert_eq!(Arc::strong_count(&disk), 1, "no component holds the disk");
}
