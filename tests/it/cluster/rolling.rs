//! Controlled shutdowns: every broker is stopped and restarted under load, one after the other, and no client call
//! fails. A broker that cannot transfer its leadership continues to serve.

use std::time::Duration;

use rand::{SeedableRng as _, rngs::StdRng};
use strandline::task::clock;

use super::{failover::start_with_load, members::Cluster};
use crate::{
    broker::http_get,
    crash::{PARTITIONS, setting},
    crash_client::TOPIC,
    test_timeout::eventually,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rolling_restart_fails_no_client_call() {
    let seed = setting("STRANDLINE_SEED", clock::wall_ms().unsigned_abs());
    println!("rolling: STRANDLINE_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let (mut cluster, work) = start_with_load(&mut rng).await;
    let mut longest: Vec<Duration> = Vec::new();
    for broker in 1..=3 {
        work.load.wait_for_random_progress(&mut rng).await;
        let since = clock::monotonic();
        tokio::task::block_in_place(|| {
            cluster.stop(broker);
            let log = cluster.log(broker);
            assert!(log.contains("transferred the leadership of all partitions"), "{log}");
            cluster.restart(broker);
            cluster.wait_until_in_sync(TOPIC, 3);
        });
        let logs = (0..PARTITIONS).map(|partition| (0, partition));
        let waited = logs.map(|log| eventually("the log continues", || work.load.longest_silence(log, since)));
        longest.extend(waited);
    }
    println!("rolling: the longest time without an acknowledgement of a partition: {:?}", longest.iter().max());
    let total = work.finish(3).await;
    println!("rolling: {total} records delivered once across a restart of every broker");
}

/// A stopping broker reports that it is not ready. It continues to lead its partitions while no other broker can take
/// over, here because etcd does not respond.
#[test]
fn stopping_broker_is_not_ready_and_serves_its_partitions() {
    let mut cluster = Cluster::start(2);
    let cli = cluster.cli();
    cli.ok(&["topic", "create", "t", "--partitions", "2", "--replication-factor", "2"]);
    cluster.wait_until_in_sync("t", 2);
    (0..3).for_each(|member| cluster.etcd.freeze(member));
    cluster.broker(1).request_stop();
    eventually("the broker logs its stop", || {
        let (code, page) = http_get(cluster.instance(1).http(), "/readyz").ok()?;
        (code == 503 && page.contains("stopping")).then_some(())
    });
    let (healthy, _) = http_get(cluster.instance(1).http(), "/healthz").expect("the broker responds");
    assert_eq!(healthy, 200, "a stop is not an error");
    for partition in ["0", "1"] {
        cli.ok_with(&["produce", "t", "--partition", partition], b"record\n");
    }
    (0..3).for_each(|member| cluster.etcd.thaw(member));
    cluster.wait_stopped(1);
}
