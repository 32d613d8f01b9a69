//! State about other brokers for both directions of replication: their addresses and broker epochs, and this broker's own epoch.

use std::{
    collections::BTreeMap,
    sync::{Arc, OnceLock},
};

use futures::future::BoxFuture;
use tokio::sync::watch;

use super::clocks::ClockComparison;
use crate::{
    client::peers::How,
    cluster::Revision,
    model::{BrokerId, PartitionId},
    partition::{Partition, session::Find},
    proto::error::{ApiError, ErrorCode},
    task::Tasks,
};

/// Registration of a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::broker) struct Neighbour {
    /// Address for connections between brokers.
    pub(in crate::broker) address: String,
    /// Broker epoch of the registration.
    pub(in crate::broker) epoch: Revision,
}

/// Receiver of lost links, which may mean that a process is gone.
pub(in crate::broker) trait LinkLost: Send + Sync + 'static {
    /// Handles a link to or from this registration of a broker that ended, or that could not be opened. Must not block.
    fn link_lost(&self, broker: BrokerId, epoch: Revision, how: How);
}

/// Table of registered peers.
pub(in crate::broker) struct Neighbours {
    me: BrokerId,
    cluster: String,
    around: watch::Sender<Around>,
    find: OnceLock<Find>,
    lost: OnceLock<Arc<dyn LinkLost>>,
    look_up: OnceLock<LookUp>,
    /// Comparison of the peers' clocks with the local clock.
    pub(in crate::broker) clocks: ClockComparison,
}

/// Look-up of a broker's registration in the metadata store, at a bounded rate. Fails if the registration cannot be looked up now.
pub(in crate::broker) type LookUp =
    Arc<dyn Fn(BrokerId) -> BoxFuture<'static, Result<Option<Revision>, ApiError>> + Send + Sync>;

/// Reason for rejecting a broker whose claimed broker epoch is not confirmed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(in crate::broker) enum Unconfirmed {
    /// The broker has registered again since.
    #[error("broker {broker} runs in its uptime {claimed}, and has registered as {known} since")]
    Older {
        broker: BrokerId,
        /// Claimed broker epoch.
        claimed: Revision,
        /// Registered broker epoch.
        known: Revision,
    },
    /// The metadata store has no such registration.
    #[error("broker {broker} is not registered in the uptime {claimed} that it names")]
    Unknown {
        broker: BrokerId,
        /// Claimed broker epoch.
        claimed: Revision,
    },
    /// The metadata cache has no such registration, and the metadata store could not be read.
    #[error("broker {broker} is not registered in the uptime {claimed} as far as is known here: {why}")]
    Unsure {
        broker: BrokerId,
        /// Claimed broker epoch.
        claimed: Revision,
        /// Reason why the store could not be read.
        why: String,
    },
}

impl From<Unconfirmed> for ApiError {
    fn from(error: Unconfirmed) -> Self {
        let reason = match error {
            Unconfirmed::Older { .. } => ErrorCode::InvalidRequest,
            // The broker may be about to register.
            Unconfirmed::Unknown { .. } | Unconfirmed::Unsure { .. } => ErrorCode::NotReady,
        };
        Self::new(reason, error.to_string())
    }
}

#[derive(Clone, Default)]
struct Around {
    /// Own broker epoch of this broker; the last one while this broker is not registered.
    own: Option<Revision>,
    is_registered: bool,
    known: Arc<BTreeMap<BrokerId, Neighbour>>,
}

impl Neighbours {
    /// Creates an empty table for this broker.
    pub(in crate::broker) fn new(me: BrokerId, cluster: String) -> Arc<Self> {
        let around = watch::Sender::default();
        let (find, lost, look_up) = (OnceLock::new(), OnceLock::new(), OnceLock::new());
        Arc::new(Self { me, cluster, around, find, lost, look_up, clocks: ClockComparison::default() })
    }

    /// Sets how local partitions are found, where lost links are reported, and how registrations are looked up. Called once.
    pub(in crate::broker) fn serve(&self, find: Find, lost: Arc<dyn LinkLost>, look_up: LookUp) {
        let first = self.find.set(find).is_ok() && self.lost.set(lost).is_ok() && self.look_up.set(look_up).is_ok();
        assert!(first, "a broker begins to serve once");
    }

