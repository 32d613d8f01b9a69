//! Retry status of a client, for its user: the problems that block the client's work while it retries.
//!
//! A producer, consumer or call reports a problem here when an attempt fails. It clears the problem when the work
//! succeeds, fails or ends. [`super::Client::trouble`] shows one problem at a time; a problem that is shown stays until
//! it is cleared, before newer ones. Nothing here decides anything.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use tokio::{sync::watch, time::Instant};

use super::lock::lock;
use crate::task::clock;

/// Work that failed and is being retried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// Error message with the place of the problem, for people.
    pub problem: String,
    /// Time of the first failure. The problem may have changed since.
    pub since: Instant,
    /// Time at which the retries end; `None` if there is no limit.
    pub until: Option<Instant>,
}

/// Key of one piece of work: the reporter's number, and the reporter's own number for the work.
type Key = (u64, u64);

#[derive(Debug, Default)]
struct Entries {
    next_party: u64,
    /// Key of the entry that the watch shows.
    shown: Option<Key>,
    all: BTreeMap<Key, Trouble>,
}

/// Retry status of all work of one client.
#[derive(Debug)]
pub(super) struct Troubles {
    entries: Mutex<Entries>,
    shown: watch::Sender<Option<Trouble>>,
}

impl Troubles {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self { entries: Mutex::default(), shown: watch::Sender::new(None) })
    }

    pub(super) fn watch(&self) -> watch::Receiver<Option<Trouble>> {
        self.shown.subscribe()
    }

    /// Creates a reporter.
    pub(super) fn party(self: &Arc<Self>) -> Party {
        let mut entries = lock(&self.entries);
        entries.next_party += 1;
        Party { troubles: self.clone(), number: entries.next_party }
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<Key, Trouble>)) {
        let mut entries = lock(&self.entries);
        change(&mut entries.all);
        if entries.shown.is_none_or(|shown| !entries.all.contains_key(&shown)) {
            entries.shown = entries.all.iter().min_by_key(|(_, trouble)| trouble.since).map(|(key, _)| *key);
        }
        let shown = entries.shown.and_then(|key| entries.all.get(&key));
        // Sent under the lock, so that the last change is the last value shown.
        self.shown.send_if_modified(|old| {
            let modified = old.as_ref() != shown;
            if modified {
                *old = shown.cloned();
            }
            modified
        });
    }
}

/// Reporter of one producer, consumer or call. Dropping it clears its entries.
#[derive(Debug)]
pub(super) struct Party {
    troubles: Arc<Troubles>,
    number: u64,
}

impl Party {
    /// Records that a piece of work failed and will be retried, until the deadline `until` if there is one.
    pub(super) fn enter(&self, work: u64, problem: String, until: Option<Instant>) {
        self.troubles.change(|all| {
            let since = all.get(&(self.number, work)).map_or_else(clock::monotonic, |old| old.since);
            all.insert((self.number, work), Trouble { problem, since, until });
        });
    }

    /// Clears the entry of a piece of work that succeeded or is no longer waited for.
    pub(super) fn leave(&self, work: u64) {
        self.troubles.change(|all| {
            all.remove(&(self.number, work));
        });
    }
}

impl Drop for Party {
    fn drop(&mut self) {
        self.troubles.change(|all| all.retain(|(party, _), _| *party != self.number));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn oldest_problem_is_shown_until_cleared() {
        let troubles = Troubles::new();
        let watch = troubles.watch();
        let shown = || watch.borrow().as_ref().map(|trouble| trouble.problem.clone());
        let (producer, consumer) = (troubles.party(), troubles.party());
        assert_eq!(shown(), None);
        let start = clock::monotonic();
        consumer.enter(7, "a".to_owned(), None);
        tokio::time::advance(Duration::from_secs(1)).await;
        producer.enter(1, "b".to_owned(), Some(start));
        assert_eq!(shown().as_deref(), Some("a"), "a newer one does not take its place");
        consumer.enter(7, "c".to_owned(), None);
        assert_eq!(shown().as_deref(), Some("c"), "its cause changed");
        assert_eq!(watch.borrow().as_ref().map(|trouble| trouble.since), Some(start), "it is the same trouble");
        consumer.leave(7);
        assert_eq!(shown().as_deref(), Some("b"));
        drop(producer);
        assert_eq!(shown(), None, "what it entered goes with it");
    }
}
