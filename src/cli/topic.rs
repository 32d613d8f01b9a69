//! `strandline topic`: create, list, describe, alter, add-partitions, delete.

mod delete;

use std::{collections::BTreeMap, process::ExitCode};

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::{
    CommonArgs,
    connect::{connect, explain},
    output::{self, OutputFormat},
    retry_output::RetryMonitor,
};
use crate::{
    client::{Admin, ConfigSource, NewTopic, PartitionDescription, TopicAlteration, TopicDescription, TopicSummary},
    limits,
    model::{ConfigMap, Offset},
    proto::error::ErrorCode,
};

#[derive(Debug, Subcommand)]
pub(super) enum TopicCommand {
    /// Create a topic
    Create(CreateArgs),
    /// List all topics
    List,
    /// Show a topic's configuration and partitions
    Describe {
        /// The topic
        name: String,
    },
    /// Change a topic's configuration, which takes effect at once, or its replication factor
    Alter(AlterArgs),
    /// Add partitions to a topic
    AddPartitions {
        /// The topic
        name: String,
        /// New total number of partitions
        #[arg(long, value_name = "N")]
        partitions: u32,
    },
    Delete(delete::DeleteArgs),
}

#[derive(Debug, Args)]
pub(super) struct CreateArgs {
    /// Topic name: a-z, A-Z, 0-9, '.', '_' and '-'
    name: String,
    /// Number of partitions
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    partitions: u32,
    /// Number of replicas of each partition; default: replication.default_factor
    #[arg(long, value_name = "N", value_parser = factor())]
    replication_factor: Option<u32>,
    /// Configuration, such as retention.ms=86400000; repeatable
    #[arg(long = "config", value_name = "K=V", value_parser = key_value)]
    config: Vec<(String, String)>,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub(super) struct ConfigChangeArgs {
    /// Set a configuration key; repeatable
    #[arg(long = "config", value_name = "K=V", value_parser = key_value)]
    config: Vec<(String, String)>,
    /// Reset a configuration key to its default; repeatable
    #[arg(long, value_name = "K")]
    unset: Vec<String>,
    /// New number of replicas of each partition; the controller adds or removes replicas in steps
    #[arg(long, value_name = "N", value_parser = factor())]
    replication_factor: Option<u32>,
}

#[derive(Debug, Args)]
pub(super) struct AlterArgs {
    /// The topic
    name: String,
    #[command(flatten)]
    changes: ConfigChangeArgs,
}

/// Returns the parser of a replication factor: from 1 to the maximum number of replicas.
fn factor() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..=i64::from(limits::MAX_REPLICAS))
}

/// Parses `KEY=VALUE` without the spaces around both parts. The value may contain `=`.
fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.trim().to_owned(), value.trim().to_owned())),
        _ => Err("not a KEY=VALUE pair: write it like retention.ms=86400000".to_owned()),
    }
}

pub(super) async fn run(common: &CommonArgs, command: TopicCommand) -> anyhow::Result<ExitCode> {
    let client = connect(common).await?;
    // The future of all subcommands is large, so it is boxed.
    RetryMonitor::new(&client)
        .run_with_retry_output(None, Box::pin(execute(client.admin(), command, common.output)))
        .await
}

