//! State that outbound and inbound links share: the addresses and broker epochs of peers, and this broker's own broker
//! epoch. Also warns about peers whose clocks differ by much from the local clock; no decision between brokers depends
//! on a clock.

use std::{collections::BTreeMap, sync::Arc};

use tokio::sync::watch;

use super::{claim_verifier::ClaimVerifier, peer_client::DisconnectReason};
use crate::{
    broker::partitions::table::PartitionTable,
    cluster::Revision,
    model::{BrokerId, PartitionId},
    partition::{
        Partition,
        replication::{PartitionLookup, StoredEpoch},
    },
    proto::error::{ApiError, ErrorCode},
    task::{Tasks, clock, lock::Mutex},
    telemetry::LogThrottle,
};

/// Registration of a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PeerInfo {
    /// Address at which the peer accepts connections of other brokers.
    pub(super) address: String,
    /// Broker epoch of the registration.
    pub(super) epoch: Revision,
}

/// Receiver of lost links. A lost link may mean that the peer's process is gone.
pub(super) trait LinkLossListener: Send + Sync + 'static {
    /// Handles a lost link to or from `broker`, registered with this broker epoch: the link ended or could not be
    /// opened. Must not block.
    fn link_lost(self: Arc<Self>, broker: BrokerId, epoch: Revision, reason: DisconnectReason);
}

/// Table of registered peers.
pub(super) struct PeerTable {
    me: BrokerId,
    cluster: String,
    state: watch::Sender<PeerTableState>,
    partitions: Arc<PartitionTable>,
    link_loss_listener: Arc<dyn LinkLossListener>,
    verifier: Arc<ClaimVerifier>,
    /// Comparison of each peer's clock with the local clock.
    pub(super) clocks: ClockComparison,
}

/// Reason for rejecting a broker whose reported broker epoch could not be confirmed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unconfirmed {
    /// The broker is registered with a later broker epoch.
    #[error(
        "broker {broker} has broker epoch {reported}, and is registered with the later epoch {registered}: reconnect"
    )]
    Older {
        broker: BrokerId,
        /// Broker epoch that the peer reported.
        reported: Revision,
        /// Registered broker epoch.
        registered: Revision,
    },
    /// The metadata store has no registration of the broker, or one with an earlier broker epoch.
    #[error("broker {broker} is not registered with broker epoch {reported}")]
    Unknown {
        broker: BrokerId,
        /// Broker epoch that the peer reported.
        reported: Revision,
    },
    /// The metadata cache does not contain the registration, and the metadata store could not be read.
    #[error(
        "broker {broker} is not registered with broker epoch {reported} in the metadata cache, and could not be \
         verified: {reason}"
    )]
    Unsure {
        broker: BrokerId,
        /// Broker epoch that the peer reported.
        reported: Revision,
        /// Reason why the store could not be read.
        reason: String,
    },
}

impl From<Unconfirmed> for ApiError {
    fn from(error: Unconfirmed) -> Self {
        let code = match error {
            Unconfirmed::Older { .. } => ErrorCode::InvalidRequest,
            // This registration may become visible later, so the peer may retry.
            Unconfirmed::Unknown { .. } | Unconfirmed::Unsure { .. } => ErrorCode::NotReady,
        };
        Self::new(code, error.to_string())
    }
}

/// Registrations of this broker and of its peers.
#[derive(Clone, Default)]
struct PeerTableState {
    /// Current or, while this broker is not registered, last broker epoch of this broker; `None` before its first
    /// registration.
    own_epoch: Option<Revision>,
    is_registered: bool,
    peers: Arc<BTreeMap<BrokerId, PeerInfo>>,
}

impl PeerTable {
    /// Creates a table without peers for this broker. `verifier` reads registrations and leader epochs in the metadata
    /// store.
    pub(super) fn new(
        me: BrokerId,
        cluster: String,
        partitions: Arc<PartitionTable>,
        link_loss_listener: Arc<dyn LinkLossListener>,
        verifier: Arc<ClaimVerifier>,
    ) -> Arc<Self> {
        let state = watch::Sender::default();
        let clocks = ClockComparison::default();
        Arc::new(Self { me, cluster, state, partitions, link_loss_listener, verifier, clocks })
    }

