//! Checks that many callers ask for at the same time. All callers of one key that wait share one check and its outcome. No I/O of its own.

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::sync::Semaphore;

/// Checks by key. One check of a key runs at a time, and a bounded number of all.
pub(super) struct SharedChecks<K, T> {
    turns: Semaphore,
    checks: Mutex<BTreeMap<K, Weak<Check<T>>>>,
}

/// The checks of one key, while somebody waits for one.
struct Check<T> {
    /// How many have begun.
    begun: AtomicU64,
    /// Number and outcome of the last that ended. Locked by the caller that runs a check, also while it waits for its turn.
    last: tokio::sync::Mutex<Option<(u64, T)>>,
}

impl<K: Ord, T: Clone> SharedChecks<K, T> {
    /// At most `max` checks at the same time.
    pub(super) fn new(max: usize) -> Self {
        Self { turns: Semaphore::new(max), checks: Mutex::default() }
    }

    /// The outcome of a check that begins after this call: what a check under way has seen may be older than the caller's knowledge. Of
    /// the callers that wait, the first runs it.
    pub(super) async fn run<F>(&self, key: K, check: impl FnOnce() -> F) -> T
    where
        F: Future<Output = T>,
    {
        let checks = self.of(key);
        let before = checks.begun.load(Ordering::SeqCst);
        let mut last = checks.last.lock().await;
        if let Some((number, outcome)) = &*last
            && *number > before
        {
            return outcome.clone();
        }
        let _turn = self.turns.acquire().await.expect("it is never closed");
        let number = checks.begun.fetch_add(1, Ordering::SeqCst) + 1;
        let outcome = check().await;
        *last = Some((number, outcome.clone()));
        outcome
    }

    /// The checks of a key. Those of keys that nobody waits for are forgotten.
    fn of(&self, key: K) -> Arc<Check<T>> {
        let mut checks = self.checks.lock().unwrap_or_else(PoisonError::into_inner);
        checks.retain(|_, check| check.strong_count() > 0);
        if let Some(check) = checks.get(&key).and_then(Weak::upgrade) {
            return check;
        }
        let check = Arc::new(Check { begun: AtomicU64::new(0), last: tokio::sync::Mutex::default() });
        checks.insert(key, Arc::downgrade(&check));
        check
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::atomic::AtomicUsize, time::Duration};

    use futures::{StreamExt as _, stream::FuturesUnordered};

    use super::*;
    use crate::task::clock;

    /// How long one check takes.
    const CHECK: Duration = Duration::from_secs(1);

    /// A flood of reports about live brokers kept a true report waiting for as long as all of their probes took.
    #[tokio::test(start_paused = true)]
    async fn flood_about_one_key_takes_one_turn() {
        let (checks, runs) = (SharedChecks::new(1), AtomicUsize::new(0));
        let check = |key: u32| {
            let runs = &runs;
            checks.run(key, async move || {
                runs.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(CHECK).await;
                key
            })
        };
        let began = clock::monotonic();
        let flood: FuturesUnordered<_> = (0..1000).map(|_| check(1)).collect();
        let (outcomes, late) = tokio::join!(flood.collect::<Vec<_>>(), async {
            tokio::time::sleep(CHECK / 2).await;
            let outcome = check(2).await;
            (outcome, began.elapsed())
        });
        assert_eq!(outcomes, [1; 1000]);
        // One for the first of the flood, one for those that came during it, and one for the other key, which waits for the first alone.
        assert_eq!((late, runs.into_inner()), ((2, 2 * CHECK), 3));
        assert_eq!(checks.checks.lock().unwrap().values().filter(|check| check.strong_count() > 0).count(), 0);
    }

    /// A process that exits while it is probed may have answered that probe: a report that comes then is about a later moment.
    #[tokio::test(start_paused = true)]
    async fn caller_that_comes_during_a_check_gets_the_next_one() {
        let (checks, runs) = (SharedChecks::new(4), AtomicUsize::new(0));
        let check = async |after: Duration| {
            tokio::time::sleep(after).await;
            checks
                .run((), async || {
                    let number = runs.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(CHECK).await;
                    number
                })
                .await
        };
        let (first, second, third) = tokio::join!(check(Duration::ZERO), check(CHECK / 2), check(CHECK / 3));
        assert_eq!((first, second, third), (0, 1, 1));
    }

    /// A caller that goes away takes no outcome with it.
    #[tokio::test(start_paused = true)]
    async fn check_that_was_dropped_is_run_by_the_next_caller() {
        let checks = SharedChecks::new(1);
        let check = |number: u32| {
            checks.run((), async move || {
                tokio::time::sleep(CHECK).await;
                number
            })
        };
        let (dropped, outcome) = tokio::join!(tokio::time::timeout(CHECK / 2, check(1)), check(2));
        assert!(dropped.is_err());
        assert_eq!(outcome, 2);
    }
}
