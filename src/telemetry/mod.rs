//! Logging to standard error, and the metrics registry.
//!
//! Modules that count receive [`Metrics`]; this module imports none of them.

use std::io::{self, IsTerminal as _};

use tracing_subscriber::EnvFilter;

mod exposition;
mod families;
mod metrics;
mod throttle;

pub use prometheus_client::metrics::counter::Counter;

pub use exposition::MetricsFormat;
pub use families::{
    CauseLabel, ChangeReasonLabel, ControllerChangeCounters, ElectionCounters, ErrorCounters, GaugeF64, GaugeU64,
    PeerCounters, PeerGauges, PeerGaugesF64, ReasonLabel, RequestCounters, RequestHistograms, RoleCounters, RoleLabel,
    SourceCounters, SourceLabel,
};
pub use metrics::{Metrics, docs};
pub use throttle::{LogThrottle, REMINDER_INTERVAL};

/// Format of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// One line of text per event.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

impl LogFormat {
    /// Returns the format with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "text" => Some(Self::Text),
            "json" => Some(Self::Json),
            _ => None,
        }
    }
}

/// Error of [`start`].
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// The log level is invalid.
    #[error(transparent)]
    Level(#[from] InvalidLogLevel),
    /// Logging is already started in this process.
    #[error("logging is already started in this process")]
    Started,
}

/// Error for an invalid log level.
#[derive(Debug, thiserror::Error)]
#[error(
    "log level {level:?} is invalid ({reason}): use error, warn, info, debug or trace, also by module \
     (info,strandline::tier=debug)"
)]
pub struct InvalidLogLevel {
    pub level: String,
    pub reason: String,
}

/// Validates a log level.
pub fn check_level(level: &str) -> Result<(), InvalidLogLevel> {
    parse_filter(level).map(|_| ())
}

/// Parses a log level. The text must contain a level for all modules, in addition to any levels of single modules.
fn parse_filter(level: &str) -> Result<EnvFilter, InvalidLogLevel> {
    let invalid = |reason: String| InvalidLogLevel { level: level.to_owned(), reason };
    // `EnvFilter` would treat an unknown level as the name of a module, and log only that module.
    let levels = ["off", "error", "warn", "info", "debug", "trace"];
    let is_level = |part: &str| levels.iter().any(|level| level.eq_ignore_ascii_case(part.trim()));
    if !level.split(',').any(is_level) {
        return Err(invalid("no level for all other modules".to_owned()));
    }
    let unknown = level.split(',').find(|part| !part.contains('=') && !part.contains('[') && !is_level(part));
    if let Some(unknown) = unknown {
        return Err(invalid(format!("{unknown:?} is not a level")));
    }
    // The object_store crate logs each of its retries, which would fill the log during an outage. `tier::outage` logs
    // the outage instead.
    let directives =
        if level.contains("object_store") { level.to_owned() } else { format!("object_store=warn,{level}") };
    EnvFilter::try_new(&directives).map_err(|error| invalid(error.to_string()))
}

/// Starts logging to standard error for the whole process. Colours are used on a terminal, unless NO_COLOR is set.
pub fn start(level: &str, format: LogFormat) -> Result<(), LoggingError> {
    let colour = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let subscriber =
        tracing_subscriber::fmt().with_env_filter(parse_filter(level)?).with_writer(io::stderr).with_ansi(colour);
    let started = match format {
        LogFormat::Text => subscriber.try_init(),
        LogFormat::Json => subscriber.json().flatten_event(true).try_init(),
    };
    started.map_err(|_| LoggingError::Started)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_level_is_valid_alone_and_by_module() {
        for good in ["info", "debug", "info,strandline::tier=debug", "warn,h2=off"] {
            check_level(good).expect(good);
        }
        for bad in ["", "inof", "strandline=debug", "info,verbose", "info,strandline=loud"] {
            assert!(check_level(bad).is_err(), "{bad}");
        }
    }
}
