//! Outages of the services that brokers depend on: etcd members and the object store. No acknowledged record is lost,
//! and waiting work continues afterwards.

use std::{collections::BTreeSet, time::Duration};

use futures::{StreamExt as _, stream};
use strandline::{
    proto::{
        error::{ApiError, ErrorCode},
        v1::{CreateTopicRequest, FetchPartition, FetchRequest},
    },
    task::clock,
};

use super::members::{Cluster, wait_for_leader};
use crate::{
    broker::{BrokerInstance, http_get},
    crash::setting,
    etcd::Etcd,
    s3::S3,
    test_timeout::{TEST_TIMEOUT, eventually},
    wire,
};

pub(super) const TOPIC: &str = "calm";

/// Starts three brokers and creates [`TOPIC`] with three replicas, min ISR 2 and these further command-line options.
pub(super) fn cluster_with_topic(settings: &[&str]) -> Cluster {
    let cluster = Cluster::start(3);
    let create = ["topic", "create", TOPIC, "--replication-factor", "3", "--config", "min.insync.replicas=2"];
    cluster.cli().ok(&[&create[..], settings].concat());
    cluster.wait_until_in_sync(TOPIC, 3);
    cluster
}

/// Returns the numbered lines `from..to`.
pub(super) fn lines(from: u32, to: u32) -> String {
    (from..to).map(|line| format!("line {line}\n")).collect()
}

/// The outage is longer than a lease, so the leases of all brokers expire. The brokers continue to serve.
/// `STRANDLINE_ETCD_OUTAGE_SECONDS=600` extends the outage to ten minutes, as `make outage` does.
#[test]
fn records_are_appended_and_read_during_an_etcd_outage() {
    let mut cluster = cluster_with_topic(&["--partitions", "6"]);
    let cli = cluster.cli();
    eventually("every broker leads a partition", || {
        let led: BTreeSet<_> = cluster.partitions(TOPIC).iter().filter_map(|one| one["leader"].as_u64()).collect();
        (led.len() == 3).then_some(())
    });
    // The lines of each partition differ from those of the other partitions.
    let text = |partition: u32, from: u32, to: u32| lines(partition * 1_000_000 + from, partition * 1_000_000 + to);
    let send = |from, to| {
        for partition in 0..6 {
            let records = text(partition, from, to);
            cli.ok_with(&["produce", TOPIC, "--partition", &partition.to_string()], records.as_bytes());
        }
    };
    let check_all_records = |to| {
        for partition in 0..6 {
            let number = partition.to_string();
            let read = cli.ok(&["consume", TOPIC, "--partition", &number, "--from", "earliest", "--until-end"]);
            assert_eq!(read.text(), text(partition, 0, to), "partition {partition}");
        }
    };
    let victim = cluster.leader(TOPIC, 0);
    send(0, 100);
    cluster.etcd.kill_all();
    let outage = Duration::from_secs(setting("STRANDLINE_ETCD_OUTAGE_SECONDS", 6));
    let since = clock::monotonic();
    let mut sent = 100;
    while since.elapsed() < outage {
        send(sent, sent + 10);
        sent += 10;
        check_all_records(sent);
    }
    println!(
        "outage: etcd was unavailable for {:?}, and each of 6 partitions accepted {sent} records",
        since.elapsed()
    );
    // An outage of etcd makes no broker unready, because it affects all brokers.
    let pages = || (1..=3).map(|id| http_get(cluster.instance(id).http(), "/readyz").expect("the broker responds"));
    let lost = |(code, page): (u16, String)| {
        assert_eq!(code, 200, "{page}");
        page.contains("impaired: registration lost since ") && page.contains("the metadata store has not responded for")
    };
    eventually("every broker reports the outage", || pages().all(lost).then_some(()));
    let health = cli.run(&["cluster", "health"]);
    assert!(health.code == 1 && health.text().contains("cluster: the metadata store has not responded"), "{health:?}");
    // `cluster describe` shows the state at the start of the outage, and must report the age of this state.
    let is_old = || cli.ok(&["cluster", "describe"]).text().contains("the metadata store has not responded to broker");
    eventually("the description reports its age", || is_old().then_some(()));
    // A broker is killed and etcd runs again, so the broker's partitions get new leaders and ISRs.
    cluster.kill(victim);
    cluster.etcd.run_all();
    eventually("the description is current", || (!is_old()).then_some(()));
    cluster.wait_until_in_sync(TOPIC, 2);
    send(sent, sent + 10);
    sent += 10;
    check_all_records(sent);
    let health = cli.run(&["cluster", "health"]);
    assert!(
        health.code == 1 && health.text().contains(&format!("broker {victim}: offline with 6 replicas")),
        "{health:?}"
    );
    let create = ["topic", "create", "after", "--replication-factor", "2"];
    eventually("a topic can be created", || (cli.run(&create).code == 0).then_some(()));
    cli.ok_with(&["produce", "after"], b"x\n");
    cluster.restart(victim);
    cluster.wait_until_in_sync(TOPIC, 3);
    let health = eventually("the cluster is healthy", || {
        Some(cli.run(&["cluster", "health"])).filter(|health| health.code == 0)
    });
    assert_eq!(health.text(), "ok: 3 brokers\n");
    check_all_records(sent);
}

