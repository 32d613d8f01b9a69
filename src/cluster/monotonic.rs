//! A metadata store whose revision never falls: a store that returned to an older state is no longer used.
//!
//! # Overview
//!
//! An etcd that was restored from a backup or replaced by another one responds normally, but its history differs from
//! the one that this broker acted on. [`MonotonicStore`] compares the revision of every linearizable response with the
//! newest revision that any response had contained *before the call started*. The first older response is a regression,
//! and so is another cluster id. From then on every call fails with [`MetaStoreError::Regressed`] until the process
//! restarts.
//!
//! Reordered responses are no regression: a response that was overtaken by a newer one is compared with the revision at
//! the start of its call. Watches, keepalives and status responses are not linearizable, because a lagging member may
//! serve them; they are never compared. A transaction that wrote must be newer than the known revision, not merely
//! equal.
//!
//! # Invariants
//!
//! - `newest` only grows. Every value of it was the revision of a response or event.
//! - Leases are renewed and revoked in any case: a broker that rejects administration is still live, and no other
//!   broker may replace it while it serves.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::sync::watch;

use super::store::{
    GetResult, LeaseId, ListResult, MetaStore, MetaStoreError, Regression, Revision, StoreFuture, Transaction, TxnOp,
    TxnOutcome, Watch, WatchBatch, WatchEvent,
};

/// Key that is read with every keepalive. It never exists.
const PROBE_KEY: &str = "/strandline/";

/// Maximum time that a keepalive waits for this read.
const PROBE_TIMEOUT: Duration = Duration::from_millis(500);

/// A store and the newest revision of its responses. Clones share both.
#[derive(Clone)]
pub struct MonotonicStore {
    inner: Arc<MonotonicInner>,
}

struct MonotonicInner {
    store: Arc<dyn MetaStore>,
    newest: AtomicU64,
    regression: watch::Sender<Option<Regression>>,
}

impl MonotonicStore {
    /// Returns a store that checks the responses of `store`.
    pub fn new(store: Arc<dyn MetaStore>) -> Self {
        let inner = MonotonicInner { store, newest: AtomicU64::new(0), regression: watch::Sender::new(None) };
        Self { inner: Arc::new(inner) }
    }

    /// Executes a request and compares the revision of its response. `revision` returns that revision, and true if the
    /// call wrote.
    fn compare<'a, T>(
        &'a self,
        request: StoreFuture<'a, T>,
        revision: impl Fn(&T) -> (Revision, bool) + Send + 'a,
    ) -> StoreFuture<'a, T>
    where
        T: Send + 'a,
    {
        Box::pin(async move {
            self.inner.check_regression()?;
            let seen = self.inner.newest();
            let response = request.await.map_err(|error| self.inner.record_regression(error))?;
            let (answered, wrote) = revision(&response);
            if answered < seen || (wrote && answered == seen) {
                return Err(self
                    .inner
                    .record_regression(MetaStoreError::Regressed(Regression::Revision { seen, answered })));
            }
            self.inner.advance(answered);
            Ok(response)
        })
    }
}

impl MonotonicInner {
    fn newest(&self) -> Revision {
        Revision(self.newest.load(Ordering::Acquire))
    }

    fn advance(&self, to: Revision) {
        self.newest.fetch_max(to.0, Ordering::AcqRel);
    }

    fn check_regression(&self) -> Result<(), MetaStoreError> {
        match &*self.regression.borrow() {
            Some(regression) => Err(MetaStoreError::Regressed(regression.clone())),
            None => Ok(()),
        }
    }

    /// Records the first regression of the store.
    fn record_regression(&self, error: MetaStoreError) -> MetaStoreError {
        if let MetaStoreError::Regressed(regression) = &error {
            self.regression.send_if_modified(|recorded| {
                let is_new = recorded.is_none();
                if is_new {
                    tracing::error!(
                        %regression,
                        "the metadata store returned to an older state: until a restart, this broker refuses admin \
                         operations, elections, ISR changes and tier commits; requests that need no metadata are \
                         served"
                    );
                    *recorded = Some(regression.clone());
                }
                is_new
            });
        }
        error
    }
}

/// A watch that ends with the store's regression.
struct CheckedWatch {
    inner: Arc<MonotonicInner>,
    regression: watch::Receiver<Option<Regression>>,
    watch: Watch,
}

async fn step(checked: Option<CheckedWatch>) -> Option<(Result<WatchBatch, MetaStoreError>, Option<CheckedWatch>)> {
    let mut checked = checked?;
    let item = {
        let CheckedWatch { regression, watch, .. } = &mut checked;
        // `inner` owns the sender, so the channel cannot close.
        let regressed = async { drop(regression.wait_for(Option::is_some).await) };
        tokio::select! {
            biased;
            () = regressed => None,
            item = watch.next() => Some(item?),
        }
    };
    let Some(item) = item else {
        let error = checked.inner.check_regression().err()?;
        return Some((Err(error), None));
    };
    match item {
        Ok(changes) => {
            if let Some(newest) = changes.events.iter().map(WatchEvent::revision).max() {
                checked.inner.advance(newest);
            }
            Some((Ok(changes), Some(checked)))
        }
        Err(error) => Some((Err(checked.inner.record_regression(error)), None)),
    }
}

