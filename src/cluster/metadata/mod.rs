//! The metadata cache: a broker's copy of the cluster's prefix, which serves lookups without requests to the store.
//!
//! # Overview
//!
//! One task lists the prefix, then watches the changes after the list. The task relists when the watch is compacted or
//! breaks, and at intervals. Each change is published twice: as a whole snapshot ([`MetadataCache::state`],
//! [`MetadataCache::watch`]) and as the changed keys ([`MetadataCache::feed`]). The cost of a change depends on the
//! size of the change, not on the size of the metadata, unless a caller holds a snapshot.
//!
//! # Invariants
//!
//! - The revision never falls: events and lists older than the snapshot change nothing.
//! - A snapshot is consistent: it never contains half a transaction.
//! - While the store does not respond, the snapshot stays as it is.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{broadcast, watch},
    time::Instant,
};

use super::{
    keys::{Key, Keys},
    store::{MetaStore, MetaStoreError, Revision, Watch},
};
use crate::{
    model::PartitionId,
    task::{Backoff, Tasks, clock, lock::Mutex},
    telemetry::{Counter, LogThrottle},
};

mod snapshot;

pub use snapshot::{MetadataSnapshot, PartitionEntry, Versioned};

/// Time after which the task ends a working watch and lists the prefix again, as a precaution.
const RELIST_INTERVAL: Duration = Duration::from_secs(600);

/// Pause before a list that follows a failed list or a watch. Later pauses grow until a watch has received a response.
const MIN_RETRY_DELAY: Duration = Duration::from_millis(50);

/// Longest pause before a list.
const MAX_RETRY_DELAY: Duration = Duration::from_secs(5);

/// Maximum time between two responses or events of a store that responds. The watch of etcd requests progress after two
/// seconds without a message, and moves to another member after two more.
const MAX_CONTACT_INTERVAL: Duration = Duration::from_secs(5);

/// Maximum number of published changes that wait in a feed. A feed that lags further returns `Relisted` instead of the
/// missed changes.
const MAX_QUEUED_CHANGES: usize = 1024;

/// A handle of the metadata cache. Cheap to clone.
#[derive(Clone, Debug)]
pub struct MetadataCache {
    state: Arc<watch::Sender<Arc<MetadataSnapshot>>>,
    changes: broadcast::Sender<Arc<[Key]>>,
    /// Time of the last response or event from the store; at first, the start of the cache.
    last_contact: Arc<Mutex<Instant>>,
}

/// One change from a feed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetadataChange {
    /// Any key may have changed: read the whole snapshot. This is the first value of every feed, and the next value of
    /// a feed that lagged too far.
    Relisted,
    /// These keys changed. The snapshot is at least as new; look up their current values there.
    Keys(Arc<[Key]>),
}

/// A stream of changed keys.
#[derive(Debug)]
pub struct ChangeFeed {
    changes: broadcast::Receiver<Arc<[Key]>>,
    /// True after the feed has returned its first value, `Relisted`.
    started: bool,
}

