//! `strandline topic`: create, list, describe, alter, add-partitions, delete.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::{
    Common,
    cluster::{connect, explain},
    output::{self, Output},
    patience::Patience,
};
use crate::{
    client::{Admin, NewTopic, PartitionDescription, TopicDescription, TopicSummary},
    model::{BrokerId, ConfigMap},
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
    /// Change a topic's configuration; it takes effect at once
    Alter(Alter),
    /// Give a topic more partitions
    AddPartitions {
        /// The topic
        name: String,
        /// How many it has afterwards
        #[arg(long, value_name = "N")]
        to: u32,
    },
    /// Delete a topic with all its records
    Delete {
        /// The topic
        name: String,
    },
}

#[derive(Debug, Args)]
pub(super) struct Create {
    /// Its name: a-z, A-Z, 0-9, '.', '_' and '-'
    name: String,
    /// How many partitions
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    partitions: u32,
    /// How many brokers hold each partition; the cluster's default if left out
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
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
}

#[derive(Debug, Args)]
pub(super) struct Alter {
    /// The topic
    name: String,
    #[command(flatten)]
    changes: Changes,
}

fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.trim().to_owned(), value.trim().to_owned())),
        _ => Err("write it as KEY=VALUE, such as retention.ms=86400000".to_owned()),
    }
}

pub(super) async fn run(common: &Common, command: Topic) -> anyhow::Result<ExitCode> {
    let client = connect(common).await?;
    Patience::new(&client).over(None, act(client.admin(), command, common.output)).await
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
            said(&admin, &name, made, "created", output).await?;
        }
        Topic::List => list(admin.list_topics().await?, output)?,
        Topic::Describe { name } => match admin.describe_topic(&name).await {
            Ok(topic) => describe(&topic, output)?,
            Err(error) => return Err(explain(&admin, &name, error).await),
        },
        Topic::Alter(alter) => {
            let set: ConfigMap = alter.changes.config.into_iter().collect();
            let altered = admin.alter_topic(&alter.name, &set, &alter.changes.unset).await;
            said(&admin, &alter.name, altered, "altered", output).await?;
        }
        Topic::AddPartitions { name, to } => {
            let grown = admin.add_partitions(&name, to).await;
            said(&admin, &name, grown, "grew", output).await?;
        }
        Topic::Delete { name } => match admin.delete_topic(&name).await {
            Ok(()) if output == Output::Json => output::json(&json!({ "name": name, "deleted": true }))?,
            Ok(()) => output::line(&format!("deleted topic {name} with all its records"))?,
            Err(error) => return Err(explain(&admin, &name, error).await),
        },
    }
    Ok(ExitCode::SUCCESS)
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
    output::line(&format!("topic {}  id {}\n", topic.summary.name, topic.summary.id))?;
    let own = |key: &String| if topic.summary.config.contains_key(key) { "topic" } else { "default" };
    let config =
        topic.effective_config.iter().map(|(key, value)| vec![key.clone(), value.clone(), own(key).to_owned()]);
    output::table(&["CONFIG", "VALUE", "SET BY"], &[], config.collect())?;
    output::line("")?;
    let header = [
        "PARTITION",
        "LEADER",
        "EPOCH",
        "REPLICAS",
        "ISR",
        "LOG START",
        "LOCAL START",
        "TIERED END",
        "HIGH WATERMARK",
        "LOG END",
        "ON DISK",
        "IN BUCKET",
    ];
    output::table(&header, &[0, 1, 2, 5, 6, 7, 8, 9, 10, 11], topic.partitions.iter().map(row).collect())?;
    for partition in &topic.partitions {
        if let Some(fault) = &partition.fault {
            output::line(&format!("partition {} takes no writes: {fault}", partition.partition))?;
        }
    }
    Ok(())
}

fn row(partition: &PartitionDescription) -> Vec<String> {
    let marks = &partition.watermarks;
    vec![
        partition.partition.to_string(),
        partition.leader.map_or_else(|| "none".to_owned(), |leader| leader.to_string()),
        partition.leader_epoch.to_string(),
        ids(&partition.replicas),
        ids(&partition.isr),
        marks.log_start.to_string(),
        marks.local_start.to_string(),
        marks.tiered_end.to_string(),
        marks.high_watermark.to_string(),
        marks.log_end.to_string(),
        output::bytes(partition.local_bytes),
        output::bytes(partition.tiered_bytes),
    ]
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
        json!({
            "partition": partition.partition,
            "leader": partition.leader,
            "leader_epoch": partition.leader_epoch,
            "replicas": partition.replicas,
            "isr": partition.isr,
            "log_start": marks.log_start,
            "local_start": marks.local_start,
            "tiered_end": marks.tiered_end,
            "high_watermark": marks.high_watermark,
            "persisted_end": marks.persisted_end,
            "log_end": marks.log_end,
            "local_bytes": partition.local_bytes,
            "tiered_bytes": partition.tiered_bytes,
            "fault": partition.fault.as_ref().map(ToString::to_string),
        })
    };
    json!({
        "name": topic.summary.name,
        "id": topic.summary.id,
        "replication_factor": topic.summary.replication_factor,
        "config": topic.effective_config,
        "partitions": topic.partitions.iter().map(partition).collect::<Vec<_>>(),
    })
}

fn pairs(config: &ConfigMap) -> String {
    config.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(" ")
}

fn ids(brokers: &[BrokerId]) -> String {
    brokers.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{LeaderEpoch, Offset, TopicId, Watermarks};

    #[test]
    fn a_description_holds_the_promised_fields() {
        let partition = PartitionDescription {
            partition: 0,
            leader: Some(BrokerId(1)),
            leader_epoch: LeaderEpoch(3),
            replicas: vec![BrokerId(1)],
            isr: vec![BrokerId(1)],
            watermarks: Watermarks { log_end: Offset::new(9).expect("small"), ..Watermarks::default() },
            local_bytes: 1,
            tiered_bytes: 2,
            fault: None,
        };
        let summary = TopicSummary {
            name: "t".into(),
            id: TopicId::from_bytes([1; 16]),
            partitions: 1,
            replication_factor: 1,
            config: ConfigMap::new(),
        };
        let effective_config = ConfigMap::from([("retention.ms".to_owned(), "7".to_owned())]);
        let value = description(&TopicDescription { summary, effective_config, partitions: vec![partition] });
        assert_eq!(value["name"], "t");
        assert_eq!(value["id"], "01010101-0101-0101-0101-010101010101");
        assert_eq!(value["config"]["retention.ms"], "7");
        let first = &value["partitions"][0];
        for (name, wanted) in [
            ("partition", json!(0)),
            ("leader", json!(1)),
            ("leader_epoch", json!(3)),
            ("replicas", json!([1])),
            ("isr", json!([1])),
            ("log_start", json!(0)),
            ("local_start", json!(0)),
            ("tiered_end", json!(0)),
            ("high_watermark", json!(0)),
            ("log_end", json!(9)),
        ] {
            assert_eq!(first[name], wanted, "{name}");
        }
    }

    #[test]
    fn a_configuration_value_may_hold_an_equals_sign() {
        assert_eq!(key_value("a=b=c"), Ok(("a".to_owned(), "b=c".to_owned())));
        assert!(key_value("a").is_err() && key_value("=b").is_err());
    }
}
