//! What is proven by what, for both durabilities, and what is given up without.

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
/// A topic that the store does not know, or not any more.
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

/// Everything that there is to show.
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

    /// A partition whose value has been changed since it was made.
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
async fn what_is_proven_stays_and_the_rest_is_struck() {
    let all = |shown: Shown| shown;
    let unclean = |shown: Shown| Shown { clean: false, ..shown };
    let other = |shown: Shown| Shown { directory_id: "another".to_owned(), ..shown };
    let older = |shown: Shown| Shown { uptimes: vec!["p0".to_owned()], ..shown };
    let damaged = |shown: Shown| Shown { whole: BTreeSet::new(), ..shown };
    // What is shown, and whether it holds on persisted, replicated and unknown topics.
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
async fn no_leadership_of_an_earlier_uptime_is_kept() {
    let world = World::new().await;
    world.partition(id(PERSISTED, 0), &value(Some(1), &[1, 2], &[])).await;
    let proof = world.prove(&shown()).await.unwrap();
    let now = world.now(id(PERSISTED, 0)).await;
    assert_eq!((now.leader, now.leader_epoch, now.isr.len()), (None, LeaderEpoch(6), 2));
    assert_eq!(proof.changed, 1);
    assert_eq!(world.prove(&shown()).await.unwrap().changed, 0, "once is enough");
}

#[tokio::test]
async fn the_last_holder_of_a_replicated_topic_stays_and_that_is_noted() {
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
async fn a_partition_that_was_made_meanwhile_has_nothing_to_lose() {
    let world = World::new().await;
    let made = value(Some(2), &[1, 2, 3], &[]);
    world.put(world.keys.partition(id(PERSISTED, 0)), made.encode()).await;
    let empty = Shown { on_disk: BTreeSet::new(), whole: BTreeSet::new(), ..shown() };
    world.prove(&empty).await.unwrap();
    assert_eq!(world.now(id(PERSISTED, 0)).await, made);
    // Another directory proves nothing of it: this broker may have held, and lost, what the others have since.
    world.prove(&Shown { directory_id: "another".to_owned(), ..empty }).await.unwrap();
    assert_eq!(world.now(id(PERSISTED, 0)).await, made.strike(ME));
}

/// The value of a partition whose replicas never had any trouble stays as it was made for years. When the power fails for all of them at
/// once nobody has changed it, and one whose copy is damaged was taken for one that had nothing to hold yet: in sync, and elected.
#[tokio::test]
async fn a_damaged_replica_proves_nothing_though_its_partition_never_changed() {
    let world = World::new().await;
    let made = value(Some(2), &[1, 2, 3], &[]);
    world.put(world.keys.partition(id(PERSISTED, 0)), made.encode()).await;
    let mut damaged = shown();
    damaged.whole.remove(&id(PERSISTED, 0));
    world.prove(&damaged).await.unwrap();
    assert_eq!(world.now(id(PERSISTED, 0)).await, made.strike(ME));
}

/// The value was put back as it was after the broker had started: with the broker as the leader of an epoch that began before, and in sets
/// of which it had proven nothing.
#[tokio::test]
async fn what_could_not_be_read_at_the_start_is_proven_when_it_can() {
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
        // It is registered: its directory's record names this uptime by now, whatever it showed.
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
async fn it_goes_on_until_the_store_needs_no_more() {
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
async fn the_registration_can_tell_what_the_proof_was_judged_by() {
    let world = World::new().await;
    let first = world.prove(&shown()).await.unwrap().judged;
    world.record("d", "p2").await;
    let second = world.prove(&shown()).await.unwrap().judged;
    assert!(first.is_some() && second > first);
    let key = world.keys.directory(ME);
    world.store.transact(Transaction::new().delete(key)).await.unwrap();
    assert_eq!(world.prove(&shown()).await.unwrap().judged, None);
    // What does not name this broker, and what cannot be read, is none of its business.
    let strange = id(PERSISTED, 3);
    world.put(world.keys.partition(strange), "{".into()).await;
    let others = PartitionValue { replicas: vec![BrokerId(2)], ..value(Some(2), &[2], &[]) };
    world.partition(id(PERSISTED, 2), &others).await;
    assert_eq!(world.prove(&shown()).await.unwrap().changed, 0);
    let change = changes::Change { id: strange, expect: Revision(1), value: others, also: vec![] };
    let changes = PartitionChanges::new(Arc::clone(&world.store), world.keys.clone());
    assert_eq!(changes.make(vec![change], &[]).await, [(strange, Changed::Refused(None))]);
}
