//! The registration of this broker: a leased key whose create revision is the broker epoch.
//!
//! # Overview
//!
//! 1. A starting broker deletes the registration of its earlier process ([`RegistrationRequest::clear`]). From then on
//!    no other broker can add this broker to an ISR.
//! 2. The broker verifies its local replicas (`startup_verification`).
//! 3. The broker registers ([`RegistrationRequest::register`]) in one transaction with its directory record. That
//!    record must be the one that the verification was based on.
//! 4. A task renews the lease and watches the key in the metadata cache. If the registration was deleted, the task
//!    registers again under a new epoch.
//!
//! # Invariants
//!
//! - An epoch is published only after the store holds its registration. An epoch only detects failure and fences
//!   nothing by itself: a writer that depends on an epoch compares it in its transaction.
//! - Only a process with the same data directory replaces a registration. The directory's lock proves that the earlier
//!   process has exited, unless the directory was copied. Then the later process wins, and the earlier one is
//!   superseded and exits.
//!
//! # Shutdown
//!
//! When the session or its tasks are stopped, the lease is revoked, so that other brokers need not wait for its
//! expiry.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};

use super::{
    keys::{BrokerState, BrokerValue, DirectoryValue, Key, Keys, Value},
    metadata::{MetadataCache, MetadataSnapshot},
    store::{Compare, KeyValue, LeaseId, MetaStore, MetaStoreError, Revision, Transaction, TxnOutcome},
};
use crate::{
    model::BrokerId,
    task::{Tasks, clock},
    telemetry::LogThrottle,
};

/// Maximum time that a stop waits for the revocation of the lease.
const REVOKE_TIMEOUT: Duration = Duration::from_secs(1);

/// Pause before a failed store operation is retried.
const RETRY_INTERVAL: Duration = Duration::from_millis(250);

/// State of a broker's registration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionState {
    Registered {
        epoch: Revision,
        /// Lease of the registration.
        lease: LeaseId,
    },
    /// The registration is gone and is being created again. The process and its data are the same.
    Lost,
    /// Another process registered under this broker id with a copy of the data directory. Final: one of the two must
    /// stop.
    Superseded {
        /// Client address of the other process, or a placeholder text if the registration could not be read.
        address: String,
    },
}

/// Error of a registration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegisterError {
    /// Another broker has the broker id.
    #[error(
        "broker id {id} is taken by a broker at {address} with another data directory: set broker.id to a free id, and \
         broker.data_dir to a new folder, because this folder is now recorded as that of broker {id}"
    )]
    Taken {
        id: BrokerId,
        /// Client address of the other broker.
        address: String,
    },
    /// Another process registered under this broker id since the startup verification.
    #[error("another process runs as broker {id} with a copy of this data directory: stop one of the two")]
    Superseded { id: BrokerId },
    #[error(transparent)]
    Store(#[from] MetaStoreError),
}

impl RegisterError {
    /// Returns true if the same registration may succeed later.
    pub const fn retryable(&self) -> bool {
        match self {
            Self::Taken { .. } | Self::Superseded { .. } => false,
            Self::Store(error) => error.retryable(),
        }
    }
}

/// Content and destination of a registration.
#[derive(Clone, Debug)]
pub struct RegistrationRequest {
    pub store: Arc<dyn MetaStore>,
    pub keys: Keys,
    pub id: BrokerId,
    pub value: BrokerValue,
    /// Duration of the lease: time after a crash until other brokers detect it by the lease alone.
    pub time: Duration,
}

impl RegistrationRequest {
    /// Deletes an earlier registration of the same data directory. A registration of another directory, or in a format
    /// that this version does not read, may belong to an exited process with a replaced disk. So this function waits
    /// for the duration of a lease until such a registration ends.
    pub async fn clear(&self) -> Result<(), RegisterError> {
        let key = self.keys.broker(self.id);
        let deadline = clock::monotonic() + self.time + Duration::from_secs(1);
        let mut logged = false;
        while let Some(entry) = self.store.get(&key).await?.entry {
            let other = BrokerValue::decode(&entry.key, &entry.value);
            if other.as_ref().is_ok_and(|other| other.directory_id == self.value.directory_id) {
                self.delete_entry(&entry).await?;
                continue;
            }
            let address = client_address(other.ok().as_ref());
            if clock::monotonic() > deadline {
                return Err(RegisterError::Taken { id: self.id, address });
            }
            if !std::mem::replace(&mut logged, true) {
                tracing::warn!(
                    broker = %self.id, address,
                    "the broker id is registered with another data directory: waiting, in case that broker is gone"
                );
            }
            tokio::time::sleep(RETRY_INTERVAL).await;
        }
        Ok(())
    }

