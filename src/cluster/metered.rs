//! A metadata store whose requests are counted and timed. The wrapper changes neither requests nor responses.
//!
//! One request is one call of a broker, which may take several attempts at several etcd members. The measured time is
//! the time that the caller waits, for a watch until it has started. A call that the caller drops is not counted.

use std::{fmt, sync::Arc, time::Duration};

use futures::FutureExt as _;

use super::store::{
    GetResult, LeaseId, ListResult, MetaStore, MetaStoreError, Regression, Revision, StoreFuture, Transaction,
    TxnOutcome, Watch,
};
use crate::{task::clock, telemetry::Metrics};

/// A store and the metrics of its requests. Cheap to clone.
#[derive(Clone)]
pub struct MeteredStore {
    store: Arc<dyn MetaStore>,
    metrics: Metrics,
}

impl MeteredStore {
    /// Returns a store that counts and times the requests to `store`.
    pub fn new(store: Arc<dyn MetaStore>, metrics: Metrics) -> Self {
        Self { store, metrics }
    }

    /// Counts and times a request whose response is `future`. `request` is its label; `ok_label` returns the outcome
    /// label of a response that is no error.
    fn measure<'a, T>(
        &'a self,
        request: &'static str,
        future: StoreFuture<'a, T>,
        ok_label: impl Fn(&T) -> &'static str + Send + 'a,
    ) -> StoreFuture<'a, T>
    where
        T: Send + 'a,
    {
        async move {
            let started = clock::monotonic();
            let result = future.await;
            let outcome = match &result {
                Ok(result) => ok_label(result),
                Err(error) => error_label(error),
            };
            self.metrics.metadata_requests.count(request, outcome);
            self.metrics.metadata_request_seconds.observe(request, started.elapsed());
            result
        }
        .boxed()
    }
}

/// Returns the outcome label of a failed request.
fn error_label(error: &MetaStoreError) -> &'static str {
    match error {
        MetaStoreError::Unavailable { outcome_unknown: false, .. } => "unavailable",
        MetaStoreError::Unavailable { outcome_unknown: true, .. } => "unknown",
        MetaStoreError::Refused { .. } | MetaStoreError::TooLarge { .. } => "denied",
        MetaStoreError::NoSpace { .. } => "no_space",
        MetaStoreError::Regressed(_) => "regressed",
        MetaStoreError::Compacted { .. } => "compacted",
        MetaStoreError::LeaseGone { .. } => "lease_gone",
    }
}

/// Returns the outcome label of every successful request except a transaction.
fn ok<T>(_: &T) -> &'static str {
    "ok"
}

impl fmt::Debug for MeteredStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.store.fmt(f)
    }
}

impl MetaStore for MeteredStore {
    fn get<'a>(&'a self, key: &'a str) -> StoreFuture<'a, GetResult> {
        self.measure("get", self.store.get(key), ok)
    }

    fn list<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, ListResult> {
        self.measure("list", self.store.list(prefix), ok)
    }

    fn transact(&self, transaction: Transaction) -> StoreFuture<'_, TxnOutcome> {
        self.measure("transact", self.store.transact(transaction), |outcome| match outcome {
            TxnOutcome::Committed { .. } => "committed",
            // Not an error: a compare-and-set expects this outcome.
            TxnOutcome::CompareFailed { .. } => "compare_failed",
        })
    }

    fn watch<'a>(&'a self, prefix: &'a str, from: Revision) -> StoreFuture<'a, Watch> {
        self.measure("watch", self.store.watch(prefix, from), ok)
    }

    fn grant(&self, time: Duration) -> StoreFuture<'_, LeaseId> {
        self.measure("grant", self.store.grant(time), ok)
    }

    fn keep_alive(&self, lease: LeaseId) -> StoreFuture<'_, ()> {
        self.measure("keep_alive", self.store.keep_alive(lease), ok)
    }

    fn revoke(&self, lease: LeaseId) -> StoreFuture<'_, ()> {
        self.measure("revoke", self.store.revoke(lease), ok)
    }

    fn regression(&self) -> Option<Regression> {
        self.store.regression()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{
        embedded::EmbeddedStore,
        faulty::{Fault, FaultyStore},
        store::Compare,
    };

    #[tokio::test]
    async fn requests_are_counted_by_kind_and_outcome() {
        let (store, metrics) = (FaultyStore::new(EmbeddedStore::in_memory()), Metrics::new());
        let metered = MeteredStore::new(Arc::new(store.clone()), metrics.clone());
        let absent = || Transaction::new().when(Compare::Absent("/k".to_owned())).put("/k", "v");
        store.fail_transactions([None, None, Some(Fault::Refused), Some(Fault::Lost)]);
        metered.transact(absent()).await.expect("committed");
        metered.transact(absent()).await.expect("compare failed");
        metered.transact(absent()).await.expect_err("injected fault");
        metered.transact(absent()).await.expect_err("injected fault");
        metered.get("/k").await.expect("readable");
        let text = metrics.render(crate::telemetry::MetricsFormat::OpenMetrics);
        for (request, outcome) in [
            ("transact", "committed"),
            ("transact", "compare_failed"),
            ("transact", "unavailable"),
            ("transact", "unknown"),
            ("get", "ok"),
        ] {
            let line = format!("strandline_metadata_requests_total{{request=\"{request}\",outcome=\"{outcome}\"}} 1");
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        let line = "strandline_metadata_request_seconds_count{request=\"transact\"} 4";
        assert!(text.lines().any(|found| found == line), "{text}");
    }
}
