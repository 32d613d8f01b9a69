//! In-flight requests that several callers wait for. A started request continues even if no caller waits for it, unless
//! [`SingleFlight::remove_if_abandoned`] has removed it. The request stores its result in a cache for the next caller,
//! so callers with short time limits make progress too.

use std::{collections::BTreeMap, sync::Arc};

use tokio::sync::watch;

use super::error::{TierReadError, TierStoreError};
use crate::task::{Tasks, lock::Mutex};

type Outcome<V> = Option<Result<V, TierReadError>>;

/// In-flight requests by the key of the fetched object. The callers of a request wait for its outcome on a channel.
#[derive(Debug)]
pub(super) struct SingleFlight<K, V> {
    in_flight: Mutex<BTreeMap<K, Arc<watch::Sender<Outcome<V>>>>>,
}

impl<K, V> Default for SingleFlight<K, V> {
    fn default() -> Self {
        Self { in_flight: Mutex::default() }
    }
}

impl<K, V> SingleFlight<K, V>
where
    K: Copy + Ord + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    /// Waits for the request for `key`. If none is in flight, starts one with `load`. Also returns true if the request
    /// was in flight already.
    ///
    /// The caller must have searched its cache for `key`. `load` must search the cache again, because the previous
    /// request may have ended in between, and must store its result in the cache.
    ///
    /// The request is in flight when this function returns. The returned future only waits for it, and returns
    /// `Stopped` if the tasks are stopped.
    pub(super) fn join<L, F>(
        self: &Arc<Self>,
        tasks: &Tasks,
        key: K,
        load: L,
    ) -> impl Future<Output = (Result<V, TierReadError>, bool)> + Send + use<K, V, L, F>
    where
        L: FnOnce() -> F,
        F: Future<Output = Result<V, TierReadError>> + Send + 'static,
    {
        let started = (!tasks.is_cancelled()).then(|| {
            let mut in_flight = self.in_flight.lock();
            if let Some(sender) = in_flight.get(&key) {
                return (sender.subscribe(), true);
            }
            let sender = Arc::new(watch::Sender::new(None));
            let outcome = sender.subscribe();
            in_flight.insert(key, Arc::clone(&sender));
            self.spawn(tasks, key, sender, load());
            (outcome, false)
        });
        async move {
            let stopped = || Err(TierStoreError::Stopped.into());
            let Some((mut outcome, joined)) = started else { return (stopped(), false) };
            let result = outcome.wait_for(Option::is_some).await;
            let result = result.map_or_else(|_| stopped(), |result| result.clone().expect("the wait is over"));
            (result, joined)
        }
    }

    /// Runs `load` as a task, removes the request at its end, and sends the result to all callers.
    fn spawn<F>(self: &Arc<Self>, tasks: &Tasks, key: K, sender: Arc<watch::Sender<Outcome<V>>>, load: F)
    where
        F: Future<Output = Result<V, TierReadError>> + Send + 'static,
    {
        let (flights, stop) = (Arc::clone(self), tasks.clone());
        // The task would hold the future, which is large, three times.
        let load = Box::pin(load);
        tasks.spawn("tier-fetch", async move {
            let outcome = stop.run_until_cancelled(load).await.unwrap_or_else(|| Err(TierStoreError::Stopped.into()));
            flights.remove(key, &sender);
            sender.send_replace(Some(outcome));
        });
    }

    /// Called by a request that has not begun its work. If no caller waits for the request, removes it and returns
    /// true: the request must then end, and the next caller starts another one.
    pub(super) fn remove_if_abandoned(&self, key: K) -> bool {
        let mut in_flight = self.in_flight.lock();
        let abandoned = in_flight.get(&key).is_none_or(|sender| sender.receiver_count() == 0);
        if abandoned {
            in_flight.remove(&key);
        }
        abandoned
    }

    /// Removes the request of `sender`, if it is still the one for `key`. A later request for the same key stays.
    fn remove(&self, key: K, sender: &Arc<watch::Sender<Outcome<V>>>) {
        let mut in_flight = self.in_flight.lock();
        if in_flight.get(&key).is_some_and(|current| Arc::ptr_eq(current, sender)) {
            in_flight.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;
    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn request_continues_without_caller_and_next_one_joins() {
        let (flights, tasks) = (Arc::new(SingleFlight::<u32, u32>::default()), Tasks::new());
        let (finish, finished) = oneshot::channel();
        let load = || async move { Ok(finished.await.expect("the request completes")) };
        assert!(flights.join(&tasks, 1, load).now_or_never().is_none(), "the caller leaves");
        let second_call = flights.join(&tasks, 1, || async { unreachable!("a request is in flight") });
        let (joined, ()) = tokio::join!(second_call, async {
            finish.send(7).expect("the request continues");
        });
        assert!(matches!(joined, (Ok(7), true)));
        assert!(flights.in_flight.lock().is_empty());
        tasks.stop().await;
        assert!(matches!(flights.join(&tasks, 1, || async { Ok(1) }).await.0, Err(TierReadError::Store(_))));
    }

    #[tokio::test]
    async fn abandoned_request_does_not_end_the_one_after_it() {
        let (flights, tasks) = (Arc::new(SingleFlight::<u32, u32>::default()), Tasks::new());
        let (finish, finished) = oneshot::channel::<u32>();
        let first = || async move { Ok(finished.await.expect("the request completes")) };
        assert!(flights.join(&tasks, 1, first).now_or_never().is_none());
        assert!(flights.remove_if_abandoned(1));
        let (second, pending) = oneshot::channel::<u32>();
        let load = || async move { Ok(pending.await.expect("the request completes")) };
        let mut waiting = Box::pin(flights.join(&tasks, 1, load));
        assert!(waiting.as_mut().now_or_never().is_none());
        finish.send(1).expect("the request continues");
        tokio::task::yield_now().await;
        assert!(!flights.remove_if_abandoned(1), "the second request is in flight");
        second.send(2).expect("the request continues");
        assert!(matches!(waiting.await, (Ok(2), false)));
        tasks.stop().await;
    }
}
