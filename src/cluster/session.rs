//! This broker's registration: a leased key whose create revision is the broker epoch.
//!
//! # Overview
//!
//! A start first takes away what an earlier process of this broker left ([`Registration::clear`]): from then on nobody can add
//! this broker to a set. Then it proves what it holds (`proof`), and registers ([`Registration::register`]) in one transaction
//! with the record of its data directory, which must still be the one that the proof was judged by. A task keeps the lease
//! alive and looks at the key in the mirror: a registration that somebody took away is made anew, under a new epoch.
//!
//! # Invariants
//!
//! - An epoch is published only after the store holds the registration that it names. It only detects failure and fences
//!   nothing by itself: who acts on it compares it in a transaction.
//! - A registration is taken over only from the same data directory. The lock of that directory says that the process before is
//!   gone, unless the directory was copied: then the later process wins, and the earlier one is told so and ends.
//!
//! # Shutdown
//!
//! When the session is left, or its tasks are stopped, the lease is revoked, so that the others need not wait for its end.

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

/// How long a stop waits for the lease's end.
const REVOKE_TIMEOUT: Duration = Duration::from_secs(1);

/// Pause before something is tried again that the store did not do.
const AGAIN: Duration = Duration::from_millis(250);

/// Where a broker stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is registered.
    Registered {
        /// The broker epoch.
        epoch: Revision,
        /// The lease that the registration hangs on.
        lease: LeaseId,
    },
    /// The registration is gone and is being made anew. The process and what it holds are the same.
    Lost,
    /// Another process took this broker's number with a copy of its data directory. Final: one of the two must go.
    Superseded {
        /// Where that process is reached, as far as is known.
        address: String,
    },
}

/// Why a broker could not register.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegisterError {
    /// Another broker has the number.
    #[error(
        "broker id {id} is taken by a broker at {address} with another data directory: set broker.id to a free one, and \
         broker.data_dir to a new folder, because this one is noted as broker {id}'s now"
    )]
    Taken {
        /// The number.
        id: BrokerId,
        /// Where that broker is reached.
        address: String,
    },
    /// Another process took part under this number since the proof was made.
    #[error("another process runs as broker {id} with a copy of this data directory; one of the two must go")]
    Overtaken {
        /// The number.
        id: BrokerId,
    },
    /// The metadata store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl RegisterError {
    /// Whether the same registration may succeed later.
    pub const fn retryable(&self) -> bool {
        match self {
            Self::Taken { .. } | Self::Overtaken { .. } => false,
            Self::Store(error) => error.retryable(),
        }
    }
}

/// What a broker registers, and where.
#[derive(Clone, Debug)]
pub struct Registration {
    /// The metadata store.
    pub store: Arc<dyn MetaStore>,
    /// Its keys.
    pub keys: Keys,
    /// The broker's number.
    pub id: BrokerId,
    /// What the others are told of it.
    pub value: BrokerValue,
    /// How long after its death the others notice by the lease alone.
    pub time: Duration,
}

impl Registration {
    /// Takes away an earlier registration of the same data directory. One of another directory, or of a format that this version does not
    /// read, is waited for as long as a lease lives: its process may be dead and its disk replaced.
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

    /// Registers, and stays registered until the session is left. `judged` is the transaction that last wrote the record of this broker's
    /// directory when the proof was made; `None` when there was none.
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

    /// What the directory's record says while this process runs.
    fn directory(&self) -> DirectoryValue {
        let BrokerValue { directory_id, incarnation, .. } = &self.value;
        DirectoryValue { directory_id: directory_id.clone(), incarnation: incarnation.clone() }
    }

    /// Puts both keys in one transaction, until that is done or another process is seen to be there.
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
                // An answer was lost: it was done.
                return Ok(Begun::Registered { epoch: entry.create_revision, directory: record.mod_revision });
            }
            judged = recorded.map(|entry| entry.mod_revision);
            // Its own from before, or nobody's. A new registration needs a create revision of its own.
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

