//! Admin operations through the command line, on a standalone broker, on a cluster of three in one process, and on two
//! processes with etcd.

use serde_json::{Value, json};

use crate::{
    broker::{BrokerInstance, Cli, Output},
    cluster::etcd,
    test_timeout::eventually,
};

/// Runs a command that must fail and print nothing to stdout. Returns its error output.
fn run_failing(cli: &Cli, line: &str) -> String {
    let output = run(cli, line);
    assert_eq!((output.code, output.text().as_str()), (1, ""), "{line}: {output:?}");
    output.stderr
}

fn run(cli: &Cli, line: &str) -> Output {
    cli.run(&line.split(' ').collect::<Vec<_>>())
}

/// Runs a command that must succeed. Returns its JSON output.
fn json_of(cli: &Cli, line: &str) -> Value {
    let output = run(cli, &format!("{line} --output json"));
    assert_eq!(output.code, 0, "{line}: {output:?}");
    output.json()
}

/// Runs a command that must succeed. Returns its text output.
fn output_of(cli: &Cli, line: &str) -> String {
    let output = run(cli, line);
    assert_eq!(output.code, 0, "{line}: {output:?}");
    output.text()
}

fn numbers(value: &Value) -> Vec<u64> {
    value.as_array().expect("a list").iter().map(|number| number.as_u64().expect("a number")).collect()
}

#[test]
fn standalone_broker_runs_and_validates_operations() {
    let mut instance = BrokerInstance::new();
    let broker = instance.start();
    let cli = instance.cli();
    output_of(&cli, "topic create orders --partitions 2");
    let cluster = json_of(&cli, "cluster describe");
    assert_eq!(
        (&cluster["cluster"], &cluster["partitions"], &cluster["leaderless"]),
        (&json!("it"), &json!(2), &json!(0))
    );
    let broker_entry = &cluster["brokers"][0];
    assert_eq!(
        (&broker_entry["id"], &broker_entry["state"], &broker_entry["rack"]),
        (&json!(1), &json!("running"), &json!("zone-a"))
    );
    assert_eq!(
        (&broker_entry["leader_count"], &broker_entry["replica_count"], &broker_entry["failed"]),
        (&json!(2), &json!(2), &Value::Null)
    );
    assert!(broker_entry["free_bytes"].as_u64().is_some_and(|free| free > 0), "{broker_entry}");
    let text = output_of(&cli, "cluster describe");
    assert!(text.contains("2 partitions in 1 topic\n") && text.contains("zone-a"), "{text}");

    for (line, parts) in [
        ("topic create many --replication-factor 2", &["factor of 2", "1 is online"][..]),
        ("topic alter orders --replication-factor 3", &["factor of 3", "1 is online"]),
        ("broker drain 7", &["no broker 7", "it has 1"]),
        ("broker undrain 7", &["no broker 7", "it has 1"]),
        ("partition reassign orders/0 --replicas 9", &["no broker 9", "it has 1"]),
        ("partition reassign orders --replicas 1,1", &["broker 1 is named twice"]),
        ("partition reassign orders/2 --replicas 1", &["no partition 2", "it has 2"]),
        ("partition reassign order --replicas 1", &["\"order\" does not exist", "did you mean orders"]),
        ("partition reassign status order", &["\"order\" does not exist"]),
        ("partition reassign cancel orders/0", &["nothing to cancel", "orders/0"]),
        ("partition reassign cancel --all", &["nothing to cancel"]),
        ("partition elect orders/5", &["no partition 5"]),
        ("partition elect orders/0 --unclean", &["broker 1 leads orders/0"]),
    ] {
        let error = run_failing(&cli, line);
        assert!(parts.iter().all(|part| error.contains(part)), "{line}: {error}");
    }
    let wrong = run(&cli, "partition reassign cancel");
    assert!(wrong.code == 2 && wrong.stderr.contains("TOPIC/N") && wrong.stderr.contains("--all"), "{wrong:?}");

    for (line, part) in [
        ("topic create many --replication-factor 0", "1..=32"),
        ("topic alter orders --replication-factor 33", "1..=32"),
        ("broker drain x", "a broker id: write a number, such as 2"),
        ("partition reassign orders --replicas 1,a", "a broker id: write a number, such as 2"),
    ] {
        let output = run(&cli, line);
        assert!(output.code == 2 && output.stderr.contains(part), "{line}: {output:?}");
    }

    assert_eq!(json_of(&cli, "partition reassign status"), json!([]));
    assert_eq!(output_of(&cli, "partition reassign status orders"), "no partition is being reassigned\n");
    assert_eq!(output_of(&cli, "partition reassign orders/0 --replicas 1"), "orders/0 is on 1 already\n");
    assert_eq!(output_of(&cli, "partition elect orders/1"), "broker 1 leads already: orders/1 in epoch 0\n");
    let blocked = run(&cli, "broker drain 1 --output json");
    assert!(blocked.code == 1 && blocked.stderr.contains("no replica on broker 1 can move"), "{blocked:?}");
    let drained = blocked.json();
    assert_eq!(
        (&drained["changed"], &drained["eligible_brokers"], &drained["replica_count"]),
        (&json!(true), &json!(0), &json!(2))
    );
    assert_eq!(drained["blocked"].as_array().map(Vec::len), Some(2), "{drained}");
    let again = run(&cli, "broker drain 1").text();
    assert!(
        again.contains("already")
            && again.contains("warning: 2 replicas cannot move: no other broker can take replicas"),
        "{again}"
    );
    assert_eq!(json_of(&cli, "cluster describe")["brokers"][0]["state"], "draining");
    let full = run_failing(&cli, "topic create more");
    assert!(full.contains("1 is online, of which 1 is stopping or drained"), "{full}");
    assert_eq!(json_of(&cli, "broker undrain 1"), json!({ "broker": 1, "draining": false, "changed": true }));
    assert_eq!(output_of(&cli, "broker undrain 1"), "broker 1 was not draining: nothing changed\n");
    output_of(&cli, "topic create more");
    broker.terminate();
}

