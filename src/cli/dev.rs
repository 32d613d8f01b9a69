//! `strandline dev`: one standalone broker, or a small cluster of brokers in this process.
//!
//! ```text
//! {data-dir}/strandline.json …   one broker          {data-dir}/1/ 2/ 3/     the brokers of a cluster
//! {data-dir}/metadata.redb                           {data-dir}/metadata.redb   their metadata store, unless --etcd
//! {data-dir}/object-store/                           {data-dir}/object-store/
//! ```

use std::{
    fmt::Write as _,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, bail};
use clap::Args;

use super::{
    output,
    serve::{Overrides, environment, keep_files_private, print_text, serve, stop_signal},
};
use crate::{
    config::{Config, ConfigSources, LoadedConfig, default_memory_bytes},
    log,
    server::{self, ServingAddresses},
    telemetry,
};

/// Maximum number of brokers in one process. Such a cluster is for trials, not for production.
const MAX_BROKERS: i64 = 32;

/// Distance between the ports of consecutive brokers.
const PORTS_PER_BROKER: u16 = 2;

/// Run a standalone broker with embedded metadata and a directory as object store, or a small cluster
///
/// With --brokers N, N brokers run in this process. Each has its own data directory, the next two ports, and a free
/// loopback port for the other brokers. Topics have up to three replicas by default. With three brokers or more,
/// min.insync.replicas is 2 by default, so a topic with --replication-factor 1 also needs --config
/// min.insync.replicas=1. Disk pressure excludes no broker (broker.disk_pressure_percent is 100). Such a cluster is for
/// trials: a failure of this machine stops all brokers.
#[derive(Clone, Debug, Args)]
pub(super) struct DevArgs {
    /// Data directory
    #[arg(long, value_name = "DIR", default_value = "./strandline-data")]
    data_dir: PathBuf,
    /// Listen address for clients (gRPC); further brokers use every second port after it
    #[arg(long, value_name = "ADDR", default_value = super::DEFAULT_BOOTSTRAP)]
    listen: String,
    /// Listen address for /metrics, /healthz and /readyz; further brokers use every second port after it
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:9461")]
    http: String,
    /// Number of brokers
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=MAX_BROKERS))]
    brokers: u32,
    /// Store the metadata in this etcd instead of a file
    #[arg(long, value_name = "URL[,URL]")]
    etcd: Option<String>,
    #[command(flatten)]
    overrides: Overrides,
}

/// Runs `strandline dev`.
pub(super) async fn run(command: DevArgs) -> anyhow::Result<ExitCode> {
    let data_dir = std::path::absolute(&command.data_dir).with_context(|| {
        format!(
            "cannot resolve --data-dir \"{}\" against the current directory: give an absolute path",
            command.data_dir.display()
        )
    })?;
    if command.brokers == 1 && command.etcd.is_none() {
        check_standalone_dir(&data_dir)?;
        let settings = command.standalone_config(&data_dir)?;
        return serve(settings, |ready| print_text(&welcome(std::slice::from_ref(ready), &program()))).await;
    }
    check_cluster_dir(&data_dir)?;
    if let Some(warning) = excluded_brokers_warning(&data_dir, command.brokers) {
        eprintln!("{warning}");
    }
    let configs = command.cluster_configs(&data_dir)?;
    telemetry::start(&configs[0].telemetry.level, configs[0].telemetry.format)?;
    let signal = stop_signal()?;
    keep_files_private();
    let metadata = command.etcd.is_none().then_some(data_dir);
    server::run_several(configs, metadata, signal, |ready| print_text(&welcome(ready, &program()))).await?;
    Ok(ExitCode::SUCCESS)
}

impl DevArgs {
    /// Returns the settings of a standalone broker.
    fn standalone_config(self, data_dir: &Path) -> anyhow::Result<LoadedConfig> {
        let sources = shared_defaults(data_dir)
            .environment(environment())
            .flag("broker.data_dir", data_dir.display().to_string())
            .flag("grpc.listen", self.listen)
            .flag("http.listen", self.http);
        Ok(self.overrides.apply(sources).load()?)
    }

