//! What is wrong with a configuration, and where.

use std::{fmt, io, path::PathBuf};

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Built in.
    Default,
    /// The configuration file; line and column count from 1.
    File {
        /// The file.
        path: PathBuf,
        /// The line.
        line: usize,
        /// The column, in characters.
        column: usize,
    },
    /// An environment variable.
    Environment {
        /// Its name.
        name: String,
    },
    /// The command line.
    Flag {
        /// The setting's key.
        key: String,
    },
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line, column } => write!(f, "{}:{line}:{column}", path.display()),
            Self::Environment { name } => write!(f, "environment variable {name}"),
            Self::Flag { key } => write!(f, "command line ({key})"),
        }
    }
}

/// One thing that is wrong.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("configuration file {} cannot be read: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is not TOML.
    #[error("{place}: {why}")]
    Syntax {
        /// Where.
        place: Source,
        /// What the parser said.
        why: String,
    },
    /// No such setting.
    #[error("{place}: there is no setting {key:?}{}", suggestion(near.as_deref()))]
    Unknown {
        /// Where.
        place: Source,
        /// What was given.
        key: String,
        /// The nearest that there is.
        near: Option<String>,
    },
    /// A value that the setting does not take.
    #[error("{place}: {key} = {value:?} is not valid: allowed is {allowed}")]
    Value {
        /// Where.
        place: Source,
        /// The setting.
        key: String,
        /// What was given, without passwords.
        value: String,
        /// What is allowed.
        allowed: String,
    },
    /// Values that do not go together, or not here.
    #[error("{place}: {why}")]
    Wrong {
        /// Where.
        place: Source,
        /// What is wrong and what to do.
        why: String,
    },
    /// A file that a setting names cannot be used.
    #[error("{key}: the file {} cannot be used: {why}", path.display())]
    Unusable {
        /// The setting.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The data directory, or what it should lie in, is a file.
    #[error("data directory {} cannot be used: {} is a file, and a folder is needed; set broker.data_dir (--data-dir) to a folder, \
        which is made when there is none", path.display(), file.display())]
    DataDirIsFile {
        /// The directory.
        path: PathBuf,
        /// The file.
        file: PathBuf,
    },
    /// The data directory cannot be used.
    #[error("data directory {} cannot be used: {source}; set broker.data_dir to one that can be written", path.display())]
    DataDir {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

fn suggestion(near: Option<&str>) -> String {
    near.map(|near| format!("; did you mean {near:?}?")).unwrap_or_default()
}

/// Everything that is wrong, so that it can be put right at once.
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
