//! Compare-and-set of partition values, for leaders, the controller, starting brokers and operators.
//!
//! Changes of one call of [`PartitionUpdater::apply`] share transactions. A conflict does not block other changes. A
//! transaction in which the compare of a change failed is repeated in halves, down to a single change, whose outcome
//! contains the stored value. A transaction with an unknown outcome is not repeated: the caller reads the value back,
//! and treats both outcomes as possible until then.

use std::{collections::BTreeSet, sync::Arc};

use futures::{StreamExt as _, stream};

use super::{
    keys::{Keys, Value as _},
    partition_value::PartitionValue,
    store::{Compare, KeyValue, MetaStore, MetaStoreError, Revision, Transaction, TxnOutcome},
};
use crate::{limits, model::PartitionId};

/// Maximum number of concurrent transactions of one call of `apply`.
const MAX_CONCURRENT_TXNS: usize = 8;

/// A new value of a partition, applied only if the stored value is still the expected one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartitionUpdate {
    /// Partition to change.
    pub id: PartitionId,
    /// Revision of the stored value that this change replaces.
    pub expected_revision: Revision,
    /// New value.
    pub value: PartitionValue,
    /// Further compares that must hold. An ISR expansion requires the registrations of the added brokers, and an
    /// unclean election the absence of those of ISR and ELR members.
    pub guards: Vec<Compare>,
}

/// Result of a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UpdateOutcome {
    /// The change was applied at this revision.
    Done(Revision),
    /// The stored value is not the expected one, or a compare in `guards` did not hold. Contains the stored value, or
    /// `None` if it is missing or unreadable.
    Conflict(Option<(PartitionValue, Revision)>),
    /// A compare in the `shared_compares` of the call (not in `guards`) did not hold: this change was not applied.
    GuardFailed,
    /// The change was applied, was not applied, or will be applied later: read the value back.
    Unknown(MetaStoreError),
    /// The request failed, and the change was not applied. After `Regressed`, the other state of the store may contain
    /// the change.
    Failed(MetaStoreError),
}

/// Writes partition values. Cheap to clone.
#[derive(Clone, Debug)]
pub struct PartitionUpdater {
    store: Arc<dyn MetaStore>,
    keys: Keys,
}

impl PartitionUpdater {
    /// Returns a writer of the partition values below the prefix of `keys` in `store`.
    pub fn new(store: Arc<dyn MetaStore>, keys: Keys) -> Self {
        Self { store, keys }
    }

    /// Applies changes of different partitions, each independently of the other changes, and returns the outcome of
    /// each. The compares in `shared_compares` must hold for every change: the controller passes a compare of the
    /// controller key.
    ///
    /// # Panics
    /// Two changes are of the same partition.
    pub async fn apply(
        &self,
        changes: Vec<PartitionUpdate>,
        shared_compares: &[Compare],
    ) -> Vec<(PartitionId, UpdateOutcome)> {
        let distinct: BTreeSet<PartitionId> = changes.iter().map(|change| change.id).collect();
        assert_eq!(distinct.len(), changes.len(), "two changes of one partition");
        let groups = group_by_transaction(changes, shared_compares.len());
        stream::iter(groups)
            .map(|group| self.apply_group(group, shared_compares))
            .buffered(MAX_CONCURRENT_TXNS)
            .flat_map(stream::iter)
            .collect()
            .await
    }

    /// Writes a group in one transaction. If a compare of one of its changes fails, writes each half of the group in a
    /// transaction of its own, and so on.
    async fn apply_group(
        &self,
        group: Vec<PartitionUpdate>,
        shared_compares: &[Compare],
    ) -> Vec<(PartitionId, UpdateOutcome)> {
        let (mut outcomes, mut pending) = (Vec::with_capacity(group.len()), vec![group]);
        while let Some(mut group) = pending.pop() {
            match self.store.transact(self.transaction(&group, shared_compares)).await {
                Ok(TxnOutcome::Committed { revision }) => {
                    outcomes.extend(group.into_iter().map(|change| (change.id, UpdateOutcome::Done(revision))));
                }
                Ok(TxnOutcome::CompareFailed { mut found, .. }) => {
                    // `found` contains the keys of the shared compares, and after them the key of a single change.
                    let stored = found.split_off(shared_compares.len()).pop().flatten();
                    if shared_compares.iter().zip(&found).any(|(compare, entry)| !compare.holds(entry.as_ref())) {
                        outcomes.extend(group.into_iter().map(|change| (change.id, UpdateOutcome::GuardFailed)));
                        continue;
                    }
                    if let [change] = &*group {
                        let stored = stored.and_then(|entry| decode_or_log(change.id, &entry));
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

    /// Returns the transaction of a group. If a compare fails, the store returns the entries of the keys of the shared
    /// compares. For a single change, it also returns that of the partition.
    fn transaction(&self, group: &[PartitionUpdate], shared_compares: &[Compare]) -> Transaction {
        let mut transaction = Transaction { compares: shared_compares.to_vec(), ..Transaction::new() };
        transaction.else_get = shared_compares.iter().map(|compare| compare.key().to_owned()).collect();
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

    /// Reads the stored value of a partition, with its revision. Returns `None` if the partition does not exist or its
    /// value is unreadable.
    pub async fn read_back(&self, id: PartitionId) -> Result<Option<(PartitionValue, Revision)>, MetaStoreError> {
        let entry = self.store.get(&self.keys.partition(id)).await?.entry;
        Ok(entry.and_then(|entry| decode_or_log(id, &entry)))
    }
}

/// Returns a stored value with its revision. Logs an unreadable value, and returns `None` for it.
fn decode_or_log(id: PartitionId, entry: &KeyValue) -> Option<(PartitionValue, Revision)> {
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

/// Splits changes into groups that fit into one transaction each (`limits::MAX_TRANSACTION_OPS`,
/// `limits::MAX_PARTITIONS_PER_TXN`). Every transaction also contains the shared compares.
fn group_by_transaction(changes: Vec<PartitionUpdate>, shared_compare_count: usize) -> Vec<Vec<PartitionUpdate>> {
    let mut groups: Vec<Vec<PartitionUpdate>> = Vec::new();
    // Number of compares of the last group.
    let mut compare_count = shared_compare_count;
    for change in changes {
        let added_compares = 1 + change.guards.len();
        match groups.last_mut() {
            Some(group)
                if compare_count + added_compares <= limits::MAX_TRANSACTION_OPS
                    && group.len() < limits::MAX_PARTITIONS_PER_TXN =>
            {
                compare_count += added_compares;
                group.push(change);
            }
            // There is no group yet, or the last group is full.
            _ => {
                compare_count = shared_compare_count + added_compares;
                groups.push(vec![change]);
            }
        }
    }
    groups
}

#[cfg(test)]
mod tests;
