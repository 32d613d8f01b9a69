//! What stands in the way of a client's work while it tries again: for the person who waits.
//!
//! Retries are silent by nature, and a person who waits must know for what. Whoever retries enters here what went wrong
//! and leaves once it works, has been given up, or ends; [`super::Client::trouble`] shows one trouble at a time, the one
//! that is there already before any newer one. Nothing here decides anything.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use tokio::{sync::watch, time::Instant};

use super::lock::lock;
use crate::task::clock;

/// Something that failed and is being tried again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// What is wrong, and where: for people.
    pub problem: String,
    /// Since when it has not worked. The problem may have changed meanwhile.
    pub since: Instant,
    /// When it is given up; none where it is tried for ever.
    pub until: Option<Instant>,
}

/// Which work is in trouble: whose, and which of its own.
type Key = (u64, u64);

#[derive(Debug, Default)]
struct Entries {
    next_party: u64,
    /// What the watch shows.
    shown: Option<Key>,
    all: BTreeMap<Key, Trouble>,
}

/// The troubles of one client.
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

    /// Somebody who retries.
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
        // Under the lock, so that the last change is the last shown.
        self.shown.send_if_modified(|old| {
            let modified = old.as_ref() != shown;
            if modified {
                *old = shown.cloned();
            }
            modified
        });
    }
}

/// One producer, consumer or call. What it entered goes with it.
#[derive(Debug)]
pub(super) struct Party {
    troubles: Arc<Troubles>,
    number: u64,
}

impl Party {
    /// A piece of work failed and will be tried again, until that moment if there is one.
    pub(super) fn enter(&self, work: u64, problem: String, until: Option<Instant>) {
        self.troubles.change(|all| {
            let since = all.get(&(self.number, work)).map_or_else(clock::monotonic, |old| old.since);
            all.insert((self.number, work), Trouble { problem, since, until });
        });
    }

    /// It worked, or nobody waits for it any more.
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
    async fn the_oldest_trouble_is_shown_until_it_is_over() {
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