/// During an outage of etcd, a broker sends `lease_expired` to its readers, because another broker may lead by now. It
/// refuses to create a topic as not started, so that a client may try another broker. Both end with the outage.
#[test]
fn broker_without_etcd_notifies_readers_and_refuses_creates() {
    let mut cluster = cluster_with_topic(&[]);
    let leader = cluster.leader(TOPIC, 0);
    let address = cluster.addresses()[leader as usize - 1];
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let create = || {
        let request = CreateTopicRequest { name: "another".to_owned(), partitions: 1, ..Default::default() };
        runtime.block_on(async {
            wire::admin(address).create_topic(request).await.map_err(|status| ApiError::from(&status))
        })
    };
    let mut reading = runtime.block_on(async {
        let partition = FetchPartition { topic: TOPIC.to_owned(), ..Default::default() };
        let request = FetchRequest { partitions: vec![partition], ..Default::default() };
        let open = stream::once(async { request }).chain(stream::pending());
        wire::log(address).fetch(open).await.expect("a stream").into_inner()
    });
    let mut next = || {
        let response = runtime.block_on(async { tokio::time::timeout(TEST_TIMEOUT, reading.message()).await });
        response.expect("a message within the timeout").expect("the stream continues").expect("the stream continues")
    };
    cluster.etcd.kill_all();
    let response = next();
    assert!(response.lease_expired && response.partitions.is_empty(), "{response:?}");
    let refused = create().expect_err("the metadata store is unavailable");
    assert_eq!((refused.code, refused.metadata.contains_key("not_started")), (ErrorCode::MetadataUnavailable, true));
    cluster.etcd.run_all();
    let response = next();
    assert!(!response.lease_expired && response.partitions.is_empty(), "{response:?}");
    eventually("a topic can be created", || create().ok());
}

/// Stops each etcd member with `stop`, one after the other and so also etcd's leader, and runs it again with `resume`.
/// While a member is stopped, records are appended and a topic is created.
fn with_each_member_stopped(stop: impl Fn(&mut Etcd, usize), resume: impl Fn(&mut Etcd, usize)) {
    let mut cluster = cluster_with_topic(&[]);
    let cli = cluster.cli();
    let mut sent = 0;
    for member in 0..3 {
        stop(&mut cluster.etcd, member);
        cli.ok_with(&["produce", TOPIC], lines(sent, sent + 10).as_bytes());
        sent += 10;
        cli.create_when_possible(&format!("without-{member}"));
        resume(&mut cluster.etcd, member);
    }
    cluster.wait_until_in_sync(TOPIC, 3);
    assert_eq!(cli.ok(&["consume", TOPIC, "--from", "earliest", "--until-end"]).text(), lines(0, sent));
}

