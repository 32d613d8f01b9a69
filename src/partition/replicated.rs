//! A partition as one of several replicas: its interface for the broker, its links and the metadata.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc::error::TrySendError, oneshot},
    time::Instant,
};

use super::{
    Answered, Assignment, FromLink, Lag, On, Overrun, Partition, Ready, TailReader,
    actor::{JoinOrder, Order},
    leader::{
        insync::{Agreed, Departure, Ends, Peer, Registration},
        join::Claim,
    },
};
use crate::model::{BrokerId, LeaderEpoch};

/// Maximum time that a subscription waits for an epoch that this broker has not received yet.
const JOIN_WAIT: Duration = Duration::from_secs(1);

impl Partition {
    /// Applies metadata. Returns when the task has applied it: later requests to the partition find the new role. Calls come in the order
    /// of the metadata.
    pub async fn assign(&self, assignment: Assignment) {
        if let Some(state) = &assignment.committed {
            self.note_committed(state);
        }
        let (done, taken) = oneshot::channel();
        self.order(Order::Assign(Box::new(assignment), done)).await;
        let _stopped = taken.await;
    }

    /// Applies a changed status of a broker in the metadata cache.
    pub async fn seen(&self, broker: BrokerId, registration: Registration) {
        self.order(Order::Seen(broker, registration)).await;
    }

    /// Returns true if the task needs ticks ([`Self::tick`]) at intervals: it leads and an ISR member is behind, or it waits for metadata
    /// after its leadership ended.
    pub fn is_behind(&self) -> bool {
        self.shared.is_behind()
    }

    /// Sends the time, so that the task checks for lagging members. Never waits; replaces an earlier time that the task has not taken.
    /// `now_ms` is of one monotonic clock for all calls.
    pub fn tick(&self, now_ms: u64) {
        self.news.tick(now_ms);
    }

    /// Delivers the outcome of a request to [`Agreement`](super::Agreement).
    pub async fn agreed(&self, outcome: Agreed) {
        self.order(Order::Agreed(Box::new(outcome))).await;
    }

    /// Handles a subscription of a follower in `epoch`. Waits up to a second for that epoch to begin here: its metadata may still be on
    /// the way.
    pub async fn join(&self, peer: Peer, epoch: LeaderEpoch, claim: Claim, ends: Ends) -> Answered {
        let _late = tokio::time::timeout(JOIN_WAIT, self.shared.until_led(epoch)).await;
        let (answer, answered) = oneshot::channel();
        self.order(Order::Join(Box::new(JoinOrder { peer, epoch, claim, ends, answer }))).await;
        let closing = |_stopped| Answered::refused(self.epoch(), "the partition is closing on this broker".to_owned());
        answered.await.unwrap_or_else(closing)
    }

    /// Handles an acknowledgement of a follower. Never waits; replaces an earlier one that the task has not taken.
    pub fn acknowledged(&self, peer: Peer, epoch: LeaderEpoch, ends: Ends) {
        self.shared.acknowledged(peer.broker, ends.written);
        self.news.acknowledged(peer, epoch, ends);
    }

    /// Calls `tell` with the lag of each of these replicas; makes no call while this broker does not lead.
    pub fn lags(&self, replicas: &[BrokerId], now: Instant, tell: impl FnMut(BrokerId, Lag)) {
        self.shared.lags(replicas, now, tell);
    }

    /// Reports that a follower is disconnected.
    pub async fn left(&self, peer: Peer, why: Departure) {
        self.order(Order::Left(peer, why)).await;
    }

    /// Reports a newer epoch: a leader of an older epoch admits nothing more until its metadata contains the newer one.
    pub async fn deposed(&self, known: LeaderEpoch) {
        self.order(Order::Deposed(known)).await;
    }

    /// Returns a reader of the log up to its end, in the epoch in which this broker leads now. Compare [`TailReader::epoch`] with the
    /// epoch of the response to the follower.
    pub fn tail(&self) -> TailReader {
        TailReader::new(Arc::clone(&self.shared), self.tail.clone())
    }

    /// Delivers an event of the link to the leader, in order. Never waits.
    ///
    /// # Errors
    /// The control queue is full. The event is dropped, so later events would not fit.
    pub fn from_link(&self, said: FromLink) -> Result<(), Overrun> {
        match self.orders.try_send(Order::Link(said)) {
            // An event for a task that has ended changes nothing.
            Ok(()) | Err(TrySendError::Closed(_)) => Ok(()),
            Err(TrySendError::Full(_)) => Err(Overrun),
        }
    }

    /// Returns the progress of the log, which a follower acknowledges.
    pub fn ends(&self) -> Ends {
        self.shared.ends()
    }

    /// Returns the epoch of the log's last batch; `None` for a log that never had one.
    pub fn last_epoch(&self) -> Option<LeaderEpoch> {
        self.tail.last_epoch()
    }

    /// Marks `index` in `ready` whenever that watermark moves or the replica status changes, and once at first.
    pub fn follow(&self, ready: &Arc<Ready>, index: usize, on: On) {
        self.shared.follow(ready, index, on);
    }

    async fn order(&self, order: Order) {
        let _stopped = self.orders.send(order).await;
    }
}

#[cfg(test)]
mod tests;
