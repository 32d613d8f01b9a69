//! `strandline cluster`: `describe` shows the brokers, their load and all problems; `new-generation` follows the
//! restore of a metadata store. `health` has its own file.

use std::{path::PathBuf, process::ExitCode};

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::{
    CommonArgs,
    connect::{connect, explain_call},
    health::{ClusterHealth, INVALID_VALUE_REMEDY, state, unavailable, unreadable},
    output::{self, OutputFormat},
    retry_output::RetryMonitor,
    serve::environment,
};
use crate::{
    client::{BrokerDescription, BrokerStats, ClusterDescription},
    config::ConfigSources,
    model::BrokerId,
    server::raise_generation,
};

/// Cause of a blocked drain: a reassignment that has to end before the replica can move.
pub(super) const BLOCKED_REASSIGNMENT: &str = "a running reassignment waits for an offline broker";

/// Remedy for a blocked drain.
pub(super) const DRAIN_REMEDY: &str =
    "start, add or undrain brokers, free space, raise broker.max_replicas, or lower replication factors";

#[derive(Clone, Debug, Subcommand)]
pub(super) enum ClusterCommand {
    /// Show brokers, racks, epochs, load (leaders, replicas, bytes on disk), free disk, upload lag and the controller
    Describe,
    /// Print one line per impairment; exit with code 1 if there is any
    Health,
    NewGeneration(NewGenerationArgs),
}

/// Raise the cluster generation after a restore of etcd from a backup, while no broker runs
///
/// Reads one broker's configuration. Raises the generation in etcd above those in etcd and in the object store's
/// cluster.json, and then the one in cluster.json. Each broker raises the generation of its data directory at its next
/// start. A broker does not start while its data directory or the object store has a higher generation than etcd.
#[derive(Clone, Debug, Args)]
pub(super) struct NewGenerationArgs {
    /// Configuration file of one of the cluster's brokers
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Also exceed N: the highest generation in the error of a broker that does not start
    #[arg(long, value_name = "N", default_value_t = 0)]
    above: u64,
}

/// Runs a subcommand. `new-generation` connects to no broker: brokers must be stopped.
pub(super) async fn run(common: &CommonArgs, command: ClusterCommand) -> anyhow::Result<ExitCode> {
    if let ClusterCommand::NewGeneration(command) = &command {
        return new_generation(common, command).await;
    }
    let client = connect(common).await?;
    let described = async { client.admin().describe_cluster().await.map_err(|error| explain_call(&error)) };
    let cluster = RetryMonitor::new(&client).run_with_retry_output(None, described).await?;
    match command {
        // The function returned above for this subcommand.
        ClusterCommand::NewGeneration(_) => Ok(ExitCode::SUCCESS),
        ClusterCommand::Describe => {
            match common.output {
                OutputFormat::Json => output::json(&description(&cluster))?,
                OutputFormat::Text => output::line(&lines(&cluster))?,
            }
            Ok(ExitCode::SUCCESS)
        }
        ClusterCommand::Health => {
            let health = ClusterHealth::of(&cluster);
            match common.output {
                OutputFormat::Json => output::json(&health.json())?,
                OutputFormat::Text => output::line(&health.lines())?,
            }
            Ok(health.exit_code())
        }
    }
}

