//! Requests of partitions to one link. Partitions call from their own tasks and never wait; the link's task takes
//! requests when it can.
//!
//! A later request of a partition replaces the requests that were not taken yet. So there is one entry for each
//! partition that follows, however often its requests change.

use std::collections::{BTreeMap, VecDeque};

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::messages::SubscribeRequest;
use crate::{
    model::{LeaderEpoch, PartitionId},
    partition::{
        handle::Partition,
        leader::{divergence::LogPosition, member::ReplicaProgress},
    },
};

/// Number of a subscription request, among all of one link.
pub(super) type RequestId = u64;

/// Pending requests of partitions to one link.
#[derive(Debug, Default)]
pub struct LinkRequests {
    state: Mutex<LinkRequestState>,
    changed: Notify,
    followed: Notify,
}

#[derive(Debug, Default)]
struct LinkRequestState {
    entries: BTreeMap<PartitionId, PartitionRequests>,
    /// Partitions with pending work, each once.
    order: VecDeque<PartitionId>,
    last_request: RequestId,
}

#[derive(Debug, Default)]
struct PartitionRequests {
    /// True if the partition follows on this link.
    follows: bool,
    /// Current subscription request; results of earlier requests are dropped.
    subscription: Option<RequestId>,
    pending: PendingLinkWork,
    queued: bool,
}

/// Pending work for a partition, in this order.
#[derive(Debug, Default)]
pub(super) struct PendingLinkWork {
    /// End the partition's subscription.
    pub(super) unsubscribe: Option<UnsubscribeRequest>,
    /// Notify the partition that the link is connected.
    pub(super) connected: bool,
    /// Notify the partition, after a pause, that the link is connected.
    pub(super) resubscribe: bool,
    /// Send this subscription.
    pub(super) subscribe: Option<(RequestId, SubscribeRequest)>,
}

/// Parameters of an unsubscription.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct UnsubscribeRequest {
    /// Newest epoch of the partition's metadata.
    pub(super) known: LeaderEpoch,
    /// True if the partition will not return soon.
    pub(super) stopping: bool,
}

impl LinkRequests {
    /// Starts to follow on this link. Any earlier subscription ends: the leader may be the same and its epoch another.
    pub fn start_following(&self, partition: PartitionId) {
        self.change(partition, |entry, _| {
            (entry.follows, entry.subscription, entry.pending.subscribe) = (true, None, None);
            entry.pending.connected = true;
        });
        self.followed.notify_one();
    }

    /// Requests a subscription. Once this has returned, nothing of an earlier subscription is acknowledged, or
    /// delivered to the partition.
    pub fn subscribe(
        &self,
        partition: PartitionId,
        epoch: LeaderEpoch,
        position: LogPosition,
        progress: ReplicaProgress,
    ) {
        self.change(partition, |entry, last_request| {
            if !entry.follows {
                return;
            }
            *last_request += 1;
            entry.subscription = Some(*last_request);
            (entry.pending.connected, entry.pending.resubscribe) = (false, false);
            entry.pending.subscribe = Some((*last_request, SubscribeRequest { partition, epoch, position, progress }));
        });
    }

    /// Requests a notification, after a pause, that the link is connected.
    pub fn retry_later(&self, partition: PartitionId) {
        self.change(partition, |entry, _| entry.pending.resubscribe = entry.follows);
    }

    /// Ends following on this link. Once this has returned, nothing is acknowledged, or delivered to the partition.
    pub fn unsubscribe(&self, partition: PartitionId, known: LeaderEpoch, stopping: bool) {
        self.change(partition, |entry, _| {
            if entry.follows {
                (entry.follows, entry.subscription) = (false, None);
                entry.pending = PendingLinkWork {
                    unsubscribe: Some(UnsubscribeRequest { known, stopping }),
                    ..PendingLinkWork::default()
                };
            }
        });
    }

    /// Waits until some partition follows on this link.
    pub async fn followed(&self) {
        loop {
            let followed = self.followed.notified();
            if self.state.lock().entries.values().any(|entry| entry.follows) {
                return;
            }
            followed.await;
        }
    }

    /// Waits until some request is pending.
    pub(super) async fn changed(&self) {
        loop {
            let changed = self.changed.notified();
            if !self.state.lock().order.is_empty() {
                return;
            }
            changed.await;
        }
    }

