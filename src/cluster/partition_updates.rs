//! Compare-and-set of partition values, for leaders, the controller, starting brokers and operators.
//!
//! Changes that are submitted together share transactions. A conflict does not block other changes: a failed
//! transaction is retried in halves, down to a single change, which returns the stored value. An unknown outcome is
//! never retried here: the caller reads back, and treats both outcomes as possible until then.

use std::{collections::BTreeSet, sync::Arc};

use futures::{StreamExt as _, stream};

use super::{
    keys::{Keys, Value as _},
    partition_value::PartitionValue,
    store::{Compare, KeyValue, MetaStore, MetaStoreError, Revision, Transaction, TxnOutcome},
};
use crate::{limits, model::PartitionId};

/// Maximum number of concurrent transactions.
const MAX_CONCURRENT_TXNS: usize = 8;

/// A new value of a partition, applied only if the stored value is still the expected one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartitionUpdate {
    /// Partition to change.
    pub id: PartitionId,
    /// Revision of the value that the change is based on.
    pub expected_revision: Revision,
    /// New value.
    pub value: PartitionValue,
    /// Compares on other keys that must hold too: the registrations of added brokers.
    pub guards: Vec<Compare>,
}

/// Result of a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UpdateOutcome {
    /// The change was applied at this revision.
    Done(Revision),
    /// A compare did not hold. Contains the stored value if it exists and can be read.
    Conflict(Option<(PartitionValue, Revision)>),
    /// A compare that all changes share did not hold: nothing was applied.
    GuardFailed,
    /// The change was applied, was not applied, or will be applied later: read back.
    Unknown(MetaStoreError),
    /// The change was not applied: the store request failed.
    Failed(MetaStoreError),
}

/// Writes partition values. Cheap to clone.
#[derive(Clone, Debug)]
pub struct PartitionUpdater {
    store: Arc<dyn MetaStore>,
    keys: Keys,
}

impl PartitionUpdater {
    /// Returns a writer of the partitions under `keys` in `store`.
    pub fn new(store: Arc<dyn MetaStore>, keys: Keys) -> Self {
        Self { store, keys }
    }

    /// Applies changes of different partitions, each independently. The compares in `when` must hold for every change:
    /// a controller passes its own key there.
    ///
    /// # Panics
    /// Two changes are of the same partition.
    pub async fn apply(&self, changes: Vec<PartitionUpdate>, when: &[Compare]) -> Vec<(PartitionId, UpdateOutcome)> {
        let distinct: BTreeSet<PartitionId> = changes.iter().map(|change| change.id).collect();
        assert_eq!(distinct.len(), changes.len(), "two changes of one partition");
        let groups = groups(changes, when.len());
        stream::iter(groups)
            .map(|group| self.apply_group(group, when))
            .buffered(MAX_CONCURRENT_TXNS)
            .flat_map(stream::iter)
            .collect()
            .await
    }

    /// Writes a group in one transaction, and in halves if the store rejects it.
    async fn apply_group(&self, group: Vec<PartitionUpdate>, when: &[Compare]) -> Vec<(PartitionId, UpdateOutcome)> {
        let (mut outcomes, mut pending) = (Vec::with_capacity(group.len()), vec![group]);
        while let Some(mut group) = pending.pop() {
            match self.store.transact(self.transaction(&group, when)).await {
                Ok(TxnOutcome::Committed { revision }) => {
                    outcomes.extend(group.into_iter().map(|change| (change.id, UpdateOutcome::Done(revision))));
                }
                Ok(TxnOutcome::CompareFailed { mut found, .. }) => {
                    let stored = found.split_off(when.len()).pop().flatten();
                    if when.iter().zip(&found).any(|(compare, entry)| !compare.holds(entry.as_ref())) {
                        outcomes.extend(group.into_iter().map(|change| (change.id, UpdateOutcome::GuardFailed)));
                        continue;
                    }
                    if let [change] = &*group {
                        let stored = stored.and_then(|entry| self.read(change.id, &entry));
                        outcomes.push((change.id, UpdateOutcome::Conflict(stored)));
                        continue;
                    }
                    let second = group.split_off(group.len() / 2);
                    pending.extend([second, group]);
                }
                Err(error) => {
                    let outcome = if error.outcome_unknown() {
                        UpdateOutcome::Unknown(error)
                    } else {
                        UpdateOutcome::Failed(error)
                    };
                    outcomes.extend(group.into_iter().map(|change| (change.id, outcome.clone())));
                }
            }
        }
        outcomes
    }

    fn transaction(&self, group: &[PartitionUpdate], when: &[Compare]) -> Transaction {
        let mut transaction = Transaction { compares: when.to_vec(), ..Transaction::new() };
        transaction.else_get = when.iter().map(|compare| compare.key().to_owned()).collect();
        for change in group {
            let key = self.keys.partition(change.id);
            transaction.compares.push(if mutant!(UpdateWithoutCas) {
                Compare::Exists(key.clone())
            } else {
                Compare::ModRevision(key.clone(), change.expected_revision)
            });
            transaction.compares.extend(change.guards.iter().cloned());
            transaction = transaction.put(key, change.value.encode());
        }
        match group {
            [change] => transaction.else_get(self.keys.partition(change.id)),
            _ => transaction,
        }
    }

    /// Returns the stored value; `None` if the partition is gone or its value cannot be read.
    pub async fn read_back(&self, id: PartitionId) -> Result<Option<(PartitionValue, Revision)>, MetaStoreError> {
        let entry = self.store.get(&self.keys.partition(id)).await?.entry;
        Ok(entry.and_then(|entry| self.read(id, &entry)))
    }

    fn read(&self, id: PartitionId, entry: &KeyValue) -> Option<(PartitionValue, Revision)> {
        match PartitionValue::decode(&entry.key, &entry.value) {
            Ok(value) => Some((value, entry.mod_revision)),
            Err(error) => {
                tracing::warn!(
                    partition = %id, %error,
                    "the value of a partition cannot be read: the partition is left unchanged"
                );
                None
            }
        }
    }
}

/// Groups changes so that each group fits into one transaction.
fn groups(changes: Vec<PartitionUpdate>, when: usize) -> Vec<Vec<PartitionUpdate>> {
    let mut groups: Vec<Vec<PartitionUpdate>> = Vec::new();
    let mut compares = usize::MAX;
    for change in changes {
        let needed = 1 + change.guards.len();
        match groups.last_mut() {
            Some(group)
                if compares + needed <= limits::MAX_TRANSACTION_OPS && group.len() < limits::MAX_PARTITIONS_PER_TXN =>
            {
                compares += needed;
                group.push(change);
            }
            _ => {
                compares = when + needed;
                groups.push(vec![change]);
            }
        }
    }
    groups
}

#[cfg(test)]
mod tests;
