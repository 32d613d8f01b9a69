//! A metadata store whose revision never falls: a store that went back is no longer used.
//!
//! # Overview
//!
//! An etcd that was restored from a backup or replaced by another one responds normally, but its history differs from
//! the one that this broker acted on. [`MonotonicStore`] compares the revision of every linearizable response with the
//! newest revision that any response had contained *before the call started*. The first older response is a regression,
//! and so is another cluster id. From then on every call fails with [`StoreError::Regressed`] until the process
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
    Answer, Changes, Event, LeaseId, Listing, MetaStore, Op, Outcome, Reading, Regression, Revision, StoreError,
    Transaction, Watch,
};

/// Key that is read with every keepalive. It never exists.
const PROBE_KEY: &str = "/strandline/";

/// Maximum time that a keepalive waits for this read.
const PROBE_TIMEOUT: Duration = Duration::from_millis(500);

/// A store and the newest revision of its responses. Clones share both.
#[derive(Clone)]
pub struct MonotonicStore {
    shared: Arc<Shared>,
}

struct Shared {
    store: Arc<dyn MetaStore>,
    newest: AtomicU64,
    regression: watch::Sender<Option<Regression>>,
}

impl MonotonicStore {
    /// Returns a store that checks the responses of `store`.
    pub fn new(store: Arc<dyn MetaStore>) -> Self {
        let shared = Shared { store, newest: AtomicU64::new(0), regression: watch::Sender::new(None) };
        Self { shared: Arc::new(shared) }
    }

    /// Executes a request and compares the revision of its response. `revision` returns that revision, and true if the
    /// call wrote.
    fn compare<'a, T>(
        &'a self,
        asked: Answer<'a, T>,
        revision: impl Fn(&T) -> (Revision, bool) + Send + 'a,
    ) -> Answer<'a, T>
    where
        T: Send + 'a,
    {
        Box::pin(async move {
            self.shared.refuse()?;
            let seen = self.shared.newest();
            let answer = asked.await.map_err(|error| self.shared.note(error))?;
            let (answered, wrote) = revision(&answer);
            if answered < seen || (wrote && answered == seen) {
                return Err(self.shared.note(StoreError::Regressed(Regression::Revision { seen, answered })));
            }
            self.shared.advance(answered);
            Ok(answer)
        })
    }
}

impl Shared {
    fn newest(&self) -> Revision {
        Revision(self.newest.load(Ordering::Acquire))
    }

    fn advance(&self, to: Revision) {
        self.newest.fetch_max(to.0, Ordering::AcqRel);
    }

    fn refuse(&self) -> Result<(), StoreError> {
        match &*self.regression.borrow() {
            Some(regression) => Err(StoreError::Regressed(regression.clone())),
            None => Ok(()),
        }
    }

    /// Records the first regression of the store.
    fn note(&self, error: StoreError) -> StoreError {
        if let StoreError::Regressed(regression) = &error {
            self.regression.send_if_modified(|known| {
                let is_new = known.is_none();
                if is_new {
                    tracing::error!(
                        %regression,
                        "the metadata store went back: until it is restarted this broker refuses administration, elections, changes of \
                         in-sync replicas and commits to the bucket; it serves what needs no metadata"
                    );
                    *known = Some(regression.clone());
                }
                is_new
            });
        }
        error
    }
}

/// A watch that ends with the store's regression.
struct Watching {
    shared: Arc<Shared>,
    regression: watch::Receiver<Option<Regression>>,
    watch: Watch,
}

async fn step(watching: Option<Watching>) -> Option<(Result<Changes, StoreError>, Option<Watching>)> {
    let mut watching = watching?;
    let item = {
        let Watching { regression, watch, .. } = &mut watching;
        // `shared` owns the sender, so the channel cannot close.
        let regressed = async { drop(regression.wait_for(Option::is_some).await) };
        tokio::select! {
            biased;
            () = regressed => None,
            item = watch.next() => Some(item?),
        }
    };
    let Some(item) = item else {
        let refused = watching.shared.refuse().err()?;
        return Some((Err(refused), None));
    };
    match item {
        Ok(changes) => {
            if let Some(newest) = changes.events.iter().map(Event::revision).max() {
                watching.shared.advance(newest);
            }
            Some((Ok(changes), Some(watching)))
        }
        Err(error) => Some((Err(watching.shared.note(error)), None)),
    }
}

impl fmt::Debug for MonotonicStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.shared.store.fmt(f)
    }
}

