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
    store::{Compare, Entry, MetaStore, Outcome, Revision, StoreError, Transaction},
};
use crate::{limits, model::PartitionId};

/// Maximum number of concurrent transactions.
const TRANSACTIONS: usize = 8;

/// A new value of a partition, applied only if the stored value is still the expected one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Partition to change.
    pub id: PartitionId,
    /// Revision of the value that the change is based on.
    pub expect: Revision,
    /// New value.
    pub value: PartitionValue,
    /// Compares on other keys that must hold too: the registrations of added brokers.
    pub also: Vec<Compare>,
}

/// Result of a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Changed {
    /// The change was applied at this revision.
    Done(Revision),
    /// A compare did not hold. Contains the stored value if it exists and can be read.
    Refused(Option<(PartitionValue, Revision)>),
    /// A compare that all changes share did not hold: nothing was applied.
    Barred,
    /// The change was applied, was not applied, or will be applied later: read back.
    Unknown(StoreError),
    /// The change was not applied: the store request failed.
    Failed(StoreError),
}

/// Writes partition values. Cheap to clone.
#[derive(Clone, Debug)]
pub struct PartitionChanges {
    store: Arc<dyn MetaStore>,
    keys: Keys,
}

impl PartitionChanges {
    /// Returns a writer of the partitions under `keys` in `store`.
    pub fn new(store: Arc<dyn MetaStore>, keys: Keys) -> Self {
        Self { store, keys }
    }

    /// Applies changes of different partitions, each independently. The compares in `when` must hold for every change:
    /// a controller passes its own key there.
    ///
    /// # Panics
    /// Two changes are of the same partition.
    pub async fn make(&self, changes: Vec<Change>, when: &[Compare]) -> Vec<(PartitionId, Changed)> {
        let distinct: BTreeSet<PartitionId> = changes.iter().map(|change| change.id).collect();
        assert_eq!(distinct.len(), changes.len(), "one change of each partition");
        let groups = groups(changes, when.len());
        stream::iter(groups)
            .map(|group| self.make_group(group, when))
            .buffered(TRANSACTIONS)
            .flat_map(stream::iter)
            .collect()
            .await
    }

    /// Writes a group in one transaction, and in halves if the store rejects it.
    async fn make_group(&self, group: Vec<Change>, when: &[Compare]) -> Vec<(PartitionId, Changed)> {
        let (mut made, mut waiting) = (Vec::with_capacity(group.len()), vec![group]);
        while let Some(mut group) = waiting.pop() {
            match self.store.transact(self.transaction(&group, when)).await {
                Ok(Outcome::Done { revision }) => {
                    made.extend(group.into_iter().map(|change| (change.id, Changed::Done(revision))));
                }
                Ok(Outcome::Refused { mut found, .. }) => {
                    let stands = found.split_off(when.len()).pop().flatten();
                    if when.iter().zip(&found).any(|(compare, entry)| !compare.holds(entry.as_ref())) {
                        made.extend(group.into_iter().map(|change| (change.id, Changed::Barred)));
                        continue;
                    }
                    if let [change] = &*group {
                        let stands = stands.and_then(|entry| self.read(change.id, &entry));
                        made.push((change.id, Changed::Refused(stands)));
                        continue;
                    }
                    let second = group.split_off(group.len() / 2);
                    waiting.extend([second, group]);
                }
                Err(error) => {
                    let outcome =
                        if error.outcome_unknown() { Changed::Unknown(error) } else { Changed::Failed(error) };
                    made.extend(group.into_iter().map(|change| (change.id, outcome.clone())));
                }
            }
        }
        made
    }

    fn transaction(&self, group: &[Change], when: &[Compare]) -> Transaction {
        let mut transaction = Transaction { compares: when.to_vec(), ..Transaction::new() };
        transaction.else_get = when.iter().map(|compare| compare.key().to_owned()).collect();
        for change in group {
            let key = self.keys.partition(change.id);
            transaction.compares.push(if mutant!(UpdateWithoutCas) {
                Compare::Exists(key.clone())
            } else {
                Compare::ModRevision(key.clone(), change.expect)
            });
            transaction.compares.extend(change.also.iter().cloned());
            transaction = transaction.put(key, change.value.encode());
        }
        match group {
            [change] => transaction.else_get(self.keys.partition(change.id)),
            _ => transaction,
        }
    }

    /// Returns the stored value; `None` if the partition is gone or its value cannot be read.
    pub async fn read_back(&self, id: PartitionId) -> Result<Option<(PartitionValue, Revision)>, StoreError> {
        let entry = self.store.get(&self.keys.partition(id)).await?.entry;
        Ok(entry.and_then(|entry| self.read(id, &entry)))
    }

    fn read(&self, id: PartitionId, entry: &Entry) -> Option<(PartitionValue, Revision)> {
        match PartitionValue::decode(&entry.key, &entry.value) {
            Ok(value) => Some((value, entry.mod_revision)),
            Err(error) => {
                tracing::warn!(partition = %id, %error, "the partition stays as it is");
                None
            }
        }
    }
}

/// Groups changes so that each group fits into one transaction.
fn groups(changes: Vec<Change>, when: usize) -> Vec<Vec<Change>> {
    let mut groups: Vec<Vec<Change>> = Vec::new();
    let mut compares = usize::MAX;
    for change in changes {
        let more = 1 + change.also.len();
        match groups.last_mut() {
            Some(group)
                if compares + more <= limits::MAX_TRANSACTION_OPS && group.len() < limits::MAX_PARTITIONS_PER_TXN =>
            {
                compares += more;
                group.push(change);
            }
            _ => {
                compares = when + more;
                groups.push(vec![change]);
            }
        }
    }
    groups
}

#[cfg(test)]
mod tests;
