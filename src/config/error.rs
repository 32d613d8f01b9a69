//! Errors of a configuration, each with its place.

use std::{fmt, io, path::PathBuf};

/// Source of a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ValueSource {
    /// Built-in default.
    Default,
    /// Configuration file.
    File {
        /// Path of the file.
        path: PathBuf,
        /// Line, counted from 1.
        line: usize,
        /// Column in characters, counted from 1.
        column: usize,
    },
    /// Environment variable.
    Environment {
        /// Name of the variable.
        name: String,
    },
    /// Command line.
    Flag {
        /// Key of the setting.
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
    /// The file cannot be read.
    #[error("configuration file {} cannot be read: {source}", path.display())]
    Unreadable {
        /// Path of the file.
        path: PathBuf,
        /// Error of the operating system.
        source: io::Error,
    },
    /// The file is not valid TOML.
    #[error("{place}: {reason}")]
    Syntax {
        /// Place of the error.
        place: ValueSource,
        /// Message of the parser.
        reason: String,
    },
    /// The setting does not exist.
    #[error("{place}: there is no setting {key:?}{}", suggestion(near.as_deref()))]
    Unknown {
        /// Place of the error.
        place: ValueSource,
        /// Given key.
        key: String,
        /// Most similar existing key; `None` if no key is similar.
        near: Option<String>,
    },
    /// The setting does not accept the value.
    #[error("{place}: {key} = {value:?} is not valid: use {allowed}")]
    Value {
        /// Place of the error.
        place: ValueSource,
        /// Key of the setting.
        key: String,
        /// Given value, without passwords.
        value: String,
        /// Description of the allowed values.
        allowed: String,
    },
    /// The value conflicts with other values, or fails a check beyond its own syntax.
    #[error("{place}: {reason}")]
    Wrong {
        /// Place of the error.
        place: ValueSource,
        /// Description of the error and its remedy.
        reason: String,
    },
    /// A file that a setting names cannot be used.
    #[error("{key}: the file {} cannot be used: {reason}", path.display())]
    Unusable {
        /// Key of the setting.
        key: &'static str,
        /// Path of the file.
        path: PathBuf,
        /// Reason why the file cannot be used.
        reason: String,
    },
    /// The data directory, or a parent of it, is a file.
    #[error("data directory {} cannot be used: {} is a file: set broker.data_dir (--data-dir) to a directory, which \
        is created if it does not exist", path.display(), file.display())]
    DataDirIsFile {
        /// Path of the data directory.
        path: PathBuf,
        /// Path of that file.
        file: PathBuf,
    },
    /// The data directory cannot be used.
    #[error("data directory {} cannot be used: {source}: set broker.data_dir to a writable directory", path.display())]
    DataDir {
        /// Path of the data directory.
        path: PathBuf,
        /// Error of the operating system.
        source: io::Error,
    },
}

fn suggestion(near: Option<&str>) -> String {
    near.map(|near| format!("; did you mean {near:?}?")).unwrap_or_default()
}

/// All errors of a configuration, so that they can be corrected together.
#[derive(Debug)]
pub struct ConfigErrors(pub Vec<ConfigError>);

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, error) in self.0.iter().enumerate() {
            if n > 0 {
                f.write_str("\n")?;
            }
            error.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

impl From<ConfigError> for ConfigErrors {
    fn from(error: ConfigError) -> Self {
        Self(vec![error])
    }
}
