//! Values in etcd that are invalid because of an operator's mistake. Brokers report and skip them, and no process exits
//! because of them. Affected partitions continue when the values are restored.

use etcd_client::Client;
use serde_json::Value;
use strandline::proto::{
    error::{ApiError, ErrorCode},
    v1::InitProducerIdRequest,
};

use super::members::Cluster;
use crate::{corruption::lines, test_timeout::eventually, wire};

const PREFIX: &str = "/strandline/it";

/// Direct access to the cluster's keys in etcd.
struct Api {
    runtime: tokio::runtime::Runtime,
    client: Client,
}

impl Api {
    fn of(cluster: &Cluster) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let client = runtime.block_on(Client::connect(cluster.etcd.endpoints(), None)).expect("etcd responds");
        Self { runtime, client }
    }

    fn get(&mut self, key: &str) -> Vec<u8> {
        let response = self.runtime.block_on(self.client.get(format!("{PREFIX}/{key}"), None)).expect("etcd responds");
        response.kvs().first().unwrap_or_else(|| panic!("{key} does not exist")).value().to_vec()
    }

    /// Overwrites a value with an invalid one. Returns the old value.
    fn invalidate(&mut self, key: &str, value: &str) -> Vec<u8> {
        let before = self.get(key);
        self.put(key, value.as_bytes());
        before
    }

    fn put(&mut self, key: &str, value: &[u8]) {
        let key = format!("{PREFIX}/{key}");
        self.runtime.block_on(self.client.put(key, value.to_vec(), None)).expect("etcd responds");
    }

    fn delete(&mut self, key: &str) {
        self.runtime.block_on(self.client.delete(format!("{PREFIX}/{key}"), None)).expect("etcd responds");
    }
}

/// Returns the keys that `cluster describe` reports as unreadable, without their common prefix.
fn unreadable_keys(cluster: &Cluster) -> Vec<String> {
    let described = cluster.cli().ok(&["cluster", "describe", "--output", "json"]).json();
    let keys = described["unreadable"].as_array().expect("a list").iter();
    let key = |one: &Value| one["key"].as_str().expect("a path").trim_start_matches(PREFIX)[1..].to_owned();
    let mut keys: Vec<String> = keys.map(key).collect();
    keys.sort();
    keys
}

fn create(cluster: &Cluster, topic: &str, partitions: &str) {
    let create = ["topic", "create", topic, "--partitions", partitions, "--replication-factor", "3"];
    cluster.cli().ok(&[&create[..], &["--config", "min.insync.replicas=2"]].concat());
    cluster.wait_until_in_sync(topic, 3);
}

fn read(cluster: &Cluster, topic: &str, partition: &str) -> Option<String> {
    let read = cluster.cli().run(&["consume", topic, "--partition", partition, "--until-end", "--timeout", "5"]);
    (read.code == 0).then(|| read.text())
}

/// Checks that no broker has exited or panicked.
fn check_all_running(cluster: &mut Cluster) {
    for id in 1..=3 {
        assert!(cluster.is_running(id), "broker {id}\n{}", cluster.log(id));
        assert!(!cluster.log(id).contains("panicked"), "broker {id}\n{}", cluster.log(id));
    }
}

