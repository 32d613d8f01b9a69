//! Tests of the architecture: which room may import which, and which files may use external interfaces.
//!
//! `docs/architecture.md` has the reasons and the same rules. A new room needs an entry in [`ROOMS`] first.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::source::{self, paths, strip};

/// The rooms in import order. Each room may import only earlier rooms.
const ROOMS: &[&str] = &[
    "model",
    "limits",
    "task",
    "telemetry",
    "record",
    "log",
    "tier",
    "proto",
    "client",
    "cluster",
    "partition",
    "group",
    "broker",
    "config",
    "server",
    "cli",
    "main",
];

/// An interface that only some files may use.
struct RestrictedImport {
    what: &'static str,
    /// Paths that show the use of the interface.
    paths: &'static [&'static str],
    /// Files and folders that may use the interface.
    allowed: &'static [&'static str],
}

const KNOWLEDGE: &[RestrictedImport] = &[
    RestrictedImport {
        what: "the file system",
        paths: &["std::fs", "tokio::fs", "rustix::fs", "std::os::unix::fs"],
        allowed: &["log/disk", "tier/files", "cluster/embedded", "config", "cli"],
    },
    RestrictedImport { what: "object stores", paths: &["object_store"], allowed: &["tier", "server"] },
    RestrictedImport {
        what: "the vendor's S3 client",
        paths: &["aws_sdk_s3", "aws_config"],
        allowed: &["tier", "cli"],
    },
    RestrictedImport { what: "etcd", paths: &["etcd_client"], allowed: &["cluster/etcd"] },
    RestrictedImport {
        what: "gRPC",
        paths: &["tonic", "tonic_health", "tonic_reflection", "tonic_types", "tonic_prost"],
        allowed: &["proto", "client", "broker", "server"],
    },
    RestrictedImport { what: "the embedded key-value store", paths: &["redb"], allowed: &["cluster/embedded"] },
    RestrictedImport { what: "errors without a type", paths: &["anyhow"], allowed: &["server", "cli", "main"] },
    // A simulated process has a generator of its own.
    RestrictedImport { what: "randomness", paths: &["rand"], allowed: &["task/random", "task/process"] },
    RestrictedImport {
        what: "an order of iteration that no two runs share (a BTreeMap has one of its own)",
        paths: &["std::collections::HashMap", "std::collections::HashSet"],
        // The generated types need hash maps. The search of the model check holds millions of states and never iterates
        // over them.
        allowed: &["proto", "broker/topics", "broker/describe", "partition/model_check"],
    },
    RestrictedImport { what: "command-line arguments", paths: &["clap"], allowed: &["config", "cli", "main"] },
];

/// Files and folders that hold decisions or formats: no async, no clock, no randomness.
const PURE: &[&str] = &[
    "record",
    "partition/leader",
    "partition/follower",
    "partition/retention",
    "group/assign",
    "cluster/partition_value",
    "cluster/placement",
    "cluster/planner",
    "tier/manifest",
    "tier/footer",
];

const IMPURE: &[&str] =
    &["async", "await", "tokio", "crate::task", "std::time::SystemTime", "std::time::Instant", "SystemTime"];

/// A file as the rules see it.
struct File {
    /// Path below `src/`, with `/`.
    name: String,
    text: String,
}

impl File {
    fn room(&self) -> &str {
        let first = self.name.split('/').next().expect("a path has a first part");
        first.trim_end_matches(".rs")
    }

    /// Returns the number of segments of the module path: one for a room's own file.
    fn depth(&self) -> usize {
        let path = self.name.trim_end_matches(".rs").trim_end_matches("/mod");
        path.split('/').count()
    }

