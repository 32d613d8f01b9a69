//! A metadata store whose revision never falls: a store that returned to an older state is no longer used.
//!
//! # Overview
//!
//! An etcd that was restored from a backup or replaced by another one responds normally. But its history differs from
//! the one that this broker acted on. [`MonotonicStore`] compares the revision of every linearizable response with the
//! newest revision that any response or event had contained *before the call started*. The first older response is a
//! regression, and so is a response of another etcd cluster. From then on every call except `keep_alive` and `revoke`
//! fails with [`MetaStoreError::Regressed`] until the process restarts, and open watches end with this error.
//!
//! Reordered responses are no regression. Each response is compared with the newest revision at the start of its call,
//! so a newer response that arrives earlier does not matter. Responses of watches, keepalives and status requests are
//! never compared, because a lagging member may send them. Results of grants and revocations contain no revision. The
//! response to a committed transaction with a put must have a newer revision, not an equal one. `session` reads a key
//! as often as it renews its lease, so that a broker without other requests also detects a regression.
//!
//! # Invariants
//!
//! - `newest` only grows. Each of its values was the revision of a response or event.
//! - Leases are renewed and revoked also after a regression. The broker is still live, and no other broker may replace
//!   it while it serves.

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

/// A store and the newest revision of its responses. Clones share both.
#[derive(Clone)]
pub struct MonotonicStore {
    inner: Arc<MonotonicInner>,
}

struct MonotonicInner {
    store: Arc<dyn MetaStore>,
    /// Newest revision of any response or event; 0 before the first one.
    newest: AtomicU64,
    /// First regression. Once it is set, every call except `keep_alive` and `revoke` fails, and open watches end.
    regression: watch::Sender<Option<Regression>>,
}

impl MonotonicStore {
    /// Returns a store that checks the responses of `store`.
    pub fn new(store: Arc<dyn MetaStore>) -> Self {
        let inner = MonotonicInner { store, newest: AtomicU64::new(0), regression: watch::Sender::new(None) };
        Self { inner: Arc::new(inner) }
    }

    /// Executes a request, and fails with a regression if the revision of the response is too old. After a regression,
    /// fails without a request. `revision` returns the revision of the response, and true if the request changed the
    /// store.
    fn execute_checked<'a, T>(
        &'a self,
        request: StoreFuture<'a, T>,
        revision: impl Fn(&T) -> (Revision, bool) + Send + 'a,
    ) -> StoreFuture<'a, T>
    where
        T: Send + 'a,
    {
        Box::pin(async move {
            self.inner.check_regression()?;
            let newest = self.inner.newest();
            let response = request.await.map_err(|error| self.inner.store_regression(error))?;
            let (returned, wrote) = revision(&response);
            if returned < newest || (wrote && returned == newest) {
                let regression = Regression::Revision { newest, returned };
                return Err(self.inner.store_regression(MetaStoreError::Regressed(regression)));
            }
            self.inner.advance(returned);
            Ok(response)
        })
    }
}

impl MonotonicInner {
    fn newest(&self) -> Revision {
        Revision(self.newest.load(Ordering::Acquire))
    }

    /// Raises `newest` to `revision`, unless it is newer already.
    fn advance(&self, revision: Revision) {
        self.newest.fetch_max(revision.0, Ordering::AcqRel);
    }

    /// Returns the regression as an error, if there was one.
    fn check_regression(&self) -> Result<(), MetaStoreError> {
        match &*self.regression.borrow() {
            Some(regression) => Err(MetaStoreError::Regressed(regression.clone())),
            None => Ok(()),
        }
    }

    /// If `error` is the first regression, stores and logs it. Returns `error` in any case.
    fn store_regression(&self, error: MetaStoreError) -> MetaStoreError {
        if let MetaStoreError::Regressed(regression) = &error {
            self.regression.send_if_modified(|stored| {
                let is_new = stored.is_none();
                if is_new {
                    tracing::error!(
                        %regression,
                        "the metadata store is in an older state than before, or is another store: until a restart, \
                         this broker refuses admin operations, elections, ISR changes and tier commits; requests that \
                         need no metadata are served"
                    );
                    *stored = Some(regression.clone());
                }
                is_new
            });
        }
        error
    }
}

