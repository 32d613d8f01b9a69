//! Layers of a configuration: defaults, file, environment, command line. A later layer overrides an earlier one.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use toml::de::{DeTable, DeValue};

use super::{
    LoadedConfig,
    error::{ConfigError, ConfigErrors, ValueSource},
    setting::{SECTIONS, SETTINGS, Setting, TOPIC_DEFAULTS, ValueKind, variable},
    value::{masked, valid},
};
use crate::model::{TOPIC_CONFIG_KEYS, near};

/// Prefix of Strandline's environment variables.
const PREFIX: &str = "STRANDLINE_";

/// Variables with the prefix that are not settings: the client commands read them.
const CLIENT_VARIABLES: [&str; 2] = ["STRANDLINE_BOOTSTRAP", "STRANDLINE_RACK"];

/// Sources of a configuration. After all sources are collected, [`ConfigSources::load`] checks them together.
#[derive(Clone, Debug, Default)]
pub struct ConfigSources {
    file: Option<(PathBuf, String)>,
    environment: Vec<(String, String)>,
    flags: Vec<(String, String)>,
    defaults: Vec<(String, String)>,
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
    pub(super) set: BTreeMap<String, ProvidedValue>,
    /// Values by topic configuration key.
    pub(super) topic: BTreeMap<String, ProvidedValue>,
    /// Errors found so far.
    pub(super) errors: Vec<ConfigError>,
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
        let ours = |(name, text): &(String, String)| name.starts_with(PREFIX) && !text.is_empty();
        self.environment.extend(variables.into_iter().filter(ours));
        self
    }

    /// Checks the names of the variables that begin with `STRANDLINE_`, for any command. Their values are not checked.
    pub fn check_names(variables: impl IntoIterator<Item = (String, String)>) -> Result<(), ConfigErrors> {
        let mut values = ResolvedValues::default();
        for (name, _) in
            Self::new().environment(variables).environment.iter().filter(|(name, text)| !is_known(name, text))
        {
            values.unknown_variable(name);
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

    /// Layers and checks all values. Returns the settings, or all errors.
    pub fn load(self) -> Result<LoadedConfig, ConfigErrors> {
        let mut values = ResolvedValues::default();
        for setting in SETTINGS {
            if let Some(default) = setting.default {
                values.give(&setting.key(), default.to_owned(), ValueSource::Default);
            }
        }
        for (key, text) in self.defaults {
            values.give(&key, text, ValueSource::Default);
        }
        if let Some((path, text)) = &self.file {
            values.read(path, text);
        }
        for (name, text) in self.environment {
            values.variable(name, text);
        }
        for (key, text) in self.flags {
            values.give(&key, text, ValueSource::Flag { key: key.clone() });
        }
        LoadedConfig::build(values)
    }
}

impl ResolvedValues {
    fn give(&mut self, key: &str, text: String, source: ValueSource) {
        if key == TOPIC_DEFAULTS {
            return self.topic_list(&text, &source);
        }
        if let Some(key) = key.strip_prefix(TOPIC_DEFAULTS).and_then(|key| key.strip_prefix('.')) {
            return self.topic(key, text, source);
        }
        let Some(setting) = Setting::find(key) else { return self.unknown(key, source) };
        if valid(setting.kind, &text) {
            self.set.insert(key.to_owned(), ProvidedValue { text, source });
        } else {
            self.invalid(key, &text, setting.kind, source);
        }
    }

    fn invalid(&mut self, key: &str, text: &str, kind: ValueKind, place: ValueSource) {
        let value = masked(text).chars().take(200).collect();
        self.errors.push(ConfigError::Value { place, key: key.to_owned(), value, allowed: kind.allowed() });
    }

    fn unknown(&mut self, key: &str, place: ValueSource) {
        let near = nearest(key);
        self.errors.push(ConfigError::Unknown { place, key: key.to_owned(), near });
    }

    fn topic(&mut self, key: &str, text: String, source: ValueSource) {
        if TOPIC_CONFIG_KEYS.iter().any(|known| known.name == key) {
            self.topic.insert(key.to_owned(), ProvidedValue { text, source });
        } else {
            let near = best(key, TOPIC_CONFIG_KEYS.iter().map(|known| (known.name.to_owned(), known.name.to_owned())));
            let key = format!("{TOPIC_DEFAULTS}.{key}");
            self.errors.push(ConfigError::Unknown { place: source, key, near });
        }
    }

    fn topic_list(&mut self, text: &str, source: &ValueSource) {
        for pair in text.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
            match pair.split_once('=') {
                Some((key, value)) => self.topic(key.trim(), value.trim().to_owned(), source.clone()),
                None => {
                    let allowed = "topic configuration as key=value,key=value".to_owned();
                    let (place, key) = (source.clone(), TOPIC_DEFAULTS.to_owned());
                    self.errors.push(ConfigError::Value { place, key, value: pair.to_owned(), allowed });
                }
            }
        }
    }

    fn variable(&mut self, name: String, text: String) {
        let source = ValueSource::Environment { name: name.clone() };
        if name == variable(TOPIC_DEFAULTS) {
            return self.topic_list(&text, &source);
        }
        if let Some(setting) = SETTINGS.iter().find(|setting| setting.variable() == name) {
            return self.give(&setting.key(), text, source);
        }
        if !is_known(&name, &text) {
            self.unknown_variable(&name);
        }
    }

    fn unknown_variable(&mut self, name: &str) {
        let known = SETTINGS.iter().map(Setting::variable).chain([variable(TOPIC_DEFAULTS)]);
        let known = known.chain(CLIENT_VARIABLES.iter().map(|other| (*other).to_owned()));
        // The common prefix would make all names similar.
        let rest = |name: &str| name.strip_prefix(PREFIX).unwrap_or(name).to_owned();
        let candidates: Vec<_> = known.map(|name| (rest(&name), name)).collect();
        let near = best(&rest(name), candidates);
        let place = ValueSource::Environment { name: name.to_owned() };
        self.errors.push(ConfigError::Unknown { place, key: name.to_owned(), near });
    }

    fn read(&mut self, path: &Path, text: &str) {
        let place = |offset: usize| place(path, text, offset);
        let table = match DeTable::parse(text) {
            Ok(table) => table.into_inner(),
            Err(error) => {
                let place = place(error.span().map_or(0, |span| span.start));
                return self.errors.push(ConfigError::Syntax { place, reason: error.message().to_owned() });
            }
        };
        for (name, value) in &table {
            let (section, at) = (name.get_ref().as_ref(), place(name.span().start));
            match value.get_ref() {
                DeValue::Table(entries) if section == TOPIC_DEFAULTS => self.topics("", entries, &place),
                DeValue::Table(entries) if SECTIONS.iter().any(|(known, _)| *known == section) => {
                    for (name, value) in entries {
                        let key = format!("{section}.{}", name.get_ref());
                        self.entry(&key, value.get_ref(), place(name.span().start));
                    }
                }
                DeValue::Table(_) => {
                    let known = SECTIONS.iter().map(|(known, _)| *known).chain([TOPIC_DEFAULTS]);
                    let near = best(section, known.map(|known| (known.to_owned(), format!("[{known}]"))));
                    self.errors.push(ConfigError::Unknown { place: at, key: format!("[{section}]"), near });
                }
                value => self.entry(section, value, at),
            }
        }
    }

    fn entry(&mut self, key: &str, value: &DeValue<'_>, source: ValueSource) {
        let Some(setting) = Setting::find(key) else { return self.unknown(key, source) };
        match text_of(setting.kind, value) {
            Some(text) => self.give(key, text, source),
            None => self.invalid(key, &shown(value), setting.kind, source),
        }
    }

    /// Reads topic configuration. Its keys contain dots: in TOML, a quoted key is one key, and a bare key means nested
    /// tables.
    fn topics(&mut self, prefix: &str, entries: &DeTable<'_>, place: &impl Fn(usize) -> ValueSource) {
        for (name, value) in entries {
            let key = format!("{prefix}{}", name.get_ref());
            let source = place(name.span().start);
            match value.get_ref() {
                DeValue::Table(inner) => self.topics(&format!("{key}."), inner, place),
                DeValue::String(_) | DeValue::Integer(_) | DeValue::Boolean(_) => {
                    self.topic(&key, shown(value.get_ref()), source);
                }
                other => {
                    let allowed = "a text, a number, true or false".to_owned();
                    let (key, value) = (format!("{TOPIC_DEFAULTS}.{key}"), shown(other));
                    self.errors.push(ConfigError::Value { place: source, key, value, allowed });
                }
            }
        }
    }
}

