//! A real etcd that has no space, is replaced by an empty one, or is restored from a backup, under real brokers.

use std::fs;

use etcd_client::{AlarmAction, AlarmOptions, AlarmType, Client, CompactionOptions};
use serde_json::Value;

use super::members::{Cluster, wait_for_leader};
use crate::{etcd::Etcd, test_timeout::eventually};

/// Starts a cluster of this number of brokers with an etcd of one member, which gets these command-line flags.
fn start_with_one_member(brokers: u32, flags: &[String]) -> Cluster {
    let mut cluster = Cluster::with_etcd(Etcd::begin(1, "http", flags));
    for id in 1..=brokers {
        let instance = cluster.new_instance(id).topic_default("segment.ms", 300);
        cluster.add(id, instance);
    }
    cluster.wait_until_ready();
    cluster
}

fn restore(cluster: &mut Cluster, backup: &str) {
    cluster.etcd.kill_all();
    cluster.etcd.restore(backup);
    cluster.etcd.run_all();
    wait_for_leader(&cluster.etcd);
}

fn back_up(cluster: &mut Cluster, backup: &str) {
    cluster.etcd.kill_all();
    cluster.etcd.back_up(backup);
    cluster.etcd.run_all();
    wait_for_leader(&cluster.etcd);
}

#[test]
fn restored_etcd_blocks_operations_until_brokers_restart() {
    let mut cluster = start_with_one_member(2, &[]);
    let cli = cluster.cli();
    cli.ok(&["topic", "create", "t", "--replication-factor", "2"]);
    cluster.wait_until_in_sync("t", 2);
    back_up(&mut cluster, "before");
    // These writes raise the revision far enough that the brokers' own writes after the restore stay below it.
    for number in 0..8 {
        cli.create_when_possible(&format!("later-{number}"));
    }
    restore(&mut cluster, "before");
    for id in [1, 2] {
        eventually("the broker detects the restore without a request", || {
            (cluster.instance(id).metric("strandline_metadata_regressed") > 0.0).then_some(())
        });
        assert_eq!(
            cluster.log(id).matches("this broker refuses admin operations, elections").count(),
            1,
            "{}",
            cluster.log(id)
        );
    }
    for order in [
        &["topic", "create", "fresh"][..],
        &["topic", "alter", "t", "--config", "retention.ms=1"],
        &["topic", "delete", "t", "--yes"],
        &["broker", "drain", "1"],
        &["partition", "reassign", "t/0", "--replicas", "2,1"],
        &["partition", "elect", "t/0"],
    ] {
        let refused = cli.run(order);
        assert!(refused.code == 1 && refused.stderr.contains("after revision"), "{order:?}: {refused:?}");
    }
    // Repeated: a broker that takes more than a second to respond is reported as not responding.
    eventually("the description reports the regression", || {
        cli.ok(&["cluster", "describe"])
            .text()
            .contains("broker 1 rejects admin operations (METADATA_REGRESSED)")
            .then_some(())
    });
    eventually("the health report contains the regression", || {
        let health = cli.run(&["cluster", "health"]);
        (health.code == 1 && health.text().contains("broker 1: the metadata store returned to an older state"))
            .then_some(())
    });
    // Reads and appends need no metadata store.
    cli.ok_with(&["produce", "t"], b"one\ntwo\n");
    assert_eq!(cli.ok(&["consume", "t", "--from", "earliest", "--until-end"]).text(), "one\ntwo\n");

    for id in [1, 2] {
        cluster.kill(id);
    }
    for id in [1, 2] {
        cluster.begin(id);
    }
    cluster.wait_until_ready();
    cli.ok(&["topic", "create", "fresh"]);
    let read = eventually("the acknowledged records are read", || {
        let read = cli.run(&["consume", "t", "--from", "earliest", "--until-end"]);
        (read.code == 0).then(|| read.text())
    });
    assert_eq!(read, "one\ntwo\n");
    assert!(cluster.instance(1).metric("strandline_metadata_regressed") == 0.0);
}

#[test]
fn replaced_etcd_cluster_is_detected_and_data_is_served() {
    let mut cluster = start_with_one_member(1, &[]);
    let cli = cluster.cli();
    cli.ok(&["topic", "create", "t"]);
    cluster.etcd.kill_all();
    cluster.etcd.replace();
    cluster.etcd.run_all();
    wait_for_leader(&cluster.etcd);
    eventually("the broker detects the replacement", || {
        (cluster.instance(1).metric("strandline_metadata_regressed") > 0.0).then_some(())
    });
    let refused = cli.run(&["topic", "create", "fresh"]);
    assert!(refused.code == 1 && refused.stderr.contains("members of one cluster"), "{refused:?}");
    cli.ok_with(&["produce", "t"], b"one\n");
    assert_eq!(cli.ok(&["consume", "t", "--from", "earliest", "--until-end"]).text(), "one\n");
}

fn generation(path: &std::path::Path) -> Option<u64> {
    let text = fs::read(path).expect("the file exists");
    serde_json::from_slice::<Value>(&text).expect("JSON")["generation"].as_u64()
}

