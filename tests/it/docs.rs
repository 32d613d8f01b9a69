//! Checks of the documentation: links have targets, and pages agree with the code about errors, files, functions,
//! commands and the configuration in the README.

use std::{
    fs,
    path::{Path, PathBuf},
};

use rustix::process::Signal;
use strandline::proto::error::ErrorCode;

use crate::{
    broker::{Cli, free_address},
    running::Running,
};

/// Returns the first three cells of each row that the table in `docs/errors.md` must have, in order.
fn expected_rows() -> Vec<String> {
    let retry = |reason: &ErrorCode| if reason.retryable() { "yes" } else { "no" };
    ErrorCode::ALL
        .iter()
        .map(|reason| format!("| `{}` | `{:?}` | {} |", reason.as_str(), reason.grpc_code(), retry(reason)))
        .collect()
}

#[test]
fn every_error_code_is_documented_with_its_retryability() {
    let path = root().join("docs/errors.md");
    let page = fs::read_to_string(path).expect("the page exists");
    let rows: Vec<&str> = page.lines().filter(|line| line.starts_with("| `")).collect();
    let expected = expected_rows();
    for (row, wanted) in rows.iter().zip(&expected) {
        assert!(row.starts_with(wanted.as_str()), "docs/errors.md has\n{row}\nbut the code has\n{wanted}");
        assert!(row.len() > wanted.len() + 20, "the row contains a remedy: {row}");
    }
    assert_eq!(rows.len(), expected.len(), "rows of docs/errors.md and reasons of the code");
}

