//! Layers of a configuration: defaults, file, environment, command line. A later layer overrides an earlier one.
//!
//! [`ResolvedValues`] checks each value by itself when a layer sets it. `LoadedConfig` then checks the values against
//! each other.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use toml::de::{DeTable, DeValue};

use super::{
    LoadedConfig,
    error::{ConfigError, ConfigErrors, ValueSource},
    settings::{self, DefaultValue, SECTIONS, Setting, TOPIC_DEFAULTS, variable},
    suggest::closest_names,
    value::{format_toml, mask_passwords},
};
use crate::model::{ConfigMap, TOPIC_CONFIG_KEYS};

/// Prefix of Strandline's environment variables.
const PREFIX: &str = "STRANDLINE_";

/// Variables with the prefix that are not settings: the client commands read them.
const CLIENT_VARIABLES: [&str; 2] = ["STRANDLINE_BOOTSTRAP", "STRANDLINE_RACK"];

/// Maximum length, in characters, of an invalid value in a message.
const MAX_SHOWN_CHARS: usize = 200;

/// Sources of a configuration. After all sources are collected, [`ConfigSources::load`] checks them together.
#[derive(Clone, Debug, Default)]
pub struct ConfigSources {
    file: Option<(PathBuf, String)>,
    environment: Vec<(String, String)>,
    flags: Vec<(String, String)>,
    /// Values that replace built-in defaults, by key.
    defaults: Vec<(String, String)>,
}

impl ConfigSources {
    /// Creates sources with the built-in defaults only.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the text of a file. The path is only used in messages.
    #[must_use]
    pub fn file(mut self, path: &Path, text: impl Into<String>) -> Self {
        self.file = Some((path.to_owned(), text.into()));
        self
    }

    /// Reads a file and adds its text.
    pub fn read_file(self, path: &Path) -> Result<Self, ConfigError> {
        match fs::read_to_string(path) {
            Ok(text) => Ok(self.file(path, text)),
            Err(source) => Err(ConfigError::Unreadable { path: path.to_owned(), source }),
        }
    }

    /// Adds the variables that begin with `STRANDLINE_`. An empty variable counts as not set.
    #[must_use]
    pub fn environment(mut self, variables: impl IntoIterator<Item = (String, String)>) -> Self {
        let is_ours = |(name, text): &(String, String)| name.starts_with(PREFIX) && !text.is_empty();
        self.environment.extend(variables.into_iter().filter(is_ours));
        self
    }

    /// Returns an error for each set variable that begins with `STRANDLINE_` and is neither a setting nor a variable of
    /// the client commands or Kubernetes. The program calls this before it runs any command. Values are not checked.
    pub fn check_names(variables: impl IntoIterator<Item = (String, String)>) -> Result<(), ConfigErrors> {
        let mut values = ResolvedValues::default();
        for (name, text) in Self::new().environment(variables).environment {
            if setting_of_variable(&name).is_none() {
                values.reject_variable(&name, &text);
            }
        }
        if values.errors.is_empty() { Ok(()) } else { Err(ConfigErrors(values.errors)) }
    }

    /// Adds a value of the command line. `topic_defaults` accepts a list `key=value,key=value`, and
    /// `topic_defaults.segment.bytes` one value.
    #[must_use]
    pub fn flag(mut self, key: &str, text: impl Into<String>) -> Self {
        self.flags.push((key.to_owned(), text.into()));
        self
    }

    /// Replaces a built-in default, as `strandline dev` does.
    #[must_use]
    pub fn with_default(mut self, key: &str, text: impl Into<String>) -> Self {
        self.defaults.push((key.to_owned(), text.into()));
        self
    }

