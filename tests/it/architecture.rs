//! Tests of the architecture: which module may import which, no import cycles between files, unique names of types, and
//! which files may use external interfaces.
//!
//! `docs/architecture.md` has the reasons and the same rules. A new module needs an entry in [`MODULES`] first.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fs,
    path::Path,
};

use crate::source::{Definition, Kind, SourceFile, Sources, Use, read_folder};

/// The modules in import order. Each module may import only earlier modules.
const MODULES: &[&str] = &[
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
    "config",
    "partition",
    "group",
    "auth",
    "broker",
    "server",
    "cli",
    "main",
];

/// Folders of the packages. A file belongs to the first folder that contains it.
const PACKAGES: &[&str] = &["proto/src", "src/core", "src/client", "src"];

/// Folders of each test package. Both users of `tests/common` are listed with it.
const TEST_PACKAGES: &[&[&str]] = &[
    &["tests/sim", "tests/common"],
    &["tests/it", "tests/common"],
    &["benches"],
    &["fuzz/entries", "fuzz/fuzz_targets"],
];

/// An interface that only some files may use.
struct RestrictedImport {
    what: &'static str,
    /// Paths that show the use of the interface.
    paths: &'static [&'static str],
    /// Files and folders that may use the interface.
    allowed: &'static [&'static str],
}

const RESTRICTED: &[RestrictedImport] = &[
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
        allowed: &["proto", "broker/api/topics", "broker/api/describe", "partition/model_check"],
    },
    RestrictedImport { what: "command-line arguments", paths: &["clap"], allowed: &["config", "cli", "main"] },
];

/// Files and folders that hold decisions or formats: no async, no clock, no randomness.
const PURE: &[&str] = &[
    "record",
    "partition/leader",
    "partition/follower",
    "partition/metadata",
    "partition/retention",
    "cluster/partition_value",
    "cluster/placement",
    "cluster/planner",
    "tier/manifest",
    "tier/footer",
];

const IMPURE: &[&str] =
    &["async", "await", "tokio", "crate::task", "std::time::SystemTime", "std::time::Instant", "SystemTime"];

/// Returns every rule violation in `sources`, as text.
fn violations(sources: &Sources) -> Vec<String> {
    let mut found = Vec::new();
    for file in &sources.files {
        if !file.text.starts_with("//!") {
            found.push(format!("{}: opens without `//!`: state what the file owns and what it never does", file.name));
        }
        let Some(place) = MODULES.iter().position(|known| *known == top_module(file)) else {
            if file.name != "lib.rs" {
                found.push(format!(
                    "{}: no module has this name: add the module to MODULES and to docs/architecture.md",
                    file.name
                ));
            }
            continue;
        };
        check_order(file, place, &mut found);
        check_restricted_imports(file, &mut found);
    }
    check_cycles(sources, &mut found);
    check_type_names(sources, &mut found);
    found
}

fn top_module(file: &SourceFile) -> &str {
    file.name.split('/').next().expect("a path has a first part").trim_end_matches(".rs")
}

