//! The registration of this broker: a leased key whose create revision is the broker epoch.
//!
//! # Overview
//!
//! 1. A starting broker deletes the registration of its earlier process ([`RegistrationRequest::clear`]). From then on
//!    no other broker can add this broker to an ISR.
//! 2. The broker verifies its local replicas (`startup_verification`).
//! 3. The broker registers ([`RegistrationRequest::register`]) in one transaction with its directory record. The
//!    transaction fails if the record has changed since the verification read it.
//! 4. A task renews the lease and watches the key in the metadata cache. If the key was deleted, the task registers the
//!    broker again under a new epoch.
//! 5. A second task reads the key as often as the lease is renewed, to detect a restored store.
//!
//! # Invariants
//!
//! - An epoch is published only after the store holds its registration. The end of a registration shows only that the
//!   broker may have failed, and fences nothing by itself. A writer that depends on an epoch compares it in its
//!   transaction.
//! - Only a process with the same data directory replaces a registration. The directory's lock proves that the earlier
//!   process has exited, unless the directory was copied. Then two processes run, and the one that registers first
//!   after the deletion in step 1 keeps the broker id. In most cases this is the earlier process, which registers again
//!   at once. The other one is superseded and exits.
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

use tokio::{sync::watch, time::Instant};

use super::{
    keys::{BrokerState, BrokerValue, DirectoryValue, Keys, Value},
    metadata::{MetadataCache, MetadataSnapshot},
    store::{Compare, KeyValue, LeaseId, MetaStore, MetaStoreError, Revision, Transaction, TxnOutcome},
};
use crate::{
    model::BrokerId,
    task::{Tasks, clock, lock::Mutex},
    telemetry::LogThrottle,
};

/// Maximum time that a stop waits for the revocation of the lease.
const REVOKE_TIMEOUT: Duration = Duration::from_secs(1);

/// Pause before a failed store request is retried, and between checks of the registration of another data directory.
const RETRY_INTERVAL: Duration = Duration::from_millis(250);

/// State of a broker's registration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionState {
    Registered {
        epoch: Revision,
        /// Lease of the registration.
        lease: LeaseId,
    },
    /// The registration was lost and is being created again by the same process.
    Lost,
    /// Another process registered with this broker id: with a copy of the data directory, or with another one after
    /// this process's registration had ended. Final: this process must exit.
    Superseded {
        /// Client address of the other process, or a placeholder text if the registration could not be read.
        address: String,
    },
}

/// Error of a registration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegisterError {
    /// The broker id has a registration of another data directory, or one that this version cannot read, and that
    /// registration did not expire.
    #[error(
        "broker id {id} is taken by a broker at {address} with another data directory: set broker.id to a free id, and \
         broker.data_dir to a new folder, because this folder is now recorded as that of broker {id}"
    )]
    Taken {
        id: BrokerId,
        /// Client address of the other broker.
        address: String,
    },
    /// Another process has registered with this broker id since this process verified its replicas, usually with a copy
    /// of the data directory.
    #[error(
        "another process at {address} registered with the same broker id {id} and a copy of this data directory: stop \
         one of the two processes"
    )]
    Superseded {
        id: BrokerId,
        /// Client address of the other process, or a placeholder text if the registration could not be read.
        address: String,
    },
    #[error(transparent)]
    Store(#[from] MetaStoreError),
}

impl RegisterError {
    /// Returns true if the same request may succeed later.
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
    /// Duration of the lease. After a crash, the registration expires after this time.
    pub session_timeout: Duration,
}

