//! Output of reassignments and elections: lines and tables for people, JSON for programs.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::{
    cli::output::{self, format_ids},
    client::{ElectionResult, Reassignment, ReplicaDescription},
    model::BrokerId,
};

/// Maximum number of partitions that a line lists.
const MAX_NAMED: usize = 8;

/// Returns the result of a request for reassignments, one line per partition.
pub(super) fn format_requested(reassignments: &[Reassignment]) -> String {
    let mut lines: Vec<String> = reassignments.iter().map(format_requested_partition).collect();
    if reassignments.iter().any(changes_brokers) {
        lines.push("`strandline partition reassign status` shows active and queued reassignments".to_owned());
    }
    lines.join("\n")
}

/// Returns true if replicas are added or removed. Otherwise the partition is already on the requested brokers, and at
/// most the order of its replicas changes.
fn changes_brokers(reassignment: &Reassignment) -> bool {
    !reassignment.adding.is_empty() || !reassignment.removing.is_empty()
}

/// Returns the result of a request for the reassignment of one partition as a line.
fn format_requested_partition(reassignment: &Reassignment) -> String {
    let name = format!("{}/{}", reassignment.topic, reassignment.partition);
    let replicas = format_ids(&reassignment.replicas);
    match (changes_brokers(reassignment), reassignment.changed) {
        (true, true) => {
            let changes = [("adding", &reassignment.adding), ("removing", &reassignment.removing)];
            let changes = changes
                .iter()
                .filter(|(_, ids)| !ids.is_empty())
                .map(|(verb, ids)| format!("{verb} {}", format_ids(ids)));
            format!("{name} moves to {replicas}: {}", changes.collect::<Vec<_>>().join(", "))
        }
        (true, false) if reassignment.queued => format!("{name} is queued to move to {replicas} already"),
        (true, false) => format!("{name} is moving to {replicas} already"),
        (false, true) => format!("{name} already has its replicas on brokers {replicas}: only the order changed"),
        (false, false) => format!("{name} is on {replicas} already"),
    }
}

/// Returns the reassignments that are not completed as a table, and the remedy for partitions without a leader.
pub(super) fn format_status(reassignments: &[Reassignment]) -> String {
    if reassignments.is_empty() {
        return "no partition is being reassigned".to_owned();
    }
    let row = |reassignment: &Reassignment| {
        vec![
            reassignment.topic.clone(),
            reassignment.partition.to_string(),
            reassignment.leader.map_or_else(|| "none".to_owned(), |leader| leader.to_string()),
            format_ids(&reassignment.replicas),
            format_ids(&reassignment.adding),
            format_ids(&reassignment.removing),
            format_ids(&reassignment.isr),
            state(reassignment).to_owned(),
        ]
    };
    let header = ["TOPIC", "PARTITION", "LEADER", "TO", "ADDING", "REMOVING", "IN SYNC", "STATE"];
    let mut lines = vec![output::tabled(&header, &[1, 2], reassignments.iter().map(row).collect())];
    let notes = leaderless_partitions(reassignments);
    if !notes.is_empty() {
        lines.push(String::new());
        lines.extend(notes);
    }
    lines.join("\n")
}

/// Returns a line for each topic that has partitions without a leader. The line lists the first [`MAX_NAMED`] of them.
fn leaderless_partitions(reassignments: &[Reassignment]) -> Vec<String> {
    let mut topics: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for reassignment in reassignments.iter().filter(|reassignment| reassignment.leader.is_none()) {
        let name = format!("{}/{}", reassignment.topic, reassignment.partition);
        topics.entry(&reassignment.topic).or_default().push(name);
    }
    let line = |(topic, mut names): (&str, Vec<String>)| {
        let verb = if names.len() == 1 { "has" } else { "have" };
        if names.len() > MAX_NAMED {
            names.truncate(MAX_NAMED);
            names.push("…".to_owned());
        }
        format!("{} {verb} no leader to copy from: see `strandline topic describe {topic}`", names.join(" "))
    };
    topics.into_iter().map(line).collect()
}

/// Returns the state of a reassignment. Without a leader no replica can copy, even if the reassignment has started.
const fn state(reassignment: &Reassignment) -> &'static str {
    match (reassignment.leader, reassignment.queued) {
        (None, _) => "no leader",
        (Some(_), true) => "queued",
        (Some(_), false) => "copying",
    }
}