    /// Replaces the registered brokers. Called at every change.
    pub(in crate::broker) fn know(&self, known: BTreeMap<BrokerId, Neighbour>) {
        self.around.send_if_modified(|around| {
            let changed = *around.known != known;
            around.known = Arc::new(known);
            changed
        });
    }

    /// Updates this broker's own broker epoch; `None` while this broker is not registered. Links continue meanwhile, and new links use the
    /// last epoch: a lost lease does not affect the content of a log, and the store may be unavailable. A broker epoch ends when the next
    /// one begins.
    pub(in crate::broker) fn registered(&self, epoch: Option<Revision>) {
        self.around.send_if_modified(|around| {
            around.is_registered = epoch.is_some();
            let own = epoch.or(around.own);
            std::mem::replace(&mut around.own, own) != own
        });
    }

    pub(in crate::broker) fn me(&self) -> BrokerId {
        self.me
    }

    pub(in crate::broker) fn cluster(&self) -> &str {
        &self.cluster
    }

    /// Returns this broker's own broker epoch, or the last one while this broker is not registered; `None` before the first.
    pub(super) fn own(&self) -> Option<Revision> {
        self.around.borrow().own
    }

    /// Returns this broker's own broker epoch; `None` while this broker is not registered.
    pub(super) fn own_registered(&self) -> Option<Revision> {
        let around = self.around.borrow();
        around.own.filter(|_| around.is_registered)
    }

    /// Returns the registration of a broker.
    pub(super) fn get(&self, broker: BrokerId) -> Option<Neighbour> {
        self.around.borrow().known.get(&broker).cloned()
    }

    /// Verifies that a broker is registered under the broker epoch that it claims. Reads the metadata store if the metadata cache is older
    /// than the claim.
    pub(in crate::broker) async fn confirm(&self, broker: BrokerId, claimed: Revision) -> Result<(), Unconfirmed> {
        match self.get(broker).map(|known| known.epoch) {
            Some(known) if known == claimed => return Ok(()),
            Some(known) if known > claimed => return Err(Unconfirmed::Older { broker, claimed, known }),
            Some(_) | None => {}
        }
        let unsure = |why: String| Unconfirmed::Unsure { broker, claimed, why };
        let look_up = self.look_up.get().ok_or_else(|| unsure("this broker is starting".to_owned()))?;
        match look_up(broker).await.map_err(|fault| unsure(fault.message))? {
            Some(known) if known == claimed => Ok(()),
            Some(known) if known > claimed => Err(Unconfirmed::Older { broker, claimed, known }),
            Some(_) | None => Err(Unconfirmed::Unknown { broker, claimed }),
        }
    }

    /// Returns the local partition with this id.
    pub(super) fn partition(&self, id: PartitionId) -> Option<Arc<Partition>> {
        self.find.get()?(id)
    }

    /// Returns the function that finds local partitions.
    pub(in crate::broker) fn find(self: &Arc<Self>) -> Find {
        let neighbours = Arc::clone(self);
        Arc::new(move |id| neighbours.partition(id))
    }

    /// Reports a lost link to or from this registration.
    pub(in crate::broker) fn lost(&self, broker: BrokerId, epoch: Revision, how: How) {
        if let Some(lost) = self.lost.get() {
            lost.link_lost(broker, epoch, how);
        }
    }

    /// Waits until that broker is registered and this broker has been registered once.
    pub(in crate::broker) async fn both(&self, broker: BrokerId) -> (Revision, Neighbour) {
        let mut around = self.around.subscribe();
        loop {
            let found = {
                let around = around.borrow_and_update();
                around.own.zip(around.known.get(&broker).cloned())
            };
            if let Some(found) = found {
                return found;
            }
            around.changed().await.expect("its sender lives as long as this");
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
        let mut around = self.around.subscribe();
        loop {
            let over = {
                let around = around.borrow_and_update();
                let newer = around.known.get(&broker).is_some_and(|known| known.epoch > epoch);
                newer || around.own.is_some_and(|now| now != own)
            };
            if over {
                link.cancel();
                return;
            }
            around.changed().await.expect("its sender lives as long as this");
        }
    }
}
