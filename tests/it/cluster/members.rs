//! Broker processes of one cluster, with an etcd of their own and one object store.

use std::{collections::BTreeMap, net::SocketAddr, path::Path};

use serde_json::Value;

use crate::{
    broker::{Broker, Cli, Home, http_get},
    etcd::Etcd,
    test_timeout::{TEST_TIMEOUT, eventually, poll},
};

/// Starts an etcd with this number of members, and waits until it has a leader.
pub(crate) fn etcd(members: usize) -> Etcd {
    let etcd = Etcd::begin(members, "http", &[]);
    answers(&etcd);
    etcd
}

/// Waits until every member reports a leader.
pub(crate) fn answers(etcd: &Etcd) {
    let healthy = |url: &String| {
        let address: SocketAddr = url.strip_prefix("http://")?.parse().ok()?;
        http_get(address, "/health").ok().filter(|(code, body)| *code == 200 && body.contains("true"))
    };
    eventually("etcd has a leader", || etcd.endpoints().iter().all(|url| healthy(url).is_some()).then_some(()));
}

/// A cluster of broker processes. Broker ids start at 1. Dropping the value ends all processes.
pub(crate) struct Cluster {
    /// First field, and so dropped first. On a failed test, each broker prints the end of its log, which is in the folder of its [`Home`].
    brokers: BTreeMap<u32, Broker>,
    pub(crate) etcd: Etcd,
    folder: tempfile::TempDir,
    homes: BTreeMap<u32, Home>,
}

impl Cluster {
    /// Starts this number of brokers, spread over three racks, and waits until they are ready.
    pub(crate) fn start(brokers: u32) -> Self {
        Self::with(brokers, |home| home)
    }

    /// Starts a cluster as [`Cluster::start`] does, with these settings for each broker.
    pub(crate) fn with(brokers: u32, settings: impl Fn(Home) -> Home) -> Self {
        let mut cluster = Self::over(Etcd::begin(3, "http", &[]));
        for id in 1..=brokers {
            let home = cluster.new_home(id);
            cluster.add(id, settings(home));
        }
        cluster.ready();
        cluster
    }

    /// Creates a cluster without brokers, and waits until etcd has a leader.
    pub(crate) fn over(etcd: Etcd) -> Self {
        answers(&etcd);
        let folder = tempfile::tempdir().expect("a folder for the bucket");
        Self { etcd, folder, homes: BTreeMap::new(), brokers: BTreeMap::new() }
    }

    /// Returns the folder that is the object store of all brokers.
    pub(crate) fn bucket(&self) -> &Path {
        self.folder.path()
    }

    /// Returns an instance for one more broker, with the object store of the cluster.
    pub(crate) fn new_home(&self, id: u32) -> Home {
        Home::member(id, &self.etcd).bucket_of(self.folder.path())
    }

    /// Starts one more broker without waiting for it.
    pub(crate) fn add(&mut self, id: u32, home: Home) {
        self.brokers.insert(id, home.spawn());
        self.homes.insert(id, home);
    }

    /// Waits until every running broker is ready.
    pub(crate) fn ready(&mut self) {
        for (id, broker) in &mut self.brokers {
            if let Err(why) = broker.wait_ready() {
                panic!("broker {id} did not become ready: {why}");
            }
        }
    }

    pub(crate) fn home(&self, id: u32) -> &Home {
        &self.homes[&id]
    }

    /// Returns the gRPC addresses of all brokers.
    pub(crate) fn addresses(&self) -> Vec<SocketAddr> {
        self.homes.values().map(Home::grpc).collect()
    }

    /// Returns the gRPC addresses as text, in the form of a client's bootstrap option.
    pub(crate) fn bootstrap(&self) -> String {
        self.addresses().iter().map(SocketAddr::to_string).collect::<Vec<_>>().join(",")
    }

    pub(crate) fn cli(&self) -> Cli {
        Cli::of(&self.addresses(), self.folder.path())
    }

    /// Returns a command line with only these brokers as bootstrap brokers.
    pub(crate) fn cli_by(&self, brokers: impl IntoIterator<Item = u32>) -> Cli {
        let addresses: Vec<SocketAddr> = brokers.into_iter().map(|id| self.homes[&id].grpc()).collect();
        Cli::of(&addresses, self.folder.path())
    }

    /// Kills a broker with SIGKILL.
    pub(crate) fn kill(&mut self, id: u32) {
        self.brokers.remove(&id).expect("it runs").kill9();
    }

    /// Returns the process of a running broker.
    pub(crate) fn broker(&self, id: u32) -> &Broker {
        &self.brokers[&id]
    }

    /// Returns true if a broker is running.
    pub(crate) fn is_running(&mut self, id: u32) -> bool {
        self.brokers.get_mut(&id).is_some_and(Broker::is_running)
    }

    /// Stops a broker as an operator does, and waits for its exit.
    pub(crate) fn stop(&mut self, id: u32) {
        self.broker(id).ask_to_stop();
        self.stopped(id);
    }

    /// Waits for the exit of a broker that is stopping.
    pub(crate) fn stopped(&mut self, id: u32) {
        let status = self.brokers.remove(&id).expect("it ran").wait();
        assert!(status.success(), "broker {id} ended with {status}\n{}", self.homes[&id].log());
    }

    /// Returns the log of a broker.
    pub(crate) fn log(&self, id: u32) -> String {
        self.homes[&id].log()
    }

    /// Starts a stopped broker with the data on its disk, without waiting for it.
    pub(crate) fn begin(&mut self, id: u32) {
        self.brokers.insert(id, self.homes[&id].spawn());
    }

    /// Starts a stopped broker with the data on its disk, and waits until it is ready.
    pub(crate) fn restart(&mut self, id: u32) {
        self.begin(id);
        self.ready();
    }

    /// Starts a stopped broker with other settings, and waits until it is ready.
    pub(crate) fn restart_with(&mut self, id: u32, settings: impl FnOnce(Home) -> Home) {
        let home = self.homes.remove(&id).expect("it was there");
        self.homes.insert(id, settings(home));
        self.restart(id);
    }

    /// Deletes the data directory of a stopped broker.
    pub(crate) fn wipe(&self, id: u32) {
        std::fs::remove_dir_all(self.homes[&id].data_dir()).expect("it was there");
    }

    /// Returns the partitions of a topic as `topic describe` reports them.
    pub(crate) fn partitions(&self, topic: &str) -> Vec<Value> {
        let described = self.cli().ok(&["topic", "describe", topic, "--output", "json"]).json();
        described["partitions"].as_array().expect("partitions").clone()
    }

    /// Waits until each partition of a topic has a leader and this number of replicas in sync.
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

    /// Returns the logs of all brokers and of etcd.
    pub(crate) fn logs(&self) -> String {
        let of_brokers = self.homes.iter().map(|(id, home)| format!("--- broker {id}\n{}", home.log()));
        of_brokers.chain([format!("--- etcd\n{}", self.etcd.logs())]).collect()
    }

    /// Waits until a partition has a leader. Returns the leader.
    pub(crate) fn leader(&self, topic: &str, partition: usize) -> u32 {
        let leader = eventually("the partition has a leader", || self.partitions(topic)[partition]["leader"].as_u64());
        u32::try_from(leader).expect("a broker's number")
    }
}
