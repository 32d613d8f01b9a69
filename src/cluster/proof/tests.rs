//! Startup verification for both durabilities, and the removal of unverified replicas.

use super::*;
use crate::{
    cluster::{
        changes,
        embedded::EmbeddedStore,
        faulty::{Fault, Faulty},
        store::Transaction,
    },
    model::{LeaderEpoch, TopicName},
};

const ME: BrokerId = BrokerId(1);
const PERSISTED: u8 = 1;
const REPLICATED: u8 = 2;
/// A topic that the store does not have, or no longer has.
const UNKNOWN: u8 = 3;

struct World {
    link: Faulty,
    store: Arc<dyn MetaStore>,
    keys: Keys,
}

fn id(topic: u8, number: u32) -> PartitionId {
    PartitionId::new(TopicId::from_bytes([topic; 16]), number)
}

fn value(leader: Option<u32>, isr: &[u32], elr: &[u32]) -> PartitionValue {
    let brokers = |ids: &[u32]| ids.iter().copied().map(BrokerId).collect();
    let whole = PartitionValue::new(brokers(&[1, 2, 3]), LeaderEpoch(5));
    PartitionValue { leader: leader.map(BrokerId), isr: brokers(isr), elr: brokers(elr), ..whole }
}

/// Returns an inventory with everything intact.
fn shown() -> Shown {
    let whole: BTreeSet<_> =
        [PERSISTED, REPLICATED, UNKNOWN].iter().flat_map(|topic| (0..4).map(|n| id(*topic, n))).collect();
    let uptimes = vec!["p0".to_owned(), "p1".to_owned()];
    Shown { directory_id: "d".to_owned(), uptimes, clean: true, on_disk: whole.clone(), whole }
}

impl World {
    async fn new() -> Self {
        let (link, keys) = (Faulty::new(EmbeddedStore::in_memory()), Keys::new("test").unwrap());
        let world = Self { store: Arc::new(link.clone()), link, keys };
        for (topic, durability) in [(PERSISTED, "persisted"), (REPLICATED, "replicated")] {
            let config = [("durability".to_owned(), durability.to_owned())].into();
            let id = TopicId::from_bytes([topic; 16]);
            let value = TopicValue { id, partitions: 4, replication_factor: 3, config };
            let name = TopicName::new(durability).unwrap();
            world.put(world.keys.topic(&name), value.encode()).await;
        }
        world.record("d", "p1").await;
        world
    }

    async fn put(&self, key: String, value: bytes::Bytes) {
        self.store.transact(Transaction::new().put(key, value)).await.unwrap();
    }

    async fn record(&self, directory: &str, incarnation: &str) {
        let value = DirectoryValue { directory_id: directory.to_owned(), incarnation: incarnation.to_owned() };
        self.put(self.keys.directory(ME), value.encode()).await;
    }

    /// Writes a partition whose value has changed since its creation.
    async fn partition(&self, id: PartitionId, value: &PartitionValue) {
        for _ in 0..2 {
            self.put(self.keys.partition(id), value.encode()).await;
        }
    }

    async fn prove(&self, shown: &Shown) -> Result<Proof, StoreError> {
        prove(&self.store, &self.keys, ME, shown, &ConfigMap::new()).await
    }

    async fn now(&self, id: PartitionId) -> PartitionValue {
        let changes = PartitionChanges::new(Arc::clone(&self.store), self.keys.clone());
        changes.read_back(id).await.unwrap().unwrap().0
    }
}

