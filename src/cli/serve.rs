//! `strandline dev` and `strandline broker`: run a broker in this process.

use std::{io::Write as _, path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::Args;

use crate::{
    config::{Settings, Sources},
    server::{self, Ready},
    telemetry,
};

/// Run one broker with everything embedded: metadata in a file, a directory as object store
#[derive(Debug, Args)]
pub(super) struct Dev {
    /// Where everything is kept
    #[arg(long, value_name = "DIR", default_value = "./strandline-data")]
    data_dir: PathBuf,
    /// Where clients connect (gRPC)
    #[arg(long, value_name = "ADDR", default_value = super::DEFAULT_BOOTSTRAP)]
    listen: String,
    /// Where /metrics, /healthz and /readyz are
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:9461")]
    http: String,
    #[command(flatten)]
    overrides: Overrides,
}

/// Run a broker from a configuration file
#[derive(Debug, Args)]
pub(super) struct Broker {
    /// The configuration file (TOML); `strandline config print` shows every setting
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Where everything is kept: broker.data_dir
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Where clients connect (gRPC): grpc.listen
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
    /// The address that clients are told: grpc.advertise
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Option<String>,
    /// Where /metrics, /healthz and /readyz are: http.listen
    #[arg(long, value_name = "ADDR")]
    http: Option<String>,
    /// The object store's URL: object_store.url
    #[arg(long, value_name = "URL")]
    object_store: Option<String>,
    #[command(flatten)]
    overrides: Overrides,
}

/// Settings for which there is no flag of their own.
#[derive(Debug, Args)]
struct Overrides {
    /// Set any setting, as in --set tier.check_interval=5s
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = key_value)]
    set: Vec<(String, String)>,
}

fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("write it as KEY=VALUE, for instance broker.rack=zone-a".to_owned()),
    }
}

impl Overrides {
    fn apply(self, sources: Sources) -> Sources {
        self.set.into_iter().fold(sources, |sources, (key, value)| sources.flag(&key, value))
    }
}

impl Dev {
    fn settings(self) -> anyhow::Result<Settings> {
        let data_dir = std::path::absolute(&self.data_dir)
            .with_context(|| format!("{} is no path for a data directory", self.data_dir.display()))?;
        let sources = Sources::new()
            .with_default("object_store.url", format!("file://{}", data_dir.join("bucket").display()))
            .environment(environment())
            .flag("broker.data_dir", data_dir.display().to_string())
            .flag("grpc.listen", self.listen)
            .flag("http.listen", self.http);
        Ok(self.overrides.apply(sources).load()?)
    }
}

impl Broker {
    fn settings(self) -> anyhow::Result<Settings> {
        let mut sources = Sources::new().read_file(&self.config)?.environment(environment());
        let flags = [
            ("broker.data_dir", self.data_dir.map(|dir| dir.display().to_string())),
            ("grpc.listen", self.listen),
            ("grpc.advertise", self.advertise),
            ("http.listen", self.http),
            ("object_store.url", self.object_store),
        ];
        for (key, value) in flags {
            if let Some(value) = value {
                sources = sources.flag(key, value);
            }
        }
        Ok(self.overrides.apply(sources).load()?)
    }
}

/// The environment; what is not UTF-8 cannot be a setting of ours.
pub(super) fn environment() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os().filter_map(|(key, value)| Some((key.into_string().ok()?, value.into_string().ok()?)))
}

/// Runs `strandline dev`.
pub(super) async fn dev(command: Dev) -> anyhow::Result<ExitCode> {
    let settings = command.settings()?;
    serve(settings, |ready| say(&welcome(ready, &program()))).await
}

/// What `dev` says once it is ready: where everything is, and what to type next.
fn welcome(ready: &Ready, program: &str) -> String {
    // The commands go to the default address unless told otherwise.
    let export = if ready.grpc.to_string() == super::DEFAULT_BOOTSTRAP {
        String::new()
    } else {
        format!("  export STRANDLINE_BOOTSTRAP={}\n", ready.grpc)
    };
    format!(
        "Strandline {} is ready ({} ms, {} partitions)\n\
         \n  clients   {}\n  metrics   http://{}/metrics\n  data      {}\n  bucket    {}\n\n\
         In another terminal:\n\n{export}  \
         {program} topic create events\n  \
         echo 'hello' | {program} produce events\n  \
         {program} consume events --until-end\n\n\
         Ctrl-C stops it; the data stays.\n",
        env!("CARGO_PKG_VERSION"),
        ready.took.as_millis(),
        ready.partitions,
        ready.grpc,
        ready.http,
        ready.data_dir.display(),
        ready.object_store.as_deref().unwrap_or("none"),
    )
}

/// How this program was called, so that what is shown can be typed.
fn program() -> String {
    std::env::args().next().unwrap_or_else(|| "strandline".to_owned())
}

/// Runs `strandline broker`.
pub(super) async fn broker(command: Broker) -> anyhow::Result<ExitCode> {
    let settings = command.settings()?;
    serve(settings, |ready| {
        tracing::info!(
            grpc = %ready.grpc,
            http = %ready.http,
            data_dir = %ready.data_dir.display(),
            object_store = ready.object_store.as_deref().unwrap_or("none"),
            partitions = ready.partitions,
            took_ms = u64::try_from(ready.took.as_millis()).unwrap_or(u64::MAX),
            "ready"
        );
    })
    .await
}

async fn serve(settings: Settings, ready: impl FnOnce(&Ready)) -> anyhow::Result<ExitCode> {
    let config = settings.config;
    telemetry::start(&config.telemetry.level, config.telemetry.format)?;
    let signal = stop_signal()?;
    server::run(config, signal, ready).await?;
    Ok(ExitCode::SUCCESS)
}

/// Resolves at Ctrl-C or SIGTERM. The handlers are in place when this returns.
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

/// Prints for the person who started it. A closed standard output is no reason to stop serving.
fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    let _closed = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