#[test]
fn invalid_values_in_etcd_are_reported_and_skipped() {
    let mut cluster = Cluster::start(3);
    let cli = cluster.cli();
    create(&cluster, "orders", "2");
    create(&cluster, "other", "1");
    for partition in ["0", "1"] {
        cli.ok_with(&["produce", "orders", "--partition", partition], b"before\n");
    }
    cli.ok_with(&["produce", "other"], b"before\n");
    let topic = cli.ok(&["topic", "describe", "orders", "--output", "json"]).json();
    let id = topic["topic_id"].as_str().expect("an id").to_owned();
    let invalid_key = format!("partitions/{id}/1");

    let mut api = Api::of(&cluster);
    let partition = api.invalidate(&invalid_key, "{\"replicas\":[");
    let other = api.invalidate("topics/other", "[1, 2]");
    api.put("topics/x", b"invalid");
    // A broker without an address, and a partition value that is not UTF-8.
    api.put("brokers/9", b"{}");
    api.put(&format!("partitions/{id}/7"), b"\xff\xfe");
    let mut wanted = vec![
        "brokers/9".to_owned(),
        invalid_key.clone(),
        format!("partitions/{id}/7"),
        "topics/other".into(),
        "topics/x".into(),
    ];
    wanted.sort();
    eventually("every invalid key is reported", || (unreadable_keys(&cluster) == wanted).then_some(()));
    let text = cli.ok(&["cluster", "describe"]).text();
    assert!(text.contains(&format!("the value of {PREFIX}/brokers/9 is invalid: missing field")), "{text}");
    for id in 1..=3 {
        for key in &wanted {
            let named = format!("{PREFIX}/{key}");
            eventually("the log contains the key", || cluster.log(id).contains(&named).then_some(()));
        }
    }

    // Unaffected partitions continue, and new topics can be created. A restart succeeds too.
    cli.ok_with(&["produce", "orders", "--partition", "0"], b"meanwhile\n");
    create(&cluster, "new", "3");
    cli.ok_with(&["produce", "new"], b"new\n");
    let named: Value = serde_json::from_slice(&partition).expect("JSON");
    let leader = u32::try_from(named["leader"].as_u64().expect("a broker leads")).expect("the broker id is below 2^32");
    cluster.kill(leader);
    cluster.restart(leader);
    cluster.wait_until_in_sync("new", 3);
    assert_eq!(read(&cluster, "orders", "0").as_deref(), Some("before\nmeanwhile\n"));

    // The old value is restored, as docs/operations.md describes. The broker that it names as leader was restarted
    // meanwhile. So this broker's replica stays offline until the next restart, at which the broker resigns.
    api.put(&invalid_key, &partition);
    api.put("topics/other", &other);
    for key in ["topics/x", "brokers/9"] {
        api.delete(key);
    }
    api.delete(&format!("partitions/{id}/7"));
    eventually("no key is reported as invalid", || unreadable_keys(&cluster).is_empty().then_some(()));
    let held_back = "the replica stays offline until this broker is restarted";
    eventually("the replica is held back", || cluster.log(leader).contains(held_back).then_some(()));
    cluster.kill(leader);
    cluster.restart(leader);
    for topic in ["orders", "other"] {
        cluster.wait_until_in_sync(topic, 3);
    }
    let whole =
        eventually("the records are read again", || read(&cluster, "orders", "1").filter(|text| !text.is_empty()));
    assert_eq!(whole, "before\n");
    eventually("the append succeeds", || {
        (cli.run_with(&["produce", "orders", "--partition", "1"], b"after\n").code == 0).then_some(())
    });
    let epoch = |value: &Value| value["leader_epoch"].as_u64().expect("a number");
    let repaired: Value = serde_json::from_slice(&api.get(&invalid_key)).expect("JSON");
    assert!(epoch(&repaired) > epoch(&named), "the leader epoch has grown: {repaired}");
    assert_eq!(read(&cluster, "other", "0").as_deref(), Some("before\n"));
    check_all_running(&mut cluster);
}

/// While the tier state of a partition is invalid, a restarted broker cannot locate records that only the object store
/// has. No other records are read in their place. The restored value makes all records readable again.
#[test]
fn tiered_records_with_invalid_state_are_not_skipped() {
    let mut cluster = Cluster::start(3);
    let cli = cluster.cli();
    let eager = ["segment.bytes=65536", "segment.ms=200", "local.retention.bytes=0", "min.insync.replicas=2"];
    let config = eager.map(|one| ["--config", one]).concat();
    cli.ok(&[&["topic", "create", "history", "--replication-factor", "3"], &config[..]].concat());
    cluster.wait_until_in_sync("history", 3);
    let before = lines(20_000);
    cli.ok_with(&["produce", "history"], before.as_bytes());
    let evicted = || cluster.partitions("history")[0]["local_start"] == 20_000;
    eventually("all records are only in the object store", || evicted().then_some(()));
    let topic = cli.ok(&["topic", "describe", "history", "--output", "json"]).json();
    let key = format!("tier/{}/0", topic["topic_id"].as_str().expect("an id"));

    let mut api = Api::of(&cluster);
    let value = api.invalidate(&key, "{\"manifest\":7}");
    eventually("the key is reported", || (unreadable_keys(&cluster) == [key.clone()]).then_some(()));
    assert!(read(&cluster, "history", "0").as_deref() == Some(&*before), "brokers have the topic from before");
    for id in 1..=3 {
        cluster.kill(id);
        cluster.restart(id);
        cluster.wait_until_in_sync("history", 3);
    }
    let from_start = ["consume", "history", "--from", "earliest", "--until-end", "--timeout", "5"];
    let refused = cli.run(&from_start);
    assert_eq!((refused.code, refused.stdout.len()), (1, 0), "{refused:?}");
    assert!(refused.stderr.contains("offset 0 is not in the object store"), "{refused:?}");

    api.put(&key, &value);
    eventually("no key is reported as invalid", || unreadable_keys(&cluster).is_empty().then_some(()));
    eventually("all records are read again", || read(&cluster, "history", "0").filter(|text| *text == before));
    cli.ok_with(&["produce", "history"], b"after\n");
    let whole = before + "after\n";
    eventually("all records are read again", || read(&cluster, "history", "0").filter(|text| *text == whole));
    check_all_running(&mut cluster);
}

/// Without a readable directory record, a starting broker cannot verify its replicas, so it copies them from its peers.
#[test]
fn broker_with_unreadable_directory_key_copies_its_replicas() {
    let mut cluster = Cluster::start(3);
    create(&cluster, "orders", "3");
    for partition in ["0", "1", "2"] {
        cluster.cli().ok_with(&["produce", "orders", "--partition", partition], b"before\n");
    }
    let mut api = Api::of(&cluster);
    cluster.stop(2);
    api.invalidate("directories/2", "{}");
    cluster.restart(2);
    cluster.wait_until_in_sync("orders", 3);
    let log = cluster.log(2);
    assert!(log.contains("the directory record of this broker cannot be read"), "{log}");
    assert!(unreadable_keys(&cluster).is_empty(), "the broker has written its directory record again");
    // Broker 2 must serve the records alone.
    for other in [1, 3] {
        cluster.stop(other);
    }
    let consume = ["consume", "orders", "--partition", "1", "--until-end", "--timeout", "20"];
    assert_eq!(cluster.cli().ok(&consume).text(), "before\n");
}