    /// Returns the configuration of each broker of a cluster.
    fn cluster_configs(&self, data_dir: &Path) -> anyhow::Result<Vec<Config>> {
        let (grpc, http) = (ports(&self.listen, self.brokers, "--listen")?, ports(&self.http, self.brokers, "--http")?);
        if let Some(address) = grpc.iter().find(|address| address.port() != 0 && http.contains(address)) {
            bail!(
                "{address} would have two listeners: brokers use every second port, so start with an even --listen and \
                 an odd --http, or the reverse"
            );
        }
        let configs = (1..=self.brokers).zip(grpc.into_iter().zip(http)).map(|(id, (grpc, http))| {
            let mut sources = shared_defaults(data_dir)
                .with_default("replication.default_factor", self.brokers.min(3).to_string())
                // All brokers share one disk, so disk pressure would exclude all brokers from new replicas. With the
                // value 100, topics can still be created.
                .with_default("broker.disk_pressure_percent", "100")
                .with_default("limits.memory_bytes", default_memory_bytes(self.brokers.into()).to_string())
                // Only brokers of this process connect to this port.
                .with_default("peer.listen", "127.0.0.1:0");
            if self.brokers >= 3 {
                sources = sources.with_default("topic_defaults.min.insync.replicas", "2");
            }
            sources = sources
                .environment(environment())
                .flag("broker.id", id.to_string())
                .flag("broker.data_dir", data_dir.join(id.to_string()).display().to_string())
                .flag("grpc.listen", grpc.to_string())
                .flag("http.listen", http.to_string());
            if let Some(etcd) = &self.etcd {
                sources = sources.flag("metadata.etcd", etcd);
            }
            let settings = self.overrides.clone().apply(sources).load()?;
            if self.brokers > 1 {
                reject_fixed_ports(&settings)?;
            }
            Ok(settings.config)
        });
        configs.collect()
    }
}

/// Returns the defaults that one broker and several brokers share.
fn shared_defaults(data_dir: &Path) -> ConfigSources {
    ConfigSources::new().with_default("object_store.url", format!("file://{}", data_dir.join("object-store").display()))
}

/// Rejects an address setting with a fixed port, because every broker of the cluster would listen on that port or
/// advertise it. Port 0 gives each broker a free port.
fn reject_fixed_ports(settings: &LoadedConfig) -> anyhow::Result<()> {
    let Config { grpc, peer, .. } = &settings.config;
    for (key, address) in [
        ("grpc.advertise", grpc.advertise.clone()),
        ("peer.listen", Some(peer.listen.to_string())),
        ("peer.advertise", peer.advertise.clone()),
    ] {
        if let Some(address) = address.filter(|address| !address.ends_with(":0")) {
            bail!(
                "{}: {key} {address} has a fixed port, which several brokers cannot share: leave the setting out, or \
                 end it with :0, so that each broker gets a free port",
                settings.source(key)
            );
        }
    }
    Ok(())
}

/// Returns the addresses of `count` listeners. `first` is the first address, and `flag` the option that set it.
fn ports(first: &str, count: u32, flag: &str) -> anyhow::Result<Vec<SocketAddr>> {
    let first: SocketAddr =
        first.parse().with_context(|| format!("{flag} {first:?} is not an IP:PORT: write it like 127.0.0.1:9460"))?;
    let mut address = first;
    let mut addresses = vec![first];
    for _ in 1..count {
        // Port 0 stays 0: the system chooses a free port.
        if first.port() != 0 {
            let Some(next) = address.port().checked_add(PORTS_PER_BROKER) else {
                bail!(
                    "{flag} {first} leaves too few ports for {count} brokers, which use every second port: \
                     choose a lower port"
                );
            };
            address.set_port(next);
        }
        addresses.push(address);
    }
    Ok(addresses)
}

/// Rejects a directory with the data of a cluster, or of a broker that ran with `--etcd`. A standalone broker would
/// ignore the brokers' directories and use the cluster's metadata as its own.
fn check_standalone_dir(data_dir: &Path) -> anyhow::Result<()> {
    match brokers_in(data_dir).len() {
        0 => Ok(()),
        1 => bail!(
            "{} contains a broker that ran with --etcd: add --etcd, or choose another --data-dir",
            data_dir.display()
        ),
        brokers => bail!(
            "{} contains a cluster of {brokers} brokers: start it with --brokers {brokers}, and with --etcd if it ran \
             with etcd, or choose another --data-dir",
            data_dir.display()
        ),
    }
}

