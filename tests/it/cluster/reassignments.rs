//! Reassignments by operators on real brokers. Reassignments are queued, and `--wait` waits for their end.

use serde_json::{Value, json};

use super::members::Cluster;
use crate::test_timeout::eventually;

fn replicas(cluster: &Cluster, topic: &str) -> Vec<Value> {
    cluster.partitions(topic).into_iter().map(|one| one["replicas"].clone()).collect()
}

#[test]
fn reassignments_are_queued_and_can_be_waited_for() {
    // One reassignment at a time, each slow enough to be observed: a replica that catches up copies 256 KiB per second.
    let slow = 256 << 10;
    let cluster = Cluster::with(3, |instance| {
        instance
            .setting("controller.max_concurrent_reassignments", 1)
            .setting("controller.balance", "false")
            .setting("replication.catchup_bytes_per_second", slow)
    });
    let cli = cluster.cli();
    let create = ["topic", "create", "orders", "--partitions", "3", "--replication-factor", "1"];
    cli.ok(&[&create[..], &["--config", "remote.storage.enable=false"]].concat());
    let created = cli.run(&["topic", "create", "two", "--replication-factor", "2"]);
    assert!(created.code == 0 && created.stderr.contains("hint: min.insync.replicas is 1"), "{created:?}");
    let created =
        cli.run(&["topic", "create", "safe", "--replication-factor", "2", "--config", "min.insync.replicas=2"]);
    assert_eq!((created.code, &*created.stderr), (0, ""), "the output has no hint");
    let text: String = (0..40_000).map(|line| format!("line {line} of the orders\n")).collect();
    for partition in ["0", "1", "2"] {
        cli.ok_with(&["produce", "orders", "--partition", partition], text.as_bytes());
    }
    let before = replicas(&cluster, "orders");
    // Each partition moves from its broker to the broker with the next id (1 after 3).
    for (number, at) in before.iter().enumerate() {
        let (name, to) = (format!("orders/{number}"), at[0].as_u64().expect("a number") % 3 + 1);
        let ordered = cli.ok(&["partition", "reassign", &name, "--replicas", &to.to_string(), "--output", "json"]);
        assert_eq!(ordered.json()[0]["adding"], json!([to]), "{}", ordered.text());
    }
    let status = cli.ok(&["partition", "reassign", "status", "--output", "json"]).json();
    let status = status.as_array().expect("a list");
    let waiting = status.iter().filter(|one| one["queued"] == true).count();
    assert!(status.len() == 3 && waiting >= 2, "one reassignment at a time: {status:?}");
    let listed = cli.ok(&["partition", "reassign", "status"]).text();
    assert!(listed.contains("queued"), "{listed}");

    let again = before[2][0].as_u64().expect("a number") % 3 + 1;
    let order = ["partition", "reassign", "orders/2", "--replicas", &again.to_string(), "--wait"];
    let late = cli.run(&[&order[..], &["--timeout", "1"]].concat());
    assert_eq!(late.code, 1, "{late:?}");
    let reason = "timed out after 1 s: 1 partition to move (queued: 1); the operation continues";
    assert!(late.stderr.contains(reason), "{late:?}");
    let done = cli.ok(&[&order[..], &["--output", "json"]].concat()).json();
    assert_eq!((&done[0]["isr"], &done[0]["adding"], &done[0]["queued"]), (&json!([again]), &json!([]), &json!(false)));
    eventually("all partitions are reassigned", || {
        let status = cli.ok(&["partition", "reassign", "status", "--output", "json"]).json();
        (status == json!([])).then_some(())
    });
    assert!(replicas(&cluster, "orders").iter().zip(&before).all(|(now, before)| now != before));
    for partition in ["0", "1", "2"] {
        let read = cli.ok(&["consume", "orders", "--partition", partition, "--until-end"]);
        assert!(read.text() == text, "partition {partition} has all records");
    }
    let steps = (1..=3).map(|id| {
        let (_, page) = crate::broker::http_get(cluster.instance(id).http(), "/metrics").expect("a page");
        let name = "strandline_controller_changes_total{reason=\"reassignment_started\"} ";
        page.lines().find_map(|line| line.strip_prefix(name)?.parse::<f64>().ok()).unwrap_or(0.0)
    });
    assert_eq!(steps.sum::<f64>(), 3.0, "each reassignment started once");

    let drained = cli.ok(&["broker", "drain", "1", "--wait"]).text();
    assert!(drained.contains("broker 1 is empty after") && drained.contains("it can be stopped for good"), "{drained}");
    let brokers = cli.ok(&["cluster", "describe", "--output", "json"]).json();
    assert_eq!(brokers["brokers"][0]["replica_count"], 0, "{brokers}");
    // Partitions with one replica can move to broker 3. Partitions with two replicas cannot leave brokers 2 and 3,
    // because broker 1 is drained.
    let some = cli.run(&["broker", "drain", "2", "--wait", "--timeout", "1"]);
    assert!(some.code == 1 && some.text().contains("cannot move"), "{some:?}");
    assert!(some.stderr.contains("timed out after 1 s") && some.stderr.contains("still on broker 2"), "{some:?}");
    let only_blocked = || {
        let state = cli.ok(&["cluster", "describe", "--output", "json"]).json()["brokers"][1].clone();
        (state["replica_count"] == 2 && state["blocked"] == 2).then_some(())
    };
    eventually("all possible reassignments have completed", only_blocked);
    // Without `--wait` the command fails at once; with `--wait` after a minute in which no replica could move.
    for order in [&["broker", "drain", "2"][..], &["broker", "drain", "2", "--wait"]] {
        let blocked = cli.run(order);
        assert!(blocked.code == 1 && blocked.text().contains("2 replicas cannot move"), "{blocked:?}");
        assert!(blocked.stderr.contains("no replica on broker 2 can move"), "{blocked:?}");
    }
    let waits = cli.run(&["broker", "drain", "2", "--wait", "--wait-for-brokers", "--timeout", "1"]);
    assert!(waits.code == 1 && waits.stderr.contains("timed out after 1 s"), "{waits:?}");
}
