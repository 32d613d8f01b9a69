//! A graceful stop among several brokers: others lead what is led here before anything is closed.
//!
//! # Overview
//!
//! 1. `/readyz` says no; requests are served as before.
//! 2. The registration says that this broker stops. From then on it is elected for nothing, its leaders drop it from their in-sync
//!    replicas, and the controller gives what it leads to others.
//! 3. It waits until it leads nothing that another replica could lead, and until no set has it that can do without it.
//!
//! What takes longer than it may is left as it is: the others then notice by its end, as of a broker that died, and nothing is lost by
//! it. A partition of which this broker is the only replica in sync has nobody to go to.

use std::{sync::Arc, time::Duration};

use super::Broker;
use crate::{
    cluster::{BrokerState, PartitionValue, Session, ViewState},
    model::BrokerId,
};

/// Pause before the store is asked again.
const AGAIN: Duration = Duration::from_millis(250);

impl Broker {
    /// Gives leaderships and memberships away, within a time.
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
        // The mirror ends with the broker.
        let _gone = states.wait_for(|state| self.is_said(state) && self.entrusted(state) == 0).await;
        tracing::info!("others lead what this broker led, where another replica was in sync");
    }

    /// Whether the others can know that this broker stops.
    fn is_said(&self, state: &ViewState) -> bool {
        state.brokers().get(&self.settings.id).is_none_or(|known| known.value.state == BrokerState::Stopping)
    }

    /// How many partitions others can take over, or do without this broker, and do not yet.
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

/// Whether a broker is there to stay.
fn takes(state: &ViewState, id: BrokerId) -> bool {
    state.brokers().get(&id).is_some_and(|known| known.value.state == BrokerState::Running)
}

/// Whether a partition has this broker where another one could be, or where nobody need be.
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
    fn a_stop_waits_for_what_others_can_take_and_for_nothing_else() {
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
