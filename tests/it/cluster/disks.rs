//! A broker loses its disk and returns under its old id. Its replicas count as lost and are copied again: records below
//! the tiered end from the object store, the rest from peers. Records that retention deletes are removed from every
//! disk.

use strandline::proto::v1::ElectLeaderRequest;

use super::{
    members::Cluster,
    outage::{TOPIC, cluster_with_topic, lines},
};
use crate::{
    broker::{BrokerInstance, http_get},
    corruption::files,
    etcd::Etcd,
    s3::{Op, S3},
    test_timeout::{TEST_TIMEOUT, eventually, poll},
    wire,
};

/// Number of records in the topic, one per line.
const LINES: u32 = 60_000;

/// Kills a broker, deletes its data directory, starts the broker again, and waits until it is in sync.
fn lose_disk(cluster: &mut Cluster, broker: u32) {
    cluster.kill(broker);
    cluster.wipe(broker);
    cluster.restart(broker);
    assert!(cluster.log(broker).contains("its replicas are copied again"), "{}", cluster.log(broker));
    cluster.wait_until_in_sync(TOPIC, 3);
}

/// Waits until all records are in the object store.
fn wait_until_tiered(cluster: &Cluster) {
    let tiered = || cluster.partitions(TOPIC)[0]["tiered_end"] == LINES;
    eventually("all records are in the object store", || tiered().then_some(()));
}

/// Returns the number of bytes of batches that a broker has received from its peers.
fn received_bytes(cluster: &Cluster, broker: u32) -> f64 {
    let (_, page) = http_get(cluster.instance(broker).http(), "/metrics").expect("a page");
    let name = "strandline_replication_received_bytes_total{";
    let samples = page.lines().filter(|line| line.starts_with(name)).filter_map(|line| line.rsplit_once(' '));
    samples.map(|(_, value)| value.parse::<f64>().expect("a number")).sum()
}

/// Checks that the cluster serves the whole topic.
fn check_records(cluster: &Cluster) {
    let cli = cluster.cli();
    let whole = poll(TEST_TIMEOUT, || {
        let read = cli.run(&["consume", TOPIC, "--from", "earliest", "--until-end"]);
        (read.code == 0 && read.text() == lines(0, LINES)).then_some(())
    });
    assert!(whole.is_some(), "{}", cluster.logs());
}

#[test]
fn broker_with_lost_disk_copies_its_replicas_again() {
    let history = ["segment.bytes=65536", "segment.ms=200", "local.retention.bytes=65536", "retention.ms=-1"];
    let settings: Vec<&str> = history.into_iter().flat_map(|one| ["--config", one]).collect();
    let mut cluster = cluster_with_topic(&settings);
    cluster.cli().ok_with(&["produce", TOPIC], lines(0, LINES).as_bytes());
    let leader = cluster.leader(TOPIC, 0);
    for lost in [leader, leader % 3 + 1] {
        lose_disk(&mut cluster, lost);
    }
    // The third broker is killed, so that the two brokers with new disks serve all records.
    cluster.kill((leader + 1) % 3 + 1);
    check_records(&cluster);
}

/// A replica on a new disk does not copy tiered records from its peers, although its peers still have them on disk.
#[test]
fn new_replica_copies_no_tiered_records_from_peers() {
    let mut cluster = cluster_with_topic(&["--config", "segment.bytes=65536", "--config", "segment.ms=200"]);
    cluster.cli().ok_with(&["produce", TOPIC], lines(0, LINES).as_bytes());
    wait_until_tiered(&cluster);
    let lost = cluster.leader(TOPIC, 0) % 3 + 1;
    let before = received_bytes(&cluster, lost);
    assert!(before > f64::from(LINES), "the complete history: {before}");
    lose_disk(&mut cluster, lost);
    let tail = received_bytes(&cluster, lost);
    println!("disks: {before} bytes received during the writes, {tail} for the new replica");
    assert!(tail * 20.0 < before, "{tail} bytes of {before} came from peers, but all were in the object store");
}

/// Uploads, the bootstrap of a new replica and reads of old records succeed although the object store is unreliable.
/// Most requests to the store fail, are delayed, are executed twice, or get no complete response.
#[test]
fn unreliable_object_store_loses_no_records() {
    let s3 = S3::begin();
    let mut cluster = Cluster::with_etcd(Etcd::begin(3, "http", &[]));
    for id in 1..=3 {
        let instance = BrokerInstance::member(id, &cluster.etcd).object_store(&s3);
        cluster.add(id, instance);
    }
    cluster.wait_until_ready();
    s3.faults().set_unreliable(true);
    let cli = cluster.cli();
    let history = ["segment.bytes=262144", "segment.ms=500", "local.retention.bytes=65536", "min.insync.replicas=2"];
    let settings: Vec<&str> = history.into_iter().flat_map(|one| ["--config", one]).collect();
    cli.ok(&[&["topic", "create", TOPIC, "--replication-factor", "3"], &settings[..]].concat());
    cluster.wait_until_in_sync(TOPIC, 3);
    cli.ok_with(&["produce", TOPIC], lines(0, LINES).as_bytes());
    wait_until_tiered(&cluster);
    let lost = cluster.leader(TOPIC, 0);
    lose_disk(&mut cluster, lost);
    check_records(&cluster);
    let [puts, gets] = [Op::Put, Op::Get].map(|op| s3.faults().requests(op));
    println!("disks: {} faults in {puts} puts and {gets} gets", s3.faults().hits());
    assert!(s3.faults().hits() > 5 && gets > 0, "the object store had faults");
}

