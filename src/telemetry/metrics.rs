//! The metrics registry. Each metric is declared once, with field, name, type and help; `docs/metrics.md` is generated
//! from the declarations.

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
    produce_requests: Counter = "strandline_produce_requests", "Batches received from producers.";
    produce_records: Counter = "strandline_produce_records", "Records in acknowledged batches.";
    produce_bytes: Counter = "strandline_produce_bytes", "Bytes of acknowledged batches, as stored.";
    produce_errors: ErrorCounters = "strandline_produce_errors", "Batches that were refused or failed, by error code; with acks=0, only those that were refused before they were queued.";
    produce_ack_seconds: Histogram = "strandline_produce_ack_seconds", "Time in seconds from the arrival of a batch to its acknowledgement.";
    produce_memory_bytes: GaugeU64 = "strandline_produce_memory_bytes", "Bytes of batches that wait for acknowledgement; with acks=0 and acks=tiered, and after a timeout, until they are stored on this broker.";
    request_memory_bytes: GaugeU64 = "strandline_request_memory_bytes", "Bytes of requests that are being read or wait for produce memory.";
    response_memory_bytes: GaugeU64 = "strandline_response_memory_bytes", "Bytes of responses that are being built or sent, and of the state of fetches and reads that name more than 16 partitions.";
    fetch_requests: Counter = "strandline_fetch_requests", "Responses of fetch streams; responses to Read calls do not count.";
    fetch_bytes: SourceCounters = "strandline_fetch_bytes", "Bytes of batches sent to consumers, by source: memory, disk, or object_store, which includes the chunk cache.";
    fetch_role_bytes: RoleCounters = "strandline_fetch_role_bytes", "Bytes of batches sent to consumers, by the role of this broker in the partition; followers serve consumers that name a rack.";
    fetch_errors: ErrorCounters = "strandline_fetch_errors", "Fetches of a partition that were rejected or failed, by error code.";
    journal_writes: Counter = "strandline_journal_writes", "Writes to the journal, each with one sync.";
    journal_bytes: Counter = "strandline_journal_bytes", "Bytes written to the journal.";
    journal_sync_seconds: Histogram = "strandline_journal_sync_seconds", "Time in seconds from the start of a journal write until it is synced.";
    disk_free_bytes: GaugeU64 = "strandline_disk_free_bytes", "Free bytes on the disk of the data directory.";
    disk_used_bytes: GaugeU64 = "strandline_disk_used_bytes", "Bytes of segments on local disk.";
    tail_cache_bytes: GaugeU64 = "strandline_tail_cache_bytes", "Bytes of the newest batches in memory.";
    producer_state_bytes: GaugeU64 = "strandline_producer_state_bytes", "Bytes of producer state of all partitions in memory.";
    tiered_bytes: GaugeU64 = "strandline_tiered_bytes", "Bytes of batches in the object store, of the partitions with an open replica on this broker.";
    tier_lag_records: GaugeU64 = "strandline_tier_lag_records", "Records of tiered topics that are not in the object store yet, of all open replicas on this broker.";
    future_segments: GaugeU64 = "strandline_segments_with_future_timestamps", "Segments of led partitions with timestamps in the future. Retention counts their age from the time of writing. Of the segments that are only in the object store, the oldest 256 of each partition with a retention limit are counted.";
    tier_uploads: Counter = "strandline_tier_uploads", "Segments uploaded and committed.";
    tier_upload_bytes: Counter = "strandline_tier_upload_bytes", "Bytes of segments uploaded and committed.";
    maintenance_failures: Counter = "strandline_maintenance_failures", "Failed maintenance steps: uploads, and also reads of the manifest and commits of the log start; each is retried.";
    tier_objects_deleted: Counter = "strandline_tier_objects_deleted", "Objects deleted by garbage collection, also those of records that retention deleted.";
    garbage_collections: Counter = "strandline_garbage_collections", "Garbage collection runs.";
    tier_garbage_bytes: GaugeU64 = "strandline_tier_garbage_bytes", "Bytes of orphan objects younger than tier.garbage_grace, as of the last garbage collection run. In a cluster only the controller reports them; a former controller reports 0 at the latest an hour after its term.";
    garbage_collection_failures: Counter = "strandline_garbage_collection_failures", "Operations of garbage collection that failed; each is retried in the next run.";
    cache_hits: Counter = "strandline_cache_hits", "Object chunks read from the chunk cache.";
    cache_misses: Counter = "strandline_cache_misses", "Object chunks read from the object store.";
    partitions: GaugeU64 = "strandline_partitions", "Partitions with an open replica on this broker.";
    partitions_failed: GaugeU64 = "strandline_partitions_failed", "Partitions whose local replica accepts no writes after an error.";
    connections: GaugeU64 = "strandline_connections", "Open connections of the gRPC listener for clients.";
    connections_refused: Counter = "strandline_connections_refused", "Connections above the limit of their listener or address, while all connections within the limit had open calls. Such a connection serves only health checks until another connection ends or becomes idle.";
    connections_evicted: Counter = "strandline_connections_evicted", "Idle connections that were closed in favour of new ones.";
    connections_closed_unread: Counter = "strandline_connections_closed_unread", "Connections that were closed because their clients did not read responses while other calls waited for memory.";
    disk_pressure: GaugeU64 = "strandline_disk_pressure", "1 while the disk of the data directory is under disk pressure (broker.disk_pressure_percent), or records do not fit on it; else 0.";
    partitions_led: GaugeU64 = "strandline_partitions_led", "Partitions that this broker leads.";
    partitions_under_replicated: GaugeU64 = "strandline_partitions_under_replicated", "Led partitions with a replica that is not in sync; replicas that are being removed do not count.";
    partitions_under_min_isr: GaugeU64 = "strandline_partitions_under_min_isr", "Led partitions with fewer in-sync replicas than min.insync.replicas: acks=all and acks=tiered are refused.";
    partitions_with_elr: GaugeU64 = "strandline_partitions_with_elr", "Led partitions with eligible leader replicas (ELR) outside the ISR.";
    partitions_leaderless: GaugeU64 = "strandline_partitions_leaderless", "Partitions of the cluster without a live leader or without a readable value. In a cluster only the controller reports them; all other brokers report 0.";
    partitions_reassigning: GaugeU64 = "strandline_partitions_reassigning", "Partitions of the cluster that are being reassigned. In a cluster only the controller reports them; all other brokers report 0.";
    isr_shrinks: Counter = "strandline_isr_shrinks", "Replicas that left the ISR of led partitions; those that an election removed do not count.";
    isr_expands: Counter = "strandline_isr_expands", "Replicas that entered the ISR of led partitions.";
    leader_elections_won: Counter = "strandline_leader_elections_won", "Leader epochs in which this process started to lead. A standalone broker counts each partition at its start.";
    elections: ElectionCounters = "strandline_elections", "Elections that this broker ran, as the controller or for an admin operation, by cause. Causes: failed (the partition had no live leader), preferred, unclean, and controlled_shutdown (the leader is stopping, is drained or has a full disk, or its replica is being removed).";
    follower_lag_records: PeerGauges = "strandline_follower_lag_records", "Records of led partitions that a follower's broker has not acknowledged. Before its first acknowledgement to this leader, all records count that are not in the object store.";
    follower_lag_seconds: PeerGaugesF64 = "strandline_follower_lag_seconds", "Age in seconds of the oldest record of led partitions that a follower's broker has not acknowledged, counted at most from the start of this broker's leadership.";
    replication_sent_bytes: PeerCounters = "strandline_replication_sent_bytes", "Bytes of batches sent to followers.";
    replication_received_bytes: PeerCounters = "strandline_replication_received_bytes", "Bytes of batches received from leaders.";
    controller: GaugeU64 = "strandline_controller", "1 while this broker is the controller; else 0.";
    controller_terms: Counter = "strandline_controller_terms", "Terms of this broker as the controller.";
    controller_changes: ControllerChangeCounters = "strandline_controller_changes", "Changes of partitions that this broker committed as the controller, by reason.";
    metadata_requests: RequestCounters = "strandline_metadata_requests", "Requests to the metadata store, by kind and outcome.";
    metadata_request_seconds: RequestHistograms = "strandline_metadata_request_seconds", "Time in seconds from a request to the metadata store to its response, failure or timeout.";
    metadata_revision: GaugeU64 = "strandline_metadata_revision", "Revision of the metadata in this broker's metadata cache.";
    metadata_staleness_seconds: GaugeF64 = "strandline_metadata_staleness_seconds", "Time in seconds since this broker's metadata cache last received data from the metadata store; on a standalone broker, it grows while no metadata changes.";
    metadata_regressed: GaugeU64 = "strandline_metadata_regressed", "1 after the metadata store returned to an older state or was replaced by another store: admin operations are rejected until this broker is restarted; else 0.";
    metadata_lists: Counter = "strandline_metadata_lists", "Complete lists of the metadata: at the start, at intervals, and after a broken watch.";
    lease_remaining_seconds: GaugeF64 = "strandline_lease_remaining_seconds", "Time in seconds until the lease of this broker's registration expires if it is not renewed; 0 without a lease.";
}