#[tokio::test]
async fn verified_replicas_stay_and_others_are_removed() {
    let all = |shown: Shown| shown;
    let unclean = |shown: Shown| Shown { clean: false, ..shown };
    let other = |shown: Shown| Shown { directory_id: "another".to_owned(), ..shown };
    let older = |shown: Shown| Shown { uptimes: vec!["p0".to_owned()], ..shown };
    let damaged = |shown: Shown| Shown { whole: BTreeSet::new(), ..shown };
    // The inventory, and the result for persisted, replicated and unknown topics.
    type Change = fn(Shown) -> Shown;
    let cases: [(&str, Change, [bool; 3]); 5] = [
        ("all", all, [true, true, true]),
        ("not closed cleanly", unclean, [true, false, false]),
        ("another directory", other, [false, false, false]),
        ("an older copy", older, [false, false, false]),
        ("lost replicas", damaged, [false, false, false]),
    ];
    for (what, change, holds) in cases {
        for (topic, holds) in [PERSISTED, REPLICATED, UNKNOWN].into_iter().zip(holds) {
            let world = World::new().await;
            let before = [value(Some(2), &[1, 2, 3], &[]), value(Some(2), &[2], &[1, 3]), value(None, &[3], &[])];
            for (number, value) in (0..).zip(&before) {
                world.partition(id(topic, number), value).await;
            }
            world.prove(&change(shown())).await.unwrap();
            for (number, value) in (0..).zip(&before) {
                let expected = if holds { value.clone() } else { value.strike(ME) };
                assert_eq!(world.now(id(topic, number)).await, expected, "{what}, topic {topic}, partition {number}");
            }
        }
    }
}

#[tokio::test]
async fn leadership_of_earlier_incarnation_is_resigned() {
    let world = World::new().await;
    world.partition(id(PERSISTED, 0), &value(Some(1), &[1, 2], &[])).await;
    let proof = world.prove(&shown()).await.unwrap();
    let now = world.now(id(PERSISTED, 0)).await;
    assert_eq!((now.leader, now.leader_epoch, now.isr.len()), (None, LeaderEpoch(6), 2));
    assert_eq!(proof.changed, 1);
    assert_eq!(world.prove(&shown()).await.unwrap().changed, 0, "once is enough");
}

#[tokio::test]
async fn last_holder_of_replicated_topic_stays_as_unclean() {
    let world = World::new().await;
    let unclean = Shown { clean: false, ..shown() };
    world.partition(id(REPLICATED, 0), &value(Some(1), &[1], &[])).await;
    world.partition(id(REPLICATED, 1), &value(Some(1), &[1], &[2])).await;
    world.prove(&unclean).await.unwrap();
    let last = world.now(id(REPLICATED, 0)).await;
    assert_eq!((last.leader, last.isr, last.unclean), (None, vec![ME], Some(LeaderEpoch(6))));
    let not_last = world.now(id(REPLICATED, 1)).await;
    assert_eq!((not_last.isr, not_last.elr, not_last.unclean), (vec![], vec![BrokerId(2)], None));
}

#[tokio::test]
async fn partition_created_meanwhile_needs_no_replica() {
    let world = World::new().await;
    let made = value(Some(2), &[1, 2, 3], &[]);
    world.put(world.keys.partition(id(PERSISTED, 0)), made.encode()).await;
    let empty = Shown { on_disk: BTreeSet::new(), whole: BTreeSet::new(), ..shown() };
    world.prove(&empty).await.unwrap();
    assert_eq!(world.now(id(PERSISTED, 0)).await, made);
    // Another directory verifies nothing: this broker may have held, and lost, the records that the other brokers have.
    world.prove(&Shown { directory_id: "another".to_owned(), ..empty }).await.unwrap();
    assert_eq!(world.now(id(PERSISTED, 0)).await, made.strike(ME));
}

/// Regression: the value of a partition without incidents may stay unchanged for years. After a power failure of all
/// replicas, a corrupt copy was taken for one that held nothing yet: in sync, and elected.
#[tokio::test]
async fn corrupt_replica_of_unchanged_partition_is_removed() {
    let world = World::new().await;
    let made = value(Some(2), &[1, 2, 3], &[]);
    world.put(world.keys.partition(id(PERSISTED, 0)), made.encode()).await;
    let mut damaged = shown();
    damaged.whole.remove(&id(PERSISTED, 0));
    world.prove(&damaged).await.unwrap();
    assert_eq!(world.now(id(PERSISTED, 0)).await, made.strike(ME));
}

