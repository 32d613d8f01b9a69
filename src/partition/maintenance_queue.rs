//! Partitions that need maintenance: each at most once in the queue, and never with two workers at a time.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{sync::Notify, time::Instant};

use crate::{model::PartitionId, task::clock};

/// Queue that drops repetitions. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct MaintenanceQueue {
    inner: Arc<QueueInner>,
}

#[derive(Debug, Default)]
struct QueueInner {
    state: Mutex<QueueEntries>,
    notify: Notify,
}

#[derive(Debug, Default)]
struct QueueEntries {
    due: VecDeque<PartitionId>,
    entries: BTreeMap<PartitionId, QueueEntryState>,
    /// Partitions that wait for a retry after a failure, by its time.
    later: BTreeMap<(Instant, PartitionId), ()>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum QueueEntryState {
    Queued,
    Working,
    /// With a worker, and pushed again since.
    WorkingAgain,
    Later(Instant),
}

impl MaintenanceQueue {
    /// Queues a partition. A partition that waits after a failure keeps waiting.
    pub fn push(&self, id: PartitionId) {
        let mut state = self.inner.state.lock();
        match state.entries.get(&id) {
            None => {
                state.entries.insert(id, QueueEntryState::Queued);
                state.due.push_back(id);
                drop(state);
                self.inner.notify.notify_one();
            }
            Some(QueueEntryState::Working) => {
                state.entries.insert(id, QueueEntryState::WorkingAgain);
            }
            Some(QueueEntryState::Queued | QueueEntryState::WorkingAgain | QueueEntryState::Later(_)) => {}
        }
    }

    /// Waits for a partition that is due. The caller must call [`Self::done`] or [`Self::failed`] for it.
    pub async fn next(&self) -> PartitionId {
        loop {
            let notified = self.inner.notify.notified();
            let wake_at = match self.take(clock::monotonic()) {
                Ok(id) => return id,
                Err(wake_at) => wake_at,
            };
            match wake_at {
                Some(moment) => {
                    let _either = tokio::time::timeout_at(moment, notified).await;
                }
                None => notified.await,
            }
        }
    }

    /// Returns a partition that is due, or the time at which the next one will be.
    fn take(&self, now: Instant) -> Result<PartitionId, Option<Instant>> {
        let mut state = self.inner.state.lock();
        while let Some(((_, id), ())) = state.later.first_key_value().filter(|((at, _), ())| *at <= now) {
            let id = *id;
            state.later.pop_first();
            state.entries.insert(id, QueueEntryState::Queued);
            state.due.push_back(id);
        }
        let Some(id) = state.due.pop_front() else {
            return Err(state.later.first_key_value().map(|((at, _), ())| *at));
        };
        state.entries.insert(id, QueueEntryState::Working);
        if !state.due.is_empty() {
            self.inner.notify.notify_one();
        }
        Ok(id)
    }

    /// Ends the work on a partition. It is queued again at once if `more` work is left or if it was pushed meanwhile.
    pub fn done(&self, id: PartitionId, more: bool) {
        let again = self.inner.state.lock().entries.remove(&id) == Some(QueueEntryState::WorkingAgain);
        if again || more {
            self.push(id);
        }
    }

    /// Ends failed work on a partition, which is tried again after `delay`.
    pub fn failed(&self, id: PartitionId, delay: Duration) {
        let at = clock::monotonic() + delay;
        let mut state = self.inner.state.lock();
        state.entries.insert(id, QueueEntryState::Later(at));
        state.later.insert((at, id), ());
        drop(state);
        self.inner.notify.notify_one();
    }

    /// Makes the partitions due that wait after a failure.
    pub fn retry_now(&self) {
        let mut state = self.inner.state.lock();
        while let Some(((_, id), ())) = state.later.pop_first() {
            state.entries.insert(id, QueueEntryState::Queued);
            state.due.push_back(id);
        }
        drop(state);
        self.inner.notify.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::TopicId;

    fn id(number: u32) -> PartitionId {
        PartitionId::new(TopicId::from_bytes([1; 16]), number)
    }

    #[tokio::test(start_paused = true)]
    async fn partition_pushed_during_work_is_queued_again() {
        let queue = MaintenanceQueue::default();
        queue.push(id(1));
        queue.push(id(1));
        assert_eq!(queue.next().await, id(1));
        queue.push(id(1));
        assert!(queue.take(clock::monotonic()).is_err(), "a partition never has two workers");
        queue.done(id(1), false);
        assert_eq!(queue.next().await, id(1));
        queue.done(id(1), false);
        assert_eq!(queue.take(clock::monotonic()), Err(None));
    }

    #[tokio::test(start_paused = true)]
    async fn failed_partition_waits_for_its_delay_when_pushed() {
        let queue = MaintenanceQueue::default();
        queue.push(id(1));
        let begin = clock::monotonic();
        assert_eq!(queue.next().await, id(1));
        queue.failed(id(1), Duration::from_secs(3));
        queue.push(id(1));
        assert_eq!(queue.next().await, id(1));
        assert!(clock::monotonic() - begin >= Duration::from_secs(3));
    }

    #[tokio::test(start_paused = true)]
    async fn failed_partitions_are_due_at_once_after_retry_now() {
        let queue = MaintenanceQueue::default();
        for number in 1..=2 {
            queue.push(id(number));
            assert_eq!(queue.next().await, id(number));
            queue.failed(id(number), Duration::from_secs(60));
        }
        let begin = clock::monotonic();
        queue.retry_now();
        assert_eq!((queue.next().await, queue.next().await), (id(1), id(2)));
        assert_eq!(clock::monotonic(), begin);
    }
}
