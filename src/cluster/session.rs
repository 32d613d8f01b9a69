//! This broker's registration: a leased key whose create revision is the broker epoch.
//!
//! # Invariants
//!
//! - An epoch is published only after the store holds the registration that it names. It only detects failure and fences
//!   nothing by itself: who acts on it compares it in a transaction.
//! - A registration is taken over only from the same data directory, whose lock this process holds: then the one that
//!   it replaces is this broker's own, from before a crash.
//!
//! # Shutdown
//!
//! When its tasks are stopped the lease is revoked, so that the others need not wait for its end.

use std::{sync::Arc, time::Duration};

use tokio::sync::watch;

use super::{
    keys::{BrokerValue, Keys, Value},
    store::{Compare, LeaseId, MetaStore, Outcome, Revision, StoreError, Transaction},
};
use crate::{model::BrokerId, task::Tasks};

/// How long a stop waits for the lease's end.
const REVOKE_TIMEOUT: Duration = Duration::from_secs(1);

/// The registration of a running broker. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Session {
    epoch: watch::Receiver<Revision>,
}

/// Why a broker could not register.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegisterError {
    /// Another broker has the number.
    #[error(
        "broker id {id} is taken by a broker at {address} with another data directory: set broker.id to a free one"
    )]
    Taken {
        /// The number.
        id: BrokerId,
        /// Where that broker is reached.
        address: String,
    },
    /// The metadata store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl RegisterError {
    /// Whether the same registration may succeed later.
    pub const fn retryable(&self) -> bool {
        match self {
            Self::Taken { .. } => false,
            Self::Store(error) => error.retryable(),
        }
    }
}

impl Session {
    /// Registers a broker and keeps it registered until the tasks are stopped. `time` is how long after its death the
    /// others notice by the lease alone.
    pub async fn register(
        store: Arc<dyn MetaStore>,
        keys: &Keys,
        id: BrokerId,
        value: BrokerValue,
        time: Duration,
        tasks: &Tasks,
    ) -> Result<Self, RegisterError> {
        let registration = Registration { store, key: keys.broker(id), id, value, time };
        let (lease, epoch) = registration.begin().await?;
        let (publish, epoch) = watch::channel(epoch);
        let stop = tasks.clone();
        tasks.spawn("broker session", async move { registration.keep(lease, publish, stop).await });
        Ok(Self { epoch })
    }

    /// The broker epoch now. It grows when the lease was lost and the broker registered again.
    pub fn epoch(&self) -> Revision {
        *self.epoch.borrow()
    }

    /// The broker epoch and its changes.
    pub fn watch(&self) -> watch::Receiver<Revision> {
        self.epoch.clone()
    }
}

struct Registration {
    store: Arc<dyn MetaStore>,
    key: String,
    id: BrokerId,
    value: BrokerValue,
    time: Duration,
}

impl Registration {
    /// Puts the key under a new lease. The lease of an attempt that failed ends by itself.
    async fn begin(&self) -> Result<(LeaseId, Revision), RegisterError> {
        let lease = self.store.grant(self.time).await?;
        loop {
            let transaction = Transaction::new()
                .when(Compare::Absent(self.key.clone()))
                .put_leased(self.key.as_str(), self.value.encode(), lease)
                .else_get(self.key.as_str());
            let found = match self.store.transact(transaction).await? {
                Outcome::Done { revision } => return Ok((lease, revision)),
                Outcome::Refused { mut found, .. } => found.pop().flatten(),
            };
            let Some(entry) = found else { continue };
            if entry.lease == Some(lease) {
                return Ok((lease, entry.create_revision));
            }
            match BrokerValue::decode(&entry.key, &entry.value) {
                Ok(other) if other.directory_id != self.value.directory_id => {
                    return Err(RegisterError::Taken { id: self.id, address: other.addresses.grpc });
                }
                // Its own from before, or nobody's. Deleted first: a new registration needs a create revision of its own.
                _ => {
                    let same = Compare::ModRevision(entry.key.clone(), entry.mod_revision);
                    self.store.transact(Transaction::new().when(same).delete(entry.key)).await?;
                }
            }
        }
    }