#[test]
fn every_error_code_is_parsed_from_its_name() {
    for reason in ErrorCode::ALL {
        assert_eq!(ErrorCode::from_name(reason.as_str()), Some(*reason));
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Returns every Markdown page in the root folder and below `docs/`.
fn pages() -> Vec<PathBuf> {
    let (mut folders, mut found) = (vec![root().join("docs")], Vec::new());
    let markdown = |path: &Path| path.extension().is_some_and(|extension| extension == "md");
    let list = |folder: &Path| -> Vec<PathBuf> {
        fs::read_dir(folder)
            .expect("the folder is readable")
            .map(|entry| entry.expect("the folder is readable").path())
            .collect()
    };
    found.extend(list(root()).into_iter().filter(|path| markdown(path)));
    while let Some(folder) = folders.pop() {
        for path in list(&folder) {
            if path.is_dir() {
                folders.push(path);
            } else if markdown(&path) {
                found.push(path);
            }
        }
    }
    found
}

/// Returns the targets of a page's links to files of this repository, without anchors.
fn links(page: &str) -> Vec<&str> {
    let after = page.split("](").skip(1);
    let targets = after.filter_map(|rest| rest.split([')', '#']).next());
    targets.filter(|target| !target.is_empty() && !target.contains("://")).collect()
}

#[test]
fn every_link_has_a_target() {
    let pages = pages();
    assert!(pages.len() > 10, "pages exist: {pages:?}");
    for path in pages {
        let text = fs::read_to_string(&path).expect("a page");
        for link in links(&text) {
            let target = path.parent().expect("a folder").join(link);
            assert!(target.exists(), "{} links to {link}, which does not exist", path.display());
        }
    }
    assert_eq!(links("[a](b.md#c) and [d](https://e) [f](#g) ![h](i/j.png)"), ["b.md", "i/j.png"]);
}

#[test]
fn every_decision_is_listed() {
    let index = fs::read_to_string(root().join("docs/adr/README.md")).expect("the list");
    let listed: Vec<&str> = links(&index);
    for path in pages() {
        let name = path.file_name().and_then(|name| name.to_str()).expect("a name").to_owned();
        if path.parent().is_some_and(|folder| folder.ends_with("adr")) && name != "README.md" {
            assert!(listed.contains(&name.as_str()), "docs/adr/README.md does not list {name}");
            let text = fs::read_to_string(&path).expect("a page");
            for part in ["**Decided.**", "**Why.**", "**Costs.**", "**Not taken.**", "**Would change our mind.**"] {
                assert!(text.contains(part), "{name} has no section {part}");
            }
            assert!(text.starts_with(&format!("# {}: ", &name[..4])), "{name} opens with its number and title");
        }
    }
}

/// Returns the items that a page names as `` `module/file::function` `` or `` `module/file::Type::member` ``. An item
/// is the file below a source folder, the type, and the function, method or field.
fn named_items(page: &str) -> Vec<(&str, Option<&str>, &str)> {
    let is_lowercase = |text: &str| text.chars().all(|c| c.is_ascii_lowercase() || "_/".contains(c));
    let quoted = page.split('`').skip(1).step_by(2);
    let items = quoted.filter_map(|text| {
        let (file, item) = text.split_once("::")?;
        let (of_type, name) = item.split_once("::").map_or((None, item), |(of_type, name)| (Some(of_type), name));
        Some((file, of_type, name))
    });
    items.filter(|(file, _, name)| is_lowercase(file) && is_lowercase(name)).collect()
}

/// Returns true if this source defines the function, or the type with the method or field.
fn defines(source: &str, of_type: Option<&str>, name: &str) -> bool {
    let has = |start: &str, next: &[char]| source.split(start).skip(1).any(|rest| rest.starts_with(next));
    let has_function = has(&format!("fn {name}"), &['(', '<']);
    let Some(of_type) = of_type else { return has_function };
    let kinds = ["struct", "enum", "trait"];
    let has_type = kinds.iter().any(|kind| has(&format!("{kind} {of_type}"), &[' ', '<', '(', ';']));
    has_type && (has_function || has(&format!(" {name}"), &[':']))
}

#[test]
fn architecture_page_names_existing_items() {
    let page = fs::read_to_string(root().join("docs/architecture.md")).expect("the page");
    let named = named_items(&page);
    assert!(named.len() > 20, "names exist: {named:?}");
    for (file, of_type, name) in named {
        let folders = ["src", "src/core"].map(|folder| format!("{folder}/{file}"));
        let folders = folders.into_iter().chain(file.strip_prefix("proto/").map(|file| format!("proto/src/{file}")));
        let paths: Vec<_> = folders.flat_map(|path| [format!("{path}.rs"), format!("{path}/mod.rs")]).collect();
        let text = paths.iter().find_map(|path| fs::read_to_string(root().join(path)).ok());
        let text = text.unwrap_or_else(|| panic!("docs/architecture.md names `{file}`, which is none of {paths:?}"));
        assert!(
            defines(&text, of_type, name),
            "docs/architecture.md names {of_type:?} `{name}` of `{file}`, which does not have it"
        );
    }
    let text = "`a/b::c` and `D::E` and ``x`` and `a` and `a/b::C::d`";
    assert_eq!(named_items(text), [("a/b", None, "c"), ("a/b", Some("C"), "d")]);
    let source = "struct C {\n    d: u8,\n}\nfn e() {}";
    for (of_type, name, there) in [
        (None, "e", true),
        (Some("C"), "d", true),
        (Some("C"), "e", true),
        (None, "d", false),
        (Some("C"), "f", false),
        (Some("D"), "d", false),
    ] {
        assert_eq!(defines(source, of_type, name), there, "{of_type:?} {name}");
    }
}

/// Returns the paths that a page names as code. A capital letter in the path of a folder marks a placeholder.
fn named_paths(page: &str) -> Vec<&str> {
    let is_file = |text: &str| [".rs", ".md", ".proto", ".toml", ".txt"].iter().any(|end| text.ends_with(end));
    let is_path = |text: &&str| {
        text.contains('/')
            && !text.starts_with('/')
            && text.chars().all(|c| c.is_ascii_alphanumeric() || "_-./".contains(c))
            && (is_file(text) || !text.contains(|c: char| c.is_ascii_uppercase()))
    };
    page.split('`').skip(1).step_by(2).filter(is_path).collect()
}

/// A path is that of a file or folder, or the module path of a source file. Builds create the content of `target`.
#[test]
fn pages_for_contributors_name_existing_files() {
    for page in ["CONTRIBUTING.md", "docs/architecture.md"] {
        let text = fs::read_to_string(root().join(page)).expect("the page");
        let named = named_paths(&text);
        assert!(named.len() > 20, "{page} names paths: {named:?}");
        for path in named.into_iter().filter(|path| !path.starts_with("target/")) {
            let folders = ["", "src/", "src/core/"];
            let mut places = folders.iter().flat_map(|folder| ["", ".rs"].map(|end| format!("{folder}{path}{end}")));
            assert!(places.any(|place| root().join(place).exists()), "{page} names `{path}`, which does not exist");
        }
    }
    let text = "`src/a.rs` `src/b/` `c/d` `docs/README.md` `seeds/TARGET` `e.rs` `f/g::h` `//!` `/metrics`";
    assert_eq!(named_paths(text), ["src/a.rs", "src/b/", "c/d", "docs/README.md"]);
}

/// Each indented line `make TARGET` of a page must name a target of the Makefile.
#[test]
fn every_make_command_in_the_documentation_exists() {
    let makefile = fs::read_to_string(root().join("Makefile")).expect("the Makefile");
    let targets: Vec<&str> = makefile
        .lines()
        .filter_map(|line| line.split_once(": ").or(line.split_once(":")))
        .map(|(name, _)| name)
        .collect();
    for path in pages() {
        let text = fs::read_to_string(&path).expect("a page");
        for line in text.lines().filter_map(|line| line.strip_prefix("    make ")) {
            let name = line.split(' ').next().expect("a name");
            assert!(
                targets.contains(&name),
                "{} names `make {name}`, which the Makefile does not have",
                path.display()
            );
        }
    }
}

/// Regression: the configuration in the README advertised a host name that does not exist. The first record of a user
/// who copied it was sent only after a minute.
#[test]
fn readme_configuration_works_as_copied() {
    let page = fs::read_to_string(root().join("README.md")).expect("the page exists");
    let (_, block) = page.split_once("```toml\n").expect("the README has a configuration");
    let (text, _) = block.split_once("```").expect("the code block ends");
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("broker.toml");
    fs::write(&file, text).expect("written");
    // The default ports may be in use on the machine of the test, so the command line sets other ports.
    let (grpc, http) = (free_address(), free_address());
    let (listen, pages) = (grpc.to_string(), http.to_string());
    let command = ["broker", "--config", "broker.toml", "--listen", &listen, "--http", &pages];
    let broker = Running::start(&Cli::without_broker(folder.path()), &command);
    broker.wait_for_output(&broker.stderr, "ready");
    let cli = Cli::of(&[grpc], folder.path());
    cli.ok(&["topic", "create", "log"]);
    cli.ok_with(&["produce", "log", "--timeout", "20"], b"a record\n");
    assert_eq!(cli.ok(&["consume", "log", "--from", "earliest", "--until-end"]).text(), "a record\n");
    assert!(!broker.stderr.lock().contains("WARN"), "the log has no warnings");
    let (code, _) = broker.stop(Signal::TERM);
    assert_eq!(code, Some(0));
}

#[test]
fn unresolvable_advertised_name_is_reported() {
    let folder = tempfile::tempdir().expect("a folder");
    let (grpc, http) = (free_address(), free_address());
    let text = format!(
        "[broker]\ndata_dir = \"data\"\n[grpc]\nlisten = \"{grpc}\"\nadvertise = \"broker-1.invalid:9460\"\n[http]\nlisten = \"{http}\"\n"
    );
    fs::write(folder.path().join("broker.toml"), text).expect("written");
    let broker = Running::start(&Cli::without_broker(folder.path()), &["broker", "--config", "broker.toml"]);
    broker.wait_for_output(&broker.stderr, "cannot resolve");
    broker.wait_for_output(&broker.stderr, "grpc.advertise");
    let cli = Cli::of(&[grpc], folder.path());
    cli.ok(&["topic", "create", "log"]);
    let output = cli.run_with(&["produce", "log", "--timeout", "8"], b"a record\n");
    assert_eq!(output.code, 1, "{output:?}");
    let expected = "(advertised by broker 1: grpc.advertise)";
    assert!(output.stderr.contains("broker-1.invalid:9460") && output.stderr.contains(expected), "{output:?}");
    assert_eq!(broker.stop(Signal::TERM).0, Some(0));
}
