//! Configuration: settings from a file, the environment and the command line. Unknown settings are errors.
//!
//! `setting` declares each setting once. `sources` layers the given values over the defaults and checks each value.
//! [`LoadedConfig`] builds a typed [`Config`] from the result and checks the values against each other. All checks run
//! before the broker opens a file, binds a port or writes data.
//!
//! ```text
//! strandline.toml          environment                 printed by `strandline config print`
//! [grpc]
//! listen = "0.0.0.0:9460"  STRANDLINE_GRPC_LISTEN=…    listen = "0.0.0.0:9460" # strandline.toml:2:1
//! ```

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::fs::OFlags;

use self::sources::ResolvedValues;
use crate::{
    log::PrivateDir,
    model::{BrokerId, ConfigMap},
    telemetry,
};

mod build;
mod error;
mod etcd;
mod memory;
mod print;
mod setting;
mod sources;
mod value;

pub use error::{ConfigError, ConfigErrors, ValueSource};
pub use memory::default_memory_bytes;
pub use print::docs;
pub use sources::ConfigSources;

/// A configuration with the source of each value.
#[derive(Debug)]
pub struct LoadedConfig {
    /// Effective values.
    pub config: Config,
    values: ResolvedValues,
}

/// Effective values of all settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Name of the cluster.
    pub cluster: String,
    /// `[broker]`
    pub broker: BrokerConfig,
    /// `[grpc]`
    pub grpc: GrpcConfig,
    /// `[peer]`
    pub peer: PeerListenerConfig,
    /// `[http]`
    pub http: HttpConfig,
    /// `[metadata]`
    pub metadata: MetadataConfig,
    /// `[replication]`
    pub replication: ReplicationConfig,
    /// `[controller]`
    pub controller: ControllerConfig,
    /// `[object_store]`
    pub object_store: ObjectStoreConfig,
    /// `[topic_defaults]`: values that `model::TopicConfig` accepts.
    pub topic_defaults: ConfigMap,
    /// `[log]`
    pub log: LogConfig,
    /// `[cache]`
    pub cache: CacheConfig,
    /// `[tier]`
    pub tier: TierConfig,
    /// `[limits]`
    pub limits: LimitsConfig,
    /// `[telemetry]`
    pub telemetry: TelemetryConfig,
}

/// Settings of this broker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BrokerConfig {
    /// Broker id.
    pub id: BrokerId,
    /// Rack or zone of the broker.
    pub rack: Option<String>,
    /// Data directory.
    pub data_dir: PathBuf,
    /// Disk usage, in percent, above which the broker gets no new replicas; 100 means never.
    pub disk_pressure_percent: u64,
    /// Maximum number of replicas that are placed on the broker.
    pub max_replicas: u32,
    /// Maximum time that a stop waits for work in progress.
    pub shutdown_timeout: Duration,
    /// Maximum time that a start waits for its replicas to be in sync.
    pub catch_up_timeout: Duration,
}

/// Listener for clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrpcConfig {
    /// Address to bind. Port 0 binds any free port.
    pub listen: SocketAddr,
    /// Address `host:port` that is sent to clients; `None` means the bound address.
    pub advertise: Option<String>,
    /// True if the broker serves gRPC server reflection.
    pub reflection: bool,
}

impl GrpcConfig {
    /// Returns the address for clients, for a listener that is bound to `bound`. Port 0 becomes the bound port.
    pub fn advertised(&self, bound: SocketAddr) -> String {
        self.advertise.as_ref().map_or_else(|| bound.to_string(), |advertise| with_port_of(advertise, bound))
    }
}

/// Returns an advertised address in which the port of `bound` replaces port 0.
fn with_port_of(advertise: &str, bound: SocketAddr) -> String {
    match value::host_port(advertise) {
        Some((host, 0)) => format!("{host}:{}", bound.port()),
        _ => advertise.to_owned(),
    }
}

/// Listener for other brokers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerListenerConfig {
    /// Address to bind. Port 0 binds any free port.
    pub listen: SocketAddr,
    /// Address `host:port` that is sent to other brokers; `None` derives it from other addresses
    /// ([`PeerListenerConfig::advertised`]).
    pub advertise: Option<String>,
}

impl PeerListenerConfig {
    /// Returns the address for other brokers, for a peer listener that is bound to `bound`. Port 0 becomes the bound
    /// port. Without `advertise`, the host is that of `grpc.advertise`. If `grpc.advertise` is unset or does not apply,
    /// the host is that of `bound`, or that of `grpc.listen` if `bound` stands for all addresses.
    pub fn advertised(&self, bound: SocketAddr, grpc: &GrpcConfig) -> String {
        if let Some(advertise) = &self.advertise {
            return with_port_of(advertise, bound);
        }
        let everywhere = bound.ip().is_unspecified();
        // A port that the system chose cannot be configured outside this machine. Such a listener is as local as its
        // address, so `grpc.advertise` applies only if the listener is bound to all addresses.
        let clients = grpc.advertise.as_deref().filter(|_| everywhere || self.listen.port() != 0);
        match clients.and_then(value::host_port) {
            Some((host, _)) => format!("{host}:{}", bound.port()),
            None if everywhere => {
                // The copy keeps the scope id of an IPv6 address.
                let mut address = grpc.listen;
                address.set_port(bound.port());
                address.to_string()
            }
            None => bound.to_string(),
        }
    }
}

