//! Attackers between brokers.

use std::net::TcpStream;

use strandline::proto::error::ErrorCode;

use super::connections::{Attacker, hold, runtime};
use crate::{
    broker::Home,
    cluster::{
        members::Cluster,
        network::{Network, inside},
    },
    etcd::{Etcd, Place},
    test_timeout::eventually,
};

/// Maximum number of open files of each broker: 16 connections for clients, 8 for brokers.
const OPEN_FILES: u32 = 256;
const GRPC_PLACES: usize = 16;

#[test]
fn a_broker_alone_opens_no_port_for_brokers() {
    let mut home = Home::new();
    let broker = home.start();
    TcpStream::connect(home.grpc()).expect("it serves clients");
    assert!(TcpStream::connect(home.peer()).is_err(), "there are no others");
    assert!(broker.terminate().success(), "{}", home.log());
}

/// Regression: brokers used the port of clients. While one host held all connections of a leader, a restarted follower could not connect
/// there.
#[test]
fn a_host_that_holds_all_client_connections_keeps_no_follower_out() {
    if !inside("hostile::peers::a_host_that_holds_all_client_connections_keeps_no_follower_out") {
        return;
    }
    let network = Network::make();
    network.add("a1", 11);
    let member = Place { ip: network.add("e1", 101), namespace: Some("e1".to_owned()) };
    let mut cluster = Cluster::over(Etcd::placed(vec![member]));
    for id in 1..=2 {
        let machine = format!("b{id}");
        let ip = network.add(&machine, u8::try_from(id).expect("few brokers"));
        let home = cluster.new_home(id).in_namespace(&machine, ip).open_files(OPEN_FILES);
        // Clients whose machine has failed do not close their connections.
        let home = home.setting("broker.shutdown_timeout", "\"2s\"");
        cluster.add(id, home.setting("limits.connections_per_address", GRPC_PLACES));
    }
    cluster.ready();
    cluster.cli().ok(&["topic", "create", "t", "--replication-factor", "2"]);
    cluster.in_sync("t", 2);
    let leader = cluster.leader("t", 0);
    let (follower, address) = (3 - leader, cluster.home(leader).grpc());
    cluster.kill(follower);

    let attacker = Attacker::begin("a1", address, 2 * GRPC_PLACES);
    assert_eq!(attacker.held, GRPC_PLACES, "{:?}", attacker.refusals);
    let refused = || runtime().block_on(async { hold(address).await.err().map(|fault| fault.code) });
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
