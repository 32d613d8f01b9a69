//! Declares every setting once. Reading, checking, printing and `docs/configuration.md` use this list.

use super::value::size;

/// Values that a setting accepts, and their notation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ValueKind {
    /// Any text that is not empty.
    Text,
    /// A path. A relative path starts at the working directory of the broker.
    Path,
    /// `ip:port`.
    Listen,
    /// `host:port`.
    HostPort,
    /// An integer in `least..=most`.
    Number { least: u64, most: u64 },
    /// A number of bytes in `least..=most`, optionally with KiB, MiB, GiB or TiB.
    Bytes { least: u64, most: u64 },
    /// A time in `least..=most` seconds, with a unit: `500ms`, `30s`, `5m`, `1h`, `7d`.
    Time { least: u64, most: u64 },
    /// `true` or `false`.
    Flag,
    /// One of these names.
    Word(&'static [&'static str]),
    /// URLs: an array in the file, a comma-separated list elsewhere.
    Urls,
}

/// One setting.
#[derive(Debug)]
pub(super) struct Setting {
    /// Section; empty for the top of the file.
    pub(super) section: &'static str,
    /// Name within the section.
    pub(super) name: &'static str,
    /// Accepted values.
    pub(super) kind: ValueKind,
    /// Default; `None` leaves the setting unset.
    pub(super) default: Option<&'static str>,
    /// Description in one line. For an optional setting, the line includes the behaviour without a value.
    pub(super) doc: &'static str,
}

const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;
const HOUR: u64 = 3600;
const DAY: u64 = 86_400;

/// Sections with their descriptions, in the order of the printed file.
pub(super) const SECTIONS: &[(&str, &str)] = &[
    ("", "The cluster."),
    ("broker", "This broker."),
    ("grpc", "The listener for clients."),
    ("peer", "The listener for the other brokers of the cluster. A standalone broker opens none."),
    ("http", "Metrics and health."),
    ("metadata", "The metadata store."),
    (
        "object_store",
        "The object store for sealed segments. Credentials come from the vendor's usual environment, \
        never from this file.",
    ),
    ("replication", "Copies on other brokers. The same on every broker."),
    ("controller", "Changes that the controller makes by itself. The same on every broker."),
    ("log", "Segments and journal on local disk."),
    ("cache", "The cache for reads from the object store."),
    ("tier", "Upload of segments, retention and deletion of objects."),
    ("limits", "Limits on memory, connections and producer ids."),
    ("telemetry", "Logging."),
];

/// Key of the total memory, of which [`MEMORY_SHARES`] are the shares.
pub(super) const MEMORY: &str = "limits.memory_bytes";

/// Description of the default of [`MEMORY`].
pub(super) const MEMORY_DEFAULT: &str = "a quarter of the memory of the machine or cgroup, at least 512MiB";

/// Key of the maximum number of replicas. Its default is the number of replicas that fit into as much memory as
/// [`MEMORY`].
pub(super) const REPLICAS: &str = "broker.max_replicas";

/// A setting whose default is a share of [`MEMORY`].
#[derive(Debug)]
pub(super) struct Share {
    pub(super) key: &'static str,
    /// Share, in sixteenths.
    pub(super) sixteenths: u64,
    /// Maximum default, in bytes: more memory would not increase the throughput.
    pub(super) most: Option<u64>,
}

/// Memory that clients can make a broker hold, by setting. The shares sum to the total.
pub(super) const MEMORY_SHARES: &[Share] = &[
    Share { key: "limits.produce_memory_bytes", sixteenths: 4, most: Some(256 * MIB) },
    Share { key: "limits.request_memory_bytes", sixteenths: 3, most: None },
    Share { key: "limits.response_memory_bytes", sixteenths: 4, most: None },
    Share { key: "limits.decompression_memory_bytes", sixteenths: 2, most: Some(512 * MIB) },
    Share { key: "log.tail_cache_bytes", sixteenths: 2, most: Some(128 * MIB) },
    Share { key: "cache.memory_bytes", sixteenths: 1, most: Some(128 * MIB) },
];

/// Section that accepts any topic configuration.
pub(super) const TOPIC_DEFAULTS: &str = "topic_defaults";

const fn setting(
    section: &'static str,
    name: &'static str,
    kind: ValueKind,
    default: Option<&'static str>,
    doc: &'static str,
) -> Setting {
    Setting { section, name, kind, default, doc }
}

