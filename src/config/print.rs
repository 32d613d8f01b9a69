//! Prints the effective configuration as a file, and `docs/configuration.md`.

use std::fmt::Write as _;

use super::{
    LoadedConfig,
    error::ValueSource,
    settings::{SECTIONS, Setting, TOPIC_DEFAULTS, variable},
    value::quote,
};
use crate::model::TOPIC_CONFIG_KEYS;

impl LoadedConfig {
    /// Returns a configuration file of all settings and topic defaults, each with its effective value and its source. A
    /// setting without a value is a comment. Passwords in URLs are masked.
    pub fn print(&self) -> String {
        let mut out = String::new();
        for section in SECTIONS {
            let _ = match section.name {
                "" => writeln!(out, "# {}", section.doc),
                name => writeln!(out, "\n# {}\n[{name}]", section.doc),
            };
            for setting in section.settings {
                let (line, source) = match self.values.get(setting.key) {
                    Some(value) => (
                        format!("{} = {}", setting.name(), setting.kind.to_toml(&value.text)),
                        source_comment(&value.source),
                    ),
                    None => (format!("# {} =", setting.name()), "unset".to_owned()),
                };
                let _ = writeln!(out, "{line:<50} # {source}");
            }
        }
        let _ = writeln!(out, "\n# Topic configuration of topics that do not set it themselves.\n[{TOPIC_DEFAULTS}]");
        for key in TOPIC_CONFIG_KEYS {
            let (text, source) = match self.values.topic.get(key.name) {
                Some(value) => (value.text.as_str(), source_comment(&value.source)),
                None => (key.default, "default".to_owned()),
            };
            let line = format!("{} = {}", quote(key.name), quote(text));
            let _ = writeln!(out, "{line:<50} # {source}");
        }
        out
    }
}

/// Returns the source of a value as text for the comment at the end of its line.
fn source_comment(source: &ValueSource) -> String {
    match source {
        ValueSource::Default => "default".to_owned(),
        ValueSource::File { .. } => format!("file {source}"),
        ValueSource::Environment { name } => format!("env {name}"),
        ValueSource::Flag { .. } => "flag".to_owned(),
    }
}

/// Returns the content of `docs/configuration.md`.
pub fn docs() -> String {
    let mut out = String::from(HEAD);
    for section in SECTIONS {
        let title =
            if section.name.is_empty() { "Top of the file".to_owned() } else { format!("`[{}]`", section.name) };
        let head = "| key | default | environment | |\n| --- | --- | --- | --- |";
        let _ = writeln!(out, "\n## {title}\n\n{}\n\n{head}", section.doc);
        for setting in section.settings {
            let _ = writeln!(out, "{}", row(setting));
        }
    }
    let _ = write!(
        out,
        "\n## `[{TOPIC_DEFAULTS}]`\n\n\
         Topic configuration of topics that do not set it themselves. The keys contain dots, so the file quotes them: \
         `\"segment.bytes\" = 67108864`. The environment variable of the section is `{}`, a list like \
         `segment.bytes=1048576,retention.ms=-1`.\n\n\
         | key | default | allowed | |\n| --- | --- | --- | --- |\n",
        variable(TOPIC_DEFAULTS)
    );
    for key in TOPIC_CONFIG_KEYS {
        let _ = writeln!(out, "| `{}` | `{}` | {} | {} |", key.name, key.default, key.allowed, key.doc);
    }
    out
}

/// Returns the row of a setting for the table of its section in `docs/configuration.md`.
fn row(setting: &Setting) -> String {
    let doc = format!("{} Takes {}.", setting.doc, setting.kind.describe()).replace('|', "\\|");
    format!("| `{}` | {} | `{}` | {doc} |", setting.name(), setting.default.describe(), setting.variable())
}

const HEAD: &str = "\
# Configuration

<!-- Generated from src/config/settings.rs; a test compares them and names the command that generates it. -->

`strandline broker --config FILE` reads a TOML file. Every setting also has an environment variable, which has \
precedence over the file. A flag of the command line has precedence over both. An environment variable that is set and \
empty counts as not set. A setting that does not exist, and a value that is not allowed, are errors that name the \
line, variable or flag. A variable that begins with `STRANDLINE_` and names no setting is an error too, except \
`STRANDLINE_BOOTSTRAP` and `STRANDLINE_RACK` of the client commands, and the variables that Kubernetes sets for a \
service. `--set KEY=VALUE` sets any setting, and a topic default as `topic_defaults.retention.ms`. `strandline config \
print --config FILE` prints the values of the file, the environment and the defaults, with their sources.

Sizes are bytes, or text with `KiB`, `MiB`, `GiB` or `TiB`. Times are text with their unit: `500ms`, `30s`, `5m`, \
`1h`, `7d`. The [glossary](glossary.md) defines the terms.
";
