//! Brokers of one cluster as processes, with an etcd of their own and one bucket.

use std::{collections::BTreeMap, net::SocketAddr, path::Path};

use serde_json::Value;

use crate::{
    broker::{Broker, Cli, Home, http_get},
    etcd::Etcd,
    test_timeout::{TEST_TIMEOUT, eventually, poll},
};

/// An etcd of so many members that answers.
pub(crate) fn etcd(members: usize) -> Etcd {
    let etcd = Etcd::begin(members, "http", &[]);
    answers(&etcd);
    etcd
}

/// Waits until every member says that it has a leader.
pub(crate) fn answers(etcd: &Etcd) {
    let healthy = |url: &String| {
        let address: SocketAddr = url.strip_prefix("http://")?.parse().ok()?;
        http_get(address, "/health").ok().filter(|(code, body)| *code == 200 && body.contains("true"))
    };
    eventually("etcd has a leader", || etcd.endpoints().iter().all(|url| healthy(url).is_some()).then_some(()));
}

/// Brokers count from 1. All end with the value.
pub(crate) struct Cluster {
    /// First, and so dropped first: each prints the end of its log when a test fails, and that lies in its home.
    brokers: BTreeMap<u32, Broker>,
    pub(crate) etcd: Etcd,
    folder: tempfile::TempDir,
    homes: BTreeMap<u32, Home>,
}

impl Cluster {
    /// So many brokers, each in a rack of its own, ready.
    pub(crate) fn start(brokers: u32) -> Self {
        Self::with(brokers, |home| home)
    }

    /// As [`Cluster::start`], each home with these settings.
    pub(crate) fn with(brokers: u32, settings: impl Fn(Home) -> Home) -> Self {
        let mut cluster = Self::over(Etcd::begin(3, "http", &[]));
        for id in 1..=brokers {
            let home = cluster.new_home(id);
            cluster.add(id, settings(home));
        }
        cluster.ready();
        cluster
    }

    /// A cluster without brokers. etcd answers.
    pub(crate) fn over(etcd: Etcd) -> Self {
        answers(&etcd);
        let folder = tempfile::tempdir().expect("a folder for the bucket");
        Self { etcd, folder, homes: BTreeMap::new(), brokers: BTreeMap::new() }
    }

    /// The folder that all of them have for a bucket.
    pub(crate) fn bucket(&self) -> &Path {
        self.folder.path()
    }

    /// A home for one more broker, with the bucket of the others.
    pub(crate) fn new_home(&self, id: u32) -> Home {
        Home::member(id, &self.etcd).bucket_of(self.folder.path())
    }

    /// Starts one more broker and does not wait for it.
    pub(crate) fn add(&mut self, id: u32, home: Home) {
        self.brokers.insert(id, home.spawn());
        self.homes.insert(id, home);
    }

    /// Waits until every broker that runs says that it is ready.
    pub(crate) fn ready(&mut self) {
        for (id, broker) in &mut self.brokers {
            if let Err(why) = broker.wait_ready() {
                panic!("broker {id} did not become ready: {why}");
            }
        }
    }

    /// Where a broker lives.
    pub(crate) fn home(&self, id: u32) -> &Home {
        &self.homes[&id]
    }

    /// Where clients find the brokers.
    pub(crate) fn addresses(&self) -> Vec<SocketAddr> {
        self.homes.values().map(Home::grpc).collect()
    }

    /// The same as text, as clients are configured.
    pub(crate) fn bootstrap(&self) -> String {
        self.addresses().iter().map(SocketAddr::to_string).collect::<Vec<_>>().join(",")
    }

    pub(crate) fn cli(&self) -> Cli {
        Cli::of(&self.addresses(), self.folder.path())
    }

    /// A command line that is told of these brokers only.
    pub(crate) fn cli_by(&self, brokers: impl IntoIterator<Item = u32>) -> Cli {
        let addresses: Vec<SocketAddr> = brokers.into_iter().map(|id| self.homes[&id].grpc()).collect();
        Cli::of(&addresses, self.folder.path())
    }

    /// Kills a broker with signal 9.
    pub(crate) fn kill(&mut self, id: u32) {
        self.brokers.remove(&id).expect("it runs").kill9();
    }

    /// A broker that runs.
    pub(crate) fn broker(&self, id: u32) -> &Broker {
        &self.brokers[&id]
    }

    /// Whether a broker runs still.
    pub(crate) fn is_running(&mut self, id: u32) -> bool {
        self.brokers.get_mut(&id).is_some_and(Broker::is_running)
    }

    /// Stops a broker as an operator does.
    pub(crate) fn stop(&mut self, id: u32) {
        self.broker(id).ask_to_stop();
        self.stopped(id);
    }

    /// Waits for a broker that was asked to stop.
    pub(crate) fn stopped(&mut self, id: u32) {
        let status = self.brokers.remove(&id).expect("it ran").wait();
        assert!(status.success(), "broker {id} ended with {status}\n{}", self.homes[&id].log());
    }

    /// What a broker has said.
    pub(crate) fn log(&self, id: u32) -> String {
        self.homes[&id].log()
    }

    /// Starts a broker that is down, on what its disk holds, and does not wait for it.
    pub(crate) fn begin(&mut self, id: u32) {
        self.brokers.insert(id, self.homes[&id].spawn());
    }

    /// The same, and waits until it is ready.
    pub(crate) fn restart(&mut self, id: u32) {
        self.begin(id);
        self.ready();
    }

    /// The same, with other settings.
    pub(crate) fn restart_with(&mut self, id: u32, settings: impl FnOnce(Home) -> Home) {
        let home = self.homes.remove(&id).expect("it was there");
        self.homes.insert(id, settings(home));
        self.restart(id);
    }

    /// Takes everything from a broker that is down.
    pub(crate) fn wipe(&self, id: u32) {
        std::fs::remove_dir_all(self.homes[&id].data_dir()).expect("it was there");
    }

    /// What `topic describe` says of a topic's partitions.
    pub(crate) fn partitions(&self, topic: &str) -> Vec<Value> {
        let described = self.cli().ok(&["topic", "describe", topic, "--output", "json"]).json();
        described["partitions"].as_array().expect("partitions").clone()
    }

    /// Waits until each partition of a topic has a leader and so many replicas in sync.
    pub(crate) fn in_sync(&self, topic: &str, replicas: usize) {
        let mut last = Vec::new();
        let whole =
            |one: &Value| one["leader"].is_u64() && one["isr"].as_array().is_some_and(|isr| isr.len() == replicas);
        let settled = poll(TEST_TIMEOUT, || {
            last = self.partitions(topic);
            last.iter().all(whole).then_some(())
        });
        assert!(settled.is_some(), "{replicas} replicas in sync: {last:#?}\n{}", self.logs());
    }

    /// What everybody has said.
    pub(crate) fn logs(&self) -> String {
        let of_brokers = self.homes.iter().map(|(id, home)| format!("--- broker {id}\n{}", home.log()));
        of_brokers.chain([format!("--- etcd\n{}", self.etcd.logs())]).collect()
    }

    /// Who leads a partition.
    pub(crate) fn leader(&self, topic: &str, partition: usize) -> u32 {
        let leader = eventually("the partition has a leader", || self.partitions(topic)[partition]["leader"].as_u64());
        u32::try_from(leader).expect("a broker's number")
    }
}
