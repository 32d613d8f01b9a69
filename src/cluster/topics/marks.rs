//! The marks of deleted topics: how long they stay, and their end.
//!
//! A mark is the licence to delete what disks and bucket still hold of a topic; without it such things are kept, because the
//! topic's metadata may merely have been lost. So a mark may go too late, which costs a key, but hardly too early: what
//! turns up afterwards (an object that a stalled broker wrote, the disk of a broker that was away) is kept for good and not
//! served. Never does its end delete anything. It goes once nothing was left of the topic for a long time, counted from when
//! that was first seen and written into the mark, so that restarts do not begin again; if anything turns up meanwhile, the
//! count starts over. Clocks matter only for how long, not for what is safe.

use std::time::Duration;

use super::Topics;
use crate::{
    cluster::{
        keys::{DeletedValue, Key, Value as _},
        store::{Compare, Outcome, Revision, StoreError, Transaction},
    },
    model::{PartitionId, TopicId},
};

/// The mark of one deleted topic, as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The topic.
    pub id: TopicId,
    value: DeletedValue,
    mod_revision: Revision,
}

/// What is to be done about a mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Wait,
    /// Write down since when nothing is left, or that something is.
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
    /// Every mark that there is, read from the store. One that does not parse is named and left alone.
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

    /// Brings one mark forward: `left` says whether disks or bucket still hold anything of the topic, `now_ms` is the wall
    /// clock in milliseconds, `kept` how long a mark outlives its topic. True when the mark was ended.
    pub async fn age(&self, mark: &Mark, left: bool, now_ms: i64, kept: Duration) -> Result<bool, StoreError> {
        // Keys of it in the metadata are something left of it too: the sweep takes them first.
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
        // Refused: somebody else has brought it forward.
        let done = matches!(self.store.transact(transaction).await?, Outcome::Done { .. });
        Ok(done && step == Step::End)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_ends_only_after_nothing_was_left_for_long() {
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
