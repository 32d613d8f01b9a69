//! Consumers that name their rack: which replica serves them, and how a follower responds. No record is lost or
//! duplicated when the serving replica stops, when a leader stops, and when they return.

use rand::{SeedableRng as _, rngs::StdRng};
use strandline::{
    client::ConsumerOptions,
    proto::{
        error::{ApiError, ErrorCode},
        v1::{FetchPartition, FetchedPartition, ReadRequest},
    },
    task::clock,
};

use super::{failover::create, members::Cluster};
use crate::{
    crash::{PARTITIONS, setting},
    crash_client::{ClientLoad, TOPIC},
    test_timeout::{eventually, eventually_async},
    wire,
};

/// Returns the number of bytes that a broker has sent to consumers, as leader and as follower.
fn served_bytes(cluster: &Cluster, broker: u32) -> [f64; 2] {
    ["leader", "follower"].map(|role| {
        let name = format!("strandline_fetch_role_bytes_total{{role=\"{role}\"}}");
        cluster.instance(broker).metric(&name)
    })
}

/// Returns the number of bytes that a broker has sent to consumers, in both roles.
fn total_served_bytes(cluster: &Cluster, broker: u32) -> f64 {
    served_bytes(cluster, broker).iter().sum()
}

/// Waits until a broker has sent more than `more` additional bytes to consumers.
fn wait_until_serving(cluster: &Cluster, broker: u32, more: f64) {
    let before = total_served_bytes(cluster, broker);
    eventually("the broker serves the consumer", || {
        (total_served_bytes(cluster, broker) > before + more).then_some(())
    });
}

/// Waits until this broker serves the consumer while the other two of three brokers do not.
fn wait_until_sole_server(cluster: &Cluster, broker: u32) {
    let others =
        || (1..=3).filter(|other| *other != broker).map(|other| total_served_bytes(cluster, other)).sum::<f64>();
    eventually("all records are read from this broker", || {
        let before = others();
        wait_until_serving(cluster, broker, 10.0 * MIN_SERVED_BYTES);
        (others() == before).then_some(())
    });
}

/// Number of bytes, several batches, that a broker must send to consumers to count as serving.
const MIN_SERVED_BYTES: f64 = 10_000.0;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn consumer_is_served_in_its_rack_and_loses_no_records() {
    let seed = setting("STRANDLINE_SEED", clock::wall_ms().unsigned_abs());
    println!("racks: STRANDLINE_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut cluster = tokio::task::block_in_place(|| {
        let cluster = Cluster::start(3);
        create(&cluster);
        cluster
    });
    // Only broker 3 is in this rack.
    let reader = ConsumerOptions::default().rack("zone-c");
    let work = ClientLoad::with_reader(&cluster.bootstrap(), cluster.addresses(), reader, &mut rng).await;
    tokio::task::block_in_place(|| {
        let leads = |broker| {
            (0..PARTITIONS).any(|n| cluster.leader(TOPIC, usize::try_from(n).expect("the number is small")) == broker)
        };
        assert!(leads(1) && leads(2), "brokers 1 and 2 lead partitions");
        wait_until_sole_server(&cluster, 3);
        assert!(served_bytes(&cluster, 3)[1] > 0.0, "broker 3 serves as a follower too");

        cluster.kill(3);
        wait_until_serving(&cluster, 1, MIN_SERVED_BYTES);
        cluster.restart(3);
        cluster.wait_until_in_sync(TOPIC, 3);
        wait_until_serving(&cluster, 3, MIN_SERVED_BYTES);

        // A leader is killed. Broker 3 still serves the consumer, as a follower or as the new leader.
        cluster.kill(1);
        wait_until_serving(&cluster, 3, MIN_SERVED_BYTES);
        cluster.restart(1);
        cluster.wait_until_in_sync(TOPIC, 3);

        // Broker 3 stops in a controlled shutdown and restarts.
        cluster.stop(3);
        wait_until_serving(&cluster, 2, MIN_SERVED_BYTES);
        cluster.restart(3);
        cluster.wait_until_in_sync(TOPIC, 3);
        wait_until_sole_server(&cluster, 3);
    });
    let total = work.finish(3).await;
    println!("racks: {total} records followed once");
}

/// Reads partition 0 of topic `t` once at a broker. Returns the response for the partition, if there is one. `any`
/// allows a follower to respond.
async fn read(cluster: &Cluster, broker: u32, offset: i64, epoch: i32, any: bool) -> Option<FetchedPartition> {
    let partitions = vec![FetchPartition { topic: "t".to_owned(), offset, leader_epoch: epoch, ..Default::default() }];
    let request = ReadRequest { partitions, max_wait_ms: 300, any_replica: any, ..Default::default() };
    let response = wire::log(cluster.instance(broker).grpc()).read(request).await.expect("a response").into_inner();
    response.partitions.into_iter().next()
}