impl RegistrationRequest {
    /// Deletes an earlier registration of the same data directory. Does not delete a registration of another directory,
    /// or in a format that this version does not read. Such a registration may belong to a running broker, or to an
    /// exited process whose disk was replaced. This function waits up to the duration of a lease and one second for the
    /// expiry of such a registration.
    ///
    /// # Errors
    /// `Taken`: such a registration did not expire, so a running broker probably renews it. `Store`: a request failed.
    pub async fn clear(&self) -> Result<(), RegisterError> {
        let key = self.keys.broker(self.id);
        let deadline = clock::monotonic() + self.session_timeout + Duration::from_secs(1);
        let mut logged = false;
        while let Some(entry) = self.store.get(&key).await?.entry {
            let registered = BrokerValue::decode(&entry.key, &entry.value);
            if registered.as_ref().is_ok_and(|value| value.directory_id == self.value.directory_id) {
                self.delete_if_unchanged(&entry).await?;
                continue;
            }
            let address = client_address(registered.ok().as_ref());
            if clock::monotonic() > deadline {
                return Err(RegisterError::Taken { id: self.id, address });
            }
            if !std::mem::replace(&mut logged, true) {
                tracing::warn!(
                    broker = %self.id, address,
                    "the broker id is registered with another data directory: waiting until that registration expires"
                );
            }
            tokio::time::sleep(RETRY_INTERVAL).await;
        }
        Ok(())
    }

    /// Registers the broker, and starts two tasks that run until the session is stopped. One keeps the broker
    /// registered, the other reads its key to detect a restored store. `directory_revision` is the revision of this
    /// broker's directory record at its startup verification; `None` if there was no record.
    ///
    /// # Errors
    /// `Superseded`: the directory record has changed since the startup verification. `Store`: a request failed.
    pub async fn register(
        self,
        directory_revision: Option<Revision>,
        metadata: &MetadataCache,
        tasks: &Tasks,
    ) -> Result<Session, RegisterError> {
        let last_renewal = Arc::new(Mutex::new(clock::monotonic()));
        let lease = self.store.grant(self.session_timeout).await?;
        let (epoch, directory_revision) = match self.write_registration(lease, directory_revision).await? {
            RegisterResult::Registered { epoch, directory_revision } => (epoch, directory_revision),
            RegisterResult::Superseded { address } => {
                return Err(RegisterError::Superseded { id: self.id, address });
            }
        };
        let (state_sender, state) = watch::channel(SessionState::Registered { epoch, lease });
        let flags = Arc::new(BrokerFlags { disk_pressure: self.value.disk_pressure.into(), ..BrokerFlags::default() });
        let session_tasks = tasks.child();
        let registration = Arc::new(self);
        let keeper = LeaseKeeper {
            registration: Arc::clone(&registration),
            flags: Arc::clone(&flags),
            last_renewal: Arc::clone(&last_renewal),
            state: state_sender,
            lease,
            epoch,
            directory_revision,
            renewal_failures: LogThrottle::default(),
            registration_failures: LogThrottle::default(),
        };
        session_tasks.spawn("broker-session", keeper.run(metadata.watch(), session_tasks.clone()));
        session_tasks.spawn_until_cancelled("store-probe", Arc::clone(&registration).probe_revisions());
        Ok(Session { registration, state, flags, last_renewal, tasks: session_tasks })
    }

    /// Reads the key of the registration at the interval of the renewals, until a regression is found. `MonotonicStore`
    /// compares the revision of each response. It does not compare responses to keepalives, so a broker without other
    /// requests would not detect a restored store. The key is below the cluster's prefix, to which the permission of an
    /// etcd user may be limited.
    ///
    /// The reads have a task of their own, because a read can take longer than the pause between two renewals. If each
    /// read were cancelled before its request timeout, a connection whose reads receive no response would never be
    /// replaced.
    async fn probe_revisions(self: Arc<Self>) {
        let key = self.keys.broker(self.id);
        while self.store.regression().is_none() {
            tokio::time::sleep(self.renew_interval()).await;
            let _probe = self.store.get(&key).await;
        }
    }

    /// Returns the time from one renewal of the lease to the next.
    fn renew_interval(&self) -> Duration {
        self.session_timeout / 3
    }

    /// Returns the directory record that this process writes with its registration.
    fn directory_record(&self) -> DirectoryValue {
        let BrokerValue { directory_id, incarnation, .. } = &self.value;
        DirectoryValue { directory_id: directory_id.clone(), incarnation: incarnation.clone() }
    }