/// Rejects the directory of a standalone broker. A cluster would ignore that broker's records and use its metadata.
fn check_cluster_dir(data_dir: &Path) -> anyhow::Result<()> {
    if is_data_directory(data_dir) {
        bail!(
            "{} contains a standalone broker: start it without --brokers and --etcd, or choose another --data-dir",
            data_dir.display()
        );
    }
    Ok(())
}

/// Returns a warning if the directory contains brokers with ids above `brokers`, which this start does not run.
fn excluded_brokers_warning(data_dir: &Path, brokers: u32) -> Option<String> {
    let excluded: Vec<String> = brokers_in(data_dir).iter().filter(|id| **id > brokers).map(u32::to_string).collect();
    (!excluded.is_empty()).then(|| {
        format!(
            "warning: {} contains more brokers than are started: records that exist only on broker {} are unavailable \
             until --brokers is {} again",
            data_dir.display(),
            excluded.join(" or broker "),
            excluded[excluded.len() - 1]
        )
    })
}

/// Returns the ids of the cluster's brokers that have a data directory below `data_dir`.
fn brokers_in(data_dir: &Path) -> Vec<u32> {
    let brokers = (1..=MAX_BROKERS).filter_map(|id| u32::try_from(id).ok());
    brokers.filter(|id| is_data_directory(&data_dir.join(id.to_string()))).collect()
}

/// Returns true if a broker has used this directory: the directory has an identity file.
fn is_data_directory(path: &Path) -> bool {
    path.join(log::IDENTITY).exists()
}

/// Returns the text that `dev` prints when all brokers are ready: addresses, directories and example commands.
fn welcome(ready: &[ServingAddresses], program: &str) -> String {
    let [first, others @ ..] = ready else { unreachable!("there is at least one broker") };
    // The example commands use the default address unless the variable is set.
    let export = if first.grpc.to_string() == super::DEFAULT_BOOTSTRAP {
        String::new()
    } else {
        format!("  export STRANDLINE_BOOTSTRAP={}\n", first.grpc)
    };
    let (took, partitions) = (ready.iter().map(|broker| broker.took).max().unwrap_or_default(), first.partitions);
    let mut text = format!("Strandline {} is ready ({} ms, ", env!("CARGO_PKG_VERSION"), took.as_millis());
    // Writing to a string cannot fail.
    let _infallible = match others {
        [] => write!(
            text,
            "{})\n\n  clients   {}\n  metrics   http://{}/metrics\n  data      {}\n",
            output::count(partitions as u64, "partition"),
            first.grpc,
            first.http,
            first.data_dir.display(),
        ),
        _ => {
            let _infallible = writeln!(text, "{} brokers)\n", ready.len());
            for (id, broker) in (1..).zip(ready) {
                let _infallible = writeln!(
                    text,
                    "  broker {id}  {}  metrics http://{}/metrics  data {}",
                    broker.grpc,
                    broker.http,
                    broker.data_dir.display(),
                );
            }
            Ok(())
        }
    };
    let describe = if others.is_empty() { String::new() } else { format!("  {program} cluster describe\n") };
    let _infallible = write!(
        text,
        "  objects   {}\n\n\
         In another terminal:\n\n{export}  \
         {program} topic create events\n  \
         echo 'hello' | {program} produce events\n  \
         {program} consume events --until-end\n{describe}\n\
         Stop with Ctrl-C; the data is kept.\n",
        first.object_store.as_deref().unwrap_or("none"),
    );
    text
}

