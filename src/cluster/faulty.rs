//! The embedded store with a bad link before it, for tests: what it is told to do wrong, it does once each.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use super::{
    embedded::EmbeddedStore,
    store::{Answer, LeaseId, Listing, MetaStore, Outcome, Reading, Revision, StoreError, Transaction, Watch},
};

/// What becomes of one transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It is not done, and the caller knows.
    Refused,
    /// It is not done, and the caller does not know.
    Lost,
    /// It is done, and the caller does not know.
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

/// The store. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Faulty {
    store: EmbeddedStore,
    faults: Arc<Mutex<Faults>>,
}

impl Faulty {
    pub(crate) fn new(store: EmbeddedStore) -> Self {
        Self { store, faults: Arc::default() }
    }

    /// What becomes of the next transactions, one after the other; `None` goes through.
    pub(crate) fn transactions(&self, faults: impl IntoIterator<Item = Option<Fault>>) {
        self.faults().transactions.extend(faults);
    }

    /// So many of the next keys that are asked for are not answered.
    pub(crate) fn fail_gets(&self, count: usize) {
        self.faults().gets = count;
    }

    /// So many of the next listings fail.
    pub(crate) fn fail_lists(&self, count: usize) {
        self.faults().lists = count;
    }

    /// From now on watches show nothing and end after a second.
    pub(crate) fn break_watches(&self) {
        self.faults().break_watches = true;
    }

    /// How many transactions were asked for.
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
