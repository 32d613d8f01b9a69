//! Changes of many partitions over the in-memory store, with concurrent writers and injected faults.

use std::collections::BTreeMap;

use super::*;
use crate::{
    cluster::{
        embedded::EmbeddedStore,
        faulty::{Fault, Faulty},
    },
    model::{BrokerId, LeaderEpoch, TopicId},
};

const CONTROLLER: &str = "/strandline/test/controller";

struct World {
    store: EmbeddedStore,
    link: Faulty,
    changes: PartitionChanges,
    seen: BTreeMap<PartitionId, Revision>,
}

fn id(number: u32) -> PartitionId {
    PartitionId::new(TopicId::from_bytes([7; 16]), number)
}

fn value(epoch: u32) -> PartitionValue {
    PartitionValue::new(vec![BrokerId(1)], LeaderEpoch(epoch))
}

impl World {
    async fn of(partitions: u32) -> Self {
        let (store, keys) = (EmbeddedStore::in_memory(), Keys::new("test").unwrap());
        let mut seen = BTreeMap::new();
        for number in 0..partitions {
            let put = Transaction::new().put(keys.partition(id(number)), value(1).encode());
            let Outcome::Done { revision } = store.transact(put).await.unwrap() else { panic!("no condition") };
            seen.insert(id(number), revision);
        }
        let link = Faulty::new(store.clone());
        let changes = PartitionChanges::new(Arc::new(link.clone()), keys);
        Self { store, link, changes, seen }
    }

    /// Changes all partitions to an epoch.
    async fn make(&self, epoch: u32, when: &[Compare]) -> BTreeMap<PartitionId, Changed> {
        let change = |(id, expect): (&PartitionId, &Revision)| Change {
            id: *id,
            expect: *expect,
            value: value(epoch),
            also: Vec::new(),
        };
        self.changes.make(self.seen.iter().map(change).collect(), when).await.into_iter().collect()
    }

    async fn epochs(&self) -> Vec<u32> {
        let mut epochs = Vec::new();
        for id in self.seen.keys() {
            let (value, _) = self.changes.read_back(*id).await.unwrap().unwrap();
            epochs.push(value.leader_epoch.0);
        }
        epochs
    }
}

#[tokio::test]
async fn conflict_does_not_block_other_changes() {
    let world = World::of(100).await;
    let rival = world.changes.make(
        [3, 57].map(|n| Change { id: id(n), expect: world.seen[&id(n)], value: value(9), also: vec![] }).into(),
        &[],
    );
    let rival: BTreeMap<_, _> = rival.await.into_iter().collect();
    let made = world.make(2, &[]).await;
    assert_eq!(made.len(), 100);
    for (id, changed) in &made {
        match (rival.get(id), changed) {
            (None, Changed::Done(_)) => {}
            (Some(Changed::Done(at)), Changed::Refused(Some((stands, revision)))) => {
                assert_eq!((stands, revision), (&value(9), at), "with what stands there");
            }
            other => panic!("{id}: {other:?}"),
        }
    }
    let expected: Vec<u32> = (0..100).map(|n| if n == 3 || n == 57 { 9 } else { 2 }).collect();
    assert_eq!(world.epochs().await, expected);
    assert!(world.link.transacted() < 40, "{} transactions", world.link.transacted());
}

#[tokio::test]
async fn missing_partition_or_failed_own_compare_is_a_conflict() {
    let world = World::of(2).await;
    let key = world.changes.keys.partition(id(0));
    world.store.transact(Transaction::new().delete(key)).await.unwrap();
    let broker = Compare::CreateRevision("/strandline/test/brokers/2".to_owned(), Revision(1));
    let changes =
        [0, 1].map(|n| Change { id: id(n), expect: world.seen[&id(n)], value: value(2), also: vec![broker.clone()] });
    let made: BTreeMap<_, _> = world.changes.make(changes.into(), &[]).await.into_iter().collect();
    assert_eq!(made[&id(0)], Changed::Refused(None));
    assert_eq!(made[&id(1)], Changed::Refused(Some((value(1), world.seen[&id(1)]))));
}

#[tokio::test]
async fn failed_shared_compare_bars_all_changes_at_once() {
    let world = World::of(90).await;
    let mine = Compare::CreateRevision(CONTROLLER.to_owned(), Revision(1));
    let made = world.make(2, &[mine]).await;
    assert!(made.values().all(|changed| *changed == Changed::Barred), "{made:?}");
    assert_eq!((world.epochs().await, world.link.transacted()), (vec![1; 90], 3));
}

#[tokio::test]
async fn unknown_outcome_is_not_retried() {
    for (fault, after) in [(Fault::Refused, 1), (Fault::Lost, 1), (Fault::AnswerLost, 2)] {
        let world = World::of(3).await;
        world.link.transactions([Some(fault)]);
        let made = world.make(2, &[]).await;
        let known = |changed: &Changed| match changed {
            Changed::Failed(_) => fault == Fault::Refused,
            Changed::Unknown(_) => fault != Fault::Refused,
            _ => false,
        };
        assert!(made.values().all(known), "{fault:?}: {made:?}");
        assert_eq!((world.epochs().await, world.link.transacted()), (vec![after; 3], 1), "{fault:?}");
    }
}

#[test]
fn groups_stay_within_transaction_limits() {
    let broker = |n| Compare::Exists(format!("b{n}"));
    for (also, when) in [(0, 0), (1, 1), (3, 1), (10, 2)] {
        let change =
            |n| Change { id: id(n), expect: Revision(1), value: value(1), also: (0..also).map(broker).collect() };
        let groups = groups((0..200).map(change).collect(), when);
        assert_eq!(groups.iter().map(Vec::len).sum::<usize>(), 200);
        for group in &groups {
            let compares: usize = when + group.iter().map(|change| 1 + change.also.len()).sum::<usize>();
            assert!(compares <= limits::MAX_TRANSACTION_OPS && group.len() <= limits::MAX_PARTITIONS_PER_TXN);
        }
        assert!(groups.len() <= 20, "{} groups", groups.len());
    }
}
