//! The script `tools/protoc` replaces protoc in the build of `etcd-client`: for exactly the .proto files of that crate,
//! it returns a stored result. For other files, it runs a real protoc.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Output},
};

/// Files for which the build script of `etcd-client` runs protoc.
const REQUESTED_FILES: [&str; 5] = [
    "proto/etcd/api/authpb/auth.proto",
    "proto/etcd/api/etcdserverpb/rpc.proto",
    "proto/etcd/api/mvccpb/kv.proto",
    "proto/etcd/server/etcdserver/api/v3election/v3electionpb/v3election.proto",
    "proto/etcd/server/etcdserver/api/v3lock/v3lockpb/v3lock.proto",
];

fn tools() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tools")
}

/// Runs the script in `folder`. `path` is a folder in PATH that may contain a real protoc.
fn protoc(folder: &Path, path: &Path, out: &Path, files: &[&str]) -> Output {
    Command::new(tools().join("protoc"))
        .args(["--include_imports", "--include_source_info", "-o"])
        .arg(out)
        .args(["-I", "proto"])
        .args(files)
        .current_dir(folder)
        .env("PATH", format!("{}:{}:/usr/bin:/bin", path.display(), tools().display()))
        .output()
        .expect("the program starts")
}

/// Returns the platform of this machine, such as `x86_64-unknown-linux-gnu`. The packages of other platforms may not be
/// downloaded, so `cargo metadata` is limited to this platform.
fn host() -> String {
    let rustc = Path::new(env!("CARGO")).with_file_name("rustc");
    let output = Command::new(rustc).arg("-vV").output().expect("the compiler starts");
    let text = String::from_utf8(output.stdout).expect("the output is UTF-8");
    text.lines().find_map(|line| line.strip_prefix("host: ")).expect("rustc prints its host").to_owned()
}

/// Returns the folder into which cargo has unpacked `etcd-client`.
fn crate_folder() -> PathBuf {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--locked", "--offline", "--format-version", "1", "--filter-platform", &host()])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("cargo prints JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    let found = packages.iter().find(|package| package["name"] == "etcd-client").expect("the crate is a dependency");
    let manifest = Path::new(found["manifest_path"].as_str().expect("a path"));
    manifest.parent().expect("the file has a parent folder").to_owned()
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("the folder is readable").map(|entry| entry.expect("the folder is readable"))
    {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::write(target, fs::read(entry.path()).expect("the file is readable")).expect("the file is writable");
        }
    }
}

#[test]
fn build_of_etcd_client_needs_no_protoc() {
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("set");
    let result = protoc(&crate_folder(), folder.path(), &out, &REQUESTED_FILES);
    assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
    let kept = fs::read(tools().join("etcd-client.fds")).expect("the file exists");
    assert!(fs::read(out).expect("the file was written") == kept);
}

#[test]
fn other_files_need_a_real_protoc() {
    let folder = tempfile::tempdir().expect("a folder");
    let (folder, out) = (folder.path(), folder.path().join("set"));
    // The files have the same names, and one of them has one more line, as in another version of the crate.
    copy(&crate_folder().join("proto"), &folder.join("proto"));
    let changed = folder.join(REQUESTED_FILES[2]);
    fs::write(&changed, [&fs::read(&changed).expect("the file was copied")[..], b"\n"].concat())
        .expect("the file is written");
    for files in [&REQUESTED_FILES[..], &REQUESTED_FILES[..4], &["other.proto"]] {
        // A machine may have a real protoc in `/usr/bin`, which the script then runs. The checks do not apply there.
        let result = protoc(folder, folder, &out, files);
        assert!(!result.status.success() || Path::new("/usr/bin/protoc").exists(), "{files:?}");
        let output = String::from_utf8_lossy(&result.stderr);
        assert!(output.contains("make etcd-protos") || Path::new("/usr/bin/protoc").exists(), "{output}");
    }
    let real = folder.join("real");
    fs::create_dir(&real).expect("a folder");
    fs::write(real.join("protoc"), "#!/bin/sh\necho asked: \"$@\"\n").expect("the file is written");
    fs::set_permissions(real.join("protoc"), fs::Permissions::from_mode(0o755)).expect("the test owns the file");
    let result = protoc(folder, &real, &out, &REQUESTED_FILES);
    let output = String::from_utf8(result.stdout).expect("text");
    assert!(
        output.starts_with("asked: --include_imports") && output.trim_end().ends_with(REQUESTED_FILES[4]),
        "{output}"
    );
}
