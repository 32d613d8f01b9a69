//! A new broker joins a cluster, and another broker is lost permanently. Replicas move to the new broker, and the lost
//! replicas are created again. No operator command is involved.

use serde_json::Value;

use super::members::Cluster;
use crate::{
    broker::{BrokerInstance, Cli, http_get},
    test_timeout::eventually,
};

/// Topics, with the replication factor and the durability of each. All have min ISR 2.
const TOPICS: [(&str, usize, &str); 2] = [("three", 3, "replicated"), ("two", 2, "persisted")];

/// Number of partitions of each topic.
const PARTITIONS: u32 = 4;

/// Number of records that one call of [`send`] sends to each partition.
const RECORDS_PER_SEND: u32 = 500;

/// Shortens the delay after which the replicas of an offline broker are replaced. The delay must not be shorter: a
/// broker that waits for CPU time may be unregistered for a moment.
fn with_short_replacement_delay(instance: BrokerInstance) -> BrokerInstance {
    instance.setting("controller.replace_after", "\"3s\"")
}

/// Returns each partition of each topic.
fn logs() -> impl Iterator<Item = (&'static str, u32)> {
    TOPICS.into_iter().flat_map(|(topic, ..)| (0..PARTITIONS).map(move |partition| (topic, partition)))
}

/// Returns the numbered lines `from..to` of a partition; each contains the name of the partition.
fn lines(topic: &str, partition: u32, from: u32, to: u32) -> String {
    (from..to).map(|line| format!("{topic}/{partition} line {line}\n")).collect()
}

/// Sends more records to each partition, which has `sent` records so far. Returns the number of records that each
/// partition then has.
fn send(cli: &Cli, sent: u32) -> u32 {
    for (topic, partition) in logs() {
        let text = lines(topic, partition, sent, sent + RECORDS_PER_SEND);
        cli.ok_with(&["produce", topic, "--partition", &partition.to_string()], text.as_bytes());
    }
    sent + RECORDS_PER_SEND
}

/// Waits until the `sent` records of each partition are read, once and in order. Repeated: a new leader may not serve
/// all committed records at once.
fn wait_for_all_records(cli: &Cli, sent: u32) {
    for (topic, partition) in logs() {
        let (all, number) = (lines(topic, partition, 0, sent), partition.to_string());
        eventually("every record is read", || {
            let read = cli.run(&["consume", topic, "--partition", &number, "--from", "earliest", "--until-end"]);
            assert!(all.starts_with(&read.text()), "{topic}/{partition} differs from the sent records: {read:?}");
            (read.code == 0 && read.text() == all).then_some(())
        });
    }
}

/// Returns the replicas of each partition. Returns `None` while a partition is being reassigned, has no leader, or has
/// a replica that is not in sync.
fn holders(cluster: &Cluster) -> Option<Vec<Vec<u64>>> {
    let mut holders = Vec::new();
    for (topic, factor, _) in TOPICS {
        for one in cluster.partitions(topic) {
            let ids = |field: &str| -> Vec<u64> {
                one[field].as_array().expect("a list").iter().filter_map(Value::as_u64).collect()
            };
            // A partition under reassignment has more replicas: those to add and those to remove.
            let (replicas, isr) = (ids("replicas"), ids("isr"));
            if !one["leader"].is_u64() || replicas.len() != factor || isr.len() != factor {
                return None;
            }
            holders.push(replicas);
        }
    }
    Some(holders)
}

/// Returns the number of partitions with a replica on this broker.
fn replica_count(holders: &[Vec<u64>], broker: u64) -> usize {
    holders.iter().filter(|replicas| replicas.contains(&broker)).count()
}

/// Returns the number of changes that these brokers made as controllers for `reason`, in total.
fn change_count(cluster: &Cluster, brokers: &[u32], reason: &str) -> f64 {
    let name = format!("strandline_controller_changes_total{{reason=\"{reason}\"}} ");
    let by = |id: &u32| {
        let (_, page) = http_get(cluster.instance(*id).http(), "/metrics").expect("a page");
        page.lines().find_map(|line| line.strip_prefix(name.as_str())?.parse::<f64>().ok()).unwrap_or(0.0)
    };
    brokers.iter().map(by).sum()
}

#[test]
fn replicas_move_to_new_broker_and_replace_lost_ones() {
    let mut cluster = Cluster::with(3, with_short_replacement_delay);
    for (topic, factor, durability) in TOPICS {
        let (partitions, replicas) = (PARTITIONS.to_string(), factor.to_string());
        let create = ["topic", "create", topic, "--partitions", &partitions, "--replication-factor", &replicas];
        let durability = format!("durability={durability}");
        let config = ["--config", "min.insync.replicas=2", "--config", &durability];
        cluster.cli().ok(&[&create[..], &config].concat());
        cluster.wait_until_in_sync(topic, factor);
    }
    let sent = send(&cluster.cli(), 0);

    let new = with_short_replacement_delay(cluster.new_instance(4));
    cluster.add(4, new);
    cluster.wait_until_ready();
    // Broker 4 is in the rack of broker 1. So in partitions with three replicas, broker 4 takes replicas only from
    // broker 1, until both have almost the same number.
    eventually("replicas move to the new broker", || (replica_count(&holders(&cluster)?, 4) >= 2).then_some(()));
    assert!(change_count(&cluster, &[1, 2, 3, 4], "balanced") >= 1.0, "to balance the replicas of the brokers");
    let sent = send(&cluster.cli(), sent);

    cluster.kill(2);
    // A partition with three replicas keeps two, which is the min ISR. Writes to a partition with two replicas wait
    // until two are in sync again.
    let sent = send(&cluster.cli(), sent);
    eventually("no partition has a replica on the removed broker", || {
        (replica_count(&holders(&cluster)?, 2) == 0).then_some(())
    });
    assert!(change_count(&cluster, &[1, 3, 4], "broker_replaced") >= 1.0, "the broker of these replicas was removed");
    wait_for_all_records(&cluster.cli(), sent);
}
