//! In-flight requests that several callers wait for. A request that has started continues when its callers leave. Its result is cached, and
//! the next caller finds it, even if the time limits of all callers are short.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;

use super::{read::ReadError, store::StoreError};
use crate::task::Tasks;

type Outcome<V> = Option<Result<V, ReadError>>;

/// In-flight requests by the key of the fetched object.
#[derive(Debug)]
pub(super) struct Flights<K, V> {
    under_way: Mutex<BTreeMap<K, Arc<watch::Sender<Outcome<V>>>>>,
}

impl<K, V> Default for Flights<K, V> {
    fn default() -> Self {
        Self { under_way: Mutex::default() }
    }
}

impl<K, V> Flights<K, V>
where
    K: Copy + Ord + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    /// Waits for the request for `key`. If none is in flight, starts one with `load`. Also returns true if the request was in flight
    /// already.
    ///
    /// `load` stores its result where the next caller looks first. `load` also looks there itself: the previous request may have ended
    /// after the caller looked.
    ///
    /// The request is in flight when this function returns. The returned future only waits for it.
    pub(super) fn join<L, F>(
        self: &Arc<Self>,
        tasks: &Tasks,
        key: K,
        load: L,
    ) -> impl Future<Output = (Result<V, ReadError>, bool)> + Send + use<K, V, L, F>
    where
        L: FnOnce() -> F,
        F: Future<Output = Result<V, ReadError>> + Send + 'static,
    {
        let begun = (!tasks.is_cancelled()).then(|| {
            let mut under_way = self.lock();
            if let Some(sender) = under_way.get(&key) {
                return (sender.subscribe(), true);
            }
            let sender = Arc::new(watch::Sender::new(None));
            let outcome = sender.subscribe();
            under_way.insert(key, Arc::clone(&sender));
            self.spawn(tasks, key, sender, load());
            (outcome, false)
        });
        async move {
            let stopped = || Err(StoreError::Stopped.into());
            let Some((mut outcome, joined)) = begun else { return (stopped(), false) };
            let landed = outcome.wait_for(Option::is_some).await;
            let landed = landed.map_or_else(|_| stopped(), |landed| landed.clone().expect("it was waited for"));
            (landed, joined)
        }
    }

    fn spawn<F>(self: &Arc<Self>, tasks: &Tasks, key: K, sender: Arc<watch::Sender<Outcome<V>>>, load: F)
    where
        F: Future<Output = Result<V, ReadError>> + Send + 'static,
    {
        let (flights, stop) = (Arc::clone(self), tasks.clone());
        tasks.spawn("tier fetch", async move {
            let outcome = tokio::select! {
                biased;
                () = stop.cancelled() => Err(StoreError::Stopped.into()),
                outcome = load => outcome,
            };
            flights.remove(key, &sender);
            sender.send_replace(Some(outcome));
        });
    }

    /// Returns true if every caller has left. The request is then removed, so the next caller starts another one.
    pub(super) fn is_abandoned(&self, key: K) -> bool {
        let mut under_way = self.lock();
        let abandoned = under_way.get(&key).is_none_or(|sender| sender.receiver_count() == 0);
        if abandoned {
            under_way.remove(&key);
        }
        abandoned
    }

    fn remove(&self, key: K, sender: &Arc<watch::Sender<Outcome<V>>>) {
        let mut under_way = self.lock();
        if under_way.get(&key).is_some_and(|known| Arc::ptr_eq(known, sender)) {
            under_way.remove(&key);
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<K, Arc<watch::Sender<Outcome<V>>>>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;
    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn request_continues_without_caller_and_next_one_joins() {
        let (flights, tasks) = (Arc::new(Flights::<u32, u32>::default()), Tasks::new());
        let (land, landing) = oneshot::channel();
        let load = || async move { Ok(landing.await.expect("it lands")) };
        assert!(flights.join(&tasks, 1, load).now_or_never().is_none(), "the caller leaves");
        let again = flights.join(&tasks, 1, || async { unreachable!("it is under way") });
        let (joined, ()) = tokio::join!(again, async {
            land.send(7).expect("it goes on");
        });
        assert!(matches!(joined, (Ok(7), true)));
        assert!(flights.lock().is_empty());
        tasks.stop().await;
        assert!(matches!(flights.join(&tasks, 1, || async { Ok(1) }).await.0, Err(ReadError::Store(_))));
    }

    #[tokio::test]
    async fn abandoned_request_does_not_end_the_one_after_it() {
        let (flights, tasks) = (Arc::new(Flights::<u32, u32>::default()), Tasks::new());
        let (land, landing) = oneshot::channel::<u32>();
        let first = || async move { Ok(landing.await.expect("it lands")) };
        assert!(flights.join(&tasks, 1, first).now_or_never().is_none());
        assert!(flights.is_abandoned(1));
        let (second, pending) = oneshot::channel::<u32>();
        let load = || async move { Ok(pending.await.expect("it lands")) };
        let mut waiting = Box::pin(flights.join(&tasks, 1, load));
        assert!(waiting.as_mut().now_or_never().is_none());
        land.send(1).expect("it goes on");
        tokio::task::yield_now().await;
        assert!(!flights.is_abandoned(1), "the second one is still under way");
        second.send(2).expect("it goes on");
        assert!(matches!(waiting.await, (Ok(2), false)));
        tasks.stop().await;
    }
}
