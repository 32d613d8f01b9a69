//! State about other brokers for both directions of replication: their addresses and broker epochs, and this broker's
//! own epoch.

use std::{
    collections::BTreeMap,
    sync::{Arc, OnceLock},
};

use futures::future::BoxFuture;
use tokio::sync::watch;

use super::clocks::ClockComparison;
use crate::{
    client::peers::DisconnectReason,
    cluster::Revision,
    model::{BrokerId, PartitionId},
    partition::{Partition, replication::PartitionLookup},
    proto::error::{ApiError, ErrorCode},
    task::Tasks,
};

/// Registration of a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::broker) struct PeerInfo {
    /// Address for connections between brokers.
    pub(in crate::broker) address: String,
    /// Broker epoch of the registration.
    pub(in crate::broker) epoch: Revision,
}

/// Receiver of lost links, which may mean that a process is gone.
pub(in crate::broker) trait LinkLossListener: Send + Sync + 'static {
    /// Handles a link to or from this registration of a broker that ended, or that could not be opened. Must not block.
    fn link_lost(&self, broker: BrokerId, epoch: Revision, how: DisconnectReason);
}

/// Table of registered peers.
pub(in crate::broker) struct PeerTable {
    me: BrokerId,
    cluster: String,
    state: watch::Sender<PeerTableState>,
    find: OnceLock<PartitionLookup>,
    lost: OnceLock<Arc<dyn LinkLossListener>>,
    look_up: OnceLock<LookUp>,
    /// Comparison of the peers' clocks with the local clock.
    pub(in crate::broker) clocks: ClockComparison,
}

/// Look-up of a broker's registration in the metadata store, at a bounded rate. Fails if the registration cannot be
/// looked up now.
pub(in crate::broker) type LookUp =
    Arc<dyn Fn(BrokerId) -> BoxFuture<'static, Result<Option<Revision>, ApiError>> + Send + Sync>;

/// Reason for rejecting a broker whose claimed broker epoch is not confirmed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(in crate::broker) enum Unconfirmed {
    /// The broker has registered again since.
    #[error(
        "broker {broker} has broker epoch {claimed}, and is registered with the later epoch {registered}: reconnect"
    )]
    Older {
        broker: BrokerId,
        /// Claimed broker epoch.
        claimed: Revision,
        /// Registered broker epoch.
        registered: Revision,
    },
    /// The metadata store has no such registration.
    #[error("broker {broker} is not registered with broker epoch {claimed}")]
    Unknown {
        broker: BrokerId,
        /// Claimed broker epoch.
        claimed: Revision,
    },
    /// The metadata cache has no such registration, and the metadata store could not be read.
    #[error(
        "broker {broker} is not registered with broker epoch {claimed} in the metadata cache, and could not be \
         verified: {reason}"
    )]
    Unsure {
        broker: BrokerId,
        /// Claimed broker epoch.
        claimed: Revision,
        /// Reason why the store could not be read.
        reason: String,
    },
}

impl From<Unconfirmed> for ApiError {
    fn from(error: Unconfirmed) -> Self {
        let code = match error {
            Unconfirmed::Older { .. } => ErrorCode::InvalidRequest,
            // The broker may be about to register.
            Unconfirmed::Unknown { .. } | Unconfirmed::Unsure { .. } => ErrorCode::NotReady,
        };
        Self::new(code, error.to_string())
    }
}

#[derive(Clone, Default)]
struct PeerTableState {
    /// Own broker epoch of this broker; the last one while this broker is not registered.
    own: Option<Revision>,
    is_registered: bool,
    peers: Arc<BTreeMap<BrokerId, PeerInfo>>,
}

impl PeerTable {
    /// Creates an empty table for this broker.
    pub(in crate::broker) fn new(me: BrokerId, cluster: String) -> Arc<Self> {
        let state = watch::Sender::default();
        let (find, lost, look_up) = (OnceLock::new(), OnceLock::new(), OnceLock::new());
        Arc::new(Self { me, cluster, state, find, lost, look_up, clocks: ClockComparison::default() })
    }

    /// Sets how local partitions are found, where lost links are reported, and how registrations are looked up. Called
    /// once.
    pub(in crate::broker) fn serve(&self, find: PartitionLookup, lost: Arc<dyn LinkLossListener>, look_up: LookUp) {
        let first = self.find.set(find).is_ok() && self.lost.set(lost).is_ok() && self.look_up.set(look_up).is_ok();
        assert!(first, "the callbacks are set once");
    }

