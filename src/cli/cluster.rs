//! `strandline cluster`: `describe` shows the brokers, their load and all problems; `new-generation` follows the
//! restore of a metadata store. `health` has its own file.

use std::{path::PathBuf, process::ExitCode};

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::{
    Common,
    connect::{connect, explain_order},
    health::Health,
    output::{self, Output},
    patience::Patience,
    serve::environment,
};
use crate::{
    client::{BrokerDescription, ClusterDescription},
    config::Sources,
    server::raise_generation,
};

/// Maximum number of unavailable partitions that a line lists.
const MOST_NAMED: usize = 8;

#[derive(Clone, Debug, Subcommand)]
pub(super) enum Cluster {
    /// Show brokers, racks, epochs, load (leaders, replicas, bytes on disk), free disk, upload lag and the controller
    Describe,
    /// Print what is impaired, one line each; exit with 1 while anything is
    Health,
    NewGeneration(NewGeneration),
}

/// Raise the cluster generation after etcd was restored from a backup, while no broker runs
///
/// It reads one broker's configuration, and raises the number in etcd above what etcd and the bucket's cluster.json have, then the bucket's.
/// Each broker raises its data directory's when it starts. A broker that finds a higher number in its directory or in the bucket than in
/// etcd does not start.
#[derive(Clone, Debug, Args)]
pub(super) struct NewGeneration {
    /// The configuration file of one of the cluster's brokers
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Go above this number too: the highest that a broker names which does not start
    #[arg(long, value_name = "N", default_value_t = 0)]
    above: u64,
}

pub(super) async fn run(common: &Common, command: Cluster) -> anyhow::Result<ExitCode> {
    if let Cluster::NewGeneration(command) = &command {
        return new_generation(common, command).await;
    }
    let client = connect(common).await?;
    let described = async { client.admin().describe_cluster().await.map_err(|error| explain_order(&error)) };
    let cluster = Patience::new(&client).over(None, described).await?;
    match command {
        // Handled above.
        Cluster::NewGeneration(_) => Ok(ExitCode::SUCCESS),
        Cluster::Describe => {
            match common.output {
                Output::Json => output::json(&description(&cluster))?,
                Output::Text => output::line(&lines(&cluster))?,
            }
            Ok(ExitCode::SUCCESS)
        }
        Cluster::Health => {
            let health = Health::of(&cluster);
            match common.output {
                Output::Json => output::json(&health.json())?,
                Output::Text => output::line(&health.lines())?,
            }
            Ok(health.exit_code())
        }
    }
}

