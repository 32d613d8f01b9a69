//! `strandline topic delete`: shows the topic's content, prompts for its name, and states how long objects remain.

use std::{
    io::{self, BufRead as _, IsTerminal as _},
    time::Duration,
};

use anyhow::bail;
use clap::Args;
use serde_json::{Value, json};

use crate::{
    cli::{
        connect::explain,
        output::{self, OutputFormat},
    },
    client::{Admin, TopicDescription},
    proto::error::ErrorCode,
};

/// Delete a topic with all its records
///
/// Shows the topic's content and prompts for its name before the deletion. Without a terminal, --yes is required. The
/// topic's objects in the object store are deleted later (tier.garbage_grace).
#[derive(Debug, Args)]
pub(in crate::cli) struct DeleteArgs {
    /// The topic
    name: String,
    /// Do not prompt; required without a terminal
    #[arg(long)]
    yes: bool,
    /// Show what would be deleted, and delete nothing
    #[arg(long, conflicts_with = "yes")]
    dry_run: bool,
}

/// Content of a topic.
#[derive(Clone, Debug, PartialEq, Eq)]
struct TopicContent {
    name: String,
    partitions: u32,
    /// Number of committed records in the partitions whose leaders responded.
    records: u64,
    /// Bytes on the disks of the leaders that responded.
    local_bytes: u64,
    /// Bytes in the object store, of the same partitions.
    tiered_bytes: u64,
    /// Number of partitions whose leaders did not respond.
    unresponsive: usize,
}

impl TopicContent {
    /// Returns the sums of the values that the leaders of the topic's partitions reported.
    fn of(topic: &TopicDescription) -> Self {
        let mut content = Self {
            name: topic.summary.name.clone(),
            partitions: topic.summary.partitions,
            records: 0,
            local_bytes: 0,
            tiered_bytes: 0,
            unresponsive: 0,
        };
        for partition in &topic.partitions {
            if partition.leader_error.is_some() {
                content.unresponsive += 1;
                continue;
            }
            let watermarks = &partition.watermarks;
            content.records += watermarks.high_watermark.since(watermarks.log_start);
            content.local_bytes += partition.local_bytes;
            content.tiered_bytes += partition.tiered_bytes;
        }
        content
    }

    /// Returns the content of a topic whose description failed. The topic may have objects in the object store.
    fn unknown(name: &str) -> Self {
        Self { name: name.to_owned(), partitions: 0, records: 0, local_bytes: 0, tiered_bytes: 0, unresponsive: 1 }
    }

    /// Formats the content: `topic orders: 4 partitions, 200000 records, 15.00 MiB on each leader's disk, 3.00 MiB in
    /// the object store`.
    fn sentence(&self) -> String {
        let Self { name, partitions, records, local_bytes, tiered_bytes, unresponsive } = self;
        let unknown = match unresponsive {
            0 => String::new(),
            _ => format!(
                "; not counted: {}, without a response from the leader",
                output::count(u64::try_from(*unresponsive).unwrap_or(u64::MAX), "partition")
            ),
        };
        format!(
            "topic {name}: {}, {}, {} on each leader's disk, {} in the object store{unknown}",
            output::count((*partitions).into(), "partition"),
            output::count(*records, "record"),
            output::bytes(*local_bytes),
            output::bytes(*tiered_bytes),
        )
    }

    /// Returns the message after the deletion. `object_grace` is the longest time until the objects in the object store
    /// are deleted; `None` without an object store.
    fn deleted_message(&self, object_grace: Option<Duration>) -> String {
        let Self { name, tiered_bytes, unresponsive, .. } = self;
        let deleted = format!("deleted topic {name}");
        match object_grace {
            Some(grace) if *tiered_bytes > 0 || *unresponsive > 0 => {
                let bytes =
                    if *unresponsive == 0 { format!(", {},", output::bytes(*tiered_bytes)) } else { String::new() };
                format!(
                    "{deleted}; its objects in the object store{bytes} are deleted within {} (tier.garbage_grace, and \
                     the time until the next garbage collection)",
                    humantime::format_duration(Duration::from_secs(grace.as_secs().max(1)))
                )
            }
            _ => deleted,
        }
    }