/// Listener for metrics and health.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpConfig {
    /// Address to bind. Port 0 binds any free port.
    pub listen: SocketAddr,
}

/// Metadata store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetadataConfig {
    /// Endpoints of etcd; empty means the embedded store.
    pub etcd: Vec<String>,
    /// PEM file of the only trusted certificate authority; `None` means the system's authorities.
    pub etcd_ca: Option<PathBuf>,
    /// PEM file of the broker's certificate.
    pub etcd_cert: Option<PathBuf>,
    /// PEM file of the private key of that certificate.
    pub etcd_key: Option<PathBuf>,
    /// User name at etcd.
    pub etcd_user: Option<String>,
    /// File with the password of that user.
    pub etcd_password_file: Option<PathBuf>,
    /// Timeout of one request to one etcd member.
    pub request_timeout: Duration,
    /// Lifetime of the registration's lease without renewal.
    pub session_timeout: Duration,
}

/// Replication of partitions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicationConfig {
    /// Replication factor of a topic whose creation request names none.
    pub default_factor: u32,
    /// Maximum time that an in-sync replica may be behind before the leader removes it from the ISR.
    pub max_lag_time: Duration,
    /// Rate limit for copying to replicas outside the ISR, in bytes per second; `None` means no limit.
    pub catchup_bytes_per_second: Option<u64>,
}

/// Changes that the controller plans without a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControllerConfig {
    /// Time after which the replicas of a missing broker are replaced; `None` means never.
    pub replace_after: Option<Duration>,
    /// Maximum number of partitions that are reassigned concurrently.
    pub max_concurrent_reassignments: usize,
    /// True if partitions move to brokers that have fewer.
    pub balance: bool,
}

/// Object store for sealed segments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectStoreConfig {
    /// URL of the object store; `None` keeps all segments on local disk.
    pub url: Option<String>,
    /// URL of an S3-compatible server.
    pub endpoint: Option<String>,
    /// Region of the bucket.
    pub region: Option<String>,
    /// True if request URLs name the bucket in the path and not in the host name; `None` means true if `endpoint` is
    /// set.
    pub path_style: Option<bool>,
}

/// Local segments and journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogConfig {
    /// Size of the journal, in bytes.
    pub journal_bytes: u64,
    /// Directory of the journal; `None` means inside the data directory.
    pub journal_dir: Option<PathBuf>,
    /// True if the broker may start without the journal of a data directory that was not stopped cleanly.
    pub accept_journal_loss: bool,
    /// Size of the tail cache, in bytes.
    pub tail_cache_bytes: u64,
}

/// Chunk cache for reads from the object store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheConfig {
    /// Size in memory, in bytes.
    pub memory_bytes: u64,
    /// Size on disk, in bytes; 0 means no disk cache.
    pub disk_bytes: u64,
    /// Directory of the disk cache; `None` means inside the data directory.
    pub dir: Option<PathBuf>,
}

/// Tiering of segments to the object store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TierConfig {
    /// Maximum number of concurrent uploads.
    pub upload_concurrency: usize,
    /// Age from which an object that no manifest references is deleted.
    pub garbage_grace: Duration,
    /// Age from which an unfinished multipart upload counts as abandoned.
    pub upload_grace: Duration,
    /// Interval between two checks of retention and uploads of a partition.
    pub check_interval: Duration,
    /// Maximum time that a unary read waits for records that exist in the object store.
    pub fetch_max_wait: Duration,
}

/// Limits on memory, producers and connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LimitsConfig {
    /// Maximum memory that clients can make the broker hold, in bytes.
    pub memory_bytes: u64,
    /// Maximum bytes of batches that wait for their acknowledgement.
    pub produce_memory_bytes: u64,
    /// Maximum bytes of requests until their batches wait for an acknowledgement.
    pub request_memory_bytes: u64,
    /// Maximum bytes of responses until they have been sent.
    pub response_memory_bytes: u64,
    /// Maximum bytes of decompressed batches.
    pub decompression_memory_bytes: u64,
    /// Maximum number of new producers per connection and minute.
    pub producer_ids_per_minute: u32,
    /// Maximum number of connections per address to the gRPC listener, and to the HTTP listener; `None` means half of
    /// the listener's places.
    pub connections_per_address: Option<usize>,
}

/// Logging.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TelemetryConfig {
    /// Log filter, in the syntax of `tracing_subscriber`'s `EnvFilter`.
    pub level: String,
    /// Format of log lines.
    pub format: telemetry::LogFormat,
}

impl Config {
    /// Creates the data directory if it does not exist, and verifies that it is writable.
    pub fn prepare_data_dir(&self) -> Result<(), ConfigError> {
        let path = &self.broker.data_dir;
        let prove = || -> io::Result<()> {
            let probe = Path::new(".writable");
            let dir = PrivateDir::make(path)?;
            dir.open_file(probe, OFlags::WRONLY | OFlags::CREATE)?;
            dir.remove(probe)
        };
        if let Some(file) = path.ancestors().find(|above| above.exists() && !above.is_dir()) {
            return Err(ConfigError::DataDirIsFile { path: path.clone(), file: file.to_owned() });
        }
        prove().map_err(|source| ConfigError::DataDir { path: path.clone(), source })
    }
}

#[cfg(test)]
mod tests;
