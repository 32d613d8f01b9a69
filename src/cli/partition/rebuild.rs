//! `strandline partition rebuild-manifest`: rebuilds a lost manifest from the objects that are left.

use clap::Args;
use serde_json::{Value, json};

use super::{TopicOrPartition, confirm, one_partition, refused, show};
use crate::{
    cli::output::{self, OutputFormat},
    client::{Admin, ManifestRebuild},
};

/// Rebuild a partition's lost manifest from the objects that are left
///
/// The manifest lists a partition's segment objects. The partition's leader rebuilds a lost manifest by itself if the
/// remaining segments are the committed ones. Else this command shows the remaining and the missing segments, and
/// prompts before any records are abandoned.
#[derive(Debug, Args)]
pub(in crate::cli) struct RebuildManifestArgs {
    /// The partition
    #[arg(value_name = "TOPIC/N", value_parser = one_partition)]
    name: TopicOrPartition,
    /// Do not prompt; required without a terminal
    #[arg(long)]
    yes: bool,
}

pub(super) async fn run(admin: &Admin, command: &RebuildManifestArgs, output: OutputFormat) -> anyhow::Result<()> {
    let (topic, number) =
        (command.name.topic.as_str(), command.name.partition.expect("the parser requires a partition"));
    let found = match admin.survey_manifest(topic, number).await {
        Ok(found) => found,
        Err(error) => return Err(refused(admin, Some(&command.name), error).await),
    };
    let prospect = prospect(topic, number, &found);
    if !command.yes && found.obstacle.is_some() {
        confirm(&prospect, "rebuild the manifest from the remaining objects?")?;
    }
    let done = match admin.rebuild_manifest(topic, number, &found).await {
        Ok(done) => done,
        Err(error) => return Err(refused(admin, Some(&command.name), error).await),
    };
    let done = format!("rebuilt the manifest of {topic}/{number}: {}", held(&done));
    show(&described(topic, number, &found), &format!("{prospect}\n{done}"), output)
}

fn held(found: &ManifestRebuild) -> String {
    let segments = output::count(found.segments.into(), "segment");
    format!(
        "{segments}, {}, offsets {} up to, but not including, {}",
        output::bytes(found.bytes),
        found.log_start,
        found.range.end
    )
}

/// Returns the result of the survey as text, which the user confirms.
fn prospect(topic: &str, number: u32, found: &ManifestRebuild) -> String {
    let mut lines = vec![
        format!("{topic}/{number}: {} is missing or corrupt", found.lost),
        format!(
            "committed: offsets {} up to, but not including, {}, with {}",
            found.range.start,
            found.range.end,
            output::bytes(found.committed_bytes)
        ),
        format!("remaining without a gap: {}", held(found)),
    ];
    let missing = found.missing.iter().map(|range| format!("no object covers {}..{}", range.start, range.end));
    lines.extend(missing);
    lines.extend(found.unusable.iter().cloned());
    if found.left_over > 0 {
        lines.push(format!("{} not used", output::count(found.left_over.into(), "other object")));
    }
    match &found.obstacle {
        None => lines.push("the remaining segments are the committed ones".to_owned()),
        Some(obstacle) => lines.push(format!("the remaining segments may differ from the committed ones: {obstacle}")),
    }
    if found.log_start > found.range.start {
        lines.push(format!(
            "the log would start at {}: earlier records are abandoned, including their remaining objects",
            found.log_start
        ));
    }
    lines.join("\n")
}

fn described(topic: &str, number: u32, found: &ManifestRebuild) -> Value {
    let missing = found.missing.iter().map(|range| json!({ "from": range.start, "to": range.end }));
    json!({
        "topic": topic,
        "partition": number,
        "lost": found.lost,
        "committed_log_start": found.range.start,
        "tiered_end": found.range.end,
        "committed_bytes": found.committed_bytes,
        "log_start": found.log_start,
        "segments": found.segments,
        "bytes": found.bytes,
        "obstacle": found.obstacle,
        "missing": missing.collect::<Vec<_>>(),
        "unusable": found.unusable,
        "unused": found.left_over,
    })
}