    fn is_in(&self, places: &[&str]) -> bool {
        let name = self.name.trim_end_matches(".rs");
        places.iter().any(|place| name.strip_prefix(place).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')))
    }

    fn is_test(&self) -> bool {
        self.name.ends_with("tests.rs") || self.name.contains("/tests/")
    }
}

/// Returns every rule violation in `files`, as text.
fn violations(files: &[File]) -> Vec<String> {
    let mut found = Vec::new();
    for file in files {
        shape(file, &mut found);
        if file.name == "lib.rs" {
            continue;
        }
        let Some(place) = ROOMS.iter().position(|room| *room == file.room()) else {
            found.push(format!("{}: no room has this name; give it a place in ROOMS and in the design", file.name));
            continue;
        };
        order(file, place, &mut found);
        if !file.is_test() {
            knowledge(file, &mut found);
        }
    }
    found
}

fn shape(file: &File, found: &mut Vec<String>) {
    if !file.text.starts_with("//!") {
        found.push(format!("{}: opens without `//!`: say what the file owns and what it never does", file.name));
    }
}

fn order(file: &File, place: usize, found: &mut Vec<String>) {
    for path in paths(&strip(&file.text)) {
        let supers = path.segments.iter().take_while(|segment| *segment == "super").count();
        let root = match path.segments[0].as_str() {
            "crate" => 1,
            // In the main file, the library has its crate name.
            "strandline" if file.room() == "main" => 1,
            "super" if supers >= file.depth() => supers,
            _ => continue,
        };
        let Some(target) = path.segments.get(root) else { continue };
        let Some(theirs) = ROOMS.iter().position(|room| room == target) else { continue };
        if theirs > place {
            found.push(format!(
                "{}:{}: `{}` knows `{target}`, which is to its right",
                file.name,
                path.line,
                file.room()
            ));
        }
    }
}

fn knowledge(file: &File, found: &mut Vec<String>) {
    let paths = paths(&source::without_tests(&strip(&file.text)));
    for rule in KNOWLEDGE.iter().filter(|rule| !file.is_in(rule.allowed)) {
        // A single word is only a name, such as the setting `object_store`. A use of a crate is a path into the crate.
        let into = paths.iter().filter(|path| path.segments.len() > 1);
        for path in into.filter(|path| rule.paths.iter().any(|prefix| path.begins(prefix))) {
            let written = path.segments.join("::");
            found.push(format!(
                "{}:{}: `{written}`: {} is known only in {:?}",
                file.name, path.line, rule.what, rule.allowed
            ));
        }
    }
    if file.is_in(PURE) {
        for path in paths.iter().filter(|path| IMPURE.iter().any(|prefix| path.begins(prefix))) {
            found.push(format!(
                "{}:{}: `{}` in a file of pure decisions",
                file.name,
                path.line,
                path.segments.join("::")
            ));
        }
    }
}

/// Returns the first pair of rooms that the library lists out of order.
fn listed_out_of_order(lib: &str) -> Option<String> {
    let stripped = strip(lib);
    let places: Vec<(usize, String)> = stripped
        .lines()
        .filter_map(|line| line.trim().strip_prefix("pub mod ")?.strip_suffix(';').map(str::to_owned))
        .map(|room| (ROOMS.iter().position(|known| *known == room).unwrap_or(usize::MAX), room))
        .collect();
    places
        .windows(2)
        .find(|pair| pair[0].0 > pair[1].0)
        .map(|pair| format!("`{}` stands after `{}`", pair[1].1, pair[0].1))
}

fn sources() -> Vec<File> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut folders, mut files) = (vec![root.clone()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("the source can be listed") {
            let path: PathBuf = entry.expect("the source can be listed").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(&root).expect("below the root").to_string_lossy().into_owned();
                files.push(File { name, text: fs::read_to_string(&path).expect("the source can be read") });
            }
        }
    }
    files
}

#[test]
fn every_room_follows_the_import_order() {
    let files = sources();
    assert!(files.len() > 10, "sources exist");
    let mut found = violations(&files);
    let has = |name: String| files.iter().any(|file| file.name == name);
    for room in ROOMS.iter().filter(|room| files.iter().any(|file| file.room() == **room)) {
        if !has(format!("{room}.rs")) && !has(format!("{room}/mod.rs")) {
            found.push(format!("{room}: a room has one face, {room}.rs or {room}/mod.rs"));
        }
    }
    let lib = files.iter().find(|file| file.name == "lib.rs").expect("the library");
    found.extend(listed_out_of_order(&lib.text));
    assert!(found.is_empty(), "\n{}\n", found.join("\n"));
}

/// The documented map has the existing rooms, in their order.
#[test]
fn documented_map_of_rooms_matches_the_import_order() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/architecture.md");
    let page = fs::read_to_string(page).expect("the page");
    let rooms = page.split("## The rooms").nth(1).expect("the map").split("\n## ").next().expect("the map");
    let mapped: Vec<&str> = rooms.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).collect();
    let places: Vec<Option<usize>> = mapped.iter().map(|name| ROOMS.iter().position(|room| room == name)).collect();
    assert!(places.iter().all(Option::is_some) && places.is_sorted(), "{mapped:?}");
    for file in sources().iter().filter(|file| file.name != "lib.rs" && file.name != "main.rs") {
        assert!(mapped.contains(&file.room()), "docs/architecture.md has no row for `{}`", file.room());
    }
}

/// Returns the violations in one planted file.
fn planted(name: &str, code: &str) -> Vec<String> {
    violations(&[File { name: name.to_owned(), text: format!("//! Planted.\n{code}\n") }])
}

#[test]
fn import_of_a_later_room_is_found_in_every_form() {
    for code in [
        "use crate::broker::Node;",
        "use crate::{limits, model::{Offset}, broker::Node};",
        "fn f() { crate::broker::start() }",
        "pub use crate::{\n    broker as other,\n};",
        "use super::super::broker::Node;",
        "macro_rules! m { () => { $crate::broker::start() } }",
        "#[cfg(test)]\nmod tests { use crate::broker::Node; }",
    ] {
        let found = planted("log/segment.rs", code);
        assert_eq!(found.len(), 1, "{code}: {found:?}");
        assert!(found[0].contains("`log` knows `broker`"), "{found:?}");
    }
    assert_eq!(planted("limits.rs", "use super::log::Segment;").len(), 1);
}

