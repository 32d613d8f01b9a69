//! Startup verification for both durabilities, and the removal of unverified replicas.

use super::*;
use crate::{
    cluster::{
        embedded::EmbeddedStore,
        faulty::{Fault, FaultyStore},
        partition_updates,
        store::Transaction,
    },
    model::{LeaderEpoch, TopicName},
};

const ME: BrokerId = BrokerId(1);
const PERSISTED: u8 = 1;
const REPLICATED: u8 = 2;
/// Id of a topic that the store does not contain, so its durability is unknown.
const UNKNOWN: u8 = 3;

/// A store with a topic of each durability and the directory record of broker [`ME`].
struct TestCluster {
    link: FaultyStore,
    store: Arc<dyn MetaStore>,
    keys: Keys,
}

fn id(topic: u8, number: u32) -> PartitionId {
    PartitionId::new(TopicId::from_bytes([topic; 16]), number)
}

fn value(leader: Option<u32>, isr: &[u32], elr: &[u32]) -> PartitionValue {
    let brokers = |ids: &[u32]| ids.iter().copied().map(BrokerId).collect();
    let base = PartitionValue::new(brokers(&[1, 2, 3]), LeaderEpoch(5));
    PartitionValue { leader: leader.map(BrokerId), isr: brokers(isr), elr: brokers(elr), ..base }
}

/// Returns an inventory with everything intact.
fn inventory() -> LocalInventory {
    let intact: BTreeSet<_> =
        [PERSISTED, REPLICATED, UNKNOWN].iter().flat_map(|topic| (0..4).map(|n| id(*topic, n))).collect();
    let incarnations = vec!["p0".to_owned(), "p1".to_owned()];
    LocalInventory { directory_id: "d".to_owned(), incarnations, clean: true, on_disk: intact.clone(), intact }
}

impl TestCluster {
    async fn new() -> Self {
        let (link, keys) = (FaultyStore::new(EmbeddedStore::in_memory()), Keys::new("test").unwrap());
        let cluster = Self { store: Arc::new(link.clone()), link, keys };
        for (topic, durability) in [(PERSISTED, "persisted"), (REPLICATED, "replicated")] {
            let config = [("durability".to_owned(), durability.to_owned())].into();
            let id = TopicId::from_bytes([topic; 16]);
            let value = TopicValue { id, partitions: 4, replication_factor: 3, config };
            let name = TopicName::new(durability).unwrap();
            cluster.put(cluster.keys.topic(&name), value.encode()).await;
        }
        cluster.record("d", "p1").await;
        cluster
    }

    async fn put(&self, key: String, value: bytes::Bytes) {
        self.store.transact(Transaction::new().put(key, value)).await.unwrap();
    }

    async fn record(&self, directory: &str, incarnation: &str) {
        let value = DirectoryValue { directory_id: directory.to_owned(), incarnation: incarnation.to_owned() };
        self.put(self.keys.directory(ME), value.encode()).await;
    }

    /// Writes a partition value twice, so that it has changed since its creation.
    async fn partition(&self, id: PartitionId, value: &PartitionValue) {
        for _ in 0..2 {
            self.put(self.keys.partition(id), value.encode()).await;
        }
    }

    async fn verify(&self, inventory: &LocalInventory) -> Result<VerificationResult, MetaStoreError> {
        verify_inventory(&self.store, &self.keys, ME, inventory, &ConfigMap::new()).await
    }

    async fn now(&self, id: PartitionId) -> PartitionValue {
        let updater = PartitionUpdater::new(Arc::clone(&self.store), self.keys.clone());
        updater.read_back(id).await.unwrap().unwrap().0
    }
}

