//! Declares every setting once: field, accepted values, default and documentation.
//!
//! The `settings!` list generates [`Config`] and [`SECTIONS`]. Reading, printing and `docs/configuration.md` use these
//! two and contain no list of settings. Only code for certain settings (`checks`, `addresses`, `memory`, `etcd`) names
//! settings.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use self::DefaultValue::{Fixed, MachineMemory, MemoryShare, PeerPort, ReplicasInMemory, Unset};
use super::value::{
    SettingValue,
    ValueKind::{self, Bytes, ClusterName, Flag, HostPort, Listen, Name, Number, Path, Text, Time, Urls},
    format_bytes,
};
use crate::{
    model::{BrokerId, ConfigMap},
    telemetry::LogFormat,
};

/// Key of the setting for the maximum memory that clients can make a broker use. [`MemoryShare`] defaults are shares of
/// its value.
pub(super) const MEMORY: &str = "limits.memory_bytes";

/// Section for the topic configuration of topics that do not set it themselves. It accepts each topic configuration
/// key.
pub(super) const TOPIC_DEFAULTS: &str = "topic_defaults";

/// Default port of the peer listener.
pub(super) const PEER_PORT: u16 = 9470;

/// Minimum of the default of `limits.memory_bytes`. A configured value may be lower.
pub(super) const MIN_MEMORY_BYTES: u64 = 512 << 20;

/// Memory of one idle replica. The default of `broker.max_replicas` is the number of such replicas that use as much
/// memory again as `limits.memory_bytes`. A replica that is written uses 20 KiB (docs/performance.md, `replicas`).
pub(super) const REPLICA_BYTES: u64 = 16 << 10;

const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;

// The bounds of `Time` are in milliseconds.
const SECOND: u64 = 1000;
const HOUR: u64 = 3600 * SECOND;
const DAY: u64 = 24 * HOUR;

/// One section of the configuration file.
#[derive(Debug)]
pub(super) struct Section {
    /// Name; empty for the top of the file.
    pub(super) name: &'static str,
    pub(super) doc: &'static str,
    pub(super) settings: &'static [Setting],
}

/// One setting.
#[derive(Debug)]
pub(super) struct Setting {
    /// `section.name`, or the name alone at the top of the file.
    pub(super) key: &'static str,
    pub(super) kind: ValueKind,
    pub(super) default: DefaultValue,
    /// Description. For an optional setting, it includes the behaviour without a value.
    pub(super) doc: &'static str,
}

impl Setting {
    /// Returns the setting with this key.
    pub(super) fn find(key: &str) -> Option<&'static Setting> {
        all().find(|setting| setting.key == key)
    }

    /// Returns the name of the section; empty for the top of the file.
    pub(super) fn section(&self) -> &'static str {
        self.key.rsplit_once('.').map_or("", |(section, _)| section)
    }

    /// Returns the name without the section.
    pub(super) fn name(&self) -> &'static str {
        self.key.rsplit_once('.').map_or(self.key, |(_, name)| name)
    }

    /// Returns the name of the environment variable.
    pub(super) fn variable(&self) -> String {
        variable(self.key)
    }
}

/// Value of a setting that no source sets.
#[derive(Clone, Copy, Debug)]
pub(super) enum DefaultValue {
    Fixed(&'static str),
    /// The setting stays unset. Its documentation describes this case.
    Unset,
    /// The IP address of `grpc.listen` with [`PEER_PORT`].
    PeerPort,
    /// A quarter of the memory of the machine or cgroup, but at least [`MIN_MEMORY_BYTES`].
    MachineMemory,
    /// This number of sixteenths of `limits.memory_bytes`, at most `max_bytes`; more would not increase the throughput.
    /// The default is smaller if other settings with such a default are set to more than their shares.
    MemoryShare {
        sixteenths: u64,
        max_bytes: Option<u64>,
    },
    /// One replica for each [`REPLICA_BYTES`] of `limits.memory_bytes`.
    ReplicasInMemory,
}

impl DefaultValue {
    /// Describes the default, for documentation.
    pub(super) fn describe(self) -> String {
        match self {
            Self::Fixed(text) => format!("`{text}`"),
            Self::Unset => "unset".to_owned(),
            Self::PeerPort => format!("the IP address of `grpc.listen`, port {PEER_PORT}"),
            Self::MachineMemory => {
                let min = format_bytes(MIN_MEMORY_BYTES);
                format!("a quarter of the memory of the machine or cgroup, at least {min}")
            }
            Self::MemoryShare { sixteenths, max_bytes } => {
                let share = match sixteenths {
                    1 => "a sixteenth".to_owned(),
                    2 => "an eighth".to_owned(),
                    4 => "a quarter".to_owned(),
                    count => format!("{count} sixteenths"),
                };
                let max = max_bytes.map(|max| format!(", at most {}", format_bytes(max))).unwrap_or_default();
                format!("{share} of `limits.memory_bytes`{max}")
            }
            Self::ReplicasInMemory => format!("one for each {} of `limits.memory_bytes`", format_bytes(REPLICA_BYTES)),
        }
    }
}

/// Returns all settings except the topic defaults.
pub(super) fn all() -> impl Iterator<Item = &'static Setting> {
    SECTIONS.iter().flat_map(|section| section.settings)
}