/// Returns the text of a TOML value if the setting accepts values of that type.
fn text_of(kind: ValueKind, value: &DeValue<'_>) -> Option<String> {
    match (kind, value) {
        (ValueKind::Number { .. } | ValueKind::Bytes { .. }, DeValue::Integer(number)) => {
            decimal(number.as_str(), number.radix())
        }
        (ValueKind::Number { .. }, _) => None,
        (ValueKind::Flag, DeValue::Boolean(flag)) => Some(flag.to_string()),
        (ValueKind::Flag, _) => None,
        (ValueKind::Urls, DeValue::Array(urls)) => {
            let url = |value: &DeValue<'_>| value.as_str().filter(|url| !url.contains(',')).map(str::to_owned);
            let urls = urls.iter().map(|value| url(value.get_ref())).collect::<Option<Vec<_>>>()?;
            Some(urls.join(","))
        }
        (_, DeValue::String(text)) => Some(text.to_string()),
        _ => None,
    }
}

fn decimal(digits: &str, radix: u32) -> Option<String> {
    i64::from_str_radix(digits, radix).ok().map(|number| number.to_string())
}

/// Formats a value for a message or for a topic configuration.
fn shown(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) => text.to_string(),
        DeValue::Integer(number) => {
            decimal(number.as_str(), number.radix()).unwrap_or_else(|| number.as_str().to_owned())
        }
        DeValue::Float(number) => number.as_str().to_owned(),
        DeValue::Boolean(flag) => flag.to_string(),
        DeValue::Datetime(time) => time.to_string(),
        DeValue::Array(values) => {
            let values: Vec<_> = values.iter().map(|value| shown(value.get_ref())).collect();
            format!("[{}]", values.join(", "))
        }
        DeValue::Table(_) => "a table".to_owned(),
    }
}

