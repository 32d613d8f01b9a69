//! Partitions that the startup verification could not check, because their values were unreadable.
//!
//! A restored value may name this broker as the leader of an epoch from before this process, or rely on lost records. So the replica is
//! opened without an assignment. Once the value is readable, the broker verifies its replica ([`Unread::prove`]), releases roles that do
//! not hold, and becomes active in the partition. If the store does not respond, the verification is retried.

use std::{
    collections::BTreeSet,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use super::Broker;
use crate::{
    cluster::{Revision, StoreError, Unread},
    model::PartitionId,
    task::clock,
};

/// Pause before the verification is retried.
const AGAIN: Duration = Duration::from_secs(1);

/// Timeout of one verification: of the metadata store, and then of the metadata cache. The waiting task has other work.
const ANSWER: Duration = Duration::from_secs(2);

/// Partitions that are not verified yet.
#[derive(Debug, Default)]
pub(super) struct Unproven {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    unread: Unread,
    left: BTreeSet<PartitionId>,
    /// Partitions of `left` that can be read by now.
    readable: BTreeSet<PartitionId>,
    /// Earliest time of the next attempt, set when the store did not respond.
    not_before: Option<Instant>,
}

impl Unproven {
    /// Takes over the partitions that the startup verification could not check.
    pub(super) fn take(&self, unread: Unread) {
        *self.state() = State { left: unread.partitions().clone(), unread, ..State::default() };
    }

    /// Returns true if this broker must not be active in the partition yet.
    pub(super) fn holds_back(&self, id: PartitionId) -> bool {
        self.state().left.contains(&id)
    }

    /// Marks a partition as readable and opened, so that it is verified soon.
    pub(super) fn can_be_read(&self, id: PartitionId) {
        self.state().readable.insert(id);
    }

    /// Resolves when there is something to verify.
    pub(super) async fn due(&self) {
        let not_before = {
            let state = self.state();
            (!state.readable.is_empty()).then_some(state.not_before)
        };
        match not_before {
            None => std::future::pending().await,
            Some(None) => {}
            Some(Some(moment)) => tokio::time::sleep_until(moment).await,
        }
    }

    /// Verifies the readable partitions. Returns those in which this broker may be active from now on, as its metadata cache shows them.
    pub(super) async fn see_to(&self, broker: &Broker) -> Vec<PartitionId> {
        let (readable, unread) = {
            let mut state = self.state();
            state.not_before = None;
            (std::mem::take(&mut state.readable), state.unread.clone())
        };
        let (mut proven, mut readable) = (Vec::new(), readable.into_iter());
        while let Some(id) = readable.next() {
            let Some(is_whole) = broker.came_up_whole(id) else { continue };
            let shown = (id, is_whole);
            let answer = tokio::time::timeout(ANSWER, async {
                let proof = unread.prove(
                    &broker.store,
                    &broker.keys,
                    broker.settings.id,
                    shown,
                    &broker.settings.topic_defaults,
                );
                let revision: Option<Revision> = proof.await?;
                if let Some(revision) = revision {
                    // Until that revision, the cache shows the roles that were released.
                    broker.view.reached(revision).await;
                }
                Ok::<_, StoreError>(revision)
            });
            match answer.await {
                Ok(Ok(Some(_))) => {
                    tracing::info!(partition = %id, "its value can be read again; this broker takes part in it");
                    self.state().left.remove(&id);
                    proven.push(id);
                }
                // The value was deleted or is unreadable again. The metadata cache reports its return.
                Ok(Ok(None)) => {}
                // The remaining partitions would wait as long.
                Ok(Err(_)) | Err(_) => {
                    let mut state = self.state();
                    state.readable.extend(std::iter::once(id).chain(readable));
                    state.not_before = Some(clock::monotonic() + AGAIN);
                    break;
                }
            }
        }
        proven
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
