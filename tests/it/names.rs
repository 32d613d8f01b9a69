//! Tests of names and words: none that the project gave up comes back.
//!
//! `names.txt` lists given-up names of types, functions, fields, constants, enum variants and files, and texts such as
//! metric names, settings and flags. `words.txt` lists phrases and coined words that have no ordinary use in this
//! project, also not in the names of files.

use std::{collections::BTreeMap, fs, path::Path};

use crate::source::{Kind, Sources, read_folder};

/// Folders with Rust sources.
const CODE: &[&str] = &["src", "proto", "tests", "benches", "fuzz/entries", "fuzz/fuzz_targets"];

/// Folders with other text, and their extensions.
const TEXTS: &[(&str, &[&str])] = &[
    ("proto", &["proto"]),
    ("docs", &["md"]),
    ("src", &["json", "txt", "toml"]),
    ("benches", &["py"]),
    ("tests/python", &["py"]),
];

/// Further files with text, and scripts without an extension.
const PAGES: &[&str] = &[
    ".cargo/config.toml",
    ".ci/run",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Cargo.toml",
    "Makefile",
    "README.md",
    "benches/cluster",
    "benches/pairs",
    "benches/report",
    "clippy.toml",
    "deny.toml",
    "tests/fetch-etcd",
    "tools/protoc",
];

/// A line of `names.txt`: a kind, a name, and the files and folders in which the name is given up (none: everywhere).
struct GivenUp<'a> {
    kind: &'a str,
    name: &'a str,
    places: Vec<&'a str>,
}

impl GivenUp<'_> {
    fn holds_in(&self, file: &str) -> bool {
        self.places.is_empty() || self.places.iter().any(|place| is_below(file, place))
    }
}

/// Returns true if `place` is this file, with or without its extension, or a folder above.
fn is_below(file: &str, place: &str) -> bool {
    file.strip_prefix(place).is_some_and(|rest| rest.is_empty() || rest.starts_with(['/', '.']))
}

fn given_up(list: &str) -> Vec<GivenUp<'_>> {
    list.lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(|line| {
            let mut columns = line.split_whitespace();
            let kind = columns.next().expect("a kind");
            assert!(["type", "fn", "value", "file", "text"].contains(&kind), "unknown kind: {line}");
            GivenUp { kind, name: columns.next().expect("a name"), places: columns.collect() }
        })
        .collect()
}

/// Returns true if the text contains this name as a whole. The prefix `strandline_` of a metric and the suffix `_total`
/// of a counter do not count.
fn has_name(text: &str, name: &str) -> bool {
    let is_part = |c: char| c.is_alphanumeric() || "_-".contains(c);
    text.match_indices(name).any(|(at, _)| {
        let (before, after) = (&text[..at], &text[at + name.len()..]);
        let before = before.strip_suffix("strandline_").unwrap_or(before);
        let after = after.strip_prefix("_total").unwrap_or(after);
        !before.ends_with(is_part) && !after.starts_with(is_part)
    })
}

/// Returns each use of a given-up name in the names of these files, in these sources and in these texts, as text.
fn names_used(list: &[GivenUp], files: &[String], sources: &Sources, texts: &[(String, String)]) -> Vec<String> {
    let mut used = Vec::new();
    for file in files {
        let entries = list.iter().filter(|entry| entry.kind == "file" && is_below(file, entry.name));
        used.extend(entries.map(|entry| ("file", entry.name, file, 1)));
    }
    for file in &sources.files {
        for definition in &file.definitions {
            let kinds: &[&str] = match definition.kind {
                Kind::Type => &["type"],
                Kind::Function => &["fn", "value"],
                Kind::Field | Kind::Constant | Kind::Variant => &["value"],
            };
            used.extend(kinds.iter().map(|kind| (*kind, definition.name.as_str(), &file.name, definition.line)));
        }
    }
    for (file, text) in texts {
        for (line, content) in text.lines().enumerate().map(|(index, content)| (index + 1, content)) {
            if file.ends_with(".proto") {
                used.extend(proto_definition(content).map(|(kind, name)| (kind, name, file, line)));
            }
            let entries = list.iter().filter(|entry| entry.kind == "text" && has_name(content, entry.name));
            used.extend(entries.map(|entry| ("text", entry.name, file, line)));
        }
    }
    let is_given_up = |(kind, name, file, _): &(&str, &str, &String, usize)| {
        list.iter().any(|entry| entry.kind == *kind && entry.name == *name && entry.holds_in(file))
    };
    let report = |(kind, name, file, line)| format!("{file}:{line}: the {kind} `{name}` has another name now");
    used.into_iter().filter(is_given_up).map(report).collect()
}