fn place(path: &Path, text: &str, offset: usize) -> ValueSource {
    let before = &text[..text.floor_char_boundary(offset)];
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    let line = before.bytes().filter(|byte| *byte == b'\n').count() + 1;
    ValueSource::File { path: path.to_owned(), line, column: before[line_start..].chars().count() + 1 }
}

/// Returns the setting that is most similar to a key. Names are compared first, so a right name in a wrong section is
/// found.
fn nearest(key: &str) -> Option<String> {
    let (section, name) = key.rsplit_once('.').unwrap_or(("", key));
    let near = near::nearest(name, SETTINGS, |setting| setting.name, SETTINGS.len());
    // Of the settings with the most similar name, the one in the given section is returned, else the first declared
    // one. The sort is stable.
    let best = near.first().map(|setting| setting.name)?;
    let alike = || near.iter().filter(|setting| setting.name == best);
    let found = alike().find(|setting| setting.section == section).or_else(|| alike().next())?;
    Some(found.key())
}

/// Returns the second text of the candidate whose first text is most similar to this one; `None` if none is similar.
fn best(text: &str, candidates: impl IntoIterator<Item = (String, String)>) -> Option<String> {
    near::nearest(text, candidates, |(short, _)| short, 1).pop().map(|(_, long)| long)
}

/// Returns true if the variable is a setting, belongs to the client commands, or is set by Kubernetes.
fn is_known(name: &str, text: &str) -> bool {
    let is_setting = name == variable(TOPIC_DEFAULTS) || SETTINGS.iter().any(|setting| setting.variable() == name);
    is_setting || CLIENT_VARIABLES.contains(&name) || of_kubernetes(name, text)
}

/// Returns true if Kubernetes sets the variable, for a service whose name begins with `strandline`.
fn of_kubernetes(name: &str, text: &str) -> bool {
    let port = name.ends_with("_PORT") && text.contains("://");
    name.ends_with("_SERVICE_HOST") || name.contains("_SERVICE_PORT") || port || {
        let port = name.split_once("_PORT_").map(|(_, rest)| rest);
        port.is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    }
}
