//! Wake-ups of readers that wait for watermarks of partitions: their cost is per event, not per partition that is
//! waited for.
//!
//! A listener is in a partition's list only while it waits: a wake-up removes it, and it is added again when its reader
//! has taken the mark. So a listener whose reader does not read on costs the partition's task nothing.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering, fence},
    },
};

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::role::WatermarkKind;
use crate::task::Tasks;

/// Maximum number of listeners that the caller of a wake-up marks itself.
const MAX_INLINE_WAKES: usize = 16;

/// Number of listeners that are woken before other tasks get their turn: an acknowledgement waits for this many readers
/// at most.
const WAKES_PER_TASK: usize = 32;

/// Minimum length at which the list is searched for listeners whose readers were dropped.
const MIN_SWEEP: usize = 64;

/// The partitions, by the reader's own indexes, that changed since the reader last took them.
#[derive(Debug, Default)]
pub struct WakeSet {
    marked: Mutex<WokenIndexes>,
    notify: Notify,
}

#[derive(Debug, Default)]
struct WokenIndexes {
    order: VecDeque<usize>,
    members: BTreeSet<usize>,
    /// Listeners that mark each index.
    listeners: BTreeMap<usize, Vec<Arc<Listener>>>,
}

impl WakeSet {
    /// Marks a partition; a second mark changes nothing.
    pub fn mark(&self, index: usize) {
        let mut marked = self.marked.lock();
        if marked.members.insert(index) {
            marked.order.push_back(index);
            drop(marked);
            self.notify.notify_one();
        }
    }

    /// Marks a partition again that was taken in vain: it is the next one.
    pub fn put_back(&self, index: usize) {
        let mut marked = self.marked.lock();
        if !marked.members.insert(index) {
            marked.order.retain(|other| *other != index);
        }
        marked.order.push_front(index);
        drop(marked);
        self.notify.notify_one();
    }

    /// Adds a listener, which marks its index from the next [`Self::take`] of that index on.
    fn listen(&self, index: usize, listener: Listener) {
        self.marked.lock().listeners.entry(index).or_default().push(Arc::new(listener));
    }

    /// Takes the partition that was marked first. Its state is to be read after this: a later change marks the
    /// partition again.
    pub fn take(&self) -> Option<usize> {
        let (index, listeners) = {
            let mut marked = self.marked.lock();
            let index = marked.order.pop_front()?;
            marked.members.remove(&index);
            (index, marked.listeners.get(&index).cloned().unwrap_or_default())
        };
        listeners.iter().for_each(Listener::listen);
        Some(index)
    }

    /// Returns true if some partition is marked.
    pub fn is_marked(&self) -> bool {
        !self.marked.lock().order.is_empty()
    }

    /// Waits until some partition is marked.
    pub async fn wait_for_index(&self) {
        loop {
            let notified = self.notify.notified();
            if !self.marked.lock().order.is_empty() {
                return;
            }
            notified.await;
        }
    }
}

/// Readers that wait for a partition, by watermark.
#[derive(Debug, Default)]
pub(super) struct PartitionListeners {
    high_watermark: WatermarkListeners,
    log_end: WatermarkListeners,
    any_end: WatermarkListeners,
}

impl PartitionListeners {
    /// Marks `index` in `ready` from now on whenever that watermark moves, and once at first.
    pub(super) fn add(self: &Arc<Self>, ready: &Arc<WakeSet>, index: usize, on: WatermarkKind) {
        let listener = Listener {
            ready: Arc::downgrade(ready),
            index,
            listeners: Arc::downgrade(self),
            on,
            listed: AtomicBool::new(false),
        };
        ready.listen(index, listener);
        ready.mark(index);
    }

    /// Wakes the listeners of this watermark, whether it moved or not.
    pub(super) fn wake(&self, on: WatermarkKind, tasks: &Tasks) {
        self.of(on).wake(tasks);
    }

    pub(super) fn wake_all(&self, tasks: &Tasks) {
        [&self.high_watermark, &self.log_end, &self.any_end].into_iter().for_each(|listeners| listeners.wake(tasks));
    }

