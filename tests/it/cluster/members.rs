//! Broker processes of one cluster, with an etcd of their own and one object store.

use std::{collections::BTreeMap, net::SocketAddr, path::Path};

use serde_json::Value;

use crate::{
    broker::{Broker, BrokerInstance, Cli, http_get},
    etcd::Etcd,
    test_timeout::{TEST_TIMEOUT, eventually, poll},
};

/// Starts an etcd with this number of members, and waits until it has a leader.
pub(crate) fn etcd(members: usize) -> Etcd {
    let etcd = Etcd::begin(members, "http", &[]);
    wait_for_leader(&etcd);
    etcd
}

/// Waits until every member reports a leader.
pub(crate) fn wait_for_leader(etcd: &Etcd) {
    let healthy = |url: &String| {
        let address: SocketAddr = url.strip_prefix("http://")?.parse().ok()?;
        http_get(address, "/health").ok().filter(|(code, body)| *code == 200 && body.contains("true"))
    };
    eventually("etcd has a leader", || etcd.endpoints().iter().all(|url| healthy(url).is_some()).then_some(()));
}

/// A cluster of broker processes and its etcd. Broker ids start at 1. Dropping the value ends all processes.
pub(crate) struct Cluster {
    /// First field, so that it is dropped first. When a test fails, each dropped broker prints the end of its log,
    /// which is in the folder of its [`BrokerInstance`].
    brokers: BTreeMap<u32, Broker>,
    pub(crate) etcd: Etcd,
    folder: tempfile::TempDir,
    instances: BTreeMap<u32, BrokerInstance>,
}

impl Cluster {
    /// Starts three etcd members and this number of brokers, spread over three racks, and waits until they are ready.
    pub(crate) fn start(brokers: u32) -> Self {
        Self::with(brokers, |instance| instance)
    }

    /// Starts a cluster as [`Cluster::start`] does. `settings` changes the instance of each broker first.
    pub(crate) fn with(brokers: u32, settings: impl Fn(BrokerInstance) -> BrokerInstance) -> Self {
        let mut cluster = Self::with_etcd(Etcd::begin(3, "http", &[]));
        for id in 1..=brokers {
            let instance = cluster.new_instance(id);
            cluster.add(id, settings(instance));
        }
        cluster.wait_until_ready();
        cluster
    }

    /// Creates a cluster without brokers, and waits until etcd has a leader.
    pub(crate) fn with_etcd(etcd: Etcd) -> Self {
        wait_for_leader(&etcd);
        let folder = tempfile::tempdir().expect("a folder for the object store");
        Self { etcd, folder, instances: BTreeMap::new(), brokers: BTreeMap::new() }
    }

    /// Returns the folder that is the object store of all brokers.
    pub(crate) fn object_store_dir(&self) -> &Path {
        self.folder.path()
    }

    /// Returns an instance for a broker with this id and the object store of the cluster. Does not start the broker.
    pub(crate) fn new_instance(&self, id: u32) -> BrokerInstance {
        BrokerInstance::member(id, &self.etcd).object_store_in(self.folder.path())
    }

    /// Adds a broker and starts it. Does not wait until it is ready.
    pub(crate) fn add(&mut self, id: u32, instance: BrokerInstance) {
        self.brokers.insert(id, instance.spawn());
        self.instances.insert(id, instance);
    }

    /// Waits until every running broker is ready.
    pub(crate) fn wait_until_ready(&mut self) {
        for (id, broker) in &mut self.brokers {
            if let Err(reason) = broker.wait_ready() {
                panic!("broker {id} did not become ready: {reason}");
            }
        }
    }

    pub(crate) fn instance(&self, id: u32) -> &BrokerInstance {
        &self.instances[&id]
    }

    /// Returns the gRPC addresses of all brokers.
    pub(crate) fn addresses(&self) -> Vec<SocketAddr> {
        self.instances.values().map(BrokerInstance::grpc).collect()
    }

    /// Returns the gRPC addresses as text, in the form of a client's bootstrap option.
    pub(crate) fn bootstrap(&self) -> String {
        self.addresses().iter().map(SocketAddr::to_string).collect::<Vec<_>>().join(",")
    }

