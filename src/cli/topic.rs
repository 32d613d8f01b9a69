//! `strandline topic`: create, list, describe, alter, add-partitions, delete.

mod delete;

use std::{collections::BTreeMap, process::ExitCode};

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::{
    Common,
    connect::{connect, explain},
    output::{self, Output},
    patience::Patience,
};
use crate::{
    client::{Admin, ConfigSource, NewTopic, PartitionDescription, TopicChange, TopicDescription, TopicSummary},
    limits,
    model::{ConfigMap, Offset},
};

#[derive(Debug, Subcommand)]
pub(super) enum Topic {
    /// Create a topic
    Create(Create),
    /// List all topics
    List,
    /// Show a topic's configuration and partitions
    Describe {
        /// The topic
        name: String,
    },
    /// Change a topic's configuration, which takes effect at once, or how many replicas it has
    Alter(Alter),
    /// Give a topic more partitions
    AddPartitions {
        /// The topic
        name: String,
        /// How many it has afterwards
        #[arg(long, value_name = "N")]
        to: u32,
    },
    Delete(delete::Delete),
}

#[derive(Debug, Args)]
pub(super) struct Create {
    /// Its name: a-z, A-Z, 0-9, '.', '_' and '-'
    name: String,
    /// How many partitions
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    partitions: u32,
    /// How many brokers hold each partition; the cluster's default if left out
    #[arg(long, value_name = "N", value_parser = factor())]
    replication_factor: Option<u32>,
    /// A configuration key, such as retention.ms=86400000; may be given several times
    #[arg(long = "config", value_name = "K=V", value_parser = key_value)]
    config: Vec<(String, String)>,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub(super) struct Changes {
    /// Set a configuration key; may be given several times
    #[arg(long = "config", value_name = "K=V", value_parser = key_value)]
    config: Vec<(String, String)>,
    /// Take a configuration key back to its default; may be given several times
    #[arg(long, value_name = "K")]
    unset: Vec<String>,
    /// How many brokers are to hold each partition; the controller makes or lets go what differs, some partitions at a time
    #[arg(long, value_name = "N", value_parser = factor())]
    replication_factor: Option<u32>,
}

#[derive(Debug, Args)]
pub(super) struct Alter {
    /// The topic
    name: String,
    #[command(flatten)]
    changes: Changes,
}

/// Returns the parser of a replication factor: from 1 to the maximum number of replicas.
fn factor() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..=i64::from(limits::MAX_REPLICAS))
}

fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.trim().to_owned(), value.trim().to_owned())),
        _ => Err("write it as KEY=VALUE, such as retention.ms=86400000".to_owned()),
    }
}

pub(super) async fn run(common: &Common, command: Topic) -> anyhow::Result<ExitCode> {
    let client = connect(common).await?;
    // The future is boxed, because it contains an interactive prompt.
    Patience::new(&client).over(None, Box::pin(act(client.admin(), command, common.output))).await
}

