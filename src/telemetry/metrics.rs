//! The metrics registry. Each metric is declared once: field, name, type and help, and `docs/metrics.md` is made from
//! the same lines.

use std::{fmt, fmt::Write as _, sync::Arc, sync::atomic::AtomicU64};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

/// The content type of [`Metrics::render`]: the text format that Prometheus reads.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// A gauge of bytes or things.
pub type Level = Gauge<u64, AtomicU64>;

/// Why something failed: the word of a `proto::fault::Reason`, of which there are few.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ReasonLabel {
    /// The word.
    pub reason: &'static str,
}

/// Where bytes were read from.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct SourceLabel {
    /// `memory`, `disk` or `bucket`
    pub source: &'static str,
}

/// Failures by reason.
#[derive(Clone, Debug, Default)]
pub struct Errors(Family<ReasonLabel, Counter>);

impl Errors {
    /// Counts one.
    pub fn count(&self, reason: &'static str) {
        self.0.get_or_create(&ReasonLabel { reason }).inc();
    }
}

/// One counter for each place that bytes are read from.
#[derive(Clone, Debug)]
pub struct BySource {
    family: Family<SourceLabel, Counter>,
    /// The tail in memory.
    pub memory: Counter,
    /// Segments on local disk.
    pub disk: Counter,
    /// The object store, or what is cached of it.
    pub bucket: Counter,
}

impl Default for BySource {
    fn default() -> Self {
        let family = Family::<SourceLabel, Counter>::default();
        // Made once: counting is then one addition, and all three are there from the start.
        let [memory, disk, bucket] =
            ["memory", "disk", "bucket"].map(|source| family.get_or_create(&SourceLabel { source }).clone());
        Self { family, memory, disk, bucket }
    }
}

/// Seconds from 50 µs to 26 s, each bucket double the one before.
#[derive(Clone, Debug)]
struct Seconds;

impl Seconds {
    fn histogram() -> Histogram {
        Histogram::new(exponential_buckets(0.000_05, 2.0, 20))
    }
}

/// What a declaration needs of its kind: a fresh one, the part that is registered, and its type in words.
trait Metric {
    const KIND: &'static str;
    const LABELS: &'static str = "";
    /// What the text format adds to the name.
    const SUFFIX: &'static str = "";
    fn fresh() -> Self;
    fn register(&self, registry: &mut Registry, name: &str, help: &str);
}

macro_rules! metric {
    ($kind:ty, $word:literal, $suffix:literal, $labels:literal, $fresh:expr, $part:expr) => {
        impl Metric for $kind {
            const KIND: &'static str = $word;
            const LABELS: &'static str = $labels;
            const SUFFIX: &'static str = $suffix;
            fn fresh() -> Self {
                $fresh
            }
            fn register(&self, registry: &mut Registry, name: &str, help: &str) {
                let part = $part;
                // The registry ends every help text with a full stop of its own.
                registry.register(name, help.trim_end_matches('.'), part(self));
            }
        }
    };
}
metric!(Counter, "counter", "_total", "", Self::default(), |m: &Self| m.clone());
metric!(Level, "gauge", "", "", Self::default(), |m: &Self| m.clone());
metric!(Histogram, "histogram", "", "", Seconds::histogram(), |m: &Self| m.clone());
metric!(Errors, "counter", "_total", "reason", Self::default(), |m: &Self| m.0.clone());
metric!(BySource, "counter", "_total", "source", Self::default(), |m: &Self| m.family.clone());

