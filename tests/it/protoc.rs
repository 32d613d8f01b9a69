//! `tools/protoc` serves the files of `etcd-client`, so that a build needs no protoc. The script serves no other files.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Output},
};

/// Files that the crate's build script requests, as prost-build does.
const ASKED: [&str; 5] = [
    "proto/etcd/api/authpb/auth.proto",
    "proto/etcd/api/etcdserverpb/rpc.proto",
    "proto/etcd/api/mvccpb/kv.proto",
    "proto/etcd/server/etcdserver/api/v3election/v3electionpb/v3election.proto",
    "proto/etcd/server/etcdserver/api/v3lock/v3lockpb/v3lock.proto",
];

fn tools() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tools")
}

/// Runs the script in a folder. `path` is the place of a real protoc.
fn protoc(folder: &Path, path: &Path, out: &Path, files: &[&str]) -> Output {
    Command::new(tools().join("protoc"))
        .args(["--include_imports", "--include_source_info", "-o"])
        .arg(out)
        .args(["-I", "proto"])
        .args(files)
        .current_dir(folder)
        .env("PATH", format!("{}:{}:/usr/bin:/bin", path.display(), tools().display()))
        .output()
        .expect("it runs")
}

/// Returns the host platform. Packages of other platforms may not be downloaded on this machine.
fn host() -> String {
    let rustc = Path::new(env!("CARGO")).with_file_name("rustc");
    let output = Command::new(rustc).arg("-vV").output().expect("the compiler runs");
    let text = String::from_utf8(output.stdout).expect("it prints text");
    text.lines().find_map(|line| line.strip_prefix("host: ")).expect("it names the host").to_owned()
}

/// Returns the folder into which cargo has unpacked `etcd-client`.
fn crate_folder() -> PathBuf {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--locked", "--offline", "--format-version", "1", "--filter-platform", &host()])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("cargo prints JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    let found = packages.iter().find(|package| package["name"] == "etcd-client").expect("we depend on it");
    let manifest = Path::new(found["manifest_path"].as_str().expect("a path"));
    manifest.parent().expect("it lies in a folder").to_owned()
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("it can be listed").map(|entry| entry.expect("it can be listed")) {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::write(target, fs::read(entry.path()).expect("it can be read")).expect("it can be written");
        }
    }
}

#[test]
fn build_of_etcd_client_needs_no_protoc() {
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("set");
    let answered = protoc(&crate_folder(), folder.path(), &out, &ASKED);
    assert!(answered.status.success(), "{}", String::from_utf8_lossy(&answered.stderr));
    let kept = fs::read(tools().join("etcd-client.fds")).expect("it is kept");
    assert!(fs::read(out).expect("it was written") == kept);
}

#[test]
fn other_files_need_a_real_protoc() {
    let folder = tempfile::tempdir().expect("a folder");
    let (folder, out) = (folder.path(), folder.path().join("set"));
    // The same names, with one more line in one of the files: another version of the crate.
    copy(&crate_folder().join("proto"), &folder.join("proto"));
    let changed = folder.join(ASKED[2]);
    fs::write(&changed, [&fs::read(&changed).expect("it was copied")[..], b"\n"].concat()).expect("it is written");
    for files in [&ASKED[..], &ASKED[..4], &["other.proto"]] {
        // A build machine may have a real protoc at a usual place, which would refuse these files too.
        let answered = protoc(folder, folder, &out, files);
        assert!(!answered.status.success() || Path::new("/usr/bin/protoc").exists(), "{files:?}");
        let said = String::from_utf8_lossy(&answered.stderr);
        assert!(said.contains("make etcd-protos") || Path::new("/usr/bin/protoc").exists(), "{said}");
    }
    let real = folder.join("real");
    fs::create_dir(&real).expect("a folder");
    fs::write(real.join("protoc"), "#!/bin/sh\necho asked: \"$@\"\n").expect("it is written");
    fs::set_permissions(real.join("protoc"), fs::Permissions::from_mode(0o755)).expect("it is ours");
    let answered = protoc(folder, &real, &out, &ASKED);
    let said = String::from_utf8(answered.stdout).expect("text");
    assert!(said.starts_with("asked: --include_imports") && said.trim_end().ends_with(ASKED[4]), "{said}");
}