/// Followers delete expired records from their disks when the leader advances the log start, also without further
/// writes. Regression: a follower whose log was empty by then was not checked again.
#[test]
fn expired_records_are_deleted_on_followers_without_writes() {
    let cluster = Cluster::with(3, |instance| instance.setting("tier.check_interval", "\"1s\""));
    let cli = cluster.cli();
    let create = ["topic", "create", TOPIC, "--replication-factor", "3", "--config", "remote.storage.enable=false"];
    cli.ok(&[&create[..], &["--config", "segment.bytes=65536"]].concat());
    cli.ok_with(&["produce", TOPIC], lines(0, LINES).as_bytes());
    cluster.wait_until_in_sync(TOPIC, 3);
    let on_disk = |id| -> u64 {
        let size = |path: &std::path::PathBuf| std::fs::metadata(path).map_or(0, |file| file.len());
        files(&cluster.instance(id).data_dir(), ".log").iter().map(size).sum()
    };
    assert!((1..=3).all(|id| on_disk(id) > u64::from(LINES)));
    cli.ok(&["topic", "alter", TOPIC, "--config", "retention.ms=1"]);
    for id in 1..=3 {
        eventually(&format!("broker {id} has its disk back"), || (on_disk(id) == 0).then_some(()));
    }
}

/// The only replica of a partition ends below the tiered end, as after a power failure. It is not elected without an
/// operator's unclean election. After that election the log continues at the tiered end, and no offset is assigned
/// twice.
#[test]
fn replica_below_tiered_end_needs_unclean_election() {
    for durability in ["replicated", "persisted"] {
        continue_at_tiered_end(durability);
    }
}

/// Checks for a topic with this durability that the log continues at the tiered end after an unclean election.
fn continue_at_tiered_end(durability: &str) {
    let mut cluster = Cluster::start(1);
    let cli = cluster.cli();
    let durability = format!("durability={durability}");
    let settings = ["--config", "segment.bytes=65536", "--config", "segment.ms=200", "--config", &durability];
    cli.ok(&[&["topic", "create", TOPIC], &settings[..]].concat());
    cluster.wait_until_in_sync(TOPIC, 1);
    cli.ok_with(&["produce", TOPIC], lines(0, LINES).as_bytes());
    wait_until_tiered(&cluster);
    cluster.kill(1);
    // All segment files are deleted, so that the replica starts as an empty one.
    let segments = files(&cluster.instance(1).data_dir(), ".log");
    let replica = segments[0].parent().expect("a folder").to_owned();
    for segment in segments {
        std::fs::remove_file(segment).expect("the entry existed");
    }
    cluster.restart(1);
    eventually("the partition has no leader", || cluster.partitions(TOPIC)[0]["leader"].is_null().then_some(()));
    // An unclean election is refused if the request does not consent to the deletion of the replica.
    let address = cluster.addresses()[0];
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let elected = eventually("the broker reports its replica as unusable", || {
        let request =
            ElectLeaderRequest { topic: TOPIC.to_owned(), unclean: true, validate_only: true, ..Default::default() };
        runtime
            .block_on(async { wire::admin(address).elect_leader(request).await })
            .ok()
            .map(tonic::Response::into_inner)
    });
    assert!(elected.discard_local, "{elected:?}");
    let marker = replica.join("mark");
    std::fs::write(&marker, "of this very replica").expect("written");
    let without_consent = ElectLeaderRequest {
        topic: TOPIC.to_owned(),
        unclean: true,
        leader: Some(elected.leader),
        revision: Some(elected.revision),
        ..Default::default()
    };
    // Regression: a request with a leader, a revision and `validate_only` ran the election.
    let validated = ElectLeaderRequest { validate_only: true, discard_local: true, ..without_consent.clone() };
    let refused = runtime
        .block_on(async { wire::admin(address).elect_leader(validated).await })
        .expect_err("the request contradicts itself");
    assert!(refused.message().contains("validate_only changes nothing"), "{refused:?}");
    let refused = runtime
        .block_on(async { wire::admin(address).elect_leader(without_consent).await })
        .expect_err("the replica is unusable");
    assert!(refused.message().contains("cannot be used now"), "{refused:?}");
    assert!(cluster.partitions(TOPIC)[0]["leader"].is_null() && marker.exists());

    let elect = ["partition", "elect", &format!("{TOPIC}/0"), "--unclean", "--yes"];
    let elected = eventually("the election succeeds", || Some(cli.run(&elect)).filter(|elected| elected.code == 0));
    assert!(elected.text().contains("the election would delete the log of broker 1"), "{elected:?}");
    eventually("the replica is deleted", || (!marker.exists()).then_some(()));
    cluster.wait_until_in_sync(TOPIC, 1);
    cli.ok_with(&["produce", TOPIC], b"it goes on\n");
    let read = cli.ok(&["consume", TOPIC, "--from", "earliest", "--until-end"]).text();
    assert!(read == format!("{}it goes on\n", lines(0, LINES)), "{} bytes", read.len());
}
