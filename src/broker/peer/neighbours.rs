//! What both directions of replication know of the brokers around: who is registered where, under which broker epoch, and this
//! broker's own.

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
    proto::fault::{Fault, Reason},
    task::Tasks,
};

/// Where a broker is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::broker) struct Neighbour {
    /// Its address for other brokers.
    pub(in crate::broker) address: String,
    /// Its broker epoch.
    pub(in crate::broker) epoch: Revision,
}

/// Who is told of links that are lost: evidence that a process is gone, for whoever decides by it.
pub(in crate::broker) trait LinkLost: Send + Sync + 'static {
    /// A link to or from this uptime of a broker ended, or could not be made. Must not wait.
    fn link_lost(&self, broker: BrokerId, epoch: Revision, how: How);
}

/// The brokers around, as far as this one was told.
pub(in crate::broker) struct Neighbours {
    me: BrokerId,
    cluster: String,
    around: watch::Sender<Around>,
    find: OnceLock<Find>,
    lost: OnceLock<Arc<dyn LinkLost>>,
    look_up: OnceLock<LookUp>,
    /// Their clocks beside the one here.
    pub(in crate::broker) clocks: ClockComparison,
}

/// Asks the metadata store in which uptime a broker is registered, at a bounded rate; a fault where that cannot be said now.
pub(in crate::broker) type LookUp =
    Arc<dyn Fn(BrokerId) -> BoxFuture<'static, Result<Option<Revision>, Fault>> + Send + Sync>;

/// Why a broker that says in which uptime it runs is not spoken with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(in crate::broker) enum Unconfirmed {
    /// It has registered again since.
    #[error("broker {broker} runs in its uptime {claimed}, and has registered as {known} since")]
    Older {
        /// Which.
        broker: BrokerId,
        /// What it says.
        claimed: Revision,
        /// What it is registered as.
        known: Revision,
    },
    /// The metadata store has no such registration.
    #[error("broker {broker} is not registered in the uptime {claimed} that it names")]
    Unknown {
        /// Which.
        broker: BrokerId,
        /// What it says.
        claimed: Revision,
    },
    /// It may be: the mirror does not have it, and the store could not be asked.
    #[error("broker {broker} is not registered in the uptime {claimed} as far as is known here: {why}")]
    Unsure {
        /// Which.
        broker: BrokerId,
        /// What it says.
        claimed: Revision,
        /// Why nobody knows.
        why: String,
    },
}

impl From<Unconfirmed> for Fault {
    fn from(error: Unconfirmed) -> Self {
        let reason = match error {
            Unconfirmed::Older { .. } => Reason::InvalidRequest,
            // It may be about to register.
            Unconfirmed::Unknown { .. } | Unconfirmed::Unsure { .. } => Reason::NotReady,
        };
        Self::new(reason, error.to_string())
    }
}

#[derive(Clone, Default)]
struct Around {
    /// This broker's own broker epoch: the last, while it is not registered.
    own: Option<Revision>,
    is_registered: bool,
    known: Arc<BTreeMap<BrokerId, Neighbour>>,
}

impl Neighbours {
    /// Of this broker. It knows of nobody before it is told.
    pub(in crate::broker) fn new(me: BrokerId, cluster: String) -> Arc<Self> {
        let around = watch::Sender::default();
        let (find, lost, look_up) = (OnceLock::new(), OnceLock::new(), OnceLock::new());
        Arc::new(Self { me, cluster, around, find, lost, look_up, clocks: ClockComparison::default() })
    }

    /// Says how its partitions are found, who is told of lost links, and how registrations are looked up. Once.
    pub(in crate::broker) fn serve(&self, find: Find, lost: Arc<dyn LinkLost>, look_up: LookUp) {
        let first = self.find.set(find).is_ok() && self.lost.set(lost).is_ok() && self.look_up.set(look_up).is_ok();
        assert!(first, "a broker begins to serve once");
    }

    /// Takes every broker that is registered, at every change.
    pub(in crate::broker) fn know(&self, known: BTreeMap<BrokerId, Neighbour>) {
        self.around.send_if_modified(|around| {
            let changed = *around.known != known;
            around.known = Arc::new(known);
            changed
        });
    }

    /// Takes this broker's own broker epoch; `None` while it is not registered. Links go on meanwhile, and new ones are made
    /// under the last: a lost lease says nothing of what is in a log, and the store may be away. A broker epoch ends with the
    /// next one.
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

    /// This broker's own broker epoch, or its last one; `None` before the first.
    pub(super) fn own(&self) -> Option<Revision> {
        self.around.borrow().own
    }

    /// This broker's own broker epoch; `None` while it is not registered.
    pub(super) fn own_registered(&self) -> Option<Revision> {
        let around = self.around.borrow();
        around.own.filter(|_| around.is_registered)
    }

    /// What is known of a broker.
    pub(super) fn get(&self, broker: BrokerId) -> Option<Neighbour> {
        self.around.borrow().known.get(&broker).cloned()
    }

    /// Whether a broker is registered in the uptime that it names. Where the mirror is older than the claim, the metadata store is asked.
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

    /// The partition of this broker with that id.
    pub(super) fn partition(&self, id: PartitionId) -> Option<Arc<Partition>> {
        self.find.get()?(id)
    }

    /// How its partitions are found.
    pub(in crate::broker) fn find(self: &Arc<Self>) -> Find {
        let neighbours = Arc::clone(self);
        Arc::new(move |id| neighbours.partition(id))
    }

    /// A link to or from that uptime is lost.
    pub(in crate::broker) fn lost(&self, broker: BrokerId, epoch: Revision, how: How) {
        if let Some(lost) = self.lost.get() {
            lost.link_lost(broker, epoch, how);
        }
    }

    /// Waits until that broker is registered, and this one was once.
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

    /// Ends what goes by this token when another broker epoch begins, here or there.
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
