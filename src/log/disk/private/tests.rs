//! Links, files of other users, and modes below a configured directory.

use std::{
    io::{Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink},
};

use super::*;

const NOBODY: u32 = 65_534;

/// Creates a configured directory and a directory beside it that is not configured. Returns their parent and both
/// paths, the configured directory first.
fn test_dirs() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let parent = tempfile::tempdir().unwrap();
    let (inside, outside) = (parent.path().join("inside"), parent.path().join("outside"));
    fs::create_dir(&inside).unwrap();
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("file"), "theirs").unwrap();
    (parent, inside, outside)
}

/// Asserts that a call failed with `PermissionDenied` and a message that contains `text`.
fn assert_denied<T>(result: io::Result<T>, text: &str) {
    let error = result.err().expect("refused");
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
    assert!(error.to_string().contains(text), "{error}");
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn links_below_a_configured_directory_are_refused() {
    let (_parent, inside, outside) = test_dirs();
    symlink(outside.join("file"), inside.join("link")).unwrap();
    symlink(outside.join("absent"), inside.join("dangling")).unwrap();
    symlink(&outside, inside.join("folder")).unwrap();
    let dir = PrivateDir::open(&inside).unwrap();
    let write = OFlags::RDWR | OFlags::CREATE;
    for flags in [OFlags::RDONLY, write, write | OFlags::DIRECT] {
        assert_denied(dir.open_file(Path::new("link"), flags), "symbolic link");
        assert_denied(dir.open_file(Path::new("folder/file"), flags), "symbolic link");
    }
    assert_denied(dir.open_file(Path::new("dangling"), write), "inside/dangling is a symbolic link");
    assert_denied(dir.list(Path::new("folder")), "log.journal_dir");
    assert_denied(dir.sync(Path::new("folder")), "symbolic link");
    assert_denied(dir.make_dir(Path::new("folder/new")), "symbolic link");
    assert_denied(dir.make_below(Path::new("folder")), "symbolic link");
    assert_denied(dir.remove(Path::new("folder/file")), "symbolic link");
    assert_denied(dir.rename(Path::new("folder/file"), &dir, Path::new("taken")), "symbolic link");
    assert_eq!(fs::read(outside.join("file")).unwrap(), b"theirs");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1, "no file was created");
    // A link is listed as a link, and its name can be removed.
    assert!(dir.list(Path::new("")).unwrap().iter().all(|entry| !entry.is_dir));
    dir.remove(Path::new("link")).unwrap();
    assert!(outside.join("file").exists());
}

#[test]
fn name_outside_the_directory_is_refused() {
    let (_parent, inside, _outside) = test_dirs();
    let dir = PrivateDir::open(&inside).unwrap();
    for name in ["../outside/file", "/etc/passwd", ""] {
        let error = dir.open_file(Path::new(name), OFlags::RDONLY).expect_err(name);
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{name}: {error}");
    }
}

#[test]
fn pipe_in_place_of_a_file_does_not_block() {
    let (_parent, inside, _outside) = test_dirs();
    let pipe = inside.join("pipe");
    sys::mknodat(sys::CWD, &pipe, FileType::Fifo, FILE_MODE, 0).unwrap();
    let dir = PrivateDir::open(&inside).unwrap();
    assert_denied(dir.open_file(Path::new("pipe"), OFlags::RDONLY), "not a regular file");
}

#[test]
fn configured_path_may_be_a_link() {
    let (parent, inside, _outside) = test_dirs();
    let link = parent.path().join("link");
    symlink(&inside, &link).unwrap();
    for dir in [PrivateDir::open(&link).unwrap(), PrivateDir::make(&link).unwrap()] {
        dir.open_file(Path::new("file"), OFlags::WRONLY | OFlags::CREATE).unwrap().write_all(b"ours").unwrap();
    }
    assert_eq!(fs::read(inside.join("file")).unwrap(), b"ours");
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
}

#[test]
fn new_files_are_private_and_wider_modes_are_corrected() {
    let (_parent, inside, _outside) = test_dirs();
    set_mode(&inside, 0o2775);
    for (name, wide) in [("a", 0o755), ("a/b", 0o775)] {
        fs::create_dir(inside.join(name)).unwrap();
        set_mode(&inside.join(name), wide);
    }
    for name in ["old", "a/b/old"] {
        fs::write(inside.join(name), "content").unwrap();
        set_mode(&inside.join(name), 0o644);
    }
    let dir = PrivateDir::open(&inside).unwrap();
    assert_eq!(mode(&inside), 0o2700, "the setgid bit of a volume is kept");
    dir.correct_entries().unwrap();
    assert_eq!((mode(&inside.join("a")), mode(&inside.join("old"))), (0o700, 0o600));
    let mut text = String::new();
    dir.open_file(Path::new("a/b/old"), OFlags::RDONLY).unwrap().read_to_string(&mut text).unwrap();
    assert_eq!((text.as_str(), mode(&inside.join("a/b")), mode(&inside.join("a/b/old"))), ("content", 0o700, 0o600));
    dir.make_dir(Path::new("x/y")).unwrap();
    dir.open_file(Path::new("x/y/new"), OFlags::RDWR | OFlags::CREATE).unwrap();
    let bits = |name: &str| mode(&inside.join(name)) & 0o777;
    assert_eq!((bits("x"), bits("x/y"), bits("x/y/new")), (0o700, 0o700, 0o600));
    assert_eq!(mode(PrivateDir::make(&inside.join("x/z/w")).unwrap().path()) & 0o777, 0o700);
}

#[test]
fn shared_directory_keeps_its_mode() {
    let (_parent, inside, _outside) = test_dirs();
    set_mode(&inside, 0o1777);
    PrivateDir::open(&inside).unwrap();
    assert_eq!(mode(&inside), 0o1777, "as in /tmp");
    assert!(is_shared(Path::new("/var/../var/lib"), &sys::stat("/var/lib").unwrap()));
    assert!(!is_shared(&inside, &sys::stat("/var/lib").unwrap()));
}

/// Runs as root only, because only root can change the owner of a file. A test of the binary covers a broker that runs
/// as another user.
#[test]
fn files_of_another_user_are_refused_and_unchanged() {
    if !geteuid().is_root() {
        return;
    }
    let (_parent, inside, _outside) = test_dirs();
    fs::create_dir(inside.join("folder")).unwrap();
    for name in ["file", "folder/file"] {
        fs::write(inside.join(name), "theirs").unwrap();
    }
    for name in ["file", "folder"] {
        let mode = if name == "file" { 0o644 } else { 0o755 };
        chown(inside.join(name), Some(NOBODY), None).unwrap();
        set_mode(&inside.join(name), mode);
    }
    let dir = PrivateDir::open(&inside).unwrap();
    dir.correct_entries().unwrap();
    for name in ["file", "folder/file"] {
        assert_denied(
            dir.open_file(Path::new(name), OFlags::RDONLY),
            "belongs to user 65534, and this process runs as user 0",
        );
        assert_denied(dir.open_file(Path::new(name), OFlags::RDWR | OFlags::CREATE), "chown");
    }
    assert_denied(dir.make_dir(Path::new("folder/new")), "belongs to user 65534");
    assert_eq!((mode(&inside.join("file")), mode(&inside.join("folder"))), (0o644, 0o755));
    assert_eq!(fs::metadata(inside.join("file")).unwrap().uid(), NOBODY);
    // A configured directory that belongs to neither this user nor root is refused as well.
    assert_denied(PrivateDir::open(&inside.join("folder")), "belongs to user 65534");
}