    /// Replaces the registered brokers. Called at every change.
    pub(in crate::broker) fn update_peers(&self, peers: BTreeMap<BrokerId, PeerInfo>) {
        self.state.send_if_modified(|state| {
            let changed = *state.peers != peers;
            state.peers = Arc::new(peers);
            changed
        });
    }

    /// Updates this broker's own broker epoch; `None` while this broker is not registered. Links continue meanwhile,
    /// and new links use the last epoch: a lost lease does not affect the content of a log, and the store may be
    /// unavailable. A broker epoch ends when the next one begins.
    pub(in crate::broker) fn registered(&self, epoch: Option<Revision>) {
        self.state.send_if_modified(|state| {
            state.is_registered = epoch.is_some();
            let own = epoch.or(state.own);
            std::mem::replace(&mut state.own, own) != own
        });
    }

    pub(in crate::broker) fn me(&self) -> BrokerId {
        self.me
    }

    pub(in crate::broker) fn cluster(&self) -> &str {
        &self.cluster
    }

    /// Returns this broker's own broker epoch, or the last one while this broker is not registered; `None` before the
    /// first.
    pub(super) fn own(&self) -> Option<Revision> {
        self.state.borrow().own
    }

    /// Returns this broker's own broker epoch; `None` while this broker is not registered.
    pub(super) fn own_registration(&self) -> Option<Revision> {
        let state = self.state.borrow();
        state.own.filter(|_| state.is_registered)
    }

    /// Returns the registration of a broker.
    pub(super) fn get(&self, broker: BrokerId) -> Option<PeerInfo> {
        self.state.borrow().peers.get(&broker).cloned()
    }

    /// Verifies that a broker is registered under the broker epoch that it claims. Reads the metadata store if the
    /// metadata cache is older than the claim.
    pub(in crate::broker) async fn confirm(&self, broker: BrokerId, claimed: Revision) -> Result<(), Unconfirmed> {
        match self.get(broker).map(|peer| peer.epoch) {
            Some(registered) if registered == claimed => return Ok(()),
            Some(registered) if registered > claimed => return Err(Unconfirmed::Older { broker, claimed, registered }),
            Some(_) | None => {}
        }
        let unsure = |reason: String| Unconfirmed::Unsure { broker, claimed, reason };
        let look_up = self.look_up.get().ok_or_else(|| unsure("this broker is starting".to_owned()))?;
        match look_up(broker).await.map_err(|error| unsure(error.message))? {
            Some(registered) if registered == claimed => Ok(()),
            Some(registered) if registered > claimed => Err(Unconfirmed::Older { broker, claimed, registered }),
            Some(_) | None => Err(Unconfirmed::Unknown { broker, claimed }),
        }
    }

    /// Returns the local partition with this id.
    pub(super) fn partition(&self, id: PartitionId) -> Option<Arc<Partition>> {
        self.find.get()?(id)
    }

    /// Returns the function that finds local partitions.
    pub(in crate::broker) fn find(self: &Arc<Self>) -> PartitionLookup {
        let peers = Arc::clone(self);
        Arc::new(move |id| peers.partition(id))
    }

    /// Reports a lost link to or from this registration.
    pub(in crate::broker) fn on_link_lost(&self, broker: BrokerId, epoch: Revision, how: DisconnectReason) {
        if let Some(lost) = self.lost.get() {
            lost.link_lost(broker, epoch, how);
        }
    }

    /// Waits until that broker is registered and this broker has been registered once.
    pub(in crate::broker) async fn both(&self, broker: BrokerId) -> (Revision, PeerInfo) {
        let mut state = self.state.subscribe();
        loop {
            let found = {
                let state = state.borrow_and_update();
                state.own.zip(state.peers.get(&broker).cloned())
            };
            if let Some(found) = found {
                return found;
            }
            state.changed().await.expect("the table owns the sender");
        }
    }

    /// Cancels the tasks of a link when another broker epoch begins, here or there.
    pub(in crate::broker) async fn cancel_at_change(
        &self,
        own: Revision,
        broker: BrokerId,
        epoch: Revision,
        link: &Tasks,
    ) {
        let mut state = self.state.subscribe();
        loop {
            let has_ended = {
                let state = state.borrow_and_update();
                let newer = state.peers.get(&broker).is_some_and(|peer| peer.epoch > epoch);
                newer || state.own.is_some_and(|now| now != own)
            };
            if has_ended {
                link.cancel();
                return;
            }
            state.changed().await.expect("the table owns the sender");
        }
    }
}