impl fmt::Debug for MonotonicStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.store.fmt(f)
    }
}

impl MetaStore for MonotonicStore {
    fn get<'a>(&'a self, key: &'a str) -> StoreFuture<'a, GetResult> {
        self.compare(self.inner.store.get(key), |reading| (reading.revision, false))
    }

    fn list<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, ListResult> {
        self.compare(self.inner.store.list(prefix), |listing| (listing.revision, false))
    }

    fn transact(&self, transaction: Transaction) -> StoreFuture<'_, TxnOutcome> {
        let writes = transaction.ops.iter().any(|op| matches!(op, TxnOp::Put { .. }));
        self.compare(self.inner.store.transact(transaction), move |outcome| match outcome {
            TxnOutcome::Committed { revision } => (*revision, writes),
            TxnOutcome::CompareFailed { revision, .. } => (*revision, false),
        })
    }

    fn watch<'a>(&'a self, prefix: &'a str, from: Revision) -> StoreFuture<'a, Watch> {
        Box::pin(async move {
            self.inner.check_regression()?;
            let watch =
                self.inner.store.watch(prefix, from).await.map_err(|error| self.inner.record_regression(error))?;
            let (inner, regression) = (Arc::clone(&self.inner), self.inner.regression.subscribe());
            Ok(Watch::new(futures::stream::unfold(Some(CheckedWatch { inner, regression, watch }), step)))
        })
    }

    fn grant(&self, time: Duration) -> StoreFuture<'_, LeaseId> {
        Box::pin(async move {
            self.inner.check_regression()?;
            self.inner.store.grant(time).await.map_err(|error| self.inner.record_regression(error))
        })
    }

    /// Renews the lease and also reads a key: a broker without other requests would not detect a regression.
    fn keep_alive(&self, lease: LeaseId) -> StoreFuture<'_, ()> {
        Box::pin(async move {
            let renewed = self.inner.store.keep_alive(lease).await;
            if self.inner.check_regression().is_ok() {
                let _late = tokio::time::timeout(PROBE_TIMEOUT, self.get(PROBE_KEY)).await;
            }
            renewed
        })
    }

    fn revoke(&self, lease: LeaseId) -> StoreFuture<'_, ()> {
        self.inner.store.revoke(lease)
    }

    fn regression(&self) -> Option<Regression> {
        self.inner.regression.borrow().clone()
    }
}

#[cfg(test)]
mod tests {

    use parking_lot::Mutex;

    use super::*;
    use crate::{cluster::embedded::EmbeddedStore, task::test_timeout::wait_until};

    /// A store that can be reset to an older copy of itself, like a restored etcd.
    #[derive(Debug)]
    struct Restorable(Mutex<EmbeddedStore>);

    impl Restorable {
        fn now(&self) -> EmbeddedStore {
            self.0.lock().clone()
        }

        fn restore(&self, to: &EmbeddedStore) {
            *self.0.lock() = to.clone();
        }
    }

    impl MetaStore for Restorable {
        fn get<'a>(&'a self, key: &'a str) -> StoreFuture<'a, GetResult> {
            Box::pin(async move { self.now().get(key).await })
        }

        fn list<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, ListResult> {
            Box::pin(async move { self.now().list(prefix).await })
        }

        fn transact(&self, transaction: Transaction) -> StoreFuture<'_, TxnOutcome> {
            Box::pin(async move { self.now().transact(transaction).await })
        }

        fn watch<'a>(&'a self, prefix: &'a str, from: Revision) -> StoreFuture<'a, Watch> {
            Box::pin(async move { self.now().watch(prefix, from).await })
        }