    /// Layers and checks all values. Returns the configuration, or all errors.
    pub fn load(self) -> Result<LoadedConfig, ConfigErrors> {
        let mut values = ResolvedValues::default();
        for setting in settings::all() {
            if let DefaultValue::Fixed(text) = setting.default {
                values.set_default(setting, text.to_owned());
            }
        }
        for (key, text) in self.defaults {
            values.set(&key, text, ValueSource::Default);
        }
        if let Some((path, text)) = &self.file {
            values.read_file(path, text);
        }
        for (name, text) in self.environment {
            match setting_of_variable(&name) {
                Some(key) => values.set(key, text, ValueSource::Environment { name }),
                None => values.reject_variable(&name, &text),
            }
        }
        for (key, text) in self.flags {
            values.set(&key, text, ValueSource::Flag { key: key.clone() });
        }
        LoadedConfig::build(values)
    }
}

/// One value with its source.
#[derive(Clone, Debug)]
pub(super) struct ProvidedValue {
    pub(super) text: String,
    pub(super) source: ValueSource,
}

/// Values after layering.
#[derive(Debug, Default)]
pub(super) struct ResolvedValues {
    /// Values by key of the setting.
    settings: BTreeMap<&'static str, ProvidedValue>,
    /// Values by topic configuration key.
    pub(super) topic: BTreeMap<String, ProvidedValue>,
    /// Errors found so far.
    pub(super) errors: Vec<ConfigError>,
}

impl ResolvedValues {
    /// Returns the value of a setting; `None` if it is unset.
    pub(super) fn get(&self, key: &str) -> Option<&ProvidedValue> {
        self.settings.get(key)
    }

    /// Returns the text of a setting; `None` if it is unset.
    pub(super) fn text(&self, key: &str) -> Option<&str> {
        self.get(key).map(|value| value.text.as_str())
    }

    pub(super) fn source(&self, key: &str) -> ValueSource {
        self.get(key).map_or(ValueSource::Default, |value| value.source.clone())
    }

    pub(super) fn topic_defaults(&self) -> ConfigMap {
        self.topic.iter().map(|(key, value)| (key.clone(), value.text.clone())).collect()
    }

    /// Sets the default of a setting. Has no effect if the setting already has a value.
    pub(super) fn set_default(&mut self, setting: &Setting, text: String) {
        let default = || ProvidedValue { text, source: ValueSource::Default };
        self.settings.entry(setting.key).or_insert_with(default);
    }

    /// Adds an error about the value of a setting, with the source of the value.
    pub(super) fn reject(&mut self, key: &str, reason: String) {
        self.errors.push(ConfigError::Invalid { origin: self.source(key), reason });
    }

    /// Adds the error that a setting does not accept its value. `allowed` describes the accepted values.
    pub(super) fn reject_value(&mut self, key: &str, allowed: impl Into<String>) {
        let (text, origin) = (self.text(key).unwrap_or_default().to_owned(), self.source(key));
        self.reject_text(key, &text, allowed, origin);
    }

    /// Adds the error that a key does not accept a text. The text in the message is truncated, and its passwords are
    /// masked.
    fn reject_text(&mut self, key: &str, text: &str, allowed: impl Into<String>, origin: ValueSource) {
        let value = mask_passwords(text).chars().take(MAX_SHOWN_CHARS).collect();
        self.errors.push(ConfigError::Value { origin, key: key.to_owned(), value, allowed: allowed.into() });
    }

    /// Adds the error that a key does not exist. `near` is the key to suggest.
    fn reject_key(&mut self, key: &str, near: Option<String>, origin: ValueSource) {
        self.errors.push(ConfigError::Unknown { origin, key: key.to_owned(), near });
    }

    /// Adds the error that a variable is no setting. Has no effect for a variable of the client commands or Kubernetes.
    fn reject_variable(&mut self, name: &str, text: &str) {
        if CLIENT_VARIABLES.contains(&name) || is_from_kubernetes(name, text) {
            return;
        }
        let known = settings::all().map(Setting::variable).chain([variable(TOPIC_DEFAULTS)]);
        let known = known.chain(CLIENT_VARIABLES.iter().map(|name| (*name).to_owned()));
        // The common prefix would make all names similar.
        let without_prefix = |name: &str| name.strip_prefix(PREFIX).unwrap_or(name).to_owned();
        let near = closest_suggestion(&without_prefix(name), known.map(|name| (without_prefix(&name), name)));
        self.reject_key(name, near, ValueSource::Environment { name: name.to_owned() });
    }

