//! Checks that many callers request at the same time. Callers that wait for a check of the same key share one check and
//! its outcome. The callers provide the check as a future; this file does no I/O.

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::sync::Semaphore;

use crate::task::lock::Mutex;

/// Checks by key. One check of each key runs at a time, and a bounded number of checks in total.
pub(super) struct SharedChecks<K, T> {
    /// Permits for concurrent checks.
    permits: Semaphore,
    checks: Mutex<BTreeMap<K, Weak<KeyChecks<T>>>>,
}

/// Checks of one key. Exists while a caller of this key waits.
struct KeyChecks<T> {
    /// Number of checks that have started.
    started: AtomicU64,
    /// Number and outcome of the last completed check. The caller that runs a check holds the lock, also while it waits
    /// for its permit.
    last: tokio::sync::Mutex<Option<(u64, T)>>,
}

impl<K: Ord, T: Clone> SharedChecks<K, T> {
    /// Allows at most `max` concurrent checks.
    pub(super) fn new(max: usize) -> Self {
        Self { permits: Semaphore::new(max), checks: Mutex::default() }
    }

    /// Returns the outcome of a check that starts after this call, because a check in progress may have observed an
    /// older state than the caller. The first waiting caller runs its `check`, and the other callers get its outcome.
    pub(super) async fn run<F>(&self, key: K, check: impl FnOnce() -> F) -> T
    where
        F: Future<Output = T>,
    {
        let checks = self.of(key);
        let started_before = checks.started.load(Ordering::SeqCst);
        let mut last = checks.last.lock().await;
        if let Some((number, outcome)) = &*last
            && *number > started_before
        {
            return outcome.clone();
        }
        let _permit = self.permits.acquire().await.expect("the semaphore is never closed");
        let number = checks.started.fetch_add(1, Ordering::SeqCst) + 1;
        let outcome = check().await;
        *last = Some((number, outcome.clone()));
        outcome
    }

    /// Returns the checks of a key, and creates them if there are none. Removes the entries of keys without waiting
    /// callers.
    fn of(&self, key: K) -> Arc<KeyChecks<T>> {
        let mut checks = self.checks.lock();
        checks.retain(|_, of_key| of_key.strong_count() > 0);
        if let Some(of_key) = checks.get(&key).and_then(Weak::upgrade) {
            return of_key;
        }
        let of_key = Arc::new(KeyChecks { started: AtomicU64::new(0), last: tokio::sync::Mutex::default() });
        checks.insert(key, Arc::downgrade(&of_key));
        of_key
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::atomic::AtomicUsize, time::Duration};

    use futures::{StreamExt as _, stream::FuturesUnordered};

    use super::*;
    use crate::task::clock;

    /// Duration of one check.
    const CHECK_DELAY: Duration = Duration::from_secs(1);

    /// Regression: each report about a live broker was probed on its own, so a flood of such reports delayed a true
    /// report about another broker.
    #[tokio::test(start_paused = true)]
    async fn callers_of_one_key_share_one_check() {
        let (checks, runs) = (SharedChecks::new(1), AtomicUsize::new(0));
        let check = |key: u32| {
            let runs = &runs;
            checks.run(key, async move || {
                runs.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(CHECK_DELAY).await;
                key
            })
        };
        let began = clock::monotonic();
        let flood: FuturesUnordered<_> = (0..1000).map(|_| check(1)).collect();
        let (outcomes, late) = tokio::join!(flood.collect::<Vec<_>>(), async {
            tokio::time::sleep(CHECK_DELAY / 2).await;
            let outcome = check(2).await;
            (outcome, began.elapsed())
        });
        assert_eq!(outcomes, [1; 1000]);
        // Key 1 has two checks: one for its first caller, and one for the callers that arrived during that check. Key 2
        // has one check, which waits for the first check of key 1 only.
        assert_eq!((late, runs.into_inner()), ((2, 2 * CHECK_DELAY), 3));
        assert_eq!(checks.checks.lock().values().filter(|check| check.strong_count() > 0).count(), 0);
    }

    /// A process may respond to a probe and exit during it. So a report that arrives during a probe needs a new probe.
    #[tokio::test(start_paused = true)]
    async fn caller_during_check_gets_next_outcome() {
        let (checks, runs) = (SharedChecks::new(4), AtomicUsize::new(0));
        let check = async |after: Duration| {
            tokio::time::sleep(after).await;
            checks
                .run((), async || {
                    let number = runs.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(CHECK_DELAY).await;
                    number
                })
                .await
        };
        let (first, second, third) =
            tokio::join!(check(Duration::ZERO), check(CHECK_DELAY / 2), check(CHECK_DELAY / 3));
        assert_eq!((first, second, third), (0, 1, 1));
    }

    /// If the caller that runs a check is dropped, the next waiting caller runs its own check.
    #[tokio::test(start_paused = true)]
    async fn dropped_check_is_run_by_next_caller() {
        let checks = SharedChecks::new(1);
        let check = |number: u32| {
            checks.run((), async move || {
                tokio::time::sleep(CHECK_DELAY).await;
                number
            })
        };
        let (dropped, outcome) = tokio::join!(tokio::time::timeout(CHECK_DELAY / 2, check(1)), check(2));
        assert!(dropped.is_err());
        assert_eq!(outcome, 2);
    }
}
