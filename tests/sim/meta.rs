//! One broker's link to the metadata store. The store is in memory and shared; the link is slow, can be cut, and loses
//! requests and responses.
//!
//! The link has the guarantees of [`MetaStore`], and no more. A transaction with an unknown outcome was applied, was
//! not applied, or is applied later. A watch lags, and at times the history after its revision is compacted.

use std::{fmt, sync::Arc, time::Duration};

use futures::stream;
use strandline::{
    cluster::{
        EmbeddedStore, GetResult, LeaseId, ListResult, MetaStore, MetaStoreError, Revision, StoreFuture, Transaction,
        TxnOutcome, Watch,
    },
    task::{Tasks, lock::Mutex, random},
};

/// Maximum time that a request, and then its response, waits for a blocked link.
const LINK_TIMEOUT: Duration = Duration::from_secs(1);

/// Interval at which a blocked call or watch checks whether the link is open.
const CHECK_INTERVAL: Duration = Duration::from_millis(20);

/// Maximum delay of a transaction after its caller received an unknown outcome, in microseconds.
const MAX_LATE_US: u64 = 3_000_000;

/// One broker's link to the store. Clones share the link.
#[derive(Clone)]
pub(crate) struct SimMeta {
    store: EmbeddedStore,
    faults: Arc<Mutex<StoreFaults>>,
    /// Tasks that apply transactions after their caller received an unknown outcome. They belong to the store, so they
    /// outlive the caller's process.
    late: Tasks,
}

#[derive(Default)]
struct StoreFaults {
    cut: bool,
    /// Percentage of transactions that fail: the request or the response is lost, or the transaction is applied late.
    failing: u32,
    /// Maximum additional delay of each change in a watch, in microseconds.
    lag_us: u64,
    /// Cancelled to end the open watches as compacted.
    compacted: Tasks,
    lease: Option<LeaseId>,
}

impl fmt::Debug for SimMeta {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SimMeta")
    }
}

impl SimMeta {
    /// Creates a link to `store`. `late` must last as long as the store.
    pub(crate) fn new(store: EmbeddedStore, late: Tasks) -> Self {
        Self { store, faults: Arc::default(), late }
    }

    /// Blocks or opens the link in both directions.
    pub(crate) fn cut(&self, cut: bool) {
        self.faults.lock().cut = cut;
    }

    /// Sets the percentage of transactions that fail from now on.
    pub(crate) fn fail(&self, percent: u32) {
        self.faults.lock().failing = percent;
    }

    /// Sets the maximum additional delay of each change in a watch, in microseconds.
    pub(crate) fn lag(&self, us: u64) {
        self.faults.lock().lag_us = us;
    }

    /// Ends the open watches, as if the history after their revisions had been compacted.
    pub(crate) fn compact(&self) {
        std::mem::take(&mut self.faults.lock().compacted).cancel();
    }

    /// Ends the lease that was granted last over this link, as if it had expired.
    pub(crate) async fn end_lease(&self) {
        let lease = self.faults.lock().lease.take();
        if let Some(lease) = lease {
            self.store.revoke(lease).await.unwrap();
        }
    }

    /// Returns the store itself, without the link.
    pub(crate) fn direct_store(&self) -> &EmbeddedStore {
        &self.store
    }

    /// Waits as long as a message needs to pass the link in one direction, and while the link is blocked. Fails after
    /// [`LINK_TIMEOUT`].
    async fn pass(&self) -> Result<(), MetaStoreError> {
        tokio::time::sleep(Duration::from_micros(random::in_range(200..2000))).await;
        let open = async {
            while self.faults.lock().cut {
                tokio::time::sleep(CHECK_INTERVAL).await;
            }
        };
        tokio::time::timeout(LINK_TIMEOUT, open).await.map_err(|_| MetaStoreError::unavailable("isolated"))
    }

    /// Sends a call over the link. The call changes nothing, or its caller may repeat it: a lost response is reported
    /// like a lost request.
    async fn send_call<T>(&self, call: impl Future<Output = Result<T, MetaStoreError>>) -> Result<T, MetaStoreError> {
        self.pass().await?;
        let result = call.await;
        self.pass().await?;
        result
    }
}

impl MetaStore for SimMeta {
    fn get<'a>(&'a self, key: &'a str) -> StoreFuture<'a, GetResult> {
        Box::pin(self.send_call(self.store.get(key)))
    }

    fn list<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, ListResult> {
        Box::pin(self.send_call(self.store.list(prefix)))
    }

    fn transact(&self, transaction: Transaction) -> StoreFuture<'_, TxnOutcome> {
        Box::pin(async move {
            self.pass().await?;
            let fails = random::in_range(0..100) < self.faults.lock().failing;
            match if fails { random::in_range(0..3) } else { 3 } {
                0 => return Err(MetaStoreError::unknown("the request was lost")),
                1 => {
                    let (store, late) = (self.store.clone(), Duration::from_micros(random::in_range(0..MAX_LATE_US)));
                    self.late.spawn("late-transaction", async move {
                        tokio::time::sleep(late).await;
                        drop(store.transact(transaction).await);
                    });
                    return Err(MetaStoreError::unknown("the request takes its time"));
                }
                2 => {
                    self.store.transact(transaction).await?;
                    return Err(MetaStoreError::unknown("the response was lost"));
                }
                _ => {}
            }
            let outcome = self.store.transact(transaction).await;
            // The store has responded, so the transaction may have been applied.
            self.pass().await.map_err(|_| MetaStoreError::unknown("isolated"))?;
            outcome
        })
    }

    fn watch<'a>(&'a self, prefix: &'a str, from: Revision) -> StoreFuture<'a, Watch> {
        Box::pin(async move {
            let watch = self.send_call(self.store.watch(prefix, from)).await?;
            let compacted = self.faults.lock().compacted.clone();
            let open = Some((self.clone(), watch, compacted));
            Ok(Watch::new(stream::unfold(open, move |open| async move {
                let (meta, mut watch, compacted) = open?;
                let next = async {
                    let changes = watch.next().await;
                    let lag = meta.faults.lock().lag_us;
                    tokio::time::sleep(Duration::from_micros(random::in_range(100..=1000 + lag))).await;
                    while meta.faults.lock().cut {
                        tokio::time::sleep(CHECK_INTERVAL).await;
                    }
                    changes
                };
                tokio::select! {
                    biased;
                    () = compacted.cancelled() => {
                        Some((Err(MetaStoreError::Compacted { from, oldest: from.next() }), None))
                    }
                    changes = next => changes.map(|changes| (changes, Some((meta, watch, compacted)))),
                }
            })))
        })
    }

    fn grant(&self, time: Duration) -> StoreFuture<'_, LeaseId> {
        Box::pin(async move {
            let lease = self.send_call(self.store.grant(time)).await?;
            self.faults.lock().lease = Some(lease);
            Ok(lease)
        })
    }

    fn keep_alive(&self, lease: LeaseId) -> StoreFuture<'_, ()> {
        Box::pin(self.send_call(self.store.keep_alive(lease)))
    }

    fn revoke(&self, lease: LeaseId) -> StoreFuture<'_, ()> {
        Box::pin(self.send_call(self.store.revoke(lease)))
    }
}