    fn of(&self, on: WatermarkKind) -> &WatermarkListeners {
        match on {
            WatermarkKind::HighWatermark => &self.high_watermark,
            WatermarkKind::LogEnd => &self.log_end,
            WatermarkKind::AnyEnd => &self.any_end,
        }
    }
}

/// One reader that waits for one watermark of one partition, under the reader's own index.
#[derive(Debug)]
struct Listener {
    ready: Weak<WakeSet>,
    index: usize,
    listeners: Weak<PartitionListeners>,
    on: WatermarkKind,
    /// True if the listener is in the partition's list.
    listed: AtomicBool,
}

impl Listener {
    /// Adds the listener to the partition's list, if it is not there. The reader reads the watermark after this.
    fn listen(self: &Arc<Self>) {
        if let Some(listeners) = self.listeners.upgrade()
            && !self.listed.swap(true, Ordering::SeqCst)
        {
            listeners.of(self.on).add(Arc::clone(self));
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
struct WatermarkListeners {
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
    fn wake(&self, tasks: &Tasks) {
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
    fn len(&self) -> usize {
        self.list.lock().waiting.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HIGH_WATERMARK: WatermarkKind = WatermarkKind::HighWatermark;

    fn reader(listeners: &Arc<PartitionListeners>, index: usize) -> Arc<WakeSet> {
        let ready = Arc::new(WakeSet::default());
        listeners.add(&ready, index, HIGH_WATERMARK);
        assert_eq!(ready.take(), Some(index), "a new listener is marked once");
        ready
    }

    #[tokio::test]
    async fn marked_listener_is_unlisted_until_its_mark_is_taken() {
        let (listeners, tasks) = (Arc::<PartitionListeners>::default(), Tasks::new());
        let ready = reader(&listeners, 3);
        let waiting = || listeners.of(HIGH_WATERMARK).len();
        assert_eq!(waiting(), 1);
        listeners.wake(HIGH_WATERMARK, &tasks);
        assert_eq!(waiting(), 0, "a marked listener is not in the list");
        listeners.wake(HIGH_WATERMARK, &tasks);
        assert_eq!((ready.take(), ready.take()), (Some(3), None), "a second mark changes nothing");
        assert_eq!(waiting(), 1);
        ready.mark(3);
        assert_eq!((ready.take(), waiting()), (Some(3), 1), "a listener is listed once");
    }

    #[tokio::test]
    async fn many_listeners_are_woken_and_none_is_missed() {
        let (listeners, tasks) = (Arc::<PartitionListeners>::default(), Tasks::new());
        let readers: Vec<_> = (0..1000).map(|index| reader(&listeners, index)).collect();
        for _ in 0..3 {
            listeners.wake(HIGH_WATERMARK, &tasks);
            for (index, ready) in readers.iter().enumerate() {
                ready.wait_for_index().await;
                assert_eq!(ready.take(), Some(index));
            }
        }
    }

    #[tokio::test]
    async fn dropped_listeners_are_removed_without_a_wake_up() {
        let (listeners, tasks) = (Arc::<PartitionListeners>::default(), Tasks::new());
        let kept = reader(&listeners, 0);
        for _ in 0..10_000 {
            drop(reader(&listeners, 1));
        }
        assert!(listeners.of(HIGH_WATERMARK).len() <= 2 * MIN_SWEEP);
        listeners.wake(HIGH_WATERMARK, &tasks);
        kept.wait_for_index().await;
        assert_eq!(kept.take(), Some(0));
    }

    #[tokio::test]
    async fn marks_are_taken_once_and_in_order() {
        let ready = WakeSet::default();
        ready.mark(2);
        ready.mark(1);
        ready.mark(2);
        ready.wait_for_index().await;
        assert_eq!((ready.take(), ready.take(), ready.take()), (Some(2), Some(1), None));
        ready.mark(2);
        ready.mark(1);
        ready.put_back(3);
        ready.put_back(1);
        assert_eq!([(); 4].map(|()| ready.take()), [Some(1), Some(3), Some(2), None]);
    }
}