    fn change(&self, partition: PartitionId, change: impl FnOnce(&mut PartitionRequests, &mut RequestId)) {
        let mut state = self.state.lock();
        let LinkRequestState { entries, order, last_request } = &mut *state;
        let entry = entries.entry(partition).or_default();
        change(entry, last_request);
        if !std::mem::replace(&mut entry.queued, true) {
            order.push_back(partition);
            drop(state);
            self.changed.notify_one();
        }
    }

    /// Begins a link: every partition that follows is to be notified, and none is subscribed.
    pub(super) fn begin(&self) {
        let mut state = self.state.lock();
        state.order.clear();
        let LinkRequestState { entries, order, .. } = &mut *state;
        entries.retain(|_, entry| entry.follows);
        for (partition, entry) in entries.iter_mut() {
            *entry = PartitionRequests {
                follows: true,
                queued: true,
                pending: PendingLinkWork { connected: true, ..PendingLinkWork::default() },
                subscription: None,
            };
            order.push_back(*partition);
        }
    }

    /// Ends the link: no partition stays subscribed. Returns the partitions that follow.
    pub(super) fn end(&self) -> Vec<PartitionId> {
        let mut state = self.state.lock();
        state.order.clear();
        state.entries.retain(|_, entry| entry.follows);
        for entry in state.entries.values_mut() {
            *entry = PartitionRequests { follows: true, ..PartitionRequests::default() };
        }
        state.entries.keys().copied().collect()
    }

    /// Takes the pending work of the partition whose request is the oldest.
    pub(super) fn take(&self) -> Option<(PartitionId, PendingLinkWork)> {
        let mut state = self.state.lock();
        let partition = state.order.pop_front()?;
        let entry = state.entries.get_mut(&partition)?;
        entry.queued = false;
        let work = std::mem::take(&mut entry.pending);
        if !entry.follows {
            state.entries.remove(&partition);
        }
        Some((partition, work))
    }

    /// Returns true if the partition follows on this link.
    pub(super) fn follows(&self, partition: PartitionId) -> bool {
        self.state.lock().entries.get(&partition).is_some_and(|entry| entry.follows)
    }

    /// Runs `work` with a partition if that subscription holds. `work` must not wait, nor send a request to this link.
    pub(super) fn while_subscribed<T>(
        &self,
        partition: &Partition,
        request: RequestId,
        work: impl FnOnce(&Partition) -> T,
    ) -> Option<T> {
        let state = self.state.lock();
        let holds = state.entries.get(&partition.id()).is_some_and(|entry| entry.subscription == Some(request));
        holds.then(|| work(partition))
    }

    /// Ends that subscription, if it holds.
    pub(super) fn end_subscription(&self, partition: PartitionId, request: RequestId) {
        if let Some(entry) = self.state.lock().entries.get_mut(&partition)
            && entry.subscription == Some(request)
        {
            entry.subscription = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Offset, TopicId};

    #[test]
    fn pending_requests_are_replaced_by_later_ones() {
        let (requests, id) = (LinkRequests::default(), PartitionId::new(TopicId::from_bytes([1; 16]), 0));
        let subscribe = |requests: &LinkRequests| {
            requests.subscribe(
                id,
                LeaderEpoch(2),
                LogPosition { last_epoch: None, log_end: Offset::ZERO, removal_count: None },
                ReplicaProgress::default(),
            )
        };
        subscribe(&requests);
        let work = requests.take().expect("a request is pending").1;
        assert!(work.subscribe.is_none(), "a partition that does not follow is not subscribed");
        for _ in 0..1000 {
            requests.start_following(id);
            subscribe(&requests);
            requests.unsubscribe(id, LeaderEpoch(3), false);
            requests.start_following(id);
            requests.retry_later(id);
        }
        subscribe(&requests);
        requests.retry_later(id);
        let (partition, work) = requests.take().expect("a request is pending");
        assert_eq!(
            (partition, work.unsubscribe),
            (id, Some(UnsubscribeRequest { known: LeaderEpoch(3), stopping: false }))
        );
        assert!(!work.connected && work.resubscribe && work.subscribe.is_some());
        assert!(requests.take().is_none(), "a partition is queued once");
        // A link begins with all partitions that follow, and with nothing else.
        requests.begin();
        let work = requests.take().expect("a new link notifies the partition").1;
        assert!(work.connected && work.subscribe.is_none() && work.unsubscribe.is_none());
        requests.unsubscribe(id, LeaderEpoch(3), true);
        assert_eq!(requests.end(), []);
        requests.begin();
        assert!(requests.take().is_none());
    }
}
