//! Admin operations through the command line, on a standalone broker and on a cluster of three in one process.

use serde_json::{Value, json};

use crate::{
    broker::{Cli, Home, Output},
    cluster::etcd,
    test_timeout::eventually,
};

/// Runs a command that must fail. Returns its error output.
fn refused(cli: &Cli, line: &str) -> String {
    let output = run(cli, line);
    assert_eq!((output.code, output.text().as_str()), (1, ""), "{line}: {output:?}");
    output.stderr
}

fn run(cli: &Cli, line: &str) -> Output {
    cli.run(&line.split(' ').collect::<Vec<_>>())
}

/// Runs a command that must succeed. Returns its JSON output.
fn asked(cli: &Cli, line: &str) -> Value {
    let output = run(cli, &format!("{line} --output json"));
    assert_eq!(output.code, 0, "{line}: {output:?}");
    output.json()
}

/// Runs a command that must succeed. Returns its text output.
fn said(cli: &Cli, line: &str) -> String {
    let output = run(cli, line);
    assert_eq!(output.code, 0, "{line}: {output:?}");
    output.text()
}

fn numbers(value: &Value) -> Vec<u64> {
    value.as_array().expect("a list").iter().map(|number| number.as_u64().expect("a number")).collect()
}

#[test]
fn standalone_broker_runs_and_validates_operations() {
    let mut home = Home::new();
    let broker = home.start();
    let cli = home.cli();
    said(&cli, "topic create orders --partitions 2");
    let cluster = asked(&cli, "cluster describe");
    assert_eq!(
        (&cluster["name"], &cluster["partitions"], &cluster["leaderless"]),
        (&json!("it"), &json!(2), &json!(0))
    );
    let one = &cluster["brokers"][0];
    assert_eq!((&one["id"], &one["state"], &one["rack"]), (&json!(1), &json!("running"), &json!("zone-a")));
    assert_eq!((&one["leaders"], &one["replicas"], &one["failed"]), (&json!(2), &json!(2), &Value::Null));
    assert!(one["free_bytes"].as_u64().is_some_and(|free| free > 0), "{one}");
    let text = said(&cli, "cluster describe");
    assert!(text.contains("2 partitions in 1 topic\n") && text.contains("zone-a"), "{text}");

    for (line, parts) in [
        ("topic create many --replication-factor 2", &["factor of 2", "1 is alive"][..]),
        ("topic alter orders --replication-factor 3", &["factor of 3", "1 is alive"]),
        ("broker drain 7", &["no broker 7", "it has 1"]),
        ("broker restore 7", &["no broker 7", "it has 1"]),
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
        let complaint = refused(&cli, line);
        assert!(parts.iter().all(|part| complaint.contains(part)), "{line}: {complaint}");
    }
    let wrong = run(&cli, "partition reassign cancel");
    assert!(wrong.code == 2 && wrong.stderr.contains("TOPIC/N") && wrong.stderr.contains("--all"), "{wrong:?}");

    for (line, part) in [
        ("topic create many --replication-factor 0", "1..=32"),
        ("topic alter orders --replication-factor 33", "1..=32"),
        ("broker drain x", "a broker's number, such as 2"),
        ("partition reassign orders --replicas 1,a", "a broker's number, such as 2"),
    ] {
        let output = run(&cli, line);
        assert!(output.code == 2 && output.stderr.contains(part), "{line}: {output:?}");
    }

    assert_eq!(asked(&cli, "partition reassign status"), json!([]));
    assert_eq!(said(&cli, "partition reassign status orders"), "no partition is being moved\n");
    assert_eq!(said(&cli, "partition reassign orders/0 --replicas 1"), "orders/0 is on 1 already\n");
    assert_eq!(said(&cli, "partition elect orders/1"), "broker 1 leads already: orders/1 in epoch 0\n");
    let stuck = run(&cli, "broker drain 1 --output json");
    assert!(stuck.code == 1 && stuck.stderr.contains("no replica on broker 1 can move"), "{stuck:?}");
    let drained = stuck.json();
    assert_eq!((&drained["changed"], &drained["takers"], &drained["replicas"]), (&json!(true), &json!(0), &json!(2)));
    assert_eq!(drained["stuck_replicas"].as_array().map(Vec::len), Some(2), "{drained}");
    let again = run(&cli, "broker drain 1").text();
    assert!(
        again.contains("already") && again.contains("warning: 2 replicas cannot move: no other broker takes any"),
        "{again}"
    );
    assert_eq!(asked(&cli, "cluster describe")["brokers"][0]["state"], "draining");
    let full = refused(&cli, "topic create more");
    assert!(full.contains("1 is alive, of which 1 is being stopped or drained"), "{full}");
    assert_eq!(asked(&cli, "broker restore 1"), json!({ "broker": 1, "draining": false, "changed": true }));
    assert_eq!(said(&cli, "broker restore 1"), "broker 1 was not being drained; nothing changed\n");
    said(&cli, "topic create more");
    broker.terminate();
}