/// All settings except the topic defaults, by section.
pub(super) const SETTINGS: &[Setting] = &[
    setting(
        "",
        "cluster",
        ValueKind::Text,
        Some("strandline"),
        "The cluster's name: 1 to 100 of a-z, A-Z, 0-9, '.', '_' and '-'.",
    ),
    setting(
        "broker",
        "id",
        ValueKind::Number { least: 0, most: 2_147_483_647 },
        Some("1"),
        "Broker id: unique in the cluster, and unchanged as long as its data directory exists.",
    ),
    setting(
        "broker",
        "rack",
        ValueKind::Text,
        None,
        "Rack or zone of the broker: the replicas of a partition are spread over racks. Unset: none.",
    ),
    setting("broker", "data_dir", ValueKind::Path, Some("./data"), "Data directory."),
    setting(
        "broker",
        "disk_pressure_percent",
        ValueKind::Number { least: 1, most: 100 },
        Some("85"),
        "Disk usage of data_dir in percent above which the broker gets no new replicas, until usage is five percent \
         lower. 100 means never.",
    ),
    setting(
        "broker",
        "max_replicas",
        ValueKind::Number { least: 1, most: 10_000_000 },
        None,
        "Maximum number of replicas on this broker. Each replica uses memory, even while it is idle.",
    ),
    setting(
        "broker",
        "shutdown_timeout",
        ValueKind::Time { least: 0, most: DAY },
        Some("30s"),
        "Maximum time for which a stop waits for work in progress.",
    ),
    setting(
        "broker",
        "catch_up_timeout",
        ValueKind::Time { least: 0, most: DAY },
        Some("60s"),
        "Maximum time for which /readyz reports a start because not all replicas have been in sync yet.",
    ),
    setting(
        "grpc",
        "listen",
        ValueKind::Listen,
        Some("127.0.0.1:9460"),
        "Listen address for clients (gRPC). Port 0 selects a free port.",
    ),
    setting(
        "grpc",
        "advertise",
        ValueKind::HostPort,
        None,
        "Address at which clients connect. Unset: the listen address. Required if grpc.listen is 0.0.0.0. Port 0 \
         stands for the listen port.",
    ),
    setting("grpc", "reflection", ValueKind::Flag, Some("true"), "Whether gRPC server reflection is served."),
    setting(
        "peer",
        "listen",
        ValueKind::Listen,
        None,
        "Listen address for other brokers; clients never connect to it. Port 0 selects a free port.",
    ),
    setting(
        "peer",
        "advertise",
        ValueKind::HostPort,
        None,
        "Address at which other brokers connect. Unset: the host of grpc.advertise, or of the listen address if that \
         is unset, with the port of peer.listen. Port 0 stands for the listen port.",
    ),
    setting(
        "http",
        "listen",
        ValueKind::Listen,
        Some("127.0.0.1:9461"),
        "Listen address for /metrics, /healthz and /readyz. Port 0 selects a free port.",
    ),
    setting(
        "metadata",
        "etcd",
        ValueKind::Urls,
        None,
        "Members of the etcd cluster that stores the metadata. Unset: the broker is standalone and stores the \
         metadata in its data directory.",
    ),
    setting(
        "metadata",
        "etcd_ca",
        ValueKind::Path,
        None,
        "PEM file of the only trusted certificate authority for https:// members. Unset: the system's authorities.",
    ),
    setting(
        "metadata",
        "etcd_cert",
        ValueKind::Path,
        None,
        "PEM file of this broker's client certificate for etcd; requires etcd_key. Unset: none.",
    ),
    setting("metadata", "etcd_key", ValueKind::Path, None, "PEM file of the private key of etcd_cert. Unset: none."),
    setting(
        "metadata",
        "etcd_user",
        ValueKind::Text,
        None,
        "User name at etcd; requires etcd_password_file. Unset: no login.",
    ),
    setting(
        "metadata",
        "etcd_password_file",
        ValueKind::Path,
        None,
        "File that contains only the password of etcd_user. Unset: no login.",
    ),
    setting(
        "metadata",
        "request_timeout",
        ValueKind::Time { least: 0, most: 10 },
        Some("1s"),
        "Timeout of one request to one etcd member, after which another member is tried; at least 100ms.",
    ),
    setting(
        "metadata",
        "session_timeout",
        ValueKind::Time { least: 2, most: 60 },
        Some("6s"),
        "Time after which an unresponsive broker loses its partitions. The exit of a process is detected sooner.",
    ),
    setting(
        "object_store",
        "url",
        ValueKind::Text,
        None,
        "s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, file:///directory or memory://. \
         Unset: all segments stay on local disk.",
    ),
    setting(
        "object_store",
        "endpoint",
        ValueKind::Text,
        None,
        "URL of an S3-compatible server. Unset: the vendor's endpoint.",
    ),
    setting(
        "object_store",
        "region",
        ValueKind::Text,
        None,
        "Region of the bucket. Unset: AWS_REGION, else us-east-1.",
    ),
    setting(
        "object_store",
        "path_style",
        ValueKind::Flag,
        None,
        "Whether request URLs have the bucket name in the path instead of the host name. Unset: true if an endpoint \
         is set, because most S3-compatible servers require this.",
    ),
    setting(
        "replication",
        "default_factor",
        ValueKind::Number { least: 1, most: 32 },
        Some("1"),
        "Replication factor of topics that are created without one.",
    ),
    setting(
        "replication",
        "max_lag_time",
        ValueKind::Time { least: 1, most: HOUR },
        Some("6s"),
        "Maximum time for which an in-sync replica may lag behind the log end before it leaves the ISR.",
    ),
    setting(
        "replication",
        "catchup_bytes_per_second",
        ValueKind::Bytes { least: 0, most: TIB },
        Some("0"),
        "Bytes per second that out-of-sync replicas of one broker copy from this broker, all together; 0 means no \
         limit.",
    ),
    setting(
        "controller",
        "replace_after",
        ValueKind::Time { least: 0, most: 365 * DAY },
        Some("30m"),
        "Time after which the replicas of an offline broker are replaced on other brokers; 0 means never.",
    ),
    setting(
        "controller",
        "max_concurrent_reassignments",
        ValueKind::Number { least: 1, most: 10_000 },
        Some("8"),
        "Maximum number of partitions that are reassigned at the same time.",
    ),
    setting(
        "controller",
        "balance",
        ValueKind::Flag,
        Some("true"),
        "Whether partitions move to brokers with fewer partitions, such as new brokers.",
    ),
    setting(
        "log",
        "journal_bytes",
        ValueKind::Bytes { least: 16 * MIB, most: TIB },
        Some("256MiB"),
        "Size of the journal, the write-ahead log of all partitions, in bytes.",
    ),
    setting(
        "log",
        "journal_dir",
        ValueKind::Path,
        None,
        "Directory of the journal, for example on a separate device. Unset: in the data directory.",
    ),
    setting(
        "log",
        "accept_journal_loss",
        ValueKind::Flag,
        Some("false"),
        "Whether to start without the journal of a data directory that was not stopped cleanly. Acknowledged records \
         that are only in that journal are lost: set this for one start, if the journal's device is permanently lost.",
    ),
    setting(
        "log",
        "tail_cache_bytes",
        ValueKind::Bytes { least: MIB, most: TIB },
        None,
        "Bytes of the newest batches of all partitions that stay in memory for readers at the tail.",
    ),
    setting(
        "cache",
        "memory_bytes",
        ValueKind::Bytes { least: 2 * MIB, most: TIB },
        None,
        "Bytes of object store reads that are cached in memory. A read of several requests finds the results of the \
         earlier requests there.",
    ),
    setting(
        "cache",
        "disk_bytes",
        ValueKind::Bytes { least: 0, most: 1024 * TIB },
        Some("1GiB"),
        "Bytes of repeated object store reads that are cached on disk; 0 means no disk cache. Reads from a `file://` \
         store are not cached on disk.",
    ),
    setting("cache", "dir", ValueKind::Path, None, "Directory of the disk cache. Unset: in the data directory."),
    setting(
        "tier",
        "upload_concurrency",
        ValueKind::Number { least: 1, most: 256 },
        Some("4"),
        "Maximum number of segments that are uploaded at the same time.",
    ),
    setting(
        "tier",
        "garbage_grace",
        ValueKind::Time { least: 0, most: 3650 * DAY },
        Some("1h"),
        "Time after which an orphan object is deleted. An object that is uploaded and not committed yet is an orphan \
         too: a value below a few minutes is for trials, and may delete the objects of a slow upload.",
    ),
    setting(
        "tier",
        "upload_grace",
        ValueKind::Time { least: HOUR, most: 3650 * DAY },
        Some("1d"),
        "Age at which an unfinished multipart upload counts as abandoned and is aborted (s3 only). Must exceed the \
         duration of any segment upload.",
    ),
    setting(
        "tier",
        "check_interval",
        ValueKind::Time { least: 1, most: DAY },
        Some("5s"),
        "Interval between two checks of retention and uploads of each partition.",
    ),
    setting(
        "tier",
        "fetch_max_wait",
        ValueKind::Time { least: 1, most: 60 },
        Some("5s"),
        "Maximum time for which one read waits for records in the object store, regardless of its max_wait_ms. Kafka's \
         remote.fetch.max.wait.ms (KIP-1018). A started fetch continues after the read ends, and the next read finds \
         its result.",
    ),
    setting(
        "limits",
        "memory_bytes",
        ValueKind::Bytes { least: 64 * MIB, most: 1024 * TIB },
        None,
        "Maximum memory in bytes that clients can make the broker use. The settings whose default is a share of it \
         are its parts. If some parts are set, the defaults of the other parts are shares of the remaining memory.",
    ),
    setting(
        "limits",
        "produce_memory_bytes",
        ValueKind::Bytes { least: MIB, most: TIB },
        None,
        "Maximum bytes of batches that wait for their acknowledgement; above it, producers are throttled.",
    ),
    setting(
        "limits",
        "request_memory_bytes",
        ValueKind::Bytes { least: MIB, most: TIB },
        None,
        "Maximum bytes of requests until their batches wait for an acknowledgement. One connection gets a quarter of \
         it. At the limit, the broker stops reading from senders, and requests that do not arrive in time end with \
         OVERLOADED.",
    ),
    setting(
        "limits",
        "response_memory_bytes",
        ValueKind::Bytes { least: MIB, most: TIB },
        None,
        "Maximum bytes of responses with records until they are sent. One connection gets a quarter of it. At the \
         limit, responses are small and delayed.",
    ),
    setting(
        "limits",
        "decompression_memory_bytes",
        ValueKind::Bytes { least: MIB, most: TIB },
        None,
        "Maximum bytes of all decompressed batches: for reads of decoded records, and for topics that set \
         compression.type. A batch uses up to three times the size of its records; a larger batch is refused.",
    ),
    setting(
        "limits",
        "producer_ids_per_minute",
        ValueKind::Number { least: 1, most: 1_000_000 },
        Some("1000"),
        "Maximum number of idempotent producers that one connection may start per minute. Batches with a producer id \
         that the cluster never issued count too.",
    ),
    setting(
        "limits",
        "connections_per_address",
        ValueKind::Number { least: 1, most: 1 << 30 },
        None,
        "Maximum number of connections of one address, or one /64 of IPv6, to the gRPC listener, and to the HTTP \
         listener; above it, new connections replace idle ones. Unset: half of the listener's connections.",
    ),
    setting(
        "telemetry",
        "level",
        ValueKind::Text,
        Some("info"),
        "Log level: error, warn, info, debug or trace, also by module (`info,strandline::tier=debug`).",
    ),
    setting(
        "telemetry",
        "format",
        ValueKind::Word(&["text", "json"]),
        Some("text"),
        "Format of log lines on standard error.",
    ),
];