        fn grant(&self, time: Duration) -> StoreFuture<'_, LeaseId> {
            Box::pin(async move { self.now().grant(time).await })
        }

        fn keep_alive(&self, lease: LeaseId) -> StoreFuture<'_, ()> {
            Box::pin(async move { self.now().keep_alive(lease).await })
        }

        fn revoke(&self, lease: LeaseId) -> StoreFuture<'_, ()> {
            Box::pin(async move { self.now().revoke(lease).await })
        }
    }

    async fn put(store: &dyn MetaStore, times: u64) -> Result<(), MetaStoreError> {
        for value in 0..times {
            store.transact(Transaction::new().put("/k", value.to_string())).await?;
        }
        Ok(())
    }

    /// Returns a store at revision 4 after three writes, and a store after `copy` writes that replaces it.
    async fn restorable_store(copy: u64) -> (Arc<Restorable>, MonotonicStore, EmbeddedStore) {
        let older = EmbeddedStore::in_memory();
        put(&older, copy).await.expect("written");
        let restorable = Arc::new(Restorable(Mutex::new(EmbeddedStore::in_memory())));
        let store = MonotonicStore::new(Arc::clone(&restorable) as _);
        put(&store, 3).await.expect("written");
        (restorable, store, older)
    }

    #[tokio::test]
    async fn revision_regression_fails_every_later_call() {
        let (restorable, store, older) = restorable_store(2).await;
        assert_eq!(store.regression(), None);
        let mut watch = store.watch("/", Revision(5)).await.expect("watchable");
        restorable.restore(&older);
        let regression = Regression::Revision { seen: Revision(4), answered: Revision(3) };
        assert_eq!(store.get("/k").await, Err(MetaStoreError::Regressed(regression.clone())));
        assert_eq!(store.regression(), Some(regression.clone()));
        assert_eq!(
            watch.next().await,
            Some(Err(MetaStoreError::Regressed(regression.clone()))),
            "the watch ends with the regression"
        );
        // Another history reaches the old revision again.
        put(&older, 5).await.expect("written");
        let expected = Err(MetaStoreError::Regressed(regression));
        assert_eq!(store.transact(Transaction::new().put("/k", "x")).await.map(drop), expected);
        assert_eq!(store.list("/").await.map(drop), expected);
        assert_eq!(store.watch("/", Revision(1)).await.map(drop), expected);
        assert_eq!(store.grant(Duration::from_secs(1)).await.map(drop), expected);
        assert_eq!(older.get("/k").await.expect("readable").revision, Revision(8), "nothing was written");
    }

    /// Regression: the write of this broker brings the restored store to exactly the known revision.
    #[tokio::test]
    async fn write_at_known_revision_is_a_regression() {
        let (restorable, store, older) = restorable_store(2).await;
        restorable.restore(&older);
        let written = store.transact(Transaction::new().put("/k", "x")).await;
        let regression = Regression::Revision { seen: Revision(4), answered: Revision(4) };
        assert_eq!(written, Err(MetaStoreError::Regressed(regression)));
    }

    #[tokio::test]
    async fn keepalive_detects_regression_and_renews_lease() {
        let (restorable, store, older) = restorable_store(1).await;
        let lease = older.grant(Duration::from_secs(60)).await.expect("granted");
        restorable.restore(&older);
        assert_eq!(store.keep_alive(lease).await, Ok(()));
        assert!(store.regression().is_some());
        assert_eq!(store.keep_alive(lease).await, Ok(()));
        assert_eq!(store.revoke(lease).await, Ok(()));
    }

    /// A store whose reads wait for a permit before they return: a response that is overtaken.
    #[derive(Debug)]
    struct Late(EmbeddedStore, tokio::sync::Semaphore);

    impl MetaStore for Late {
        fn get<'a>(&'a self, key: &'a str) -> StoreFuture<'a, GetResult> {
            Box::pin(async move {
                let reading = self.0.get(key).await;
                self.1.acquire().await.expect("the semaphore is open").forget();
                reading
            })
        }

        fn list<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, ListResult> {
            self.0.list(prefix)
        }

        fn transact(&self, transaction: Transaction) -> StoreFuture<'_, TxnOutcome> {
            self.0.transact(transaction)
        }

        fn watch<'a>(&'a self, prefix: &'a str, from: Revision) -> StoreFuture<'a, Watch> {
            self.0.watch(prefix, from)
        }

        fn grant(&self, time: Duration) -> StoreFuture<'_, LeaseId> {
            self.0.grant(time)
        }

        fn keep_alive(&self, lease: LeaseId) -> StoreFuture<'_, ()> {
            self.0.keep_alive(lease)
        }

        fn revoke(&self, lease: LeaseId) -> StoreFuture<'_, ()> {
            self.0.revoke(lease)
        }
    }

    #[tokio::test]
    async fn overtaken_response_is_no_regression() {
        let late = Arc::new(Late(EmbeddedStore::in_memory(), tokio::sync::Semaphore::new(0)));
        let store = MonotonicStore::new(Arc::clone(&late) as _);
        put(&store, 1).await.expect("written");
        let reader = store.clone();
        let tasks = crate::task::Tasks::new();
        let reading = tasks.spawn("late", async move { reader.get("/k").await });
        tokio::task::yield_now().await;
        put(&store, 4).await.expect("written");
        late.1.add_permits(1);
        let reading = reading.await.expect("no panic").expect("a late response");
        assert_eq!((reading.revision, store.regression()), (Revision(2), None));
    }

    #[tokio::test]
    async fn lagging_watch_is_no_regression_and_advances_newest() {
        let (restorable, store, older) = restorable_store(3).await;
        let mut watch = store.watch("/", Revision(2)).await.expect("watchable");
        put(&restorable.now(), 2).await.expect("written by another broker");
        while watch_next(&mut watch).await.revision < Revision(6) {}
        assert_eq!(store.regression(), None);
        restorable.restore(&older);
        assert!(store.get("/k").await.is_err(), "4 is older than revision 6 of the watch");
        wait_until("the regression is recorded", || store.regression().is_some()).await;
    }

    async fn watch_next(watch: &mut Watch) -> WatchBatch {
        watch.next().await.expect("open").expect("no error")
    }
}
