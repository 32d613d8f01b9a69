//! Retry status of a client, for its user: the problems that block the client's work while it retries.
//!
//! A producer, consumer or call reports a problem here when an attempt fails. The reporter clears the problem when the
//! work succeeds, fails or ends. [`super::Client::retries`] shows one problem at a time. A shown problem stays until it
//! is cleared; newer problems are shown after it. No retry depends on this module.

use std::{collections::BTreeMap, sync::Arc};

use tokio::{sync::watch, time::Instant};

use crate::task::{clock, lock::Mutex};

/// Work that failed and is being retried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetryStatus {
    /// Error message with the topic, partition or address that it concerns, for people.
    pub problem: String,
    /// Time of the first failure. The problem may have changed since.
    pub since: Instant,
    /// Time at which the retries end; `None` if there is no limit.
    pub until: Option<Instant>,
}

/// Key of one piece of work: number of the reporter, and the number that the reporter uses for the work.
type RetryKey = (u64, u64);

#[derive(Debug, Default)]
struct RetryEntries {
    next_reporter: u64,
    /// Key of the entry that the watch shows; `None` if there is no entry.
    shown: Option<RetryKey>,
    by_key: BTreeMap<RetryKey, RetryStatus>,
}

/// Retry status of all work of one client.
#[derive(Debug)]
pub(super) struct RetryRegistry {
    entries: Mutex<RetryEntries>,
    shown: watch::Sender<Option<RetryStatus>>,
}

impl RetryRegistry {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self { entries: Mutex::default(), shown: watch::Sender::new(None) })
    }

    pub(super) fn watch(&self) -> watch::Receiver<Option<RetryStatus>> {
        self.shown.subscribe()
    }

    /// Creates a reporter with a number of its own.
    pub(super) fn reporter(self: &Arc<Self>) -> RetryReporter {
        let mut entries = self.entries.lock();
        entries.next_reporter += 1;
        RetryReporter { registry: self.clone(), number: entries.next_reporter }
    }

    /// Changes the entries and publishes the shown problem. The oldest problem becomes the shown one if none was shown,
    /// or if the shown entry was removed.
    fn change(&self, change: impl FnOnce(&mut BTreeMap<RetryKey, RetryStatus>)) {
        let mut entries = self.entries.lock();
        change(&mut entries.by_key);
        if entries.shown.is_none_or(|shown| !entries.by_key.contains_key(&shown)) {
            entries.shown = entries.by_key.iter().min_by_key(|(_, status)| status.since).map(|(key, _)| *key);
        }
        let shown = entries.shown.and_then(|key| entries.by_key.get(&key));
        // The value is sent under the lock, so that the last change is the last value shown.
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
pub(super) struct RetryReporter {
    registry: Arc<RetryRegistry>,
    number: u64,
}

impl RetryReporter {
    /// Reports that a piece of work failed and will be retried, until the deadline `until` if there is one. A repeated
    /// report keeps the time of the first failure.
    pub(super) fn report(&self, work: u64, problem: String, until: Option<Instant>) {
        self.registry.change(|entries| {
            let since = entries.get(&(self.number, work)).map_or_else(clock::monotonic, |entry| entry.since);
            entries.insert((self.number, work), RetryStatus { problem, since, until });
        });
    }

    /// Clears the entry of a piece of work that succeeded, failed or was abandoned.
    pub(super) fn clear(&self, work: u64) {
        self.registry.change(|entries| {
            entries.remove(&(self.number, work));
        });
    }
}

impl Drop for RetryReporter {
    fn drop(&mut self) {
        self.registry.change(|entries| entries.retain(|(reporter, _), _| *reporter != self.number));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn oldest_problem_is_shown_until_cleared() {
        let retries = RetryRegistry::new();
        let watch = retries.watch();
        let shown = || watch.borrow().as_ref().map(|status| status.problem.clone());
        let (producer, consumer) = (retries.reporter(), retries.reporter());
        assert_eq!(shown(), None);
        let start = clock::monotonic();
        consumer.report(7, "a".to_owned(), None);
        tokio::time::advance(Duration::from_secs(1)).await;
        producer.report(1, "b".to_owned(), Some(start));
        assert_eq!(shown().as_deref(), Some("a"), "a newer problem does not replace it");
        consumer.report(7, "c".to_owned(), None);
        assert_eq!(shown().as_deref(), Some("c"), "the problem has another cause");
        assert_eq!(watch.borrow().as_ref().map(|status| status.since), Some(start), "the problem is the same");
        consumer.clear(7);
        assert_eq!(shown().as_deref(), Some("b"));
        drop(producer);
        assert_eq!(shown(), None, "a dropped reporter clears its entries");
    }
}