    /// Returns the content as JSON. `deleted` is false for a dry run.
    fn to_json(&self, deleted: bool, object_grace: Option<Duration>) -> Value {
        json!({
            "name": self.name,
            "deleted": deleted,
            "partitions": self.partitions,
            "records": self.records,
            "local_bytes": self.local_bytes,
            "tiered_bytes": self.tiered_bytes,
            "partitions_without_response": self.unresponsive,
            "object_grace_ms": object_grace.map(|grace| u64::try_from(grace.as_millis()).unwrap_or(u64::MAX)),
        })
    }
}

/// Shows the topic's content, prompts unless `--yes` is set, and deletes the topic. With `--dry-run`, only shows the
/// content.
pub(super) async fn run(admin: &Admin, command: &DeleteArgs, output: OutputFormat) -> anyhow::Result<()> {
    let name = command.name.as_str();
    let content = match admin.describe_topic(name).await {
        Ok(topic) => TopicContent::of(&topic),
        // A deletion with `--yes` does not need the description.
        Err(error) if command.yes && error.code() != Some(ErrorCode::UnknownTopic) => TopicContent::unknown(name),
        Err(error) => return Err(explain(admin, name, error).await),
    };
    if command.dry_run {
        return show(&content.to_json(false, None), &format!("would delete {}", content.sentence()), output);
    }
    if !command.yes {
        confirm(&content)?;
    }
    match admin.delete_topic(name).await {
        Ok(object_grace) => show(&content.to_json(true, object_grace), &content.deleted_message(object_grace), output),
        Err(error) => Err(explain(admin, name, error).await),
    }
}

/// Prompts for the topic's name at the terminal. Fails without a terminal or with another name.
fn confirm(content: &TopicContent) -> anyhow::Result<()> {
    if !io::stdin().is_terminal() {
        bail!("nothing was deleted: without a terminal, add --yes to delete {}", content.sentence());
    }
    eprint!("delete {}? Type its name: ", content.sentence());
    let mut typed = String::new();
    io::stdin().lock().read_line(&mut typed)?;
    match typed.trim() {
        name if name == content.name => Ok(()),
        typed => bail!("nothing was deleted: {typed:?} was typed, and the topic is {:?}", content.name),
    }
}

fn show(value: &Value, line: &str, output: OutputFormat) -> anyhow::Result<()> {
    match output {
        OutputFormat::Json => output::json(value)?,
        OutputFormat::Text => output::line(line)?,
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content() -> TopicContent {
        TopicContent {
            name: "orders".to_owned(),
            partitions: 4,
            records: 200_000,
            local_bytes: 15 << 20,
            tiered_bytes: 3 << 20,
            unresponsive: 0,
        }
    }

    #[test]
    fn deletion_text_states_removed_and_kept_data() {
        assert_eq!(
            content().sentence(),
            "topic orders: 4 partitions, 200000 records, 15.00 MiB on each leader's disk, 3.00 MiB in the object store"
        );
        let two_hours = Some(Duration::from_secs(7200));
        assert_eq!(
            content().deleted_message(two_hours),
            "deleted topic orders; its objects in the object store, 3.00 MiB, are deleted within 2h \
             (tier.garbage_grace, and the time until the next garbage collection)"
        );
        assert_eq!(content().deleted_message(None), "deleted topic orders");
        let empty = TopicContent { tiered_bytes: 0, ..content() };
        assert_eq!(empty.deleted_message(two_hours), "deleted topic orders");
        let partly_known = TopicContent { unresponsive: 1, ..empty };
        assert!(partly_known.sentence().ends_with("; not counted: 1 partition, without a response from the leader"));
        assert!(
            partly_known.deleted_message(two_hours).contains("its objects in the object store are deleted within 2h")
        );
    }

    #[test]
    fn deletion_json_matches_golden_file() {
        let value = content().to_json(true, Some(Duration::from_secs(7200)));
        let messages = ["DeleteTopicRequest", "DeleteTopicResponse", "TopicSummary", "PartitionDescription"];
        let computed = ["deleted", "records", "partitions_without_response"];
        output::golden::json("topic-delete.json", &value, &messages, &computed);
    }
}