impl Metrics {
    /// Renders all metrics in this format.
    pub fn render(&self, format: MetricsFormat) -> String {
        let mut out = String::new();
        encode(&mut out, &self.registry).expect("writing to a string cannot fail");
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

/// Returns the content of `docs/metrics.md`.
pub fn docs() -> String {
    let mut out = String::from(
        "# Metrics\n\n<!-- Generated from src/telemetry/metrics.rs; a test compares them and names the command that generates it. -->\n\n\
         `GET /metrics` on the HTTP port returns OpenMetrics or the Prometheus text format, by the `Accept` header.\n\
         The [glossary](glossary.md) defines the terms.\n\n\
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
    fn metrics_are_rendered_with_names_and_labels() {
        let metrics = Metrics::new();
        metrics.produce_bytes.inc_by(7);
        metrics.produce_errors.count("DISK_FULL");
        metrics.fetch_bytes.disk.inc_by(9);
        metrics.fetch_role_bytes.follower.inc_by(9);
        metrics.produce_ack_seconds.observe(0.001);
        metrics.clone().disk_free_bytes.set(1 << 40);
        metrics.elections.count("failed");
        metrics.metadata_requests.count("get", "ok");
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
            "strandline_fetch_bytes_total{source=\"object_store\"} 0",
            "strandline_fetch_role_bytes_total{role=\"follower\"} 9",
            "strandline_fetch_role_bytes_total{role=\"leader\"} 0",
            "strandline_produce_ack_seconds_count 1",
            "strandline_disk_free_bytes 1099511627776",
            "strandline_elections_total{cause=\"failed\"} 1",
            "strandline_elections_total{cause=\"unclean\"} 0",
            "strandline_metadata_requests_total{request=\"get\",outcome=\"ok\"} 1",
            "strandline_metadata_request_seconds_count{request=\"get\"} 1",
            "strandline_replication_sent_bytes_total{peer=\"2\"} 11",
            "strandline_follower_lag_records{peer=\"3\"} 4",
            "strandline_follower_lag_seconds{peer=\"3\"} 1.5",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        assert!(!text.contains("follower_lag_records{peer=\"2\"}"), "a broker that no longer follows has no lag");
    }

    #[test]
    fn documentation_matches_metrics() {
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
