//! Tombstones of deleted topics: how long they exist, and when they are deleted.
//!
//! # Overview
//!
//! A tombstone permits the deletion of a topic's remaining data on disks and in the object store. Without a tombstone,
//! such data is kept, because the topic's metadata may merely have been lost. A tombstone is deleted after no data of
//! the topic has been found for the retention time. That time starts at the first check without data, which is stored
//! in the tombstone, so restarts do not reset it. If data appears meanwhile, the time starts again.
//!
//! # Invariants
//!
//! - The deletion of a tombstone deletes no data. A wrong clock only makes this deletion late or early.
//! - A late deletion costs only a key. After an early deletion, data that appears later is kept forever and not served.
//!   Examples are an object of a stalled broker and the disk of an absent broker.

use std::time::Duration;

use super::Topics;
use crate::{
    cluster::{
        keys::{Key, TombstoneValue, Value as _},
        store::{Compare, MetaStoreError, Revision, Transaction, TxnOutcome},
    },
    model::{PartitionId, TopicId},
};

/// The tombstone of one deleted topic, as read from the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tombstone {
    pub id: TopicId,
    value: TombstoneValue,
    mod_revision: Revision,
}

/// Action of one check of a tombstone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TombstoneAction {
    Keep,
    /// Stores the wall-clock time in milliseconds since which no data remains; `None` if data remains.
    SetPurged(Option<i64>),
    Delete,
}

/// Returns the action for a tombstone. `purged_since_ms` is the stored time since which no data of the topic remains;
/// `None` if there is no such time. The other arguments are those of [`Topics::expire`].
fn decide(purged_since_ms: Option<i64>, data_remains: bool, now_ms: i64, retention: Duration) -> TombstoneAction {
    let retention_ms = i64::try_from(retention.as_millis()).unwrap_or(i64::MAX);
    match (purged_since_ms, data_remains) {
        (None, true) => TombstoneAction::Keep,
        (Some(_), true) => TombstoneAction::SetPurged(None),
        (None, false) => TombstoneAction::SetPurged(Some(now_ms)),
        (Some(since_ms), false) if now_ms.saturating_sub(since_ms) >= retention_ms => TombstoneAction::Delete,
        (Some(_), false) => TombstoneAction::Keep,
    }
}

impl Topics {
    /// Returns all tombstones from the store. A tombstone that does not parse is logged and kept.
    pub async fn tombstones(&self) -> Result<Vec<Tombstone>, MetaStoreError> {
        let listing = self.store.list(&format!("{}deleted/", self.keys.prefix())).await?;
        let tombstones = listing.entries.into_iter().filter_map(|entry| {
            let Some(Key::Tombstone(id)) = self.keys.parse(&entry.key) else { return None };
            match TombstoneValue::decode(&entry.key, &entry.value) {
                Ok(value) => Some(Tombstone { id, value, mod_revision: entry.mod_revision }),
                Err(error) => {
                    tracing::warn!(%error, "the tombstone of a deleted topic cannot be read: kept");
                    None
                }
            }
        });
        Ok(tombstones.collect())
    }

    /// Checks one tombstone. Stores or clears the time since which no data of its topic remains, or deletes the
    /// tombstone once `retention` has passed since that time. Returns true if this call deleted the tombstone.
    ///
    /// | argument | meaning |
    /// | --- | --- |
    /// | `data_remains` | true if a disk or the object store still holds data of the topic |
    /// | `now_ms` | wall-clock time in milliseconds |
    /// | `retention` | time for which a tombstone outlives its topic's data |
    pub async fn expire(
        &self,
        tombstone: &Tombstone,
        data_remains: bool,
        now_ms: i64,
        retention: Duration,
    ) -> Result<bool, MetaStoreError> {
        // Metadata keys of the topic that remain count as data too; a sweep deletes them first.
        let data_remains = data_remains || self.metadata.state().stale_partitions().contains_key(&tombstone.id);
        let key = self.keys.tombstone(tombstone.id);
        let action = decide(tombstone.value.purged_since_ms, data_remains, now_ms, retention);
        let transaction = Transaction::new().when(Compare::ModRevision(key.clone(), tombstone.mod_revision));
        let transaction = match action {
            TombstoneAction::Keep => return Ok(false),
            TombstoneAction::SetPurged(purged_since_ms) => {
                transaction.put(key, TombstoneValue { purged_since_ms, ..tombstone.value.clone() }.encode())
            }
            TombstoneAction::Delete => {
                let first = self.keys.partition(PartitionId::new(tombstone.id, 0));
                // If partition 0 exists, metadata of the topic remains, and the compare fails.
                transaction.when(Compare::Absent(first)).delete(key)
            }
        };
        // A failed compare means that another broker has changed the tombstone, or that partition 0 exists. The next
        // check reads the tombstone again.
        let is_applied = matches!(self.store.transact(transaction).await?, TxnOutcome::Committed { .. });
        Ok(is_applied && action == TombstoneAction::Delete)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tombstone_is_deleted_only_long_after_last_data() {
        let retention = Duration::from_millis(100);
        assert_eq!(decide(None, true, 1000, retention), TombstoneAction::Keep);
        assert_eq!(decide(None, false, 1000, retention), TombstoneAction::SetPurged(Some(1000)));
        assert_eq!(decide(Some(1000), false, 1099, retention), TombstoneAction::Keep);
        assert_eq!(decide(Some(1000), false, 1100, retention), TombstoneAction::Delete);
        assert_eq!(
            decide(Some(1000), true, 9999, retention),
            TombstoneAction::SetPurged(None),
            "new data restarts the time"
        );
        assert_eq!(decide(Some(1000), false, 10, retention), TombstoneAction::Keep, "the clock was set back");
        assert_eq!(decide(Some(i64::MIN), false, i64::MAX, Duration::MAX), TombstoneAction::Delete);
    }
}