impl Setting {
    /// Returns `section.name`, which flags and errors use.
    pub(super) fn key(&self) -> String {
        if self.section.is_empty() { self.name.to_owned() } else { format!("{}.{}", self.section, self.name) }
    }

    /// Returns the name of the environment variable.
    pub(super) fn variable(&self) -> String {
        variable(&self.key())
    }

    /// Returns the setting with this key.
    pub(super) fn find(key: &str) -> Option<&'static Setting> {
        SETTINGS.iter().find(|setting| setting.key() == key)
    }
}

/// Returns the name of the environment variable for a key.
pub(super) fn variable(key: &str) -> String {
    format!("STRANDLINE_{}", key.replace('.', "_").to_uppercase())
}

impl ValueKind {
    /// Describes the allowed values.
    pub(super) fn allowed(self) -> String {
        match self {
            Self::Text => "a text that is not empty".to_owned(),
            Self::Path => "a path".to_owned(),
            Self::Listen => "an IP address and a port, like 127.0.0.1:9460 or [::1]:9460".to_owned(),
            Self::HostPort => "a host name or IP address and a port, like broker-1.example:9460".to_owned(),
            Self::Number { least, most } => format!("a whole number from {least} to {most}"),
            Self::Bytes { least, most } => {
                format!("a number of bytes from {} to {}, like 1048576 or 64MiB", size(least), size(most))
            }
            Self::Time { least, most } => {
                let (least, most) = (time(least), time(most));
                format!("a time with its unit from {least} to {most}, like 500ms, 30s, 5m, 1h or 7d")
            }
            Self::Flag => "true or false".to_owned(),
            Self::Word(words) => words.join(" or "),
            Self::Urls => "URLs like http://127.0.0.1:2379".to_owned(),
        }
    }

    /// Returns true if the file quotes the value.
    pub(super) const fn quoted(self) -> bool {
        !matches!(self, Self::Number { .. } | Self::Flag | Self::Urls)
    }
}

fn time(seconds: u64) -> String {
    let whole =
        [(DAY, 'd'), (HOUR, 'h')].into_iter().find(|(unit, _)| seconds >= *unit && seconds.is_multiple_of(*unit));
    whole.map_or_else(|| format!("{seconds}s"), |(unit, letter)| format!("{}{letter}", seconds / unit))
}
