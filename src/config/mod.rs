//! Every setting: from a file, from the environment, from the command line; unknown ones are errors.
//!
//! `setting` declares each setting once. `sources` layers what is given over the defaults and checks each value;
//! [`Settings`] makes a typed [`Config`] of the result and checks what must go together. All of that happens before
//! anything is opened, listened on or written.
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

use self::sources::Values;
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

pub use error::{ConfigError, ConfigErrors, Source};
pub use memory::default_memory_bytes;
pub use print::docs;
pub use sources::Sources;

/// A configuration, and where each value comes from.
#[derive(Debug)]
pub struct Settings {
    /// The values.
    pub config: Config,
    values: Values,
}

/// Every setting's effective value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The cluster's name.
    pub cluster: String,
    /// `[broker]`
    pub broker: Broker,
    /// `[grpc]`
    pub grpc: Grpc,
    /// `[peer]`
    pub peer: PeerListener,
    /// `[http]`
    pub http: Http,
    /// `[metadata]`
    pub metadata: Metadata,
    /// `[replication]`
    pub replication: Replication,
    /// `[controller]`
    pub controller: Controller,
    /// `[object_store]`
    pub object_store: ObjectStore,
    /// `[topic_defaults]`: valid, as `model::TopicConfig` takes it.
    pub topic_defaults: ConfigMap,
    /// `[log]`
    pub log: Log,
    /// `[cache]`
    pub cache: Cache,
    /// `[tier]`
    pub tier: Tier,
    /// `[limits]`
    pub limits: Limits,
    /// `[telemetry]`
    pub telemetry: Telemetry,
}

/// This broker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broker {
    /// Its number.
    pub id: BrokerId,
    /// Its rack or zone.
    pub rack: Option<String>,
    /// Everything that it keeps on disk.
    pub data_dir: PathBuf,
    /// How full its disk is, in percent, when it is given no new replicas; 100 is never.
    pub disk_full_percent: u64,
    /// Most replicas that are placed on it.
    pub max_replicas: u32,
    /// How long a stop waits for what is under way.
    pub shutdown_timeout: Duration,
    /// How long a start may last because replicas are not in sync yet.
    pub catch_up_timeout: Duration,
}

/// The listener for clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grpc {
    /// What it listens on. Port 0 takes any free one.
    pub listen: SocketAddr,
    /// `host:port` that clients reach it at; `None` is what it listens on.
    pub advertise: Option<String>,
    /// Whether server reflection is there.
    pub reflection: bool,
}

impl Grpc {
    /// The address to tell others, given what the listener was bound to: port 0 becomes the port that it got.
    pub fn advertised(&self, bound: SocketAddr) -> String {
        self.advertise.as_ref().map_or_else(|| bound.to_string(), |advertise| with_port_of(advertise, bound))
    }
}

/// An advertised address, in which port 0 stands for the port that the listener got.
fn with_port_of(advertise: &str, bound: SocketAddr) -> String {
    match value::host_port(advertise) {
        Some((host, 0)) => format!("{host}:{}", bound.port()),
        _ => advertise.to_owned(),
    }
}

/// Where other brokers connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerListener {
    /// What it listens on. Port 0 takes any free one.
    pub listen: SocketAddr,
    /// `host:port` that other brokers reach it at; `None` is the host of the clients' address.
    pub advertise: Option<String>,
}

impl PeerListener {
    /// The address to tell other brokers, given what the listener was bound to, and what clients are told.
    pub fn advertised(&self, bound: SocketAddr, grpc: &Grpc) -> String {
        if let Some(advertise) = &self.advertise {
            return with_port_of(advertise, bound);
        }
        let everywhere = bound.ip().is_unspecified();
        // Of a listener whose port the system chose nobody outside can know: it is as local as its address.
        let clients = grpc.advertise.as_deref().filter(|_| everywhere || self.listen.port() != 0);
        match clients.and_then(value::host_port) {
            Some((host, _)) => format!("{host}:{}", bound.port()),
            None if everywhere => {
                // A copy keeps the scope of an IPv6 address.
                let mut address = grpc.listen;
                address.set_port(bound.port());
                address.to_string()
            }
            None => bound.to_string(),
        }
    }
}