fn is_in(file: &SourceFile, places: &[&str]) -> bool {
    let name = file.name.trim_end_matches(".rs");
    places.iter().any(|place| name.strip_prefix(place).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')))
}

fn check_order(file: &SourceFile, place: usize, found: &mut Vec<String>) {
    for path in &file.paths {
        let depth = path.module.split("::").count();
        let supers = path.segments.iter().take_while(|segment| *segment == "super").count();
        let root = match path.segments.first().map(String::as_str) {
            Some("crate") => 1,
            // In the main file, the library has its crate name.
            Some("strandline") if top_module(file) == "main" => 1,
            Some("super") if supers >= depth => supers,
            _ => continue,
        };
        let Some(target) = path.segments.get(root) else { continue };
        if MODULES.iter().position(|module| module == target).is_some_and(|theirs| theirs > place) {
            found.push(format!(
                "{}:{}: `{}` imports the later module `{target}`",
                file.name,
                path.line,
                top_module(file)
            ));
        }
    }
}

fn check_restricted_imports(file: &SourceFile, found: &mut Vec<String>) {
    for path in file.paths.iter().filter(|path| !path.in_test) {
        let mut report = |reason: String| {
            found.push(format!("{}:{}: `{}`: {reason}", file.name, path.line, path.segments.join("::")));
        };
        for rule in RESTRICTED.iter().filter(|rule| !is_in(file, rule.allowed)) {
            // A single word is only a name, such as the setting `object_store`. A use of a crate is a path into it.
            if path.segments.len() > 1 && rule.paths.iter().any(|prefix| path.starts_with(prefix)) {
                report(format!("only {:?} may use {}", rule.allowed, rule.what));
            }
        }
        if is_in(file, PURE) && IMPURE.iter().any(|prefix| path.starts_with(prefix)) {
            report("not allowed in a file of pure decisions".to_owned());
        }
    }
}

/// For each file of [`Sources`]: the files whose items it names, by index, each with the line and the Rust path of the
/// first use.
type Graph = Vec<BTreeMap<usize, (usize, String)>>;

fn import_graph(sources: &Sources) -> Graph {
    let mut graph = vec![BTreeMap::new(); sources.files.len()];
    for (index, file) in sources.files.iter().enumerate() {
        for path in file.paths.iter().filter(|path| !path.in_test && path.usage != Use::Reexport) {
            let Some(target) = sources.defining_file(path).filter(|target| *target != index) else { continue };
            let other = &sources.files[target];
            if !is_module_root_of(&other.name, &file.name) && !is_module_root_of(&file.name, &other.name) {
                graph[index].entry(target).or_insert((path.line, path.segments.join("::")));
            }
        }
    }
    graph
}

/// Returns true if `root` is the `mod.rs` of the folder of `name` or of a folder above.
fn is_module_root_of(root: &str, name: &str) -> bool {
    root == "lib.rs" || root.strip_suffix("mod.rs").is_some_and(|folder| name.starts_with(folder))
}

/// Returns the shortest chain from `start` back to `start`, without the last step.
fn shortest_cycle(graph: &Graph, start: usize) -> Option<Vec<usize>> {
    let (mut from, mut queue) = (BTreeMap::new(), VecDeque::from([start]));
    while let Some(at) = queue.pop_front() {
        for next in graph[at].keys() {
            if *next == start {
                let mut chain = vec![at];
                while chain[0] != start {
                    chain.insert(0, from[&chain[0]]);
                }
                return Some(chain);
            }
            from.entry(*next).or_insert_with(|| {
                queue.push_back(*next);
                at
            });
        }
    }
    None
}

/// Reports the shortest import cycle through each file that is part of a cycle. Each cycle is reported once.
fn check_cycles(sources: &Sources, found: &mut Vec<String>) {
    let graph = import_graph(sources);
    let mut reported = BTreeSet::new();
    for start in 0..graph.len() {
        let Some(chain) = shortest_cycle(&graph, start) else { continue };
        let mut files = chain.clone();
        files.sort_unstable();
        if !reported.insert(files) {
            continue;
        }
        let steps = chain.iter().enumerate().map(|(at, file)| {
            let next = chain[(at + 1) % chain.len()];
            let (line, path) = &graph[*file][&next];
            format!("\n    {}:{line}: `{path}` is defined in {}", sources.files[*file].name, sources.files[next].name)
        });
        found.push(format!("{}: import cycle:{}", sources.files[start].name, steps.collect::<String>()));
    }
}

/// A public type name is defined once, and a private one once per file. Tests may repeat a name.
fn check_type_names(sources: &Sources, found: &mut Vec<String>) {
    let mut types: BTreeMap<&str, Vec<(&str, &Definition)>> = BTreeMap::new();
    for file in &sources.files {
        for definition in file.definitions.iter().filter(|definition| definition.kind == Kind::Type) {
            if !definition.in_test {
                types.entry(&definition.name).or_default().push((&file.name, definition));
            }
        }
    }
    for (name, places) in types {
        let files: BTreeSet<&str> = places.iter().map(|(file, _)| *file).collect();
        let is_public = places.iter().any(|(_, definition)| definition.is_public);
        if places.len() > 1 && (is_public || files.len() < places.len()) {
            let places = places.iter().map(|(file, definition)| format!("{file}:{}", definition.line));
            found.push(format!("the type `{name}` has several definitions: {}", places.collect::<Vec<_>>().join(", ")));
        }
    }
}

/// Returns the first pair of modules that the library lists out of order.
fn listed_out_of_order(lib: &str) -> Option<String> {
    let places: Vec<(usize, String)> = lib
        .lines()
        .filter_map(|line| line.trim().strip_prefix("pub mod ")?.strip_suffix(';').map(str::to_owned))
        .map(|module| (MODULES.iter().position(|known| *known == module).unwrap_or(usize::MAX), module))
        .collect();
    places
        .windows(2)
        .find(|pair| pair[0].0 > pair[1].0)
        .map(|pair| format!("`{}` stands after `{}`", pair[1].1, pair[0].1))
}

/// Reads the sources of all packages, each file under the name that it has among the modules: `model/offset.rs` for
/// `src/core/model/offset.rs`.
fn sources() -> Sources {
    let files = files_in(&["src", "proto/src"]);
    assert_eq!(packages_without_files(&files), Vec::<&str>::new(), "every package has files");
    Sources::parse(files.into_iter().filter_map(|(path, text)| Some((module_file(&path)?, text))).collect())
}

/// Returns path and text of every source file below these folders.
fn files_in(folders: &[&str]) -> Vec<(String, String)> {
    let below = |folder: &&str| {
        let files = read_folder(&Path::new(env!("CARGO_MANIFEST_DIR")).join(folder), &["rs"]);
        files.into_iter().map(|(name, text)| (format!("{folder}/{name}"), text)).collect::<Vec<_>>()
    };
    folders.iter().flat_map(below).collect()
}

/// Returns the name of a source file among the modules. The root of the core package has none.
fn module_file(path: &str) -> Option<String> {
    match path {
        "src/core/lib.rs" => None,
        "src/client/lib.rs" => Some("client/mod.rs".to_owned()),
        "proto/src/lib.rs" => Some("proto/mod.rs".to_owned()),
        _ => {
            let name = path.replace("proto/src/", "proto/");
            Some(name.trim_start_matches("src/").trim_start_matches("core/").to_owned())
        }
    }
}

/// Returns the packages that have none of these files.
fn packages_without_files(files: &[(String, String)]) -> Vec<&'static str> {
    let is_below = |path: &str, folder: &str| path.strip_prefix(folder).is_some_and(|rest| rest.starts_with('/'));
    let package = |(path, _): &(String, String)| PACKAGES.iter().copied().find(|folder| is_below(path, folder));
    let found: BTreeSet<&str> = files.iter().filter_map(package).collect();
    PACKAGES.iter().copied().filter(|package| !found.contains(package)).collect()
}