macro_rules! metrics {
    ($($field:ident: $kind:ty = $name:literal, $help:literal;)*) => {
        /// Every metric of a broker. Clones share them.
        #[derive(Clone)]
        pub struct Metrics {
            $(#[doc = $help] pub $field: $kind,)*
            registry: Arc<Registry>,
        }

        impl Metrics {
            /// A registry with every metric at zero.
            pub fn new() -> Self {
                let mut registry = Registry::default();
                $(
                    let $field = <$kind as Metric>::fresh();
                    Metric::register(&$field, &mut registry, $name, $help);
                )*
                Self { $($field,)* registry: Arc::new(registry) }
            }
        }

        /// Name in the text, type, labels, help.
        const DECLARED: &[(&str, &str, &str, &str, &str)] = &[$((
            $name, <$kind as Metric>::SUFFIX, <$kind as Metric>::KIND, <$kind as Metric>::LABELS, $help,
        )),*];
    };
}

metrics! {
    produce_requests: Counter = "strandline_produce_requests", "Batches that producers sent.";
    produce_records: Counter = "strandline_produce_records", "Records in acknowledged batches.";
    produce_bytes: Counter = "strandline_produce_bytes", "Bytes of acknowledged batches, as stored.";
    produce_errors: Errors = "strandline_produce_errors", "Batches that were refused or failed.";
    produce_ack_seconds: Histogram = "strandline_produce_ack_seconds", "Time from a batch's arrival to its acknowledgement.";
    produce_memory_bytes: Level = "strandline_produce_memory_bytes", "Bytes of batches that wait for their acknowledgement.";
    fetch_requests: Counter = "strandline_fetch_requests", "Fetch answers sent.";
    fetch_bytes: BySource = "strandline_fetch_bytes", "Bytes of batches sent to consumers, by where they were read.";
    fetch_errors: Errors = "strandline_fetch_errors", "Fetches of a partition that were refused or failed.";
    journal_rounds: Counter = "strandline_journal_rounds", "Writes to the journal, each with one sync.";
    journal_bytes: Counter = "strandline_journal_bytes", "Bytes written to the journal.";
    journal_sync_seconds: Histogram = "strandline_journal_sync_seconds", "Time of one write to the journal until it is durable.";
    disk_free_bytes: Level = "strandline_disk_free_bytes", "Free space where the data directory is.";
    disk_used_bytes: Level = "strandline_disk_used_bytes", "Bytes of segments on local disk.";
    tail_memory_bytes: Level = "strandline_tail_memory_bytes", "Bytes of the newest batches kept in memory.";
    tiered_bytes: Level = "strandline_tiered_bytes", "Bytes of batches in the object store.";
    tier_lag_records: Level = "strandline_tier_lag_records", "Records of tiered topics that are not yet in the object store.";
    tier_uploads: Counter = "strandline_tier_uploads", "Segments uploaded and committed.";
    tier_upload_bytes: Counter = "strandline_tier_upload_bytes", "Bytes of segments uploaded and committed.";
    tier_upload_failures: Counter = "strandline_tier_upload_failures", "Uploads that failed; each is tried again.";
    tier_objects_deleted: Counter = "strandline_tier_objects_deleted", "Objects deleted by retention and garbage collection.";
    garbage_searches: Counter = "strandline_garbage_searches", "Searches for what crashes and deletions left behind.";
    tier_uploads_ended: Counter = "strandline_tier_uploads_ended", "Multipart uploads of killed brokers that were ended.";
    tier_garbage_failures: Counter = "strandline_tier_garbage_failures", "What garbage collection could not list, read or take away; it is tried again.";
    cache_hits: Counter = "strandline_cache_hits", "Chunks of objects that were found in the cache.";
    cache_misses: Counter = "strandline_cache_misses", "Chunks of objects that were read from the object store.";
    partitions: Level = "strandline_partitions", "Partitions that this broker holds.";
    partitions_failed: Level = "strandline_partitions_failed", "Partitions that take no writes because of a fault.";
    connections: Level = "strandline_connections", "Open client connections.";
}

impl Metrics {
    /// Every metric in Prometheus's text format.
    pub fn render(&self) -> String {
        let mut out = String::new();
        encode(&mut out, &self.registry).expect("a string takes everything that is written");
        out
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

/// `docs/metrics.md`, whole.
pub fn docs() -> String {
    let mut out = String::from(
        "# Metrics\n\n<!-- Made from src/telemetry/metrics.rs; a test compares them and says how to make it again. -->\n\n\
         `GET /metrics` on the HTTP port answers in Prometheus's text format.\n\n\
         | name | type | labels | |\n| --- | --- | --- | --- |\n",
    );
    for (name, suffix, kind, labels, help) in DECLARED {
        let labels = if labels.is_empty() { String::new() } else { format!("`{labels}`") };
        let _ = writeln!(out, "| `{name}{suffix}` | {kind} | {labels} | {help} |");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_is_rendered_under_its_name() {
        let metrics = Metrics::new();
        metrics.produce_bytes.inc_by(7);
        metrics.produce_errors.count("DISK_FULL");
        metrics.fetch_bytes.disk.inc_by(9);
        metrics.produce_ack_seconds.observe(0.001);
        metrics.clone().disk_free_bytes.set(1 << 40);
        let text = metrics.render();
        for line in [
            "# TYPE strandline_produce_bytes counter",
            "# HELP strandline_produce_bytes Bytes of acknowledged batches, as stored.",
            "strandline_produce_bytes_total 7",
            "strandline_produce_errors_total{reason=\"DISK_FULL\"} 1",
            "strandline_fetch_bytes_total{source=\"disk\"} 9",
            "strandline_fetch_bytes_total{source=\"bucket\"} 0",
            "strandline_produce_ack_seconds_count 1",
            "strandline_disk_free_bytes 1099511627776",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }

    #[test]
    fn the_documentation_is_what_the_declarations_say() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/metrics.md");
        if std::env::var_os("STRANDLINE_WRITE_DOCS").is_some() {
            std::fs::write(path, docs()).expect("docs/ can be written");
        }
        let checked_in = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            checked_in == docs(),
            "docs/metrics.md differs from src/telemetry/metrics.rs: make it again with \
             `STRANDLINE_WRITE_DOCS=1 cargo test --lib telemetry::`"
        );
    }
}
