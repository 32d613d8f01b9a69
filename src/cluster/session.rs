//! The registration of this broker: a leased key whose create revision is the broker epoch.
//!
//! # Overview
//!
//! 1. A starting broker deletes the registration of its earlier process ([`Registration::clear`]). From then on no
//!    other broker can add this broker to an ISR.
//! 2. The broker verifies its local replicas (`proof`).
//! 3. The broker registers ([`Registration::register`]) in one transaction with its directory record. That record must
//!    be the one that the verification was based on.
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
//! When the session is left or its tasks are stopped, the lease is revoked, so that other brokers need not wait for its
//! expiry.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{sync::watch, time::Instant};

use super::{
    keys::{BrokerState, BrokerValue, DirectoryValue, Key, Keys, Value},
    store::{Compare, Entry, LeaseId, MetaStore, Outcome, Revision, StoreError, Transaction},
    view::{View, ViewState},
};
use crate::{
    model::BrokerId,
    task::{Tasks, clock},
};

/// Maximum time that a stop waits for the revocation of the lease.
const REVOKE_TIMEOUT: Duration = Duration::from_secs(1);

/// Pause before a failed store operation is retried.
const AGAIN: Duration = Duration::from_millis(250);

/// State of a broker's registration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// The broker is registered.
    Registered {
        /// The broker epoch.
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
        "broker id {id} is taken by a broker at {address} with another data directory: set broker.id to a free one, and \
         broker.data_dir to a new folder, because this one is noted as broker {id}'s now"
    )]
    Taken {
        /// Id of the broker.
        id: BrokerId,
        /// Client address of the other broker.
        address: String,
    },
    /// Another process registered under this broker id since the startup verification.
    #[error("another process runs as broker {id} with a copy of this data directory; one of the two must go")]
    Overtaken {
        /// Id of the broker.
        id: BrokerId,
    },
    /// The metadata store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl RegisterError {
    /// Returns true if the same registration may succeed later.
    pub const fn retryable(&self) -> bool {
        match self {
            Self::Taken { .. } | Self::Overtaken { .. } => false,
            Self::Store(error) => error.retryable(),
        }
    }
}

/// Content and destination of a registration.
#[derive(Clone, Debug)]
pub struct Registration {
    /// The metadata store.
    pub store: Arc<dyn MetaStore>,
    /// Paths of the cluster.
    pub keys: Keys,
    /// Id of this broker.
    pub id: BrokerId,
    /// Value of the registration.
    pub value: BrokerValue,
    /// Duration of the lease: time after a crash in which other brokers notice by the lease alone.
    pub time: Duration,
}

impl Registration {
    /// Deletes an earlier registration of the same data directory. A registration of another directory, or in a format
    /// that this version does not read, may belong to a dead process with a replaced disk. So this function waits for
    /// the duration of a lease until such a registration ends.
    pub async fn clear(&self) -> Result<(), RegisterError> {
        let key = self.keys.broker(self.id);
        let until = clock::monotonic() + self.time + Duration::from_secs(1);
        let mut said = false;
        while let Some(entry) = self.store.get(&key).await?.entry {
            let other = BrokerValue::decode(&entry.key, &entry.value);
            if other.as_ref().is_ok_and(|other| other.directory_id == self.value.directory_id) {
                self.take_away(&entry).await?;
                continue;
            }
            let address = client_address(other.ok().as_ref());
            if clock::monotonic() > until {
                return Err(RegisterError::Taken { id: self.id, address });
            }
            if !std::mem::replace(&mut said, true) {
                tracing::warn!(
                    broker = %self.id, address,
                    "the number is registered with another data directory; waiting in case that broker is gone"
                );
            }
            tokio::time::sleep(AGAIN).await;
        }
        Ok(())
    }

    /// Registers the broker and keeps it registered until the session is left. `judged` is the revision of this
    /// broker's directory record at its startup verification; `None` if there was no record.
    pub async fn register(
        self,
        judged: Option<Revision>,
        view: &View,
        tasks: &Tasks,
    ) -> Result<Session, RegisterError> {
        let renewed = Arc::new(Mutex::new(clock::monotonic()));
        let lease = self.store.grant(self.time).await?;
        let (epoch, directory) = match self.begin(lease, judged).await? {
            Begun::Registered { epoch, directory } => (epoch, directory),
            Begun::Superseded { .. } => return Err(RegisterError::Overtaken { id: self.id }),
        };
        let (publish, standing) = watch::channel(Standing::Registered { epoch, lease });
        let says = Arc::new(Says { disk_full: self.value.disk_full.into(), ..Says::default() });
        let own = tasks.child();
        let registration = Arc::new(self);
        let keeper = Keeper {
            registration: Arc::clone(&registration),
            says: Arc::clone(&says),
            renewed: Arc::clone(&renewed),
            publish,
            lease,
            epoch,
            directory,
            failing: false,
        };
        own.spawn("broker session", keeper.run(view.watch(), own.clone()));
        Ok(Session { registration, standing, says, renewed, tasks: own })
    }