/// Regression: 100,000 partitions took 6 GB of a broker's memory before the first directory was created, and as much at each start.
#[test]
fn standalone_broker_refuses_too_many_partitions() {
    let mut home = Home::new().setting("limits.memory_bytes", "\"64MiB\"");
    let broker = home.start();
    let cli = home.cli();
    let bound = ["broker 1", "4096", "broker.max_replicas"];
    let says = |complaint: &str, would: &str| {
        assert!(bound.iter().chain([&would]).all(|part| complaint.contains(part)), "{would}: {complaint}");
    };
    says(&refused(&cli, "topic create many --partitions 100000"), "100000");
    assert!(!said(&cli, "topic list").contains("many"));
    said(&cli, "topic create orders --partitions 2");
    says(&refused(&cli, "topic add-partitions orders --to 4097"), "4097");
    let one = asked(&cli, "cluster describe")["brokers"][0].clone();
    assert_eq!((&one["replicas"], &one["max_replicas"]), (&json!(2), &json!(4096)));
    broker.terminate();

    // A lowered limit closes no replica, and admits no more.
    home = home.setting("broker.max_replicas", 1);
    let broker = home.start();
    let complaint = refused(&home.cli(), "topic create more");
    assert!(complaint.contains("would hold 3") && complaint.contains("takes 1 at most"), "{complaint}");
    home.cli().ok_with(&["produce", "orders"], b"one\n");
    let text = said(&home.cli(), "cluster describe");
    assert!(text.contains("broker 1 holds 2 replicas, as many as it takes (broker.max_replicas)"), "{text}");
    broker.terminate();
}

#[test]
fn cluster_places_no_more_replicas_than_brokers_allow() {
    let home = Home::cluster(3);
    let broker =
        home.start_dev_cluster_with(3, &["--set", "broker.max_replicas=5", "--set", "controller.balance=false"]);
    let cli = home.cli();
    // The first broker is ready before the others.
    eventually("all are there", || {
        (asked(&cli, "cluster describe")["brokers"].as_array().map(Vec::len) == Some(3)).then_some(())
    });
    let single = "--replication-factor 1 --config min.insync.replicas=1";
    let complaint = refused(&cli, &format!("topic create many --partitions 16 {single}"));
    assert!(complaint.contains("would hold 6") && complaint.contains("takes 5 at most"), "{complaint}");
    said(&cli, &format!("topic create orders --partitions 6 {single}"));
    for line in [
        "topic add-partitions orders --to 16",
        "topic alter orders --replication-factor 3",
        "partition reassign orders --replicas 1",
    ] {
        let complaint = refused(&cli, line);
        assert!(complaint.contains("takes 5 at most (broker.max_replicas)"), "{line}: {complaint}");
    }
    said(&cli, "topic alter orders --replication-factor 2");
    let held = eventually("there are two of each", || {
        let brokers = asked(&cli, "cluster describe")["brokers"].clone();
        let held: Vec<u64> = brokers.as_array()?.iter().filter_map(|broker| broker["replicas"].as_u64()).collect();
        (held.iter().sum::<u64>() == 12).then_some(held)
    });
    assert!(held.iter().all(|replicas| *replicas <= 5), "{held:?}");
    broker.terminate();
}

/// Returns partition 0 of a topic.
fn partition(cli: &Cli, topic: &str) -> Value {
    asked(cli, &format!("topic describe {topic}"))["partitions"][0].clone()
}