/// Returns the name by which this program was called, so that a user can copy the example commands.
fn program() -> String {
    std::env::args().next().unwrap_or_else(|| "strandline".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct BrokerLine {
        #[command(flatten)]
        dev: DevArgs,
    }

    fn dev(arguments: &[&str]) -> DevArgs {
        BrokerLine::parse_from(std::iter::once("dev").chain(arguments.iter().copied())).dev
    }

    #[test]
    fn cluster_brokers_have_own_directories_and_ports() {
        let configs = dev(&["--brokers", "3"]).cluster_configs(Path::new("/d")).expect("valid");
        let shown: Vec<String> = configs
            .iter()
            .map(|config| {
                let dir = config.broker.data_dir.display();
                format!("{} {dir} {} {}", config.broker.id, config.grpc.listen, config.http.listen)
            })
            .collect();
        assert_eq!(
            shown,
            [
                "1 /d/1 127.0.0.1:9460 127.0.0.1:9461",
                "2 /d/2 127.0.0.1:9462 127.0.0.1:9463",
                "3 /d/3 127.0.0.1:9464 127.0.0.1:9465",
            ]
        );
        assert!(configs.iter().all(|config| config.peer.listen.to_string() == "127.0.0.1:0"), "any free port");
        assert_eq!(configs[0].replication.default_factor, 3);
        assert_eq!(configs[0].topic_defaults.get("min.insync.replicas").map(String::as_str), Some("2"));
        assert_eq!(configs[0].object_store, configs[2].object_store);
        let two = dev(&["--brokers", "2", "--set", "broker.rack=a"]).cluster_configs(Path::new("/d")).expect("valid");
        assert_eq!((two[0].replication.default_factor, two[0].topic_defaults.len()), (2, 0));
        assert_eq!(two[1].broker.rack.as_deref(), Some("a"));
        let etcd =
            dev(&["--etcd", "http://127.0.0.1:1,http://127.0.0.1:2"]).cluster_configs(Path::new("/d")).expect("valid");
        assert_eq!((etcd.len(), etcd[0].metadata.etcd.len()), (1, 2));
    }

    /// Regression: every broker used `peer.listen`, which the second broker could not bind, and `peer.advertise`, so
    /// that no broker reached another one.
    #[test]
    fn address_of_one_broker_is_refused_for_several() {
        for (key, host) in [("grpc.advertise", "h"), ("peer.advertise", "h"), ("peer.listen", "127.0.0.1")] {
            let configs_of = |brokers: &str, port: u16| {
                let set = format!("{key}={host}:{port}");
                dev(&["--brokers", brokers, "--etcd", "http://a:1", "--set", &set]).cluster_configs(Path::new("/d"))
            };
            let error = configs_of("2", 9480).expect_err(key).to_string();
            assert!(error.contains(&format!("command line ({key}): {key} {host}:9480")), "{error}");
            configs_of("2", 0).expect("each broker has its own port");
            configs_of("1", 9480).expect("there is one broker");
        }
    }

    #[test]
    fn colliding_or_out_of_range_ports_are_refused() {
        let error =
            dev(&["--brokers", "2", "--http", "127.0.0.1:9462"]).cluster_configs(Path::new("/d")).expect_err("meet");
        assert!(error.to_string().contains("127.0.0.1:9462"), "{error}");
        let error =
            dev(&["--brokers", "3", "--listen", "127.0.0.1:65532"]).cluster_configs(Path::new("/d")).expect_err("end");
        assert!(error.to_string().contains("65532") && error.to_string().contains('3'), "{error}");
        let any = dev(&["--brokers", "3", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]);
        assert!(
            any.cluster_configs(Path::new("/d")).expect("valid").iter().all(|config| config.grpc.listen.port() == 0)
        );
    }

    #[test]
    fn standalone_and_cluster_directories_are_not_mixed() {
        let dir = tempfile::tempdir().expect("a folder");
        assert!(
            check_standalone_dir(dir.path()).is_ok() && check_cluster_dir(dir.path()).is_ok(),
            "both accept an empty directory"
        );
        let create_identity = |folder: &Path| {
            std::fs::create_dir_all(folder).expect("made");
            std::fs::write(folder.join(log::IDENTITY), "{}").expect("written");
        };
        create_identity(&dir.path().join("1"));
        assert!(check_standalone_dir(dir.path()).expect_err("etcd").to_string().contains("--etcd"));
        create_identity(&dir.path().join("2"));
        let error = check_standalone_dir(dir.path()).expect_err("a cluster").to_string();
        assert!(error.contains("--brokers 2"), "{error}");
        assert!(check_cluster_dir(dir.path()).is_ok());
        assert_eq!(excluded_brokers_warning(dir.path(), 2), None);
        let warning = excluded_brokers_warning(dir.path(), 1).expect("broker 2 is left out");
        assert!(warning.contains("only on broker 2 are") && warning.contains("--brokers is 2"), "{warning}");
        create_identity(dir.path());
        assert!(check_cluster_dir(dir.path()).is_err());
    }
}
