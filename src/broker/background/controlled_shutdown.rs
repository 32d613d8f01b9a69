//! Controlled shutdown of a broker in a cluster: leadership is transferred before anything is closed.
//!
//! # Overview
//!
//! 1. `/readyz` reports that the broker is not ready; requests are served as before.
//! 2. The registration shows that this broker stops. From then on elections choose it last, leaders remove it from
//!    their ISR, and the controller transfers its leaderships.
//! 3. The broker waits until the controller has transferred each leadership for which another running ISR member
//!    exists. The broker also waits until leaders have removed the broker from each ISR that is above the min ISR.
//!
//! After a timeout, the shutdown continues without the remaining transfers. Peers then detect the end of the process as
//! they detect a failed broker, and no data is lost. A partition whose only in-sync replica is on this broker cannot be
//! transferred.

use std::{sync::Arc, time::Duration};

use crate::{
    broker::{node_context::NodeContext, partitions::table::PartitionTable},
    cluster::{BrokerState, MetadataCache, MetadataSnapshot, PartitionValue, Session},
    model::BrokerId,
};

/// Pause before the metadata store is called again.
const RETRY_INTERVAL: Duration = Duration::from_millis(250);

/// Controlled shutdown of this broker: the transfer of its leaderships and ISR memberships.
pub(super) struct ControlledShutdown {
    id: BrokerId,
    metadata: MetadataCache,
    partitions: Arc<PartitionTable>,
    session: Session,
}

impl ControlledShutdown {
    pub(super) fn new(ctx: &NodeContext, partitions: Arc<PartitionTable>, session: Session) -> Self {
        Self { id: ctx.id, metadata: ctx.metadata.clone(), partitions, session }
    }

    /// Publishes that this broker stops, and waits until leaderships and ISR memberships are transferred. Logs a
    /// warning and returns if the timeout passes first.
    pub(super) async fn transfer_leadership(&self, timeout: Duration) {
        if tokio::time::timeout(timeout, self.transfer_all()).await.is_err() {
            let state = self.metadata.state();
            let remaining = self.count_transferable(&state);
            tracing::warn!(
                partitions = remaining,
                ?timeout,
                "the leadership or ISR membership of some partitions was not transferred in half of \
                 broker.shutdown_timeout: the stop continues, and their clients may wait until the other brokers \
                 detect it"
            );
        }
    }

    /// Publishes in the registration that this broker stops, and waits until [`is_transferable`] holds for no open
    /// partition.
    async fn transfer_all(&self) {
        while let Err(error) = self.session.publish_stopping().await {
            tracing::info!(%error, "could not mark this broker as stopping in the metadata store: retrying");
            tokio::time::sleep(RETRY_INTERVAL).await;
        }
        let mut states = self.metadata.watch();
        // An error means that the metadata cache was stopped, so nothing more can be observed.
        let _stopped =
            states.wait_for(|state| self.is_stop_published(state) && self.count_transferable(state) == 0).await;
        tracing::info!("transferred the leadership of all partitions with another in-sync replica");
    }

    /// Returns true if the registration in this snapshot shows that this broker stops, or if there is no registration.
    fn is_stop_published(&self, state: &MetadataSnapshot) -> bool {
        state.brokers().get(&self.id).is_none_or(|entry| entry.value.state == BrokerState::Stopping)
    }

    /// Returns the number of open partitions for which [`is_transferable`] holds.
    fn count_transferable(&self, state: &MetadataSnapshot) -> usize {
        let open = self.partitions.open();
        let transferable = open.iter().filter(|partition| {
            let stored = state.partition(partition.id()).and_then(|entry| entry.partition.as_ref());
            let min_insync = partition.config().min_insync_replicas;
            stored.is_some_and(|stored| is_transferable(&stored.value, self.id, min_insync, |id| is_running(state, id)))
        });
        transferable.count()
    }
}

/// Returns true if a broker is registered and not shutting down.
fn is_running(state: &MetadataSnapshot, id: BrokerId) -> bool {
    state.brokers().get(&id).is_some_and(|entry| entry.value.state == BrokerState::Running)
}

/// Returns true if `me` leads the partition and another running ISR member could lead it. Also returns true if a
/// running leader could remove `me` from the ISR and still have the min ISR.
fn is_transferable(
    value: &PartitionValue,
    me: BrokerId,
    min_insync: usize,
    is_running: impl Fn(BrokerId) -> bool,
) -> bool {
    if value.leader == Some(me) {
        return value.isr.iter().any(|id| *id != me && is_running(*id));
    }
    value.isr.contains(&me) && value.isr.len() > min_insync && value.leader.is_some_and(is_running)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::LeaderEpoch;

    fn value(leader: Option<u32>, isr: &[u32]) -> PartitionValue {
        PartitionValue {
            leader: leader.map(BrokerId),
            isr: isr.iter().copied().map(BrokerId).collect(),
            ..PartitionValue::new([1, 2, 3].map(BrokerId).to_vec(), LeaderEpoch(4))
        }
    }

    #[test]
    fn shutdown_waits_only_for_transferable_partitions() {
        let only_two = |id: BrokerId| id == BrokerId(2);
        for (leader, isr, waits, reason) in [
            (Some(1), &[1, 2][..], true, "broker 2 can lead"),
            (Some(1), &[1, 3], false, "no running broker is in sync"),
            (Some(1), &[1], false, "broker 1 is the only in-sync replica"),
            (Some(2), &[1, 2], true, "the leader removes broker 1 from the ISR"),
            (Some(2), &[2, 3], false, "broker 1 is in no ISR"),
            (Some(3), &[1, 3], false, "the leader is stopping too"),
            (Some(2), &[1], false, "broker 1 is needed for the min ISR"),
            (None, &[1, 2], false, "no leader can remove broker 1"),
        ] {
            assert_eq!(is_transferable(&value(leader, isr), BrokerId(1), 1, only_two), waits, "{reason}");
        }
        assert!(!is_transferable(&value(Some(2), &[1, 2]), BrokerId(1), 2, only_two), "the min ISR needs both");
    }
}