/// Executes a subcommand, and prints its result.
async fn execute(admin: Admin, command: TopicCommand, output: OutputFormat) -> anyhow::Result<ExitCode> {
    match command {
        TopicCommand::Create(create) => {
            let name = create.name.clone();
            let mut topic = NewTopic::new(&name)
                .partitions(create.partitions)
                .replication_factor(create.replication_factor.unwrap_or(0));
            for (key, value) in &create.config {
                topic = topic.config(key, value);
            }
            let created = admin.create_topic(&topic).await;
            let replicas = created.as_ref().map_or(0, |topic| topic.replication_factor);
            print_outcome(&admin, &name, created, "created", output).await?;
            print_min_isr_hint(&admin, &name, replicas).await;
        }
        TopicCommand::List => list(admin.list_topics().await?, output)?,
        TopicCommand::Describe { name } => match admin.describe_topic(&name).await {
            Ok(topic) => describe(&topic, output)?,
            Err(error) => return Err(explain(&admin, &name, error).await),
        },
        TopicCommand::Alter(alter) => {
            let ConfigChangeArgs { config, unset, replication_factor } = alter.changes;
            let change = TopicAlteration { set: config.into_iter().collect(), unset, replication_factor };
            let altered = admin.alter_topic(&alter.name, &change).await;
            print_outcome(&admin, &alter.name, altered, "altered", output).await?;
            if replication_factor.is_some() {
                eprintln!(
                    "hint: the controller adds or removes replicas in steps; `strandline partition reassign status` \
                     shows the remaining reassignments"
                );
            }
        }
        TopicCommand::AddPartitions { name, partitions } => {
            let extended = admin.add_partitions(&name, partitions).await;
            print_outcome(&admin, &name, extended, "extended", output).await?;
        }
        TopicCommand::Delete(command) => delete::run(&admin, &command, output).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints a hint on standard error if a topic with several replicas has `min.insync.replicas` 1. The topic has been
/// created already, so an error of this request is ignored.
async fn print_min_isr_hint(admin: &Admin, name: &str, replicas: u32) {
    if replicas < 2 {
        return;
    }
    let Ok(topic) = admin.describe_topic(name).await else { return };
    if topic.effective_config.get("min.insync.replicas").is_some_and(|value| value == "1") {
        eprintln!("{}", min_isr_hint(name));
    }
}

fn min_isr_hint(name: &str) -> String {
    format!(
        "hint: min.insync.replicas is 1: while a partition's other replicas are out of sync, one broker alone \
         acknowledges acks=all, and a failure of its disk loses these records. To refuse such writes instead: \
         `strandline topic alter {name} --config min.insync.replicas=2`"
    )
}

/// Prints a created or changed topic with a verb in the past tense, or returns the error message.
async fn print_outcome(
    admin: &Admin,
    name: &str,
    result: Result<TopicSummary, crate::client::CallError>,
    verb: &str,
    output: OutputFormat,
) -> anyhow::Result<()> {
    let topic = match result {
        Ok(topic) => topic,
        Err(error) => return Err(explain(admin, name, error).await),
    };
    if output == OutputFormat::Json {
        return Ok(output::json(&summary(&topic))?);
    }
    let config = format_config(&topic.config);
    let config = if config.is_empty() { String::new() } else { format!(", {config}") };
    let (partitions, replicas) = (
        output::count(topic.partitions.into(), "partition"),
        output::count(topic.replication_factor.into(), "replica"),
    );
    Ok(output::line(&format!("{verb} topic {}: {partitions}, {replicas} of each{config}", topic.name))?)
}

/// Prints the topics in the order of their names.
fn list(mut topics: Vec<TopicSummary>, output: OutputFormat) -> anyhow::Result<()> {
    topics.sort_by(|a, b| a.name.cmp(&b.name));
    if output == OutputFormat::Json {
        return Ok(output::json(&Value::Array(topics.iter().map(summary).collect()))?);
    }
    if topics.is_empty() {
        return Ok(output::line("no topics; create one with `strandline topic create NAME`")?);
    }
    let row = |topic: &TopicSummary| {
        let (partitions, replicas) = (topic.partitions.to_string(), topic.replication_factor.to_string());
        vec![topic.name.clone(), partitions, replicas, format_config(&topic.config)]
    };
    Ok(output::table(&["NAME", "PARTITIONS", "REPLICAS", "CONFIG"], &[1, 2], topics.iter().map(row).collect())?)
}

fn describe(topic: &TopicDescription, output: OutputFormat) -> anyhow::Result<()> {
    if output == OutputFormat::Json {
        return Ok(output::json(&description(topic))?);
    }
    Ok(output::line(&lines(topic))?)
}

/// Returns the description as text: tables of the configuration, the replicas and the watermarks, and one line per
/// note.
fn lines(topic: &TopicDescription) -> String {
    let config = topic
        .effective_config
        .iter()
        .map(|(key, value)| vec![key.clone(), value.clone(), set_by(topic, key).to_owned()]);
    let replicas = ["PARTITION", "LEADER", "EPOCH", "REPLICAS", "ISR", "ELR", "ON DISK", "TIERED"];
    let watermarks =
        ["PARTITION", "LOG START", "LOCAL START", "TIERED END", "HIGH WATERMARK", "PERSISTED END", "LOG END"];
    let rows = |row: fn(&PartitionDescription) -> Vec<String>| topic.partitions.iter().map(row).collect();
    let mut lines = vec![
        format!(
            "topic {}  id {}  replication factor {}\n",
            topic.summary.name, topic.summary.id, topic.summary.replication_factor
        ),
        output::tabled(&["CONFIG", "VALUE", "SET BY"], &[], config.collect()),
        String::new(),
        output::tabled(&replicas, &[0, 1, 2, 6, 7], rows(replica_row)),
        String::new(),
        output::tabled(&watermarks, &[0, 1, 2, 3, 4, 5, 6], rows(watermark_row)),
    ];
    let notes: Vec<String> =
        missing_reports(topic).into_iter().chain(topic.partitions.iter().flat_map(notes)).collect();
    if !notes.is_empty() {
        lines.push(String::new());
        lines.extend(notes);
    }
    lines.join("\n")
}

/// Returns the source of a configuration value.
fn set_by(topic: &TopicDescription, key: &str) -> &'static str {
    topic.config_source.get(key).copied().unwrap_or(ConfigSource::Default).as_str()
}

/// Returns the table row with a partition's replicas and its bytes. `?` stands for bytes that the leader did not
/// report.
fn replica_row(partition: &PartitionDescription) -> Vec<String> {
    let bytes = |bytes| if partition.leader_error.is_none() { output::bytes(bytes) } else { "?".to_owned() };
    vec![
        partition.partition.to_string(),
        partition.leader.map_or_else(|| "none".to_owned(), |leader| leader.to_string()),
        partition.leader_epoch.to_string(),
        output::format_ids(&partition.replicas),
        output::format_ids(&partition.isr),
        output::format_ids(&partition.elr),
        bytes(partition.local_bytes),
        bytes(partition.tiered_bytes),
    ]
}

/// Returns the table row with a partition's watermarks. `?` stands for a watermark that the leader did not report.
fn watermark_row(partition: &PartitionDescription) -> Vec<String> {
    let watermarks = &partition.watermarks;
    let from_leader =
        |offset: Offset| if partition.leader_error.is_none() { offset.to_string() } else { "?".to_owned() };
    vec![
        partition.partition.to_string(),
        watermarks.log_start.to_string(),
        from_leader(watermarks.local_start),
        watermarks.tiered_end.to_string(),
        from_leader(watermarks.high_watermark),
        from_leader(watermarks.persisted_end),
        from_leader(watermarks.log_end),
    ]
}

/// Returns the reason for each partition without a report of its leader, below a line that explains `?` in the tables.
/// Returns no lines if every leader has reported.
fn missing_reports(topic: &TopicDescription) -> Vec<String> {
    let mut lines = Vec::new();
    let mut has_leader = false;
    for partition in &topic.partitions {
        let Some(error) = &partition.leader_error else { continue };
        if error.code == ErrorCode::NoLeader {
            // The message names the partition and the remedy.
            lines.push(format!("  {error}"));
        } else {
            has_leader = true;
            lines.push(format!("  partition {}: {error}", partition.partition));
        }
    }
    if !lines.is_empty() {
        lines.insert(0, "`?` stands for a missing value that only the partition's leader reports:".to_owned());
    }
    if has_leader {
        lines.push("  see `strandline cluster health`".to_owned());
    }
    lines
}

/// Returns notes about a partition that the tables do not contain.
fn notes(partition: &PartitionDescription) -> Vec<String> {
    let (number, mut notes) = (partition.partition, Vec::new());
    if let Some(error) = &partition.error {
        notes.push(format!("partition {number}:\n  {error}\n  see `strandline cluster health`"));
    }
    if !(partition.adding.is_empty() && partition.removing.is_empty()) {
        let changes: Vec<String> = [("adding", &partition.adding), ("removing", &partition.removing)]
            .into_iter()
            .filter(|(_, ids)| !ids.is_empty())
            .map(|(change, ids)| format!("{change} {}", output::format_ids(ids)))
            .collect();
        notes.push(format!("partition {number} is being reassigned: {}", changes.join(", ")));
    }
    if let Some(epoch) = partition.unclean_epoch {
        notes.push(format!(
            "partition {number}: records committed before leader epoch {epoch} may be lost, because of an unclean \
             election\n  or an unclean shutdown of the only eligible replica"
        ));
    }
    notes
}

/// Returns a topic's summary as JSON.
fn summary(topic: &TopicSummary) -> Value {
    json!({
        "name": topic.name,
        "topic_id": topic.id,
        "partitions": topic.partitions,
        "replication_factor": topic.replication_factor,
        "config": topic.config,
    })
}

/// Returns a topic's description as JSON. Values that a partition's leader did not report are null.
fn description(topic: &TopicDescription) -> Value {
    let partition = |partition: &PartitionDescription| {
        let watermarks = &partition.watermarks;
        let from_leader = |offset: Offset| partition.leader_error.is_none().then_some(offset);
        let bytes = |bytes: u64| partition.leader_error.is_none().then_some(bytes);
        json!({
            "partition": partition.partition,
            "leader": partition.leader,
            "leader_epoch": partition.leader_epoch,
            "replicas": partition.replicas,
            "isr": partition.isr,
            "elr": partition.elr,
            "adding": partition.adding,
            "removing": partition.removing,
            "unclean_epoch": partition.unclean_epoch,
            "log_start": watermarks.log_start,
            "local_start": from_leader(watermarks.local_start),
            "tiered_end": watermarks.tiered_end,
            "high_watermark": from_leader(watermarks.high_watermark),
            "persisted_end": from_leader(watermarks.persisted_end),
            "log_end": from_leader(watermarks.log_end),
            "local_bytes": bytes(partition.local_bytes),
            "tiered_bytes": bytes(partition.tiered_bytes),
            "error": partition.error.as_ref().map(ToString::to_string),
            "leader_error": partition.leader_error.as_ref().map(ToString::to_string),
        })
    };
    let sources = topic.effective_config.keys().map(|key| (key.clone(), set_by(topic, key)));
    json!({
        "name": topic.summary.name,
        "topic_id": topic.summary.id,
        "replication_factor": topic.summary.replication_factor,
        "effective_config": topic.effective_config,
        "config_source": sources.collect::<BTreeMap<_, _>>(),
        "partitions": topic.partitions.iter().map(partition).collect::<Vec<_>>(),
    })
}

/// Formats configuration values: `retention.ms=1000 segment.ms=500`.
fn format_config(config: &ConfigMap) -> String {
    config.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::{BrokerId, LeaderEpoch, TopicId, Watermarks},
        proto::error::ApiError,
    };

    fn topic() -> TopicDescription {
        let offset = |value| Offset::new(value).expect("small");
        let watermarks = Watermarks {
            log_start: offset(1_000),
            local_start: offset(700_000_000_000),
            tiered_end: offset(800_000_000_000),
            high_watermark: offset(900_000_000_000),
            persisted_end: offset(900_000_000_100),
            log_end: offset(900_000_000_200),
        };
        let led = PartitionDescription {
            partition: 0,
            leader: Some(BrokerId(1)),
            leader_epoch: LeaderEpoch(3),
            replicas: vec![BrokerId(1), BrokerId(2), BrokerId(3)],
            isr: vec![BrokerId(1), BrokerId(2)],
            elr: vec![],
            adding: vec![BrokerId(3)],
            removing: vec![],
            unclean_epoch: None,
            watermarks,
            local_bytes: 5 << 30,
            tiered_bytes: 7 << 40,
            error: None,
            leader_error: None,
        };
        let no_leader = ApiError::new(ErrorCode::NoLeader, "partition 1 has no leader: start broker 1 or 2");
        let waiting = PartitionDescription {
            partition: 1,
            leader: None,
            isr: vec![BrokerId(1)],
            elr: vec![BrokerId(2)],
            adding: vec![],
            unclean_epoch: Some(LeaderEpoch(2)),
            leader_error: Some(no_leader),
            local_bytes: 0,
            tiered_bytes: 0,
            watermarks: Watermarks { tiered_end: offset(5), ..Watermarks::default() },
            ..led.clone()
        };
        let reason =
            "the replica on broker 1 accepts no writes: cannot sync a segment: Input/output error (os error 5)";
        let failed = ApiError::new(ErrorCode::StorageFailed, reason);
        let broken = PartitionDescription { partition: 2, adding: vec![], error: Some(failed), ..led.clone() };
        let config = ConfigMap::from([("retention.ms".to_owned(), "86400000".to_owned())]);
        let summary = TopicSummary {
            name: "orders".into(),
            id: TopicId::from_bytes([1; 16]),
            partitions: 3,
            replication_factor: 3,
            config: config.clone(),
        };
        let mut effective_config = config;
        effective_config.insert("durability".to_owned(), "persisted".to_owned());
        effective_config.insert("segment.ms".to_owned(), "1000".to_owned());
        let config_source = [
            ("durability", ConfigSource::Default),
            ("retention.ms", ConfigSource::Topic),
            ("segment.ms", ConfigSource::Broker),
        ];
        let config_source = config_source.into_iter().map(|(key, source)| (key.to_owned(), source)).collect();
        TopicDescription { summary, effective_config, config_source, partitions: vec![led, waiting, broken] }
    }

    #[test]
    fn topic_output_matches_golden_files() {
        output::golden::lines("topic-describe.txt", &lines(&topic()));
        let messages = ["DescribeTopicResponse", "TopicSummary", "PartitionDescription"];
        output::golden::json("topic-describe.json", &description(&topic()), &messages, &[]);
        let list = Value::Array(vec![summary(&topic().summary)]);
        output::golden::json("topic-list.json", &list, &["TopicSummary"], &[]);
    }

    #[test]
    fn config_value_may_contain_an_equals_sign() {
        assert_eq!(key_value("a=b=c"), Ok(("a".to_owned(), "b=c".to_owned())));
        assert!(key_value("a").is_err() && key_value("=b").is_err());
    }
}