    /// Writes the registration, under `lease`, and the directory record in one transaction. The transaction requires
    /// that no registration exists and that the directory record has the revision `directory_revision` (`None`: that
    /// there is no record). If a registration exists and no other process has changed the record, deletes that
    /// registration and repeats. A registration under `lease` counts as written by an earlier attempt. Ends when the
    /// transaction is applied, when another process has changed the record, or with an error.
    async fn write_registration(
        &self,
        lease: LeaseId,
        directory_revision: Option<Revision>,
    ) -> Result<RegisterResult, MetaStoreError> {
        let (broker, directory) = (self.keys.broker(self.id), self.keys.directory(self.id));
        let mut directory_revision = directory_revision;
        loop {
            let record_unchanged = match directory_revision {
                Some(revision) => Compare::ModRevision(directory.clone(), revision),
                None => Compare::Absent(directory.clone()),
            };
            let transaction = Transaction::new()
                .when(Compare::Absent(broker.clone()))
                .when(record_unchanged)
                .put_leased(broker.as_str(), self.value.encode(), lease)
                .put(directory.as_str(), self.directory_record().encode())
                .else_get(broker.as_str())
                .else_get(directory.as_str());
            let mut found = match self.store.transact(transaction).await? {
                TxnOutcome::Committed { revision } => {
                    return Ok(RegisterResult::Registered { epoch: revision, directory_revision: revision });
                }
                TxnOutcome::CompareFailed { found, .. } => found.into_iter(),
            };
            let (registration, record) = (found.next().flatten(), found.next().flatten());
            // The record contains the incarnation, so only this process writes an equal one.
            let own_record = record.as_ref().filter(|entry| entry.value == self.directory_record().encode());
            if record.as_ref().map(|entry| entry.mod_revision) != directory_revision && own_record.is_none() {
                let value = registration.and_then(|entry| BrokerValue::decode(&entry.key, &entry.value).ok());
                return Ok(RegisterResult::Superseded { address: client_address(value.as_ref()) });
            }
            if let (Some(entry), Some(record)) = (&registration, own_record)
                && entry.lease == Some(lease)
            {
                // An earlier attempt was applied, and its response was lost.
                return Ok(RegisterResult::Registered {
                    epoch: entry.create_revision,
                    directory_revision: record.mod_revision,
                });
            }
            directory_revision = record.map(|entry| entry.mod_revision);
            // The record shows that no other process has registered. So this process wrote the registration under an
            // earlier lease, or no broker wrote it. It is deleted, because the new registration needs a create revision
            // of its own.
            if let Some(entry) = registration {
                self.delete_if_unchanged(&entry).await?;
            }
        }
    }

    /// Deletes a key, unless it was changed after it was read as `entry`. Does not report whether the key was deleted:
    /// the caller reads the key again.
    async fn delete_if_unchanged(&self, entry: &KeyValue) -> Result<(), MetaStoreError> {
        let unchanged = Compare::ModRevision(entry.key.clone(), entry.mod_revision);
        self.store.transact(Transaction::new().when(unchanged).delete(entry.key.as_str())).await?;
        Ok(())
    }
}

/// Returns the client address in a registration, or a placeholder if there is none or it could not be read.
fn client_address(value: Option<&BrokerValue>) -> String {
    value.map_or_else(|| "an unknown address".to_owned(), |value| value.listeners.client().to_owned())
}

/// Result of [`RegistrationRequest::write_registration`].
enum RegisterResult {
    Registered {
        epoch: Revision,
        /// Revision of the directory record that was written with the registration.
        directory_revision: Revision,
    },
    /// Another process has changed the directory record.
    Superseded {
        /// Client address of the other process, or a placeholder text if the registration could not be read.
        address: String,
    },
}

/// The registration of a running broker. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Session {
    registration: Arc<RegistrationRequest>,
    state: watch::Receiver<SessionState>,
    flags: Arc<BrokerFlags>,
    /// Start time of the request that last granted or renewed the lease.
    last_renewal: Arc<Mutex<Instant>>,
    tasks: Tasks,
}