    /// Returns a command line with all brokers as bootstrap brokers.
    pub(crate) fn cli(&self) -> Cli {
        Cli::of(&self.addresses(), self.folder.path())
    }

    /// Returns a command line with only these brokers as bootstrap brokers.
    pub(crate) fn cli_by(&self, brokers: impl IntoIterator<Item = u32>) -> Cli {
        let addresses: Vec<SocketAddr> = brokers.into_iter().map(|id| self.instances[&id].grpc()).collect();
        Cli::of(&addresses, self.folder.path())
    }

    /// Kills a broker with SIGKILL.
    pub(crate) fn kill(&mut self, id: u32) {
        self.brokers.remove(&id).expect("the process is running").kill9();
    }

    /// Returns the process of a running broker.
    pub(crate) fn broker(&self, id: u32) -> &Broker {
        &self.brokers[&id]
    }

    /// Returns true if a broker is running.
    pub(crate) fn is_running(&mut self, id: u32) -> bool {
        self.brokers.get_mut(&id).is_some_and(Broker::is_running)
    }

    /// Stops a broker in a controlled shutdown, and waits for its successful exit.
    pub(crate) fn stop(&mut self, id: u32) {
        self.broker(id).request_stop();
        self.wait_stopped(id);
    }

    /// Waits for the exit of a broker that is stopping. The exit must be successful.
    pub(crate) fn wait_stopped(&mut self, id: u32) {
        let status = self.brokers.remove(&id).expect("the broker was running").wait_for_exit();
        assert!(status.success(), "broker {id} ended with {status}\n{}", self.instances[&id].log());
    }

    /// Returns the log of a broker.
    pub(crate) fn log(&self, id: u32) -> String {
        self.instances[&id].log()
    }

    /// Starts a stopped broker with the data on its disk. Does not wait until it is ready.
    pub(crate) fn begin(&mut self, id: u32) {
        self.brokers.insert(id, self.instances[&id].spawn());
    }

    /// Starts a stopped broker with the data on its disk, and waits until it is ready.
    pub(crate) fn restart(&mut self, id: u32) {
        self.begin(id);
        self.wait_until_ready();
    }

    /// Starts a stopped broker with changed settings, and waits until it is ready.
    pub(crate) fn restart_with(&mut self, id: u32, settings: impl FnOnce(BrokerInstance) -> BrokerInstance) {
        let instance = self.instances.remove(&id).expect("the broker exists");
        self.instances.insert(id, settings(instance));
        self.restart(id);
    }

    /// Deletes the data directory of a stopped broker.
    pub(crate) fn wipe(&self, id: u32) {
        std::fs::remove_dir_all(self.instances[&id].data_dir()).expect("the broker exists");
    }

    /// Returns the partitions of a topic as `topic describe` reports them.
    pub(crate) fn partitions(&self, topic: &str) -> Vec<Value> {
        let described = self.cli().ok(&["topic", "describe", topic, "--output", "json"]).json();
        described["partitions"].as_array().expect("partitions").clone()
    }

    /// Waits until each partition of a topic has a leader and this number of replicas in sync.
    pub(crate) fn wait_until_in_sync(&self, topic: &str, replicas: usize) {
        let mut last = Vec::new();
        let is_in_sync =
            |one: &Value| one["leader"].is_u64() && one["isr"].as_array().is_some_and(|isr| isr.len() == replicas);
        let reached = poll(TEST_TIMEOUT, || {
            last = self.partitions(topic);
            last.iter().all(is_in_sync).then_some(())
        });
        assert!(reached.is_some(), "{replicas} replicas in sync: {last:#?}\n{}", self.logs());
    }

    /// Returns the logs of all brokers and of etcd.
    pub(crate) fn logs(&self) -> String {
        let of_brokers = self.instances.iter().map(|(id, instance)| format!("--- broker {id}\n{}", instance.log()));
        of_brokers.chain([format!("--- etcd\n{}", self.etcd.logs())]).collect()
    }

    /// Waits until a partition has a leader. Returns the leader.
    pub(crate) fn leader(&self, topic: &str, partition: usize) -> u32 {
        let leader = eventually("the partition has a leader", || self.partitions(topic)[partition]["leader"].as_u64());
        u32::try_from(leader).expect("the broker id is below 2^32")
    }
}