/// `broker.max_replicas` bounds the partitions of a standalone broker. Regression: the creation of 100,000 partitions
/// took 6 GB of memory, and so did each start afterwards.
#[test]
fn standalone_broker_refuses_too_many_partitions() {
    let mut instance = BrokerInstance::new().setting("limits.memory_bytes", "\"64MiB\"");
    let broker = instance.start();
    let cli = instance.cli();
    let bound = ["broker 1", "4096", "broker.max_replicas"];
    let contains_limit = |error: &str, total: &str| {
        assert!(bound.iter().chain([&total]).all(|part| error.contains(part)), "{total}: {error}");
    };
    contains_limit(&run_failing(&cli, "topic create many --partitions 100000"), "100000");
    assert!(!output_of(&cli, "topic list").contains("many"));
    output_of(&cli, "topic create orders --partitions 2");
    contains_limit(&run_failing(&cli, "topic add-partitions orders --partitions 4097"), "4097");
    let broker_entry = json_of(&cli, "cluster describe")["brokers"][0].clone();
    assert_eq!((&broker_entry["replica_count"], &broker_entry["max_replicas"]), (&json!(2), &json!(4096)));
    broker.terminate();

    // With a limit below the number of replicas, all replicas stay open, and new ones are refused.
    instance = instance.setting("broker.max_replicas", 1);
    let broker = instance.start();
    let error = run_failing(&instance.cli(), "topic create more");
    assert!(error.contains("would hold 3") && error.contains("its limit is 1"), "{error}");
    instance.cli().ok_with(&["produce", "orders"], b"one\n");
    let text = output_of(&instance.cli(), "cluster describe");
    assert!(text.contains("broker 1 has 2 replicas, so broker.max_replicas is reached"), "{text}");
    broker.terminate();
}

