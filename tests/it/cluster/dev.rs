//! `strandline dev` with several brokers whose metadata store is a real etcd.

use super::members::etcd;
use crate::{broker::BrokerInstance, test_timeout::eventually};

#[test]
fn dev_cluster_uses_etcd_and_logs_broker_ids() {
    let etcd = etcd(1);
    let url = etcd.endpoint(0);
    let instance = BrokerInstance::cluster(3);
    let broker = instance.start_dev_cluster_with(3, &["--etcd", &url]);
    let cli = instance.cli();
    cli.ok(&["topic", "create", "orders"]);
    cli.ok_with(&["produce", "orders"], b"one\ntwo\n");
    eventually("three are in sync", || {
        let described = cli.ok(&["topic", "describe", "orders", "--output", "json"]).json();
        (described["partitions"][0]["isr"].as_array().map(Vec::len) == Some(3)).then_some(())
    });
    assert!(!instance.data_dir().join("metadata.redb").exists(), "the brokers store their state in etcd");
    let log = instance.log();
    for id in 1..=3 {
        // Every task of a broker logs the broker's id, also tasks that it spawned, such as those of replication links.
        let of = format!("broker{{id={id}}}: ");
        assert!(log.lines().any(|line| line.contains(&of)), "{of}\n{log}");
    }
    let line = log
        .lines()
        .find(|line| line.contains("opened the link of a follower's broker"))
        .expect("the leader's broker logs the link");
    assert!(line.contains("broker{id="), "{line}");

    broker.kill9();
    let broker = instance.start_dev_cluster_with(3, &["--etcd", &url]);
    let read = eventually("the records are read", || {
        let read = cli.run(&["consume", "orders", "--from", "earliest", "--until-end"]);
        (read.code == 0).then(|| read.text())
    });
    assert_eq!(read, "one\ntwo\n");
    assert!(broker.terminate().success(), "{}", instance.log());
    for id in 1..=3 {
        let (of, log) = (format!("broker{{id={id}}}: "), instance.log());
        assert!(log.lines().filter(|line| line.contains(&of)).count() > 3, "{of}\n{log}");
    }
}
