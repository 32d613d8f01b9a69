//! Permissions of a broker's files. Only its user has access. The broker follows no link inside its data directory, and refuses files of
//! other users.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink},
    path::{Path, PathBuf},
};

use crate::{
    broker::{Broker, Home, NOBODY},
    skipped::skipped,
};

/// Returns everything below a folder: the path, true for a folder, and the permission bits.
fn modes(folder: &Path) -> Vec<(PathBuf, bool, u32)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("it can be listed").map(|entry| entry.expect("an entry").path()) {
        // A temporary file may be renamed meanwhile.
        let metadata = match fs::symlink_metadata(&entry) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            metadata => metadata.expect("it can be looked at"),
        };
        if metadata.is_dir() {
            found.extend(modes(&entry));
        }
        found.push((entry, metadata.is_dir(), metadata.permissions().mode() & 0o777));
    }
    found
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("it is ours");
}

fn all_are_private(folder: &Path) {
    for (path, is_folder, mode) in modes(folder) {
        assert_eq!(mode, if is_folder { 0o700 } else { 0o600 }, "{mode:o} {}", path.display());
    }
}

/// Appends some records, a part of them to the object store.
fn write(home: &Home) {
    let cli = home.cli();
    cli.ok(&["topic", "create", "t"]);
    cli.ok_with(&["produce", "t", "--acks", "tiered"], b"a\nb\n");
    cli.ok_with(&["produce", "t"], b"c\n");
}

fn reads_all(home: &Home) {
    let read = home.cli().ok(&["consume", "t", "--from", "earliest", "--until-end"]);
    assert_eq!(read.text(), "a\nb\nc\n");
}

#[test]
fn files_are_private_and_wider_modes_are_corrected() {
    let mut home = Home::new();
    let broker = home.start();
    write(&home);
    all_are_private(&home.data_dir());
    all_are_private(&home.bucket());
    assert!(modes(&home.bucket()).len() > 3, "a segment and its manifest are there");
    assert!(broker.terminate().success(), "{}", home.log());
    for (path, is_folder, _) in modes(&home.data_dir()) {
        set_mode(&path, if is_folder { 0o755 } else { 0o644 });
    }
    set_mode(&home.data_dir(), 0o755);
    let _broker = home.start();
    reads_all(&home);
    let top = fs::metadata(home.data_dir()).expect("it is there").permissions().mode();
    assert_eq!(top & 0o777, 0o700);
    for entry in fs::read_dir(home.data_dir()).expect("listed").map(|entry| entry.expect("an entry")) {
        let mode = entry.metadata().expect("it is there").permissions().mode();
        assert_eq!(mode & 0o077, 0, "{mode:o} {}", entry.path().display());
    }
}

/// Runs a start that must fail. Returns its log.
fn refused(home: &Home) -> String {
    let mut broker = home.spawn();
    assert_eq!(broker.wait().code(), Some(1), "{}", home.log());
    home.log()
}

#[test]
fn link_in_a_data_directory_fails_the_start_unwritten() {
    let mut home = Home::new();
    let broker = home.start();
    write(&home);
    broker.kill9();
    let victim = home.path().join("victim");
    fs::write(&victim, "theirs").expect("written");
    let link = home.data_dir().join("checkpoint.tmp");
    symlink(&victim, &link).expect("made");
    let said = refused(&home);
    assert!(said.contains("checkpoint.tmp is a symbolic link"), "{said}");
    assert_eq!(fs::read(&victim).expect("it is there"), b"theirs");
    fs::remove_file(&link).expect("removed");
    // A journal on another disk has a setting. A link in its place is refused.
    let (journal, elsewhere) = (home.data_dir().join("journal"), home.path().join("elsewhere"));
    fs::rename(&journal, &elsewhere).expect("moved");
    symlink(&elsewhere, &journal).expect("made");
    let said = refused(&home);
    assert!(said.contains("log.journal_dir"), "{said}");
    let mut home = home.setting("log.journal_dir", format!("{:?}", journal.display().to_string()));
    let _broker = home.start();
    reads_all(&home);
}

/// A volume that Kubernetes mounts for `fsGroup`: owned by root, writable for the group.
#[test]
fn unprivileged_broker_uses_root_volume_not_foreign_files() {
    if !rustix::process::geteuid().is_root() {
        return skipped("a broker of another user", "only root can start one");
    }
    let mut home = Home::new().run_as_nobody();
    let volume = home.path().join("volume");
    fs::create_dir(&volume).expect("made");
    chown(&volume, None, Some(NOBODY)).expect("we are root");
    set_mode(&volume, 0o2775);
    symlink(&volume, home.data_dir()).expect("made");
    chown(home.bucket(), Some(NOBODY), Some(NOBODY)).expect("we are root");
    let broker: Broker = home.start();
    write(&home);
    let metadata = fs::metadata(&volume).expect("it is there");
    assert_eq!((metadata.uid(), metadata.mode() & 0o7777), (0, 0o2775), "the volume keeps its mode");
    all_are_private(&volume);
    assert!(modes(&volume).iter().all(|(path, ..)| fs::metadata(path).expect("there").uid() == NOBODY));
    assert_eq!(home.log().matches("this directory keeps its mode").count(), 1, "{}", home.log());
    broker.kill9();
    let checkpoint = volume.join("checkpoint");
    chown(&checkpoint, Some(0), None).expect("we are root");
    set_mode(&checkpoint, 0o666);
    let said = refused(&home);
    assert!(said.contains("checkpoint belongs to user 0, and this process runs as user 65534"), "{said}");
    chown(&checkpoint, Some(NOBODY), None).expect("we are root");
    let _broker = home.start();
    reads_all(&home);
    all_are_private(&volume);
}
