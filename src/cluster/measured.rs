//! A metadata store whose requests are counted and timed. The wrapper changes neither requests nor responses.
//!
//! One request is one call of a broker, which may take several attempts at several etcd members. The measured time is
//! the time that the caller waits.

use std::{fmt, sync::Arc, time::Duration};

use futures::FutureExt as _;

use super::store::{
    Answer, LeaseId, Listing, MetaStore, Outcome, Reading, Regression, Revision, StoreError, Transaction, Watch,
};
use crate::{task::clock, telemetry::Metrics};

/// A store and the metrics of its requests. Cheap to clone.
#[derive(Clone)]
pub struct Measured {
    store: Arc<dyn MetaStore>,
    metrics: Metrics,
}

impl Measured {
    /// Returns a store that counts the requests to `store`.
    pub fn new(store: Arc<dyn MetaStore>, metrics: Metrics) -> Self {
        Self { store, metrics }
    }

    fn measure<'a, T>(
        &'a self,
        request: &'static str,
        asked: Answer<'a, T>,
        done: impl Fn(&T) -> &'static str + Send + 'a,
    ) -> Answer<'a, T>
    where
        T: Send + 'a,
    {
        async move {
            let began = clock::monotonic();
            let answer = asked.await;
            let outcome = match &answer {
                Ok(answer) => done(answer),
                Err(error) => failed(error),
            };
            self.metrics.metadata_requests.count(request, outcome);
            self.metrics.metadata_request_seconds.observe(request, began.elapsed());
            answer
        }
        .boxed()
    }
}

/// Returns the outcome label of a failed request.
fn failed(error: &StoreError) -> &'static str {
    match error {
        StoreError::Unavailable { outcome_unknown: false, .. } => "unavailable",
        StoreError::Unavailable { outcome_unknown: true, .. } => "unknown",
        StoreError::Refused { .. } | StoreError::TooLarge { .. } => "denied",
        StoreError::NoSpace { .. } => "no_space",
        StoreError::Regressed(_) => "regressed",
        StoreError::Compacted { .. } => "compacted",
        StoreError::LeaseGone { .. } => "lease_gone",
    }
}

fn done<T>(_: &T) -> &'static str {
    "done"
}

impl fmt::Debug for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.store.fmt(f)
    }
}

impl MetaStore for Measured {
    fn get<'a>(&'a self, key: &'a str) -> Answer<'a, Reading> {
        self.measure("get", self.store.get(key), done)
    }

    fn list<'a>(&'a self, prefix: &'a str) -> Answer<'a, Listing> {
        self.measure("list", self.store.list(prefix), done)
    }

    fn transact(&self, transaction: Transaction) -> Answer<'_, Outcome> {
        self.measure("transact", self.store.transact(transaction), |outcome| match outcome {
            Outcome::Done { .. } => "done",
            // Another writer came first, which compare-and-set exists to detect.
            Outcome::Refused { .. } => "refused",
        })
    }

    fn watch<'a>(&'a self, prefix: &'a str, from: Revision) -> Answer<'a, Watch> {
        self.measure("watch", self.store.watch(prefix, from), done)
    }

    fn grant(&self, time: Duration) -> Answer<'_, LeaseId> {
        self.measure("grant", self.store.grant(time), done)
    }

    fn keep_alive(&self, lease: LeaseId) -> Answer<'_, ()> {
        self.measure("keep_alive", self.store.keep_alive(lease), done)
    }

    fn revoke(&self, lease: LeaseId) -> Answer<'_, ()> {
        self.measure("revoke", self.store.revoke(lease), done)
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
        faulty::{Fault, Faulty},
        store::Compare,
    };

    #[tokio::test]
    async fn requests_are_counted_by_kind_and_outcome() {
        let (store, metrics) = (Faulty::new(EmbeddedStore::in_memory()), Metrics::new());
        let measured = Measured::new(Arc::new(store.clone()), metrics.clone());
        let absent = || Transaction::new().when(Compare::Absent("/k".to_owned())).put("/k", "v");
        store.transactions([None, None, Some(Fault::Refused), Some(Fault::Lost)]);
        measured.transact(absent()).await.expect("done");
        measured.transact(absent()).await.expect("refused");
        measured.transact(absent()).await.expect_err("cut off");
        measured.transact(absent()).await.expect_err("cut off");
        measured.get("/k").await.expect("answers");
        let text = metrics.render(crate::telemetry::MetricsFormat::OpenMetrics);
        for (request, outcome) in [
            ("transact", "done"),
            ("transact", "refused"),
            ("transact", "unavailable"),
            ("transact", "unknown"),
            ("get", "done"),
        ] {
            let line = format!("strandline_metadata_requests_total{{request=\"{request}\",outcome=\"{outcome}\"}} 1");
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        let line = "strandline_metadata_request_seconds_count{request=\"transact\"} 4";
        assert!(text.lines().any(|found| found == line), "{text}");
    }
}