/// Metrics and health.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Http {
    /// What it listens on. Port 0 takes any free one.
    pub listen: SocketAddr,
}

/// Where brokers agree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metadata {
    /// etcd's endpoints; empty is the embedded store.
    pub etcd: Vec<String>,
    /// The PEM file of the authority to trust; `None` is the system's.
    pub etcd_ca: Option<PathBuf>,
    /// The PEM file of the broker's certificate.
    pub etcd_cert: Option<PathBuf>,
    /// The PEM file of that certificate's key.
    pub etcd_key: Option<PathBuf>,
    /// The user at etcd.
    pub etcd_user: Option<String>,
    /// The file of its password.
    pub etcd_password_file: Option<PathBuf>,
    /// How long one call to one member may take.
    pub call_timeout: Duration,
    /// How long a lease of the registration lasts without being renewed.
    pub session_timeout: Duration,
}

/// Copies on other brokers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replication {
    /// Replicas of a partition of a topic whose creation does not say.
    pub default_factor: u32,
    /// How long a connected replica may be behind before it leaves the in-sync replicas.
    pub lag_time: Duration,
    /// How fast replicas that are not in sync copy from this broker; `None`: as fast as they can.
    pub catchup_bytes_per_second: Option<u64>,
}

/// What the controller does by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Controller {
    /// How long a broker is gone before its replicas are replaced; `None`: for ever.
    pub replace_after: Option<Duration>,
    /// Partitions that are moved at the same time.
    pub moves_at_once: usize,
    /// Whether partitions move to brokers that hold fewer.
    pub balance: bool,
}

/// Where history goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectStore {
    /// Where; `None` keeps history on local disk.
    pub url: Option<String>,
    /// The URL of an S3-compatible server.
    pub endpoint: Option<String>,
    /// The bucket's region.
    pub region: Option<String>,
    /// Whether the bucket is named in the path; where an endpoint is named if nobody says.
    pub path_style: Option<bool>,
}

/// Segments and journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// The journal's size.
    pub journal_bytes: u64,
    /// The journal's own directory; `None` is in the data directory.
    pub journal_dir: Option<PathBuf>,
    /// Whether to start without the journal of a directory that was not stopped cleanly.
    pub accept_journal_loss: bool,
    /// How much of all partitions' tails is kept in memory.
    pub tail_memory_bytes: u64,
}

/// What is kept of reads from the object store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cache {
    /// In memory.
    pub memory_bytes: u64,
    /// On disk; 0 is none.
    pub disk_bytes: u64,
    /// Its directory; `None` is in the data directory.
    pub dir: Option<PathBuf>,
}

/// Moving segments to the object store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tier {
    /// Uploads at the same time.
    pub upload_concurrency: usize,
    /// How long garbage is kept.
    pub garbage_grace: Duration,
    /// How long a multipart upload may take before it counts as abandoned.
    pub upload_grace: Duration,
    /// How often retention and uploads are looked at.
    pub check_interval: Duration,
    /// How long a single read waits for records that exist.
    pub fetch_max_wait: Duration,
}

/// Bounds on what is under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// What clients can make the broker hold, all in all.
    pub memory_bytes: u64,
    /// Bytes of batches that may wait for their acknowledgement.
    pub produce_memory_bytes: u64,
    /// Bytes that requests may take until their batches wait for an acknowledgement.
    pub request_memory_bytes: u64,
    /// Bytes that responses may take until they have been sent.
    pub response_memory_bytes: u64,
    /// Bytes that opened batches may take.
    pub decompression_memory_bytes: u64,
    /// New producers of one connection in a minute.
    pub producer_ids_per_minute: u32,
    /// Connections of one address to the listener for clients and to that for pages; `None` is half of the places.
    pub connections_per_address: Option<usize>,
}

/// What the broker says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Telemetry {
    /// What is logged, in the syntax of `tracing_subscriber`'s `EnvFilter`.
    pub level: String,
    /// How lines are written.
    pub format: telemetry::LogFormat,
}

impl Config {
    /// Makes the data directory where there is none, and proves that it can be written.
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
