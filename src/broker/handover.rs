//! Controlled shutdown of a broker in a cluster: leadership is transferred before anything is closed.
//!
//! # Overview
//!
//! 1. `/readyz` reports that the broker is not ready; requests are served as before.
//! 2. The registration shows that this broker stops. From then on it wins no election, leaders remove it from their ISR, and the controller
//!    transfers its leaderships.
//! 3. The broker waits until no other replica could take over its leaderships, and until every ISR that can do without the broker has
//!    removed it.
//!
//! After a timeout, the shutdown continues as it is. Peers then detect its end like that of a failed broker, and no data is lost. A
//! partition whose only in-sync replica is on this broker cannot be transferred.

use std::{sync::Arc, time::Duration};

use super::Broker;
use crate::{
    cluster::{BrokerState, PartitionValue, Session, ViewState},
    model::BrokerId,
};

/// Pause before the metadata store is called again.
const AGAIN: Duration = Duration::from_millis(250);

impl Broker {
    /// Transfers leaderships and ISR memberships, within a time.
    pub async fn hand_over(self: &Arc<Self>, session: &Session, within: Duration) {
        self.leave();
        if tokio::time::timeout(within, self.hand_all_over(session)).await.is_err() {
            let state = self.view.state();
            let left = self.entrusted(&state);
            tracing::warn!(
                partitions = left,
                "others did not take over all that this broker leads or is needed for in time"
            );
        }
    }

    async fn hand_all_over(&self, session: &Session) {
        while let Err(error) = session.stopping().await {
            tracing::info!(%error, "cannot tell the others yet that this broker stops");
            tokio::time::sleep(AGAIN).await;
        }
        let mut states = self.view.watch();
        // The metadata cache ends with the broker.
        let _gone = states.wait_for(|state| self.is_said(state) && self.entrusted(state) == 0).await;
        tracing::info!("others lead what this broker led, where another replica was in sync");
    }

    /// Returns true if the metadata shows that this broker stops, or does not contain its registration.
    fn is_said(&self, state: &ViewState) -> bool {
        state.brokers().get(&self.settings.id).is_none_or(|known| known.value.state == BrokerState::Stopping)
    }

    /// Returns the number of partitions that peers could take over from this broker, or that could do without this broker.
    fn entrusted(&self, state: &ViewState) -> usize {
        let open = self.hosted.open();
        let needed = open.iter().filter(|partition| {
            let known = state.partition(partition.id()).and_then(|entry| entry.partition.as_ref());
            let min_insync = partition.config().min_insync_replicas;
            known.is_some_and(|known| is_entrusted(&known.value, self.settings.id, min_insync, |id| takes(state, id)))
        });
        needed.count()
    }
}

/// Returns true if a broker is registered and not shutting down.
fn takes(state: &ViewState, id: BrokerId) -> bool {
    state.brokers().get(&id).is_some_and(|known| known.value.state == BrokerState::Running)
}

/// Returns true if another broker could lead the partition instead of this one, or if the ISR could do without this broker.
fn is_entrusted(value: &PartitionValue, me: BrokerId, min_insync: usize, takes: impl Fn(BrokerId) -> bool) -> bool {
    if value.leader == Some(me) {
        return value.isr.iter().any(|id| *id != me && takes(*id));
    }
    value.isr.contains(&me) && value.isr.len() > min_insync && value.leader.is_some_and(takes)
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
        let two_stays = |id: BrokerId| id == BrokerId(2);
        for (leader, isr, waits, why) in [
            (Some(1), &[1, 2][..], true, "broker 2 can lead"),
            (Some(1), &[1, 3], false, "nobody who stays is in sync"),
            (Some(1), &[1], false, "it is the only one in sync"),
            (Some(2), &[1, 2], true, "its leader drops it"),
            (Some(2), &[2, 3], false, "no set has it"),
            (Some(3), &[1, 3], false, "its leader stops as well"),
            (Some(2), &[1], false, "it is needed for the minimum"),
            (None, &[1, 2], false, "nobody leads who could drop it"),
        ] {
            assert_eq!(is_entrusted(&value(leader, isr), BrokerId(1), 1, two_stays), waits, "{why}");
        }
        assert!(!is_entrusted(&value(Some(2), &[1, 2]), BrokerId(1), 2, two_stays), "the minimum needs both");
    }
}
