//! What the broker says about itself: log lines to standard error, and the metrics registry.
//!
//! Knows no other room: whoever has something to count is given the [`Metrics`].

use std::io::{self, IsTerminal as _};

use tracing_subscriber::EnvFilter;

mod exposition;
mod kinds;
mod metrics;
mod throttle;

pub use prometheus_client::metrics::counter::Counter;

pub use exposition::MetricsFormat;
pub use kinds::{
    ByPeer, ByRole, BySource, CauseLabel, Elections, Errors, Level, PeerLevels, PeerSeconds, ReasonLabel,
    RequestSeconds, Requests, RoleLabel, RuleLabel, Seconds, SourceLabel, Steps,
};
pub use metrics::{Metrics, docs};
pub use throttle::{LogThrottle, REMINDER_INTERVAL};

/// How log lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

impl Format {
    /// The format that a word names.
    pub fn from_word(word: &str) -> Option<Self> {
        match word {
            "text" => Some(Self::Text),
            "json" => Some(Self::Json),
            _ => None,
        }
    }
}

/// Why logging was not set up.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The level is not one.
    #[error(transparent)]
    Level(#[from] InvalidLevel),
    /// Something in this process has set it up already.
    #[error("logging is set up already in this process")]
    Started,
}

/// A level that is not one.
#[derive(Debug, thiserror::Error)]
#[error(
    "{level:?} is not valid ({why}): use error, warn, info, debug or trace, also by module (info,strandline::tier=debug)"
)]
pub struct InvalidLevel {
    /// What was given.
    pub level: String,
    /// What the parser said.
    pub why: String,
}

/// Checks a level without setting anything up.
pub fn check_level(level: &str) -> Result<(), InvalidLevel> {
    filter(level).map(|_| ())
}

fn filter(level: &str) -> Result<EnvFilter, InvalidLevel> {
    let given = level;
    let invalid = |why: String| InvalidLevel { level: given.to_owned(), why };
    // A bare word that is no level would be taken for a module's name, and silence everything else.
    let levels = ["off", "error", "warn", "info", "debug", "trace"];
    let is_level = |part: &str| levels.iter().any(|level| level.eq_ignore_ascii_case(part.trim()));
    if !level.split(',').any(is_level) {
        return Err(invalid("it names no level for everything else".to_owned()));
    }
    let stray = level.split(',').find(|part| !part.contains('=') && !part.contains('[') && !is_level(part));
    if let Some(stray) = stray {
        return Err(invalid(format!("{stray:?} is no level")));
    }
    // The client of the object store logs each of its own retries. An outage would fill the log with them; ours say it once.
    let level = if level.contains("object_store") { level.to_owned() } else { format!("object_store=warn,{level}") };
    EnvFilter::try_new(&level).map_err(|error| invalid(error.to_string()))
}

/// Sends log lines to standard error, for the whole process. Colour only on a terminal, and not when NO_COLOR is set.
pub fn start(level: &str, format: Format) -> Result<(), StartError> {
    let colour = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let lines = tracing_subscriber::fmt().with_env_filter(filter(level)?).with_writer(io::stderr).with_ansi(colour);
    let started = match format {
        Format::Text => lines.try_init(),
        Format::Json => lines.json().flatten_event(true).try_init(),
    };
    started.map_err(|_| StartError::Started)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_is_a_word_or_words_by_module() {
        for good in ["info", "debug", "info,strandline::tier=debug", "warn,h2=off"] {
            check_level(good).expect(good);
        }
        for bad in ["", "inof", "strandline=debug", "info,verbose", "info,strandline=loud"] {
            assert!(check_level(bad).is_err(), "{bad}");
        }
    }
}
