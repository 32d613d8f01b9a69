//! Replicas on the disk that the metadata gives to other brokers: they are deleted, once the store itself has said so.
//!
//! What the mirror shows is no licence to delete: it may be old, or of a store that was put back. So each partition's key is read at
//! that moment, and only one that can be read and names others lets the files go. Where the store does not answer they stay, and it
//! is asked again.

use std::{collections::BTreeSet, time::Duration};

use futures::{StreamExt as _, stream};
use tokio::time::Instant;

use super::Broker;
use crate::{model::PartitionId, task::clock};

/// Pause before the store is asked again.
const AGAIN: Duration = Duration::from_secs(5);

/// How long an answer of the store is waited for: the task that waits has other things to do.
const ANSWER: Duration = Duration::from_secs(2);

/// How many are looked at together.
const TOGETHER: usize = 64;

/// Those that are to be looked at.
#[derive(Debug, Default)]
pub(super) struct Leftovers {
    waiting: BTreeSet<PartitionId>,
    /// Not before this moment: the store did not answer.
    not_before: Option<Instant>,
}

impl Leftovers {
    /// A replica that the metadata gives to others.
    pub(super) fn add(&mut self, id: PartitionId) {
        self.waiting.insert(id);
    }

    /// Resolves when there is something to look at.
    pub(super) async fn due(&self) {
        if self.waiting.is_empty() {
            return std::future::pending().await;
        }
        if let Some(moment) = self.not_before {
            tokio::time::sleep_until(moment).await;
        }
    }

    /// Deletes those of which the store says that they are others'.
    pub(super) async fn see_to(&mut self, broker: &Broker) {
        self.not_before = None;
        let some: Vec<PartitionId> = self.waiting.iter().take(TOGETHER).copied().collect();
        let asked = stream::iter(some).map(|id| async move {
            let answer = tokio::time::timeout(ANSWER, broker.changes.read_back(id)).await;
            (id, answer)
        });
        let answers: Vec<_> = asked.buffer_unordered(TOGETHER).collect().await;
        for (id, answer) in answers {
            let value = match answer {
                Ok(Ok(found)) => found.map(|(value, _)| value),
                Ok(Err(_)) | Err(_) => {
                    self.not_before = Some(clock::monotonic() + AGAIN);
                    continue;
                }
            };
            self.waiting.remove(&id);
            // One that came back meanwhile is open, or will be: the mirror brings it.
            let is_others = value.is_some_and(|value| !value.replicas.contains(&broker.settings.id));
            if is_others && broker.hosted.by_id(id).is_none() {
                broker.delete_replica(id).await;
                tracing::info!(partition = %id, "the replica moved to other brokers; its files here were deleted");
            }
        }
    }
}
