//! Signals to the task that never block the sender: journal results, acknowledgements of followers, clock ticks and
//! dropped receivers.

use tokio::sync::Notify;

use crate::{
    log::PersistError,
    model::{BrokerId, LeaderEpoch, Offset},
    partition::leader::member::{PeerId, ReplicaProgress},
    task::lock::Mutex,
};

/// Latest signals. A sender replaces its pending signal and wakes the task, so the journal, the links and the clock
/// never wait for a partition.
#[derive(Default)]
pub(in crate::partition) struct ActorSignals {
    pending: Mutex<PendingSignals>,
    notify: Notify,
}

/// Signals that the task has not taken. The journal's result has no offset. The task reads the persisted end from the
/// replica, because an end from before a truncation would count removed records.
#[derive(Default)]
pub(super) struct PendingSignals {
    /// Last result of the journal, or its first failure; `None` if there is no new result.
    pub(super) persisted: Option<Result<(), PersistError>>,
    /// Last acknowledgement of each follower.
    pub(super) acks: Vec<FollowerAck>,
    /// Time of the last tick, in milliseconds of a monotonic clock; `None` if there was none.
    pub(super) now_ms: Option<u64>,
    /// True if a writer dropped its receiver before the result.
    pub(super) has_dropped_waiters: bool,
}

/// A follower's acknowledgement.
pub(super) struct FollowerAck {
    pub(super) peer: PeerId,
    pub(super) epoch: LeaderEpoch,
    pub(super) progress: ReplicaProgress,
}

impl ActorSignals {
    /// Stores a result of the journal; a failure is kept until the task takes it. The result for truncated records
    /// counts as a success.
    pub(super) fn on_persisted(&self, outcome: Result<Offset, PersistError>) {
        let outcome = match outcome {
            // The task itself truncated the submitted records: the disk did not fail.
            Ok(_) | Err(PersistError::Truncated) => Ok(()),
            Err(error) => Err(error),
        };
        let mut pending = self.pending.lock();
        // A failure is final: a later result does not replace it.
        if !matches!(pending.persisted, Some(Err(_))) {
            pending.persisted = Some(outcome);
        }
        drop(pending);
        self.notify.notify_one();
    }

    /// Stores a follower's acknowledgement, in place of its pending one.
    pub(in crate::partition) fn on_acknowledged(&self, peer: PeerId, epoch: LeaderEpoch, progress: ReplicaProgress) {
        let ack = FollowerAck { peer, epoch, progress };
        let mut pending = self.pending.lock();
        match pending.acks.iter_mut().find(|queued| queued.peer.broker == peer.broker) {
            Some(queued) => *queued = ack,
            None => pending.acks.push(ack),
        }
        drop(pending);
        self.notify.notify_one();
    }

    /// Stores the time of a tick, in milliseconds of a monotonic clock.
    pub(in crate::partition) fn tick(&self, now_ms: u64) {
        self.pending.lock().now_ms = Some(now_ms);
        self.notify.notify_one();
    }

    /// Returns true if the task has not taken the time of the last tick.
    #[cfg(test)]
    pub(in crate::partition) fn has_tick(&self) -> bool {
        self.pending.lock().now_ms.is_some()
    }

    /// Signals that a writer dropped its receiver before the result.
    pub(in crate::partition) fn on_waiter_dropped(&self) {
        self.pending.lock().has_dropped_waiters = true;
        self.notify.notify_one();
    }

    /// Drops the pending acknowledgement of a follower that subscribes again: acknowledgements of its earlier
    /// subscriptions do not count.
    pub(super) fn drop_acks_of(&self, broker: BrokerId) {
        self.pending.lock().acks.retain(|ack| ack.peer.broker != broker);
    }

    /// Takes the pending signals; `None` if there are none.
    pub(super) fn take(&self) -> Option<PendingSignals> {
        let mut pending = self.pending.lock();
        let is_pending = pending.persisted.is_some()
            || !pending.acks.is_empty()
            || pending.now_ms.is_some()
            || pending.has_dropped_waiters;
        is_pending.then(|| std::mem::take(&mut *pending))
    }

    /// Waits for signals and takes them.
    pub(super) async fn next(&self) -> PendingSignals {
        loop {
            let notified = self.notify.notified();
            if let Some(pending) = self.take() {
                return pending;
            }
            notified.await;
        }
    }
}