    /// Registers the broker and keeps it registered until the session is stopped. `directory_revision` is the revision
    /// of this broker's directory record at its startup verification; `None` if there was no record.
    pub async fn register(
        self,
        directory_revision: Option<Revision>,
        metadata: &MetadataCache,
        tasks: &Tasks,
    ) -> Result<Session, RegisterError> {
        let renewed = Arc::new(Mutex::new(clock::monotonic()));
        let lease = self.store.grant(self.time).await?;
        let (epoch, directory) = match self.write_registration(lease, directory_revision).await? {
            RegisterResult::Registered { epoch, directory } => (epoch, directory),
            RegisterResult::Superseded { .. } => return Err(RegisterError::Superseded { id: self.id }),
        };
        let (publish, state) = watch::channel(SessionState::Registered { epoch, lease });
        let flags = Arc::new(BrokerFlags { disk_pressure: self.value.disk_pressure.into(), ..BrokerFlags::default() });
        let session_tasks = tasks.child();
        let registration = Arc::new(self);
        let keeper = LeaseKeeper {
            registration: Arc::clone(&registration),
            flags: Arc::clone(&flags),
            renewed: Arc::clone(&renewed),
            publish,
            lease,
            epoch,
            directory,
            renewal_failures: LogThrottle::default(),
            registration_failures: LogThrottle::default(),
        };
        session_tasks.spawn("broker session", keeper.run(metadata.watch(), session_tasks.clone()));
        Ok(Session { registration, state, flags, renewed, tasks: session_tasks })
    }

    /// Returns the value of the directory record while this process runs.
    fn directory(&self) -> DirectoryValue {
        let BrokerValue { directory_id, incarnation, .. } = &self.value;
        DirectoryValue { directory_id: directory_id.clone(), incarnation: incarnation.clone() }
    }

    /// Writes both keys in one transaction. Repeats until the transaction is applied or another process is found.
    async fn write_registration(
        &self,
        lease: LeaseId,
        directory_revision: Option<Revision>,
    ) -> Result<RegisterResult, MetaStoreError> {
        let (broker, directory) = (self.keys.broker(self.id), self.keys.directory(self.id));
        let mut directory_revision = directory_revision;
        loop {
            let same = match directory_revision {
                Some(revision) => Compare::ModRevision(directory.clone(), revision),
                None => Compare::Absent(directory.clone()),
            };
            let transaction = Transaction::new()
                .when(Compare::Absent(broker.clone()))
                .when(same)
                .put_leased(broker.as_str(), self.value.encode(), lease)
                .put(directory.as_str(), self.directory().encode())
                .else_get(broker.as_str())
                .else_get(directory.as_str());
            let mut found = match self.store.transact(transaction).await? {
                TxnOutcome::Committed { revision } => {
                    return Ok(RegisterResult::Registered { epoch: revision, directory: revision });
                }
                TxnOutcome::CompareFailed { found, .. } => found.into_iter(),
            };
            let (registered, recorded) = (found.next().flatten(), found.next().flatten());
            let other = registered.as_ref().and_then(|entry| BrokerValue::decode(&entry.key, &entry.value).ok());
            let ours = recorded.as_ref().filter(|entry| entry.value == self.directory().encode());
            if recorded.as_ref().map(|entry| entry.mod_revision) != directory_revision && ours.is_none() {
                return Ok(RegisterResult::Superseded { address: client_address(other.as_ref()) });
            }
            if let (Some(entry), Some(record)) = (&registered, ours)
                && entry.lease == Some(lease)
            {
                // The response of an earlier attempt was lost: it was applied.
                return Ok(RegisterResult::Registered { epoch: entry.create_revision, directory: record.mod_revision });
            }
            directory_revision = recorded.map(|entry| entry.mod_revision);
            // This process's own earlier registration, or one that no broker wrote. The new registration needs its own
            // create revision.
            if let Some(entry) = registered {
                self.delete_entry(&entry).await?;
            }
        }
    }

    async fn delete_entry(&self, entry: &KeyValue) -> Result<(), MetaStoreError> {
        let same = Compare::ModRevision(entry.key.clone(), entry.mod_revision);
        self.store.transact(Transaction::new().when(same).delete(entry.key.as_str())).await?;
        Ok(())
    }
}