/// The value was restored after the start of the broker. The broker led in an epoch from before that start, and was a
/// member of unverified sets.
#[tokio::test]
async fn unreadable_value_is_verified_when_readable() {
    let before = value(Some(1), &[1, 2], &[]);
    let (free, struck) = (before.leaderless(), before.strike(ME));
    let shown_all = shown();
    let other = Shown { directory_id: "another".to_owned(), ..shown() };
    for (shown, is_whole, after) in [(&shown_all, true, &free), (&shown_all, false, &struck), (&other, true, &struck)] {
        let world = World::new().await;
        let spoiled = id(PERSISTED, 1);
        world.partition(id(PERSISTED, 0), &before).await;
        world.put(world.keys.partition(spoiled), "{\"replicas\":[".into()).await;
        let proof = world.prove(shown).await.unwrap();
        assert_eq!((proof.changed, proof.unread.partitions()), (1, &BTreeSet::from([spoiled])));
        // The broker is registered: its directory record contains this incarnation now, whatever the inventory was.
        world.record(&shown.directory_id, "p1").await;
        let late = async |shown| {
            let unread = &proof.unread;
            unread.prove(&world.store, &world.keys, ME, (spoiled, shown), &ConfigMap::new()).await
        };
        assert_eq!(late(is_whole).await, Ok(None), "it still cannot be read");
        world.partition(spoiled, &before).await;
        world.link.transactions([Some(Fault::Refused)]);
        assert!(late(is_whole).await.unwrap_err().retryable());
        world.link.transactions([Some(Fault::AnswerLost)]);
        let revision = late(is_whole).await.unwrap().unwrap();
        assert_eq!(world.now(spoiled).await, *after);
        assert_eq!(late(is_whole).await, Ok(Some(revision)), "once is enough");
    }
}

#[tokio::test]
async fn verification_repeats_until_no_change_is_needed() {
    for faults in [vec![Some(Fault::Lost)], vec![Some(Fault::AnswerLost)], vec![]] {
        let world = World::new().await;
        for number in 0..4 {
            world.partition(id(PERSISTED, number), &value(Some(1), &[1, 2], &[])).await;
        }
        world.link.transactions(faults);
        world.prove(&shown()).await.unwrap();
        for number in 0..4 {
            let now = world.now(id(PERSISTED, number)).await;
            assert_eq!((now.leader, now.leader_epoch), (None, LeaderEpoch(6)), "once each");
        }
    }
    let world = World::new().await;
    world.partition(id(PERSISTED, 0), &value(Some(1), &[1, 2], &[])).await;
    world.link.transactions([Some(Fault::Refused)]);
    assert!(world.prove(&shown()).await.unwrap_err().retryable());
    world.link.fail_lists(1);
    assert!(world.prove(&shown()).await.is_err());
    world.prove(&shown()).await.unwrap();
    assert_eq!(world.now(id(PERSISTED, 0)).await.leader, None);
}

#[tokio::test]
async fn verification_returns_revision_of_directory_record() {
    let world = World::new().await;
    let first = world.prove(&shown()).await.unwrap().judged;
    world.record("d", "p2").await;
    let second = world.prove(&shown()).await.unwrap().judged;
    assert!(first.is_some() && second > first);
    let key = world.keys.directory(ME);
    world.store.transact(Transaction::new().delete(key)).await.unwrap();
    assert_eq!(world.prove(&shown()).await.unwrap().judged, None);
    // A value without this broker, and an unreadable value, are not changed.
    let strange = id(PERSISTED, 3);
    world.put(world.keys.partition(strange), "{".into()).await;
    let others = PartitionValue { replicas: vec![BrokerId(2)], ..value(Some(2), &[2], &[]) };
    world.partition(id(PERSISTED, 2), &others).await;
    assert_eq!(world.prove(&shown()).await.unwrap().changed, 0);
    let change = changes::Change { id: strange, expect: Revision(1), value: others, also: vec![] };
    let changes = PartitionChanges::new(Arc::clone(&world.store), world.keys.clone());
    assert_eq!(changes.make(vec![change], &[]).await, [(strange, Changed::Refused(None))]);
}
