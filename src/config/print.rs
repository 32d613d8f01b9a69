//! Prints the effective configuration as a file, and `docs/configuration.md`.

use std::fmt::Write as _;

use super::{
    LoadedConfig, ValueSource,
    build::PEER_PORT,
    memory::default_share,
    setting::{SECTIONS, SETTINGS, Setting, TOPIC_DEFAULTS, ValueKind, variable},
    value::{masked, urls},
};
use crate::model::TOPIC_CONFIG_KEYS;

impl LoadedConfig {
    /// Returns a configuration file of all settings, each with its effective value and its source. Passwords in URLs
    /// are masked.
    pub fn print(&self) -> String {
        let mut out = String::new();
        for (section, about) in SECTIONS {
            let _ = match *section {
                "" => writeln!(out, "# {about}"),
                section => writeln!(out, "\n# {about}\n[{section}]"),
            };
            for setting in SETTINGS.iter().filter(|setting| setting.section == *section) {
                let _ = match self.values().set.get(&setting.key()) {
                    Some(given) => {
                        let line = format!("{} = {}", setting.name, literal(setting.kind, &given.text));
                        writeln!(out, "{line:<50} # {}", short(&given.source))
                    }
                    None => writeln!(out, "{:<50} # unset", format!("# {} =", setting.name)),
                };
            }
        }
        let _ = writeln!(out, "\n# What topics take that do not set it themselves.\n[{TOPIC_DEFAULTS}]");
        for key in TOPIC_CONFIG_KEYS {
            let (text, source) = match self.values().topic.get(key.name) {
                Some(given) => (given.text.as_str(), short(&given.source)),
                None => (key.default, "default".to_owned()),
            };
            let line = format!("{} = {}", quoted(key.name), quoted(text));
            let _ = writeln!(out, "{line:<50} # {source}");
        }
        out
    }
}

fn short(source: &ValueSource) -> String {
    match source {
        ValueSource::Default => "default".to_owned(),
        ValueSource::File { .. } => format!("file {source}"),
        ValueSource::Environment { name } => format!("env {name}"),
        ValueSource::Flag { .. } => "flag".to_owned(),
    }
}

fn literal(kind: ValueKind, text: &str) -> String {
    match kind {
        ValueKind::Urls => {
            let urls: Vec<_> = urls(&masked(text)).iter().map(|url| quoted(url)).collect();
            format!("[{}]", urls.join(", "))
        }
        // The environment accepts spellings that TOML rejects, such as `007`.
        ValueKind::Number { .. } => text.parse::<u64>().map_or_else(|_| text.to_owned(), |number| number.to_string()),
        kind if kind.quoted() => quoted(&masked(text)),
        _ => text.to_owned(),
    }
}

fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// Returns the content of `docs/configuration.md`.
pub fn docs() -> String {
    let mut out = String::from(HEAD);
    for (section, about) in SECTIONS {
        let title = if section.is_empty() { "Top of the file".to_owned() } else { format!("`[{section}]`") };
        let _ =
            write!(out, "\n## {title}\n\n{about}\n\n| key | default | environment | |\n| --- | --- | --- | --- |\n");
        for setting in SETTINGS.iter().filter(|setting| setting.section == *section) {
            let _ = writeln!(out, "{}", row(setting));
        }
    }
    let _ = write!(
        out,
        "\n## `[{TOPIC_DEFAULTS}]`\n\nWhat topics take that do not set it themselves: any topic configuration. The names hold \
         dots, so the file quotes them: `\"segment.bytes\" = 67108864`. The environment form of all of them is \
         `{}`, a list like `segment.bytes=1048576,retention.ms=-1`.\n\n| key | default | allowed | |\n| --- | --- | --- | --- |\n",
        variable(TOPIC_DEFAULTS)
    );
    for key in TOPIC_CONFIG_KEYS {
        let _ = writeln!(out, "| `{}` | `{}` | {} | {} |", key.name, key.default, key.allowed, key.doc);
    }
    out
}

fn row(setting: &Setting) -> String {
    let default = match setting.default {
        Some(default) => format!("`{default}`"),
        None => default_words(&setting.key()).unwrap_or_else(|| "unset".to_owned()),
    };
    let doc = format!("{} Takes {}.", setting.doc, setting.kind.allowed());
    format!("| `{}` | {default} | `{}` | {} |", setting.name, setting.variable(), doc.replace('|', "\\|"))
}

/// Describes a default that depends on other settings or on the machine.
pub(super) fn default_words(key: &str) -> Option<String> {
    match key {
        "peer.listen" => Some(format!("the IP address of `grpc.listen`, port {PEER_PORT}")),
        key => default_share(key),
    }
}

const HEAD: &str = "\
# Configuration

<!-- Made from src/config/setting.rs: `strandline config print --docs > docs/configuration.md`. A test compares them. -->

`strandline broker --config FILE` reads a TOML file. Every setting has an environment variable too, which wins over the \
file; a flag of the command line wins over both. An environment variable that is set and empty counts as not set. \
Settings that do not exist, and values that are not allowed, are errors that name the place; so is a variable that begins \
with `STRANDLINE_` and names no setting. `--set KEY=VALUE` sets any, a topic default as `topic_defaults.retention.ms`. \
`strandline config print` prints what is in effect, and where each value comes from.

Sizes are bytes, or text with `KiB`, `MiB`, `GiB` or `TiB`. Times are text with their unit: `500ms`, `30s`, `5m`, `1h`, \
`7d`.
";
