//! Errors of a configuration, each with the source of the value.

use std::{fmt, io, path::PathBuf};

/// Source of a setting's value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ValueSource {
    Default,
    File {
        path: PathBuf,
        line: usize,
        /// Column of the key, counted in characters from 1.
        column: usize,
    },
    Environment {
        name: String,
    },
    Flag {
        key: String,
    },
}

impl fmt::Display for ValueSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line, column } => write!(f, "{}:{line}:{column}", path.display()),
            Self::Environment { name } => write!(f, "environment variable {name}"),
            Self::Flag { key } => write!(f, "command line ({key})"),
        }
    }
}

/// One error of a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The configuration file cannot be read.
    #[error("configuration file {} cannot be read: {source}: name a readable file with --config", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    #[error("{origin}: there is no setting {key:?}{}", suggestion(near.as_deref()))]
    Unknown {
        origin: ValueSource,
        key: String,
        /// Most similar existing key; `None` if no key is similar.
        near: Option<String>,
    },
    #[error("{origin}: {key} = {value:?} is not valid: use {allowed}")]
    Value {
        origin: ValueSource,
        key: String,
        /// Given value; passwords in URLs are masked.
        value: String,
        allowed: String,
    },
    /// The file is not valid TOML, or a check after the layering failed, such as one for a conflict between settings.
    #[error("{origin}: {reason}")]
    Invalid {
        origin: ValueSource,
        /// Description of the error and its remedy.
        reason: String,
    },
    /// A file that a setting names cannot be used.
    #[error("{key}: the file {} cannot be used: {reason}", path.display())]
    Unusable { key: &'static str, path: PathBuf, reason: String },
    /// The data directory, or one of its parents, exists and is not a directory.
    #[error("data directory {} cannot be used: {} is a file: set broker.data_dir (--data-dir) to a directory, which \
        is created if it does not exist", path.display(), file.display())]
    DataDirIsFile { path: PathBuf, file: PathBuf },
    /// The data directory cannot be created or written.
    #[error("data directory {} cannot be used: {source}: set broker.data_dir to a writable directory", path.display())]
    DataDir { path: PathBuf, source: io::Error },
}

fn suggestion(near: Option<&str>) -> String {
    near.map(|near| format!("; did you mean {near:?}?")).unwrap_or_default()
}

/// All errors of a configuration, so that they can be corrected together.
#[derive(Debug, thiserror::Error)]
#[error("{}", lines(.0))]
pub struct ConfigErrors(pub Vec<ConfigError>);

fn lines(errors: &[ConfigError]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

impl From<ConfigError> for ConfigErrors {
    fn from(error: ConfigError) -> Self {
        Self(vec![error])
    }
}