    /// Replaces the peers by the registered brokers, each with its peer address and broker epoch. Called at every
    /// change of a registration.
    pub(super) fn update_peers(&self, registered: BTreeMap<BrokerId, (String, Revision)>) {
        let peers = registered.into_iter().map(|(id, (address, epoch))| (id, PeerInfo { address, epoch }));
        let peers: BTreeMap<_, _> = peers.collect();
        self.state.send_if_modified(|state| {
            let changed = *state.peers != peers;
            state.peers = Arc::new(peers);
            changed
        });
    }

    /// Updates this broker's own broker epoch; `None` if this broker is not registered. Without a registration, links
    /// continue, and new links use the last broker epoch. A lost lease does not affect the content of a log, and the
    /// metadata store may be unavailable. A broker epoch ends when the next one begins.
    pub(super) fn set_own_epoch(&self, epoch: Option<Revision>) {
        self.state.send_if_modified(|state| {
            state.is_registered = epoch.is_some();
            let own_epoch = epoch.or(state.own_epoch);
            std::mem::replace(&mut state.own_epoch, own_epoch) != own_epoch
        });
    }

    pub(super) fn me(&self) -> BrokerId {
        self.me
    }

    pub(super) fn cluster(&self) -> &str {
        &self.cluster
    }

    /// Returns this broker's own broker epoch, or its last one while it is not registered; `None` before its first
    /// registration.
    pub(super) fn own_epoch(&self) -> Option<Revision> {
        self.state.borrow().own_epoch
    }

    /// Returns this broker's own broker epoch; `None` while this broker is not registered.
    pub(super) fn own_registration(&self) -> Option<Revision> {
        let state = self.state.borrow();
        state.own_epoch.filter(|_| state.is_registered)
    }

    /// Returns the registration of a peer; `None` if the metadata cache has none with a peer address.
    pub(super) fn get(&self, broker: BrokerId) -> Option<PeerInfo> {
        self.state.borrow().peers.get(&broker).cloned()
    }

    /// Verifies that a broker is registered with the broker epoch that it reports. Reads the metadata store if the
    /// metadata cache has no registration of the broker, or one with an earlier broker epoch.
    pub(super) async fn confirm(&self, broker: BrokerId, reported: Revision) -> Result<(), Unconfirmed> {
        match self.get(broker).map(|peer| peer.epoch) {
            Some(registered) if registered == reported => return Ok(()),
            Some(registered) if registered > reported => {
                return Err(Unconfirmed::Older { broker, reported, registered });
            }
            Some(_) | None => {}
        }
        let unsure = |reason: String| Unconfirmed::Unsure { broker, reported, reason };
        match self.verifier.broker_epoch(broker).await.map_err(|error| unsure(error.message))? {
            Some(registered) if registered == reported => Ok(()),
            Some(registered) if registered > reported => Err(Unconfirmed::Older { broker, reported, registered }),
            Some(_) | None => Err(Unconfirmed::Unknown { broker, reported }),
        }
    }

    /// Returns the open local replica of a partition.
    pub(super) fn partition(&self, id: PartitionId) -> Option<Arc<Partition>> {
        self.partitions.by_id(id)
    }

    /// Returns why the local replica of a partition is offline; `None` if it is not.
    pub(super) fn offline_reason(&self, id: PartitionId) -> Option<String> {
        self.partitions.offline_reason(id)
    }

    /// Returns the function with which a link finds open local replicas.
    pub(super) fn partition_lookup(&self) -> PartitionLookup {
        let partitions = Arc::clone(&self.partitions);
        Arc::new(move |id| partitions.by_id(id))
    }

    /// Returns the function with which a link reads the leader epoch of a partition in the metadata store.
    pub(super) fn leader_epoch_reader(&self) -> StoredEpoch {
        let verifier = Arc::clone(&self.verifier);
        Arc::new(move |id| {
            let verifier = Arc::clone(&verifier);
            Box::pin(async move { verifier.leader_epoch(id).await })
        })
    }

