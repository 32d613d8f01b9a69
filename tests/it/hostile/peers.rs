//! Attackers of the ports for clients do not affect replication, and a standalone broker opens no port for brokers.

use std::net::TcpStream;

use strandline::proto::error::ErrorCode;

use super::connections::{Attacker, hold, runtime};
use crate::{
    broker::BrokerInstance,
    cluster::{
        members::Cluster,
        network::{Network, run_inside},
    },
    etcd::{Etcd, MemberHost},
    test_timeout::eventually,
};

/// Maximum number of open files of each broker: 16 connections for clients, 8 for brokers.
const OPEN_FILES: u32 = 256;
const MAX_GRPC_CONNECTIONS: usize = 16;

#[test]
fn standalone_broker_opens_no_peer_port() {
    let mut instance = BrokerInstance::new();
    let broker = instance.start();
    TcpStream::connect(instance.grpc()).expect("the broker serves clients");
    assert!(TcpStream::connect(instance.peer()).is_err(), "no port for brokers is open");
    assert!(broker.terminate().success(), "{}", instance.log());
}

/// Regression: brokers used the port of clients. While one host held all connections of a leader, a restarted follower
/// could not connect there.
#[test]
fn host_with_all_client_connections_blocks_no_follower() {
    if !run_inside("hostile::peers::host_with_all_client_connections_blocks_no_follower") {
        return;
    }
    let network = Network::make();
    network.add("a1", 11);
    let member = MemberHost { ip: network.add("e1", 101), namespace: Some("e1".to_owned()) };
    let mut cluster = Cluster::with_etcd(Etcd::on_hosts(vec![member]));
    for id in 1..=2 {
        let machine = format!("b{id}");
        let ip = network.add(&machine, u8::try_from(id).expect("few brokers"));
        let instance = cluster.new_instance(id).in_namespace(&machine, ip).open_files(OPEN_FILES);
        // Clients whose machine has failed do not close their connections.
        let instance = instance.setting("broker.shutdown_timeout", "\"2s\"");
        cluster.add(id, instance.setting("limits.connections_per_address", MAX_GRPC_CONNECTIONS));
    }
    cluster.wait_until_ready();
    cluster.cli().ok(&["topic", "create", "t", "--replication-factor", "2"]);
    cluster.wait_until_in_sync("t", 2);
    let leader = cluster.leader("t", 0);
    let (follower, address) = (3 - leader, cluster.instance(leader).grpc());
    cluster.kill(follower);

    let attacker = Attacker::begin("a1", address, 2 * MAX_GRPC_CONNECTIONS);
    assert_eq!(attacker.held, MAX_GRPC_CONNECTIONS, "{:?}", attacker.refusals);
    let refused = || runtime().block_on(async { hold(address).await.err().map(|error| error.code) });
    assert_eq!(refused(), Some(ErrorCode::Overloaded));

    cluster.restart(follower);
    let cli = cluster.cli_by([follower]);
    eventually("the follower is in sync", || {
        let described = cli.run(&["topic", "describe", "t", "--output", "json"]);
        let partition = (described.code == 0).then(|| described.json()["partitions"][0].clone())?;
        (partition["leader"] == leader && partition["isr"].as_array().map(Vec::len) == Some(2)).then_some(())
    });
    assert_eq!(refused(), Some(ErrorCode::Overloaded));
    drop(attacker);
}
