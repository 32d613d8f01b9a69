//! Brokers are killed. Acknowledged records are kept, clients continue without intervention, and restarted brokers
//! catch up.

use std::{net::TcpListener, thread, time::Duration};

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use serde_json::Value;
use strandline::task::clock;

use super::members::Cluster;
use crate::{
    broker::http_get,
    crash::{PARTITIONS, setting},
    crash_client::{ClientLoad, TOPIC},
    test_timeout::{eventually, poll},
};

/// Creates a topic with small segments, three replicas and min ISR 2, so that two replicas have each record before it
/// is acknowledged.
pub(super) fn create(cluster: &Cluster) {
    create_with(cluster, 64 << 10, 500);
}

/// Creates the topic of [`create`] with this segment size in bytes and this segment age in milliseconds.
pub(super) fn create_with(cluster: &Cluster, bytes: u32, ms: u32) {
    let partitions = PARTITIONS.to_string();
    let segments = [format!("segment.bytes={bytes}"), format!("segment.ms={ms}")];
    let named = ["topic", "create", TOPIC, "--partitions", &partitions, "--replication-factor", "3"];
    let config = ["--config", "min.insync.replicas=2", "--config", &segments[0], "--config", &segments[1]];
    cluster.cli().ok(&[&named[..], &config].concat());
    cluster.wait_until_in_sync(TOPIC, 3);
}

/// Starts three brokers with the topic of [`create`], producers and a consumer.
pub(super) async fn start_with_load(rng: &mut StdRng) -> (Cluster, ClientLoad) {
    let cluster = tokio::task::block_in_place(|| {
        let cluster = Cluster::start(3);
        create(&cluster);
        cluster
    });
    let work = ClientLoad::on_topic(&cluster.bootstrap(), cluster.addresses(), rng).await;
    (cluster, work)
}

/// A follower that was down during a write catches up. After the leader is killed, its successor serves all records.
#[test]
fn successor_of_killed_leader_serves_all_records() {
    let mut cluster = Cluster::start(3);
    create(&cluster);
    let cli = cluster.cli();
    let text: String = (0..3000).map(|line| format!("line {line}\n")).collect();
    cli.ok_with(&["produce", TOPIC, "--partition", "0"], text.as_bytes());
    assert_eq!(cli.ok(&["consume", TOPIC, "--partition", "0", "--until-end"]).text(), text);
    let followed = cluster.leader(TOPIC, 0) % 3 + 1;
    cluster.kill(followed);
    cli.ok_with(&["produce", TOPIC, "--partition", "0"], b"without one of three\n");
    cluster.restart(followed);
    cluster.wait_until_in_sync(TOPIC, 3);
    // The leader is killed, so that another replica is read.
    let leader = cluster.leader(TOPIC, 0);
    cluster.kill(leader);
    let read = eventually("another broker leads", || {
        let read = cli.run(&["consume", TOPIC, "--partition", "0", "--until-end"]);
        (read.code == 0).then(|| read.text())
    });
    assert_eq!(read, format!("{text}without one of three\n"));
}

/// Maximum time until a killed broker is replaced. Shorter than the remaining lease in [`start_with_long_leases`],
/// which is at least two thirds of the lease, 40 s.
const REPLACEMENT_TIMEOUT: Duration = Duration::from_secs(38);

/// Starts three brokers with a lease (`metadata.session_timeout`) and a maximum follower lag
/// (`replication.max_lag_time`) of a minute.
fn start_with_long_leases() -> Cluster {
    let long = "\"60s\"";
    Cluster::with(3, |instance| {
        instance.setting("metadata.session_timeout", long).setting("replication.max_lag_time", long)
    })
}

/// Waits until the killed broker `killed` leads no partition of the topic and is in no ISR. The wait is shorter than a
/// lease, so the failure must be detected earlier.
fn wait_until_replaced(cluster: &Cluster, topic: &str, killed: u32) {
    let without = |one: &Value| {
        let counts = |broker: &Value| *broker != killed;
        one["leader"].is_u64()
            && counts(&one["leader"])
            && one["isr"].as_array().is_some_and(|isr| isr.iter().all(counts))
    };
    let replaced = poll(REPLACEMENT_TIMEOUT, || cluster.partitions(topic).iter().all(without).then_some(()));
    assert!(replaced.is_some(), "not replaced within {REPLACEMENT_TIMEOUT:?}\n{}", cluster.logs());
}

