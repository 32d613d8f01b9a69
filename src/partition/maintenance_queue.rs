//! Partitions that need maintenance. A partition is in the queue at most once, and at most one worker has it at a time.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

use crate::{
    model::PartitionId,
    task::{clock, lock::Mutex},
};

/// Queue of partitions without duplicates. Clones share it.
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
    /// Partitions in state `Queued`, in the order in which workers take them.
    due: VecDeque<PartitionId>,
    /// State of each partition that is queued, with a worker, or waiting for a retry.
    entries: BTreeMap<PartitionId, QueueEntryState>,
    /// Partitions in state `RetryAt`, by the time of the retry.
    retries: BTreeSet<(Instant, PartitionId)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum QueueEntryState {
    Queued,
    /// A worker has the partition.
    Working,
    /// A worker has the partition, and the partition was pushed again meanwhile.
    WorkingAgain,
    /// The last work failed, and is retried at this time.
    RetryAt(Instant),
}

/// Result of an attempt to take a partition from the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TakeResult {
    Due(PartitionId),
    /// No partition is due. The first retry is due at this time.
    RetryAt(Instant),
    /// No partition is due or waits for a retry.
    Empty,
}

impl MaintenanceQueue {
    /// Queues a partition. A partition that waits for its retry continues to wait. A partition with a worker is queued
    /// again when its work succeeds.
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
            Some(QueueEntryState::Queued | QueueEntryState::WorkingAgain | QueueEntryState::RetryAt(_)) => {}
        }
    }

    /// Waits until a partition is due, and takes it from the queue. The caller must call [`Self::done`] or
    /// [`Self::failed`] for it.
    pub async fn next(&self) -> PartitionId {
        loop {
            let notified = self.inner.notify.notified();
            match self.take(clock::monotonic()) {
                TakeResult::Due(id) => return id,
                TakeResult::RetryAt(time) => {
                    let _notified_or_due = tokio::time::timeout_at(time, notified).await;
                }
                TakeResult::Empty => notified.await,
            }
        }
    }

    /// Queues the partitions whose retry is due, then takes the first partition of the queue. Never waits.
    fn take(&self, now: Instant) -> TakeResult {
        let mut state = self.inner.state.lock();
        while let Some(&(_, id)) = state.retries.first().filter(|(time, _)| *time <= now) {
            state.retries.pop_first();
            state.entries.insert(id, QueueEntryState::Queued);
            state.due.push_back(id);
        }
        let Some(id) = state.due.pop_front() else {
            return state.retries.first().map_or(TakeResult::Empty, |(time, _)| TakeResult::RetryAt(*time));
        };
        state.entries.insert(id, QueueEntryState::Working);
        if !state.due.is_empty() {
            // Wakes another worker for the next partition.
            self.inner.notify.notify_one();
        }
        TakeResult::Due(id)
    }

    /// Ends work on a partition that did not fail. The partition is queued again at once if `more` work remains, or if
    /// it was pushed during the work.
    pub fn done(&self, id: PartitionId, more: bool) {
        let was_pushed = self.inner.state.lock().entries.remove(&id) == Some(QueueEntryState::WorkingAgain);
        if was_pushed || more {
            self.push(id);
        }
    }

    /// Ends failed work on a partition, which is due again after `delay`. A push during the work has no further effect.
    pub fn failed(&self, id: PartitionId, delay: Duration) {
        let retry_at = clock::monotonic() + delay;
        let mut state = self.inner.state.lock();
        state.entries.insert(id, QueueEntryState::RetryAt(retry_at));
        state.retries.insert((retry_at, id));
        drop(state);
        // A worker that waits for a later retry must wait for this retry instead.
        self.inner.notify.notify_one();
    }

    /// Queues all partitions that wait for a retry, at once.
    pub fn retry_now(&self) {
        let mut state = self.inner.state.lock();
        while let Some((_, id)) = state.retries.pop_first() {
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
        assert_eq!(queue.take(clock::monotonic()), TakeResult::Empty, "a partition never has two workers");
        queue.done(id(1), false);
        assert_eq!(queue.next().await, id(1));
        queue.done(id(1), false);
        assert_eq!(queue.take(clock::monotonic()), TakeResult::Empty);
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