/// Returns the client address of a broker, or a placeholder if the registration could not be read.
fn client_address(value: Option<&BrokerValue>) -> String {
    value.map_or_else(|| "an unknown address".to_owned(), |value| value.listeners.client().to_owned())
}

enum RegisterResult {
    Registered { epoch: Revision, directory: Revision },
    Superseded { address: String },
}

/// The registration of a running broker. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Session {
    registration: Arc<RegistrationRequest>,
    state: watch::Receiver<SessionState>,
    flags: Arc<BrokerFlags>,
    renewed: Arc<Mutex<Instant>>,
    tasks: Tasks,
}

impl Session {
    /// Returns the state of the registration, with its changes.
    pub fn state(&self) -> watch::Receiver<SessionState> {
        self.state.clone()
    }

    /// Returns the current broker epoch; `None` while the broker is not registered.
    pub fn epoch(&self) -> Option<Revision> {
        match *self.state.borrow() {
            SessionState::Registered { epoch, .. } => Some(epoch),
            SessionState::Lost | SessionState::Superseded { .. } => None,
        }
    }

    /// Returns the minimum remaining lifetime of the lease without further renewals; zero while the broker is not
    /// registered. The value depends on this process's clock, so no invariant may rely on it.
    pub fn lease_remaining(&self) -> Duration {
        let renewed = *self.renewed.lock();
        match *self.state.borrow() {
            SessionState::Registered { .. } => self.registration.time.saturating_sub(renewed.elapsed()),
            SessionState::Lost | SessionState::Superseded { .. } => Duration::ZERO,
        }
    }

    /// Publishes that this broker is shutting down. The broker epoch stays.
    pub async fn publish_stopping(&self) -> Result<(), MetaStoreError> {
        self.flags.stopping.store(true, Ordering::Release);
        self.update_flags().await
    }

    /// Publishes whether the broker is under disk pressure, so that it gets no new replicas. The broker epoch stays.
    pub async fn set_disk_pressure(&self, full: bool) -> Result<(), MetaStoreError> {
        self.flags.disk_pressure.store(full, Ordering::Release);
        self.update_flags().await
    }

    /// Publishes whether the disk is full, so that other brokers take over its leaderships where possible. The broker
    /// epoch stays.
    pub async fn set_disk_full(&self, full: bool) -> Result<(), MetaStoreError> {
        self.flags.disk_full.store(full, Ordering::Release);
        self.update_flags().await
    }

    /// Returns true if the registration reports disk pressure.
    pub fn is_under_disk_pressure(&self) -> bool {
        self.flags.disk_pressure.load(Ordering::Acquire)
    }

    /// Writes the current flags into the registration.
    async fn update_flags(&self) -> Result<(), MetaStoreError> {
        let RegistrationRequest { store, keys, id, value, .. } = &*self.registration;
        loop {
            let SessionState::Registered { epoch, lease } = self.state.borrow().clone() else { return Ok(()) };
            let (key, value) = (keys.broker(*id), self.flags.apply_to(value));
            // If the compare fails, the registration was lost; the new registration will contain the flags.
            let same = Compare::CreateRevision(key.clone(), epoch);
            store.transact(Transaction::new().when(same).put_leased(key, value.encode(), lease)).await?;
            // The flags may have changed meanwhile, and this write may have overwritten the newer flags.
            if self.flags.apply_to(&value) == value {
                return Ok(());
            }
        }
    }

    /// Stops the session and revokes the lease.
    pub async fn leave(&self) {
        self.tasks.stop().await;
    }
}

/// Flags of the registration that may change while the broker is registered.
#[derive(Debug, Default)]
struct BrokerFlags {
    stopping: AtomicBool,
    disk_pressure: AtomicBool,
    disk_full: AtomicBool,
}

impl BrokerFlags {
    /// Returns the registration's value with these flags.
    fn apply_to(&self, value: &BrokerValue) -> BrokerValue {
        let stopping = self.stopping.load(Ordering::Acquire);
        let state = if stopping { BrokerState::Stopping } else { BrokerState::Running };
        let (disk_pressure, disk_full) =
            (self.disk_pressure.load(Ordering::Acquire), self.disk_full.load(Ordering::Acquire));
        BrokerValue { state, disk_pressure, disk_full, ..value.clone() }
    }
}

/// The task that keeps the broker registered.
struct LeaseKeeper {
    registration: Arc<RegistrationRequest>,
    flags: Arc<BrokerFlags>,
    /// Start time of the last successful renewal.
    renewed: Arc<Mutex<Instant>>,
    publish: watch::Sender<SessionState>,
    lease: LeaseId,
    epoch: Revision,
    /// Revision of the last write to the directory record.
    directory: Revision,
    renewal_failures: LogThrottle,
    registration_failures: LogThrottle,
}

