//! A leader that is isolated from the other brokers and from etcd, but not from its clients. It signals to its readers
//! that another broker may lead. Its writers get no response. Readers and writers continue at the new leader while the
//! isolation lasts.

use strandline::task::clock;

use super::{
    machines::{BROKERS, Machines},
    network::run_inside,
};
use crate::{running::Running, test_timeout::eventually};

#[test]
fn clients_of_isolated_leader_continue_at_its_successor() {
    if !run_inside("cluster::isolated_leader::clients_of_isolated_leader_continue_at_its_successor") {
        return;
    }
    let machines = Machines::make();
    let cluster = &machines.cluster;
    let cli = cluster.cli();
    cli.ok(&["topic", "create", "t", "--replication-factor", "3", "--config", "min.insync.replicas=2"]);
    cluster.wait_until_in_sync("t", 3);
    let old = cluster.leader("t", 0);
    let reader = Running::start(&cluster.cli_by([old]), &["consume", "t", "--from", "earliest"]);
    cli.ok_with(&["produce", "t"], b"before\n");
    reader.wait_for_output(&reader.stdout, "before\n");

    machines.part_from_brokers(old, true);
    machines.part_from_etcd(old, true);
    let since = clock::monotonic();
    let others = cluster.cli_by((1..=BROKERS).filter(|id| *id != old));
    eventually("another broker leads", || {
        let described = others.run(&["topic", "describe", "t", "--output", "json"]);
        let leader = (described.code == 0).then(|| described.json()["partitions"][0]["leader"].as_u64())??;
        (leader != u64::from(old)).then_some(())
    });
    println!("alone: another broker led {:?} after the cut", since.elapsed());
    // No client writes to the old leader, so only its signal `lease_expired` makes its reader move to the new leader.
    others.ok_with(&["produce", "t"], b"behind its back\n");
    reader.wait_for_output(&reader.stdout, "behind its back\n");
    println!("alone: the reader had the records of the successor {:?} after the cut", since.elapsed());
    // The old leader still reports its outdated leadership and log end. A client that connects through it must
    // nevertheless read from and write to the new leader.
    let by_old = cluster.cli_by([old]);
    let read = by_old.ok(&["consume", "t", "--from", "earliest", "--until-end"]);
    assert_eq!(read.text(), "before\nbehind its back\n");
    by_old.ok_with(&["produce", "t"], b"by way of it\n");
    reader.wait_for_output(&reader.stdout, "by way of it\n");

    machines.part_from_brokers(old, false);
    machines.part_from_etcd(old, false);
    eventually("the replica is in sync", || {
        let described = by_old.ok(&["topic", "describe", "t", "--output", "json"]).json();
        let isr = described["partitions"][0]["isr"].as_array().map(Vec::len);
        (described["partitions"][0]["leader"] != old && isr == Some(3)).then_some(())
    });
    let expected = "before\nbehind its back\nby way of it\n";
    assert_eq!(cli.ok(&["consume", "t", "--from", "earliest", "--until-end"]).text(), expected);
    assert_eq!(*reader.stdout.lock(), expected, "each once and in order");
}
