//! The metadata cache: a broker's copy of the cluster's prefix, which serves lookups without requests to the store.
//!
//! # Overview
//!
//! One task lists the prefix, then watches it from the list's revision on. The task relists when the watch is compacted
//! or breaks, and at intervals. Each change is published twice: as a whole snapshot ([`View::state`], [`View::watch`])
//! and as the changed keys ([`View::feed`]). The cost of a change depends on the size of the change, not on the size of
//! the metadata.
//!
//! # Invariants
//!
//! - The revision never falls: events and lists older than the snapshot change nothing.
//! - A snapshot is consistent: it never contains half a transaction.
//! - While the store does not respond, the snapshot stays as it is.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{broadcast, watch},
    time::Instant,
};

use super::{
    keys::{Key, Keys},
    store::{MetaStore, Revision, StoreError, Watch},
};
use crate::{
    model::PartitionId,
    task::{Tasks, clock},
    telemetry::Counter,
};

mod state;

pub use state::{Known, PartitionEntry, ViewState};

/// Interval of lists without a detected problem.
const RELIST: Duration = Duration::from_secs(600);

/// Pauses between attempts while the store does not respond or its watches end early: the first and the longest.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

/// Interval at which a continuing outage is logged.
const REMIND: Duration = Duration::from_secs(60);

/// Maximum number of changes that a feed may lag before it starts over.
const FEED_MOVES: usize = 1024;

/// A handle of the metadata cache. Cheap to clone.
#[derive(Clone, Debug)]
pub struct View {
    state: Arc<watch::Sender<Arc<ViewState>>>,
    moves: broadcast::Sender<Arc<[Key]>>,
    /// Time of the last response or event from the store.
    heard: Arc<Mutex<Instant>>,
}

/// One change from a feed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Moved {
    /// Anything may have changed: read the whole snapshot. Every feed starts with this value, and repeats it after it
    /// lagged too far.
    Everything,
    /// These keys changed. The snapshot is at least as new; look up their current values there.
    Keys(Arc<[Key]>),
}

/// A stream of changed keys.
#[derive(Debug)]
pub struct Feed {
    moves: broadcast::Receiver<Arc<[Key]>>,
    started: bool,
}