/// Where clients reach a broker whose registration could be read.
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
    /// Where the broker stands, and its changes.
    pub fn standing(&self) -> watch::Receiver<Standing> {
        self.standing.clone()
    }

    /// The broker epoch now; `None` while there is none.
    pub fn epoch(&self) -> Option<Revision> {
        match *self.standing.borrow() {
            Standing::Registered { epoch, .. } => Some(epoch),
            Standing::Lost | Standing::Superseded { .. } => None,
        }
    }

    /// How long the lease lives at least if it is not renewed any more; nothing while there is no registration. By this process's
    /// clock: for people, and nothing else may depend on it.
    pub fn lease_left(&self) -> Duration {
        let renewed = *self.renewed.lock().unwrap_or_else(PoisonError::into_inner);
        match *self.standing.borrow() {
            Standing::Registered { .. } => self.registration.time.saturating_sub(renewed.elapsed()),
            Standing::Lost | Standing::Superseded { .. } => Duration::ZERO,
        }
    }

    /// Tells the others that this broker is on its way out. The broker epoch stays.
    pub async fn stopping(&self) -> Result<(), StoreError> {
        self.says.stopping.store(true, Ordering::Release);
        self.say().await
    }

    /// Tells the others whether the disk is so full that this broker is to be given no new replicas. The broker epoch stays.
    pub async fn disk_full(&self, full: bool) -> Result<(), StoreError> {
        self.says.disk_full.store(full, Ordering::Release);
        self.say().await
    }

    /// Tells the others whether the disk takes no more records, so that they lead what they can. The broker epoch stays.
    pub async fn no_room(&self, none: bool) -> Result<(), StoreError> {
        self.says.no_room.store(none, Ordering::Release);
        self.say().await
    }

    /// Whether the others are told that its disk is full.
    pub fn says_full(&self) -> bool {
        self.says.disk_full.load(Ordering::Acquire)
    }

    /// Writes what is to be said into the registration.
    async fn say(&self) -> Result<(), StoreError> {
        let Registration { store, keys, id, value, .. } = &*self.registration;
        loop {
            let Standing::Registered { epoch, lease } = self.standing.borrow().clone() else { return Ok(()) };
            let (key, value) = (keys.broker(*id), self.says.over(value));
            // Refused: it was lost, and is made anew with what is to be said.
            let same = Compare::CreateRevision(key.clone(), epoch);
            store.transact(Transaction::new().when(same).put_leased(key, value.encode(), lease)).await?;
            // Something else may have been said meanwhile, and been overtaken by this.
            if self.says.over(&value) == value {
                return Ok(());
            }
        }
    }

    /// Gives up the registration now.
    pub async fn leave(&self) {
        self.tasks.stop().await;
    }
}

/// What a broker says of itself that may change while it is registered.
#[derive(Debug, Default)]
struct Says {
    stopping: AtomicBool,
    disk_full: AtomicBool,
    no_room: AtomicBool,
}

impl Says {
    /// The registration's value with it.
    fn over(&self, value: &BrokerValue) -> BrokerValue {
        let stopping = self.stopping.load(Ordering::Acquire);
        let state = if stopping { BrokerState::Stopping } else { BrokerState::Running };
        let (disk_full, no_room) = (self.disk_full.load(Ordering::Acquire), self.no_room.load(Ordering::Acquire));
        BrokerValue { state, disk_full, no_room, ..value.clone() }
    }
}

/// The task that stays registered.
struct Keeper {
    registration: Arc<Registration>,
    says: Arc<Says>,
    /// When the lease was last asked to live on, and did.
    renewed: Arc<Mutex<Instant>>,
    publish: watch::Sender<Standing>,
    lease: LeaseId,
    epoch: Revision,
    /// The transaction that last wrote the directory's record.
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

    /// Whether the mirror, where it is new enough to know, does not show this registration. While it is being made anew that is
    /// no news: the clock says when to try again.
    fn is_missing(&self, state: &ViewState) -> bool {
        if state.revision() < self.epoch || matches!(*self.publish.borrow(), Standing::Lost) {
            return false;
        }
        let seen = state.brokers().get(&self.registration.id);
        seen.is_none_or(|known| known.create_revision != self.epoch)
            || state.unreadable().contains_key(&Key::Broker(self.registration.id))
    }

    /// Lets the lease live on. False when the store was not reached.
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

    /// Registers again after the registration was lost. False when that has to be tried again.
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
        // The lease may live on, and may not: a new one is sure to.
        let began = clock::monotonic();
        self.lease = registration.store.grant(registration.time).await?;
        self.renewed_at(began);
        registration.begin(self.lease, Some(self.directory)).await
    }
}

#[cfg(test)]
mod tests;