#[test]
fn cluster_places_no_more_replicas_than_brokers_allow() {
    let instance = BrokerInstance::cluster(3);
    let broker =
        instance.start_dev_cluster_with(3, &["--set", "broker.max_replicas=5", "--set", "controller.balance=false"]);
    let cli = instance.cli();
    // The other brokers of the process may not be registered yet, although the first one is ready.
    eventually("all brokers are registered", || {
        (json_of(&cli, "cluster describe")["brokers"].as_array().map(Vec::len) == Some(3)).then_some(())
    });
    let single = "--replication-factor 1 --config min.insync.replicas=1";
    let error = run_failing(&cli, &format!("topic create many --partitions 16 {single}"));
    assert!(error.contains("would hold 6") && error.contains("its limit is 5"), "{error}");
    output_of(&cli, &format!("topic create orders --partitions 6 {single}"));
    for line in [
        "topic add-partitions orders --partitions 16",
        "topic alter orders --replication-factor 3",
        "partition reassign orders --replicas 1",
    ] {
        let error = run_failing(&cli, line);
        assert!(error.contains("its limit is 5 (broker.max_replicas)"), "{line}: {error}");
    }
    output_of(&cli, "topic alter orders --replication-factor 2");
    let held = eventually("each partition has two replicas", || {
        let brokers = json_of(&cli, "cluster describe")["brokers"].clone();
        let held: Vec<u64> = brokers.as_array()?.iter().filter_map(|broker| broker["replica_count"].as_u64()).collect();
        (held.iter().sum::<u64>() == 12).then_some(held)
    });
    assert!(held.iter().all(|replicas| *replicas <= 5), "{held:?}");
    broker.terminate();
}

/// Returns partition 0 of a topic, as `topic describe` reports it.
fn partition(cli: &Cli, topic: &str) -> Value {
    json_of(cli, &format!("topic describe {topic}"))["partitions"][0].clone()
}

#[test]
fn dev_cluster_replicates_reassigns_and_drains() {
    let instance = BrokerInstance::cluster(3);
    let broker = instance.start_dev_cluster(3);
    let cli = instance.cli();
    let error = run_failing(&cli, "topic create four --replication-factor 4");
    assert!(error.contains("factor of 4") && error.contains("3 are online"), "{error}");

    output_of(&cli, "topic create orders");
    cli.ok_with(&["produce", "orders"], b"one\ntwo\nthree\n");
    let held = eventually("three are in sync", || {
        let held = partition(&cli, "orders");
        (held["isr"].as_array().map(Vec::len) == Some(3)).then_some(held)
    });
    assert_eq!((&held["high_watermark"], &held["error"]), (&json!(3), &Value::Null), "{held}");
    let cluster = json_of(&cli, "cluster describe");
    let brokers = cluster["brokers"].as_array().expect("a list");
    assert_eq!((brokers.len(), &cluster["under_replicated"]), (3, &json!(0)), "{cluster}");
    assert!(cluster["controller"].is_u64(), "{cluster}");
    assert!(
        brokers.iter().all(|broker_entry| broker_entry["state"] == "running" && broker_entry["error"].is_null()),
        "{cluster}"
    );
    assert!(
        brokers.iter().all(|broker_entry| broker_entry["segment_bytes"].as_u64().is_some_and(|bytes| bytes > 0)),
        "{cluster}"
    );

    output_of(&cli, "topic create single --replication-factor 1 --config min.insync.replicas=1");
    cli.ok_with(&["produce", "single"], b"a\nb\n");
    let from = partition(&cli, "single")["leader"].as_u64().expect("the partition has a leader");
    let to = from % 3 + 1;
    output_of(&cli, &format!("partition reassign single/0 --replicas {to}"));
    let moved = eventually("the partition has moved", || {
        let at = partition(&cli, "single");
        (numbers(&at["replicas"]) == [to] && at["high_watermark"] == 2).then_some(at)
    });
    assert_eq!(moved["leader"], to);
    assert_eq!(json_of(&cli, "partition reassign status"), json!([]));

    let drained = json_of(&cli, &format!("broker drain {to}"));
    let blocked = json!([{ "topic": "orders", "partition": 0 }]);
    assert_eq!(drained["blocked"], blocked, "three replicas require three brokers");
    eventually("all possible reassignments have completed", || {
        (numbers(&partition(&cli, "single")["replicas"]) != [to]).then_some(())
    });
    output_of(&cli, &format!("broker undrain {to}"));

    output_of(&cli, "topic alter single --replication-factor 2");
    eventually("two replicas are in sync", || (numbers(&partition(&cli, "single")["isr"]).len() == 2).then_some(()));
    output_of(&cli, "topic alter single --replication-factor 1");
    eventually("one replica is left", || (numbers(&partition(&cli, "single")["replicas"]).len() == 1).then_some(()));
    for (topic, records) in [("orders", "one\ntwo\nthree\n"), ("single", "a\nb\n")] {
        let read = cli.ok(&["consume", topic, "--from", "earliest", "--until-end"]);
        assert_eq!(read.text(), records, "{topic}");
    }

    assert!(broker.terminate().success(), "{}", instance.log());
    let alone = instance.cli().run(&["dev", "--data-dir", instance.data_dir().to_str().expect("the path is UTF-8")]);
    assert!(alone.code == 1 && alone.stderr.contains("--brokers 3"), "{alone:?}");
    let broker = instance.start_dev_cluster(3);
    let read = cli.ok(&["consume", "orders", "--from", "earliest", "--until-end"]);
    assert_eq!(read.text(), "one\ntwo\nthree\n", "the data is unchanged");
    assert!(broker.terminate().success(), "{}", instance.log());
}

