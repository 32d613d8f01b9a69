//! The embedded store with injected faults, for tests: each requested fault occurs once.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use super::{
    embedded::EmbeddedStore,
    store::{Answer, LeaseId, Listing, MetaStore, Outcome, Reading, Revision, StoreError, Transaction, Watch},
};

/// Fault of one transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Not applied; the error has a known outcome.
    Refused,
    /// Not applied; the error has an unknown outcome.
    Lost,
    /// Applied; the error has an unknown outcome.
    AnswerLost,
}

#[derive(Debug, Default)]
struct Faults {
    transactions: VecDeque<Option<Fault>>,
    gets: usize,
    lists: usize,
    break_watches: bool,
    transacted: usize,
}

/// A store with injected faults. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Faulty {
    store: EmbeddedStore,
    faults: Arc<Mutex<Faults>>,
}

impl Faulty {
    pub(crate) fn new(store: EmbeddedStore) -> Self {
        Self { store, faults: Arc::default() }
    }

    /// Sets the faults of the next transactions, in order; `None` means no fault.
    pub(crate) fn transactions(&self, faults: impl IntoIterator<Item = Option<Fault>>) {
        self.faults().transactions.extend(faults);
    }

    /// Makes this number of the next reads fail.
    pub(crate) fn fail_gets(&self, count: usize) {
        self.faults().gets = count;
    }

    /// Makes this number of the next lists fail.
    pub(crate) fn fail_lists(&self, count: usize) {
        self.faults().lists = count;
    }

    /// Makes new watches return no changes and end after a second.
    pub(crate) fn break_watches(&self) {
        self.faults().break_watches = true;
    }

    /// Returns the number of transactions so far.
    pub(crate) fn transacted(&self) -> usize {
        self.faults().transacted
    }

    fn faults(&self) -> MutexGuard<'_, Faults> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MetaStore for Faulty {
    fn get<'a>(&'a self, key: &'a str) -> Answer<'a, Reading> {
        let mut faults = self.faults();
        if faults.gets > 0 {
            faults.gets -= 1;
            return Box::pin(async { Err(StoreError::unavailable("cut off")) });
        }
        self.store.get(key)
    }

    fn list<'a>(&'a self, prefix: &'a str) -> Answer<'a, Listing> {
        let mut faults = self.faults();
        if faults.lists > 0 {
            faults.lists -= 1;
            return Box::pin(async { Err(StoreError::unavailable("cut off")) });
        }
        self.store.list(prefix)
    }

    fn transact(&self, transaction: Transaction) -> Answer<'_, Outcome> {
        let mut faults = self.faults();
        faults.transacted += 1;
        let fault = faults.transactions.pop_front().flatten();
        drop(faults);
        Box::pin(async move {
            match fault {
                None => self.store.transact(transaction).await,
                Some(Fault::Refused) => Err(StoreError::unavailable("cut off")),
                Some(Fault::Lost) => Err(StoreError::unknown("cut off")),
                Some(Fault::AnswerLost) => {
                    self.store.transact(transaction).await?;
                    Err(StoreError::unknown("cut off"))
                }
            }
        })
    }

    fn watch<'a>(&'a self, prefix: &'a str, from: Revision) -> Answer<'a, Watch> {
        if !self.faults().break_watches {
            return self.store.watch(prefix, from);
        }
        let broken = futures::stream::once(async move {
            tokio::time::sleep(Duration::from_secs(1)).await;
            Err(StoreError::Compacted { from, oldest: from.next() })
        });
        Box::pin(async { Ok(Watch::new(broken)) })
    }

    fn grant(&self, time: Duration) -> Answer<'_, LeaseId> {
        self.store.grant(time)
    }

    fn keep_alive(&self, lease: LeaseId) -> Answer<'_, ()> {
        self.store.keep_alive(lease)
    }

    fn revoke(&self, lease: LeaseId) -> Answer<'_, ()> {
        self.store.revoke(lease)
    }
}