#[tokio::test]
async fn verified_replicas_stay_and_others_are_removed() {
    let unchanged = |inventory: LocalInventory| inventory;
    let unclean = |inventory: LocalInventory| LocalInventory { clean: false, ..inventory };
    let other = |inventory: LocalInventory| LocalInventory { directory_id: "another".to_owned(), ..inventory };
    let older = |inventory: LocalInventory| LocalInventory { incarnations: vec!["p0".to_owned()], ..inventory };
    let corrupt = |inventory: LocalInventory| LocalInventory { intact: BTreeSet::new(), ..inventory };
    // For each inventory: true if the replicas of the persisted, the replicated and the unknown topic stay in ISR and
    // ELR.
    type AlterInventory = fn(LocalInventory) -> LocalInventory;
    let cases: [(&str, AlterInventory, [bool; 3]); 5] = [
        ("everything intact", unchanged, [true, true, true]),
        ("not closed cleanly", unclean, [true, false, false]),
        ("another directory", other, [false, false, false]),
        ("an older copy", older, [false, false, false]),
        ("lost replicas", corrupt, [false, false, false]),
    ];
    for (case, change, stays) in cases {
        for (topic, stays) in [PERSISTED, REPLICATED, UNKNOWN].into_iter().zip(stays) {
            let cluster = TestCluster::new().await;
            let before = [value(Some(2), &[1, 2, 3], &[]), value(Some(2), &[2], &[1, 3]), value(None, &[3], &[])];
            for (number, value) in (0..).zip(&before) {
                cluster.partition(id(topic, number), value).await;
            }
            cluster.verify(&change(inventory())).await.unwrap();
            for (number, value) in (0..).zip(&before) {
                let expected = if stays { value.clone() } else { value.remove_from_sets(ME) };
                assert_eq!(cluster.now(id(topic, number)).await, expected, "{case}, topic {topic}, partition {number}");
            }
        }
    }
}

#[tokio::test]
async fn leadership_of_earlier_incarnation_is_resigned() {
    let cluster = TestCluster::new().await;
    cluster.partition(id(PERSISTED, 0), &value(Some(1), &[1, 2], &[])).await;
    let result = cluster.verify(&inventory()).await.unwrap();
    let now = cluster.now(id(PERSISTED, 0)).await;
    assert_eq!((now.leader, now.leader_epoch, now.isr.len()), (None, LeaderEpoch(6), 2));
    assert_eq!(result.changed, 1);
    assert_eq!(cluster.verify(&inventory()).await.unwrap().changed, 0, "a second verification changes nothing");
}

#[tokio::test]
async fn last_holder_of_replicated_topic_stays_as_unclean() {
    let cluster = TestCluster::new().await;
    let unclean = LocalInventory { clean: false, ..inventory() };
    cluster.partition(id(REPLICATED, 0), &value(Some(1), &[1], &[])).await;
    cluster.partition(id(REPLICATED, 1), &value(Some(1), &[1], &[2])).await;
    cluster.verify(&unclean).await.unwrap();
    let last = cluster.now(id(REPLICATED, 0)).await;
    assert_eq!((last.leader, last.isr, last.unclean_epoch), (None, vec![ME], Some(LeaderEpoch(6))));
    let not_last = cluster.now(id(REPLICATED, 1)).await;
    assert_eq!((not_last.isr, not_last.elr, not_last.unclean_epoch), (vec![], vec![BrokerId(2)], None));
}

#[tokio::test]
async fn partition_created_meanwhile_needs_no_replica() {
    let cluster = TestCluster::new().await;
    let created = value(Some(2), &[1, 2, 3], &[]);
    cluster.put(cluster.keys.partition(id(PERSISTED, 0)), created.encode()).await;
    let empty = LocalInventory { on_disk: BTreeSet::new(), intact: BTreeSet::new(), ..inventory() };
    cluster.verify(&empty).await.unwrap();
    assert_eq!(cluster.now(id(PERSISTED, 0)).await, created);
    // With another directory, the replica is unverified: this broker may have held, and lost, the records that the
    // other brokers have.
    cluster.verify(&LocalInventory { directory_id: "another".to_owned(), ..empty }).await.unwrap();
    assert_eq!(cluster.now(id(PERSISTED, 0)).await, created.remove_from_sets(ME));
}

