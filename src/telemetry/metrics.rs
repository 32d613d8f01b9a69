//! The metrics registry. Each metric is declared once, with field, name, type and help; `docs/metrics.md` is generated from the
//! declarations.

use std::{fmt, fmt::Write as _, sync::Arc};

use prometheus_client::{
    encoding::text::encode,
    metrics::{counter::Counter, histogram::Histogram},
    registry::Registry,
};

use super::{
    exposition::{MetricsFormat, to_prometheus},
    families::{
        ControllerChangeCounters, ElectionCounters, ErrorCounters, GaugeF64, GaugeU64, MetricKind, PeerCounters,
        PeerGauges, PeerGaugesF64, RequestCounters, RequestHistograms, RoleCounters, SourceCounters,
    },
};

macro_rules! metrics {
    ($($field:ident: $kind:ty = $name:literal, $help:literal;)*) => {
        /// The metrics of a broker. Clones share them.
        #[derive(Clone)]
        pub struct Metrics {
            $(#[doc = $help] pub $field: $kind,)*
            registry: Arc<Registry>,
        }

        impl Metrics {
            /// Creates a registry with all metrics at zero.
            pub fn new() -> Self {
                let mut registry = Registry::default();
                $(
                    let $field = <$kind as MetricKind>::create();
                    MetricKind::register(&$field, &mut registry, $name, $help);
                )*
                Self { $($field,)* registry: Arc::new(registry) }
            }
        }

        /// Name, suffix in the text format, type, labels and help of each metric.
        const DECLARED: &[(&str, &str, &str, &str, &str)] = &[$((
            $name, <$kind as MetricKind>::SUFFIX, <$kind as MetricKind>::KIND, <$kind as MetricKind>::LABELS, $help,
        )),*];
    };
}

metrics! {
    produce_requests: Counter = "strandline_produce_requests", "Batches that producers sent.";
    produce_records: Counter = "strandline_produce_records", "Records in acknowledged batches.";
    produce_bytes: Counter = "strandline_produce_bytes", "Bytes of acknowledged batches, as stored.";
    produce_errors: ErrorCounters = "strandline_produce_errors", "Batches that were refused or failed.";
    produce_ack_seconds: Histogram = "strandline_produce_ack_seconds", "Time from a batch's arrival to its acknowledgement.";
    produce_memory_bytes: GaugeU64 = "strandline_produce_memory_bytes", "Bytes of batches that wait for their acknowledgement.";
    request_memory_bytes: GaugeU64 = "strandline_request_memory_bytes", "Bytes that requests take which are being read, or wait for produce memory.";
    response_memory_bytes: GaugeU64 = "strandline_response_memory_bytes", "Bytes of responses that are being made or sent.";
    fetch_requests: Counter = "strandline_fetch_requests", "Fetch answers sent.";
    fetch_bytes: SourceCounters = "strandline_fetch_bytes", "Bytes of batches sent to consumers, by where they were read.";
    fetch_role_bytes: RoleCounters = "strandline_fetch_role_bytes", "The same bytes, by what this broker was in the partition: consumers that name a rack are served by followers too.";
    fetch_errors: ErrorCounters = "strandline_fetch_errors", "Fetches of a partition that were refused or failed.";
    journal_rounds: Counter = "strandline_journal_rounds", "Writes to the journal, each with one sync.";
    journal_bytes: Counter = "strandline_journal_bytes", "Bytes written to the journal.";
    journal_sync_seconds: Histogram = "strandline_journal_sync_seconds", "Time of one write to the journal until it is durable.";
    disk_free_bytes: GaugeU64 = "strandline_disk_free_bytes", "Free space where the data directory is.";
    disk_used_bytes: GaugeU64 = "strandline_disk_used_bytes", "Bytes of segments on local disk.";
    tail_memory_bytes: GaugeU64 = "strandline_tail_memory_bytes", "Bytes of the newest batches kept in memory.";
    producer_state_bytes: GaugeU64 = "strandline_producer_state_bytes", "Bytes of what partitions remember of idempotent producers.";
    tiered_bytes: GaugeU64 = "strandline_tiered_bytes", "Bytes of batches in the object store.";
    tier_lag_records: GaugeU64 = "strandline_tier_lag_records", "Records of tiered topics that are not yet in the object store.";
    future_segments: GaugeU64 = "strandline_segments_with_future_timestamps", "Segments of partitions led here that hold timestamps still to come; their age counts from their writing. Of those in the bucket alone the oldest 256 of each partition with a retention limit are looked at.";
    tier_uploads: Counter = "strandline_tier_uploads", "Segments uploaded and committed.";
    tier_upload_bytes: Counter = "strandline_tier_upload_bytes", "Bytes of segments uploaded and committed.";
    tier_upload_failures: Counter = "strandline_tier_upload_failures", "Uploads that failed; each is tried again.";
    tier_objects_deleted: Counter = "strandline_tier_objects_deleted", "Objects deleted by retention and garbage collection.";
    garbage_searches: Counter = "strandline_garbage_searches", "Searches for what crashes and deletions left behind.";
    tier_uploads_ended: Counter = "strandline_tier_uploads_ended", "Multipart uploads of killed brokers that were ended.";
    tier_garbage_bytes: GaugeU64 = "strandline_tier_garbage_bytes", "Bytes of objects in the bucket that nothing names and that are younger than tier.garbage_grace, as the last search found them; on the controller.";
    tier_garbage_failures: Counter = "strandline_tier_garbage_failures", "What garbage collection could not list, read or take away; it is tried again.";
    cache_hits: Counter = "strandline_cache_hits", "Chunks of objects that were found in the cache.";
    cache_misses: Counter = "strandline_cache_misses", "Chunks of objects that were read from the object store.";
    partitions: GaugeU64 = "strandline_partitions", "Partitions that this broker holds.";
    partitions_failed: GaugeU64 = "strandline_partitions_failed", "Partitions that take no writes because of a fault.";
    connections: GaugeU64 = "strandline_connections", "Open client connections.";
    connections_refused: Counter = "strandline_connections_refused", "Connections that found no place, because all have calls open; only probes are answered on them.";
    connections_evicted: Counter = "strandline_connections_evicted", "Idle connections that were closed to make room for new ones.";
    connections_closed_unread: Counter = "strandline_connections_closed_unread", "Connections that were closed because their clients left responses unread while others waited for the memory.";
    disk_full: GaugeU64 = "strandline_disk_full", "1 while the data directory's disk is fuller than broker.disk_full_percent, or records do not fit on it.";
    partitions_led: GaugeU64 = "strandline_partitions_led", "Partitions that this broker leads.";
    partitions_under_replicated: GaugeU64 = "strandline_partitions_under_replicated", "Partitions led here of which a replica that is to stay is not in sync.";
    partitions_below_minimum: GaugeU64 = "strandline_partitions_below_minimum", "Partitions led here with fewer replicas in sync than min.insync.replicas: acks=all is refused.";
    partitions_at_risk: GaugeU64 = "strandline_partitions_at_risk", "Partitions led here of which replicas that are not in sync may be elected (ELR).";
    partitions_leaderless: GaugeU64 = "strandline_partitions_leaderless", "Partitions of the whole cluster that no live broker leads, as the controller counts them; 0 on other brokers.";
    partitions_moving: GaugeU64 = "strandline_partitions_moving", "Partitions of the whole cluster whose replicas are being moved, as the controller counts them; 0 on other brokers.";
    isr_shrinks: Counter = "strandline_isr_shrinks", "Times that a partition led here lost an in-sync replica.";
    isr_expands: Counter = "strandline_isr_expands", "Times that a partition led here won an in-sync replica.";
    leader_epochs: Counter = "strandline_leader_epochs", "Times that this broker began to lead a partition.";
    elections: ElectionCounters = "strandline_elections", "Elections that this broker made: as the controller, or by an operator's order.";
    follower_lag_records: PeerGauges = "strandline_follower_lag_records", "Records of partitions led here that a broker with a replica has not acknowledged.";
    follower_lag_seconds: PeerGaugesF64 = "strandline_follower_lag_seconds", "Age of the oldest record led here that a broker with a replica has not acknowledged.";
    replication_sent_bytes: PeerCounters = "strandline_replication_sent_bytes", "Bytes of batches sent to brokers that follow here.";
    replication_received_bytes: PeerCounters = "strandline_replication_received_bytes", "Bytes of batches received from brokers that this one follows.";
    controller: GaugeU64 = "strandline_controller", "1 while this broker is the controller.";
    controller_terms: Counter = "strandline_controller_terms", "Times that this broker became the controller.";
    controller_steps: ControllerChangeCounters = "strandline_controller_steps", "Changes of partitions that this broker made as the controller.";
    metadata_requests: RequestCounters = "strandline_metadata_requests", "Requests to the metadata store.";
    metadata_request_seconds: RequestHistograms = "strandline_metadata_request_seconds", "Time of a request to the metadata store until it was answered or given up.";
    metadata_revision: GaugeU64 = "strandline_metadata_revision", "Revision of the metadata that this broker applied.";
    metadata_silence_seconds: GaugeF64 = "strandline_metadata_silence_seconds", "Time since the metadata store last let this broker's mirror know anything.";
    metadata_regressed: GaugeU64 = "strandline_metadata_regressed", "1 once the metadata store was found to have gone back, or to be another one: orders are refused until this broker is restarted.";
    metadata_listings: Counter = "strandline_metadata_listings", "Times that the whole metadata was listed: at the start, now and then, and when a watch broke.";
    lease_left_seconds: GaugeF64 = "strandline_lease_left_seconds", "Time that the lease of this broker's registration lives if it is not renewed; 0 while there is none.";
}

impl Metrics {
    /// Renders all metrics in this format.
    pub fn render(&self, format: MetricsFormat) -> String {
        let mut out = String::new();
        encode(&mut out, &self.registry).expect("a string takes everything that is written");
        match format {
            MetricsFormat::OpenMetrics => out,
            MetricsFormat::Prometheus => to_prometheus(&out),
        }
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

/// Generates `docs/metrics.md`.
pub fn docs() -> String {
    let mut out = String::from(
        "# Metrics\n\n<!-- Generated from src/telemetry/metrics.rs; a test compares them and names the command that generates it. -->\n\n\
         `GET /metrics` on the HTTP port returns OpenMetrics or the Prometheus text format, by the `Accept` header.\n\n\
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
    use std::time::Duration;

    use super::*;

    #[test]
    fn metrics_are_rendered_with_their_names_and_labels() {
        let metrics = Metrics::new();
        metrics.produce_bytes.inc_by(7);
        metrics.produce_errors.count("DISK_FULL");
        metrics.fetch_bytes.disk.inc_by(9);
        metrics.fetch_role_bytes.follower.inc_by(9);
        metrics.produce_ack_seconds.observe(0.001);
        metrics.clone().disk_free_bytes.set(1 << 40);
        metrics.elections.count("failed");
        metrics.metadata_requests.count("get", "done");
        metrics.metadata_request_seconds.observe("get", Duration::from_millis(1));
        metrics.replication_sent_bytes.of(2).inc_by(11);
        metrics.follower_lag_records.set_all([(2, 1), (3, 5)]);
        metrics.follower_lag_records.set_all([(3, 4)]);
        metrics.follower_lag_seconds.set_all([(3, Duration::from_millis(1500))]);
        let text = metrics.render(MetricsFormat::OpenMetrics);
        for line in [
            "# TYPE strandline_produce_bytes counter",
            "# HELP strandline_produce_bytes Bytes of acknowledged batches, as stored.",
            "strandline_produce_bytes_total 7",
            "strandline_produce_errors_total{reason=\"DISK_FULL\"} 1",
            "strandline_fetch_bytes_total{source=\"disk\"} 9",
            "strandline_fetch_bytes_total{source=\"bucket\"} 0",
            "strandline_fetch_role_bytes_total{role=\"follower\"} 9",
            "strandline_fetch_role_bytes_total{role=\"leader\"} 0",
            "strandline_produce_ack_seconds_count 1",
            "strandline_disk_free_bytes 1099511627776",
            "strandline_elections_total{cause=\"failed\"} 1",
            "strandline_elections_total{cause=\"unclean\"} 0",
            "strandline_metadata_requests_total{request=\"get\",outcome=\"done\"} 1",
            "strandline_metadata_request_seconds_count{request=\"get\"} 1",
            "strandline_replication_sent_bytes_total{peer=\"2\"} 11",
            "strandline_follower_lag_records{peer=\"3\"} 4",
            "strandline_follower_lag_seconds{peer=\"3\"} 1.5",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        assert!(!text.contains("follower_lag_records{peer=\"2\"}"), "a broker that follows no more has no lag");
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
            "docs/metrics.md differs from src/telemetry/metrics.rs: generate it with \
             `STRANDLINE_WRITE_DOCS=1 cargo test --lib telemetry::`"
        );
    }
}
