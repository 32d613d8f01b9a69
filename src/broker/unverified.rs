//! Partitions that the startup verification could not check, because their values were unreadable.
//!
//! A restored value may name this broker as the leader of an epoch from before this process, or rely on lost records.
//! So the replica is opened without an assignment. Once the value is readable, the broker verifies its replica
//! ([`UnverifiedPartitions::prove`]), releases roles that do not hold, and becomes active in the partition. If the
//! store does not respond, the verification is retried.

use std::{collections::BTreeSet, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;

use super::Broker;
use crate::{
    cluster::{MetaStoreError, Revision, UnverifiedPartitions},
    model::PartitionId,
    task::clock,
};

/// Pause before the verification is retried.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// Timeout of one verification: of the metadata store, and then of the metadata cache. The waiting task has other work.
const VERIFY_TIMEOUT: Duration = Duration::from_secs(2);

/// Partitions that are not verified yet.
#[derive(Debug, Default)]
pub(super) struct UnverifiedReplicas {
    state: Mutex<UnverifiedState>,
}

#[derive(Debug, Default)]
struct UnverifiedState {
    unverified: UnverifiedPartitions,
    remaining: BTreeSet<PartitionId>,
    /// Partitions of `remaining` whose values are readable by now.
    readable: BTreeSet<PartitionId>,
    /// Earliest time of the next attempt, set when the store did not respond.
    not_before: Option<Instant>,
}

impl UnverifiedReplicas {
    /// Takes over the partitions that the startup verification could not check.
    pub(super) fn take(&self, unverified: UnverifiedPartitions) {
        *self.state.lock() =
            UnverifiedState { remaining: unverified.partitions().clone(), unverified, ..UnverifiedState::default() };
    }

    /// Returns true if this broker must not be active in the partition yet.
    pub(super) fn is_unverified(&self, id: PartitionId) -> bool {
        self.state.lock().remaining.contains(&id)
    }

    /// Marks a partition as readable and opened, so that it is verified soon.
    pub(super) fn mark_readable(&self, id: PartitionId) {
        self.state.lock().readable.insert(id);
    }

    /// Resolves when there is something to verify.
    pub(super) async fn due(&self) {
        let not_before = {
            let state = self.state.lock();
            (!state.readable.is_empty()).then_some(state.not_before)
        };
        match not_before {
            None => std::future::pending().await,
            Some(None) => {}
            Some(Some(moment)) => tokio::time::sleep_until(moment).await,
        }
    }

    /// Verifies the readable partitions. Returns those in which this broker may be active from now on, as its metadata
    /// cache shows them.
    pub(super) async fn process(&self, broker: &Broker) -> Vec<PartitionId> {
        let (readable, unverified) = {
            let mut state = self.state.lock();
            state.not_before = None;
            (std::mem::take(&mut state.readable), state.unverified.clone())
        };
        let (mut verified, mut readable) = (Vec::new(), readable.into_iter());
        while let Some(id) = readable.next() {
            let Some(is_intact) = broker.is_intact(id) else { continue };
            let inventory = (id, is_intact);
            let verification = tokio::time::timeout(VERIFY_TIMEOUT, async {
                let check = unverified.prove(
                    &broker.store,
                    &broker.keys,
                    broker.settings.id,
                    inventory,
                    &broker.settings.topic_defaults,
                );
                let revision: Option<Revision> = check.await?;
                if let Some(revision) = revision {
                    // Until that revision, the cache shows the roles that were released.
                    broker.metadata.wait_for_revision(revision).await;
                }
                Ok::<_, MetaStoreError>(revision)
            });
            match verification.await {
                Ok(Ok(Some(_))) => {
                    tracing::info!(
                        partition = %id,
                        "the partition value is readable and verified: this broker is active in the partition"
                    );
                    self.state.lock().remaining.remove(&id);
                    verified.push(id);
                }
                // The value was deleted or is unreadable again. The metadata cache reports its return.
                Ok(Ok(None)) => {}
                // The remaining partitions would wait as long.
                Ok(Err(_)) | Err(_) => {
                    let mut state = self.state.lock();
                    state.readable.extend(std::iter::once(id).chain(readable));
                    state.not_before = Some(clock::monotonic() + RETRY_INTERVAL);
                    break;
                }
            }
        }
        verified
    }
}