/// The only in-sync replica is lost permanently. The other replica lacks the last record, or is empty. An unclean
/// election needs `--yes`, and names the loss.
#[test]
fn unclean_election_needs_consent_and_names_its_loss() {
    let etcd = etcd(1);
    let mut instances: Vec<BrokerInstance> = (1..=2).map(|id| BrokerInstance::member(id, &etcd)).collect();
    let object_store = instances[0].object_store_dir();
    instances = instances.into_iter().map(|instance| instance.object_store_in(&object_store)).collect();
    let first = instances[0].start();
    let second = instances[1].start();
    let cli = instances[0].cli();
    for topic in ["orders", "late"] {
        output_of(&cli, &format!("topic create {topic} --replication-factor 2 --config remote.storage.enable=false"));
    }
    cli.ok_with(&["produce", "orders"], b"one\ntwo\n");
    for topic in ["orders", "late"] {
        eventually("both replicas are in sync", || (numbers(&partition(&cli, topic)["isr"]).len() == 2).then_some(()));
        output_of(&cli, &format!("partition reassign {topic}/0 --replicas 1,2"));
    }
    assert!(second.terminate().success(), "{}", instances[1].log());
    for topic in ["orders", "late"] {
        eventually("one replica is in sync", || (numbers(&partition(&cli, topic)["isr"]) == [1]).then_some(()));
        cli.ok_with(&["produce", topic], b"three\n");
    }
    first.kill9();

    let second = instances[1].spawn();
    let cli = instances[1].cli();
    eventually("the partition has no leader", || {
        let described = run(&cli, "topic describe orders --output json");
        (described.code == 0 && described.json()["partitions"][0]["leader"].is_null()).then_some(())
    });
    let lost = &json_of(&cli, "cluster describe")["brokers"][0];
    assert_eq!(
        (&lost["state"], &lost["replica_count"], &lost["address"]),
        (&json!("offline"), &json!(2), &Value::Null)
    );
    let error = run_failing(&cli, "partition elect orders/0");
    assert!(error.contains("waits for broker 1") && error.contains("--unclean"), "{error}");
    let error = run_failing(&cli, "partition elect orders/0 --unclean");
    assert!(error.contains("broker 1 is offline: if it can return") && error.contains("--yes"), "{error}");
    let elected = json_of(&cli, "partition elect orders/0 --unclean --yes");
    assert_eq!((&elected["leader"], &elected["unclean"], &elected["changed"]), (&json!(2), &json!(true), &json!(true)));
    assert_eq!(elected["replicas"][1]["log_end"], 2, "{elected}");
    let read = cli.ok(&["consume", "orders", "--from", "earliest", "--until-end"]);
    assert_eq!(read.text(), "one\ntwo\n", "the records of the replica are kept");
    let held = partition(&cli, "orders");
    assert_eq!(held["unclean_epoch"], held["leader_epoch"], "{held}");
    cli.ok_with(&["produce", "orders"], b"four\n");

    let error = run_failing(&cli, "partition elect late/0 --unclean");
    assert!(error.contains("broker 2 is empty: all records of late/0"), "{error}");
    let elected = json_of(&cli, "partition elect late/0 --unclean --yes");
    assert_eq!((&elected["leader"], &elected["replicas"][1]["empty"]), (&json!(2), &json!(true)), "{elected}");
    assert!(second.terminate().success(), "{}", instances[1].log());
}
