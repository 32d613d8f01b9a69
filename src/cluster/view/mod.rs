//! The mirror of the cluster's prefix: where everyone looks, so that nobody asks the store.
//!
//! # Overview
//!
//! One task lists the prefix, then watches it from the listing's revision on. It lists again when the watch is compacted
//! or breaks, and from time to time anyway. Each move is published twice: as the whole state ([`View::state`],
//! [`View::watch`]) and as the keys that changed ([`View::feed`]). A move costs what changed, however much there is.
//!
//! # Invariants
//!
//! - The revision never goes back: what is older than the state changes nothing, whoever sends it.
//! - A state is whole: no transaction is ever half in it.
//! - While the store does not answer, the state stays as it is.

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

/// How often the prefix is listed again though nothing seems wrong.
const RELIST: Duration = Duration::from_secs(600);

/// The waits between attempts while the store does not answer, or its watches end without a word.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

/// How often it is said again that the store does not answer.
const REMIND: Duration = Duration::from_secs(60);

/// How many moves a feed may lie behind before it starts over.
const FEED_MOVES: usize = 1024;

/// A handle of the mirror. Cheap to clone.
#[derive(Clone, Debug)]
pub struct View {
    state: Arc<watch::Sender<Arc<ViewState>>>,
    moves: broadcast::Sender<Arc<[Key]>>,
    /// When the store last let it know anything.
    heard: Arc<Mutex<Instant>>,
}

/// What a feed says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Moved {
    /// Anything may have changed: look at the whole state. The first answer of every feed, and the answer to one that
    /// lay too far behind.
    Everything,
    /// These keys changed. The state is at least as new; look up what they are now.
    Keys(Arc<[Key]>),
}

/// The keys that change, move by move.
#[derive(Debug)]
pub struct Feed {
    moves: broadcast::Receiver<Arc<[Key]>>,
    started: bool,
}

impl Feed {
    /// The next move; `None` when the mirror was stopped. May be dropped at any moment without losing any.
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
    /// Starts the mirror. It is empty at first: see [`View::reached`].
    pub fn start(store: Arc<dyn MetaStore>, keys: Keys, tasks: &Tasks) -> Self {
        Self::counted(store, keys, tasks, Counter::default())
    }

    /// As [`View::start`]; listings are counted.
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

    /// The state now. Let go of it soon: while it is held, changes copy the tables that they touch.
    pub fn state(&self) -> Arc<ViewState> {
        self.state.borrow().clone()
    }

    /// The state and its changes.
    pub fn watch(&self) -> watch::Receiver<Arc<ViewState>> {
        self.state.subscribe()
    }

    /// The keys that change from now on; its first answer says to look at everything.
    pub fn feed(&self) -> Feed {
        Feed { moves: self.moves.subscribe(), started: false }
    }

    /// How long the store has said nothing, not even that nothing changed. It grows while the mirror is cut off; the embedded
    /// store speaks only of changes.
    pub fn silence(&self) -> Duration {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }

    fn hear(&self) {
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner) = clock::monotonic();
    }

    /// What is known of a partition that counts.
    pub fn partition(&self, id: PartitionId) -> Option<PartitionEntry> {
        self.state.borrow().partition(id).cloned()
    }

    /// Waits until the mirror holds this revision; with 1 or less, until it holds anything. It does not end
    /// while the store does not answer: bound it.
    pub async fn reached(&self, revision: Revision) {
        self.until(|state| state.revision() >= revision.max(Revision(1))).await;
    }

    /// Waits until the mirror is so. Bound it as well.
    pub async fn until(&self, holds: impl Fn(&ViewState) -> bool) {
        let mut states = self.state.subscribe();
        // The sender lives in `self`, so the channel cannot close.
        let _state = states.wait_for(|state| holds(state)).await;
    }

    fn publish(&self, change: impl FnOnce(&mut ViewState) -> Vec<Key>) {
        let mut changed = Vec::new();
        // In place unless somebody holds the state: that is what makes a move cost what changed.
        self.state.send_modify(|state| changed = change(Arc::make_mut(state)));
        if !changed.is_empty() {
            // An error means that nobody listens.
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

    /// Applies what the watch says until it ends or it is time to list again. False when it said nothing: a listing of everything is
    /// dear, and the next watch may end in the same way.
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

/// A store that does not answer: said at once, now and then while it lasts, and when it is over.
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
