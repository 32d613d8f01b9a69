//! Fake brokers that speak the peer protocol with real ones. Brokers refuse invalid messages of an unauthenticated or
//! faulty peer with an error. Such messages change nothing, and the real brokers continue. In `follows` a fake broker
//! calls a real one, in `leads` a real broker calls a fake one. This file holds their common parts, and the corruption
//! of bytes between two real brokers.

mod follows;
mod leads;

use std::{net::SocketAddr, time::Duration};

use strandline::{
    cluster::{
        BrokerState, BrokerValue, Compare, Endpoints, EtcdOptions, EtcdStore, Keys, MetaStore as _, PartitionValue,
        TopicValue, Transaction, TxnOutcome, Value as _,
    },
    model::{BrokerId, LeaderEpoch, PartitionId, TopicName},
    proto::v1::{self, peer_client::PeerClient},
};
use tonic::{Code, transport::Channel};

use super::members::{Cluster, etcd};
use crate::{
    broker::{BrokerInstance, Cli},
    etcd::Etcd,
    proxy::{FILLER, Proxy},
    test_timeout::eventually,
};

/// Id of the fake broker.
const FAKE_BROKER: u32 = 9;

/// Direct access of the tests to the cluster's metadata.
struct Meta {
    store: EtcdStore,
    keys: Keys,
}

impl Meta {
    async fn of(etcd: &Etcd) -> Self {
        let store = EtcdStore::open(EtcdOptions::new(etcd.endpoints())).await.expect("the options are valid");
        Self { store, keys: Keys::new("it").expect("a name") }
    }

    /// Registers the fake broker with this address. Returns its broker epoch.
    async fn register(&self, address: SocketAddr) -> u64 {
        self.register_at(Endpoints::new(address.to_string()).with_peer(address.to_string())).await
    }

    async fn register_at(&self, listeners: Endpoints) -> u64 {
        let value = BrokerValue {
            listeners,
            rack: None,
            directory_id: "another process's".to_owned(),
            incarnation: "another process's".to_owned(),
            state: BrokerState::Running,
            disk_pressure: false,
            disk_full: false,
            max_replicas: None,
            version: "0".to_owned(),
        };
        let put = Transaction::new().put(self.keys.broker(BrokerId(FAKE_BROKER)), value.encode());
        match self.store.transact(put).await.expect("etcd responds") {
            TxnOutcome::Committed { revision } => revision.0,
            TxnOutcome::CompareFailed { .. } => panic!("the transaction has no compares"),
        }
    }

    async fn unregister(&self) {
        let delete = Transaction::new().delete(self.keys.broker(BrokerId(FAKE_BROKER)));
        self.store.transact(delete).await.expect("etcd responds");
    }

    async fn first_partition(&self, topic: &str) -> PartitionId {
        let key = self.keys.topic(&TopicName::new(topic).expect("a name"));
        let entry = self.store.get(&key).await.expect("etcd responds").entry.expect("the topic exists");
        PartitionId::new(TopicValue::decode(&entry.key, &entry.value).expect("a topic").id, 0)
    }

    async fn value(&self, id: PartitionId) -> PartitionValue {
        let entry =
            self.store.get(&self.keys.partition(id)).await.expect("etcd responds").entry.expect("the entry exists");
        PartitionValue::decode(&entry.key, &entry.value).expect("a value")
    }

    /// Makes the fake broker the leader of a topic's first partition, in a new epoch. The fake broker becomes an
    /// additional replica; the other ISR members stay in the ISR. Returns the new epoch.
    async fn take_leadership(&self, topic: &str) -> LeaderEpoch {
        let id = self.first_partition(topic).await;
        let topic = self.keys.topic(&TopicName::new(topic).expect("a name"));
        loop {
            let entry = self.store.get(&topic).await.expect("etcd responds").entry.expect("the topic exists");
            // The replication factor grows with the replica list. Otherwise the controller would remove a replica.
            let mut larger = TopicValue::decode(&entry.key, &entry.value).expect("a topic");
            larger.replication_factor += 1;
            let key = self.keys.partition(id);
            let entry = self.store.get(&key).await.expect("etcd responds").entry.expect("the entry exists");
            let mut value = PartitionValue::decode(&entry.key, &entry.value).expect("a value");
            value.replicas.insert(0, BrokerId(FAKE_BROKER));
            value.isr.insert(0, BrokerId(FAKE_BROKER));
            value.leader = Some(BrokerId(FAKE_BROKER));
            value.leader_epoch = LeaderEpoch(value.leader_epoch.0 + 1);
            let unchanged = Compare::ModRevision(key.clone(), entry.mod_revision);
            let put = Transaction::new().when(unchanged).put(key, value.encode()).put(topic.as_str(), larger.encode());
            if let TxnOutcome::Committed { .. } = self.store.transact(put).await.expect("etcd responds") {
                return value.leader_epoch;
            }
        }
    }
}

async fn peer(address: SocketAddr) -> PeerClient<Channel> {
    PeerClient::connect(format!("http://{address}")).await.expect("the broker listens")
}

