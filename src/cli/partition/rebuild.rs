//! `strandline partition rebuild-manifest`: rebuilds a lost manifest from the objects that are left.

use clap::Args;
use serde_json::{Value, json};

use super::{Name, confirm, one_partition, refused, show};
use crate::{
    cli::output::{self, Output},
    client::{Admin, ManifestRebuild},
};

/// Make a partition's lost manifest again from what is left in the bucket
///
/// The manifest names a partition's segments in the bucket. The partition's leader makes a lost one again by itself where the segments that
/// are there are what was committed. Else this command shows what is left and what is missing, and asks before anything is given up.
#[derive(Debug, Args)]
pub(in crate::cli) struct RebuildManifest {
    /// The partition
    #[arg(value_name = "TOPIC/N", value_parser = one_partition)]
    name: Name,
    /// Do not ask; needed where there is no terminal
    #[arg(long)]
    yes: bool,
}

pub(super) async fn run(admin: &Admin, command: &RebuildManifest, output: Output) -> anyhow::Result<()> {
    let (topic, number) = (command.name.topic.as_str(), command.name.partition.expect("it was parsed so"));
    let found = match admin.survey_manifest(topic, number).await {
        Ok(found) => found,
        Err(error) => return Err(refused(admin, Some(&command.name), error).await),
    };
    let prospect = prospect(topic, number, &found);
    if !command.yes && found.doubt.is_some() {
        confirm(&prospect, "make the manifest of what is left?")?;
    }
    let done = match admin.rebuild_manifest(topic, number, &found).await {
        Ok(done) => done,
        Err(error) => return Err(refused(admin, Some(&command.name), error).await),
    };
    let done = format!("the manifest of {topic}/{number} is there again: {}", held(&done));
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
        format!("{topic}/{number}: {} is missing or damaged", found.lost),
        format!(
            "committed were the offsets {} up to, but not including, {}, with {}",
            found.range.start,
            found.range.end,
            output::bytes(found.committed_bytes)
        ),
        format!("left without a gap: {}", held(found)),
    ];
    let missing = found.missing.iter().map(|range| format!("no object covers {}..{}", range.start, range.end));
    lines.extend(missing);
    lines.extend(found.unusable.iter().cloned());
    if found.left_over > 0 {
        lines.push(format!("{} not used", output::count(found.left_over.into(), "other object")));
    }
    match &found.doubt {
        None => lines.push("that is what was committed".to_owned()),
        Some(doubt) => lines.push(format!("that is not known to be what was committed: {doubt}")),
    }
    if found.log_start > found.range.start {
        lines.push(format!(
            "the log would start at {}: what lies before is given up, also the objects that are left of it",
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
        "doubt": found.doubt,
        "missing": missing.collect::<Vec<_>>(),
        "unusable": found.unusable,
        "left_over": found.left_over,
    })
}
