//! Output of results: tables for people, JSON for programs.

use std::io::{self, IsTerminal as _, Write as _};

use comfy_table::{CellAlignment, Table, presets};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

pub(super) use crate::model::format_ids;

/// Format of printed results.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum OutputFormat {
    /// Tables and sentences
    Text,
    /// One JSON value; for records and batches, one per line
    Json,
}

/// Prints a value as JSON on one line.
pub(super) fn json(value: &serde_json::Value) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{value}")?;
    out.flush()
}

/// Prints a line.
pub(super) fn line(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}")?;
    out.flush()
}

/// Prints rows under a header, without borders, so that `awk` and `grep` can process the rows. `right` lists the
/// columns with numbers, which are right-aligned.
pub(super) fn table(header: &[&str], right: &[usize], rows: Vec<Vec<String>>) -> io::Result<()> {
    line(&tabled(header, right, rows))
}

/// Returns the lines that [`table`] prints.
pub(super) fn tabled(header: &[&str], right: &[usize], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header.to_vec());
    table.add_rows(rows);
    for index in 0..header.len() {
        if let Some(column) = table.column_mut(index) {
            column.set_padding((0, 2));
            if right.contains(&index) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
    }
    table.trim_fmt()
}

/// Returns a progress bar on standard error. The bar is hidden without a terminal or with `NO_COLOR`.
pub(super) fn progress(length: Option<u64>, template: &'static str) -> ProgressBar {
    let is_terminal = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let target = if is_terminal { ProgressDrawTarget::stderr_with_hz(5) } else { ProgressDrawTarget::hidden() };
    let bar = ProgressBar::with_draw_target(length, target);
    bar.set_style(ProgressStyle::with_template(template).expect("the template is a constant"));
    bar
}

/// Formats a number with its noun: `1 partition`, `2 partitions`.
pub(super) fn count(number: u64, noun: &str) -> String {
    if number == 1 { format!("1 {noun}") } else { format!("{number} {noun}s") }
}

/// Formats a number of bytes for people.
pub(super) fn bytes(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

/// Comparison of output with golden files. `GOLDEN=write cargo test` rewrites the files; their changes must be reviewed
/// before a commit.
#[cfg(test)]
pub(super) mod golden {
    use std::{
        collections::BTreeSet,
        fs,
        path::{Path, PathBuf},
    };

    use serde_json::Value;

    /// Maximum width of a text line in characters, without the texts that brokers sent.
    const WIDTH: usize = 100;

    fn path(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cli/golden").join(name)
    }

    /// Returns the content of a golden file. With `GOLDEN=write`, first writes `shown` to the file.
    fn text(name: &str, shown: &str) -> String {
        let path = path(name);
        if std::env::var("GOLDEN").as_deref() == Ok("write") {
            fs::write(&path, shown).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        }
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    /// Asserts that JSON output equals its golden file, because programs rely on its fields. Each field must be a field
    /// of one of these messages of `admin.proto`, or be one of `computed`, whose values the command line determines.
    pub(in crate::cli) fn json(name: &str, value: &Value, messages: &[&str], computed: &[&str]) {
        let shown = serde_json::to_string_pretty(value).expect("JSON") + "\n";
        assert_eq!(text(name, &shown), shown, "{name}");
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto/strandline/v1/admin.proto");
        let proto = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let known = message_fields(&proto, messages);
        let mut unknown = BTreeSet::new();
        add_fields(value, &mut unknown);
        unknown.retain(|field| !known.contains(field) && !computed.contains(field));
        assert!(unknown.is_empty(), "{name}: no field of {messages:?} has the name {unknown:?}");
    }

    /// Returns the names of the fields of these messages.
    fn message_fields<'a>(proto: &'a str, messages: &[&str]) -> BTreeSet<&'a str> {
        let (mut fields, mut is_inside) = (BTreeSet::new(), false);
        for line in proto.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[..] {
                ["message", name, ..] => is_inside = messages.contains(&name),
                ["//", ..] => {}
                [_, .., name, "=", _] if is_inside => {
                    fields.insert(name);
                }
                _ => {}
            }
        }
        fields
    }

    /// Adds the names of all fields of a JSON value, except the keys of a topic's configuration.
    fn add_fields<'a>(value: &'a Value, names: &mut BTreeSet<&'a str>) {
        match value {
            Value::Object(fields) => {
                for (name, value) in fields {
                    names.insert(name);
                    if !["config", "effective_config", "config_source"].contains(&name.as_str()) {
                        add_fields(value, names);
                    }
                }
            }
            Value::Array(items) => items.iter().for_each(|item| add_fields(item, names)),
            _ => {}
        }
    }

    /// Asserts that text output equals its golden file and is at most `WIDTH` wide.
    pub(in crate::cli) fn lines(name: &str, output: &str) {
        lines_with_texts(name, output, &[]);
    }

    /// Asserts that text output equals its golden file. Asserts that it is at most `WIDTH` wide without `broker_texts`,
    /// which brokers sent and whose width has no maximum.
    pub(in crate::cli) fn lines_with_texts(name: &str, output: &str, broker_texts: &[String]) {
        for line in output.lines() {
            let own = broker_texts.iter().fold(line.to_owned(), |own, text| own.replace(text.as_str(), ""));
            let width = own.chars().count();
            assert!(width <= WIDTH, "{width} columns: {line}");
        }
        let shown = format!("{}\n", output.trim_end());
        assert_eq!(text(name, &shown), shown, "{name}");
    }
}