/// A corrupt replica is removed from the ISR, although the partition's value was never changed. Regression: the replica
/// counted as new, and was elected after a power failure of all replicas.
#[tokio::test]
async fn corrupt_replica_of_unchanged_partition_is_removed() {
    let cluster = TestCluster::new().await;
    let created = value(Some(2), &[1, 2, 3], &[]);
    cluster.put(cluster.keys.partition(id(PERSISTED, 0)), created.encode()).await;
    let mut corrupt = inventory();
    corrupt.intact.remove(&id(PERSISTED, 0));
    cluster.verify(&corrupt).await.unwrap();
    assert_eq!(cluster.now(id(PERSISTED, 0)).await, created.remove_from_sets(ME));
}

#[tokio::test]
async fn unreadable_value_is_reported_as_unverified() {
    let cluster = TestCluster::new().await;
    let corrupt_id = id(PERSISTED, 1);
    cluster.partition(id(PERSISTED, 0), &value(Some(1), &[1, 2], &[])).await;
    cluster.put(cluster.keys.partition(corrupt_id), "{\"replicas\":[".into()).await;
    let result = cluster.verify(&inventory()).await.unwrap();
    let written = cluster.store.get(&cluster.keys.partition(corrupt_id)).await.unwrap().entry.unwrap().mod_revision;
    assert_eq!((result.changed, result.unverified), (1, BTreeMap::from([(corrupt_id, written)])));
}

#[tokio::test]
async fn verification_repeats_until_no_change_is_needed() {
    for faults in [vec![Some(Fault::Lost)], vec![Some(Fault::ResponseLost)], vec![]] {
        let cluster = TestCluster::new().await;
        for number in 0..4 {
            cluster.partition(id(PERSISTED, number), &value(Some(1), &[1, 2], &[])).await;
        }
        cluster.link.fail_transactions(faults);
        cluster.verify(&inventory()).await.unwrap();
        for number in 0..4 {
            let now = cluster.now(id(PERSISTED, number)).await;
            assert_eq!((now.leader, now.leader_epoch), (None, LeaderEpoch(6)), "each change is applied once");
        }
    }
    let cluster = TestCluster::new().await;
    cluster.partition(id(PERSISTED, 0), &value(Some(1), &[1, 2], &[])).await;
    cluster.link.fail_transactions([Some(Fault::Refused)]);
    assert!(cluster.verify(&inventory()).await.unwrap_err().retryable());
    cluster.link.fail_lists(1);
    assert!(cluster.verify(&inventory()).await.is_err());
    cluster.verify(&inventory()).await.unwrap();
    assert_eq!(cluster.now(id(PERSISTED, 0)).await.leader, None);
}

#[tokio::test]
async fn verification_returns_revision_of_directory_record() {
    let cluster = TestCluster::new().await;
    let first = cluster.verify(&inventory()).await.unwrap().directory_revision;
    cluster.record("d", "p2").await;
    let second = cluster.verify(&inventory()).await.unwrap().directory_revision;
    assert!(first.is_some() && second > first);
    let key = cluster.keys.directory(ME);
    cluster.store.transact(Transaction::new().delete(key)).await.unwrap();
    assert_eq!(cluster.verify(&inventory()).await.unwrap().directory_revision, None);
    // Neither a value without this broker nor an unreadable value is changed.
    let unreadable = id(PERSISTED, 3);
    cluster.put(cluster.keys.partition(unreadable), "{".into()).await;
    let others = PartitionValue { replicas: vec![BrokerId(2)], ..value(Some(2), &[2], &[]) };
    cluster.partition(id(PERSISTED, 2), &others).await;
    assert_eq!(cluster.verify(&inventory()).await.unwrap().changed, 0);
    let change = partition_updates::PartitionUpdate {
        id: unreadable,
        expected_revision: Revision(1),
        value: others,
        guards: vec![],
    };
    let updater = PartitionUpdater::new(Arc::clone(&cluster.store), cluster.keys.clone());
    assert_eq!(updater.apply(vec![change], &[]).await, [(unreadable, UpdateOutcome::Conflict(None))]);
}