/// Returns the results of cancelled reassignments as lines.
pub(super) fn format_cancelled(reassignments: &[Reassignment]) -> String {
    let line = |reassignment: &Reassignment| match reassignment.changed {
        true => {
            format!("{}/{} stays on {}", reassignment.topic, reassignment.partition, format_ids(&reassignment.replicas))
        }
        false => {
            format!(
                "the reassignment of {0}/{1} had ended: {0}/{1} is on {2}",
                reassignment.topic,
                reassignment.partition,
                format_ids(&reassignment.replicas)
            )
        }
    };
    reassignments.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// Returns a reassignment as JSON.
pub(super) fn reassignment_json(reassignment: &Reassignment) -> Value {
    json!({
        "topic": reassignment.topic,
        "partition": reassignment.partition,
        "leader": reassignment.leader,
        "replicas": reassignment.replicas,
        "adding": reassignment.adding,
        "removing": reassignment.removing,
        "isr": reassignment.isr,
        "changed": reassignment.changed,
        "queued": reassignment.queued,
    })
}

/// Returns the consequences of an unclean election as text: the state of the replicas, and the records that would be
/// lost. `dry_run` is the election that would take place.
pub(super) fn format_consequences(topic: &str, number: u32, dry_run: &ElectionResult) -> String {
    let row = |replica: &ReplicaDescription| {
        let state = match (replica.empty, replica.in_sync, replica.eligible) {
            (true, ..) => "empty",
            (false, true, _) => "in sync",
            (false, false, true) => "eligible",
            (false, false, false) => "behind",
        };
        let (last_epoch, log_end, high_watermark) = match &replica.positions {
            Ok((high_watermark, log_end, epoch)) => (
                epoch.map_or_else(|| "-".to_owned(), |epoch| epoch.to_string()),
                log_end.to_string(),
                high_watermark.to_string(),
            ),
            Err(_) => ("?".to_owned(), "?".to_owned(), "?".to_owned()),
        };
        vec![replica.broker.to_string(), state.to_owned(), last_epoch, log_end, high_watermark]
    };
    let header = ["BROKER", "STATE", "LAST EPOCH", "LOG END", "HIGH WATERMARK"];
    let table = output::tabled(&header, &[0, 2, 3, 4], dry_run.replicas.iter().map(row).collect());
    let mut lines =
        vec![format!("no replica can lead {topic}/{number} without loss"), String::new(), table, String::new()];
    for replica in &dry_run.replicas {
        if let Err(error) = &replica.positions {
            lines.push(error.to_string());
        }
    }
    let lost = &dry_run.lost;
    if dry_run.discard_local {
        lines.push(format!(
            "no available replica has a usable log: the election would delete the log of broker {}\nthe partition \
             would continue after its last record in the object store\nall other records would be lost, acknowledged \
             or not, including those that only offline brokers have",
            dry_run.leader
        ));
        return lines.join("\n");
    }
    let is_empty = dry_run.replicas.iter().any(|replica| replica.broker == dry_run.leader && replica.empty);
    if is_empty {
        lines.push(format!(
            "broker {} is empty: all records of {topic}/{number} that are not in the object store would be lost\nthe \
             number of these records is unknown",
            dry_run.leader
        ));
    } else {
        lines.push(format!(
            "broker {} would be elected: it has the newest log (highest last epoch, then highest log end)",
            dry_run.leader
        ));
    }
    if !lost.is_empty() {
        let records = output::count(lost.end.since(lost.start), "committed record");
        lines.push(format!("{records} would be lost: offsets {} up to, but not including, {}", lost.start, lost.end));
    }
    let unresponsive: Vec<BrokerId> =
        dry_run.replicas.iter().filter(|replica| replica.positions.is_err()).map(|replica| replica.broker).collect();
    match unresponsive.is_empty() {
        false => lines.push(format!(
            "records that exist only on broker {} would be lost as well, acknowledged or not",
            format_ids(&unresponsive)
        )),
        true if is_empty => {}
        true if lost.is_empty() => {
            lines.push(format!("no replica reports a committed record that broker {} lacks", dry_run.leader))
        }
        true => lines.push("every replica responded".to_owned()),
    }
    lines.join("\n")
}

/// Returns a clean election as JSON.
pub(super) fn election_json(topic: &str, number: u32, election: &ElectionResult) -> Value {
    json!({
        "topic": topic,
        "partition": number,
        "leader": election.leader,
        "leader_epoch": election.leader_epoch,
        "unclean": false,
        "changed": election.changed,
    })
}

/// Returns an unclean election as JSON.
pub(super) fn unclean_election_json(topic: &str, number: u32, election: &ElectionResult) -> Value {
    let replica_json = |replica: &ReplicaDescription| {
        let positions = replica.positions.as_ref().ok();
        json!({
            "broker": replica.broker,
            "in_sync": replica.in_sync,
            "eligible": replica.eligible,
            "empty": replica.empty,
            "last_epoch": positions.and_then(|(_, _, epoch)| *epoch),
            "log_end": positions.map(|(_, log_end, _)| log_end),
            "high_watermark": positions.map(|(high_watermark, ..)| high_watermark),
            "error": replica.positions.as_ref().err().map(ToString::to_string),
        })
    };
    let mut value = election_json(topic, number, election);
    value["unclean"] = true.into();
    value["replicas"] = election.replicas.iter().map(replica_json).collect();
    value["lost_start"] = json!(election.lost.start);
    value["lost_end"] = json!(election.lost.end);
    value["discard_local"] = election.discard_local.into();
    value
}