/// Raises the generation in the metadata store and in the object store, and prints the new one.
async fn new_generation(common: &CommonArgs, command: &NewGenerationArgs) -> anyhow::Result<ExitCode> {
    let settings = ConfigSources::new().read_file(&command.config)?.environment(environment()).load()?;
    let raised = Box::pin(raise_generation(&settings.config, command.above)).await?;
    match common.output {
        OutputFormat::Json => output::json(&json!({
            "generation": raised.generation,
            "before": raised.before,
            "object_store_before": raised.object_store_before,
            "object_store_error": raised.object_store_error,
        }))?,
        OutputFormat::Text => {
            output::line(&format!("the cluster generation is {}: start the brokers", raised.generation))?;
            if let Some(reason) = &raised.object_store_error {
                eprintln!("cluster.json was not updated ({reason}): the first broker that starts updates the file");
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Returns the description as text: totals, a table of the brokers, and one line per note.
fn lines(cluster: &ClusterDescription) -> String {
    let controller = cluster.controller.map_or_else(|| "none".to_owned(), |id| id.to_string());
    let mut lines = vec![
        format!("cluster {}  controller {controller}", cluster.name),
        format!(
            "{} in {}{}",
            output::count(cluster.partitions.into(), "partition"),
            output::count(cluster.topics.into(), "topic"),
            problems(cluster),
        ),
        String::new(),
    ];
    let header =
        ["BROKER", "ADDRESS", "RACK", "STATE", "EPOCH", "LEADS", "REPLICAS", "ON DISK", "FREE", "NOT UPLOADED"];
    lines.push(output::tabled(&header, &[0, 4, 5, 6, 7, 8, 9], cluster.brokers.iter().map(row).collect()));
    let notes: Vec<String> = staleness(cluster)
        .into_iter()
        .chain(unavailable(cluster))
        .chain(
            cluster
                .brokers
                .iter()
                .flat_map(|broker| notes(broker, first_invalid_placement_key(cluster), cluster.brokers.len() == 1)),
        )
        .chain(unreadable(cluster).map(|line| format!("{line}\n  {INVALID_VALUE_REMEDY}")))
        .collect();
    if !notes.is_empty() {
        lines.push(String::new());
        lines.extend(notes);
    }
    lines.join("\n")
}

/// Returns a warning if the description is stale because the responding broker gets no response from the metadata
/// store.
fn staleness(cluster: &ClusterDescription) -> Option<String> {
    let (broker, seconds) = (cluster.responder, cluster.metadata_staleness.as_secs());
    (!cluster.metadata_staleness.is_zero()).then(|| {
        format!(
            "the metadata store has not responded to broker {broker} for {seconds} s: this description is that old\n\
             broker {broker} changes no metadata until the metadata store responds; produce and fetch continue"
        )
    })
}

/// Returns a line with the number of partitions for each problem; empty if there is no problem.
fn problems(cluster: &ClusterDescription) -> String {
    let counts = [
        (cluster.leaderless, "without a leader"),
        (cluster.under_min_isr, "below min.insync.replicas"),
        (cluster.under_replicated, "under-replicated"),
        (cluster.reassigning, "being reassigned"),
    ];
    let problems: Vec<String> =
        counts.iter().filter(|(count, _)| *count > 0).map(|(count, problem)| format!("{count} {problem}")).collect();
    if problems.is_empty() { String::new() } else { format!("\n{}", problems.join(", ")) }
}

/// Returns a broker's row of the table. `?` stands for a value that a registered broker did not report, `-` for a value
/// that does not exist.
fn row(broker: &BrokerDescription) -> Vec<String> {
    let unknown = || if broker.alive { "?" } else { "-" }.to_owned();
    let (on_disk, free, lag) = match &broker.stats {
        Some(Ok(stats)) => (
            output::bytes(stats.segment_bytes),
            output::bytes(stats.free_bytes),
            output::count(stats.tier_lag_records, "record"),
        ),
        _ => (unknown(), unknown(), unknown()),
    };
    let or_dash = |text: &String| if text.is_empty() { "-".to_owned() } else { text.clone() };
    vec![
        broker.id.to_string(),
        or_dash(&broker.address),
        or_dash(&broker.rack),
        state(broker).to_owned(),
        if broker.alive { broker.broker_epoch.to_string() } else { "-".to_owned() },
        broker.leader_count.to_string(),
        broker.replica_count.to_string(),
        on_disk,
        free,
        lag,
    ]
}

/// Returns notes about a broker that the table does not contain. `unreadable_key` is a key whose value may hide
/// replicas, so a drained broker that seems empty must not be stopped. `standalone` is true if the cluster has no other
/// broker that could take over.
fn notes(broker: &BrokerDescription, unreadable_key: Option<&str>, standalone: bool) -> Vec<String> {
    let (id, mut notes) = (broker.id, Vec::new());
    let host = |address: &str| address.rsplit_once(':').map(|(host, _)| host.to_owned());
    if !broker.peer_address.is_empty() && host(&broker.peer_address) != host(&broker.address) {
        notes.push(format!("other brokers reach broker {id} at {}", broker.peer_address));
    }
    if !broker.alive && broker.replica_count > 0 {
        let replicas = output::count(broker.replica_count.into(), "replica");
        notes.push(format!("broker {id} is offline with {replicas}: start it, or run `strandline broker drain {id}`"));
    }
    if broker.draining_since_ms.is_some() {
        let remaining = output::count(broker.replica_count.into(), "replica");
        notes.push(match broker.replica_count {
            0 if unreadable_key.is_some() => {
                format!("broker {id} has no replicas in the readable metadata: do not stop it for good")
            }
            0 => format!("broker {id} is drained: it can be stopped for good"),
            _ if broker.blocked > 0 => format!(
                "broker {id} is draining: {remaining} to move (blocked: {}):\n  \
                 too few brokers can take replicas, {BLOCKED_REASSIGNMENT},\n  or there is no leader:\n  \
                 {DRAIN_REMEDY}",
                broker.blocked
            ),
            _ => format!("broker {id} is draining: {remaining} to move"),
        });
    }
    if broker.alive && broker.disk_full {
        let effect =
            if standalone { "appends are refused" } else { "leadership moves to other brokers where possible" };
        notes.push(format!(
            "the disk of broker {id} is full: {effect}\n  add disk space, or lower local.retention.* or retention.*"
        ));
    } else if broker.alive && broker.disk_pressure && !standalone {
        notes.push(format!(
            "broker {id} has disk pressure (broker.disk_pressure_percent): it gets no new replicas\n  \
             add disk space, or lower local.retention.* or retention.*"
        ));
    }
    if broker.alive && broker.max_replicas.is_some_and(|max| broker.replica_count >= max) {
        notes.push(format!(
            "broker {id} has {}, so broker.max_replicas is reached: it gets no new replicas",
            output::count(broker.replica_count.into(), "replica")
        ));
    }
    if broker.alive && broker.in_sync_count < broker.replica_count {
        notes.push(format!(
            "broker {id} has {} out of sync: they catch up by themselves while they have a leader,\n  \
             but failed ones and those of a stopping broker only after the broker's next start",
            output::count((broker.replica_count - broker.in_sync_count).into(), "replica")
        ));
    }
    match &broker.stats {
        Some(Ok(stats)) => notes.extend(stats_notes(id, stats)),
        Some(Err(error)) => notes.push(format!("no statistics of broker {id}: {error}")),
        None => {}
    }
    notes
}

/// Returns notes about the problems in a broker's own stats.
fn stats_notes(id: BrokerId, stats: &BrokerStats) -> impl Iterator<Item = String> {
    let regressed = stats.metadata_regressed.as_ref();
    let regressed =
        regressed.map(|reason| format!("broker {id} rejects admin operations (METADATA_REGRESSED): {reason}"));
    let failed = stats.failed.as_ref();
    let failed = failed.map(|reason| {
        format!(
            "broker {id} accepts no writes: {reason}\n  \
             repair its disk and restart it, or run `strandline broker drain {id}`"
        )
    });
    let store = stats.object_store.as_ref();
    let store = store.map(|reason| format!("no object store request of broker {id} has succeeded {reason}"));
    let maintenance = stats.maintenance.as_ref();
    let maintenance =
        maintenance.map(|reason| format!("uploads or retention fail on broker {id}, and are retried:\n  {reason}"));
    let future = stats.future_timestamps.as_ref();
    let future = future.map(|segments| {
        format!("broker {id} has records with future timestamps: {segments}\n  check the clocks of their producers")
    });
    [regressed, failed, store, maintenance, future].into_iter().flatten()
}

/// Returns the key of the first invalid topic or partition value; `None` if all are valid. Replicas in an invalid value
/// are missing from the counts of the description.
pub(super) fn first_invalid_placement_key(cluster: &ClusterDescription) -> Option<&str> {
    let mut keys = cluster.unreadable.iter().map(|unreadable| &*unreadable.key);
    keys.find(|key| key.contains("/topics/") || key.contains("/partitions/"))
}

/// Returns the description as JSON.
fn description(cluster: &ClusterDescription) -> Value {
    let unreadable = cluster.unreadable.iter().map(|value| json!({ "key": value.key, "error": value.error }));
    json!({
        "cluster": cluster.name,
        "controller": cluster.controller,
        "topics": cluster.topics,
        "partitions": cluster.partitions,
        "leaderless": cluster.leaderless,
        "under_replicated": cluster.under_replicated,
        "under_min_isr": cluster.under_min_isr,
        "reassigning": cluster.reassigning,
        "unavailable": cluster
            .unavailable
            .iter()
            .map(|(topic, partition)| json!({ "topic": topic, "partition": partition }))
            .collect::<Vec<_>>(),
        "brokers": cluster.brokers.iter().map(broker).collect::<Vec<_>>(),
        "unreadable": unreadable.collect::<Vec<_>>(),
        "metadata_staleness_ms": u64::try_from(cluster.metadata_staleness.as_millis()).unwrap_or(u64::MAX),
        "responder": cluster.responder,
    })
}

/// Returns a broker as JSON. Values that the broker did not report are null.
fn broker(broker: &BrokerDescription) -> Value {
    let stats = broker.stats.as_ref().and_then(|stats| stats.as_ref().ok());
    let non_empty = |text: &String| Some(text.clone()).filter(|text| !text.is_empty());
    json!({
        "id": broker.id,
        "state": state(broker),
        "alive": broker.alive,
        "address": non_empty(&broker.address),
        "http_address": non_empty(&broker.http_address),
        "peer_address": non_empty(&broker.peer_address),
        "rack": non_empty(&broker.rack),
        "broker_epoch": broker.alive.then_some(broker.broker_epoch),
        "version": non_empty(&broker.version),
        "draining_since_ms": broker.draining_since_ms,
        "blocked": broker.blocked,
        "disk_pressure": broker.disk_pressure,
        "disk_full": broker.disk_full,
        "max_replicas": broker.max_replicas,
        "leader_count": broker.leader_count,
        "replica_count": broker.replica_count,
        "in_sync_count": broker.in_sync_count,
        "segment_bytes": stats.map(|stats| stats.segment_bytes),
        "free_bytes": stats.map(|stats| stats.free_bytes),
        "tier_lag_records": stats.map(|stats| stats.tier_lag_records),
        "failed": stats.and_then(|stats| stats.failed.clone()),
        "object_store": stats.and_then(|stats| stats.object_store.clone()),
        "maintenance": stats.and_then(|stats| stats.maintenance.clone()),
        "future_timestamps": stats.and_then(|stats| stats.future_timestamps.clone()),
        "metadata_regressed": stats.and_then(|stats| stats.metadata_regressed.clone()),
        "error": broker.stats.as_ref().and_then(|stats| stats.as_ref().err()).map(ToString::to_string),
    })
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        client::UnreadableKey,
        cluster::{Regression, Revision},
        proto::error::{ApiError, ErrorCode},
    };

    fn running(id: u32, rack: &str) -> BrokerDescription {
        let stats = BrokerStats {
            segment_bytes: 3 << 30,
            free_bytes: 120 << 30,
            tier_lag_records: 3_456,
            ..BrokerStats::default()
        };
        BrokerDescription {
            id: BrokerId(id),
            alive: true,
            address: format!("127.0.0.1:946{}", (id - 1) * 2),
            http_address: format!("127.0.0.1:946{}", (id - 1) * 2 + 1),
            peer_address: format!("127.0.0.1:947{}", id - 1),
            rack: rack.to_owned(),
            broker_epoch: 40 + u64::from(id),
            version: "0.1.0".to_owned(),
            stopping: false,
            disk_pressure: false,
            disk_full: false,
            max_replicas: Some(10_000),
            draining_since_ms: None,
            blocked: 0,
            leader_count: 7,
            replica_count: 20,
            in_sync_count: 20,
            stats: Some(Ok(stats)),
        }
    }

    /// Returns a cluster of two brokers without any problem.
    pub(in crate::cli) fn healthy() -> ClusterDescription {
        ClusterDescription {
            name: "prod".to_owned(),
            controller: Some(BrokerId(1)),
            brokers: vec![running(1, "zone-a"), running(2, "zone-b")],
            topics: 3,
            partitions: 20,
            leaderless: 0,
            under_replicated: 0,
            under_min_isr: 0,
            reassigning: 0,
            unavailable: Vec::new(),
            unreadable: Vec::new(),
            metadata_staleness: Duration::ZERO,
            responder: BrokerId(1),
        }
    }

    /// Returns a cluster of five brokers. Broker 1 runs, 2 stops and does not report stats, 3 drains, 4 reports
    /// failures and a full disk, 5 is offline. The cluster has every other problem that a description can show. The
    /// texts are those that brokers send.
    pub(in crate::cli) fn unhealthy() -> ClusterDescription {
        let reason = "broker 2 does not respond: 127.0.0.1:9471: no response in 1s";
        let silent = ApiError::new(ErrorCode::NotReady, reason);
        let two = BrokerDescription { stopping: true, stats: Some(Err(silent)), in_sync_count: 18, ..running(2, "") };
        let draining = Some(1_790_000_000_000);
        let three =
            BrokerDescription { draining_since_ms: draining, blocked: 4, disk_pressure: true, ..running(3, "zone-c") };
        let three = BrokerDescription { peer_address: "10.0.0.3:9470".to_owned(), ..three };
        let regression = Regression::Revision { newest: Revision(9), returned: Revision(6) }.to_string();
        let failure = "cannot write the journal: Input/output error (os error 5)";
        let outage = "http://minio:9000: connection refused";
        let maintenance =
            "2 partitions (longest: orders/3, for 90 s): cannot upload the segment at 0: connection refused";
        let failed = BrokerStats {
            failed: Some(failure.to_owned()),
            object_store: Some(format!("for 75 s: {outage}")),
            maintenance: Some(maintenance.to_owned()),
            impaired: vec![
                format!("the data directory accepts no writes: {failure}; repair the disk and restart this broker"),
                "replicas that accept no writes after an error: 20; repair the disk and restart this broker".to_owned(),
                "disk full since 2026-11-25T14:00:00Z (75 s), appends are refused: add space, or lower \
                 local.retention.* or retention.*"
                    .to_owned(),
                format!(
                    "object store unavailable since 2026-11-25T14:00:00Z (75 s): {outage}; until a retry succeeds, \
                     segments stay on disk, and reads from the object store fail"
                ),
                regression.clone(),
                format!("uploads or retention fail, and are retried: {maintenance}"),
            ],
            not_ready: None,
            future_timestamps: Some("3 segments of 2 partitions, most in orders/3".to_owned()),
            metadata_regressed: Some(regression),
            ..BrokerStats::default()
        };
        let four = BrokerDescription {
            stats: Some(Ok(failed)),
            disk_pressure: true,
            disk_full: true,
            max_replicas: Some(20),
            ..running(4, "zone-a")
        };
        let five = BrokerDescription {
            alive: false,
            address: String::new(),
            http_address: String::new(),
            peer_address: String::new(),
            version: String::new(),
            broker_epoch: 0,
            leader_count: 1,
            replica_count: 1,
            in_sync_count: 1,
            stats: None,
            ..running(5, "")
        };
        let broken = UnreadableKey {
            key: "/strandline/prod/topics/x".to_owned(),
            error: "partitions is 0, allowed are 1 to 100000".to_owned(),
        };
        ClusterDescription {
            controller: None,
            brokers: vec![running(1, "zone-a"), two, three, four, five],
            leaderless: 1,
            under_replicated: 4,
            under_min_isr: 2,
            reassigning: 8,
            unavailable: vec![("orders".to_owned(), 3), ("audit".to_owned(), 0)],
            unreadable: vec![broken],
            metadata_staleness: Duration::from_millis(63_400),
            ..healthy()
        }
    }

    /// Returns the texts in a description that brokers sent.
    pub(in crate::cli) fn broker_texts(cluster: &ClusterDescription) -> Vec<String> {
        let stats = cluster.brokers.iter().filter_map(|broker| broker.stats.as_ref()?.as_ref().ok());
        let problems = stats.flat_map(|stats| stats.impaired.iter().chain(&stats.metadata_regressed));
        let invalid = cluster.unreadable.iter().flat_map(|unreadable| [&unreadable.key, &unreadable.error]);
        problems.chain(invalid).cloned().collect()
    }

    /// The replica count excludes partitions whose values are unreadable. So a permanent stop of a drained broker with
    /// the count 0 could lose the only replica of a partition.
    #[test]
    fn broker_is_not_drained_while_values_are_unreadable() {
        let empty = BrokerDescription { draining_since_ms: Some(1), replica_count: 0, ..running(1, "") };
        assert_eq!(
            notes(&empty, first_invalid_placement_key(&healthy()), false),
            ["broker 1 is drained: it can be stopped for good"]
        );
        let note = notes(&empty, first_invalid_placement_key(&unhealthy()), false).remove(0);
        assert!(note.ends_with("do not stop it for good"), "{note}");
    }

    #[test]
    fn cluster_description_matches_golden_files() {
        output::golden::lines("cluster-describe.txt", &lines(&healthy()));
        let cluster = unhealthy();
        output::golden::lines_with_texts("cluster-describe-unhealthy.txt", &lines(&cluster), &broker_texts(&cluster));
        let messages =
            ["DescribeClusterResponse", "BrokerDescription", "BrokerStats", "TopicPartition", "UnreadableKey"];
        output::golden::json("cluster-describe.json", &description(&cluster), &messages, &["state"]);
    }
}
