//! Output of reassignments and elections: lines and tables for people, JSON for programs.

use serde_json::{Value, json};

use crate::{
    cli::output::{self, format_ids},
    client::{ElectionResult, Reassignment, ReplicaDescription},
    model::BrokerId,
};

/// Returns the ordered reassignments as lines.
pub(super) fn reassigned(moves: &[Reassignment]) -> String {
    let mut lines: Vec<String> = moves.iter().map(ordered).collect();
    if moves.iter().any(|one| !one.adding.is_empty() || !one.removing.is_empty()) {
        lines.push("`strandline partition reassign status` shows active and queued reassignments".to_owned());
    }
    lines.join("\n")
}

/// Returns the ordered reassignment of one partition as a line.
fn ordered(one: &Reassignment) -> String {
    let (name, replicas) = (format!("{}/{}", one.topic, one.partition), format_ids(&one.replicas));
    let moving = !(one.adding.is_empty() && one.removing.is_empty());
    match (moving, one.changed) {
        (true, true) => {
            let what = [("adding", &one.adding), ("removing", &one.removing)];
            let what =
                what.iter().filter(|(_, set)| !set.is_empty()).map(|(word, set)| format!("{word} {}", format_ids(set)));
            format!("{name} moves to {replicas}: {}", what.collect::<Vec<_>>().join(", "))
        }
        (true, false) if one.queued => format!("{name} is queued to move to {replicas} already"),
        (true, false) => format!("{name} is moving to {replicas} already"),
        (false, true) => format!("{name} is on {replicas}: only their order changed"),
        (false, false) => format!("{name} is on {replicas} already"),
    }
}

/// Returns the reassignments that are not completed as a table.
pub(super) fn under_way(moves: &[Reassignment]) -> String {
    if moves.is_empty() {
        return "no partition is being reassigned".to_owned();
    }
    let row = |one: &Reassignment| {
        vec![
            one.topic.clone(),
            one.partition.to_string(),
            one.leader.map_or_else(|| "none".to_owned(), |leader| leader.to_string()),
            format_ids(&one.replicas),
            format_ids(&one.adding),
            format_ids(&one.removing),
            format_ids(&one.isr),
            state(one).to_owned(),
        ]
    };
    let header = ["TOPIC", "PARTITION", "LEADER", "TO", "ADDING", "REMOVING", "IN SYNC", "STATE"];
    output::tabled(&header, &[1, 2], moves.iter().map(row).collect())
}

/// Returns the state of a reassignment. Without a leader no replica can copy, even if the reassignment has started.
const fn state(one: &Reassignment) -> &'static str {
    match (one.leader, one.queued) {
        (None, _) => "no leader",
        (Some(_), true) => "queued",
        (Some(_), false) => "copying",
    }
}

/// Returns the results of cancelled reassignments as lines.
pub(super) fn taken_back(moves: &[Reassignment]) -> String {
    let line = |one: &Reassignment| match one.changed {
        true => format!("{}/{} stays on {}", one.topic, one.partition, format_ids(&one.replicas)),
        false => {
            format!(
                "the reassignment of {0}/{1} had ended: {0}/{1} is on {2}",
                one.topic,
                one.partition,
                format_ids(&one.replicas)
            )
        }
    };
    moves.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// Returns a reassignment as JSON.
pub(super) fn reassignment(one: &Reassignment) -> Value {
    json!({
        "topic": one.topic,
        "partition": one.partition,
        "leader": one.leader,
        "replicas": one.replicas,
        "adding": one.adding,
        "removing": one.removing,
        "isr": one.isr,
        "changed": one.changed,
        "queued": one.queued,
    })
}

/// Returns the effects of an unclean election as text: its replicas, and the records that would be lost.
pub(super) fn prospect(topic: &str, number: u32, would: &ElectionResult) -> String {
    let row = |replica: &ReplicaDescription| {
        let state = match (replica.empty, replica.in_sync, replica.eligible) {
            (true, ..) => "empty",
            (false, true, _) => "in sync",
            (false, false, true) => "eligible",
            (false, false, false) => "behind",
        };
        let (epoch, end, committed) = match &replica.positions {
            Ok((high_watermark, log_end, epoch)) => (
                epoch.map_or_else(|| "-".to_owned(), |epoch| epoch.to_string()),
                log_end.to_string(),
                high_watermark.to_string(),
            ),
            Err(_) => ("?".to_owned(), "?".to_owned(), "?".to_owned()),
        };
        vec![replica.broker.to_string(), state.to_owned(), epoch, end, committed]
    };
    let header = ["BROKER", "STATE", "LAST EPOCH", "LOG END", "HIGH WATERMARK"];
    let table = output::tabled(&header, &[0, 2, 3, 4], would.replicas.iter().map(row).collect());
    let mut lines =
        vec![format!("no replica can lead {topic}/{number} without loss"), String::new(), table, String::new()];
    for replica in &would.replicas {
        if let Err(error) = &replica.positions {
            lines.push(error.to_string());
        }
    }
    let lost = &would.lost;
    if would.discard_local {
        lines.push(format!(
            "no available replica has a usable log: the log of broker {} is deleted, and the partition continues \
             after the end of the object store\nrecords that are not in the object store are lost, acknowledged or \
             not, including those of \
             brokers that are offline",
            would.leader
        ));
        return lines.join("\n");
    }
    let is_empty = would.replicas.iter().any(|replica| replica.broker == would.leader && replica.empty);
    if is_empty {
        let what = format!("all records of {topic}/{number} that are not in the object store are lost");
        lines.push(format!("broker {} is empty: {what}\nthe number of these records is unknown", would.leader));
    } else {
        lines.push(format!("broker {} has the most complete log", would.leader));
    }
    if !lost.is_empty() {
        let records = output::count(lost.end.since(lost.start), "committed record");
        lines.push(format!("{records} would be lost: offsets {} up to, but not including, {}", lost.start, lost.end));
    }
    let unresponsive: Vec<BrokerId> =
        would.replicas.iter().filter(|replica| replica.positions.is_err()).map(|replica| replica.broker).collect();
    match unresponsive.is_empty() {
        false => lines.push(format!(
            "records that only broker {} has are lost as well, acknowledged or not",
            format_ids(&unresponsive)
        )),
        true if is_empty => {}
        true if lost.is_empty() => {
            lines.push(format!("no replica reports a committed record that broker {} lacks", would.leader))
        }
        true => lines.push("every replica responded".to_owned()),
    }
    lines.join("\n")
}

/// Returns a clean election as JSON.
pub(super) fn elected(topic: &str, number: u32, election: &ElectionResult) -> Value {
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
pub(super) fn uncleanly(topic: &str, number: u32, election: &ElectionResult) -> Value {
    let held = |replica: &ReplicaDescription| {
        let ends = replica.positions.as_ref().ok();
        json!({
            "broker": replica.broker,
            "in_sync": replica.in_sync,
            "eligible": replica.eligible,
            "empty": replica.empty,
            "last_epoch": ends.and_then(|(_, _, epoch)| *epoch),
            "log_end": ends.map(|(_, log_end, _)| log_end),
            "high_watermark": ends.map(|(high_watermark, ..)| high_watermark),
            "error": replica.positions.as_ref().err().map(ToString::to_string),
        })
    };
    let mut value = elected(topic, number, election);
    value["unclean"] = true.into();
    value["replicas"] = election.replicas.iter().map(held).collect();
    value["lost_start"] = json!(election.lost.start);
    value["lost_end"] = json!(election.lost.end);
    value["discard_local"] = election.discard_local.into();
    value
}