/// Returns each place of the list that is none of these files and no folder above one, as text.
fn missing_places(list: &[GivenUp], files: &[&str]) -> Vec<String> {
    let mut missing = Vec::new();
    for entry in list {
        let unknown = entry.places.iter().filter(|place| !files.iter().any(|file| is_below(file, place)));
        missing.extend(unknown.map(|place| format!("the {} `{}`: {place} does not exist", entry.kind, entry.name)));
    }
    missing
}

/// Returns kind and name of what this line of a .proto file defines.
fn proto_definition(line: &str) -> Option<(&'static str, &str)> {
    let words: Vec<&str> = line.split_whitespace().take_while(|word| !word.starts_with("//")).collect();
    match words[..] {
        ["message" | "enum", name, ..] => Some(("type", name)),
        ["rpc", name, ..] => Some(("fn", name.split('(').next().unwrap_or_default())),
        [_, .., name, "=", _] => Some(("value", name)),
        _ => None,
    }
}

/// Returns each use of a phrase in a text, with its line. Line breaks, comment marks and underscores count as spaces.
fn words_used<'a>(phrases: &[&'a str], text: &str) -> Vec<(usize, &'a str)> {
    let mut by_first: BTreeMap<&str, Vec<&'a str>> = BTreeMap::new();
    for phrase in phrases {
        by_first.entry(phrase.split(' ').next().unwrap_or_default()).or_default().push(phrase);
    }
    let mut words: Vec<(usize, String)> = Vec::new();
    for (line, content) in text.lines().enumerate() {
        let content = content.trim_start().trim_start_matches(['/', '!', '#', '*']).to_lowercase();
        for part in content.split_inclusive(|c: char| !c.is_alphanumeric()) {
            let word = part.trim_end_matches(|c: char| !c.is_alphanumeric());
            // A mark between two words ends a phrase.
            let marks = [word, &part[word.len()..]].into_iter().filter(|mark| !["", "_", " "].contains(mark));
            words.extend(marks.map(|mark| (line + 1, mark.to_owned())));
        }
    }
    let mut found = Vec::new();
    for (at, (line, word)) in words.iter().enumerate() {
        let is_at = |phrase: &&&str| {
            phrase.split(' ').zip(at..).all(|(wanted, at)| words.get(at).is_some_and(|(_, word)| word == wanted))
        };
        let here = by_first.get(word.as_str()).into_iter().flatten().filter(is_at);
        found.extend(here.map(|phrase| (*line, *phrase)));
    }
    found
}

/// Returns name and text of the files of these folders, without the lists of this test.
fn files(folders: &[(&str, &[&str])]) -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let below = |(folder, extensions): &(&str, &[&str])| {
        let files = read_folder(&root.join(folder), extensions);
        files.into_iter().map(|(name, text)| (format!("{folder}/{name}"), text)).collect::<Vec<_>>()
    };
    let own = ["tests/it/names.rs", "tests/it/names.txt", "tests/it/words.txt"];
    folders.iter().flat_map(below).filter(|(name, _)| !own.contains(&name.as_str())).collect()
}

fn code() -> Vec<(String, String)> {
    files(&CODE.iter().map(|folder| (*folder, ["rs"].as_slice())).collect::<Vec<_>>())
}

fn texts() -> Vec<(String, String)> {
    let page = |name: &&str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
        ((*name).to_owned(), fs::read_to_string(path).expect("the page exists"))
    };
    code().into_iter().chain(files(TEXTS)).chain(PAGES.iter().map(page)).collect()
}