    async fn keep(self, mut lease: LeaseId, publish: watch::Sender<Revision>, stop: Tasks) {
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                () = tokio::time::sleep(self.time / 3) => match self.store.keep_alive(lease).await {
                    Ok(()) => {}
                    Err(StoreError::LeaseGone { .. }) => lease = self.again(lease, &publish).await,
                    Err(error) => tracing::warn!(%error, "the broker's lease could not be kept alive; trying again"),
                },
            }
        }
        if !matches!(tokio::time::timeout(REVOKE_TIMEOUT, self.store.revoke(lease)).await, Ok(Ok(()))) {
            tracing::info!("the broker's lease could not be revoked; it ends by itself");
        }
    }

    /// Registers again after the lease was lost. Returns the old lease when that fails, to try at the next turn.
    async fn again(&self, lost: LeaseId, publish: &watch::Sender<Revision>) -> LeaseId {
        match self.begin().await {
            Ok((lease, epoch)) => {
                tracing::warn!(%epoch, "the broker's lease was lost; it is registered again");
                publish.send_replace(epoch);
                lease
            }
            Err(error) => {
                tracing::error!(%error, "the broker's lease was lost and it cannot register; trying again");
                lost
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cluster::{embedded::EmbeddedStore, keys::Addresses},
        task::clock,
    };

    const TIME: Duration = Duration::from_secs(9);

    fn value(directory: &str) -> BrokerValue {
        BrokerValue {
            addresses: Addresses { grpc: "a:1".to_owned(), http: None },
            rack: None,
            directory_id: directory.to_owned(),
            version: "0".to_owned(),
        }
    }

    async fn register(store: &EmbeddedStore, directory: &str, tasks: &Tasks) -> Result<Session, RegisterError> {
        let keys = Keys::new("test").expect("valid");
        Session::register(Arc::new(store.clone()), &keys, BrokerId(1), value(directory), TIME, tasks).await
    }

    async fn registered(store: &EmbeddedStore) -> Option<Revision> {
        let entry = store.get("/strandline/test/brokers/1").await.expect("answers").entry;
        entry.map(|entry| entry.create_revision)
    }

    #[tokio::test(start_paused = true)]
    async fn a_broker_stays_registered_while_it_lives_and_leaves_when_it_stops() {
        let (store, tasks) = (EmbeddedStore::in_memory(), Tasks::new());
        let session = register(&store, "d", &tasks).await.expect("registered");
        for _ in 0..20 {
            tokio::time::sleep(TIME / 2).await;
            store.tick(clock::monotonic()).await.expect("answers");
        }
        assert_eq!(registered(&store).await, Some(session.epoch()));
        tasks.stop().await;
        assert_eq!(registered(&store).await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_lost_lease_gives_a_new_epoch() {
        let (store, tasks) = (EmbeddedStore::in_memory(), Tasks::new());
        let session = register(&store, "d", &tasks).await.expect("registered");
        let (first, mut epochs) = (session.epoch(), session.watch());
        store.tick(clock::monotonic() + TIME * 2).await.expect("answers");
        assert_eq!(registered(&store).await, None);
        epochs.changed().await.expect("it registers again");
        assert!(session.epoch() > first);
        assert_eq!(registered(&store).await, Some(session.epoch()));
        tasks.stop().await;
    }

    #[tokio::test(start_paused = true)]
    async fn only_its_own_data_directory_takes_over_a_registration() {
        let (store, dead, tasks) = (EmbeddedStore::in_memory(), Tasks::new(), Tasks::new());
        let before = register(&store, "d", &dead).await.expect("registered").epoch();
        let error = register(&store, "another", &tasks).await.expect_err("taken");
        assert_eq!(error, RegisterError::Taken { id: BrokerId(1), address: "a:1".to_owned() });
        let after = register(&store, "d", &tasks).await.expect("its own from before").epoch();
        assert!(after > before, "a new registration is a new epoch");
        tasks.stop().await;
        dead.stop().await;
    }
}
