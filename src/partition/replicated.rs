//! A partition as one of several replicas: its interface for the broker, its links and the metadata.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc::error::TrySendError, oneshot},
    time::Instant,
};

use super::{
    FollowerLag, LinkEvent, Partition, PartitionAssignment, QueueFull, SubscribeResponse, TailReader, WakeSet,
    WatermarkKind,
    actor::{ControlMessage, SubscribeMessage},
    leader::{
        divergence::LogPosition,
        isr::{BrokerStatus, DisconnectCause, PeerId, ProposalOutcome, ReplicaProgress},
    },
};
use crate::model::{BrokerId, LeaderEpoch};

/// Maximum time that a subscription waits for an epoch that this broker has not received yet.
const SUBSCRIBE_TIMEOUT: Duration = Duration::from_secs(1);

impl Partition {
    /// Applies metadata. Returns when the task has applied it: later requests to the partition find the new role. Calls
    /// are in the order of the metadata.
    pub async fn assign(&self, assignment: PartitionAssignment) {
        if let Some(state) = &assignment.committed {
            self.record_tier_state(state);
        }
        let (done, taken) = oneshot::channel();
        self.send_control(ControlMessage::Assign(Box::new(assignment), done)).await;
        let _stopped = taken.await;
    }

    /// Applies a changed status of a broker in the metadata cache.
    pub async fn on_broker_status(&self, broker: BrokerId, status: BrokerStatus) {
        self.send_control(ControlMessage::BrokerStatusChanged(broker, status)).await;
    }

    /// Returns true if the task needs ticks ([`Self::tick`]) at intervals: it leads and an ISR member is behind, or it
    /// waits for metadata after its leadership ended.
    pub fn wants_ticks(&self) -> bool {
        self.published.wants_ticks()
    }

    /// Sends the time, so that the task checks for lagging members. Never waits; replaces an earlier time that the task
    /// has not taken. `now_ms` is of one monotonic clock for all calls.
    pub fn tick(&self, now_ms: u64) {
        self.signals.tick(now_ms);
    }

    /// Delivers the outcome of a request to [`IsrUpdater`](super::IsrUpdater).
    pub async fn on_isr_outcome(&self, outcome: ProposalOutcome) {
        self.send_control(ControlMessage::IsrOutcome(Box::new(outcome))).await;
    }

    /// Handles a subscription of a follower in `epoch`. Waits up to a second for that epoch to begin here: its metadata
    /// may arrive late.
    pub async fn subscribe(
        &self,
        peer: PeerId,
        epoch: LeaderEpoch,
        position: LogPosition,
        progress: ReplicaProgress,
    ) -> SubscribeResponse {
        let _late = tokio::time::timeout(SUBSCRIBE_TIMEOUT, self.published.until_led(epoch)).await;
        let (responder, response) = oneshot::channel();
        self.send_control(ControlMessage::Subscribe(Box::new(SubscribeMessage {
            peer,
            epoch,
            position,
            progress,
            responder,
        })))
        .await;
        let closing =
            |_stopped| SubscribeResponse::rejected(self.epoch(), "the partition is closing on this broker".to_owned());
        response.await.unwrap_or_else(closing)
    }

    /// Handles an acknowledgement of a follower. Never waits; replaces an earlier one that the task has not taken.
    pub fn acknowledged(&self, peer: PeerId, epoch: LeaderEpoch, progress: ReplicaProgress) {
        self.published.acknowledged(peer.broker, progress.log_end);
        self.signals.acknowledged(peer, epoch, progress);
    }

    /// Calls `report` with the lag of each of these replicas; makes no call while this broker does not lead.
    pub fn for_each_lag(&self, replicas: &[BrokerId], now: Instant, report: impl FnMut(BrokerId, FollowerLag)) {
        self.published.for_each_lag(replicas, now, report);
    }

    /// Reports that a follower is disconnected.
    pub async fn on_follower_disconnected(&self, peer: PeerId, cause: DisconnectCause) {
        self.send_control(ControlMessage::FollowerDisconnected(peer, cause)).await;
    }

    /// Reports a newer epoch: a leader of an older epoch admits nothing more until its metadata contains the newer one.
    pub async fn deposed(&self, known: LeaderEpoch) {
        self.send_control(ControlMessage::Deposed(known)).await;
    }

    /// Returns a reader of the log up to its end, in the epoch in which this broker leads now. Compare
    /// [`TailReader::epoch`] with the epoch of the response to the follower.
    pub fn tail(&self) -> TailReader {
        TailReader::new(Arc::clone(&self.published), self.tail.clone())
    }

    /// Delivers an event of the link to the leader, in order. Never waits.
    ///
    /// # Errors
    /// The control queue is full. The event is dropped, so later events would not fit.
    pub fn on_link_event(&self, event: LinkEvent) -> Result<(), QueueFull> {
        match self.control.try_send(ControlMessage::Link(event)) {
            // An event for a task that has ended changes nothing.
            Ok(()) | Err(TrySendError::Closed(_)) => Ok(()),
            Err(TrySendError::Full(_)) => Err(QueueFull),
        }
    }

    /// Returns the progress of the log, which a follower acknowledges.
    pub fn progress(&self) -> ReplicaProgress {
        self.published.progress()
    }

    /// Returns the epoch of the log's last batch; `None` for a log that never had one.
    pub fn last_epoch(&self) -> Option<LeaderEpoch> {
        self.tail.last_epoch()
    }

    /// Marks `index` in `ready` whenever that watermark moves or the replica status changes, and once at first.
    pub fn follow(&self, ready: &Arc<WakeSet>, index: usize, on: WatermarkKind) {
        self.published.add_listener(ready, index, on);
    }

    async fn send_control(&self, message: ControlMessage) {
        let _stopped = self.control.send(message).await;
    }
}

#[cfg(test)]
mod tests;