impl Session {
    /// Returns a receiver of the registration's state.
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
        let last_renewal = *self.last_renewal.lock();
        match *self.state.borrow() {
            SessionState::Registered { .. } => self.registration.session_timeout.saturating_sub(last_renewal.elapsed()),
            SessionState::Lost | SessionState::Superseded { .. } => Duration::ZERO,
        }
    }

    /// Publishes that this broker is shutting down. The broker epoch does not change.
    pub async fn publish_stopping(&self) -> Result<(), MetaStoreError> {
        self.flags.stopping.store(true, Ordering::Release);
        self.update_flags().await
    }

    /// Publishes whether the broker is under disk pressure. Under pressure, it gets no new replicas. The broker epoch
    /// does not change.
    pub async fn set_disk_pressure(&self, is_under_pressure: bool) -> Result<(), MetaStoreError> {
        self.flags.disk_pressure.store(is_under_pressure, Ordering::Release);
        self.update_flags().await
    }

    /// Publishes whether the disk is full. If it is, other brokers take over the broker's leaderships where possible.
    /// The broker epoch does not change.
    pub async fn set_disk_full(&self, is_full: bool) -> Result<(), MetaStoreError> {
        self.flags.disk_full.store(is_full, Ordering::Release);
        self.update_flags().await
    }

    /// Returns true if this and later registrations report disk pressure. The store may not have the last change yet.
    pub fn is_under_disk_pressure(&self) -> bool {
        self.flags.disk_pressure.load(Ordering::Acquire)
    }

    /// Writes the current flags into the registration. Does nothing while the broker is not registered: the next
    /// registration contains them.
    async fn update_flags(&self) -> Result<(), MetaStoreError> {
        let RegistrationRequest { store, keys, id, value, .. } = &*self.registration;
        loop {
            let SessionState::Registered { epoch, lease } = self.state.borrow().clone() else { return Ok(()) };
            let (key, written) = (keys.broker(*id), self.flags.apply_to(value));
            // If the compare fails, the registration was lost; the next registration contains the flags.
            let same_epoch = Compare::CreateRevision(key.clone(), epoch);
            store.transact(Transaction::new().when(same_epoch).put_leased(key, written.encode(), lease)).await?;
            // A concurrent call may have changed the flags, and this write may have overwritten the newer ones.
            if self.flags.apply_to(value) == written {
                return Ok(());
            }
        }
    }

    /// Stops the session's tasks. Unless the broker is superseded, this revokes the lease, which deletes the
    /// registration. If the revocation fails, the lease expires later.
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
    /// Start time of the request that last granted or renewed the lease.
    last_renewal: Arc<Mutex<Instant>>,
    state: watch::Sender<SessionState>,
    /// Lease of the last attempt to register, successful or not.
    lease: LeaseId,
    /// Epoch of the last registration.
    epoch: Revision,
    /// Revision of this process's last write to the directory record.
    directory_revision: Revision,
    renewal_failures: LogThrottle,
    registration_failures: LogThrottle,
}