    /// Sets one value of a layer, or adds an error if the key does not exist or does not accept the text.
    fn set(&mut self, key: &str, text: String, source: ValueSource) {
        if key == TOPIC_DEFAULTS {
            return self.set_topic_list(&text, &source);
        }
        if let Some(key) = key.strip_prefix(TOPIC_DEFAULTS).and_then(|key| key.strip_prefix('.')) {
            return self.set_topic(key, text, source);
        }
        let Some(setting) = Setting::find(key) else { return self.reject_key(key, closest_setting(key), source) };
        if setting.kind.accepts(&text) {
            self.settings.insert(setting.key, ProvidedValue { text, source });
        } else {
            self.reject_text(key, &text, setting.kind.describe(), source);
        }
    }

    /// Sets one topic configuration key, or adds an error if the key does not exist. `ResolvedValues::check` later
    /// checks the values of all topic configuration keys together.
    fn set_topic(&mut self, key: &str, text: String, source: ValueSource) {
        if TOPIC_CONFIG_KEYS.iter().any(|known| known.name == key) {
            self.topic.insert(key.to_owned(), ProvidedValue { text, source });
        } else {
            let near = closest_suggestion(
                key,
                TOPIC_CONFIG_KEYS.iter().map(|known| (known.name.to_owned(), known.name.to_owned())),
            );
            self.reject_key(&format!("{TOPIC_DEFAULTS}.{key}"), near, source);
        }
    }

    /// Sets topic configuration from a list `key=value,key=value`. Adds an error for each invalid part and continues.
    fn set_topic_list(&mut self, text: &str, source: &ValueSource) {
        for pair in text.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
            match pair.split_once('=') {
                Some((key, value)) => self.set_topic(key.trim(), value.trim().to_owned(), source.clone()),
                None => {
                    let allowed = "topic configuration as key=value,key=value";
                    self.reject_text(TOPIC_DEFAULTS, pair, allowed, source.clone());
                }
            }
        }
    }

    /// Sets the values of a file, and adds an error for each invalid entry. A table at the top is a section, and any
    /// other value at the top is a setting without a section.
    fn read_file(&mut self, path: &Path, text: &str) {
        let source_at = |offset: usize| file_source(path, text, offset);
        let table = match DeTable::parse(text) {
            Ok(table) => table.into_inner(),
            Err(error) => {
                let origin = source_at(error.span().map_or(0, |span| span.start));
                return self.errors.push(ConfigError::Invalid { origin, reason: error.message().to_owned() });
            }
        };
        for (name, value) in &table {
            let (section, source) = (name.get_ref().as_ref(), source_at(name.span().start));
            match value.get_ref() {
                DeValue::Table(entries) if section == TOPIC_DEFAULTS => self.read_topics("", entries, &source_at),
                DeValue::Table(entries) if SECTIONS.iter().any(|known| known.name == section) => {
                    for (name, value) in entries {
                        let key = format!("{section}.{}", name.get_ref());
                        self.read_entry(&key, value.get_ref(), source_at(name.span().start));
                    }
                }
                DeValue::Table(_) => {
                    let known = SECTIONS.iter().map(|known| known.name).chain([TOPIC_DEFAULTS]);
                    let near = closest_suggestion(section, known.map(|known| (known.to_owned(), format!("[{known}]"))));
                    self.reject_key(&format!("[{section}]"), near, source);
                }
                value => self.read_entry(section, value, source),
            }
        }
    }

    /// Sets the value of one entry of a file, or adds an error if its key, type or value is invalid.
    fn read_entry(&mut self, key: &str, value: &DeValue<'_>, source: ValueSource) {
        let Some(setting) = Setting::find(key) else { return self.reject_key(key, closest_setting(key), source) };
        match setting.kind.text_of(value) {
            Some(text) => self.set(key, text, source),
            None => self.reject_text(key, &format_toml(value), setting.kind.describe(), source),
        }
    }

    /// Sets topic configuration from a table. Topic configuration keys contain dots: in TOML, a quoted key is one key,
    /// and a bare key means nested tables. `prefix` is the key of a nested table with a dot at its end, and empty for
    /// the section. `source_at` returns the source of an entry that starts at a byte offset of the file.
    fn read_topics(&mut self, prefix: &str, entries: &DeTable<'_>, source_at: &impl Fn(usize) -> ValueSource) {
        for (name, value) in entries {
            let key = format!("{prefix}{}", name.get_ref());
            let source = source_at(name.span().start);
            match value.get_ref() {
                DeValue::Table(inner) => self.read_topics(&format!("{key}."), inner, source_at),
                value @ (DeValue::String(_) | DeValue::Integer(_) | DeValue::Boolean(_)) => {
                    self.set_topic(&key, format_toml(value), source);
                }
                value => {
                    let key = format!("{TOPIC_DEFAULTS}.{key}");
                    self.reject_text(&key, &format_toml(value), "a text, a number, true or false", source);
                }
            }
        }
    }
}