/// A watch that ends with an error when a regression of the store is detected.
struct CheckedWatch {
    inner: Arc<MonotonicInner>,
    regression: watch::Receiver<Option<Regression>>,
    watch: Watch,
}

/// Returns the next item of a checked watch, for `futures::stream::unfold`. After an error no watch remains, and the
/// stream ends.
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
        Err(error) => Some((Err(checked.inner.store_regression(error)), None)),
    }
}

impl fmt::Debug for MonotonicStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.store.fmt(f)
    }
}

impl MetaStore for MonotonicStore {
    fn get<'a>(&'a self, key: &'a str) -> StoreFuture<'a, GetResult> {
        self.execute_checked(self.inner.store.get(key), |reading| (reading.revision, false))
    }

    fn list<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, ListResult> {
        self.execute_checked(self.inner.store.list(prefix), |listing| (listing.revision, false))
    }

    fn transact(&self, transaction: Transaction) -> StoreFuture<'_, TxnOutcome> {
        let writes = transaction.ops.iter().any(|op| matches!(op, TxnOp::Put { .. }));
        self.execute_checked(self.inner.store.transact(transaction), move |outcome| match outcome {
            TxnOutcome::Committed { revision } => (*revision, writes),
            TxnOutcome::CompareFailed { revision, .. } => (*revision, false),
        })
    }

    fn watch<'a>(&'a self, prefix: &'a str, from: Revision) -> StoreFuture<'a, Watch> {
        Box::pin(async move {
            self.inner.check_regression()?;
            let watch =
                self.inner.store.watch(prefix, from).await.map_err(|error| self.inner.store_regression(error))?;
            let (inner, regression) = (Arc::clone(&self.inner), self.inner.regression.subscribe());
            Ok(Watch::new(futures::stream::unfold(Some(CheckedWatch { inner, regression, watch }), step)))
        })
    }

    fn grant(&self, time: Duration) -> StoreFuture<'_, LeaseId> {
        Box::pin(async move {
            self.inner.check_regression()?;
            self.inner.store.grant(time).await.map_err(|error| self.inner.store_regression(error))
        })
    }

    fn keep_alive(&self, lease: LeaseId) -> StoreFuture<'_, ()> {
        self.inner.store.keep_alive(lease)
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
    use super::*;
    use crate::{
        cluster::{
            embedded::EmbeddedStore,
            keys::{BrokerValue, Keys},
            metadata::MetadataCache,
            session::{RegistrationRequest, SessionState},
        },
        model::BrokerId,
        task::{Tasks, lock::Mutex},
    };

    /// A store that can be reset to an older copy of itself, like a restored etcd.
    #[derive(Debug)]
    struct Restorable(Mutex<EmbeddedStore>);

    impl Restorable {
        fn current(&self) -> EmbeddedStore {
            self.0.lock().clone()
        }

        fn restore(&self, backup: &EmbeddedStore) {
            *self.0.lock() = backup.clone();
        }
    }

    impl MetaStore for Restorable {
        fn get<'a>(&'a self, key: &'a str) -> StoreFuture<'a, GetResult> {
            Box::pin(async move { self.current().get(key).await })
        }

        fn list<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, ListResult> {
            Box::pin(async move { self.current().list(prefix).await })
        }

        fn transact(&self, transaction: Transaction) -> StoreFuture<'_, TxnOutcome> {
            Box::pin(async move { self.current().transact(transaction).await })
        }

        fn watch<'a>(&'a self, prefix: &'a str, from: Revision) -> StoreFuture<'a, Watch> {
            Box::pin(async move { self.current().watch(prefix, from).await })
        }

        fn grant(&self, time: Duration) -> StoreFuture<'_, LeaseId> {
            Box::pin(async move { self.current().grant(time).await })
        }

        fn keep_alive(&self, lease: LeaseId) -> StoreFuture<'_, ()> {
            Box::pin(async move { self.current().keep_alive(lease).await })
        }

        fn revoke(&self, lease: LeaseId) -> StoreFuture<'_, ()> {
            Box::pin(async move { self.current().revoke(lease).await })
        }
    }

    async fn put(store: &dyn MetaStore, times: u64) -> Result<(), MetaStoreError> {
        for value in 0..times {
            store.transact(Transaction::new().put("/k", value.to_string())).await?;
        }
        Ok(())
    }

    /// Returns a store after three writes (revision 4), the [`MonotonicStore`] that wrote them, and a backup: a store
    /// after `backup_writes` writes.
    async fn restorable_store(backup_writes: u64) -> (Arc<Restorable>, MonotonicStore, EmbeddedStore) {
        let older = EmbeddedStore::in_memory();
        put(&older, backup_writes).await.expect("written");
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
        let regression = Regression::Revision { newest: Revision(4), returned: Revision(3) };
        assert_eq!(store.get("/k").await, Err(MetaStoreError::Regressed(regression.clone())));
        assert_eq!(store.regression(), Some(regression.clone()));
        assert_eq!(
            watch.next().await,
            Some(Err(MetaStoreError::Regressed(regression.clone()))),
            "the watch ends with the regression"
        );
        // The restored store passes the revision that the broker had read before. The calls still fail.
        put(&older, 5).await.expect("written");
        let expected = Err(MetaStoreError::Regressed(regression));
        assert_eq!(store.transact(Transaction::new().put("/k", "x")).await.map(drop), expected);
        assert_eq!(store.list("/").await.map(drop), expected);
        assert_eq!(store.watch("/", Revision(1)).await.map(drop), expected);
        assert_eq!(store.grant(Duration::from_secs(1)).await.map(drop), expected);
        assert_eq!(older.get("/k").await.expect("readable").revision, Revision(8), "nothing was written");
    }

    /// A write must raise the revision. Here the restored store is one revision behind, and the broker's write has
    /// exactly the newest revision that the broker had read before. Regression: the response was accepted.
    #[tokio::test]
    async fn write_at_known_revision_is_a_regression() {
        let (restorable, store, older) = restorable_store(2).await;
        restorable.restore(&older);
        let written = store.transact(Transaction::new().put("/k", "x")).await;
        let regression = Regression::Revision { newest: Revision(4), returned: Revision(4) };
        assert_eq!(written, Err(MetaStoreError::Regressed(regression)));
    }

    #[tokio::test]
    async fn lease_is_renewed_and_revoked_after_regression() {
        let (restorable, store, older) = restorable_store(1).await;
        let lease = older.grant(Duration::from_secs(60)).await.expect("granted");
        restorable.restore(&older);
        store.get("/k").await.expect_err("2 is older than revision 4");
        assert!(store.regression().is_some());
        assert_eq!(store.keep_alive(lease).await, Ok(()));
        assert_eq!(store.revoke(lease).await, Ok(()));
    }

    /// The restored store has the session's lease, so the renewals succeed, and the session sends no other requests.
    #[tokio::test(start_paused = true)]
    async fn session_without_requests_detects_regression() {
        let (restorable, store, older) = restorable_store(1).await;
        let (keys, tasks) = (Keys::new("test").expect("valid"), Tasks::new());
        // The cache reads another store, because a list of the restored store would detect the regression too.
        let metadata = MetadataCache::start(Arc::new(EmbeddedStore::in_memory()), keys.clone(), &tasks);
        let registration = RegistrationRequest {
            store: Arc::new(store.clone()),
            keys,
            id: BrokerId(1),
            value: BrokerValue::running_at("b:1".to_owned()),
            session_timeout: Duration::from_secs(9),
        };
        let session = registration.register(None, &metadata, &tasks).await.expect("registered");
        // An embedded store numbers its leases from 1.
        let lease = older.grant(Duration::from_secs(60)).await.expect("granted");
        restorable.restore(&older);
        let detected = async {
            while store.regression().is_none() {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), detected).await.expect("the session detects the regression");
        let state = session.state().borrow().clone();
        assert!(matches!(state, SessionState::Registered { lease: own, .. } if own == lease), "{state:?}");
        session.leave().await;
        tasks.stop().await;
    }

    /// A store whose `get` reads at once and then waits for a permit before it returns, so that later responses
    /// overtake its response.
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
        let tasks = Tasks::new();
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
        put(&restorable.current(), 2).await.expect("written by another broker");
        while watch_next(&mut watch).await.revision < Revision(6) {}
        assert_eq!(store.regression(), None);
        restorable.restore(&older);
        assert!(store.get("/k").await.is_err(), "4 is older than revision 6 of the watch");
        assert!(store.regression().is_some());
    }

    async fn watch_next(watch: &mut Watch) -> WatchBatch {
        watch.next().await.expect("open").expect("no error")
    }
}
