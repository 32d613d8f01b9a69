//! The metadata store as one broker sees it: one true store in memory, behind a link of the broker's own that is slow, cut, or loses
//! requests and answers.
//!
//! It keeps the contract of [`MetaStore`] and uses all that this leaves open. A transaction whose outcome is unknown was done, was not
//! done, or is done a little later; a watch lags, and now and then what it would go on from is kept no more.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use futures::stream;
use strandline::{
    cluster::{
        Answer, EmbeddedStore, LeaseId, Listing, MetaStore, Outcome, Reading, Revision, StoreError, Transaction, Watch,
    },
    task::{Tasks, random},
};

/// How long a call waits for an answer.
const CALL: Duration = Duration::from_secs(1);

/// How often somebody who is cut off looks again.
const LOOK: Duration = Duration::from_millis(20);

/// How much later a transaction may take effect than its caller gave it up.
const LATE_US: u64 = 3_000_000;

/// One broker's way to the store. Clones share it.
#[derive(Clone)]
pub(crate) struct SimMeta {
    store: EmbeddedStore,
    weather: Arc<Mutex<Weather>>,
    /// What was given up and happens all the same: no process's, but the store's.
    late: Tasks,
}

#[derive(Default)]
struct Weather {
    cut: bool,
    /// Of a hundred transactions so many lose their request, their answer, or both for a while.
    failing: u32,
    /// How much later than the change a watch tells of it, at most.
    lag_us: u64,
    /// The watches that are open end.
    compacted: Tasks,
    lease: Option<LeaseId>,
}

impl fmt::Debug for SimMeta {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SimMeta")
    }
}

impl SimMeta {
    /// A way to `store`. `late` lives as long as the store.
    pub(crate) fn new(store: EmbeddedStore, late: Tasks) -> Self {
        Self { store, weather: Arc::default(), late }
    }

    /// Nothing comes through any more, or all again.
    pub(crate) fn cut(&self, cut: bool) {
        self.weather().cut = cut;
    }

    /// Of a hundred transactions so many go wrong from now on.
    pub(crate) fn fail(&self, percent: u32) {
        self.weather().failing = percent;
    }

    /// Watches tell of changes up to so much later.
    pub(crate) fn lag(&self, us: u64) {
        self.weather().lag_us = us;
    }

    /// What the open watches would go on from is kept no more.
    pub(crate) fn compact(&self) {
        std::mem::take(&mut self.weather().compacted).cancel();
    }

    /// Ends the lease that was given out last, as when its time is over.
    pub(crate) async fn end_lease(&self) {
        let lease = self.weather().lease.take();
        if let Some(lease) = lease {
            self.store.revoke(lease).await.unwrap();
        }
    }

    /// The store itself, past the link.
    pub(crate) fn truth(&self) -> &EmbeddedStore {
        &self.store
    }

    fn weather(&self) -> MutexGuard<'_, Weather> {
        self.weather.lock().unwrap()
    }

    /// One way to the store or back.
    async fn pass(&self) -> Result<(), StoreError> {
        tokio::time::sleep(Duration::from_micros(random::in_range(200..2000))).await;
        let open = async {
            while self.weather().cut {
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::time::timeout(CALL, open).await.map_err(|_| StoreError::unavailable("cut off"))
    }

    /// A call that changes nothing, or that may be done twice.
    async fn asked<T>(&self, call: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
        self.pass().await?;
        let answer = call.await;
        self.pass().await?;
        answer
    }
}

impl MetaStore for SimMeta {
    fn get<'a>(&'a self, key: &'a str) -> Answer<'a, Reading> {
        Box::pin(self.asked(self.store.get(key)))
    }

    fn list<'a>(&'a self, prefix: &'a str) -> Answer<'a, Listing> {
        Box::pin(self.asked(self.store.list(prefix)))
    }

    fn transact(&self, transaction: Transaction) -> Answer<'_, Outcome> {
        Box::pin(async move {
            self.pass().await?;
            let fails = random::in_range(0..100) < self.weather().failing;
            match if fails { random::in_range(0..3) } else { 3 } {
                0 => return Err(StoreError::unknown("the request was lost")),
                1 => {
                    let (store, late) = (self.store.clone(), Duration::from_micros(random::in_range(0..LATE_US)));
                    self.late.spawn("late transaction", async move {
                        tokio::time::sleep(late).await;
                        drop(store.transact(transaction).await);
                    });
                    return Err(StoreError::unknown("the request takes its time"));
                }
                2 => {
                    self.store.transact(transaction).await?;
                    return Err(StoreError::unknown("the answer was lost"));
                }
                _ => {}
            }
            let outcome = self.store.transact(transaction).await;
            // From here on it may have been done.
            self.pass().await.map_err(|_| StoreError::unknown("cut off"))?;
            outcome
        })
    }

    fn watch<'a>(&'a self, prefix: &'a str, from: Revision) -> Answer<'a, Watch> {
        Box::pin(async move {
            let watch = self.asked(self.store.watch(prefix, from)).await?;
            let compacted = self.weather().compacted.clone();
            let open = Some((self.clone(), watch, compacted));
            Ok(Watch::new(stream::unfold(open, move |open| async move {
                let (meta, mut watch, compacted) = open?;
                let next = async {
                    let changes = watch.next().await;
                    let lag = meta.weather().lag_us;
                    tokio::time::sleep(Duration::from_micros(random::in_range(100..=1000 + lag))).await;
                    while meta.weather().cut {
                        tokio::time::sleep(LOOK).await;
                    }
                    changes
                };
                tokio::select! {
                    biased;
                    () = compacted.cancelled() => {
                        Some((Err(StoreError::Compacted { from, oldest: from.next() }), None))
                    }
                    changes = next => changes.map(|changes| (changes, Some((meta, watch, compacted)))),
                }
            })))
        })
    }

    fn grant(&self, time: Duration) -> Answer<'_, LeaseId> {
        Box::pin(async move {
            let lease = self.asked(self.store.grant(time)).await?;
            self.weather().lease = Some(lease);
            Ok(lease)
        })
    }

    fn keep_alive(&self, lease: LeaseId) -> Answer<'_, ()> {
        Box::pin(self.asked(self.store.keep_alive(lease)))
    }

    fn revoke(&self, lease: LeaseId) -> Answer<'_, ()> {
        Box::pin(self.asked(self.store.revoke(lease)))
    }
}
