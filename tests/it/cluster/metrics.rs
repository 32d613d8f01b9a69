//! `/metrics` of a cluster. The metrics that operators watch change when a broker is killed, and recover when the
//! broker returns.

use super::members::Cluster;
use crate::test_timeout::eventually;

const TOPIC: &str = "watched";

/// Returns the sum of a metric over these brokers.
fn sum(cluster: &Cluster, ids: &[u32], name: &str) -> f64 {
    ids.iter().map(|id| cluster.instance(*id).metric(name)).sum()
}

/// Waits until `wanted` returns true for the sum of a metric over these brokers.
fn wait_for_sum(cluster: &Cluster, ids: &[u32], name: &str, wanted: impl Fn(f64) -> bool) {
    eventually(name, || wanted(sum(cluster, ids, name)).then_some(()));
}

#[test]
fn killed_broker_shows_in_metrics_of_peers_until_restart() {
    let mut cluster = Cluster::start(3);
    let create = ["topic", "create", TOPIC, "--partitions", "6", "--replication-factor", "3"];
    cluster.cli().ok(&[&create[..], &["--config", "min.insync.replicas=3"]].concat());
    cluster.wait_until_in_sync(TOPIC, 3);
    let all = [1, 2, 3];
    wait_for_sum(&cluster, &all, "strandline_partitions_led", |led| led == 6.0);
    wait_for_sum(&cluster, &all, "strandline_controller", |controllers| controllers == 1.0);
    let text: String = (0..5000).map(|line| format!("line {line}\n")).collect();
    for partition in ["0", "1", "2", "3", "4", "5"] {
        cluster.cli().ok_with(&["produce", TOPIC, "--partition", partition], text.as_bytes());
    }
    wait_for_sum(&cluster, &all, "strandline_partitions_under_replicated", |count| count == 0.0);
    assert_eq!(sum(&cluster, &all, "strandline_partitions"), 18.0);
    assert!(sum(&cluster, &all, "strandline_leader_elections_won_total") >= 6.0);
    // Each of the three brokers leads two of the six partitions, and sends their records to both other brokers.
    for (from, to) in [(1, 2), (2, 3), (3, 1)] {
        let sent = cluster.instance(from).metric(&format!("strandline_replication_sent_bytes_total{{peer=\"{to}\"}}"));
        let came = format!("strandline_replication_received_bytes_total{{peer=\"{from}\"}}");
        assert!(sent > 1000.0, "{from} → {to}: {sent}");
        eventually("all sent bytes have arrived", || (cluster.instance(to).metric(&came) == sent).then_some(()));
        let lag = format!("strandline_follower_lag_records{{peer=\"{to}\"}}");
        eventually("all records are acknowledged", || (cluster.instance(from).metric(&lag) == 0.0).then_some(()));
    }
    for id in all {
        let instance = cluster.instance(id);
        assert!(instance.metric("strandline_lease_remaining_seconds") > 0.0, "broker {id}");
        assert!(
            instance.metric("strandline_metadata_requests_total{request=\"transact\",outcome=\"committed\"}") >= 1.0
        );
        assert!(instance.metric("strandline_metadata_lists_total") >= 1.0);
        assert!(instance.metric("strandline_metadata_request_seconds_count{request=\"transact\"}") >= 1.0);
        // The metadata watch requests progress from etcd after two seconds without a message, so the staleness stays
        // low without changes.
        eventually("the broker receives etcd updates", || {
            (instance.metric("strandline_metadata_staleness_seconds") < 5.0).then_some(())
        });
    }

    let controller = *all.iter().find(|id| cluster.instance(**id).metric("strandline_controller") == 1.0).expect("one");
    let victim = controller % 3 + 1;
    let left: Vec<u32> = all.into_iter().filter(|id| *id != victim).collect();
    let shrinks = sum(&cluster, &left, "strandline_isr_shrinks_total");
    cluster.kill(victim);
    wait_for_sum(&cluster, &left, "strandline_partitions_led", |led| led == 6.0);
    wait_for_sum(&cluster, &left, "strandline_partitions_under_replicated", |count| count == 6.0);
    wait_for_sum(&cluster, &left, "strandline_partitions_under_min_isr", |count| count == 6.0);
    // Below the min ISR, a removed ISR member becomes a member of the ELR.
    wait_for_sum(&cluster, &left, "strandline_partitions_with_elr", |count| count == 6.0);
    wait_for_sum(&cluster, &left, "strandline_partitions_leaderless", |count| count == 0.0);
    assert!(sum(&cluster, &left, "strandline_isr_shrinks_total") >= shrinks);
    let elected = cluster.instance(controller).metric("strandline_elections_total{cause=\"failed\"}");
    assert!(elected >= 2.0, "other brokers lead the partitions of the killed broker: {elected}");
    assert!(cluster.instance(controller).metric("strandline_controller_changes_total{reason=\"elected\"}") >= 2.0);

    let expands = sum(&cluster, &left, "strandline_isr_expands_total");
    cluster.restart(victim);
    for name in ["under_replicated", "under_min_isr", "with_elr"] {
        wait_for_sum(&cluster, &all, &format!("strandline_partitions_{name}"), |count| count == 0.0);
    }
    assert!(
        sum(&cluster, &left, "strandline_isr_expands_total") >= expands + 6.0,
        "all six replicas are in sync again"
    );
    assert_eq!(sum(&cluster, &all, "strandline_elections_total{cause=\"unclean\"}"), 0.0);
}