impl MetaStore for MonotonicStore {
    fn get<'a>(&'a self, key: &'a str) -> Answer<'a, Reading> {
        self.compare(self.shared.store.get(key), |reading| (reading.revision, false))
    }

    fn list<'a>(&'a self, prefix: &'a str) -> Answer<'a, Listing> {
        self.compare(self.shared.store.list(prefix), |listing| (listing.revision, false))
    }

    fn transact(&self, transaction: Transaction) -> Answer<'_, Outcome> {
        let writes = transaction.ops.iter().any(|op| matches!(op, Op::Put { .. }));
        self.compare(self.shared.store.transact(transaction), move |outcome| match outcome {
            Outcome::Done { revision } => (*revision, writes),
            Outcome::Refused { revision, .. } => (*revision, false),
        })
    }

    fn watch<'a>(&'a self, prefix: &'a str, from: Revision) -> Answer<'a, Watch> {
        Box::pin(async move {
            self.shared.refuse()?;
            let watch = self.shared.store.watch(prefix, from).await.map_err(|error| self.shared.note(error))?;
            let (shared, regression) = (Arc::clone(&self.shared), self.shared.regression.subscribe());
            Ok(Watch::new(futures::stream::unfold(Some(Watching { shared, regression, watch }), step)))
        })
    }

    fn grant(&self, time: Duration) -> Answer<'_, LeaseId> {
        Box::pin(async move {
            self.shared.refuse()?;
            self.shared.store.grant(time).await.map_err(|error| self.shared.note(error))
        })
    }

    /// Renews the lease and also reads a key: a broker without other requests would not detect a regression.
    fn keep_alive(&self, lease: LeaseId) -> Answer<'_, ()> {
        Box::pin(async move {
            let kept = self.shared.store.keep_alive(lease).await;
            if self.shared.refuse().is_ok() {
                let _late = tokio::time::timeout(PROBE_TIMEOUT, self.get(PROBE_KEY)).await;
            }
            kept
        })
    }

    fn revoke(&self, lease: LeaseId) -> Answer<'_, ()> {
        self.shared.store.revoke(lease)
    }

    fn regression(&self) -> Option<Regression> {
        self.shared.regression.borrow().clone()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::{cluster::embedded::EmbeddedStore, task::test_timeout::wait_until};

    /// A store that can be reset to an older copy of itself, like a restored etcd.
    #[derive(Debug)]
    struct Restorable(Mutex<EmbeddedStore>);

    impl Restorable {
        fn now(&self) -> EmbeddedStore {
            self.0.lock().expect("nothing panics").clone()
        }

        fn restore(&self, to: &EmbeddedStore) {
            *self.0.lock().expect("nothing panics") = to.clone();
        }
    }

    impl MetaStore for Restorable {
        fn get<'a>(&'a self, key: &'a str) -> Answer<'a, Reading> {
            Box::pin(async move { self.now().get(key).await })
        }

        fn list<'a>(&'a self, prefix: &'a str) -> Answer<'a, Listing> {
            Box::pin(async move { self.now().list(prefix).await })
        }

        fn transact(&self, transaction: Transaction) -> Answer<'_, Outcome> {
            Box::pin(async move { self.now().transact(transaction).await })
        }

        fn watch<'a>(&'a self, prefix: &'a str, from: Revision) -> Answer<'a, Watch> {
            Box::pin(async move { self.now().watch(prefix, from).await })
        }

        fn grant(&self, time: Duration) -> Answer<'_, LeaseId> {
            Box::pin(async move { self.now().grant(time).await })
        }

        fn keep_alive(&self, lease: LeaseId) -> Answer<'_, ()> {
            Box::pin(async move { self.now().keep_alive(lease).await })
        }

        fn revoke(&self, lease: LeaseId) -> Answer<'_, ()> {
            Box::pin(async move { self.now().revoke(lease).await })
        }
    }

    async fn put(store: &dyn MetaStore, times: u64) -> Result<(), StoreError> {
        for value in 0..times {
            store.transact(Transaction::new().put("/k", value.to_string())).await?;
        }
        Ok(())
    }

    /// Returns a store at revision 4 after three writes, and a store after `copy` writes that replaces it.
    async fn restored(copy: u64) -> (Arc<Restorable>, MonotonicStore, EmbeddedStore) {
        let older = EmbeddedStore::in_memory();
        put(&older, copy).await.expect("memory takes it");
        let restorable = Arc::new(Restorable(Mutex::new(EmbeddedStore::in_memory())));
        let store = MonotonicStore::new(Arc::clone(&restorable) as _);
        put(&store, 3).await.expect("memory takes it");
        (restorable, store, older)
    }

    #[tokio::test]
    async fn revision_regression_fails_every_later_call() {
        let (restorable, store, older) = restored(2).await;
        assert_eq!(store.regression(), None);
        let mut watch = store.watch("/", Revision(5)).await.expect("it begins");
        restorable.restore(&older);
        let proof = Regression::Revision { seen: Revision(4), answered: Revision(3) };
        assert_eq!(store.get("/k").await, Err(StoreError::Regressed(proof.clone())));
        assert_eq!(store.regression(), Some(proof.clone()));
        assert_eq!(watch.next().await, Some(Err(StoreError::Regressed(proof.clone()))), "a watch ends with it");
        // Another history reaches the old revision again.
        put(&older, 5).await.expect("memory takes it");
        let refused = Err(StoreError::Regressed(proof));
        assert_eq!(store.transact(Transaction::new().put("/k", "x")).await.map(drop), refused);
        assert_eq!(store.list("/").await.map(drop), refused);
        assert_eq!(store.watch("/", Revision(1)).await.map(drop), refused);
        assert_eq!(store.grant(Duration::from_secs(1)).await.map(drop), refused);
        assert_eq!(older.get("/k").await.expect("answers").revision, Revision(8), "nothing was written");
    }

    /// Regression: the write of this broker brings the restored store to exactly the known revision.
    #[tokio::test]
    async fn write_at_known_revision_is_a_regression() {
        let (restorable, store, older) = restored(2).await;
        restorable.restore(&older);
        let written = store.transact(Transaction::new().put("/k", "x")).await;
        let proof = Regression::Revision { seen: Revision(4), answered: Revision(4) };
        assert_eq!(written, Err(StoreError::Regressed(proof)));
    }

    #[tokio::test]
    async fn keepalive_detects_regression_and_renews_lease() {
        let (restorable, store, older) = restored(1).await;
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
        fn get<'a>(&'a self, key: &'a str) -> Answer<'a, Reading> {
            Box::pin(async move {
                let reading = self.0.get(key).await;
                self.1.acquire().await.expect("it is open").forget();
                reading
            })
        }

        fn list<'a>(&'a self, prefix: &'a str) -> Answer<'a, Listing> {
            self.0.list(prefix)
        }

        fn transact(&self, transaction: Transaction) -> Answer<'_, Outcome> {
            self.0.transact(transaction)
        }

        fn watch<'a>(&'a self, prefix: &'a str, from: Revision) -> Answer<'a, Watch> {
            self.0.watch(prefix, from)
        }

        fn grant(&self, time: Duration) -> Answer<'_, LeaseId> {
            self.0.grant(time)
        }

        fn keep_alive(&self, lease: LeaseId) -> Answer<'_, ()> {
            self.0.keep_alive(lease)
        }

        fn revoke(&self, lease: LeaseId) -> Answer<'_, ()> {
            self.0.revoke(lease)
        }
    }

    #[tokio::test]
    async fn overtaken_response_is_no_regression() {
        let late = Arc::new(Late(EmbeddedStore::in_memory(), tokio::sync::Semaphore::new(0)));
        let store = MonotonicStore::new(Arc::clone(&late) as _);
        put(&store, 1).await.expect("memory takes it");
        let reader = store.clone();
        let tasks = crate::task::Tasks::new();
        let reading = tasks.spawn("late", async move { reader.get("/k").await });
        tokio::task::yield_now().await;
        put(&store, 4).await.expect("memory takes it");
        late.1.add_permits(1);
        let reading = reading.await.expect("no panic").expect("it is only late");
        assert_eq!((reading.revision, store.regression()), (Revision(2), None));
    }

    #[tokio::test]
    async fn lagging_watch_is_no_regression_and_advances_newest() {
        let (restorable, store, older) = restored(3).await;
        let mut watch = store.watch("/", Revision(2)).await.expect("it begins");
        put(&restorable.now(), 2).await.expect("another broker's");
        while watch_next(&mut watch).await.revision < Revision(6) {}
        assert_eq!(store.regression(), None);
        restorable.restore(&older);
        assert!(store.get("/k").await.is_err(), "4 is older than the 6 that the watch showed");
        wait_until("it is noted", || store.regression().is_some()).await;
    }

    async fn watch_next(watch: &mut Watch) -> Changes {
        watch.next().await.expect("open").expect("no error")
    }
}