    /// Returns the value of the directory record while this process runs.
    fn directory(&self) -> DirectoryValue {
        let BrokerValue { directory_id, incarnation, .. } = &self.value;
        DirectoryValue { directory_id: directory_id.clone(), incarnation: incarnation.clone() }
    }

    /// Writes both keys in one transaction. Repeats until the transaction is applied or another process is found.
    async fn begin(&self, lease: LeaseId, judged: Option<Revision>) -> Result<Begun, StoreError> {
        let (broker, directory) = (self.keys.broker(self.id), self.keys.directory(self.id));
        let mut judged = judged;
        loop {
            let same = match judged {
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
                Outcome::Done { revision } => return Ok(Begun::Registered { epoch: revision, directory: revision }),
                Outcome::Refused { found, .. } => found.into_iter(),
            };
            let (registered, recorded) = (found.next().flatten(), found.next().flatten());
            let other = registered.as_ref().and_then(|entry| BrokerValue::decode(&entry.key, &entry.value).ok());
            let ours = recorded.as_ref().filter(|entry| entry.value == self.directory().encode());
            if recorded.as_ref().map(|entry| entry.mod_revision) != judged && ours.is_none() {
                return Ok(Begun::Superseded { address: client_address(other.as_ref()) });
            }
            if let (Some(entry), Some(record)) = (&registered, ours)
                && entry.lease == Some(lease)
            {
                // The response of an earlier attempt was lost: it was applied.
                return Ok(Begun::Registered { epoch: entry.create_revision, directory: record.mod_revision });
            }
            judged = recorded.map(|entry| entry.mod_revision);
            // This process's own earlier registration, or one that no broker wrote. The new registration needs its own
            // create revision.
            if let Some(entry) = registered {
                self.take_away(&entry).await?;
            }
        }
    }

    async fn take_away(&self, entry: &Entry) -> Result<(), StoreError> {
        let same = Compare::ModRevision(entry.key.clone(), entry.mod_revision);
        self.store.transact(Transaction::new().when(same).delete(entry.key.as_str())).await?;
        Ok(())
    }
}

/// Returns the client address of a broker, or a placeholder if the registration could not be read.
fn client_address(value: Option<&BrokerValue>) -> String {
    value.map_or_else(|| "an unknown address".to_owned(), |value| value.listeners.client().to_owned())
}

enum Begun {
    Registered { epoch: Revision, directory: Revision },
    Superseded { address: String },
}

/// The registration of a running broker. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Session {
    registration: Arc<Registration>,
    standing: watch::Receiver<Standing>,
    says: Arc<Says>,
    renewed: Arc<Mutex<Instant>>,
    tasks: Tasks,
}

impl Session {
    /// Returns the state of the registration, with its changes.
    pub fn standing(&self) -> watch::Receiver<Standing> {
        self.standing.clone()
    }

    /// Returns the current broker epoch; `None` while the broker is not registered.
    pub fn epoch(&self) -> Option<Revision> {
        match *self.standing.borrow() {
            Standing::Registered { epoch, .. } => Some(epoch),
            Standing::Lost | Standing::Superseded { .. } => None,
        }
    }

    /// Returns the minimum remaining lifetime of the lease without further renewals; zero while the broker is not
    /// registered. The value depends on this process's clock, so no invariant may rely on it.
    pub fn lease_left(&self) -> Duration {
        let renewed = *self.renewed.lock().unwrap_or_else(PoisonError::into_inner);
        match *self.standing.borrow() {
            Standing::Registered { .. } => self.registration.time.saturating_sub(renewed.elapsed()),
            Standing::Lost | Standing::Superseded { .. } => Duration::ZERO,
        }
    }

    /// Publishes that this broker is shutting down. The broker epoch stays.
    pub async fn stopping(&self) -> Result<(), StoreError> {
        self.says.stopping.store(true, Ordering::Release);
        self.say().await
    }

    /// Publishes whether the broker is under disk pressure, so that it gets no new replicas. The broker epoch stays.
    pub async fn disk_full(&self, full: bool) -> Result<(), StoreError> {
        self.says.disk_full.store(full, Ordering::Release);
        self.say().await
    }

    /// Publishes whether the disk is full, so that other brokers take over its leaderships where possible. The broker
    /// epoch stays.
    pub async fn no_room(&self, none: bool) -> Result<(), StoreError> {
        self.says.no_room.store(none, Ordering::Release);
        self.say().await
    }

    /// Returns true if the registration reports disk pressure.
    pub fn says_full(&self) -> bool {
        self.says.disk_full.load(Ordering::Acquire)
    }