async fn act(admin: Admin, command: Topic, output: Output) -> anyhow::Result<ExitCode> {
    match command {
        Topic::Create(create) => {
            let name = create.name.clone();
            let mut topic = NewTopic::new(&name)
                .partitions(create.partitions)
                .replication_factor(create.replication_factor.unwrap_or(0));
            for (key, value) in &create.config {
                topic = topic.config(key, value);
            }
            let made = admin.create_topic(&topic).await;
            let replicas = made.as_ref().map_or(0, |topic| topic.replication_factor);
            said(&admin, &name, made, "created", output).await?;
            hint(&admin, &name, replicas).await;
        }
        Topic::List => list(admin.list_topics().await?, output)?,
        Topic::Describe { name } => match admin.describe_topic(&name).await {
            Ok(topic) => describe(&topic, output)?,
            Err(error) => return Err(explain(&admin, &name, error).await),
        },
        Topic::Alter(alter) => {
            let Changes { config, unset, replication_factor } = alter.changes;
            let change = TopicChange { set: config.into_iter().collect(), unset, replication_factor };
            let altered = admin.alter_topic(&alter.name, &change).await;
            said(&admin, &alter.name, altered, "altered", output).await?;
            if replication_factor.is_some() {
                eprintln!(
                    "hint: the controller makes or lets go replicas, some partitions at a time; `strandline partition reassign status` shows what is left"
                );
            }
        }
        Topic::AddPartitions { name, to } => {
            let grown = admin.add_partitions(&name, to).await;
            said(&admin, &name, grown, "grew", output).await?;
        }
        Topic::Delete(command) => delete::run(&admin, &command, output).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints a hint on standard error if a topic with several replicas has `min.insync.replicas` 1. The topic has been
/// created already, so an error is ignored here.
async fn hint(admin: &Admin, name: &str, replicas: u32) {
    if replicas < 2 {
        return;
    }
    let Ok(topic) = admin.describe_topic(name).await else { return };
    if topic.effective_config.get("min.insync.replicas").is_some_and(|minimum| minimum == "1") {
        eprintln!("{}", one_is_enough(name));
    }
}

fn one_is_enough(name: &str) -> String {
    format!(
        "hint: min.insync.replicas is 1: while the other replicas of a partition are away, acks=all is answered by one broker \
         alone, and what it then takes is lost with its disk. `strandline topic alter {name} --config min.insync.replicas=2` \
         refuses such writes instead"
    )
}

async fn said(
    admin: &Admin,
    name: &str,
    result: Result<TopicSummary, crate::client::CallError>,
    verb: &str,
    output: Output,
) -> anyhow::Result<()> {
    let topic = match result {
        Ok(topic) => topic,
        Err(error) => return Err(explain(admin, name, error).await),
    };
    if output == Output::Json {
        return Ok(output::json(&summary(&topic))?);
    }
    let config = pairs(&topic.config);
    let config = if config.is_empty() { String::new() } else { format!(", {config}") };
    let (partitions, replicas) = (
        output::count(topic.partitions.into(), "partition"),
        output::count(topic.replication_factor.into(), "replica"),
    );
    Ok(output::line(&format!("{verb} topic {}: {partitions}, {replicas} of each{config}", topic.name))?)
}

fn list(mut topics: Vec<TopicSummary>, output: Output) -> anyhow::Result<()> {
    topics.sort_by(|a, b| a.name.cmp(&b.name));
    if output == Output::Json {
        return Ok(output::json(&Value::Array(topics.iter().map(summary).collect()))?);
    }
    if topics.is_empty() {
        return Ok(output::line("no topics; create one with `strandline topic create NAME`")?);
    }
    let row = |topic: &TopicSummary| {
        let (partitions, replicas) = (topic.partitions.to_string(), topic.replication_factor.to_string());
        vec![topic.name.clone(), partitions, replicas, pairs(&topic.config)]
    };
    Ok(output::table(&["NAME", "PARTITIONS", "REPLICAS", "CONFIG"], &[1, 2], topics.iter().map(row).collect())?)
}

fn describe(topic: &TopicDescription, output: Output) -> anyhow::Result<()> {
    if output == Output::Json {
        return Ok(output::json(&description(topic))?);
    }
    Ok(output::line(&lines(topic))?)
}

fn lines(topic: &TopicDescription) -> String {
    let config = topic
        .effective_config
        .iter()
        .map(|(key, value)| vec![key.clone(), value.clone(), set_by(topic, key).to_owned()]);
    let replicas = ["PARTITION", "LEADER", "EPOCH", "REPLICAS", "ISR", "ELR", "ON DISK", "IN BUCKET"];
    let marks = ["PARTITION", "LOG START", "LOCAL START", "TIERED END", "HIGH WATERMARK", "PERSISTED END", "LOG END"];
    let of = |row: fn(&PartitionDescription) -> Vec<String>| topic.partitions.iter().map(row).collect();
    let mut lines = vec![
        format!(
            "topic {}  id {}  replication factor {}\n",
            topic.summary.name, topic.summary.id, topic.summary.replication_factor
        ),
        output::tabled(&["CONFIG", "VALUE", "SET BY"], &[], config.collect()),
        String::new(),
        output::tabled(&replicas, &[0, 1, 2, 6, 7], of(who)),
        String::new(),
        output::tabled(&marks, &[0, 1, 2, 3, 4, 5, 6], of(place)),
    ];
    let notes: Vec<String> = topic.partitions.iter().flat_map(notes).collect();
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

/// Returns the table row with a partition's replicas and their bytes.
fn who(partition: &PartitionDescription) -> Vec<String> {
    let bytes = |bytes| if partition.unanswered.is_none() { output::bytes(bytes) } else { "?".to_owned() };
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

/// Returns the table row with a partition's watermarks; `?` stands for an unknown one.
fn place(partition: &PartitionDescription) -> Vec<String> {
    let marks = &partition.watermarks;
    let known = |mark: Offset| if partition.unanswered.is_none() { mark.to_string() } else { "?".to_owned() };
    vec![
        partition.partition.to_string(),
        marks.log_start.to_string(),
        known(marks.local_start),
        marks.tiered_end.to_string(),
        known(marks.high_watermark),
        known(marks.persisted_end),
        known(marks.log_end),
    ]
}

/// Returns notes about a partition that the tables do not contain.
fn notes(partition: &PartitionDescription) -> Vec<String> {
    let (number, mut notes) = (partition.partition, Vec::new());
    if let Some(fault) = &partition.unanswered {
        notes.push(format!("the marks of partition {number} are not known: {fault}"));
    }
    if let Some(fault) = &partition.fault {
        notes.push(format!("partition {number} takes no writes: {fault}"));
    }
    if !(partition.adding.is_empty() && partition.removing.is_empty()) {
        let (adding, removing) = (output::format_ids(&partition.adding), output::format_ids(&partition.removing));
        notes.push(format!("partition {number} is being moved: adding {adding}, removing {removing}"));
    }
    if let Some(epoch) = partition.unclean_epoch {
        notes.push(format!("partition {number} may have lost committed records before epoch {epoch}"));
    }
    notes
}

fn summary(topic: &TopicSummary) -> Value {
    json!({
        "name": topic.name,
        "id": topic.id,
        "partitions": topic.partitions,
        "replication_factor": topic.replication_factor,
        "config": topic.config,
    })
}

fn description(topic: &TopicDescription) -> Value {
    let partition = |partition: &PartitionDescription| {
        let marks = &partition.watermarks;
        let known = |mark: Offset| partition.unanswered.is_none().then_some(mark);
        let bytes = |bytes: u64| partition.unanswered.is_none().then_some(bytes);
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
            "log_start": marks.log_start,
            "local_start": known(marks.local_start),
            "tiered_end": marks.tiered_end,
            "high_watermark": known(marks.high_watermark),
            "persisted_end": known(marks.persisted_end),
            "log_end": known(marks.log_end),
            "local_bytes": bytes(partition.local_bytes),
            "tiered_bytes": bytes(partition.tiered_bytes),
            "fault": partition.fault.as_ref().map(ToString::to_string),
            "unanswered": partition.unanswered.as_ref().map(ToString::to_string),
        })
    };
    json!({
        "name": topic.summary.name,
        "id": topic.summary.id,
        "replication_factor": topic.summary.replication_factor,
        "config": topic.effective_config,
        "config_set_by": topic.effective_config.keys().map(|key| (key.clone(), set_by(topic, key))).collect::<BTreeMap<_, _>>(),
        "partitions": topic.partitions.iter().map(partition).collect::<Vec<_>>(),
    })
}

fn pairs(config: &ConfigMap) -> String {
    config.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::{BrokerId, LeaderEpoch, TopicId, Watermarks},
        proto::error::{ApiError, ErrorCode},
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
            fault: None,
            unanswered: None,
        };
        let nobody = ApiError::new(ErrorCode::NoLeader, "nobody leads partition 1 at the moment");
        let waiting = PartitionDescription {
            partition: 1,
            leader: None,
            isr: vec![BrokerId(1)],
            elr: vec![BrokerId(2)],
            adding: vec![],
            unclean_epoch: Some(LeaderEpoch(2)),
            unanswered: Some(nobody),
            local_bytes: 0,
            tiered_bytes: 0,
            watermarks: Watermarks { tiered_end: offset(5), ..Watermarks::default() },
            ..led.clone()
        };
        let failed = ApiError::new(ErrorCode::StorageFailed, "the disk failed");
        let broken = PartitionDescription { partition: 2, adding: vec![], fault: Some(failed), ..led.clone() };
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
    fn topic_description_matches_golden_files() {
        output::golden::lines("topic-describe.txt", &lines(&topic()));
        output::golden::json("topic-describe.json", &description(&topic()));
    }

    #[test]
    fn config_value_may_contain_an_equals_sign() {
        assert_eq!(key_value("a=b=c"), Ok(("a".to_owned(), "b=c".to_owned())));
        assert!(key_value("a").is_err() && key_value("=b").is_err());
    }
}