/// Returns the source of an entry that starts at the byte `offset` of a file with this text.
fn file_source(path: &Path, text: &str, offset: usize) -> ValueSource {
    let before = &text[..text.floor_char_boundary(offset)];
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    let line = before.bytes().filter(|byte| *byte == b'\n').count() + 1;
    ValueSource::File { path: path.to_owned(), line, column: before[line_start..].chars().count() + 1 }
}

/// Returns the key of the setting whose name is most similar to that of `key`; `None` if no name is similar. Only the
/// names without their sections are compared, so a correct name in a wrong section is found.
fn closest_setting(key: &str) -> Option<String> {
    let (section, name) = key.rsplit_once('.').unwrap_or(("", key));
    let near = closest_names(name, settings::all(), |setting| setting.name(), usize::MAX);
    // Several sections may have a setting of the most similar name. The section of `key` takes precedence, then the
    // first declared setting.
    let best = near.first()?.name();
    let same_name = || near.iter().filter(|setting| setting.name() == best);
    let in_section = same_name().find(|setting| setting.section() == section);
    in_section.or_else(|| same_name().next()).map(|setting| setting.key.to_owned())
}

/// Returns the name to suggest for a misspelled text; `None` if no name is similar. Each candidate is the text to
/// compare and the name to suggest.
fn closest_suggestion(text: &str, candidates: impl IntoIterator<Item = (String, String)>) -> Option<String> {
    closest_names(text, candidates, |(compared, _)| compared, 1).pop().map(|(_, suggested)| suggested)
}

/// Returns the key that an environment variable sets; `None` if the variable is no setting.
fn setting_of_variable(name: &str) -> Option<&'static str> {
    settings::all().map(|setting| setting.key).chain([TOPIC_DEFAULTS]).find(|key| variable(key) == name)
}

/// Returns true if the variable has a form that Kubernetes sets, for a service whose name begins with `strandline`.
fn is_from_kubernetes(name: &str, text: &str) -> bool {
    let is_port_url = name.ends_with("_PORT") && text.contains("://");
    // For example `STRANDLINE_PORT_9460_TCP_ADDR`.
    let is_port_detail =
        name.split_once("_PORT_").is_some_and(|(_, number)| number.starts_with(|c: char| c.is_ascii_digit()));
    name.ends_with("_SERVICE_HOST") || name.contains("_SERVICE_PORT") || is_port_url || is_port_detail
}