/// Returns the name of the environment variable for a key.
pub(super) fn variable(key: &str) -> String {
    format!("STRANDLINE_{}", key.replace('.', "_").to_uppercase())
}

macro_rules! settings {
    (
        $top_doc:literal {
            $($top:ident: $top_type:ty = $top_kind:expr, $top_default:expr, $top_setting_doc:literal;)*
        }
        $($section:ident: $config:ident, $section_doc:literal {
            $($name:ident: $type:ty = $kind:expr, $default:expr, $doc:literal;)*
        })*
    ) => {
        /// Effective values of all settings, with their types.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct Config {
            $(#[doc = $top_setting_doc] pub $top: $top_type,)*
            $(#[doc = $section_doc] pub $section: $config,)*
            /// Topic configuration of topics that do not set it themselves. `model::TopicConfig::resolve` has accepted
            /// it.
            pub topic_defaults: ConfigMap,
        }

        $(
            #[doc = $section_doc]
            #[derive(Clone, Debug, PartialEq, Eq)]
            pub struct $config {
                $(#[doc = $doc] pub $name: $type,)*
            }
        )*

        impl Config {
            /// Converts checked texts to typed values. `text` returns the text of a key; `None` means unset.
            pub(super) fn from_texts<'a>(text: impl Fn(&str) -> Option<&'a str>, topic_defaults: ConfigMap) -> Self {
                Self {
                    $($top: typed(text(stringify!($top))),)*
                    $($section: $config {
                        $($name: typed(text(concat!(stringify!($section), ".", stringify!($name)))),)*
                    },)*
                    topic_defaults,
                }
            }
        }

        /// All sections with their settings, in the order of the printed file.
        pub(super) const SECTIONS: &[Section] = &[
            Section {
                name: "",
                doc: $top_doc,
                settings: &[$(Setting {
                    key: stringify!($top), kind: $top_kind, default: $top_default, doc: $top_setting_doc,
                }),*],
            },
            $(Section {
                name: stringify!($section),
                doc: $section_doc,
                settings: &[$(Setting {
                    key: concat!(stringify!($section), ".", stringify!($name)),
                    kind: $kind,
                    default: $default,
                    doc: $doc,
                }),*],
            }),*
        ];
    };
}

/// Converts a checked text to the type of its field.
fn typed<T: SettingValue>(text: Option<&str>) -> T {
    T::from_text(text).expect("each text was checked, and a required setting has a default")
}

settings! {
    "The cluster." {
        cluster: String = ClusterName, Fixed("strandline"), "The cluster's name.";
    }

    broker: BrokerConfig, "This broker." {
        id: BrokerId = Number(0..=2_147_483_647), Fixed("1"),
            "Broker id: unique in the cluster, and unchanged as long as its data directory exists.";
        rack: Option<String> = Text, Unset,
            "Rack or zone of the broker: the replicas of a partition are spread over racks. Unset: none.";
        data_dir: PathBuf = Path, Fixed("./data"), "Data directory.";
        disk_pressure_percent: u64 = Number(1..=100), Fixed("85"),
            "Usage in percent of the disk of data_dir above which the broker gets no new replicas, until usage is five \
             percentage points lower. 100 means never.";
        max_replicas: u32 = Number(1..=10_000_000), ReplicasInMemory,
            "Maximum number of replicas that are placed on this broker. Each replica uses memory, even while it is \
             idle.";
        shutdown_timeout: Duration = Time(0..=DAY), Fixed("30s"),
            "Maximum time for which a stop waits for open calls. Before that, the broker transfers its leaderships, \
             for at most half of this time.";
        catch_up_timeout: Duration = Time(0..=DAY), Fixed("60s"),
            "Maximum time after the start for which /readyz fails because a replica has not been in sync yet.";
    }

    grpc: GrpcConfig, "The listener for clients." {
        listen: SocketAddr = Listen, Fixed("127.0.0.1:9460"),
            "Listen address for clients (gRPC). Port 0 selects a free port.";
        advertise: Option<String> = HostPort, Unset,
            "Address at which clients connect. Unset: the listen address. Required if grpc.listen is 0.0.0.0 or \
             `[::]`. Port 0 stands for the listen port.";
        reflection: bool = Flag, Fixed("true"), "Whether gRPC server reflection is served.";
    }

    peer: PeerListenerConfig,
        "The listener for the other brokers of the cluster. A standalone broker opens none." {
        listen: SocketAddr = Listen, PeerPort,
            "Listen address for other brokers; clients never connect to it. Port 0 selects a free port.";
        advertise: Option<String> = HostPort, Unset,
            "Address at which other brokers connect. Unset: the port of peer.listen with the host of grpc.advertise. \
             Without grpc.advertise, or if peer.listen has port 0 and one IP address, the host is that of peer.listen, \
             or of grpc.listen if peer.listen is 0.0.0.0 or `[::]`. Port 0 stands for the listen port.";
    }

    http: HttpConfig, "Metrics and health." {
        listen: SocketAddr = Listen, Fixed("127.0.0.1:9461"),
            "Listen address for /metrics, /healthz and /readyz. Port 0 selects a free port.";
    }

    metadata: MetadataConfig, "The metadata store." {
        etcd: Vec<String> = Urls, Unset,
            "Members of the etcd cluster that stores the metadata. Unset: the broker is standalone and stores the \
             metadata in its data directory.";
        etcd_ca: Option<PathBuf> = Path, Unset,
            "PEM file of the only trusted certificate authority for https:// members. Unset: the system's authorities.";
        etcd_cert: Option<PathBuf> = Path, Unset,
            "PEM file of this broker's client certificate for etcd; requires etcd_key. Unset: none.";
        etcd_key: Option<PathBuf> = Path, Unset, "PEM file of the private key of etcd_cert. Unset: none.";
        etcd_user: Option<String> = Text, Unset, "User name at etcd; requires etcd_password_file. Unset: no login.";
        etcd_password_file: Option<PathBuf> = Path, Unset,
            "File that contains only the password of etcd_user. Unset: no login.";
        // With a timeout below 100 ms, a busy member would count as failed.
        request_timeout: Duration = Time(100..=10 * SECOND), Fixed("1s"),
            "Timeout of one request to one etcd member. Then the next member is tried, unless the request may have \
             changed the metadata.";
        session_timeout: Duration = Time(2 * SECOND..=60 * SECOND), Fixed("6s"),
            "Time after which an unresponsive broker loses the leadership of its partitions. The exit of its process \
             is detected sooner.";
    }

    object_store: ObjectStoreConfig,
        "The object store for sealed segments. Credentials come from the vendor's usual environment, never from \
         this file." {
        url: Option<String> = Text, Unset,
            "s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, file:///directory or memory://. Unset: all \
             segments stay on local disk.";
        endpoint: Option<String> = Text, Unset,
            "URL of an S3-compatible server, for s3:// URLs only. Unset: AWS_ENDPOINT_URL_S3, else AWS_ENDPOINT_URL, \
             else the endpoint of AWS.";
        region: Option<String> = Text, Unset,
            "Region of the bucket, for s3:// URLs only. Unset: AWS_REGION, else AWS_DEFAULT_REGION, else us-east-1.";
        path_style: Option<bool> = Flag, Unset,
            "Whether request URLs have the bucket name in the path instead of the host name. Unset: true if an \
             endpoint is set, because most S3-compatible servers require this. If the endpoint has an IP address, the \
             name is always in the path.";
    }

    replication: ReplicationConfig, "Copies on other brokers. Use the same values on every broker." {
        default_factor: u32 = Number(1..=32), Fixed("1"), "Replication factor of topics that are created without one.";
        max_lag_time: Duration = Time(SECOND..=HOUR), Fixed("6s"),
            "Maximum time for which an in-sync replica may lag behind the log end before it leaves the ISR.";
        catchup_bytes_per_second: Option<u64> = Bytes(0..=TIB), Fixed("0"),
            "Bytes per second that the out-of-sync replicas of all other brokers together copy from this broker; 0 \
             means no limit.";
    }

    controller: ControllerConfig, "Changes that the controller makes by itself. Use the same values on every broker." {
        replace_after: Option<Duration> = Time(0..=365 * DAY), Fixed("30m"),
            "Time after which the replicas of an offline broker are replaced on other brokers; 0 means never.";
        max_concurrent_reassignments: usize = Number(1..=10_000), Fixed("8"),
            "Maximum number of partitions that are reassigned at the same time. A reassignment that copies nothing may \
             start above the limit.";
        balance: bool = Flag, Fixed("true"),
            "Whether replicas move to brokers with fewer replicas, such as new brokers.";
    }

    log: LogConfig, "Segments and journal on local disk." {
        journal_bytes: u64 = Bytes(16 * MIB..=TIB), Fixed("256MiB"),
            "Maximum size of the journal, the write-ahead log of all partitions, in bytes.";
        journal_dir: Option<PathBuf> = Path, Unset,
            "Directory of the journal, for example on a separate device. Unset: in the data directory.";
        accept_journal_loss: bool = Flag, Fixed("false"),
            "Whether to start without the journal of a data directory that was not stopped cleanly. Acknowledged \
             records that are only in that journal are lost: set this for one start, if the journal's device is \
             permanently lost.";
        tail_cache_bytes: u64 = Bytes(MIB..=TIB), MemoryShare { sixteenths: 2, max_bytes: Some(128 * MIB) },
            "Bytes of the newest batches of all partitions that stay in memory for readers at the tail.";
    }

    cache: CacheConfig, "The cache for reads from the object store." {
        memory_bytes: u64 = Bytes(2 * MIB..=TIB), MemoryShare { sixteenths: 1, max_bytes: Some(128 * MIB) },
            "Bytes of segments, manifests and footers from the object store that are cached in memory.";
        disk_bytes: u64 = Bytes(0..=1024 * TIB), Fixed("1GiB"),
            "Bytes of repeated object store reads that are cached on disk; 0 means no disk cache. Reads from a \
             `file://` store are not cached on disk.";
        dir: Option<PathBuf> = Path, Unset, "Directory of the disk cache. Unset: in the data directory.";
    }

    tier: TierConfig, "Upload of segments, retention and deletion of objects." {
        upload_concurrency: usize = Number(1..=256), Fixed("4"),
            "Maximum number of segments that are uploaded at the same time.";
        garbage_grace: Duration = Time(0..=3650 * DAY), Fixed("1h"),
            "Minimum age at which garbage collection deletes an orphan object. An object that is uploaded and not \
             committed yet is an orphan too: a value below a few minutes is for trials, and may delete the objects of \
             a slow upload.";
        check_interval: Duration = Time(SECOND..=DAY), Fixed("5s"),
            "Interval between two checks of retention and uploads of each partition.";
        fetch_max_wait: Duration = Time(SECOND..=60 * SECOND), Fixed("5s"),
            "Maximum time for which one Read call waits for existing records in the object store or on disk, \
             regardless of its max_wait_ms. Kafka's remote.fetch.max.wait.ms (KIP-1018). A started fetch from the \
             object store continues after the call ends, and the next read finds its result.";
    }

    limits: LimitsConfig, "Limits on memory, connections and producer ids." {
        memory_bytes: u64 = Bytes(64 * MIB..=1024 * TIB), MachineMemory,
            "Maximum memory in bytes that clients can make the broker use, apart from connections and producer state. \
             The settings whose default is a share of it are its parts. If the parts that are set leave less than the \
             shares of the other parts, these divide the remaining memory.";
        produce_memory_bytes: u64 = Bytes(MIB..=TIB), MemoryShare { sixteenths: 4, max_bytes: Some(256 * MIB) },
            "Maximum bytes of batches that wait for their acknowledgement. At the limit, producers wait, and get \
             OVERLOADED after their timeout.";
        request_memory_bytes: u64 = Bytes(MIB..=TIB), MemoryShare { sixteenths: 3, max_bytes: None },
            "Maximum bytes of requests until their batches wait for an acknowledgement. One connection gets a quarter \
             of it. At the limit, the broker stops reading from senders, and requests that do not arrive in time end \
             with OVERLOADED.";
        response_memory_bytes: u64 = Bytes(MIB..=TIB), MemoryShare { sixteenths: 4, max_bytes: None },
            "Maximum bytes of responses until they are sent. One connection gets a quarter of it. At the limit, \
             responses are small and delayed, or end with OVERLOADED.";
        decompression_memory_bytes: u64 = Bytes(MIB..=TIB), MemoryShare { sixteenths: 2, max_bytes: Some(512 * MIB) },
            "Maximum bytes of all decompressed batches: for reads of decoded records, searches by time, and topics \
             that set compression.type. A batch uses two to three times the size of its records; a compressed batch \
             that needs more than seven eighths of the limit is refused.";
        producer_ids_per_minute: u32 = Number(1..=1_000_000), Fixed("1000"),
            "Maximum number of idempotent producers that one connection may start per minute. Batches with a producer \
             id that the cluster never issued count too.";
        connections_per_address: Option<usize> = Number(1..=1 << 30), Unset,
            "Maximum number of connections of one address, or one /64 of IPv6, to the gRPC listener, and to the HTTP \
             listener. Above it, a new connection replaces an idle one, or serves only probes. Unset: half of the \
             listener's connections.";
    }

    telemetry: TelemetryConfig, "Logging." {
        level: String = Text, Fixed("info"),
            "Log level: error, warn, info, debug or trace, also by module (`info,strandline::tier=debug`).";
        format: LogFormat = Name(&["text", "json"]), Fixed("text"), "Format of log lines on standard error.";
    }
}
