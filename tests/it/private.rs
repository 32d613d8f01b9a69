//! Permissions of a broker's files. Only the user of the broker has access. The broker follows no symbolic link inside
//! its data directory, and refuses to start on files of other users.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink},
    path::{Path, PathBuf},
};

use crate::{
    broker::{Broker, BrokerInstance, NOBODY},
    skipped::report_skipped,
};

/// Returns path, true for a folder, and permission bits of everything below a folder.
fn modes(folder: &Path) -> Vec<(PathBuf, bool, u32)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("the folder is readable").map(|entry| entry.expect("an entry").path()) {
        // A temporary file may have been renamed since the folder was read.
        let metadata = match fs::symlink_metadata(&entry) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            metadata => metadata.expect("the file has metadata"),
        };
        if metadata.is_dir() {
            found.extend(modes(&entry));
        }
        found.push((entry, metadata.is_dir(), metadata.permissions().mode() & 0o777));
    }
    found
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("the test owns the file");
}

/// Checks that only the owner has access to everything below a folder.
fn check_modes_are_private(folder: &Path) {
    for (path, is_folder, mode) in modes(folder) {
        assert_eq!(mode, if is_folder { 0o700 } else { 0o600 }, "{mode:o} {}", path.display());
    }
}

/// Appends three records, of which two are in the object store at the return.
fn write_records(instance: &BrokerInstance) {
    let cli = instance.cli();
    cli.ok(&["topic", "create", "t"]);
    cli.ok_with(&["produce", "t", "--acks", "tiered"], b"a\nb\n");
    cli.ok_with(&["produce", "t"], b"c\n");
}

fn check_all_records(instance: &BrokerInstance) {
    let read = instance.cli().ok(&["consume", "t", "--from", "earliest", "--until-end"]);
    assert_eq!(read.text(), "a\nb\nc\n");
}

#[test]
fn files_are_private_and_wider_modes_are_corrected() {
    let mut instance = BrokerInstance::new();
    let broker = instance.start();
    write_records(&instance);
    check_modes_are_private(&instance.data_dir());
    check_modes_are_private(&instance.object_store_dir());
    assert!(modes(&instance.object_store_dir()).len() > 3, "a segment and its manifest exist");
    assert!(broker.terminate().success(), "{}", instance.log());
    for (path, is_folder, _) in modes(&instance.data_dir()) {
        set_mode(&path, if is_folder { 0o755 } else { 0o644 });
    }
    set_mode(&instance.data_dir(), 0o755);
    let _broker = instance.start();
    check_all_records(&instance);
    let top = fs::metadata(instance.data_dir()).expect("the entry exists").permissions().mode();
    assert_eq!(top & 0o777, 0o700);
    for entry in fs::read_dir(instance.data_dir()).expect("listed").map(|entry| entry.expect("an entry")) {
        let mode = entry.metadata().expect("the entry exists").permissions().mode();
        assert_eq!(mode & 0o077, 0, "{mode:o} {}", entry.path().display());
    }
}

/// Runs a start that must fail. Returns all output of the instance.
fn run_refused_start(instance: &BrokerInstance) -> String {
    let mut broker = instance.spawn();
    assert_eq!(broker.wait_for_exit().code(), Some(1), "{}", instance.log());
    instance.log()
}

#[test]
fn link_in_a_data_directory_fails_the_start_unwritten() {
    let mut instance = BrokerInstance::new();
    let broker = instance.start();
    write_records(&instance);
    broker.kill9();
    let victim = instance.path().join("victim");
    fs::write(&victim, "theirs").expect("written");
    let link = instance.data_dir().join("checkpoint.tmp");
    symlink(&victim, &link).expect("the file is created");
    let output = run_refused_start(&instance);
    assert!(output.contains("checkpoint.tmp is a symbolic link"), "{output}");
    assert_eq!(fs::read(&victim).expect("the entry exists"), b"theirs");
    fs::remove_file(&link).expect("removed");
    // A user may move the journal to another disk with `log.journal_dir`, but not with a symbolic link.
    let (journal, elsewhere) = (instance.data_dir().join("journal"), instance.path().join("elsewhere"));
    fs::rename(&journal, &elsewhere).expect("moved");
    symlink(&elsewhere, &journal).expect("the file is created");
    let output = run_refused_start(&instance);
    assert!(output.contains("log.journal_dir"), "{output}");
    let mut instance = instance.setting("log.journal_dir", format!("{:?}", journal.display().to_string()));
    let _broker = instance.start();
    check_all_records(&instance);
}

/// The data directory is a link to a volume as Kubernetes mounts it for `fsGroup`: owned by root, writable for the
/// group. The broker of another user starts on it, and refuses a file of root inside it.
#[test]
fn unprivileged_broker_uses_root_volume_not_foreign_files() {
    if !rustix::process::geteuid().is_root() {
        return report_skipped("a broker of another user", "only root can start one");
    }
    let mut instance = BrokerInstance::new().run_as_nobody();
    let volume = instance.path().join("volume");
    fs::create_dir(&volume).expect("the file is created");
    chown(&volume, None, Some(NOBODY)).expect("the test runs as root");
    set_mode(&volume, 0o2775);
    symlink(&volume, instance.data_dir()).expect("the file is created");
    chown(instance.object_store_dir(), Some(NOBODY), Some(NOBODY)).expect("the test runs as root");
    let broker: Broker = instance.start();
    write_records(&instance);
    let metadata = fs::metadata(&volume).expect("the entry exists");
    assert_eq!((metadata.uid(), metadata.mode() & 0o7777), (0, 0o2775), "the volume keeps its mode");
    check_modes_are_private(&volume);
    assert!(modes(&volume).iter().all(|(path, ..)| fs::metadata(path).expect("the file exists").uid() == NOBODY));
    assert_eq!(instance.log().matches("this directory keeps its mode").count(), 1, "{}", instance.log());
    broker.kill9();
    let checkpoint = volume.join("checkpoint");
    chown(&checkpoint, Some(0), None).expect("the test runs as root");
    set_mode(&checkpoint, 0o666);
    let output = run_refused_start(&instance);
    assert!(output.contains("checkpoint belongs to user 0, and this process runs as user 65534"), "{output}");
    chown(&checkpoint, Some(NOBODY), None).expect("the test runs as root");
    let _broker = instance.start();
    check_all_records(&instance);
    check_modes_are_private(&volume);
}
