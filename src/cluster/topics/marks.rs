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
        keys::{DeletedValue, Key, Value as _},
        store::{Compare, Outcome, Revision, StoreError, Transaction},
    },
    model::{PartitionId, TopicId},
};

/// The tombstone of one deleted topic, as read from the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Id of the topic.
    pub id: TopicId,
    value: DeletedValue,
    mod_revision: Revision,
}

/// Action for a tombstone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Wait,
    /// Stores since when no data remains, or clears that time because data remains.
    Note(Option<i64>),
    End,
}

fn decide(gone_since_ms: Option<i64>, left: bool, now_ms: i64, kept: Duration) -> Step {
    let kept_ms = i64::try_from(kept.as_millis()).unwrap_or(i64::MAX);
    match (gone_since_ms, left) {
        (None, true) => Step::Wait,
        (Some(_), true) => Step::Note(None),
        (None, false) => Step::Note(Some(now_ms)),
        (Some(since_ms), false) if now_ms.saturating_sub(since_ms) >= kept_ms => Step::End,
        (Some(_), false) => Step::Wait,
    }
}

impl Topics {
    /// Returns all tombstones from the store. A tombstone that does not parse is logged and kept.
    pub async fn marks(&self) -> Result<Vec<Mark>, StoreError> {
        let listing = self.store.list(&format!("{}deleted/", self.keys.prefix())).await?;
        let read = listing.entries.into_iter().filter_map(|entry| {
            let Some(Key::Deleted(id)) = self.keys.parse(&entry.key) else { return None };
            match DeletedValue::decode(&entry.key, &entry.value) {
                Ok(value) => Some(Mark { id, value, mod_revision: entry.mod_revision }),
                Err(error) => {
                    tracing::warn!(%error, "the mark of a deleted topic is kept");
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
    pub async fn age(&self, mark: &Mark, left: bool, now_ms: i64, kept: Duration) -> Result<bool, StoreError> {
        // Metadata keys of the topic count as data too; the sweep deletes them first.
        let left = left || self.view.state().strays().contains_key(&mark.id);
        let key = self.keys.deleted(mark.id);
        let step = decide(mark.value.gone_since_ms, left, now_ms, kept);
        let transaction = Transaction::new().when(Compare::ModRevision(key.clone(), mark.mod_revision));
        let transaction = match step {
            Step::Wait => return Ok(false),
            Step::Note(gone_since_ms) => {
                transaction.put(key, DeletedValue { gone_since_ms, ..mark.value.clone() }.encode())
            }
            Step::End => {
                let first = self.keys.partition(PartitionId::new(mark.id, 0));
                transaction.when(Compare::Absent(first)).delete(key)
            }
        };
        // If the compare fails, another broker has advanced the tombstone.
        let done = matches!(self.store.transact(transaction).await?, Outcome::Done { .. });
        Ok(done && step == Step::End)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tombstone_is_deleted_only_long_after_last_data() {
        let kept = Duration::from_millis(100);
        assert_eq!(decide(None, true, 1000, kept), Step::Wait);
        assert_eq!(decide(None, false, 1000, kept), Step::Note(Some(1000)));
        assert_eq!(decide(Some(1000), false, 1099, kept), Step::Wait);
        assert_eq!(decide(Some(1000), false, 1100, kept), Step::End);
        assert_eq!(decide(Some(1000), true, 9999, kept), Step::Note(None), "what turns up starts the count again");
        assert_eq!(decide(Some(1000), false, 10, kept), Step::Wait, "a clock that was put back");
        assert_eq!(decide(Some(i64::MIN), false, i64::MAX, Duration::MAX), Step::End);
    }
}