async fn error_of_read(cluster: &Cluster, broker: u32, offset: i64, epoch: i32, any: bool) -> ApiError {
    read(cluster, broker, offset, epoch, any)
        .await
        .and_then(|response| response.error)
        .expect("the request is refused")
        .into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn follower_serves_only_reads_of_any_replica() {
    let (cluster, leader, text) = tokio::task::block_in_place(|| {
        let cluster = Cluster::start(3);
        let cli = cluster.cli();
        let history = ["retention.bytes=200000", "segment.bytes=16384", "local.retention.bytes=1"];
        let config: Vec<&str> = history.into_iter().flat_map(|one| ["--config", one]).collect();
        cli.ok(&[&["topic", "create", "t", "--replication-factor", "3"][..], &config].concat());
        cluster.wait_until_in_sync("t", 3);
        let text: String = (0..4000).map(|line| format!("{line:099}\n")).collect();
        cli.ok_with(&["produce", "t"], text.as_bytes());
        let leader = cluster.leader("t", 0);
        (cluster, leader, text)
    });
    let follower = leader % 3 + 1;
    tokio::task::block_in_place(|| {
        eventually("the beginning is deleted, and the rest is in the object store", || {
            let state = &cluster.partitions("t")[0];
            let start = state["log_start"].as_i64().filter(|start| *start > 0)?;
            (state["local_start"].as_i64()? > start).then_some(())
        });
    });
    let state = tokio::task::block_in_place(|| cluster.partitions("t")[0].clone());
    let [local_start, end] = ["local_start", "high_watermark"].map(|mark| state[mark].as_i64().expect("a mark"));
    let middle = local_start - 1;
    let epoch = i32::try_from(state["leader_epoch"].as_i64().expect("an epoch")).expect("small");

    let failure = error_of_read(&cluster, follower, end, 0, false).await;
    assert_eq!(
        (failure.code, failure.number("leader")),
        (ErrorCode::NotLeader, Some(leader.into())),
        "the read did not allow any replica"
    );
    // `middle` is below the leader's local start, so the leader has its record only in the object store.
    let response = read(&cluster, follower, middle, epoch, true).await.expect("data");
    assert!(response.from_follower && response.leader_epoch == epoch && response.next_offset > middle, "{response:?}");
    let response = read(&cluster, leader, middle, epoch, true).await.expect("data");
    assert!(!response.from_follower && response.leader_epoch == epoch && response.error.is_none(), "{response:?}");

    // Above the follower's high watermark the leader may have more records, so the follower's read waits. The leader
    // rejects the same offset. Below the committed log start both reject the offset.
    let response = read(&cluster, follower, end + 5, 0, true).await.expect("the follower responds");
    assert!(response.error.is_none() && response.chunks.is_empty() && response.next_offset == end + 5, "{response:?}");
    assert_eq!(error_of_read(&cluster, leader, end + 5, 0, true).await.code, ErrorCode::OffsetOutOfRange);
    let read_start = || async { read(&cluster, follower, 0, 0, true).await?.error.map(ApiError::from) };
    let failure = eventually_async("the follower has received the log start", read_start).await;
    assert_eq!(failure.code, ErrorCode::OffsetOutOfRange, "{failure:?}");
    assert!(failure.number("start").is_some_and(|start| start > 0), "{failure:?}");
    assert_eq!(error_of_read(&cluster, leader, 0, 0, true).await.code, ErrorCode::OffsetOutOfRange);

    // A read with a newer leader epoch than the broker's is rejected, by the leader and by the follower.
    for broker in [leader, follower] {
        assert_eq!(error_of_read(&cluster, broker, middle, epoch + 1, true).await.code, ErrorCode::NotLeader);
    }

    // The command line reads from the follower in its rack. The follower serves all remaining records, also those that
    // only the object store has.
    tokio::task::block_in_place(|| {
        let rack = ["zone-a", "zone-b", "zone-c"][follower as usize - 1];
        let before = served_bytes(&cluster, follower);
        let read = cluster.cli().ok(&["consume", "t", "--rack", rack, "--until-end"]).text();
        assert!(read.len() > 16384 && text.ends_with(&read));
        let after = served_bytes(&cluster, follower);
        assert!(after[0] == before[0] && after[1] - before[1] >= 16384.0, "{before:?} {after:?}");
        let output = cluster.cli().ok(&["consume", "t", "--rack", "zone-d", "--from", "latest", "--until-end"]);
        assert!(output.stderr.contains("no broker is in rack \"zone-d\""), "{}", output.stderr);
    });
}