/// Peers detect that the process has exited, also when it was the controller: each of the three brokers is killed once.
#[test]
fn killed_broker_is_replaced_before_its_lease_expires() {
    let mut cluster = start_with_long_leases();
    create(&cluster);
    for broker in 1..=3 {
        cluster.kill(broker);
        wait_until_replaced(&cluster, TOPIC, broker);
        for partition in 0..PARTITIONS {
            cluster.cli().ok_with(&["produce", TOPIC, "--partition", &partition.to_string()], b"one\n");
        }
        cluster.restart(broker);
        cluster.wait_until_in_sync(TOPIC, 3);
    }
}

/// A wiped broker's new process binds the peer port before its peers have probed the old process twice. It responds
/// there with its own identity, which shows that the old process has exited. Regression: without this response, the new
/// process had to wait until the old lease expired. In the last round, a listener that never responds holds the port
/// for two seconds first.
#[test]
fn wiped_broker_gets_its_id_before_the_old_lease_expires() {
    let mut cluster = start_with_long_leases();
    create(&cluster);
    for (start, broker) in (0..6).zip((1..=3).cycle()) {
        cluster.kill(broker);
        if start == 5 {
            let silent = TcpListener::bind(cluster.instance(broker).peer()).expect("the port is free");
            thread::sleep(Duration::from_secs(2));
            drop(silent);
        }
        cluster.wipe(broker);
        cluster.begin(broker);
        let is_ready = || http_get(cluster.instance(broker).http(), "/readyz").is_ok_and(|(code, _)| code == 200);
        let ready = poll(REPLACEMENT_TIMEOUT, || is_ready().then_some(()));
        assert!(ready.is_some(), "not ready within {REPLACEMENT_TIMEOUT:?}\n{}", cluster.logs());
        cluster.wait_until_in_sync(TOPIC, 3);
    }
}

/// The controller holds no replica of the topic and so has no link to the killed broker. It can detect the failure only
/// by another broker's report.
#[test]
fn controller_without_links_gets_a_failure_report() {
    let mut cluster = start_with_long_leases();
    let cli = cluster.cli();
    let controller = || cli.ok(&["cluster", "describe", "--output", "json"]).json()["controller"].as_u64();
    let drained = eventually("a broker is the controller", controller);
    cli.ok(&["broker", "drain", &drained.to_string(), "--wait"]);
    cli.ok(&["topic", "create", "pair", "--replication-factor", "2"]);
    cluster.wait_until_in_sync("pair", 2);
    let leader = cluster.leader("pair", 0);
    assert_eq!(controller(), Some(drained), "the controller has no replica of broker {leader}'s partitions");
    cluster.kill(leader);
    wait_until_replaced(&cluster, "pair", leader);
    cli.ok_with(&["produce", "pair"], b"one\n");
}

/// Brokers are killed at random while idempotent producers and a consumer run. Each record is delivered once and in
/// order. The test prints how long clients waited.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn broker_kills_lose_or_duplicate_no_records() {
    let kills = setting("STRANDLINE_KILLS", 6);
    let seed = setting("STRANDLINE_SEED", clock::wall_ms().unsigned_abs());
    println!("failover: {kills} kills, STRANDLINE_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let (mut cluster, work) = start_with_load(&mut rng).await;
    let mut silences: Vec<Duration> = Vec::new();
    for kill in 1..=kills {
        work.load.wait_for_random_progress(&mut rng).await;
        let victim = rng.random_range(1..=3);
        let since = clock::monotonic();
        tokio::task::block_in_place(|| {
            cluster.kill(victim);
            let logs = (0..PARTITIONS).map(|partition| (0, partition));
            let waited: Vec<Duration> = logs
                .map(|log| eventually("every partition continues", || work.load.longest_silence(log, since)))
                .collect();
            println!("failover: kill {kill} of {kills}: broker {victim}, clients waited {waited:?}");
            silences.extend(waited);
            cluster.restart(victim);
            cluster.wait_until_in_sync(TOPIC, 3);
        });
    }
    silences.sort_unstable();
    let at = |part: usize| silences[(silences.len() * part / 100).min(silences.len() - 1)];
    println!("failover: median {:?}, p99 {:?}, longest {:?}", at(50), at(99), at(100));
    assert!(
        cluster.logs().contains("the process of a broker is gone"),
        "the failure was detected by a report, not by the lease"
    );
    let total = work.finish(kills).await;
    println!("failover: {total} records delivered once across {kills} kills");
}