/// While `producer-ids` is invalid, producers with an id continue. New producers get ids from the block that the broker
/// has reserved, until the block is used up.
#[test]
fn new_producers_use_up_reserve_without_producer_ids_key() {
    let cluster = Cluster::start(1);
    let cli = cluster.cli();
    cli.ok(&["topic", "create", "orders"]);
    cli.ok_with(&["produce", "orders"], b"one\n");
    let mut api = Api::of(&cluster);
    let value = api.invalidate("producer-ids", "1000");
    eventually("the key is reported", || (unreadable_keys(&cluster) == ["producer-ids"]).then_some(()));
    cli.ok_with(&["produce", "orders"], b"two\n");
    let address = cluster.addresses()[0];
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let _inside = runtime.enter();
    let (mut log, mut count) = (wire::log(address), 0);
    let mut begin = || {
        count += 1;
        // Each connection may request fewer ids than the block contains, so further connections are opened.
        if count % 500 == 0 {
            log = wire::log(address);
        }
        runtime.block_on(log.init_producer_id(InitProducerIdRequest::default()))
    };
    let refused = (0..10_000).find_map(|_| begin().err()).expect("the reserve has an end");
    let error = ApiError::from(&refused);
    assert_eq!(error.code, ErrorCode::MetadataUnavailable, "{error:?}");
    assert!(error.message.contains("producer-ids"), "{error:?}");
    api.put("producer-ids", &value);
    eventually("producers continue", || begin().ok());
    cli.ok_with(&["produce", "orders"], b"three\n");
    assert_eq!(read(&cluster, "orders", "0").as_deref(), Some("one\ntwo\nthree\n"));
}

/// Without a readable `producer-id-key`, a restarted broker cannot verify whether a producer id was assigned, and
/// refuses the append with a retryable error. A broker that has read the key before continues.
#[test]
fn producers_wait_without_the_key_of_check_values() {
    let mut cluster = Cluster::start(1);
    let cli = cluster.cli();
    cli.ok(&["topic", "create", "orders"]);
    cli.ok_with(&["produce", "orders"], b"one\n");
    let mut api = Api::of(&cluster);
    let value = api.invalidate("producer-id-key", "1000");
    eventually("the key is reported", || (unreadable_keys(&cluster) == ["producer-id-key"]).then_some(()));
    cli.ok_with(&["produce", "orders"], b"two\n");
    cluster.kill(1);
    cluster.restart(1);
    let (cli, address) = (cluster.cli(), cluster.addresses()[0]);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let _inside = runtime.enter();
    let mut log = wire::log(address);
    let mut batch = wire::batch(&[b"x"]);
    batch[43..57].fill(0);
    wire::renew_crc(&mut batch);
    // Repeated: the restarted broker may not lead the partition yet.
    let error = eventually("the id is refused", || {
        let refused = runtime.block_on(wire::append(&mut log, wire::append_batch("orders", 0, batch.clone())));
        Some(refused.expect_err("the producer id is unknown")).filter(|error| error.code != ErrorCode::NotLeader)
    });
    assert!(error.code == ErrorCode::MetadataUnavailable && error.retryable, "{error:?}");
    api.put("producer-id-key", &value);
    cli.ok_with(&["produce", "orders"], b"three\n");
    let refused = runtime.block_on(wire::append(&mut log, wire::append_batch("orders", 0, batch)));
    assert_eq!(refused.expect_err("the producer id was never assigned").code, ErrorCode::UnknownProducer);
    assert_eq!(read(&cluster, "orders", "0").as_deref(), Some("one\ntwo\nthree\n"));
}

/// An invalid controller key without a lease would never expire. A broker deletes the key, and a controller is elected.
#[test]
fn cluster_replaces_invalid_controller_key() {
    let mut cluster = Cluster::start(3);
    create(&cluster, "orders", "3");
    Api::of(&cluster).put("controller", b"nobody");
    let controller = || {
        let described = cluster.cli().ok(&["cluster", "describe", "--output", "json"]).json();
        described["controller"].as_u64().filter(|_| described["unreadable"] == serde_json::json!([]))
    };
    let controller = eventually("a broker is the controller", controller);
    let log: String = (1..=3).map(|id| cluster.log(id)).collect();
    assert!(log.contains(&format!("{PREFIX}/controller")), "{log}");
    // The new controller has leaders elected for the partitions of a killed broker.
    let other = u32::try_from(controller % 3 + 1).expect("the broker id is below 2^32");
    cluster.kill(other);
    eventually("other brokers lead its partitions", || {
        let led = |one: &Value| one["leader"].as_u64().is_some_and(|leader| leader != u64::from(other));
        cluster.partitions("orders").iter().all(led).then_some(())
    });
}
