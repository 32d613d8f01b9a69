//! Admission to a cluster, with a store that loses responses.

use std::path::Path;

use bytes::Bytes;

use super::*;
use crate::{
    cluster::{
        BrokerValue, EmbeddedStore, PartitionUpdater, PartitionValue, Transaction,
        faulty::{Fault, FaultyStore},
    },
    log::{DataDirIdentity, LogOptions, SimDisk},
    model::{BrokerId, LeaderEpoch, Offset, TopicName},
};

const ME: BrokerId = BrokerId(1);

fn partition() -> PartitionId {
    PartitionId::new(TopicId::from_bytes([7; 16]), 0)
}

fn log() -> DataDir {
    let options = LogOptions { journal_bytes: 1 << 20, reserve_bytes: 0, step_mode: true, ..LogOptions::default() };
    let identity = DataDirIdentity { cluster: "test".to_owned(), broker: ME };
    DataDir::open(Arc::new(SimDisk::new()), Path::new("/data"), &identity, options).unwrap()
}

/// Runs one start as the server does: creates the incarnation, verifies the inventory and registers the broker.
async fn start(store: &Arc<dyn MetaStore>, keys: &Keys, log: &DataDir, tasks: &Tasks) -> Session {
    let (defaults, stop) = (ConfigMap::new(), Tasks::new());
    let admission = ClusterAdmission { store, keys, log, defaults: &defaults, stop: &stop };
    let pending_start = admission.record_start().await.unwrap();
    let value = BrokerValue {
        directory_id: log.directory_id().to_string(),
        incarnation: pending_start.incarnation.to_string(),
        ..BrokerValue::running_at("here:1".to_owned())
    };
    let session_timeout = Duration::from_secs(2);
    let registration =
        RegistrationRequest { store: Arc::clone(store), keys: keys.clone(), id: ME, value, session_timeout };
    let metadata = MetadataCache::start(Arc::clone(store), keys.clone(), tasks);
    admission.admit(&registration, pending_start, BTreeSet::from([partition()]), &metadata, tasks).await.unwrap().0
}

/// The store of another cluster with the same name rejects a directory that was in a cluster and has replicas.
/// Otherwise the directory would be bootstrapped in that other cluster, and its replicas would become outdated in its
/// own.
#[tokio::test(start_paused = true)]
async fn other_cluster_with_same_name_is_rejected() {
    let (keys, tasks) = (Keys::new("test").unwrap(), Tasks::new());
    let fresh = || -> Arc<dyn MetaStore> { Arc::new(EmbeddedStore::in_memory()) };
    let (own, other, log) = (fresh(), fresh(), log());
    let reach = async |store: &Arc<dyn MetaStore>| {
        let (defaults, stop) = (ConfigMap::new(), Tasks::new());
        let admission = ClusterAdmission { store, keys: &keys, log: &log, defaults: &defaults, stop: &stop };
        admission.reach().await.map_err(|error| error.to_string())
    };
    let topic = |byte| {
        let id = TopicId::from_bytes([byte; 16]);
        TopicValue { id, partitions: 1, replication_factor: 1, config: ConfigMap::new() }
    };
    let put = async |store: &Arc<dyn MetaStore>, path: String, value: Bytes| {
        store.transact(Transaction::new().put(path, value)).await.unwrap();
    };
    let path = keys.topic(&TopicName::new("t").unwrap());
    put(&other, path.clone(), topic(8).encode()).await;
    reach(&other).await.expect("a directory of no cluster fits any cluster");

    start(&own, &keys, &log, &tasks).await.leave().await;
    reach(&other).await.expect("a directory without replicas fits any cluster");
    let _replica = log.open_replica(partition(), Offset::ZERO).unwrap();
    let reason = reach(&other).await.expect_err("another cluster");
    assert!(reason.contains("has neither this data directory nor any of its topics"), "{reason}");
    let reason = reach(&fresh()).await.expect_err("an empty store");
    assert!(reason.contains("has no keys below /strandline/test/"), "{reason}");
    reach(&own).await.expect("the directory belongs to the cluster");

    // The store names another directory for this broker id, as after the restore of an older disk. It is accepted only
    // if it contains a topic of the local replicas, the tombstone of one, or a topic that cannot be read.
    for (path, value) in [
        (path.clone(), topic(7).encode()),
        (keys.tombstone(partition().topic), Bytes::from_static(b"{}")),
        (path, Bytes::from_static(b"invalid")),
    ] {
        let store = fresh();
        let another = DirectoryValue { directory_id: "another".into(), incarnation: "x".into() };
        put(&store, keys.directory(ME), another.encode()).await;
        assert!(reach(&store).await.is_err());
        put(&store, path, value).await;
        reach(&store).await.expect("the store may be that of the directory");
    }
    tasks.stop().await;
}

/// Regression, found by the simulator: the store had registered this incarnation, and the response was lost. The next
/// attempt compared the store with the earlier incarnations only, treated the directory as another one, and gave up
/// every ISR membership. If it was the last in-sync replica, the partition stayed offline forever.
#[tokio::test(start_paused = true)]
async fn lost_registration_response_releases_no_membership() {
    let (link, keys, tasks) = (FaultyStore::new(EmbeddedStore::in_memory()), Keys::new("test").unwrap(), Tasks::new());
    let store: Arc<dyn MetaStore> = Arc::new(link.clone());
    let log = log();
    start(&store, &keys, &log, &tasks).await.leave().await;
    let value = PartitionValue { leader: None, ..PartitionValue::new(vec![ME], LeaderEpoch(3)) };
    let topic = TopicValue { id: partition().topic, partitions: 1, replication_factor: 1, config: ConfigMap::new() };
    let name = TopicName::new("t").unwrap();
    store.transact(Transaction::new().put(keys.topic(&name), topic.encode())).await.unwrap();
    for _ in 0..2 {
        store.transact(Transaction::new().put(keys.partition(partition()), value.encode())).await.unwrap();
    }
    link.fail_transactions([Some(Fault::ResponseLost)]);
    let session = start(&store, &keys, &log, &tasks).await;
    let changes = PartitionUpdater::new(Arc::clone(&store), keys.clone());
    let (now, _) = changes.read_back(partition()).await.unwrap().unwrap();
    assert_eq!(now, value, "the same process, the same disk");
    session.leave().await;
    tasks.stop().await;
}