#[test]
fn dev_cluster_replicates_reassigns_and_drains() {
    let home = Home::cluster(3);
    let broker = home.start_dev_cluster(3);
    let cli = home.cli();
    let complaint = refused(&cli, "topic create four --replication-factor 4");
    assert!(complaint.contains("factor of 4") && complaint.contains("3 are alive"), "{complaint}");

    said(&cli, "topic create orders");
    cli.ok_with(&["produce", "orders"], b"one\ntwo\nthree\n");
    let held = eventually("three are in sync", || {
        let held = partition(&cli, "orders");
        (held["isr"].as_array().map(Vec::len) == Some(3)).then_some(held)
    });
    assert_eq!((&held["high_watermark"], &held["unanswered"]), (&json!(3), &Value::Null), "{held}");
    let cluster = asked(&cli, "cluster describe");
    let brokers = cluster["brokers"].as_array().expect("a list");
    assert_eq!((brokers.len(), &cluster["under_replicated"]), (3, &json!(0)), "{cluster}");
    assert!(cluster["controller"].is_u64(), "{cluster}");
    assert!(brokers.iter().all(|one| one["state"] == "running" && one["unanswered"].is_null()), "{cluster}");
    assert!(brokers.iter().all(|one| one["segment_bytes"].as_u64().is_some_and(|bytes| bytes > 0)), "{cluster}");

    said(&cli, "topic create single --replication-factor 1 --config min.insync.replicas=1");
    cli.ok_with(&["produce", "single"], b"a\nb\n");
    let from = partition(&cli, "single")["leader"].as_u64().expect("led");
    let to = from % 3 + 1;
    said(&cli, &format!("partition reassign single/0 --replicas {to}"));
    let moved = eventually("the partition has moved", || {
        let at = partition(&cli, "single");
        (numbers(&at["replicas"]) == [to] && at["high_watermark"] == 2).then_some(at)
    });
    assert_eq!(moved["leader"], to);
    assert_eq!(asked(&cli, "partition reassign status"), json!([]));

    let drained = asked(&cli, &format!("broker drain {to}"));
    let stuck = json!([{ "topic": "orders", "partition": 0 }]);
    assert_eq!(drained["stuck_replicas"], stuck, "three replicas need three brokers");
    eventually("what can move has moved", || (numbers(&partition(&cli, "single")["replicas"]) != [to]).then_some(()));
    said(&cli, &format!("broker restore {to}"));

    said(&cli, "topic alter single --replication-factor 2");
    eventually("there are two", || (numbers(&partition(&cli, "single")["isr"]).len() == 2).then_some(()));
    said(&cli, "topic alter single --replication-factor 1");
    eventually("there is one", || (numbers(&partition(&cli, "single")["replicas"]).len() == 1).then_some(()));
    for (topic, records) in [("orders", "one\ntwo\nthree\n"), ("single", "a\nb\n")] {
        let read = cli.ok(&["consume", topic, "--from", "earliest", "--until-end"]);
        assert_eq!(read.text(), records, "{topic}");
    }

    assert!(broker.terminate().success(), "{}", home.log());
    let alone = home.cli().run(&["dev", "--data-dir", home.data_dir().to_str().expect("a path of ours")]);
    assert!(alone.code == 1 && alone.stderr.contains("--brokers 3"), "{alone:?}");
    let broker = home.start_dev_cluster(3);
    let read = cli.ok(&["consume", "orders", "--from", "earliest", "--until-end"]);
    assert_eq!(read.text(), "one\ntwo\nthree\n", "the data stays");
    assert!(broker.terminate().success(), "{}", home.log());
}

/// The last in-sync replica is lost permanently. The remaining replica is older.
#[test]
fn unclean_election_needs_consent_and_names_its_loss() {
    let etcd = etcd(1);
    let mut homes: Vec<Home> = (1..=2).map(|id| Home::member(id, &etcd)).collect();
    let bucket = homes[0].bucket();
    homes = homes.into_iter().map(|home| home.bucket_of(&bucket)).collect();
    let first = homes[0].start();
    let second = homes[1].start();
    let cli = homes[0].cli();
    for topic in ["orders", "late"] {
        said(&cli, &format!("topic create {topic} --replication-factor 2 --config remote.storage.enable=false"));
    }
    cli.ok_with(&["produce", "orders"], b"one\ntwo\n");
    for topic in ["orders", "late"] {
        eventually("both hold it", || (numbers(&partition(&cli, topic)["isr"]).len() == 2).then_some(()));
        said(&cli, &format!("partition reassign {topic}/0 --replicas 1,2"));
    }
    assert!(second.terminate().success(), "{}", homes[1].log());
    for topic in ["orders", "late"] {
        eventually("the other one is alone", || (numbers(&partition(&cli, topic)["isr"]) == [1]).then_some(()));
        cli.ok_with(&["produce", topic], b"three\n");
    }
    first.kill9();

    let second = homes[1].spawn();
    let cli = homes[1].cli();
    eventually("nobody leads", || {
        let described = run(&cli, "topic describe orders --output json");
        (described.code == 0 && described.json()["partitions"][0]["leader"].is_null()).then_some(())
    });
    let gone = &asked(&cli, "cluster describe")["brokers"][0];
    assert_eq!((&gone["state"], &gone["replicas"], &gone["address"]), (&json!("gone"), &json!(2), &Value::Null));
    let complaint = refused(&cli, "partition elect orders/0");
    assert!(complaint.contains("waits for broker 1") && complaint.contains("--unclean"), "{complaint}");
    let complaint = refused(&cli, "partition elect orders/0 --unclean");
    assert!(complaint.contains("broker 1 is not alive") && complaint.contains("--yes"), "{complaint}");
    let elected = asked(&cli, "partition elect orders/0 --unclean --yes");
    assert_eq!((&elected["leader"], &elected["unclean"], &elected["changed"]), (&json!(2), &json!(true), &json!(true)));
    assert_eq!(elected["held"][1]["log_end"], 2, "{elected}");
    let read = cli.ok(&["consume", "orders", "--from", "earliest", "--until-end"]);
    assert_eq!(read.text(), "one\ntwo\n", "what it had is there");
    let held = partition(&cli, "orders");
    assert_eq!(held["unclean_epoch"], held["leader_epoch"], "{held}");
    cli.ok_with(&["produce", "orders"], b"four\n");

    let complaint = refused(&cli, "partition elect late/0 --unclean");
    assert!(complaint.contains("broker 2 is empty: everything of late/0"), "{complaint}");
    let elected = asked(&cli, "partition elect late/0 --unclean --yes");
    assert_eq!((&elected["leader"], &elected["held"][1]["empty"]), (&json!(2), &json!(true)), "{elected}");
    assert!(second.terminate().success(), "{}", homes[1].log());
}
