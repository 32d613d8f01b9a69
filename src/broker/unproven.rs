//! Partitions of which this broker could show nothing when it started, because their values could not be read.
//!
//! Somebody may put such a value back as it was: it may then name this broker as the leader of an epoch that began before this process
//! did, or count on records that its disk has lost since. So its replica is opened and told nothing; as soon as the mirror can read the value
//! the broker compares itself with it ([`Unread::prove`]), gives up what it must, and only then takes part in it. A store that does not answer
//! is asked again.

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

/// Pause before the store is asked again.
const AGAIN: Duration = Duration::from_secs(1);

/// How long the store, and then the mirror, are waited for: the task that waits has other things to do.
const ANSWER: Duration = Duration::from_secs(2);

/// What is still to be proven.
#[derive(Debug, Default)]
pub(super) struct Unproven {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    unread: Unread,
    left: BTreeSet<PartitionId>,
    /// Those of them that can be read by now.
    readable: BTreeSet<PartitionId>,
    /// Not before this moment: the store did not answer.
    not_before: Option<Instant>,
}

impl Unproven {
    /// What the start left to prove.
    pub(super) fn take(&self, unread: Unread) {
        *self.state() = State { left: unread.partitions().clone(), unread, ..State::default() };
    }

    /// Whether this broker may not take part in the partition yet.
    pub(super) fn holds_back(&self, id: PartitionId) -> bool {
        self.state().left.contains(&id)
    }

    /// One of them can be read by now, and what is on the disk of it was opened: it is seen to soon.
    pub(super) fn can_be_read(&self, id: PartitionId) {
        self.state().readable.insert(id);
    }

    /// Resolves when there is something to see to.
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

    /// Proves what can be proven now. Returns the partitions that this broker may take part in from here on, as its mirror shows them.
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
                    // What the mirror shows until then is what was given up.
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
                // Gone, or spoiled again: the mirror says when it is back.
                Ok(Ok(None)) => {}
                // The others would wait as long.
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
