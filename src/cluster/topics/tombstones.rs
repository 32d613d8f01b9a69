//! Tombstones of deleted topics: their lifetime and deletion.
//!
//! # Overview
//!
//! A tombstone permits the deletion of a topic's remaining data on disks and in the object store. Without a tombstone,
//! such data is kept, because the topic's metadata may merely have been lost. A tombstone is deleted after no data of
//! the topic has been found for a long time. That time starts at the first such observation, which is stored in the
//! tombstone, so restarts do not reset it. If data appears meanwhile, the time starts again.
//!
//! # Invariants
//!
//! - The deletion of a tombstone deletes no data, and clocks affect only its time, not safety.
//! - A late deletion costs only a key. After an early deletion, data that appears later (an object of a stalled broker,
//!   the disk of an absent broker) is kept forever and not served.

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

/// Action for a tombstone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TombstoneAction {
    Keep,
    /// Stores since when no data remains, or clears that time because data remains.
    SetPurged(Option<i64>),
    Delete,
}

fn decide(purged_since_ms: Option<i64>, left: bool, now_ms: i64, kept: Duration) -> TombstoneAction {
    let kept_ms = i64::try_from(kept.as_millis()).unwrap_or(i64::MAX);
    match (purged_since_ms, left) {
        (None, true) => TombstoneAction::Keep,
        (Some(_), true) => TombstoneAction::SetPurged(None),
        (None, false) => TombstoneAction::SetPurged(Some(now_ms)),
        (Some(since_ms), false) if now_ms.saturating_sub(since_ms) >= kept_ms => TombstoneAction::Delete,
        (Some(_), false) => TombstoneAction::Keep,
    }
}

impl Topics {
    /// Returns all tombstones from the store. A tombstone that does not parse is logged and kept.
    pub async fn tombstones(&self) -> Result<Vec<Tombstone>, MetaStoreError> {
        let listing = self.store.list(&format!("{}deleted/", self.keys.prefix())).await?;
        let read = listing.entries.into_iter().filter_map(|entry| {
            let Some(Key::Tombstone(id)) = self.keys.parse(&entry.key) else { return None };
            match TombstoneValue::decode(&entry.key, &entry.value) {
                Ok(value) => Some(Tombstone { id, value, mod_revision: entry.mod_revision }),
                Err(error) => {
                    tracing::warn!(%error, "the tombstone of a deleted topic cannot be read: kept");
                    None
                }
            }
        });
        Ok(read.collect())
    }

    /// Advances one tombstone: stores or clears the time, or deletes the tombstone. Returns true if the tombstone was
    /// deleted.
    ///
    /// | argument | meaning |
    /// | --- | --- |
    /// | `left` | true if a disk or the object store still holds data of the topic |
    /// | `now_ms` | wall-clock time in milliseconds |
    /// | `kept` | time that a tombstone outlives its topic's data |
    pub async fn expire(
        &self,
        tombstone: &Tombstone,
        left: bool,
        now_ms: i64,
        kept: Duration,
    ) -> Result<bool, MetaStoreError> {
        // Metadata keys of the topic count as data too; the sweep deletes them first.
        let left = left || self.metadata.state().stale_partitions().contains_key(&tombstone.id);
        let key = self.keys.tombstone(tombstone.id);
        let action = decide(tombstone.value.purged_since_ms, left, now_ms, kept);
        let transaction = Transaction::new().when(Compare::ModRevision(key.clone(), tombstone.mod_revision));
        let transaction = match action {
            TombstoneAction::Keep => return Ok(false),
            TombstoneAction::SetPurged(purged_since_ms) => {
                transaction.put(key, TombstoneValue { purged_since_ms, ..tombstone.value.clone() }.encode())
            }
            TombstoneAction::Delete => {
                let first = self.keys.partition(PartitionId::new(tombstone.id, 0));
                transaction.when(Compare::Absent(first)).delete(key)
            }
        };
        // If the compare fails, another broker has advanced the tombstone.
        let done = matches!(self.store.transact(transaction).await?, TxnOutcome::Committed { .. });
        Ok(done && action == TombstoneAction::Delete)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tombstone_is_deleted_only_long_after_last_data() {
        let kept = Duration::from_millis(100);
        assert_eq!(decide(None, true, 1000, kept), TombstoneAction::Keep);
        assert_eq!(decide(None, false, 1000, kept), TombstoneAction::SetPurged(Some(1000)));
        assert_eq!(decide(Some(1000), false, 1099, kept), TombstoneAction::Keep);
        assert_eq!(decide(Some(1000), false, 1100, kept), TombstoneAction::Delete);
        assert_eq!(
            decide(Some(1000), true, 9999, kept),
            TombstoneAction::SetPurged(None),
            "new data restarts the time"
        );
        assert_eq!(decide(Some(1000), false, 10, kept), TombstoneAction::Keep, "the clock was set back");
        assert_eq!(decide(Some(i64::MIN), false, i64::MAX, Duration::MAX), TombstoneAction::Delete);
    }
}