impl LeaseKeeper {
    /// Renews the lease at intervals of a third of its duration, and registers the broker again whenever the
    /// registration is lost. When `stop` is cancelled, revokes the lease and returns. When the broker is superseded,
    /// returns without a revocation.
    async fn run(mut self, mut metadata: watch::Receiver<Arc<MetadataSnapshot>>, stop: Tasks) {
        let renew_interval = self.registration.renew_interval();
        let mut next_renewal = clock::monotonic() + renew_interval;
        loop {
            let is_registered = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                Ok(()) = metadata.changed() => {
                    let is_missing = self.is_missing(&metadata.borrow_and_update());
                    if is_missing { self.reregister().await } else { true }
                }
                () = tokio::time::sleep_until(next_renewal) => {
                    let is_registered = self.keep_alive().await;
                    next_renewal = clock::monotonic() + if is_registered { renew_interval } else { RETRY_INTERVAL };
                    is_registered
                }
            };
            if matches!(*self.state.borrow(), SessionState::Superseded { .. }) {
                return;
            }
            if !is_registered {
                next_renewal = next_renewal.min(clock::monotonic() + RETRY_INTERVAL);
            }
        }
        let revoked = tokio::time::timeout(REVOKE_TIMEOUT, self.registration.store.revoke(self.lease));
        if !matches!(revoked.await, Ok(Ok(()))) {
            tracing::info!("the broker's lease could not be revoked: it will expire");
        }
    }

    /// Returns true if `snapshot` is at least as new as this broker's registration and does not contain that
    /// registration, also because its value is unreadable. Always false in the state `Lost`: there, only the renewal
    /// timer triggers registrations.
    fn is_missing(&self, snapshot: &MetadataSnapshot) -> bool {
        if snapshot.revision() < self.epoch || matches!(*self.state.borrow(), SessionState::Lost) {
            return false;
        }
        let entry = snapshot.brokers().get(&self.registration.id);
        entry.is_none_or(|entry| entry.create_revision != self.epoch)
    }

    /// Renews the lease. Registers again if the lease has ended or the state is `Lost`. Returns false if another
    /// attempt is needed soon.
    async fn keep_alive(&mut self) -> bool {
        if matches!(*self.state.borrow(), SessionState::Lost) {
            return self.reregister().await;
        }
        let started = clock::monotonic();
        let renewed = self.registration.store.keep_alive(self.lease).await;
        match renewed {
            Ok(()) => {
                *self.last_renewal.lock() = started;
                if self.renewal_failures.recover().is_some() {
                    tracing::info!("the broker's lease is renewed again");
                }
                true
            }
            Err(MetaStoreError::LeaseGone { .. }) => self.reregister().await,
            Err(error) => {
                if self.renewal_failures.occur(clock::monotonic()).is_some() {
                    let elapsed = self.last_renewal.lock().elapsed();
                    let remaining = self.registration.session_timeout.saturating_sub(elapsed);
                    tracing::warn!(
                        %error, remaining_ms = u64::try_from(remaining.as_millis()).unwrap_or(u64::MAX),
                        "could not renew this broker's lease in the metadata store, retrying: without a renewal in \
                         the remaining time, other brokers take over its leaderships"
                    );
                }
                false
            }
        }
    }

    /// Publishes that the registration is lost, and registers again. Returns false if another attempt is needed, and
    /// true if the broker is registered or superseded.
    async fn reregister(&mut self) -> bool {
        self.state.send_if_modified(|state| std::mem::replace(state, SessionState::Lost) != SessionState::Lost);
        match self.retry_registration().await {
            Ok(RegisterResult::Registered { epoch, directory_revision }) => {
                tracing::warn!(%epoch, "the broker's registration was lost: the broker is registered again");
                (self.epoch, self.directory_revision) = (epoch, directory_revision);
                self.renewal_failures.recover();
                self.registration_failures.recover();
                self.state.send_replace(SessionState::Registered { epoch, lease: self.lease });
                true
            }
            Ok(RegisterResult::Superseded { address }) => {
                let error = RegisterError::Superseded { id: self.registration.id, address: address.clone() };
                tracing::error!(%error, "this broker is superseded and must exit");
                self.state.send_replace(SessionState::Superseded { address });
                true
            }
            Err(error) => {
                if self.registration_failures.occur(clock::monotonic()).is_some() {
                    tracing::error!(
                        %error,
                        "this broker is no longer registered in the cluster and could not register again, retrying: \
                         meanwhile other brokers may lead its partitions"
                    );
                }
                false
            }
        }
    }

    /// Makes one attempt to register under a new lease, with the current flags. The attempt compares the directory
    /// record with this process's last write, and so detects that another process has registered since.
    async fn retry_registration(&mut self) -> Result<RegisterResult, MetaStoreError> {
        let value = self.flags.apply_to(&self.registration.value);
        let registration = RegistrationRequest { value, ..(*self.registration).clone() };
        // The old lease may have expired, so a new one is granted.
        let started = clock::monotonic();
        self.lease = registration.store.grant(registration.session_timeout).await?;
        *self.last_renewal.lock() = started;
        registration.write_registration(self.lease, Some(self.directory_revision)).await
    }
}

#[cfg(test)]
mod tests;
