//! Values in etcd that no broker wrote: they are named and passed over, nobody ends because of them, and what they spoiled goes
//! on when they are mended.

use etcd_client::Client;
use serde_json::Value;

use super::members::Cluster;
use crate::patience::eventually;

const PREFIX: &str = "/strandline/it";

/// etcd's own API, as an operator's slip goes.
struct Api {
    runtime: tokio::runtime::Runtime,
    client: Client,
}

impl Api {
    fn of(cluster: &Cluster) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let client = runtime.block_on(Client::connect(cluster.etcd.endpoints(), None)).expect("etcd answers");
        Self { runtime, client }
    }

    fn get(&mut self, key: &str) -> Vec<u8> {
        let answer = self.runtime.block_on(self.client.get(format!("{PREFIX}/{key}"), None)).expect("etcd answers");
        answer.kvs().first().unwrap_or_else(|| panic!("{key} is not there")).value().to_vec()
    }

    /// Puts something else there; gives back what was.
    fn spoil(&mut self, key: &str, rubbish: &str) -> Vec<u8> {
        let before = self.get(key);
        self.put(key, rubbish.as_bytes());
        before
    }

    fn put(&mut self, key: &str, value: &[u8]) {
        let key = format!("{PREFIX}/{key}");
        self.runtime.block_on(self.client.put(key, value.to_vec(), None)).expect("etcd answers");
    }

    fn delete(&mut self, key: &str) {
        self.runtime.block_on(self.client.delete(format!("{PREFIX}/{key}"), None)).expect("etcd answers");
    }
}

/// The keys that `cluster describe` cannot use, without what all begin with.
fn unusable(cluster: &Cluster) -> Vec<String> {
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
    cluster.in_sync(topic, 3);
}

fn read(cluster: &Cluster, topic: &str, partition: &str) -> Option<String> {
    let read = cluster.cli().run(&["consume", topic, "--partition", partition, "--until-end", "--timeout", "5"]);
    (read.code == 0).then(|| read.text())
}

/// Nobody ended because of it.
fn all_run(cluster: &mut Cluster) {
    for id in 1..=3 {
        assert!(cluster.is_running(id), "broker {id}\n{}", cluster.log(id));
        assert!(!cluster.log(id).contains("panicked"), "broker {id}\n{}", cluster.log(id));
    }
}

#[test]
fn rubbish_in_etcd_is_named_and_passed_over_and_mended() {
    let mut cluster = Cluster::start(3);
    let cli = cluster.cli();
    create(&cluster, "orders", "2");
    create(&cluster, "other", "1");
    for partition in ["0", "1"] {
        cli.ok_with(&["produce", "orders", "--partition", partition], b"before\n");
    }
    cli.ok_with(&["produce", "other"], b"before\n");
    let topic = cli.ok(&["topic", "describe", "orders", "--output", "json"]).json();
    let id = topic["id"].as_str().expect("an id").to_owned();
    let spoiled = format!("partitions/{id}/1");

    let mut api = Api::of(&cluster);
    let partition = api.spoil(&spoiled, "{\"replicas\":[");
    let other = api.spoil("topics/other", "[1, 2]");
    api.put("topics/x", b"rubbish");
    // A broker without an address, and a partition that leads itself.
    api.put("brokers/9", b"{}");
    api.put(&format!("partitions/{id}/7"), b"\xff\xfe");
    let mut wanted = vec![
        "brokers/9".to_owned(),
        spoiled.clone(),
        format!("partitions/{id}/7"),
        "topics/other".into(),
        "topics/x".into(),
    ];
    wanted.sort();
    eventually("every one is named", || (unusable(&cluster) == wanted).then_some(()));
    let text = cli.ok(&["cluster", "describe"]).text();
    assert!(text.contains(&format!("the value of {PREFIX}/brokers/9 cannot be used: missing field")), "{text}");
    for id in 1..=3 {
        for key in &wanted {
            let named = format!("{PREFIX}/{key}");
            eventually("the log names the key", || cluster.log(id).contains(&named).then_some(()));
        }
    }

    // What is not spoiled goes on, and new topics are made; a restart ends nowhere either.
    cli.ok_with(&["produce", "orders", "--partition", "0"], b"meanwhile\n");
    create(&cluster, "new", "3");
    cli.ok_with(&["produce", "new"], b"new\n");
    let named: Value = serde_json::from_slice(&partition).expect("JSON");
    let leader = u32::try_from(named["leader"].as_u64().expect("somebody leads")).expect("a broker's number");
    cluster.kill(leader);
    cluster.restart(leader);
    cluster.in_sync("new", 3);
    assert_eq!(read(&cluster, "orders", "0").as_deref(), Some("before\nmeanwhile\n"));

    // As docs/operations.md says: as it was, though the broker that it names as the leader was started anew meanwhile.
    api.put(&spoiled, &partition);
    api.put("topics/other", &other);
    for key in ["topics/x", "brokers/9"] {
        api.delete(key);
    }
    api.delete(&format!("partitions/{id}/7"));
    eventually("nothing is unusable", || unusable(&cluster).is_empty().then_some(()));
    for topic in ["orders", "other"] {
        cluster.in_sync(topic, 3);
    }
    let whole = eventually("it is read again", || read(&cluster, "orders", "1").filter(|text| !text.is_empty()));
    assert_eq!(whole, "before\n");
    eventually("and written", || {
        (cli.run_with(&["produce", "orders", "--partition", "1"], b"after\n").code == 0).then_some(())
    });
    let epoch = |value: &Value| value["leader_epoch"].as_u64().expect("a number");
    let mended: Value = serde_json::from_slice(&api.get(&spoiled)).expect("JSON");
    assert!(epoch(&mended) > epoch(&named), "led by a process that began after the epoch: {mended}");
    assert_eq!(read(&cluster, "other", "0").as_deref(), Some("before\n"));
    all_run(&mut cluster);
}

/// The controller's key is a lease's: whoever finds rubbish there takes it away, and somebody is the controller.
#[test]
fn rubbish_in_the_controllers_key_leaves_the_cluster_with_a_controller() {
    let mut cluster = Cluster::start(3);
    create(&cluster, "orders", "3");
    Api::of(&cluster).put("controller", b"nobody");
    let controller = || {
        let described = cluster.cli().ok(&["cluster", "describe", "--output", "json"]).json();
        described["controller"].as_u64().filter(|_| described["unreadable"] == serde_json::json!([]))
    };
    let controller = eventually("somebody is the controller", controller);
    let log: String = (1..=3).map(|id| cluster.log(id)).collect();
    assert!(log.contains(&format!("{PREFIX}/controller")), "{log}");
    // It does its work.
    let other = u32::try_from(controller % 3 + 1).expect("a broker's number");
    cluster.kill(other);
    eventually("what that one led is led by others", || {
        let led = |one: &Value| one["leader"].as_u64().is_some_and(|leader| leader != u64::from(other));
        cluster.partitions("orders").iter().all(led).then_some(())
    });
}
