//! Requests of partitions to the follower's side of one link. Partitions call from their own tasks and never wait. The
//! link's task takes the requests, and exists only while the link is connected.
//!
//! A later request of a partition replaces the earlier ones that it makes obsolete, if the link's task has not taken
//! them. So a partition has at most one entry, however often its requests change.

use std::collections::{BTreeMap, VecDeque};

use tokio::sync::Notify;

use super::messages::SubscribeRequest;
use crate::{
    model::{LeaderEpoch, PartitionId},
    partition::{
        handle::Partition,
        leader::{divergence::LogPosition, member::ReplicaProgress},
    },
    task::lock::Mutex,
};

/// Number of a subscription request, among all requests to one link.
pub(super) type RequestId = u64;

/// Pending requests of partitions to one link.
#[derive(Debug, Default)]
pub struct LinkRequests {
    state: Mutex<LinkRequestState>,
    /// Notified when a request is queued.
    queued: Notify,
    /// Notified when a partition starts to follow.
    followed: Notify,
}

#[derive(Debug, Default)]
struct LinkRequestState {
    entries: BTreeMap<PartitionId, PartitionRequests>,
    /// Partitions with pending work, each once, in the order of their oldest request.
    queue: VecDeque<PartitionId>,
    /// Number of the newest subscription request.
    last_request: RequestId,
}

/// Requests of one partition.
#[derive(Debug, Default)]
struct PartitionRequests {
    /// True if the partition follows on this link.
    follows: bool,
    /// Current subscription request; `None` while the partition is not subscribed. Results of earlier requests are
    /// dropped.
    subscription: Option<RequestId>,
    pending: PendingLinkWork,
    /// True while the partition is in the queue.
    queued: bool,
}

/// Pending work of the link's task for a partition, in the order of the fields.
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
    /// Leader epoch of the value that the partition applied.
    pub(super) known_epoch: LeaderEpoch,
    /// True if the partition will not return soon.
    pub(super) stopping: bool,
}

impl LinkRequests {
    /// Starts to follow on this link. An earlier subscription ends, because it may be of an earlier epoch of the same
    /// leader.
    pub fn start_following(&self, partition: PartitionId) {
        self.update_entry(partition, |entry, _| {
            (entry.follows, entry.subscription, entry.pending.subscribe) = (true, None, None);
            entry.pending.connected = true;
        });
        self.followed.notify_one();
    }

    /// Requests a subscription; ignored if the partition does not follow on this link. After the return, nothing of an
    /// earlier subscription is acknowledged, or delivered to the partition.
    pub fn subscribe(
        &self,
        partition: PartitionId,
        epoch: LeaderEpoch,
        position: LogPosition,
        progress: ReplicaProgress,
    ) {
        self.update_entry(partition, |entry, last_request| {
            if !entry.follows {
                return;
            }
            *last_request += 1;
            entry.subscription = Some(*last_request);
            (entry.pending.connected, entry.pending.resubscribe) = (false, false);
            entry.pending.subscribe = Some((*last_request, SubscribeRequest { partition, epoch, position, progress }));
        });
    }

    /// Requests, after a pause, another event that the link is connected, so that the partition subscribes again. The
    /// request is ignored if the partition does not follow on this link.
    pub fn retry_later(&self, partition: PartitionId) {
        self.update_entry(partition, |entry, _| entry.pending.resubscribe = entry.follows);
    }

    /// Ends following on this link; ignored if the partition does not follow on it. After the return, nothing of the
    /// subscription is acknowledged, or delivered to the partition.
    pub fn unsubscribe(&self, partition: PartitionId, known_epoch: LeaderEpoch, stopping: bool) {
        self.update_entry(partition, |entry, _| {
            if entry.follows {
                (entry.follows, entry.subscription) = (false, None);
                entry.pending = PendingLinkWork {
                    unsubscribe: Some(UnsubscribeRequest { known_epoch, stopping }),
                    ..PendingLinkWork::default()
                };
            }
        });
    }

    /// Waits until a partition follows on this link.
    pub async fn wait_until_followed(&self) {
        loop {
            let followed = self.followed.notified();
            if self.state.lock().entries.values().any(|entry| entry.follows) {
                return;
            }
            followed.await;
        }
    }

    /// Waits until a request is pending.
    pub(super) async fn wait_for_request(&self) {
        loop {
            let queued = self.queued.notified();
            if !self.state.lock().queue.is_empty() {
                return;
            }
            queued.await;
        }
    }

    /// Changes the requests of a partition, and queues the partition. `update` also gets the number of the newest
    /// subscription request.
    fn update_entry(&self, partition: PartitionId, update: impl FnOnce(&mut PartitionRequests, &mut RequestId)) {
        let mut state = self.state.lock();
        let LinkRequestState { entries, queue, last_request } = &mut *state;
        let entry = entries.entry(partition).or_default();
        update(entry, last_request);
        if !std::mem::replace(&mut entry.queued, true) {
            queue.push_back(partition);
            drop(state);
            self.queued.notify_one();
        }
    }

    /// Starts a link: every partition that follows is to be notified, and none is subscribed. Drops all other requests.
    pub(super) fn begin_link(&self) {
        let mut state = self.state.lock();
        state.queue.clear();
        let LinkRequestState { entries, queue, .. } = &mut *state;
        entries.retain(|_, entry| entry.follows);
        for (partition, entry) in entries.iter_mut() {
            *entry = PartitionRequests {
                follows: true,
                queued: true,
                pending: PendingLinkWork { connected: true, ..PendingLinkWork::default() },
                subscription: None,
            };
            queue.push_back(*partition);
        }
    }

    /// Ends the link: drops all requests and subscriptions. Returns the partitions that follow.
    pub(super) fn end_link(&self) -> Vec<PartitionId> {
        let mut state = self.state.lock();
        state.queue.clear();
        state.entries.retain(|_, entry| entry.follows);
        for entry in state.entries.values_mut() {
            *entry = PartitionRequests { follows: true, ..PartitionRequests::default() };
        }
        state.entries.keys().copied().collect()
    }

    /// Takes the pending work of the partition with the oldest request; `None` if no request is pending.
    pub(super) fn take(&self) -> Option<(PartitionId, PendingLinkWork)> {
        let mut state = self.state.lock();
        let partition = state.queue.pop_front()?;
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

    /// Calls `work` with the partition if `request` is still its current subscription; returns `None` if not. The
    /// partition cannot unsubscribe meanwhile. `work` must not wait, nor send a request to this link.
    pub(super) fn while_subscribed<T>(
        &self,
        partition: &Partition,
        request: RequestId,
        work: impl FnOnce(&Partition) -> T,
    ) -> Option<T> {
        let state = self.state.lock();
        let is_current = state.entries.get(&partition.id()).is_some_and(|entry| entry.subscription == Some(request));
        is_current.then(|| work(partition))
    }

    /// Ends a subscription, if `request` is still the partition's current one.
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
            (id, Some(UnsubscribeRequest { known_epoch: LeaderEpoch(3), stopping: false }))
        );
        assert!(!work.connected && work.resubscribe && work.subscribe.is_some());
        assert!(requests.take().is_none(), "a partition is queued once");
        // A link begins with one notification for each partition that follows, and drops all earlier requests.
        requests.begin_link();
        let work = requests.take().expect("a new link notifies the partition").1;
        assert!(work.connected && work.subscribe.is_none() && work.unsubscribe.is_none());
        requests.unsubscribe(id, LeaderEpoch(3), true);
        assert_eq!(requests.end_link(), []);
        requests.begin_link();
        assert!(requests.take().is_none());
    }
}
