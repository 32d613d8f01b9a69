//! Attackers between brokers.

use strandline::proto::fault::Reason;
use tokio::task::block_in_place;

use super::connections::hold;
use crate::{cluster::members::Cluster, patience::eventually};

/// Open files of each broker: 32 places for clients, 32 for brokers.
const OPEN_FILES: u32 = 256;
const GRPC_PLACES: usize = 32;

/// Places for connections from the broker's own machine.
const LOOPBACK_PLACES: usize = 8;

/// Brokers came through the clients' port once: while one host held all connections of a leader, a follower that was restarted found no
/// place there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_holds_all_client_connections_keeps_no_follower_out() {
    let (mut cluster, leader) = block_in_place(|| {
        let settings = |home: crate::broker::Home| {
            home.open_files(OPEN_FILES).setting("limits.connections_per_address", GRPC_PLACES)
        };
        let cluster = Cluster::with(2, settings);
        cluster.cli().ok(&["topic", "create", "t", "--replication-factor", "2"]);
        cluster.in_sync("t", 2);
        let leader = cluster.leader("t", 0);
        (cluster, leader)
    });
    let (follower, address) = (3 - leader, cluster.home(leader).grpc());
    block_in_place(|| cluster.kill(follower));

    let (mut held, mut refused) = (Vec::new(), None);
    while refused.is_none() {
        match hold(address).await {
            Ok(one) => held.push(one),
            Err(fault) => refused = Some(fault),
        }
    }
    // The other broker, and whoever waits for the first to be ready, may have had some of them.
    assert!(held.len() > GRPC_PLACES && held.len() <= GRPC_PLACES + LOOPBACK_PLACES, "{} are held", held.len());
    assert_eq!(refused.expect("one was").reason, Reason::Overloaded);

    block_in_place(|| {
        cluster.restart(follower);
        let cli = cluster.cli_by([follower]);
        eventually("the follower is in sync", || {
            let described = cli.run(&["topic", "describe", "t", "--output", "json"]);
            let partition = (described.code == 0).then(|| described.json()["partitions"][0].clone())?;
            (partition["leader"] == leader && partition["isr"].as_array().map(Vec::len) == Some(2)).then_some(())
        });
    });
    assert_eq!(hold(address).await.err().map(|fault| fault.reason), Some(Reason::Overloaded));
    drop(held);
}