async fn new_generation(common: &Common, command: &NewGeneration) -> anyhow::Result<ExitCode> {
    let settings = Sources::new().read_file(&command.config)?.environment(environment()).load()?;
    let raised = Box::pin(raise_generation(&settings.config, command.above)).await?;
    match common.output {
        Output::Json => output::json(&json!({
            "generation": raised.generation,
            "before": raised.before,
            "bucket_before": raised.bucket,
            "bucket_behind": raised.bucket_behind,
        }))?,
        Output::Text => {
            output::line(&format!("the cluster generation is {}: start the brokers", raised.generation))?;
            if let Some(why) = &raised.bucket_behind {
                eprintln!("the bucket could not be told yet ({why}): the first broker that starts tells it");
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn lines(cluster: &ClusterDescription) -> String {
    let controller = cluster.controller.map_or_else(|| "none".to_owned(), |id| id.to_string());
    let mut lines = vec![
        format!("cluster {}  controller {controller}", cluster.name),
        format!(
            "{} in {}{}",
            output::count(cluster.partitions.into(), "partition"),
            output::count(cluster.topics.into(), "topic"),
            troubles(cluster),
        ),
        String::new(),
    ];
    let header =
        ["BROKER", "ADDRESS", "RACK", "STATE", "EPOCH", "LEADERS", "REPLICAS", "ON DISK", "FREE", "UPLOAD LAG"];
    lines.push(output::tabled(&header, &[0, 4, 5, 6, 7, 8, 9], cluster.brokers.iter().map(row).collect()));
    let notes: Vec<String> = old_news(cluster)
        .into_iter()
        .chain(unavailable(cluster))
        .chain(
            cluster
                .brokers
                .iter()
                .flat_map(|broker| notes(broker, hides_replicas(cluster), cluster.brokers.len() == 1)),
        )
        .chain(unreadable(cluster))
        .collect();
    if !notes.is_empty() {
        lines.push(String::new());
        lines.extend(notes);
    }
    lines.join("\n")
}

/// Returns a warning if the description is stale because the responding broker gets no response from the metadata
/// store.
fn old_news(cluster: &ClusterDescription) -> Option<String> {
    let (broker, silence) = (cluster.answered_by, cluster.metadata_silence.as_secs());
    (!cluster.metadata_silence.is_zero()).then(|| {
        format!(
            "the metadata store has not answered broker {broker} for {silence} s: this is how the cluster was then\n\
             nothing of it changes until the metadata store answers; produce and fetch go on"
        )
    })
}

/// Returns a line with the partitions that accept no writes with `acks=all`.
fn unavailable(cluster: &ClusterDescription) -> Option<String> {
    let mut names: Vec<String> =
        cluster.unavailable.iter().take(MOST_NAMED).map(|(topic, number)| format!("{topic}/{number}")).collect();
    if cluster.unavailable.len() > MOST_NAMED {
        names.push("…".to_owned());
    }
    (!names.is_empty())
        .then(|| format!("cannot be written with acks=all: {} (`strandline topic describe` says why)", names.join(" ")))
}

/// Returns a line with the number of partitions for each problem; empty if there is no problem.
fn troubles(cluster: &ClusterDescription) -> String {
    let named = [
        (cluster.leaderless, "without a leader"),
        (cluster.below_minimum, "below the minimum in sync"),
        (cluster.under_replicated, "under-replicated"),
        (cluster.moving, "being moved"),
    ];
    let troubles: Vec<String> =
        named.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}")).collect();
    if troubles.is_empty() { String::new() } else { format!("\n{}", troubles.join(", ")) }
}

pub(super) fn state(broker: &BrokerDescription) -> &'static str {
    match (broker.alive, broker.stopping, broker.draining_since_ms) {
        (false, ..) => "gone",
        (true, true, _) => "stopping",
        (true, false, Some(_)) => "draining",
        (true, false, None) => "running",
    }
}

fn row(broker: &BrokerDescription) -> Vec<String> {
    let unknown = || if broker.alive { "?" } else { "-" }.to_owned();
    let (on_disk, free, lag) = match &broker.figures {
        Some(Ok(figures)) => (
            output::bytes(figures.segment_bytes),
            output::bytes(figures.free_bytes),
            figures.tier_lag_records.to_string(),
        ),
        _ => (unknown(), unknown(), unknown()),
    };
    let text = |text: &String| if text.is_empty() { "-".to_owned() } else { text.clone() };
    vec![
        broker.id.to_string(),
        text(&broker.address),
        text(&broker.rack),
        state(broker).to_owned(),
        if broker.alive { broker.broker_epoch.to_string() } else { "-".to_owned() },
        broker.leaders.to_string(),
        broker.replicas.to_string(),
        on_disk,
        free,
        lag,
    ]
}

/// Returns notes about a broker that the table does not contain.
fn notes(broker: &BrokerDescription, hidden: Option<&str>, alone: bool) -> Vec<String> {
    let (id, mut notes) = (broker.id, Vec::new());
    let host = |address: &str| address.rsplit_once(':').map(|(host, _)| host.to_owned());
    if !broker.peer_address.is_empty() && host(&broker.peer_address) != host(&broker.address) {
        notes.push(format!("other brokers reach broker {id} at {}", broker.peer_address));
    }
    if !broker.alive && broker.replicas > 0 {
        let held = output::count(broker.replicas.into(), "replica");
        notes.push(format!(
            "broker {id} is gone and holds {held}: start it, or `broker drain {id}` replaces what it held"
        ));
    }
    if broker.draining_since_ms.is_some() {
        let left = output::count(broker.replicas.into(), "replica");
        notes.push(match broker.replicas {
            0 if hidden.is_some() => {
                format!("broker {id} holds nothing, as far as values can be read: do not stop it for good")
            }
            0 => format!("broker {id} is drained: it can be stopped for good"),
            _ if broker.stuck > 0 => format!(
                "broker {id} is being drained: {left} to move, and {} cannot: too few takers, or no leader",
                broker.stuck
            ),
            _ => format!("broker {id} is being drained: {left} to move"),
        });
    }
    if broker.alive && broker.no_room {
        let others = if alone { "appends are refused" } else { "others lead what they can" };
        notes.push(format!("the disk of broker {id} has no room for records: {others}; add space"));
    } else if broker.alive && broker.disk_full && !alone {
        notes.push(format!("the disk of broker {id} is full (broker.disk_full_percent): it is given no new replicas"));
    }
    if broker.alive && broker.max_replicas.is_some_and(|max| broker.replicas >= max) {
        notes.push(format!(
            "broker {id} holds {}, as many as it takes (broker.max_replicas): it is given no more",
            output::count(broker.replicas.into(), "replica")
        ));
    }
    if broker.alive && broker.in_sync < broker.replicas {
        notes.push(format!(
            "broker {id} is behind with {}",
            output::count((broker.replicas - broker.in_sync).into(), "replica")
        ));
    }
    match &broker.figures {
        Some(Ok(figures)) => {
            notes.extend(
                figures
                    .metadata_regressed
                    .iter()
                    .map(|why| format!("broker {id} refuses orders (METADATA_REGRESSED): {why}")),
            );
            notes.extend(figures.failed.iter().map(|why| format!("broker {id} takes no writes: {why}")));
            notes.extend(
                figures.object_store.iter().map(|why| format!("the object store serves broker {id} nothing, {why}")),
            );
            notes.extend(figures.upkeep.iter().map(|why| format!("broker {id} cannot upload or trim: {why}")));
            notes.extend(
                figures
                    .future_timestamps
                    .iter()
                    .map(|segments| format!("broker {id} holds timestamps in the future: {segments}")),
            );
        }
        Some(Err(fault)) => notes.push(format!("the figures of broker {id} are not known: {fault}")),
        None => {}
    }
    notes
}

/// Returns the key of an unusable value of a topic or partition. The replicas in such a value are not counted.
pub(super) fn hides_replicas(cluster: &ClusterDescription) -> Option<&str> {
    let mut keys = cluster.unreadable.iter().map(|unreadable| &*unreadable.key);
    keys.find(|key| key.contains("/topics/") || key.contains("/partitions/"))
}

fn unreadable(cluster: &ClusterDescription) -> impl Iterator<Item = String> + '_ {
    cluster
        .unreadable
        .iter()
        .map(|unreadable| format!("the value of {} cannot be used: {}", unreadable.key, unreadable.why))
}

fn description(cluster: &ClusterDescription) -> Value {
    let unreadable = cluster.unreadable.iter().map(|one| json!({ "key": one.key, "why": one.why }));
    json!({
        "name": cluster.name,
        "controller": cluster.controller,
        "topics": cluster.topics,
        "partitions": cluster.partitions,
        "leaderless": cluster.leaderless,
        "under_replicated": cluster.under_replicated,
        "below_minimum": cluster.below_minimum,
        "moving": cluster.moving,
        "unavailable": cluster
            .unavailable
            .iter()
            .map(|(topic, partition)| json!({ "topic": topic, "partition": partition }))
            .collect::<Vec<_>>(),
        "brokers": cluster.brokers.iter().map(broker).collect::<Vec<_>>(),
        "unreadable": unreadable.collect::<Vec<_>>(),
        "metadata_silence_ms": u64::try_from(cluster.metadata_silence.as_millis()).unwrap_or(u64::MAX),
        "answered_by": cluster.answered_by,
    })
}

fn broker(broker: &BrokerDescription) -> Value {
    let figures = broker.figures.as_ref().and_then(|figures| figures.as_ref().ok());
    let text = |text: &String| Some(text.clone()).filter(|text| !text.is_empty());
    json!({
        "id": broker.id,
        "state": state(broker),
        "alive": broker.alive,
        "address": text(&broker.address),
        "http_address": text(&broker.http_address),
        "peer_address": text(&broker.peer_address),
        "rack": text(&broker.rack),
        "broker_epoch": broker.alive.then_some(broker.broker_epoch),
        "version": text(&broker.version),
        "draining_since_ms": broker.draining_since_ms,
        "stuck": broker.stuck,
        "disk_full": broker.disk_full,
        "no_room": broker.no_room,
        "max_replicas": broker.max_replicas,
        "leaders": broker.leaders,
        "replicas": broker.replicas,
        "in_sync": broker.in_sync,
        "segment_bytes": figures.map(|figures| figures.segment_bytes),
        "free_bytes": figures.map(|figures| figures.free_bytes),
        "tier_lag_records": figures.map(|figures| figures.tier_lag_records),
        "failed": figures.and_then(|figures| figures.failed.clone()),
        "object_store": figures.and_then(|figures| figures.object_store.clone()),
        "upkeep": figures.and_then(|figures| figures.upkeep.clone()),
        "future_timestamps": figures.and_then(|figures| figures.future_timestamps.clone()),
        "metadata_regressed": figures.and_then(|figures| figures.metadata_regressed.clone()),
        "unanswered": broker.figures.as_ref().and_then(|figures| figures.as_ref().err()).map(ToString::to_string),
    })
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        client::{BrokerFigures, UnreadableKey},
        model::BrokerId,
        proto::error::{ApiError, ErrorCode},
    };

    fn running(id: u32, rack: &str) -> BrokerDescription {
        let figures = BrokerFigures {
            segment_bytes: 3 << 30,
            free_bytes: 120 << 30,
            tier_lag_records: 123_456,
            ..BrokerFigures::default()
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
            disk_full: false,
            no_room: false,
            max_replicas: Some(10_000),
            draining_since_ms: None,
            stuck: 0,
            leaders: 7,
            replicas: 20,
            in_sync: 20,
            figures: Some(Ok(figures)),
        }
    }

    pub(in crate::cli) fn calm() -> ClusterDescription {
        ClusterDescription {
            name: "strandline".to_owned(),
            controller: Some(BrokerId(1)),
            brokers: vec![running(1, "zone-a"), running(2, "zone-b")],
            topics: 3,
            partitions: 20,
            leaderless: 0,
            under_replicated: 0,
            below_minimum: 0,
            moving: 0,
            unavailable: Vec::new(),
            unreadable: Vec::new(),
            metadata_silence: Duration::ZERO,
            answered_by: BrokerId(1),
        }
    }

    pub(in crate::cli) fn troubled() -> ClusterDescription {
        let silent = ApiError::new(ErrorCode::NotReady, "broker 2 did not answer within 1s");
        let two = BrokerDescription { stopping: true, figures: Some(Err(silent)), in_sync: 18, ..running(2, "") };
        let draining = Some(1_790_000_000_000);
        let three =
            BrokerDescription { draining_since_ms: draining, stuck: 4, disk_full: true, ..running(3, "zone-c") };
        let three = BrokerDescription { peer_address: "10.0.0.3:9470".to_owned(), ..three };
        let failed = BrokerFigures {
            failed: Some("the disk failed".to_owned()),
            object_store: Some("for 75 s: connection refused".to_owned()),
            upkeep: Some("2 partitions, orders/3 for 40 s: the upload failed: no such bucket".to_owned()),
            impaired: vec!["disk full since 2026-11-25T14:00:00Z (75 s): appends are refused".to_owned()],
            not_ready: None,
            future_timestamps: Some("3 segments of 2 partitions, most in orders/3".to_owned()),
            metadata_regressed: Some("its revision fell from 9 to 6".to_owned()),
            ..BrokerFigures::default()
        };
        let four = BrokerDescription {
            figures: Some(Ok(failed)),
            disk_full: true,
            no_room: true,
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
            leaders: 1,
            replicas: 1,
            in_sync: 1,
            figures: None,
            ..running(5, "")
        };
        let broken =
            UnreadableKey { key: "/strandline/strandline/topics/x".to_owned(), why: "expected value".to_owned() };
        ClusterDescription {
            controller: None,
            brokers: vec![running(1, "zone-a"), two, three, four, five],
            leaderless: 1,
            under_replicated: 4,
            below_minimum: 2,
            moving: 8,
            unavailable: vec![("orders".to_owned(), 3), ("audit".to_owned(), 0)],
            unreadable: vec![broken],
            metadata_silence: Duration::from_millis(63_400),
            ..calm()
        }
    }

    /// A permanent stop of such a broker could lose the only replica of a partition that was not counted.
    #[test]
    fn broker_is_not_drained_while_values_are_unreadable() {
        let empty = BrokerDescription { draining_since_ms: Some(1), replicas: 0, ..running(1, "") };
        assert_eq!(notes(&empty, hides_replicas(&calm()), false), ["broker 1 is drained: it can be stopped for good"]);
        let said = notes(&empty, hides_replicas(&troubled()), false).remove(0);
        assert!(said.ends_with("do not stop it for good"), "{said}");
    }

    #[test]
    fn cluster_description_matches_golden_files() {
        output::golden::lines("cluster-describe.txt", &lines(&calm()));
        output::golden::lines("cluster-describe-troubled.txt", &lines(&troubled()));
        output::golden::json("cluster-describe.json", &description(&troubled()));
    }
}