    /// Reports a lost link to or from `broker`, registered with this broker epoch, to the failure detector.
    pub(super) fn on_link_lost(&self, broker: BrokerId, epoch: Revision, reason: DisconnectReason) {
        Arc::clone(&self.link_loss_listener).link_lost(broker, epoch, reason);
    }

    /// Waits until `broker` is registered and this broker has been registered once. Returns this broker's own broker
    /// epoch, as [`Self::own_epoch`] does, and the registration of `broker`.
    pub(super) async fn wait_for_registrations(&self, broker: BrokerId) -> (Revision, PeerInfo) {
        let mut state = self.state.subscribe();
        loop {
            let found = {
                let state = state.borrow_and_update();
                state.own_epoch.zip(state.peers.get(&broker).cloned())
            };
            if let Some(found) = found {
                return found;
            }
            state.changed().await.expect("the table owns the sender");
        }
    }

    /// Waits until this broker has another broker epoch than `own_epoch`, or the peer `broker` has a later one than
    /// `epoch`. Then cancels `link`, the tasks of a link between the two, and returns.
    pub(super) async fn cancel_at_change(&self, own_epoch: Revision, broker: BrokerId, epoch: Revision, link: &Tasks) {
        let mut state = self.state.subscribe();
        loop {
            let has_ended = {
                let state = state.borrow_and_update();
                let peer_has_ended = state.peers.get(&broker).is_some_and(|peer| peer.epoch > epoch);
                peer_has_ended || state.own_epoch.is_some_and(|current| current != own_epoch)
            };
            if has_ended {
                link.cancel();
                return;
            }
            state.changed().await.expect("the table owns the sender");
        }
    }
}

/// Difference between two clocks from which a warning is logged, in milliseconds. Equal clocks seem to differ by the
/// delay of a message, which is far shorter.
const MAX_CLOCK_SKEW_MS: u64 = 10_000;

/// Comparison of other brokers' clocks with the local clock: the log throttle of each broker.
#[derive(Debug, Default)]
pub(super) struct ClockComparison(Mutex<BTreeMap<BrokerId, LogThrottle>>);

impl ClockComparison {
    /// Logs a warning if the clock of `broker`, as sent in its Hello or Welcome, differs by much from the local clock.
    /// Older versions send no clock.
    pub(super) fn compare(&self, broker: BrokerId, theirs_ms: Option<i64>) {
        let skew = theirs_ms.and_then(|theirs| clock_skew_seconds(theirs, clock::wall_ms()));
        let Some(seconds_ahead) = skew else { return };
        let mut logs = self.0.lock();
        let Some(count) = logs.entry(broker).or_default().occur(clock::monotonic()) else { return };
        tracing::warn!(
            %broker, seconds_ahead, count,
            "the clocks of this broker and of another broker differ: retention by time and the timestamps that brokers \
             set use the leader's clock; synchronize both clocks with one source (NTP)"
        );
    }
}

/// Returns the seconds by which the clock of `theirs_ms` is ahead of the clock of `ours_ms`; negative if it is behind.
/// Returns `None` if the difference is below [`MAX_CLOCK_SKEW_MS`].
fn clock_skew_seconds(theirs_ms: i64, ours_ms: i64) -> Option<i64> {
    let ahead_ms = theirs_ms.saturating_sub(ours_ms);
    (ahead_ms.unsigned_abs() >= MAX_CLOCK_SKEW_MS).then_some(ahead_ms / 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_large_clock_differences_are_reported() {
        let now = 1_700_000_000_000;
        for (theirs, expected) in [
            (now, None),
            (now + 9_999, None),
            (now - 9_999, None),
            (now + 10_000, Some(10)),
            (now - 600_000, Some(-600)),
            (i64::MIN, Some(i64::MIN / 1000)),
            (i64::MAX, Some((i64::MAX - now) / 1000)),
        ] {
            assert_eq!(clock_skew_seconds(theirs, now), expected, "{theirs}");
        }
    }
}
