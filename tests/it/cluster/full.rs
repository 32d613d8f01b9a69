//! Brokers under disk pressure get no new replicas. Brokers with a full disk lead no partition that another broker can
//! lead.

use std::fs;

use super::members::Cluster;
use crate::{broker::http_get, full_disk::Mount, test_timeout::eventually};

#[test]
fn broker_under_disk_pressure_gets_no_new_replicas() {
    // Any machine uses more than one percent of its disk.
    let mut cluster = Cluster::with(3, |instance| instance.setting("broker.disk_pressure_percent", 1));
    let cli = cluster.cli();
    let refused = cli.run(&["topic", "create", "t"]);
    assert_ne!(refused.code, 0);
    let reason = "3 are online, of which 3 are under disk pressure (broker.disk_pressure_percent)";
    assert!(refused.stderr.contains(reason), "{}", refused.stderr);
    let described = cli.ok(&["cluster", "describe", "--output", "json"]).json();
    assert!(described["brokers"].as_array().expect("brokers").iter().all(|broker| broker["disk_pressure"] == true));
    let text = cli.ok(&["cluster", "describe"]).text();
    assert!(text.contains("broker 2 has disk pressure"), "{text}");
    assert_eq!(cluster.instance(1).metric("strandline_disk_pressure"), 1.0);

    for id in [1, 2] {
        cluster.stop(id);
        cluster.restart_with(id, |instance| instance.setting("broker.disk_pressure_percent", 100));
    }
    let refused = cli.run(&["topic", "create", "t", "--replication-factor", "3"]);
    assert!(refused.stderr.contains("3 are online, of which 1 is under disk pressure"), "{}", refused.stderr);
    cli.ok(&["topic", "create", "t", "--partitions", "4", "--replication-factor", "2"]);
    cluster.wait_until_in_sync("t", 2);
    for partition in cluster.partitions("t") {
        assert!(!partition["replicas"].as_array().expect("replicas").contains(&3.into()), "{partition}");
    }
    let refused = cli.run(&["partition", "reassign", "t/0", "--replicas", "1,3"]);
    assert!(refused.stderr.contains("broker 3, under disk pressure"), "{}", refused.stderr);

    cluster.stop(3);
    cluster.restart_with(3, |instance| instance.setting("broker.disk_pressure_percent", 100));
    cli.ok(&["partition", "reassign", "t/0", "--replicas", "1,3"]);
    let moved = || cluster.partitions("t")[0]["isr"] == serde_json::json!([1, 3]);
    eventually("the replica has moved", || moved().then_some(()));
}

/// A leader with a full disk transfers its leadership, and leads again when there is space. Regression, found by an
/// operator: the leader's disk was full. Its two followers were in sync and had space, and no record could be written.
#[test]
fn leader_with_full_disk_transfers_leadership_until_space() {
    let mut cluster = Cluster::with(3, |instance| instance.setting("log.journal_bytes", "\"16MiB\""));
    let cli = cluster.cli();
    cli.ok(&["topic", "create", "t", "--replication-factor", "3", "--config", "min.insync.replicas=2"]);
    cli.ok(&["partition", "reassign", "t", "--replicas", "1,2,3", "--wait"]);
    // A small disk replaces the disk of broker 1.
    cluster.stop(1);
    let Some(small) = Mount::new(cluster.instance(1).data_dir()) else { return };
    cluster.restart(1);
    cluster.wait_until_in_sync("t", 3);
    eventually("broker 1 leads", || (cluster.leader("t", 0) == 1).then_some(()));
    let filler = small.fill_up();

    let records = tempfile::NamedTempFile::new().expect("a file");
    fs::write(records.path(), format!("{}\n", "x".repeat(999)).repeat(8000)).expect("written");
    let sent = cli.ok(&["produce", "t", records.path().to_str().expect("text")]).text();
    assert!(sent.contains("acknowledged 8000 of 8000 records"), "{sent}");
    assert_ne!(cluster.leader("t", 0), 1, "another broker leads");
    let described = cli.ok(&["cluster", "describe"]).text();
    assert!(described.contains("the disk of broker 1 is full: leadership moves to other brokers"), "{described}");
    // The metric, the readiness page and the health report show the full disk too, although disk usage is below
    // `broker.disk_pressure_percent`. The broker stays ready.
    eventually("the metric reports disk pressure", || {
        (cluster.instance(1).metric("strandline_disk_pressure") == 1.0).then_some(())
    });
    let (code, page) = http_get(cluster.instance(1).http(), "/readyz").expect("the broker responds");
    assert!(code == 200 && page.contains("impaired: disk full since "), "{code}: {page}");
    // Repeated: a broker that takes more than a second to respond is reported as not responding.
    eventually("another broker reports disk pressure", || {
        let health = cluster.cli_by([2]).run(&["cluster", "health"]);
        assert_eq!(health.code, 1);
        health.text().lines().any(|line| line.starts_with("broker 1: disk full since ")).then_some(())
    });

    fs::remove_file(filler).expect("the file exists");
    cluster.wait_until_in_sync("t", 3);
    eventually("broker 1 leads again", || (cluster.leader("t", 0) == 1).then_some(()));
    let log = cluster.log(1);
    assert!(log.contains("records do not fit on the disk") && log.contains("records fit on the disk again"), "{log}");
}
