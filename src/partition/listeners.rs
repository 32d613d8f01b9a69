//! Listeners that are woken when a watermark of a partition moves.
//!
//! A listener is in the list only while it waits: a wake-up removes it, and it is added again when its reader has taken
//! the mark. So a listener whose reader does not read on costs the partition's task nothing. A long list is woken by a
//! task of its own, some listeners at a time.

use std::sync::{
    Arc, Weak,
    atomic::{AtomicBool, Ordering, fence},
};

use parking_lot::Mutex;

use super::{WakeSet, WatermarkKind, published::PublishedState};
use crate::task::Tasks;

/// Maximum number of listeners that the caller of a wake-up marks itself.
const MAX_INLINE_WAKES: usize = 16;

/// Number of listeners that are woken before other tasks get their turn: an acknowledgement waits for this many readers
/// at most.
const WAKES_PER_TASK: usize = 32;

/// Minimum length at which the list is searched for listeners whose readers were dropped.
const MIN_SWEEP: usize = 64;

/// One reader that waits for one watermark of one partition, under the reader's own index.
#[derive(Debug)]
pub(super) struct Listener {
    ready: Weak<WakeSet>,
    index: usize,
    partition: Weak<PublishedState>,
    on: WatermarkKind,
    /// True if the listener is in the partition's list.
    listed: AtomicBool,
}

impl Listener {
    pub(super) fn new(ready: &Arc<WakeSet>, index: usize, partition: &Arc<PublishedState>, on: WatermarkKind) -> Self {
        let (ready, partition) = (Arc::downgrade(ready), Arc::downgrade(partition));
        Self { ready, index, partition, on, listed: AtomicBool::new(false) }
    }

    /// Adds the listener to the partition's list, if it is not there. The reader reads the watermark after this.
    pub(super) fn listen(self: &Arc<Self>) {
        if let Some(partition) = self.partition.upgrade()
            && !self.listed.swap(true, Ordering::SeqCst)
        {
            partition.listeners(self.on).add(Arc::clone(self));
        }
    }

    fn mark(&self) {
        // Before the mark: the reader that takes the mark adds the listener again.
        self.listed.store(false, Ordering::SeqCst);
        if let Some(ready) = self.ready.upgrade() {
            ready.mark(self.index);
        }
    }

    fn is_gone(&self) -> bool {
        self.ready.strong_count() == 0
    }
}

/// Readers that wait for the same watermark. Without any, a moved watermark costs one load.
#[derive(Debug, Default)]
pub(super) struct WatermarkListeners {
    some: AtomicBool,
    list: Mutex<List>,
}

#[derive(Debug, Default)]
struct List {
    waiting: Vec<Arc<Listener>>,
    /// Length at which listeners whose readers were dropped are removed. It is twice the length after the last sweep:
    /// an addition costs O(1) amortised.
    sweep_at: usize,
}

impl WatermarkListeners {
    fn add(&self, listener: Arc<Listener>) {
        let mut list = self.list.lock();
        if list.waiting.len() >= list.sweep_at.max(MIN_SWEEP) {
            list.waiting.retain(|listener| !listener.is_gone());
            list.sweep_at = list.waiting.len() * 2;
        }
        list.waiting.push(listener);
        // A watermark that moves from here on wakes this listener; its reader reads the watermark after this.
        self.some.store(true, Ordering::SeqCst);
        drop(list);
        fence(Ordering::SeqCst);
    }

    /// Wakes all listeners: a few at once, many in a task.
    pub(super) fn wake(&self, tasks: &Tasks) {
        if !self.some.load(Ordering::SeqCst) {
            return;
        }
        let waiting = {
            let mut list = self.list.lock();
            self.some.store(false, Ordering::SeqCst);
            std::mem::take(&mut list.waiting)
        };
        if waiting.len() <= MAX_INLINE_WAKES {
            waiting.iter().for_each(|listener| listener.mark());
            return;
        }
        tasks.spawn("wake readers", async move {
            for some in waiting.chunks(WAKES_PER_TASK) {
                some.iter().for_each(|listener| listener.mark());
                tokio::task::yield_now().await;
            }
        });
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.list.lock().waiting.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ConfigMap, TopicConfig};

    fn published() -> Arc<PublishedState> {
        let config = TopicConfig::resolve(&ConfigMap::new(), &ConfigMap::new()).expect("defaults");
        Arc::new(PublishedState::new(Arc::new(config), Tasks::new()))
    }

    fn reader(published: &Arc<PublishedState>, index: usize) -> Arc<WakeSet> {
        let ready = Arc::new(WakeSet::default());
        published.add_listener(&ready, index, WatermarkKind::HighWatermark);
        assert_eq!(ready.take(), Some(index), "a new listener is marked once");
        ready
    }

    #[tokio::test]
    async fn marked_listener_is_unlisted_until_its_mark_is_taken() {
        let published = published();
        let ready = reader(&published, 3);
        let waiting = || published.listeners(WatermarkKind::HighWatermark).len();
        assert_eq!(waiting(), 1);
        published.wake(WatermarkKind::HighWatermark);
        assert_eq!(waiting(), 0, "a marked listener is not in the list");
        published.wake(WatermarkKind::HighWatermark);
        assert_eq!((ready.take(), ready.take()), (Some(3), None), "a second mark changes nothing");
        assert_eq!(waiting(), 1);
        ready.mark(3);
        assert_eq!((ready.take(), waiting()), (Some(3), 1), "a listener is listed once");
    }

    #[tokio::test]
    async fn many_listeners_are_woken_and_none_is_missed() {
        let published = published();
        let readers: Vec<_> = (0..1000).map(|index| reader(&published, index)).collect();
        for _ in 0..3 {
            published.wake(WatermarkKind::HighWatermark);
            for (index, ready) in readers.iter().enumerate() {
                ready.wait_for_index().await;
                assert_eq!(ready.take(), Some(index));
            }
        }
    }

    #[tokio::test]
    async fn dropped_listeners_are_removed_without_a_wake_up() {
        let published = published();
        let kept = reader(&published, 0);
        for _ in 0..10_000 {
            drop(reader(&published, 1));
        }
        assert!(published.listeners(WatermarkKind::HighWatermark).len() <= 2 * MIN_SWEEP);
        published.wake(WatermarkKind::HighWatermark);
        kept.wait_for_index().await;
        assert_eq!(kept.take(), Some(0));
    }
}
