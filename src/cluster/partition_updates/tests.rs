//! Changes of many partitions over the in-memory store, with concurrent writers and injected faults.

use std::collections::BTreeMap;

use super::*;
use crate::{
    cluster::{
        embedded::EmbeddedStore,
        faulty::{Fault, FaultyStore},
    },
    model::{BrokerId, LeaderEpoch, TopicId},
};

const CONTROLLER: &str = "/strandline/test/controller";

struct World {
    store: EmbeddedStore,
    /// The store that `updater` uses, with injected faults.
    link: FaultyStore,
    updater: PartitionUpdater,
    /// Revision of each partition at the start.
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
            let TxnOutcome::Committed { revision } = store.transact(put).await.unwrap() else { panic!("no condition") };
            seen.insert(id(number), revision);
        }
        let link = FaultyStore::new(store.clone());
        let updater = PartitionUpdater::new(Arc::new(link.clone()), keys);
        Self { store, link, updater, seen }
    }

    /// Changes all partitions to an epoch, based on their revisions at the start. `when` are the shared compares.
    async fn apply_epoch(&self, epoch: u32, when: &[Compare]) -> BTreeMap<PartitionId, UpdateOutcome> {
        let change = |(id, expect): (&PartitionId, &Revision)| PartitionUpdate {
            id: *id,
            expected_revision: *expect,
            value: value(epoch),
            guards: Vec::new(),
        };
        self.updater.apply(self.seen.iter().map(change).collect(), when).await.into_iter().collect()
    }

    async fn epochs(&self) -> Vec<u32> {
        let mut epochs = Vec::new();
        for id in self.seen.keys() {
            let (value, _) = self.updater.read_back(*id).await.unwrap().unwrap();
            epochs.push(value.leader_epoch.0);
        }
        epochs
    }
}

#[tokio::test]
async fn conflict_does_not_block_other_changes() {
    let world = World::of(100).await;
    let rival = world.updater.apply(
        [3, 57]
            .map(|n| PartitionUpdate {
                id: id(n),
                expected_revision: world.seen[&id(n)],
                value: value(9),
                guards: vec![],
            })
            .into(),
        &[],
    );
    let rival: BTreeMap<_, _> = rival.await.into_iter().collect();
    let outcomes = world.apply_epoch(2, &[]).await;
    assert_eq!(outcomes.len(), 100);
    for (id, changed) in &outcomes {
        match (rival.get(id), changed) {
            (None, UpdateOutcome::Done(_)) => {}
            (Some(UpdateOutcome::Done(at)), UpdateOutcome::Conflict(Some((stored, revision)))) => {
                assert_eq!((stored, revision), (&value(9), at), "the stored value is returned");
            }
            other => panic!("{id}: {other:?}"),
        }
    }
    let expected: Vec<u32> = (0..100).map(|n| if n == 3 || n == 57 { 9 } else { 2 }).collect();
    assert_eq!(world.epochs().await, expected);
    assert!(world.link.transaction_count() < 40, "{} transactions", world.link.transaction_count());
}

#[tokio::test]
async fn missing_partition_or_failed_own_compare_is_a_conflict() {
    let world = World::of(2).await;
    let key = world.updater.keys.partition(id(0));
    world.store.transact(Transaction::new().delete(key)).await.unwrap();
    let broker = Compare::CreateRevision("/strandline/test/brokers/2".to_owned(), Revision(1));
    let changes = [0, 1].map(|n| PartitionUpdate {
        id: id(n),
        expected_revision: world.seen[&id(n)],
        value: value(2),
        guards: vec![broker.clone()],
    });
    let outcomes: BTreeMap<_, _> = world.updater.apply(changes.into(), &[]).await.into_iter().collect();
    assert_eq!(outcomes[&id(0)], UpdateOutcome::Conflict(None));
    assert_eq!(outcomes[&id(1)], UpdateOutcome::Conflict(Some((value(1), world.seen[&id(1)]))));
}

#[tokio::test]
async fn failed_shared_compare_bars_all_changes_at_once() {
    let world = World::of(90).await;
    let guard = Compare::CreateRevision(CONTROLLER.to_owned(), Revision(1));
    let outcomes = world.apply_epoch(2, &[guard]).await;
    assert!(outcomes.values().all(|changed| *changed == UpdateOutcome::GuardFailed), "{outcomes:?}");
    assert_eq!((world.epochs().await, world.link.transaction_count()), (vec![1; 90], 3));
}

#[tokio::test]
async fn unknown_outcome_is_not_retried() {
    for (fault, after) in [(Fault::Refused, 1), (Fault::Lost, 1), (Fault::ResponseLost, 2)] {
        let world = World::of(3).await;
        world.link.fail_transactions([Some(fault)]);
        let outcomes = world.apply_epoch(2, &[]).await;
        let is_expected = |changed: &UpdateOutcome| match changed {
            UpdateOutcome::Failed(_) => fault == Fault::Refused,
            UpdateOutcome::Unknown(_) => fault != Fault::Refused,
            _ => false,
        };
        assert!(outcomes.values().all(is_expected), "{fault:?}: {outcomes:?}");
        assert_eq!((world.epochs().await, world.link.transaction_count()), (vec![after; 3], 1), "{fault:?}");
    }
}

#[test]
fn groups_stay_within_transaction_limits() {
    let broker = |n| Compare::Exists(format!("b{n}"));
    for (guards, shared_compares) in [(0, 0), (1, 1), (3, 1), (10, 2)] {
        let change = |n| PartitionUpdate {
            id: id(n),
            expected_revision: Revision(1),
            value: value(1),
            guards: (0..guards).map(broker).collect(),
        };
        let groups = group_by_transaction((0..200).map(change).collect(), shared_compares);
        assert_eq!(groups.iter().map(Vec::len).sum::<usize>(), 200);
        for group in &groups {
            let compares: usize = shared_compares + group.iter().map(|change| 1 + change.guards.len()).sum::<usize>();
            assert!(compares <= limits::MAX_TRANSACTION_OPS && group.len() <= limits::MAX_PARTITIONS_PER_TXN);
        }
        assert!(groups.len() <= 20, "{} groups", groups.len());
    }
}