impl ChangeFeed {
    /// Returns the next change; `None` when the cache was stopped. Cancel safe: dropping the future loses no change.
    pub async fn next(&mut self) -> Option<MetadataChange> {
        if !self.started {
            self.started = true;
            return Some(MetadataChange::Relisted);
        }
        match self.changes.recv().await {
            Ok(keys) => Some(MetadataChange::Keys(keys)),
            Err(broadcast::error::RecvError::Lagged(_)) => {
                self.changes = self.changes.resubscribe();
                Some(MetadataChange::Relisted)
            }
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}

impl MetadataCache {
    /// Starts the cache, which is empty at first: see [`MetadataCache::wait_for_revision`].
    pub fn start(store: Arc<dyn MetaStore>, keys: Keys, tasks: &Tasks) -> Self {
        Self::start_with_counter(store, keys, tasks, Counter::default())
    }

    /// Like [`MetadataCache::start`]; `lists` counts the successful lists.
    pub fn start_with_counter(store: Arc<dyn MetaStore>, keys: Keys, tasks: &Tasks, lists: Counter) -> Self {
        let metadata = Self {
            state: Arc::new(watch::Sender::default()),
            changes: broadcast::Sender::new(MAX_QUEUED_CHANGES),
            last_contact: Arc::new(Mutex::new(clock::monotonic())),
        };
        let reflector = Reflector { store, keys, metadata: metadata.clone(), lists };
        tasks.spawn_until_cancelled("metadata-cache", reflector.run());
        metadata
    }

    /// Returns the current snapshot. Drop it soon: while a caller holds it, the next change copies the snapshot's maps.
    pub fn state(&self) -> Arc<MetadataSnapshot> {
        self.state.borrow().clone()
    }

    /// Returns a receiver of the snapshots.
    pub fn watch(&self) -> watch::Receiver<Arc<MetadataSnapshot>> {
        self.state.subscribe()
    }

    /// Returns a feed of the changed keys from now on, which starts with [`MetadataChange::Relisted`].
    pub fn feed(&self) -> ChangeFeed {
        ChangeFeed { changes: self.changes.subscribe(), started: false }
    }

    /// Returns the time since the store's last response or event, progress notifications included; before the first
    /// one, since the start. Grows while the store does not respond. Grows without any fault in a standalone broker,
    /// because the embedded store sends only changes.
    pub fn staleness(&self) -> Duration {
        self.last_contact.lock().elapsed()
    }

    /// Returns the time for which the store has not responded; zero if it responds. For a standalone broker also the
    /// time without a change: see [`MetadataCache::staleness`].
    pub fn unresponsive_for(&self) -> Duration {
        Some(self.staleness()).filter(|time| *time > MAX_CONTACT_INTERVAL).unwrap_or_default()
    }

    fn update_last_contact(&self) {
        *self.last_contact.lock() = clock::monotonic();
    }

    /// Returns the entry of an existing partition: see [`MetadataSnapshot::partition`].
    pub fn partition(&self, id: PartitionId) -> Option<PartitionEntry> {
        self.state.borrow().partition(id).cloned()
    }

    /// Waits until the first list is applied and the snapshot has this revision or a newer one. Without a time limit:
    /// while the store is unavailable, the revision may never arrive.
    pub async fn wait_for_revision(&self, revision: Revision) {
        self.wait_until(|state| state.revision() >= revision.max(Revision(1))).await;
    }

    /// Waits until the snapshot satisfies a condition, without a time limit.
    pub async fn wait_until(&self, holds: impl Fn(&MetadataSnapshot) -> bool) {
        let mut states = self.state.subscribe();
        // `self` owns the sender, so the channel cannot close.
        let _state = states.wait_for(|state| holds(state)).await;
    }

    /// Changes the snapshot with `change`, and sends the keys that `change` returns to all feeds.
    fn publish(&self, change: impl FnOnce(&mut MetadataSnapshot) -> Vec<Key>) {
        let mut changed = Vec::new();
        // `make_mut` changes the snapshot in place unless a caller holds it, so the cost depends on the change only.
        self.state.send_modify(|state| changed = change(Arc::make_mut(state)));
        if !changed.is_empty() {
            // An error means that there are no receivers.
            let _listeners = self.changes.send(changed.into());
        }
    }
}

/// The task that fills the cache: it lists the cluster's prefix, applies a watch, and lists again when the watch ends.
struct Reflector {
    store: Arc<dyn MetaStore>,
    keys: Keys,
    metadata: MetadataCache,
    lists: Counter,
}

impl Reflector {
    /// Lists and watches in a loop. Never returns; the caller drops the future to stop the task.
    async fn run(self) {
        let (mut backoff, mut outage) = (Backoff::new(MIN_RETRY_DELAY, MAX_RETRY_DELAY), LogThrottle::default());
        let mut watched_until = clock::monotonic();
        loop {
            match self.list_and_watch().await {
                Ok(watch) => {
                    if outage.recover().is_some() {
                        let seconds = watched_until.elapsed().as_secs();
                        tracing::info!(seconds, "the cluster's metadata was listed again");
                    }
                    if self.apply_watch(watch).await {
                        backoff.reset();
                    }
                    watched_until = clock::monotonic();
                }
                Err(error) => {
                    let seconds = watched_until.elapsed().as_secs();
                    if outage.occur(clock::monotonic()).is_some() {
                        tracing::warn!(
                            %error, seconds,
                            "the cluster's metadata cannot be listed: the last snapshot stays in use; retrying"
                        );
                    } else {
                        tracing::debug!(%error, seconds, "the cluster's metadata still cannot be listed");
                    }
                }
            }
            backoff.pause().await;
        }
    }

    /// Lists the prefix, replaces the content of the snapshot by the list, and opens a watch of the changes after the
    /// list.
    async fn list_and_watch(&self) -> Result<Watch, MetaStoreError> {
        let list = self.store.list(self.keys.prefix()).await?;
        let from = list.revision.next();
        self.lists.inc();
        self.metadata.update_last_contact();
        self.metadata.publish(|state| state.replace(&self.keys, list));
        self.store.watch(self.keys.prefix(), from).await
    }

    /// Applies the watch's changes until the watch ends or a relist is due. Returns false if the watch ended without a
    /// response. The next watch may end in the same way, so the caller then increases the pause before the next full
    /// list.
    async fn apply_watch(&self, mut watch: Watch) -> bool {
        let relist_at = clock::monotonic() + RELIST_INTERVAL;
        let mut received = false;
        loop {
            tokio::select! {
                biased;
                () = tokio::time::sleep_until(relist_at) => return true,
                changes = watch.next() => match changes {
                    Some(Ok(changes)) => {
                        received = true;
                        self.metadata.update_last_contact();
                        // A progress notification at the snapshot's revision changes nothing.
                        if !changes.events.is_empty() || changes.revision > self.metadata.state().revision() {
                            self.metadata.publish(|state| state.apply(&self.keys, changes));
                        }
                    }
                    Some(Err(error)) => {
                        tracing::info!(%error, "the metadata watch failed: relisting");
                        return received;
                    }
                    None => return received,
                },
            }
        }
    }
}

#[cfg(test)]
mod tests;