impl Feed {
    /// Returns the next change; `None` when the cache was stopped. Cancel safe: dropping the future loses no change.
    pub async fn next(&mut self) -> Option<Moved> {
        if !self.started {
            self.started = true;
            return Some(Moved::Everything);
        }
        match self.moves.recv().await {
            Ok(keys) => Some(Moved::Keys(keys)),
            Err(broadcast::error::RecvError::Lagged(_)) => {
                self.moves = self.moves.resubscribe();
                Some(Moved::Everything)
            }
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}

impl View {
    /// Starts the cache, which is empty at first: see [`View::reached`].
    pub fn start(store: Arc<dyn MetaStore>, keys: Keys, tasks: &Tasks) -> Self {
        Self::counted(store, keys, tasks, Counter::default())
    }

    /// Like [`View::start`], with a counter of lists.
    pub fn counted(store: Arc<dyn MetaStore>, keys: Keys, tasks: &Tasks, listings: Counter) -> Self {
        let view = Self {
            state: Arc::new(watch::Sender::default()),
            moves: broadcast::Sender::new(FEED_MOVES),
            heard: Arc::new(Mutex::new(clock::monotonic())),
        };
        let mirror = Mirror { store, keys, view: view.clone(), listings };
        let stop = tasks.clone();
        tasks.spawn("cluster view", async move {
            tokio::select! {
                biased;
                () = stop.cancelled() => {}
                () = mirror.run() => {}
            }
        });
        view
    }

    /// Returns the current snapshot. Drop it soon: while it is held, each change copies the tables that it touches.
    pub fn state(&self) -> Arc<ViewState> {
        self.state.borrow().clone()
    }

    /// Returns a receiver of the snapshots.
    pub fn watch(&self) -> watch::Receiver<Arc<ViewState>> {
        self.state.subscribe()
    }

    /// Returns a feed of the changed keys from now on, which starts with [`Moved::Everything`].
    pub fn feed(&self) -> Feed {
        Feed { moves: self.moves.subscribe(), started: false }
    }

    /// Returns the time since the store last sent anything, progress notifications included. It grows while the cache
    /// is disconnected. The embedded store sends only changes.
    pub fn silence(&self) -> Duration {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }

    fn hear(&self) {
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner) = clock::monotonic();
    }

    /// Returns the entry of a partition, if the partition counts.
    pub fn partition(&self, id: PartitionId) -> Option<PartitionEntry> {
        self.state.borrow().partition(id).cloned()
    }

    /// Waits until the snapshot has this revision, or for a revision of 1 or less until the first list. Does not return
    /// while the store is unavailable: bound the wait.
    pub async fn reached(&self, revision: Revision) {
        self.until(|state| state.revision() >= revision.max(Revision(1))).await;
    }

    /// Waits until the snapshot satisfies a condition. Bound this wait too.
    pub async fn until(&self, holds: impl Fn(&ViewState) -> bool) {
        let mut states = self.state.subscribe();
        // `self` owns the sender, so the channel cannot close.
        let _state = states.wait_for(|state| holds(state)).await;
    }

    fn publish(&self, change: impl FnOnce(&mut ViewState) -> Vec<Key>) {
        let mut changed = Vec::new();
        // In place unless a snapshot is held: so a change costs only what it changes.
        self.state.send_modify(|state| changed = change(Arc::make_mut(state)));
        if !changed.is_empty() {
            // An error means that there are no receivers.
            let _listeners = self.moves.send(changed.into());
        }
    }
}

struct Mirror {
    store: Arc<dyn MetaStore>,
    keys: Keys,
    view: View,
    listings: Counter,
}

impl Mirror {
    async fn run(self) {
        let (mut wait, mut trouble) = (BACKOFF.0, Trouble::default());
        loop {
            match self.list().await {
                Ok(watch) => {
                    trouble.over();
                    if self.follow(watch).await {
                        wait = BACKOFF.0;
                    }
                }
                Err(error) => {
                    trouble.with(&error);
                }
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(BACKOFF.1);
        }
    }

    async fn list(&self) -> Result<Watch, StoreError> {
        let listing = self.store.list(self.keys.prefix()).await?;
        let from = listing.revision.next();
        self.listings.inc();
        self.view.hear();
        self.view.publish(|state| state.replace(&self.keys, listing));
        self.store.watch(self.keys.prefix(), from).await
    }

    /// Applies the watch's changes until the watch ends or a relist is due. Returns false if the watch returned no
    /// changes: the next watch may end the same way, and a full list is expensive.
    async fn follow(&self, mut watch: Watch) -> bool {
        let relist = clock::monotonic() + RELIST;
        let mut said = false;
        loop {
            tokio::select! {
                biased;
                () = tokio::time::sleep_until(relist) => return true,
                changes = watch.next() => match changes {
                    Some(Ok(changes)) => {
                        said = true;
                        self.view.hear();
                        if !changes.events.is_empty() || changes.revision > self.view.state().revision() {
                            self.view.publish(|state| state.apply(&self.keys, changes));
                        }
                    }
                    Some(Err(error)) => {
                        tracing::info!(%error, "the metadata watch broke; listing again");
                        return said;
                    }
                    None => return said,
                },
            }
        }
    }
}

/// Log of an outage of the store: at its start, at intervals and at its end.
#[derive(Default)]
struct Trouble {
    begun: Option<Instant>,
    said: Option<Instant>,
}

impl Trouble {
    fn with(&mut self, error: &StoreError) {
        let now = clock::monotonic();
        let seconds = now.duration_since(*self.begun.get_or_insert(now)).as_secs();
        if self.said.is_some_and(|said| now.duration_since(said) < REMIND) {
            tracing::debug!(%error, seconds, "the cluster's metadata could not be listed again");
            return;
        }
        self.said = Some(now);
        tracing::warn!(
            %error, seconds,
            "the cluster's metadata could not be listed; what was known counts until it can, and it is tried again"
        );
    }

    fn over(&mut self) {
        if let Some(begun) = std::mem::take(self).begun {
            tracing::info!(seconds = begun.elapsed().as_secs(), "the cluster's metadata was listed again");
        }
    }
}

#[cfg(test)]
mod tests;