#[test]
fn sources_follow_the_architecture() {
    let sources = sources();
    let mut found = violations(&sources);
    let has = |name: String| sources.files.iter().any(|file| file.name == name);
    for name in MODULES.iter().filter(|name| sources.files.iter().any(|file| top_module(file) == **name)) {
        if !has(format!("{name}.rs")) && !has(format!("{name}/mod.rs")) {
            found.push(format!("{name}: a module has one root file, {name}.rs or {name}/mod.rs"));
        }
    }
    let places = RESTRICTED.iter().flat_map(|rule| rule.allowed).chain(PURE);
    for place in places.filter(|place| !sources.files.iter().any(|file| is_in(file, &[place]))) {
        found.push(format!("a rule names {place}, which does not exist"));
    }
    let lib = sources.files.iter().find(|file| file.name == "lib.rs").expect("the library");
    found.extend(listed_out_of_order(&lib.text));
    assert!(found.is_empty(), "{} violations:\n{}\n", found.len(), found.join("\n"));
}

/// Test packages have no import order, so only the rule for type names applies to them.
#[test]
fn public_type_names_of_test_packages_are_unique() {
    let mut found = Vec::new();
    for folders in TEST_PACKAGES {
        check_type_names(&Sources::parse(files_in(folders)), &mut found);
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

/// The documented map has the existing modules, in their order.
#[test]
fn documented_map_of_modules_matches_the_import_order() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/architecture.md");
    let page = fs::read_to_string(page).expect("the page");
    let modules = page.split("## The modules").nth(1).expect("the map").split("\n## ").next().expect("the map");
    let mapped: Vec<&str> = modules.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).collect();
    let places: Vec<Option<usize>> =
        mapped.iter().map(|name| MODULES.iter().position(|module| module == name)).collect();
    assert!(places.iter().all(Option::is_some) && places.is_sorted(), "{mapped:?}");
    for file in sources().files.iter().filter(|file| file.name != "lib.rs" && file.name != "main.rs") {
        assert!(mapped.contains(&top_module(file)), "docs/architecture.md has no row for `{}`", top_module(file));
    }
}

/// Returns the violations in these files, given as name and code.
fn planted(files: &[(&str, &str)]) -> Vec<String> {
    let text = |(name, code): &(&str, &str)| ((*name).to_owned(), format!("//! Planted.\n{code}\n"));
    violations(&Sources::parse(files.iter().map(text).collect()))
}

#[test]
fn import_of_a_later_module_is_found_in_every_form() {
    for code in [
        "use crate::broker::Node;",
        "use crate::{limits, model::{Offset}, broker::Node};",
        "fn f() { crate::broker::start() }",
        "pub use crate::{\n    broker as other,\n};",
        "use super::super::broker::Node;",
        "macro_rules! m { () => { $crate::broker::start() } }",
        "#[cfg(test)]\nmod tests { use crate::broker::Node; }",
    ] {
        let found = planted(&[("log/segment.rs", code)]);
        assert_eq!(found.len(), 1, "{code}: {found:?}");
        assert!(found[0].contains("`log` imports the later module `broker`"), "{found:?}");
    }
    assert_eq!(planted(&[("limits.rs", "use super::log::Segment;")]).len(), 1);
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
        assert_eq!(planted(&[(name, code)]), Vec::<String>::new(), "{name}: {code}");
    }
}

