//! Shared parts of `strandline dev` and `strandline broker`: setting overrides, and a broker that runs until a signal.

use std::{io::Write as _, process::ExitCode};

use anyhow::Context as _;
use clap::Args;

use crate::{
    config::{ConfigSources, LoadedConfig},
    server::{self, ServingAddresses},
    telemetry,
};

/// Settings without a flag of their own.
#[derive(Clone, Debug, Args)]
pub(super) struct Overrides {
    /// Set any setting, such as --set tier.check_interval=5s; repeatable
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = key_value)]
    set: Vec<(String, String)>,
}

/// Parses `KEY=VALUE`. The value may be empty.
fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("not a KEY=VALUE pair: write it like broker.rack=zone-a".to_owned()),
    }
}

impl Overrides {
    /// Adds the overrides to `sources`. The overrides have precedence over the values that are set already.
    pub(super) fn apply(self, sources: ConfigSources) -> ConfigSources {
        self.set.into_iter().fold(sources, |sources, (key, value)| sources.flag(&key, value))
    }
}

/// Returns the environment variables. A name that is not UTF-8 cannot be a setting, and `check_environment` rejects a
/// setting whose value is not UTF-8.
pub(super) fn environment() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os().filter_map(|(key, value)| Some((key.into_string().ok()?, value.to_string_lossy().into_owned())))
}

/// Makes new files of this process accessible to its user only. The umask also covers objects of a `file://` object
/// store, whose library opens files itself.
pub(super) fn keep_files_private() {
    rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
}

/// Runs a broker until a stop signal. Calls `ready` when the broker serves clients.
pub(super) async fn serve(settings: LoadedConfig, ready: impl FnOnce(&ServingAddresses)) -> anyhow::Result<ExitCode> {
    let config = settings.config;
    keep_files_private();
    telemetry::start(&config.telemetry.level, config.telemetry.format)?;
    let signal = stop_signal()?;
    Box::pin(server::run(config, signal, ready)).await?;
    Ok(ExitCode::SUCCESS)
}

/// Returns a future that resolves at Ctrl-C or SIGTERM. The signal handlers are installed on return.
pub(super) fn stop_signal() -> anyhow::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for Ctrl-C")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    })
}

/// Prints text on standard output, without an additional line end. A closed standard output does not stop the broker.
pub(super) fn print_text(text: &str) {
    let mut out = std::io::stdout().lock();
    let _closed = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
