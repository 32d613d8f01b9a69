//! Compare-and-set of many partitions' values: how leaders, the controller, a broker that starts and an operator agree on who
//! leads and who is in sync.
//!
//! Changes that come together share transactions. One that is refused must not hold up the others: a transaction that is
//! refused is tried in halves, down to the single change, whose answer is what stands in the store. A transaction whose outcome is
//! not known is never tried again here: who asked reads back, and treats both as possible until then.

use std::{collections::BTreeSet, sync::Arc};

use futures::{StreamExt as _, stream};

use super::{
    keys::{Keys, Value as _},
    partition_value::PartitionValue,
    store::{Compare, Entry, MetaStore, Outcome, Revision, StoreError, Transaction},
};
use crate::{limits, model::PartitionId};

/// Transactions under way at the same moment.
const TRANSACTIONS: usize = 8;

/// A partition's value, to be replaced where it still is what was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Which partition.
    pub id: PartitionId,
    /// The transaction that wrote the value that was seen.
    pub expect: Revision,
    /// The value that takes its place.
    pub value: PartitionValue,
    /// What else must hold, of other keys: the registrations of brokers that are added.
    pub also: Vec<Compare>,
}

/// What became of a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Changed {
    /// It was made, at this revision.
    Done(Revision),
    /// Something did not hold. With what stands in the store, if it is there and can be read.
    Refused(Option<(PartitionValue, Revision)>),
    /// What had to hold for all of them does not: nothing was made.
    Barred,
    /// It was made, was not made, or will be a little later: read back.
    Unknown(StoreError),
    /// It was not made: the store could not be asked.
    Failed(StoreError),
}

/// Changes partitions' values. Cheap to clone.
#[derive(Clone, Debug)]
pub struct PartitionChanges {
    store: Arc<dyn MetaStore>,
    keys: Keys,
}

impl PartitionChanges {
    /// Changes under `keys` in `store`.
    pub fn new(store: Arc<dyn MetaStore>, keys: Keys) -> Self {
        Self { store, keys }
    }

    /// Makes changes of different partitions, each for itself. `when` must hold for every one of them: a controller names its own
    /// key there.
    ///
    /// # Panics
    /// When two changes are of the same partition.
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

    /// One transaction, and halves of it where that is refused.
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

    /// What stands in the store; `None` when the partition is gone or its value cannot be read.
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

/// As many changes together as one transaction takes.
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
