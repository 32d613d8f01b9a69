//! `strandline partition rebuild-manifest`: rebuilds a lost manifest from the remaining objects.

use clap::Args;
use serde_json::{Value, json};

use super::{TopicOrPartition, confirm, explain_for, parse_partition, show};
use crate::{
    cli::output::{self, OutputFormat},
    client::{Admin, ManifestRebuild},
};

/// Rebuild a partition's lost manifest from the objects that are left
///
/// The manifest lists a partition's segment objects. The partition's leader rebuilds a lost manifest by itself if the
/// remaining segments are the committed ones. If they may differ, this command shows the remaining and the missing
/// segments, and prompts before the rebuild, which may abandon records.
#[derive(Debug, Args)]
pub(in crate::cli) struct RebuildManifestArgs {
    /// The partition
    #[arg(value_name = "TOPIC/N", value_parser = parse_partition)]
    name: TopicOrPartition,
    /// Do not prompt; required without a terminal if the remaining segments may differ from the committed ones
    #[arg(long)]
    yes: bool,
}

/// Surveys the objects and rebuilds the manifest. Prompts, unless `--yes` is set, if the remaining segments may differ
/// from the committed ones.
pub(super) async fn run(admin: &Admin, command: &RebuildManifestArgs, output: OutputFormat) -> anyhow::Result<()> {
    let (topic, number) =
        (command.name.topic.as_str(), command.name.partition.expect("the parser requires a partition"));
    let survey = match admin.survey_manifest(topic, number).await {
        Ok(survey) => survey,
        Err(error) => return Err(explain_for(admin, Some(&command.name), error).await),
    };
    let consequences = format_consequences(topic, number, &survey);
    if !command.yes && survey.obstacle.is_some() {
        confirm(&consequences, "rebuild the manifest from the remaining objects?")?;
    }
    let rebuilt = match admin.rebuild_manifest(topic, number, &survey).await {
        Ok(rebuilt) => rebuilt,
        Err(error) => return Err(explain_for(admin, Some(&command.name), error).await),
    };
    let result = format!("rebuilt the manifest of {topic}/{number}: {}", format_segments(&rebuilt));
    show(&survey_json(topic, number, &survey), &format!("{consequences}\n{result}"), output)
}

/// Formats the segments that the manifest lists after the rebuild.
fn format_segments(survey: &ManifestRebuild) -> String {
    let segments = output::count(survey.segments.into(), "segment");
    format!(
        "{segments}, {}, offsets {} up to, but not including, {}",
        output::bytes(survey.bytes),
        survey.log_start,
        survey.range.end
    )
}

/// Returns the result of the survey as text, which the user confirms.
fn format_consequences(topic: &str, number: u32, survey: &ManifestRebuild) -> String {
    let mut lines = vec![
        format!("{topic}/{number}: {} is missing or corrupt", survey.lost),
        format!(
            "committed: offsets {} up to, but not including, {}, with {}",
            survey.range.start,
            survey.range.end,
            output::bytes(survey.committed_bytes)
        ),
        format!("remaining without a gap: {}", format_segments(survey)),
    ];
    let missing = survey.missing.iter().map(|range| format!("no object covers {}..{}", range.start, range.end));
    lines.extend(missing);
    lines.extend(survey.unusable.iter().cloned());
    if survey.unused > 0 {
        lines.push(format!("{} not used", output::count(survey.unused.into(), "other object")));
    }
    match &survey.obstacle {
        None => lines.push("the remaining segments are the committed ones".to_owned()),
        Some(obstacle) => lines.push(format!("the remaining segments may differ from the committed ones: {obstacle}")),
    }
    if survey.log_start > survey.range.start {
        lines.push(format!(
            "the log would start at {}: earlier records are abandoned, including their remaining objects",
            survey.log_start
        ));
    }
    lines.join("\n")
}

/// Returns the result of the survey as JSON.
fn survey_json(topic: &str, number: u32, survey: &ManifestRebuild) -> Value {
    let missing = survey.missing.iter().map(|range| json!({ "start": range.start, "end": range.end }));
    json!({
        "topic": topic,
        "partition": number,
        "lost": survey.lost,
        "log_start": survey.range.start,
        "tiered_end": survey.range.end,
        "committed_bytes": survey.committed_bytes,
        "new_log_start": survey.log_start,
        "segments": survey.segments,
        "bytes": survey.bytes,
        "obstacle": survey.obstacle,
        "missing": missing.collect::<Vec<_>>(),
        "unusable": survey.unusable,
        "unused": survey.unused,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Offset;

    #[test]
    fn survey_json_matches_golden_file() {
        let offset = |value| Offset::new(value).expect("small");
        let survey = ManifestRebuild {
            lost: "manifest-00000007".to_owned(),
            range: offset(100)..offset(900),
            committed_bytes: 80_000,
            log_start: offset(500),
            segments: 4,
            bytes: 40_000,
            obstacle: Some("a segment is missing".to_owned()),
            missing: vec![offset(200)..offset(300), offset(400)..offset(500)],
            unusable: vec!["segment 400 has no footer".to_owned()],
            unused: 3,
            plan: "plan".to_owned(),
            committed: false,
        };
        let messages = ["RebuildManifestRequest", "RebuildManifestResponse", "OffsetRange"];
        let value = survey_json("orders", 0, &survey);
        output::golden::json("partition-rebuild-manifest.json", &value, &messages, &[]);
    }
}