/// Returns the names of all files, without those that `.gitignore` names by their path.
fn file_names() -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let ignored = fs::read_to_string(root.join(".gitignore")).expect("the file exists");
    let (mut folders, mut names) = (vec![root.to_owned()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("the folder can be listed") {
            let path = entry.expect("the folder can be listed").path();
            let name = path.strip_prefix(root).expect("below the folder").to_string_lossy().into_owned();
            if name == ".git" || ignored.lines().any(|line| line.strip_prefix('/') == Some(name.as_str())) {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else {
                names.push(name);
            }
        }
    }
    names
}

#[test]
fn given_up_names_are_not_used() {
    // The changelog and the decision records name the past.
    let mut texts = texts();
    texts.retain(|(name, _)| name != "CHANGELOG.md" && !name.starts_with("docs/adr/"));
    let found = names_used(&given_up(include_str!("names.txt")), &file_names(), &Sources::parse(code()), &texts);
    assert!(found.is_empty(), "{} names:\n{}\n", found.len(), found.join("\n"));
}

/// If a file moves, the places of the list that name this file must change too.
#[test]
fn places_of_given_up_names_exist() {
    let files = file_names();
    let files: Vec<&str> = files.iter().map(String::as_str).collect();
    let missing = missing_places(&given_up(include_str!("names.txt")), &files);
    assert!(missing.is_empty(), "{} places:\n{}\n", missing.len(), missing.join("\n"));
}

#[test]
fn given_up_words_are_not_used() {
    let phrases: Vec<&str> = include_str!("words.txt").lines().filter(|line| !line.starts_with('#')).collect();
    let report = |(name, text): &(String, String)| {
        let used = words_used(&phrases, text).into_iter();
        used.map(|(line, phrase)| format!("{name}:{line}: `{phrase}`")).collect::<Vec<_>>()
    };
    let names = file_names().into_iter().map(|name| (name.clone(), name.replace('-', " ")));
    let found: Vec<String> = texts().into_iter().chain(names).flat_map(|text| report(&text)).collect();
    assert!(found.is_empty(), "{} uses:\n{}\n", found.len(), found.join("\n"));
}

#[test]
fn given_up_name_is_found_by_kind_and_place() {
    let list = given_up(
        "type Told\nfn hear\nvalue doubt src/log\nvalue Doubted\nfile src/log/tail\ntext old_rows\n# type Kept\n",
    );
    let used = |file: &str, code: &str| {
        let files = vec![(file.to_owned(), code.to_owned())];
        let sources = Sources::parse(if file.ends_with(".rs") { files.clone() } else { Vec::new() });
        names_used(&list, &[file.to_owned()], &sources, &files)
    };
    for (file, code) in [
        ("src/a.rs", "enum Told {}"),
        ("src/a.rs", "trait Store { fn hear(&self); }"),
        ("src/log/a.rs", "struct A { doubt: u8 }"),
        ("src/log/a.rs", "enum A { B { doubt: u8 } }"),
        ("src/a.rs", "enum A { #[default] Doubted(u8), B }"),
        ("src/a.rs", "fn f() { enum A { B, Doubted = 2 } }"),
        ("src/log/tail.rs", ""),
        ("src/log/tail", ""),
        // A counter in the code, and the same counter in a page and in a test.
        ("src/a.rs", "const A: &str = \"strandline_old_rows\";"),
        ("docs/metrics.md", "| `strandline_old_rows_total` | counter |"),
        ("tests/it/a.rs", "fn f() { metric(\"strandline_old_rows_total{a=\\\"b\\\"}\"); }"),
        ("docs/configuration.md", "| `old_rows` | `1` |"),
        ("proto/log.proto", "message Told {"),
        ("proto/log.proto", "  rpc hear(HearRequest) returns (stream HearResponse);"),
    ] {
        assert_eq!(used(file, code).len(), 1, "{file}: {code}: {:?}", used(file, code));
    }
    for (file, code) in [
        ("src/a.rs", "enum Kept { Told }\nstruct A { hear: u8, doubt: u8 }\nstruct Doubted;\n// Told"),
        ("src/log/tail_cache.rs", ""),
        ("docs/metrics.md", "`strandline_very_old_rows_total` `strandline_old_rows_seconds` `old_rows_totals`"),
    ] {
        assert_eq!(used(file, code), Vec::<String>::new(), "{file}: {code}");
    }
}

#[test]
fn missing_place_is_found() {
    let list = given_up("type Told src/log src/log/tail\nvalue doubt src/lo src/log/tail.rs\nfile src/log/head\n");
    assert_eq!(missing_places(&list, &["src/log/tail.rs"]), ["the value `doubt`: src/lo does not exist"]);
}

#[test]
fn given_up_phrase_is_found_across_line_breaks() {
    let phrases = ["give way", "anew"];
    assert_eq!(words_used(&phrases, "/// They give\n/// way. Anew!"), [(1, "give way"), (2, "anew")]);
    assert_eq!(words_used(&phrases, "fn give_way() {}"), [(1, "give way")]);
    assert_eq!(words_used(&phrases, "give. way, a renewed gateway"), []);
}