#[test]
fn allowed_imports_are_not_reported() {
    for (name, code) in [
        ("log/segment.rs", "use crate::{limits, record::Batch, log::disk};\nuse super::index::Index;"),
        ("log/disk/real.rs", "use std::fs::File;"),
        ("log/disk.rs", "use std::{fs::{self, File}, io};"),
        ("tier/upload.rs", "use object_store::ObjectStore;"),
        ("log/segment.rs", "// crate::broker\nconst S: &str = \"crate::broker std::fs\";"),
        ("log/segment.rs", "#[cfg(test)]\nmod tests { use std::fs; }"),
        ("log/tests.rs", "use std::fs;"),
        ("main.rs", "use strandline::cli;"),
        ("record/batch.rs", "use std::time::Duration;"),
    ] {
        assert_eq!(planted(name, code), Vec::<String>::new(), "{name}: {code}");
    }
}

#[test]
fn restricted_import_is_found() {
    for (name, code, what) in [
        ("log/segment.rs", "use std::{fs, io};", "the file system"),
        ("log/diskette.rs", "use std::fs;", "the file system"),
        ("tier/cache.rs", "fn f() { tokio::fs::read(x) }", "the file system"),
        ("broker/fetch.rs", "use object_store::path::Path;", "object stores"),
        ("cluster/embedded.rs", "use etcd_client::Client;", "etcd"),
        ("partition/actor.rs", "use tonic::Status;", "gRPC"),
        ("partition/actor.rs", "use tonic_types::StatusExt;", "gRPC"),
        ("log/mod.rs", "fn f() -> anyhow::Result<()> { g() }", "errors without a type"),
        ("record/build.rs", "async fn f() {}", "pure"),
        ("partition/leader.rs", "use std::time::{Duration, Instant};", "pure"),
        ("partition/retention.rs", "use crate::task::clock;", "pure"),
        ("tier/manifest/page.rs", "fn f() { crate::task::random::bits() }", "pure"),
        ("client/options.rs", "fn f() { rand::random() }", "randomness"),
        ("broker/hosted.rs", "use std::{collections::HashMap, sync::Arc};", "an order of iteration"),
        ("cluster/planner.rs", "fn f() { x.await }", "pure"),
    ] {
        let found = planted(name, code);
        assert_eq!(found.len(), 1, "{name}: {code}: {found:?}");
        assert!(found[0].contains(what), "{found:?}");
    }
}

#[test]
fn file_without_module_doc_is_found() {
    let bare = [File { name: "log/mod.rs".to_owned(), text: "fn f() {}\n".to_owned() }];
    assert!(violations(&bare)[0].contains("opens without"));
    assert!(planted("utils.rs", "")[0].contains("no room has this name"));
    assert_eq!(
        listed_out_of_order("pub mod model;\n\npub mod log;\npub mod record;"),
        Some("`record` stands after `log`".to_owned())
    );
    assert_eq!(listed_out_of_order("pub mod model;\n#[cfg(feature = \"server\")]\npub mod log;"), None);
}

/// A program that embeds the client must not compile a server. The list is what the `server` and `aws-sdk` features
/// add.
#[test]
fn client_without_server_has_no_server_crates() {
    let root = env!("CARGO_MANIFEST_DIR");
    let manifest = fs::read_to_string(Path::new(root).join("Cargo.toml")).expect("the manifest");
    let manifest: toml::Table = manifest.parse().expect("the manifest is TOML");
    let added: Vec<String> = ["server", "aws-sdk"]
        .iter()
        .flat_map(|feature| manifest["features"][*feature].as_array().expect("a list of features"))
        .filter_map(|entry| entry.as_str()?.strip_prefix("dep:").map(str::to_owned))
        .collect();
    assert!(added.len() > 10, "features exist: {added:?}");
    // By name and version: tonic may add a crate of the same name, which does not count.
    let direct = tree(&["--all-features", "--depth", "1"]);
    let servers: Vec<&String> =
        direct.iter().filter(|line| added.iter().any(|name| line.starts_with(&format!("{name} ")))).collect();
    assert!(servers.len() > 10, "the crates of the server were found: {servers:?}");
    let client = tree(&["--no-default-features"]);
    assert!(
        client.iter().any(|line| line.starts_with("tonic ")),
        "the dependency tree of the client exists: {client:?}"
    );
    // The client has these crates through tonic's channel.
    let of_tonic =
        |line: &str| ["hyper ", "hyper-util ", "slab ", "smallvec "].iter().any(|name| line.starts_with(name));
    let unwanted: Vec<&&String> = servers.iter().filter(|line| client.contains(line) && !of_tonic(line)).collect();
    assert!(unwanted.is_empty(), "the client alone depends on {unwanted:?}");
}

/// Returns the packages of the library, as `name vX.Y.Z`. Packages that only run inside the compiler do not count.
fn tree(features: &[&str]) -> Vec<String> {
    let output = Command::new(env!("CARGO"))
        .args([
            "tree",
            "--locked",
            "--offline",
            "--edges",
            "normal,no-proc-macro",
            "--prefix",
            "none",
            "--format",
            "{p}",
        ])
        .args(features)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("cargo prints UTF-8");
    text.lines().map(|line| line.split(' ').take(2).collect::<Vec<_>>().join(" ")).collect()
}