#[test]
fn etcd_of_an_older_generation_starts_no_broker() {
    let mut cluster = start_with_one_member(1, &[]);
    let (marker, directory) =
        (cluster.object_store_dir().join("cluster.json"), cluster.instance(1).data_dir().join("strandline.json"));
    assert_eq!((generation(&marker), generation(&directory)), (Some(1), Some(1)), "a new cluster has generation 1");
    let config = cluster.instance(1).write_config().display().to_string();
    let cli = cluster.cli();
    let refused = cli.run(&["cluster", "new-generation", "--config", &config]);
    assert!(refused.code == 1 && refused.stderr.contains("stop all brokers first"), "{refused:?}");

    cluster.stop(1);
    back_up(&mut cluster, "first");
    let raised = cli.ok(&["cluster", "new-generation", "--config", &config]).text();
    assert!(raised.contains("generation is 2"), "{raised}");
    assert_eq!(
        (generation(&marker), generation(&directory)),
        (Some(2), Some(1)),
        "the directory takes the generation at the next start"
    );
    cluster.restart(1);
    assert_eq!(generation(&directory), Some(2));

    cluster.stop(1);
    restore(&mut cluster, "first");
    let ended = |cluster: &mut Cluster| {
        cluster.begin(1);
        eventually("the broker exits", || (!cluster.is_running(1)).then_some(()));
        cluster.log(1)
    };
    let log = ended(&mut cluster);
    assert!(log.contains("at cluster generation 1, and this data directory at generation 2"), "{log}");
    // With a new data directory, the generation in the object store prevents the start.
    cluster.wipe(1);
    let log = ended(&mut cluster);
    assert!(
        log.contains("at cluster generation 1, and") && log.contains("cluster.json at the later generation 2"),
        "{log}"
    );
    let raised = cli.ok(&["cluster", "new-generation", "--config", &config]).text();
    assert!(raised.contains("generation is 3"), "{raised}");
    cluster.restart(1);
    assert_eq!((generation(&marker), generation(&directory)), (Some(3), Some(3)));
}

/// Fills etcd's database up to its quota, so that etcd raises its alarm and rejects writes.
async fn fill(client: &mut Client) {
    let filler = vec![b'x'; 512 << 10];
    for number in 0..100 {
        if let Err(error) = client.put(format!("/filler/{number}"), filler.clone(), None).await {
            assert!(error.to_string().contains("database space exceeded"), "{error}");
            return;
        }
    }
    panic!("etcd never reported its full database");
}

/// Deletes the filler, and compacts, defragments and disarms the alarm as the message of the broker recommends.
async fn free_space(client: &mut Client) {
    let options = etcd_client::DeleteOptions::new().with_prefix();
    let deleted = client.delete("/filler/", Some(options)).await.expect("deletions succeed");
    let revision = deleted.header().expect("a header").revision();
    client.compact(revision, Some(CompactionOptions::new().with_physical())).await.expect("compacted");
    client.defragment().await.expect("defragmented");
    let alarms = client.alarm(AlarmAction::Get, AlarmType::None, None).await.expect("etcd responds");
    for alarm in alarms.alarms() {
        let mut of_member = AlarmOptions::new();
        of_member.with_member(alarm.member_id());
        client
            .alarm(AlarmAction::Deactivate, AlarmType::Nospace, Some(of_member))
            .await
            .expect("the alarm is disarmed");
    }
}

#[test]
fn etcd_without_space_is_waited_for_with_few_log_lines() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let mut cluster = start_with_one_member(1, &["--quota-backend-bytes=8388608".to_owned()]);
    let cli = cluster.cli();
    cli.ok(&["topic", "create", "t"]);
    let mut client =
        runtime.block_on(Client::connect([cluster.etcd.endpoint(0)], None)).expect("the connection succeeds");
    runtime.block_on(fill(&mut client));
    // While etcd rejects writes, segments are sealed by age, and their tier commits fail.
    let failures = |cluster: &Cluster| cluster.instance(1).metric("strandline_maintenance_failures_total");
    eventually("maintenance has failed repeatedly", || {
        cli.ok_with(&["produce", "t"], b"line\n");
        (failures(&cluster) >= 5.0).then_some(())
    });
    let log = cluster.log(1);
    assert_eq!(log.matches("the metadata store refuses the results of uploads").count(), 1, "{log}");
    assert_eq!(
        log.matches("uploads and retention of the partition succeed again").count()
            + log.matches("uploads or retention of the partition failed").count(),
        0,
        "{log}"
    );
    let refused = cli.run(&["topic", "create", "fresh"]);
    assert!(refused.code == 1 && refused.stderr.contains("disarm the alarm"), "{refused:?}");

    let instance = cluster.new_instance(2);
    cluster.add(2, instance);
    eventually("the start logs the remedy", || {
        cluster.log(2).contains("compact its history, defragment each member, then disarm the alarm").then_some(())
    });
    assert!(cluster.is_running(2), "the broker continues to wait");
    runtime.block_on(free_space(&mut client));
    cluster.wait_until_ready();
    eventually("the delayed uploads are committed", || {
        let state = &cluster.partitions("t")[0];
        (state["tiered_end"] == state["high_watermark"]).then_some(())
    });
    cli.ok(&["topic", "create", "fresh"]);
}
