//! The embedded store with injected faults, for tests.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use super::{
    embedded::EmbeddedStore,
    store::{
        GetResult, LeaseId, ListResult, MetaStore, MetaStoreError, Revision, StoreFuture, Transaction, TxnOutcome,
        Watch,
    },
};
use crate::task::lock::Mutex;

/// Fault of one transaction. Each injected fault occurs once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Not applied; the error has a known outcome.
    Refused,
    /// Not applied; the error has an unknown outcome.
    Lost,
    /// Applied; the error has an unknown outcome.
    ResponseLost,
}

#[derive(Debug, Default)]
struct InjectedFaults {
    /// Faults of the next transactions, in order; `None` means no fault.
    transactions: VecDeque<Option<Fault>>,
    /// Number of the next `get` calls that fail.
    failing_gets: usize,
    /// Number of the next `list` calls that fail.
    failing_lists: usize,
    break_watches: bool,
    /// Number of `transact` calls so far, failed ones included.
    transaction_count: usize,
}

/// An embedded store with injected faults. Clones share the store and its faults.
#[derive(Clone, Debug)]
pub(crate) struct FaultyStore {
    store: EmbeddedStore,
    faults: Arc<Mutex<InjectedFaults>>,
}

impl FaultyStore {
    pub(crate) fn new(store: EmbeddedStore) -> Self {
        Self { store, faults: Arc::default() }
    }

    /// Appends faults of the next transactions, in order; `None` means no fault.
    pub(crate) fn fail_transactions(&self, faults: impl IntoIterator<Item = Option<Fault>>) {
        self.faults.lock().transactions.extend(faults);
    }

    /// Makes this number of the next `get` calls fail.
    pub(crate) fn fail_gets(&self, count: usize) {
        self.faults.lock().failing_gets = count;
    }

    /// Makes this number of the next `list` calls fail.
    pub(crate) fn fail_lists(&self, count: usize) {
        self.faults.lock().failing_lists = count;
    }

    /// Makes each new watch return no changes, and fail with `Compacted` after a second.
    pub(crate) fn break_watches(&self) {
        self.faults.lock().break_watches = true;
    }

    /// Returns the number of `transact` calls so far, failed ones included.
    pub(crate) fn transaction_count(&self) -> usize {
        self.faults.lock().transaction_count
    }
}

impl MetaStore for FaultyStore {
    fn get<'a>(&'a self, key: &'a str) -> StoreFuture<'a, GetResult> {
        let mut faults = self.faults.lock();
        if faults.failing_gets > 0 {
            faults.failing_gets -= 1;
            return Box::pin(async { Err(MetaStoreError::unavailable("injected fault")) });
        }
        self.store.get(key)
    }

    fn list<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, ListResult> {
        let mut faults = self.faults.lock();
        if faults.failing_lists > 0 {
            faults.failing_lists -= 1;
            return Box::pin(async { Err(MetaStoreError::unavailable("injected fault")) });
        }
        self.store.list(prefix)
    }

    fn transact(&self, transaction: Transaction) -> StoreFuture<'_, TxnOutcome> {
        let mut faults = self.faults.lock();
        faults.transaction_count += 1;
        let fault = faults.transactions.pop_front().flatten();
        drop(faults);
        Box::pin(async move {
            match fault {
                None => self.store.transact(transaction).await,
                Some(Fault::Refused) => Err(MetaStoreError::unavailable("injected fault")),
                Some(Fault::Lost) => Err(MetaStoreError::unknown("injected fault")),
                Some(Fault::ResponseLost) => {
                    self.store.transact(transaction).await?;
                    Err(MetaStoreError::unknown("injected fault"))
                }
            }
        })
    }

    fn watch<'a>(&'a self, prefix: &'a str, from: Revision) -> StoreFuture<'a, Watch> {
        if !self.faults.lock().break_watches {
            return self.store.watch(prefix, from);
        }
        let broken = futures::stream::once(async move {
            tokio::time::sleep(Duration::from_secs(1)).await;
            Err(MetaStoreError::Compacted { from, oldest: from.next() })
        });
        Box::pin(async { Ok(Watch::new(broken)) })
    }

    fn grant(&self, time: Duration) -> StoreFuture<'_, LeaseId> {
        self.store.grant(time)
    }

    fn keep_alive(&self, lease: LeaseId) -> StoreFuture<'_, ()> {
        self.store.keep_alive(lease)
    }

    fn revoke(&self, lease: LeaseId) -> StoreFuture<'_, ()> {
        self.store.revoke(lease)
    }
}
