//! A cluster gets a new broker and loses another one permanently. Replicas move to the new broker, and the lost
//! replicas are created again. No operator command is involved.

use serde_json::Value;

use super::members::Cluster;
use crate::{
    broker::{BrokerInstance, Cli, http_get},
    test_timeout::eventually,
};

/// Topics, with the replication factor and the durability of each. All have a min ISR of two.
const TOPICS: [(&str, usize, &str); 2] = [("three", 3, "replicated"), ("two", 2, "persisted")];

/// Number of partitions of each topic.
const PARTITIONS: u32 = 4;

/// Number of records that one call of [`send`] sends to each partition.
const SOME: u32 = 500;

/// Replaces lost brokers soon. The delay is longer than the lease of a broker that merely waits for CPU time.
fn hasty(instance: BrokerInstance) -> BrokerInstance {
    instance.setting("controller.replace_after", "\"3s\"")
}

/// Returns each partition of each topic.
fn logs() -> impl Iterator<Item = (&'static str, u32)> {
    TOPICS.into_iter().flat_map(|(topic, ..)| (0..PARTITIONS).map(move |partition| (topic, partition)))
}

/// Returns lines that each name their partition.
fn lines(topic: &str, partition: u32, from: u32, to: u32) -> String {
    (from..to).map(|line| format!("{topic}/{partition} line {line}\n")).collect()
}

/// Sends more records to each partition. Returns the number of records that each partition then has.
fn send(cli: &Cli, sent: u32) -> u32 {
    for (topic, partition) in logs() {
        let text = lines(topic, partition, sent, sent + SOME);
        cli.ok_with(&["produce", topic, "--partition", &partition.to_string()], text.as_bytes());
    }
    sent + SOME
}

/// Checks that every record is read once and in order. A new leader may not serve all committed records at once.
fn is_whole(cli: &Cli, sent: u32) {
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

/// Returns the number of partitions that a broker holds.
fn held(holders: &[Vec<u64>], broker: u64) -> usize {
    holders.iter().filter(|replicas| replicas.contains(&broker)).count()
}

/// Returns the number of changes that these brokers have made for a reason, as controllers.
fn steps(cluster: &Cluster, brokers: &[u32], reason: &str) -> f64 {
    let name = format!("strandline_controller_changes_total{{reason=\"{reason}\"}} ");
    let by = |id: &u32| {
        let (_, page) = http_get(cluster.instance(*id).http(), "/metrics").expect("a page");
        page.lines().find_map(|line| line.strip_prefix(name.as_str())?.parse::<f64>().ok()).unwrap_or(0.0)
    };
    brokers.iter().map(by).sum()
}

#[test]
fn replicas_move_to_new_broker_and_replace_lost_ones() {
    let mut cluster = Cluster::with(3, hasty);
    for (topic, factor, durability) in TOPICS {
        let (partitions, replicas) = (PARTITIONS.to_string(), factor.to_string());
        let create = ["topic", "create", topic, "--partitions", &partitions, "--replication-factor", &replicas];
        let durability = format!("durability={durability}");
        let config = ["--config", "min.insync.replicas=2", "--config", &durability];
        cluster.cli().ok(&[&create[..], &config].concat());
        cluster.in_sync(topic, factor);
    }
    let sent = send(&cluster.cli(), 0);

    let new = hasty(cluster.new_instance(4));
    cluster.add(4, new);
    cluster.ready();
    // Broker 4 is in the rack of broker 1. It therefore replaces broker 1 among three replicas until it holds almost as
    // many.
    eventually("replicas move to the new broker", || (held(&holders(&cluster)?, 4) >= 2).then_some(()));
    assert!(steps(&cluster, &[1, 2, 3, 4], "balanced") >= 1.0, "to balance the replicas of the brokers");
    let sent = send(&cluster.cli(), sent);

    cluster.kill(2);
    // With three replicas, two remain, which is the min ISR. With two replicas, writes wait until two are in sync
    // again.
    let sent = send(&cluster.cli(), sent);
    eventually("no partition has a replica on the removed broker", || {
        (held(&holders(&cluster)?, 2) == 0).then_some(())
    });
    assert!(steps(&cluster, &[1, 3, 4], "broker_replaced") >= 1.0, "the broker of these replicas was removed");
    is_whole(&cluster.cli(), sent);
}
