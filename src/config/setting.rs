//! Declares every setting once. Reading, checking, printing and `docs/configuration.md` use this list.

use super::value::size;

/// Values that a setting accepts, and their notation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
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
    pub(super) kind: Kind,
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
    ("peer", "The listener for the other brokers of the cluster. A broker alone opens none."),
    ("http", "Metrics and health."),
    ("metadata", "Where brokers agree."),
    ("object_store", "Where history goes. Credentials come from the vendor's usual environment, never from this file."),
    ("replication", "Copies on other brokers. The same on every broker."),
    ("controller", "What the broker that is the controller does by itself. The same on every broker."),
    ("log", "Segments and journal on local disk."),
    ("cache", "What is kept of reads from the object store."),
    ("tier", "Moving segments to the object store."),
    ("limits", "Bounds on what is under way."),
    ("telemetry", "What the broker says about itself."),
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
    Share { key: "log.tail_memory_bytes", sixteenths: 2, most: Some(128 * MIB) },
    Share { key: "cache.memory_bytes", sixteenths: 1, most: Some(128 * MIB) },
];

/// Section that accepts any topic configuration.
pub(super) const TOPIC_DEFAULTS: &str = "topic_defaults";

const fn setting(
    section: &'static str,
    name: &'static str,
    kind: Kind,
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
        Kind::Text,
        Some("strandline"),
        "The cluster's name: 1 to 100 of a-z, A-Z, 0-9, '.', '_' and '-'.",
    ),
    setting(
        "broker",
        "id",
        Kind::Number { least: 0, most: 2_147_483_647 },
        Some("1"),
        "This broker's number: its own in the cluster, and the same for as long as its data directory lives.",
    ),
    setting(
        "broker",
        "rack",
        Kind::Text,
        None,
        "The rack or zone that it stands in: replicas spread over racks. Unset: none.",
    ),
    setting("broker", "data_dir", Kind::Path, Some("./data"), "The directory for everything that it keeps on disk."),
    setting(
        "broker",
        "disk_full_percent",
        Kind::Number { least: 1, most: 100 },
        Some("85"),
        "How full the disk of data_dir is, in percent, when the broker is given no new replicas any more; again below five percent less. 100 is never.",
    ),
    setting(
        "broker",
        "max_replicas",
        Kind::Number { least: 1, most: 10_000_000 },
        None,
        "How many replicas of partitions are placed on this broker at most. Each takes memory, also while nobody uses it.",
    ),
    setting(
        "broker",
        "shutdown_timeout",
        Kind::Time { least: 0, most: DAY },
        Some("30s"),
        "How long a stop waits for what is under way before it gives up on it.",
    ),
    setting(
        "broker",
        "catch_up_timeout",
        Kind::Time { least: 0, most: DAY },
        Some("60s"),
        "How long /readyz says at most that the broker is starting, because not all of its replicas have been in sync yet.",
    ),
    setting(
        "grpc",
        "listen",
        Kind::Listen,
        Some("127.0.0.1:9460"),
        "The address that it listens on for gRPC. Port 0 takes any free one.",
    ),
    setting(
        "grpc",
        "advertise",
        Kind::HostPort,
        None,
        "The address that clients reach it at. Unset: what it listens on. Needed when it listens on 0.0.0.0. Port 0 is the \
         port that it listens on.",
    ),
    setting(
        "grpc",
        "reflection",
        Kind::Flag,
        Some("true"),
        "Whether tools may ask for the description of what clients can call (gRPC server reflection).",
    ),
    setting(
        "peer",
        "listen",
        Kind::Listen,
        None,
        "The address that it listens on for other brokers; no client needs to reach it. Port 0 takes any free one.",
    ),
    setting(
        "peer",
        "advertise",
        Kind::HostPort,
        None,
        "The address that other brokers reach it at. Unset: the host of grpc.advertise, or, where that is unset, the address that it \
         listens on; with the port of peer.listen. Port 0 is the port that it listens on.",
    ),
    setting(
        "http",
        "listen",
        Kind::Listen,
        Some("127.0.0.1:9461"),
        "The address that it listens on for /metrics, /healthz and /readyz. Port 0 takes any free one.",
    ),
    setting(
        "metadata",
        "etcd",
        Kind::Urls,
        None,
        "The members of the etcd cluster in which brokers agree. Unset: this broker is alone, and metadata is kept in the data directory.",
    ),
    setting(
        "metadata",
        "etcd_ca",
        Kind::Path,
        None,
        "The PEM file of the only authority to trust for https:// members. Unset: the system's authorities.",
    ),
    setting(
        "metadata",
        "etcd_cert",
        Kind::Path,
        None,
        "The PEM file of this broker's certificate, where etcd asks for one; goes with etcd_key. Unset: none.",
    ),
    setting("metadata", "etcd_key", Kind::Path, None, "The PEM file of that certificate's private key. Unset: none."),
    setting(
        "metadata",
        "etcd_user",
        Kind::Text,
        None,
        "The user at etcd; goes with etcd_password_file. Unset: no login.",
    ),
    setting(
        "metadata",
        "etcd_password_file",
        Kind::Path,
        None,
        "The file that holds that user's password and nothing else. Unset: no login.",
    ),
    setting(
        "metadata",
        "call_timeout",
        Kind::Time { least: 0, most: 10 },
        Some("1s"),
        "How long one call waits for one member of etcd before another is asked; at least 100ms.",
    ),
    setting(
        "metadata",
        "session_timeout",
        Kind::Time { least: 2, most: 60 },
        Some("6s"),
        "How long a broker that fell silent keeps its partitions. One whose process is gone is noticed sooner.",
    ),
    setting(
        "object_store",
        "url",
        Kind::Text,
        None,
        "s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, file:///directory or memory://. \
         Unset: history stays on local disk.",
    ),
    setting(
        "object_store",
        "endpoint",
        Kind::Text,
        None,
        "The URL of an S3-compatible server. Unset: the vendor's own.",
    ),
    setting("object_store", "region", Kind::Text, None, "The bucket's region. Unset: AWS_REGION, or us-east-1."),
    setting(
        "object_store",
        "path_style",
        Kind::Flag,
        None,
        "Whether the bucket is named in the path and not in the host's name. Unset: where an endpoint is named, because most \
         S3-compatible servers want it so.",
    ),
    setting(
        "replication",
        "default_factor",
        Kind::Number { least: 1, most: 32 },
        Some("1"),
        "How many brokers hold each partition of a topic whose creation does not say.",
    ),
    setting(
        "replication",
        "lag_time",
        Kind::Time { least: 1, most: HOUR },
        Some("6s"),
        "How long a replica may take to reach what the log end was before writes wait for it no longer.",
    ),
    setting(
        "replication",
        "catchup_bytes_per_second",
        Kind::Bytes { least: 0, most: TIB },
        Some("0"),
        "How fast replicas that are not in sync copy from this broker, all of one broker together; 0 is as fast as they can.",
    ),
    setting(
        "controller",
        "replace_after",
        Kind::Time { least: 0, most: 365 * DAY },
        Some("30m"),
        "How long a broker is gone before its replicas are made anew on others; 0 is never.",
    ),
    setting(
        "controller",
        "moves_at_once",
        Kind::Number { least: 1, most: 10_000 },
        Some("8"),
        "How many partitions are moved to other brokers at the same time.",
    ),
    setting(
        "controller",
        "balance",
        Kind::Flag,
        Some("true"),
        "Whether partitions move to brokers that hold fewer, such as new ones.",
    ),
    setting(
        "log",
        "journal_bytes",
        Kind::Bytes { least: 16 * MIB, most: TIB },
        Some("256MiB"),
        "The size of the journal, the ring of files that makes appends durable.",
    ),
    setting(
        "log",
        "journal_dir",
        Kind::Path,
        None,
        "A directory for the journal on a device of its own. Unset: in the data directory.",
    ),
    setting(
        "log",
        "accept_journal_loss",
        Kind::Flag,
        Some("false"),
        "Whether to start without the journal of a data directory that was not stopped cleanly. What was acknowledged and is in that \
         journal alone is lost: set it for one start, when the journal's device is gone for good.",
    ),
    setting(
        "log",
        "tail_memory_bytes",
        Kind::Bytes { least: MIB, most: TIB },
        None,
        "How much of the newest batches of all partitions is kept in memory for readers at the tail.",
    ),
    setting(
        "cache",
        "memory_bytes",
        Kind::Bytes { least: 2 * MIB, most: TIB },
        None,
        "How much of what was read from the object store is kept in memory. A read that needs several requests finds there what the earlier ones \
         brought.",
    ),
    setting(
        "cache",
        "disk_bytes",
        Kind::Bytes { least: 0, most: 1024 * TIB },
        Some("1GiB"),
        "How much of what was read from the object store more than once is kept on disk; 0 keeps none. Nothing is kept of \
         a store that is itself a folder (`file://`).",
    ),
    setting("cache", "dir", Kind::Path, None, "A directory for that. Unset: in the data directory."),
    setting(
        "tier",
        "upload_concurrency",
        Kind::Number { least: 1, most: 256 },
        Some("4"),
        "How many segments are uploaded at the same time.",
    ),
    setting(
        "tier",
        "garbage_grace",
        Kind::Time { least: 0, most: 3650 * DAY },
        Some("1h"),
        "How long an object that nothing refers to is kept before it is deleted. What a broker has uploaded and not committed yet is such an \
         object: a value below a few minutes is for trials, and may delete what a slow upload is about to commit.",
    ),
    setting(
        "tier",
        "upload_grace",
        Kind::Time { least: HOUR, most: 3650 * DAY },
        Some("1d"),
        "How old a multipart upload without an end must be before it counts as one that a killed broker left, and is ended \
         (s3 only). Longer than any upload of a segment may take.",
    ),
    setting(
        "tier",
        "check_interval",
        Kind::Time { least: 1, most: DAY },
        Some("5s"),
        "How often retention and uploads of each partition are looked at.",
    ),
    setting(
        "tier",
        "fetch_max_wait",
        Kind::Time { least: 1, most: 60 },
        Some("5s"),
        "How long a single read waits for records that exist and are in the object store, whatever the caller's max_wait_ms. Kafka's \
         remote.fetch.max.wait.ms (KIP-1018). A fetch that has begun goes on behind the call, and the next one finds what it brought.",
    ),
    setting(
        "limits",
        "memory_bytes",
        Kind::Bytes { least: 64 * MIB, most: 1024 * TIB },
        None,
        "How much memory clients can make the broker hold, all in all. Its parts are the settings whose default is a share of it. Where some \
         of them are set, the defaults of the others are shares of what is left.",
    ),
    setting(
        "limits",
        "produce_memory_bytes",
        Kind::Bytes { least: MIB, most: TIB },
        None,
        "How many bytes of batches may wait for their acknowledgement; above it producers are slowed down.",
    ),
    setting(
        "limits",
        "request_memory_bytes",
        Kind::Bytes { least: MIB, most: TIB },
        None,
        "How much memory requests may take until their batches wait for an acknowledgement. One connection gets a quarter of it. Where it is \
         used up, nothing is read from those who send, and requests that do not come end with OVERLOADED.",
    ),
    setting(
        "limits",
        "response_memory_bytes",
        Kind::Bytes { least: MIB, most: TIB },
        None,
        "How much memory responses with records may take until they have been sent. One connection gets a quarter of it. Where it is used up, \
         responses are small, and wait.",
    ),
    setting(
        "limits",
        "decompression_memory_bytes",
        Kind::Bytes { least: MIB, most: TIB },
        None,
        "How much memory opened batches may take, all together: for reads that ask for records, and for topics that set compression.type. \
         A batch takes up to three times the size of its records; a larger one is refused.",
    ),
    setting(
        "limits",
        "producer_ids_per_minute",
        Kind::Number { least: 1, most: 1_000_000 },
        Some("1000"),
        "How many idempotent producers one connection may begin in a minute. Batches with a producer id that the cluster never handed out \
         count as well.",
    ),
    setting(
        "limits",
        "connections_per_address",
        Kind::Number { least: 1, most: 1 << 30 },
        None,
        "How many connections one address, or one /64 of IPv6, may have to the gRPC listener, and to the HTTP listener; above it those that \
         are idle make room for new ones. Unset: half of the listener's places.",
    ),
    setting(
        "telemetry",
        "level",
        Kind::Text,
        Some("info"),
        "What is logged: error, warn, info, debug or trace, also by module (`info,strandline::tier=debug`).",
    ),
    setting(
        "telemetry",
        "format",
        Kind::Word(&["text", "json"]),
        Some("text"),
        "How log lines are written to standard error.",
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

impl Kind {
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