impl LeaseKeeper {
    async fn run(mut self, mut metadata: watch::Receiver<Arc<MetadataSnapshot>>, stop: Tasks) {
        let renew_interval = self.registration.time / 3;
        let mut due = clock::monotonic() + renew_interval;
        loop {
            let is_registered = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                Ok(()) = metadata.changed() => {
                    let missing = self.is_missing(&metadata.borrow_and_update());
                    if missing { self.reregister().await } else { true }
                }
                () = tokio::time::sleep_until(due) => {
                    let is_registered = self.keep_alive().await;
                    due = clock::monotonic() + if is_registered { renew_interval } else { RETRY_INTERVAL };
                    is_registered
                }
            };
            if matches!(*self.publish.borrow(), SessionState::Superseded { .. }) {
                return;
            }
            if !is_registered {
                due = due.min(clock::monotonic() + RETRY_INTERVAL);
            }
        }
        let revoked = tokio::time::timeout(REVOKE_TIMEOUT, self.registration.store.revoke(self.lease));
        if !matches!(revoked.await, Ok(Ok(()))) {
            tracing::info!("the broker's lease could not be revoked: it will expire");
        }
    }

    /// Returns true if the metadata cache does not show this registration although its revision is new enough. False
    /// while the registration is being created again: the timer triggers the next attempt.
    fn is_missing(&self, state: &MetadataSnapshot) -> bool {
        if state.revision() < self.epoch || matches!(*self.publish.borrow(), SessionState::Lost) {
            return false;
        }
        let entry = state.brokers().get(&self.registration.id);
        entry.is_none_or(|entry| entry.create_revision != self.epoch)
            || state.unreadable().contains_key(&Key::Broker(self.registration.id))
    }

    /// Renews the lease. Returns false if the store was not reached.
    async fn keep_alive(&mut self) -> bool {
        if matches!(*self.publish.borrow(), SessionState::Lost) {
            return self.reregister().await;
        }
        let started = clock::monotonic();
        match self.registration.store.keep_alive(self.lease).await {
            Ok(()) => {
                self.renewed_at(started);
                if self.renewal_failures.recover().is_some() {
                    tracing::info!("the broker's lease is renewed again");
                }
                true
            }
            Err(MetaStoreError::LeaseGone { .. }) => self.reregister().await,
            Err(error) => {
                if self.renewal_failures.occur(clock::monotonic()).is_some() {
                    tracing::warn!(%error, "the broker's lease could not be renewed: retrying");
                }
                false
            }
        }
    }

    /// Registers again after the registration was lost. Returns false if another attempt is needed.
    async fn reregister(&mut self) -> bool {
        self.publish.send_if_modified(|state| std::mem::replace(state, SessionState::Lost) != SessionState::Lost);
        match self.retry_registration().await {
            Ok(RegisterResult::Registered { epoch, directory }) => {
                tracing::warn!(%epoch, "the broker's registration was lost: the broker is registered again");
                (self.epoch, self.directory) = (epoch, directory);
                self.renewal_failures.recover();
                self.registration_failures.recover();
                self.publish.send_replace(SessionState::Registered { epoch, lease: self.lease });
                true
            }
            Ok(RegisterResult::Superseded { address }) => {
                let id = self.registration.id;
                tracing::error!(
                    broker = %id, address,
                    "another process now runs under this broker id with a copy of this data directory: stop one of the \
                     two"
                );
                self.publish.send_replace(SessionState::Superseded { address });
                true
            }
            Err(error) => {
                if self.registration_failures.occur(clock::monotonic()).is_some() {
                    tracing::error!(%error, "the broker's registration was lost and cannot be created again: retrying");
                }
                false
            }
        }
    }

    fn renewed_at(&self, moment: Instant) {
        *self.renewed.lock() = moment;
    }

    async fn retry_registration(&mut self) -> Result<RegisterResult, MetaStoreError> {
        let value = self.flags.apply_to(&self.registration.value);
        let registration = RegistrationRequest { value, ..(*self.registration).clone() };
        // The old lease may have expired; a new lease is certain to be live.
        let started = clock::monotonic();
        self.lease = registration.store.grant(registration.time).await?;
        self.renewed_at(started);
        registration.write_registration(self.lease, Some(self.directory)).await
    }
}

#[cfg(test)]
mod tests;