    /// Writes the current flags into the registration.
    async fn say(&self) -> Result<(), StoreError> {
        let Registration { store, keys, id, value, .. } = &*self.registration;
        loop {
            let Standing::Registered { epoch, lease } = self.standing.borrow().clone() else { return Ok(()) };
            let (key, value) = (keys.broker(*id), self.says.over(value));
            // If the compare fails, the registration was lost; the new registration will contain the flags.
            let same = Compare::CreateRevision(key.clone(), epoch);
            store.transact(Transaction::new().when(same).put_leased(key, value.encode(), lease)).await?;
            // The flags may have changed meanwhile, and this write may have overwritten the newer flags.
            if self.says.over(&value) == value {
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
struct Says {
    stopping: AtomicBool,
    disk_full: AtomicBool,
    no_room: AtomicBool,
}

impl Says {
    /// Returns the registration's value with these flags.
    fn over(&self, value: &BrokerValue) -> BrokerValue {
        let stopping = self.stopping.load(Ordering::Acquire);
        let state = if stopping { BrokerState::Stopping } else { BrokerState::Running };
        let (disk_full, no_room) = (self.disk_full.load(Ordering::Acquire), self.no_room.load(Ordering::Acquire));
        BrokerValue { state, disk_full, no_room, ..value.clone() }
    }
}

/// The task that keeps the broker registered.
struct Keeper {
    registration: Arc<Registration>,
    says: Arc<Says>,
    /// Start time of the last successful renewal.
    renewed: Arc<Mutex<Instant>>,
    publish: watch::Sender<Standing>,
    lease: LeaseId,
    epoch: Revision,
    /// Revision of the last write to the directory record.
    directory: Revision,
    failing: bool,
}

impl Keeper {
    async fn run(mut self, mut view: watch::Receiver<Arc<ViewState>>, stop: Tasks) {
        let third = self.registration.time / 3;
        let mut due = clock::monotonic() + third;
        loop {
            let held = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                Ok(()) = view.changed() => {
                    let missing = self.is_missing(&view.borrow_and_update());
                    if missing { self.again().await } else { true }
                }
                () = tokio::time::sleep_until(due) => {
                    let held = self.keep_alive().await;
                    due = clock::monotonic() + if held { third } else { AGAIN };
                    held
                }
            };
            if matches!(*self.publish.borrow(), Standing::Superseded { .. }) {
                return;
            }
            if !held {
                due = due.min(clock::monotonic() + AGAIN);
            }
        }
        let revoked = tokio::time::timeout(REVOKE_TIMEOUT, self.registration.store.revoke(self.lease));
        if !matches!(revoked.await, Ok(Ok(()))) {
            tracing::info!("the broker's lease could not be revoked; it ends by itself");
        }
    }

    /// Returns true if the metadata cache does not show this registration although its revision is new enough. False
    /// while the registration is being created again: the timer triggers the next attempt.
    fn is_missing(&self, state: &ViewState) -> bool {
        if state.revision() < self.epoch || matches!(*self.publish.borrow(), Standing::Lost) {
            return false;
        }
        let seen = state.brokers().get(&self.registration.id);
        seen.is_none_or(|known| known.create_revision != self.epoch)
            || state.unreadable().contains_key(&Key::Broker(self.registration.id))
    }

    /// Renews the lease. Returns false if the store was not reached.
    async fn keep_alive(&mut self) -> bool {
        if matches!(*self.publish.borrow(), Standing::Lost) {
            return self.again().await;
        }
        let began = clock::monotonic();
        match self.registration.store.keep_alive(self.lease).await {
            Ok(()) => {
                self.renewed_at(began);
                if std::mem::take(&mut self.failing) {
                    tracing::info!("the broker's lease is kept alive again");
                }
                true
            }
            Err(StoreError::LeaseGone { .. }) => self.again().await,
            Err(error) => {
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::warn!(%error, "the broker's lease could not be kept alive; trying again");
                }
                false
            }
        }
    }

    /// Registers again after the registration was lost. Returns false if another attempt is needed.
    async fn again(&mut self) -> bool {
        self.publish.send_if_modified(|standing| std::mem::replace(standing, Standing::Lost) != Standing::Lost);
        match self.try_again().await {
            Ok(Begun::Registered { epoch, directory }) => {
                tracing::warn!(%epoch, "the broker's registration was lost; it is registered again");
                (self.epoch, self.directory, self.failing) = (epoch, directory, false);
                self.publish.send_replace(Standing::Registered { epoch, lease: self.lease });
                true
            }
            Ok(Begun::Superseded { address }) => {
                let id = self.registration.id;
                tracing::error!(
                    broker = %id, address,
                    "the broker's number is now run by another process with a copy of this data directory; one of the two must go"
                );
                self.publish.send_replace(Standing::Superseded { address });
                true
            }
            Err(error) => {
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::error!(%error, "the broker's registration was lost and it cannot register; trying again");
                }
                false
            }
        }
    }

    fn renewed_at(&self, moment: Instant) {
        *self.renewed.lock().unwrap_or_else(PoisonError::into_inner) = moment;
    }

    async fn try_again(&mut self) -> Result<Begun, StoreError> {
        let value = self.says.over(&self.registration.value);
        let registration = Registration { value, ..(*self.registration).clone() };
        // The old lease may have expired; a new lease is certain to be live.
        let began = clock::monotonic();
        self.lease = registration.store.grant(registration.time).await?;
        self.renewed_at(began);
        registration.begin(self.lease, Some(self.directory)).await
    }
}

#[cfg(test)]
mod tests;