async fn broker_epoch(address: SocketAddr) -> u64 {
    let identity = peer(address).await.get_identity(v1::GetIdentityRequest {}).await.expect("the broker responds");
    identity.into_inner().broker_epoch.expect("the broker is registered")
}

/// Appends one record with the command line. Success means that all ISR members acknowledged it.
fn append_record(cli: &Cli, topic: &str) {
    cli.ok_with(&["produce", topic], b"still here\n");
}

/// A broker that waits for its registration serves only its identity, which shows peers that an earlier process at its
/// address has exited. The broker refuses all other requests of peers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unregistered_broker_reports_only_its_identity() {
    let etcd = tokio::task::block_in_place(|| etcd(1));
    // The broker waits up to about this long for its id, which is registered for another directory.
    let instance = BrokerInstance::member(FAKE_BROKER, &etcd).setting("metadata.session_timeout", "\"60s\"");
    let meta = Meta::of(&etcd).await;
    meta.register(instance.peer()).await;
    let mut broker = instance.spawn();
    tokio::task::block_in_place(|| {
        eventually("the broker waits for its id", || {
            instance.log().contains("the broker id is registered with another data directory").then_some(())
        });
    });
    let mut peer = peer(instance.peer()).await;
    let identity = peer.get_identity(v1::GetIdentityRequest {}).await.expect("the broker responds").into_inner();
    assert_eq!((identity.broker_id, identity.broker_epoch), (FAKE_BROKER, None));
    assert_ne!(identity.incarnation, "another process's");
    let replicas = peer
        .describe_replicas(v1::DescribeReplicasRequest { replicas: Vec::new() })
        .await
        .expect_err("the broker is starting");
    let status = peer.get_broker_stats(v1::GetBrokerStatsRequest {}).await.expect_err("the broker is starting");
    let report = peer.report_failure(v1::ReportFailureRequest::default()).await.expect_err("the broker is starting");
    let replicate = peer.replicate(tokio_stream::pending()).await.expect_err("the broker is starting");
    for refused in [replicas, status, report, replicate] {
        assert_eq!((refused.code(), refused.message()), (Code::Unavailable, "this broker is starting: retry"));
    }
    meta.unregister().await;
    tokio::task::block_in_place(|| broker.wait_ready()).expect("the broker id is free");
    let replicas = peer.describe_replicas(v1::DescribeReplicasRequest { replicas: Vec::new() }).await;
    assert_eq!(replicas.expect("the broker responds").into_inner().replicas, []);
    tokio::task::block_in_place(|| assert!(broker.terminate().success(), "{}", instance.log()));
}

/// A proxy corrupts bytes between two real brokers. The follower rejects every corrupt batch, and the leader sends it
/// again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batch_corrupted_between_brokers_is_sent_again() {
    let (mut cluster, mut links) =
        (tokio::task::block_in_place(|| Cluster::with_etcd(Etcd::begin(3, "http", &[]))), vec![]);
    let object_store = tempfile::tempdir().expect("a folder");
    for id in 1..=2 {
        let proxy = Proxy::bind().await;
        let instance = BrokerInstance::member(id, &cluster.etcd)
            .object_store_in(object_store.path())
            .peer_advertise(proxy.address());
        links.push(proxy.forward_to(instance.peer()));
        cluster.add(id, instance);
    }
    let expected = tokio::task::block_in_place(|| {
        cluster.wait_until_ready();
        let create = ["topic", "create", "t", "--replication-factor", "2", "--config", "min.insync.replicas=2"];
        cluster.cli().ok(&create);
        cluster.wait_until_in_sync("t", 2);
        let (leader, follower) = (cluster.leader("t", 0), 3 - cluster.leader("t", 0));
        let filler = String::from_utf8(vec![FILLER; 2000]).expect("text");
        let lines: String = (0..400).map(|line| format!("{line} {filler}\n")).collect();
        links[leader as usize - 1].set_corrupting(true);
        for chunk in lines.lines().collect::<Vec<_>>().chunks(20) {
            let text = chunk.join("\n") + "\n";
            cluster.cli().ok_with(&["produce", "t"], text.as_bytes());
        }
        links[leader as usize - 1].set_corrupting(false);
        let log = cluster.log(follower);
        assert!(log.contains("rejected a message from the leader") && log.contains("are malformed"), "{log}");
        cluster.wait_until_in_sync("t", 2);
        // The leader is killed, so that the records are read from the follower's log.
        cluster.cli().ok(&["topic", "alter", "t", "--config", "min.insync.replicas=1"]);
        cluster.kill(leader);
        lines
    });
    let cli = cluster.cli();
    let read = tokio::task::block_in_place(|| {
        eventually("the follower leads", || {
            let read = cli.run(&["consume", "t", "--from", "earliest", "--until-end"]);
            (read.code == 0).then(|| read.text())
        })
    });
    assert!(read == expected, "{} bytes of {}", read.len(), expected.len());
    for link in &links {
        tokio::time::timeout(Duration::from_secs(5), link.stop()).await.expect("the link stops in time");
    }
}