#[test]
fn frozen_etcd_member_delays_nothing() {
    with_each_member_stopped(|etcd, member| etcd.freeze(member), |etcd, member| etcd.thaw(member));
}

#[test]
fn killed_etcd_members_delay_nothing() {
    with_each_member_stopped(Etcd::kill, |etcd, member| {
        etcd.run(member);
        wait_for_leader(etcd);
    });
}

/// The object store and etcd are down at the same time. The brokers' disks and the links between brokers are sufficient
/// to append and to read new records.
#[test]
fn brokers_serve_without_etcd_and_object_store() {
    let s3 = S3::begin();
    let mut cluster = Cluster::with_etcd(Etcd::begin(3, "http", &[]));
    for id in 1..=3 {
        let instance = BrokerInstance::member(id, &cluster.etcd).object_store(&s3);
        cluster.add(id, instance);
    }
    cluster.wait_until_ready();
    let cli = cluster.cli();
    let small = ["--config", "segment.bytes=65536", "--config", "segment.ms=200", "--config", "min.insync.replicas=2"];
    cli.ok(&[&["topic", "create", TOPIC, "--replication-factor", "3"], &small[..]].concat());
    cluster.wait_until_in_sync(TOPIC, 3);
    let mut sent = 1000;
    cli.ok_with(&["produce", TOPIC], lines(0, sent).as_bytes());
    let tiered = |cluster: &Cluster| cluster.partitions(TOPIC)[0]["tiered_end"].as_u64();
    eventually("all records are in the object store", || (tiered(&cluster) == Some(sent.into())).then_some(()));
    s3.faults().set_down(true);
    cluster.etcd.kill_all();
    let since = clock::monotonic();
    // The loop runs longer than a lease.
    while since.elapsed() < Duration::from_secs(5) {
        cli.ok_with(&["produce", TOPIC], lines(sent, sent + 100).as_bytes());
        let read = cli.ok(&["consume", TOPIC, "--from", &sent.to_string(), "--until-end"]);
        assert_eq!(read.text(), lines(sent, sent + 100), "new records are read from memory or disk");
        sent += 100;
    }
    cluster.etcd.run_all();
    s3.faults().set_down(false);
    eventually("the delayed records are in the object store", || (tiered(&cluster) == Some(sent.into())).then_some(()));
    cluster.wait_until_in_sync(TOPIC, 3);
    assert_eq!(cli.ok(&["consume", TOPIC, "--from", "earliest", "--until-end"]).text(), lines(0, sent));
}

/// While a broker is frozen, its connections to etcd break, and etcd compacts the revisions that the broker has missed.
/// The broker then lists all metadata again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn broker_that_missed_compacted_revisions_relists() {
    let mut cluster = tokio::task::block_in_place(|| Cluster::start(2));
    let created = tokio::task::block_in_place(|| {
        let cli = cluster.instance(1).cli();
        cli.ok(&["topic", "create", "before"]);
        cluster.broker(2).freeze(true);
        cluster.etcd.kill_all();
        cluster.etcd.run_all();
        wait_for_leader(&cluster.etcd);
        let named = |number| format!("meanwhile-{number}");
        for number in 0..10 {
            cli.create_when_possible(&named(number));
        }
        (0..10).map(named).collect::<Vec<_>>()
    });
    let mut etcd = etcd_client::Client::connect(cluster.etcd.endpoints(), None).await.expect("etcd is running");
    let now = etcd.get("x", None).await.expect("etcd responds").header().expect("a header").revision();
    etcd.compact(now, None).await.expect("etcd responds");
    tokio::task::block_in_place(|| {
        cluster.broker(2).freeze(false);
        let late = cluster.instance(2).cli();
        for topic in &created {
            let describe = ["topic", "describe", topic];
            eventually("the late broker describes the topic", || (late.run(&describe).code == 0).then_some(()));
        }
        assert!(cluster.log(2).contains("the metadata watch failed: relisting"), "{}", cluster.log(2));
    });
}