#[test]
fn restricted_import_is_found() {
    for (name, code, what) in [
        ("log/segment.rs", "use std::{fs, io};", "the file system"),
        ("log/diskette.rs", "use std::fs;", "the file system"),
        ("tier/cache.rs", "fn f() { tokio::fs::read(x) }", "the file system"),
        ("broker/api/fetch/mod.rs", "use object_store::path::Path;", "object stores"),
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
        let found = planted(&[(name, code)]);
        assert_eq!(found.len(), 1, "{name}: {code}: {found:?}");
        assert!(found[0].contains(what), "{found:?}");
    }
}

#[test]
fn import_cycle_is_found_with_its_chain() {
    let pair = [("log/a.rs", "use super::b::B;\npub struct A;"), ("log/b.rs", "pub struct B;\nfn f() { super::a::A }")];
    let found = planted(&pair);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].contains("log/a.rs:2: `super::b::B` is defined in log/b.rs"), "{found:?}");
    assert!(found[0].contains("log/b.rs:3: `super::a::A` is defined in log/a.rs"), "{found:?}");
    let reexport = ("log/mod.rs", "mod a;\nmod b;\nmod c;\npub use {a::A, c::*};");
    for files in [
        // Through a re-export, an import that a glob brings, and the tokens of a macro.
        [
            ("log/a.rs", "pub struct A;\nfn f(b: super::b::B) {}"),
            ("log/b.rs", "use super::A;\npub struct B;"),
            reexport,
        ],
        [
            ("log/a.rs", "use super::*;\npub struct A;\nfn f(c: C) {}"),
            ("log/c.rs", "use super::A;\npub struct C;"),
            reexport,
        ],
        [
            ("log/a.rs", "pub struct A;\nfn f() { vec![super::c::g()] }"),
            ("log/c.rs", "use super::A;\npub fn g() {}"),
            reexport,
        ],
    ] {
        assert_eq!(planted(&files).len(), 1, "{files:?}: {:?}", planted(&files));
    }
    for files in [
        // `mod.rs`, test code, re-exports, methods and names of fields.
        [("log/mod.rs", "mod a;\nuse a::A;\npub struct M;"), ("log/a.rs", "pub struct A;\nfn f(m: super::M) {}")],
        [
            ("log/a.rs", "use super::b::B;\npub struct A;"),
            ("log/b.rs", "pub struct B;\n#[test]\nfn f() { super::a::A }"),
        ],
        [("log/a.rs", "pub use super::b::B;\npub struct A;"), ("log/b.rs", "use super::a::A;\npub struct B;")],
        [
            ("log/a.rs", "use super::b::B;\npub fn g() {}"),
            ("log/b.rs", "use super::a;\npub struct B;\nfn f() { b!(x.g()) }"),
        ],
    ] {
        assert_eq!(planted(&files), Vec::<String>::new(), "{files:?}");
    }
}

#[test]
fn repeated_type_name_is_found() {
    for (first, second) in [("pub struct A;", "pub(crate) enum A {}"), ("pub trait A {}", "struct A;")] {
        let found = planted(&[("log/a.rs", first), ("tier/b.rs", second)]);
        assert_eq!(found, ["the type `A` has several definitions: log/a.rs:2, tier/b.rs:2"]);
    }
    assert_eq!(planted(&[("log/a.rs", "struct A;\nmod m { struct A; }")]).len(), 1);
    for second in ["struct A;", "#[cfg(test)]\nmod tests { pub struct A; }"] {
        assert_eq!(planted(&[("log/a.rs", "struct A;"), ("tier/b.rs", second)]), Vec::<String>::new());
    }
}

#[test]
fn package_without_files_is_found() {
    let without = |paths: &[&str]| {
        packages_without_files(&paths.iter().map(|path| ((*path).to_owned(), String::new())).collect::<Vec<_>>())
    };
    let all = ["proto/src/error.rs", "src/core/model/ids.rs", "src/client/lib.rs", "src/log/mod.rs"];
    assert_eq!(without(&all), Vec::<&str>::new());
    assert_eq!(without(&["proto/src/error.rs", "src/clients.rs", "src/client/lib.rs"]), ["src/core"]);
    assert_eq!(without(&all[..3]), ["src"]);
}

#[test]
fn file_without_module_doc_is_found() {
    let bare = Sources::parse(vec![("log/mod.rs".to_owned(), "fn f() {}\n".to_owned())]);
    assert!(violations(&bare)[0].contains("opens without"));
    assert!(planted(&[("utils.rs", "")])[0].contains("no module has this name"));
    assert_eq!(
        listed_out_of_order("pub mod model;\n\npub mod log;\npub mod record;"),
        Some("`record` stands after `log`".to_owned())
    );
    assert_eq!(listed_out_of_order("pub mod model;\n\npub mod log;"), None);
}
