//! A partition as one of several replicas: what the broker, its links and the metadata say to it and ask of it.

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

/// How long a follower that joins waits for an epoch of which this broker has not heard yet.
const JOIN_WAIT: Duration = Duration::from_secs(1);

impl Partition {
    /// Takes what the metadata says. Returns when the task goes by it: what is asked of the partition afterwards is answered by the new
    /// role. Calls come in the order of the metadata.
    pub async fn assign(&self, assignment: Assignment) {
        if let Some(state) = &assignment.committed {
            self.note_committed(state);
        }
        let (done, taken) = oneshot::channel();
        self.order(Order::Assign(Box::new(assignment), done)).await;
        let _stopped = taken.await;
    }

    /// The view's word on a broker changed.
    pub async fn seen(&self, broker: BrokerId, registration: Registration) {
        self.order(Order::Seen(broker, registration)).await;
    }

    /// Whether it leads and a member of the ISR is behind, or waits for what follows the leadership that it gave up: then it wants to be
    /// told the time ([`Self::tick`]) now and then.
    pub fn is_behind(&self) -> bool {
        self.shared.is_behind()
    }

    /// Has it look who does not keep up. Never waits; an earlier time that it has not looked at is replaced. `now_ms` is of a clock that
    /// never goes back, the same for all calls.
    pub fn tick(&self, now_ms: u64) {
        self.news.tick(now_ms);
    }

    /// The answer to what the partition asked of its [`Agreement`](super::Agreement).
    pub async fn agreed(&self, outcome: Agreed) {
        self.order(Order::Agreed(Box::new(outcome))).await;
    }

    /// A follower joins in `epoch`. Waits up to a second for that epoch to begin here: its news may be on the way still.
    pub async fn join(&self, peer: Peer, epoch: LeaderEpoch, claim: Claim, ends: Ends) -> Answered {
        let _late = tokio::time::timeout(JOIN_WAIT, self.shared.until_led(epoch)).await;
        let (answer, answered) = oneshot::channel();
        self.order(Order::Join(Box::new(JoinOrder { peer, epoch, claim, ends, answer }))).await;
        let closing = |_stopped| Answered::refused(self.epoch(), "the partition is closing on this broker".to_owned());
        answered.await.unwrap_or_else(closing)
    }

    /// A follower acknowledges what it has. Never waits; what it said before is replaced.
    pub fn acknowledged(&self, peer: Peer, epoch: LeaderEpoch, ends: Ends) {
        self.shared.acknowledged(peer.broker, ends.written);
        self.news.acknowledged(peer, epoch, ends);
    }

    /// How far those of these replicas are behind that follow; nothing is told while this broker does not lead.
    pub fn lags(&self, replicas: &[BrokerId], now: Instant, tell: impl FnMut(BrokerId, Lag)) {
        self.shared.lags(replicas, now, tell);
    }

    /// A follower is not connected any more.
    pub async fn left(&self, peer: Peer, why: Departure) {
        self.order(Order::Left(peer, why)).await;
    }

    /// A follower knows of a newer epoch: nothing more is admitted before the metadata tells of it here as well.
    pub async fn deposed(&self, known: LeaderEpoch) {
        self.order(Order::Deposed(known)).await;
    }

    /// Reads its log up to the log end, in the epoch in which this broker leads it now. Compare [`TailReader::epoch`] with the epoch
    /// of the answer that a follower was given.
    pub fn tail(&self) -> TailReader {
        TailReader::new(Arc::clone(&self.shared), self.tail.clone())
    }

    /// Takes what the link to the leader brings, in order. Never waits.
    ///
    /// # Errors
    /// When too much of it waits already. It is not taken then: what comes next would not fit.
    pub fn from_link(&self, said: FromLink) -> Result<(), Overrun> {
        match self.orders.try_send(Order::Link(said)) {
            // What a task that has ended is told changes nothing.
            Ok(()) | Err(TrySendError::Closed(_)) => Ok(()),
            Err(TrySendError::Full(_)) => Err(Overrun),
        }
    }

    /// How far its log reaches: what a follower acknowledges.
    pub fn ends(&self) -> Ends {
        self.shared.ends()
    }

    /// The epoch of its log's last batch; `None` for a log that never had one.
    pub fn last_epoch(&self) -> Option<LeaderEpoch> {
        self.tail.last_epoch()
    }

    /// Marks `index` in `ready` whenever that mark moves or the partition's standing changes, and once at first.
    pub fn follow(&self, ready: &Arc<Ready>, index: usize, on: On) {
        self.shared.follow(ready, index, on);
    }

    async fn order(&self, order: Order) {
        let _stopped = self.orders.send(order).await;
    }
}

#[cfg(test)]
mod tests;
