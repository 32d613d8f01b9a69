//! What the brokers lean on goes away: etcd's members, the disk of one of them. Nothing acknowledged is lost, and what waited goes on.

use std::time::Duration;

use strandline::task::clock;

use super::members::Cluster;
use crate::{
    crash::setting,
    patience::{PATIENCE, eventually, poll},
};

const TOPIC: &str = "calm";

fn cluster_with_topic(settings: &[&str]) -> Cluster {
    let cluster = Cluster::start(3);
    let create = ["topic", "create", TOPIC, "--replication-factor", "3", "--config", "min.insync.replicas=2"];
    cluster.cli().ok(&[&create[..], settings].concat());
    cluster.in_sync(TOPIC, 3);
    cluster
}

fn lines(from: u32, to: u32) -> String {
    (from..to).map(|line| format!("line {line}\n")).collect()
}

/// Longer than a lease lives: by it alone every broker would be dead.
#[test]
fn records_are_taken_and_read_while_etcd_is_gone() {
    let mut cluster = cluster_with_topic(&[]);
    let cli = cluster.cli();
    cli.ok_with(&["produce", TOPIC], lines(0, 100).as_bytes());
    for member in 0..3 {
        cluster.etcd.kill(member);
    }
    let gone = Duration::from_secs(setting("STRANDLINE_ETCD_GONE_SECONDS", 6));
    let since = clock::monotonic();
    let mut sent = 100;
    while since.elapsed() < gone {
        cli.ok_with(&["produce", TOPIC], lines(sent, sent + 10).as_bytes());
        sent += 10;
        let read = cli.ok(&["consume", TOPIC, "--from", "earliest", "--until-end"]);
        assert_eq!(read.text(), lines(0, sent));
    }
    for member in 0..3 {
        cluster.etcd.run(member);
    }
    // What needs agreement goes on with etcd, and nobody was taken for dead.
    eventually("a topic can be created", || (cli.run(&["topic", "create", "after"]).code == 0).then_some(()));
    cli.ok_with(&["produce", "after"], b"x\n");
    cluster.in_sync(TOPIC, 3);
    assert_eq!(cli.ok(&["consume", TOPIC, "--from", "earliest", "--until-end"]).text(), lines(0, sent));
}

/// One member of etcd after the other freezes for a while, its leader among them.
#[test]
fn a_frozen_member_of_etcd_costs_nothing() {
    let cluster = cluster_with_topic(&[]);
    let cli = cluster.cli();
    let mut sent = 0;
    for member in 0..3 {
        cluster.etcd.freeze(member);
        cli.ok_with(&["produce", TOPIC], lines(sent, sent + 10).as_bytes());
        sent += 10;
        let topic = format!("while-{member}-is-frozen");
        eventually("agreement goes on", || (cli.run(&["topic", "create", &topic]).code == 0).then_some(()));
        cluster.etcd.thaw(member);
    }
    cluster.in_sync(TOPIC, 3);
    assert_eq!(cli.ok(&["consume", TOPIC, "--from", "earliest", "--until-end"]).text(), lines(0, sent));
}

/// A broker comes back with an empty disk under its old number: it is not believed to hold anything, and is filled anew, from the bucket as
/// far as that reaches.
#[test]
fn a_broker_that_lost_its_disk_is_filled_again() {
    let history = ["segment.bytes=65536", "segment.ms=200", "local.retention.bytes=65536", "retention.ms=-1"];
    let settings: Vec<&str> = history.into_iter().flat_map(|one| ["--config", one]).collect();
    let mut cluster = cluster_with_topic(&settings);
    let cli = cluster.cli();
    cli.ok_with(&["produce", TOPIC], lines(0, 60_000).as_bytes());
    let leader = cluster.leader(TOPIC, 0);
    for lost in [leader, leader % 3 + 1] {
        cluster.kill(lost);
        cluster.wipe(lost);
        cluster.restart(lost);
        assert!(cluster.log(lost).contains("its replicas are copied anew"), "{}", cluster.log(lost));
        cluster.in_sync(TOPIC, 3);
    }
    // The two that were filled serve everything without the third.
    let third = (leader + 1) % 3 + 1;
    cluster.kill(third);
    let whole = poll(PATIENCE, || {
        let read = cli.run(&["consume", TOPIC, "--from", "earliest", "--until-end"]);
        (read.code == 0 && read.text() == lines(0, 60_000)).then_some(())
    });
    assert!(whole.is_some(), "{}", cluster.logs());
}
