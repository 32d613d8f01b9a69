//! Wake-ups of readers that wait for watermarks of partitions. The cost for a reader of many partitions depends on the
//! number of events, not on the number of partitions.
//!
//! ```text
//! listed ── watermark moves ──► marked in the reader's WakeSet ── reader takes the mark ──► listed
//! ```
//!
//! A listener is in the list of its partition only while it waits: a wake-up removes it. So the partition's task does
//! no work for a listener whose reader takes no marks.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering, fence},
    },
};

use tokio::sync::Notify;

use super::role::WatermarkKind;
use crate::task::{Tasks, lock::Mutex};

/// Maximum number of listeners that the caller of a wake-up marks itself. If there are more, a new task marks them all.
const MAX_INLINE_WAKES: usize = 16;

/// Number of listeners that are woken between two yields to other tasks, so that an acknowledgement to a writer does
/// not wait for all wake-ups.
const WAKES_PER_YIELD: usize = 32;

/// Minimum length at which a [`ListenerList`] is searched for listeners whose readers were dropped.
const MIN_SWEEP: usize = 64;

/// Marks of the partitions of one reader, each identified by an index that the reader chooses. A change of a partition
/// marks it, and the reader takes the marks in their order.
#[derive(Debug, Default)]
pub struct WakeSet {
    state: Mutex<WakeSetState>,
    notify: Notify,
}

/// Content of a [`WakeSet`].
#[derive(Debug, Default)]
struct WakeSetState {
    /// Marked indexes, each once, in the order in which the reader takes them.
    order: VecDeque<usize>,
    /// The same indexes, for a fast check.
    members: BTreeSet<usize>,
    /// Listeners that mark each index.
    listeners: BTreeMap<usize, Vec<Arc<Listener>>>,
}

impl WakeSet {
    /// Marks a partition and wakes the reader. A partition that is marked already keeps its position in the order.
    pub fn mark(&self, index: usize) {
        let mut state = self.state.lock();
        if state.members.insert(index) {
            state.order.push_back(index);
            drop(state);
            self.notify.notify_one();
        }
    }

    /// Marks a partition again, because its mark was taken and the read was not completed. This mark is taken next.
    pub fn put_back(&self, index: usize) {
        let mut state = self.state.lock();
        if !state.members.insert(index) {
            state.order.retain(|marked_index| *marked_index != index);
        }
        state.order.push_front(index);
        drop(state);
        self.notify.notify_one();
    }

    /// Adds a listener. It enters the list of its partition at the next [`Self::take`] of this index.
    fn add_listener(&self, index: usize, listener: Listener) {
        self.state.lock().listeners.entry(index).or_default().push(Arc::new(listener));
    }

    /// Takes the first mark and returns its index, or `None` if there is no mark. Adds the reader's listeners of this
    /// index to the list of their partition again. The caller reads the state of the partition after this call: a later
    /// change marks the partition again.
    pub fn take(&self) -> Option<usize> {
        let (index, listeners) = {
            let mut state = self.state.lock();
            let index = state.order.pop_front()?;
            state.members.remove(&index);
            (index, state.listeners.get(&index).cloned().unwrap_or_default())
        };
        listeners.iter().for_each(Listener::enlist);
        Some(index)
    }

    /// Returns true if at least one partition is marked.
    pub fn is_marked(&self) -> bool {
        !self.state.lock().order.is_empty()
    }

    /// Waits until at least one partition is marked. Takes no mark.
    pub async fn wait_for_mark(&self) {
        loop {
            let notified = self.notify.notified();
            if !self.state.lock().order.is_empty() {
                return;
            }
            notified.await;
        }
    }
}

/// Readers that wait for a partition, by the watermark for which they wait.
#[derive(Debug, Default)]
pub(super) struct PartitionListeners {
    high_watermark: WatermarkListeners,
    log_end: WatermarkListeners,
    any_end: WatermarkListeners,
}

impl PartitionListeners {
    /// Marks `index` in `wake_set` now, and whenever the listeners of that watermark are woken.
    pub(super) fn add(self: &Arc<Self>, wake_set: &Arc<WakeSet>, index: usize, watermark: WatermarkKind) {
        let listener = Listener {
            wake_set: Arc::downgrade(wake_set),
            index,
            listeners: Arc::downgrade(self),
            watermark,
            listed: AtomicBool::new(false),
        };
        wake_set.add_listener(index, listener);
        wake_set.mark(index);
    }

    /// Wakes the listeners of this watermark, whether it moved or not.
    pub(super) fn wake(&self, watermark: WatermarkKind, tasks: &Tasks) {
        self.of(watermark).wake(tasks);
    }

    /// Wakes the listeners of all watermarks.
    pub(super) fn wake_all(&self, tasks: &Tasks) {
        [&self.high_watermark, &self.log_end, &self.any_end].into_iter().for_each(|listeners| listeners.wake(tasks));
    }

    fn of(&self, watermark: WatermarkKind) -> &WatermarkListeners {
        match watermark {
            WatermarkKind::HighWatermark => &self.high_watermark,
            WatermarkKind::LogEnd => &self.log_end,
            WatermarkKind::AnyEnd => &self.any_end,
        }
    }
}

/// One reader that waits for one watermark of one partition.
#[derive(Debug)]
struct Listener {
    /// Wake set of the reader. The reader owns it, so a dropped set means that the reader was dropped.
    wake_set: Weak<WakeSet>,
    /// Index of the partition in `wake_set`.
    index: usize,
    listeners: Weak<PartitionListeners>,
    watermark: WatermarkKind,
    /// True if the listener is in the partition's list.
    listed: AtomicBool,
}

impl Listener {
    /// Adds the listener to the partition's list, unless it is listed already. The reader reads the watermark after
    /// this call.
    fn enlist(self: &Arc<Self>) {
        if let Some(listeners) = self.listeners.upgrade()
            && !self.listed.swap(true, Ordering::SeqCst)
        {
            listeners.of(self.watermark).add(Arc::clone(self));
        }
    }

    /// Marks the partition for the reader. The caller has removed the listener from the partition's list.
    fn mark(&self) {
        // Cleared before the mark is set, because a reader that takes the mark lists the listener again.
        self.listed.store(false, Ordering::SeqCst);
        if let Some(wake_set) = self.wake_set.upgrade() {
            wake_set.mark(self.index);
        }
    }

    fn is_reader_dropped(&self) -> bool {
        self.wake_set.strong_count() == 0
    }
}

/// Readers that wait for the same watermark of one partition. If no reader waits, a wake-up only loads a flag.
#[derive(Debug, Default)]
struct WatermarkListeners {
    /// True if the list may hold a listener.
    has_waiting: AtomicBool,
    list: Mutex<ListenerList>,
}

#[derive(Debug, Default)]
struct ListenerList {
    waiting: Vec<Arc<Listener>>,
    /// Length at which listeners whose readers were dropped are removed. It is twice the length after the last sweep,
    /// so that an addition costs O(1) amortised.
    sweep_at: usize,
}

impl WatermarkListeners {
    /// Adds a listener to the list. If the list has reached `sweep_at`, first removes the listeners whose readers were
    /// dropped.
    fn add(&self, listener: Arc<Listener>) {
        let mut list = self.list.lock();
        if list.waiting.len() >= list.sweep_at.max(MIN_SWEEP) {
            list.waiting.retain(|listener| !listener.is_reader_dropped());
            list.sweep_at = list.waiting.len() * 2;
        }
        list.waiting.push(listener);
        // A watermark that moves from here on wakes this listener. The reader reads the watermark after this function,
        // so the reader sees every earlier move.
        self.has_waiting.store(true, Ordering::SeqCst);
        drop(list);
        fence(Ordering::SeqCst);
    }

    /// Wakes all listeners and empties the list. If there are more than [`MAX_INLINE_WAKES`] listeners, a new task
    /// marks them all after this call.
    fn wake(&self, tasks: &Tasks) {
        if !self.has_waiting.load(Ordering::SeqCst) {
            return;
        }
        let waiting = {
            let mut list = self.list.lock();
            self.has_waiting.store(false, Ordering::SeqCst);
            std::mem::take(&mut list.waiting)
        };
        if waiting.len() <= MAX_INLINE_WAKES {
            waiting.iter().for_each(|listener| listener.mark());
            return;
        }
        tasks.spawn("wake-readers", async move {
            for chunk in waiting.chunks(WAKES_PER_YIELD) {
                chunk.iter().for_each(|listener| listener.mark());
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

    /// Returns the wake set of a new reader, which waits for the high watermark under this index.
    fn reader(listeners: &Arc<PartitionListeners>, index: usize) -> Arc<WakeSet> {
        let wake_set = Arc::new(WakeSet::default());
        listeners.add(&wake_set, index, HIGH_WATERMARK);
        assert_eq!(wake_set.take(), Some(index), "a new listener is marked once");
        wake_set
    }

    #[tokio::test]
    async fn marked_listener_is_unlisted_until_its_mark_is_taken() {
        let (listeners, tasks) = (Arc::<PartitionListeners>::default(), Tasks::new());
        let wake_set = reader(&listeners, 3);
        let waiting = || listeners.of(HIGH_WATERMARK).len();
        assert_eq!(waiting(), 1);
        listeners.wake(HIGH_WATERMARK, &tasks);
        assert_eq!(waiting(), 0, "a marked listener is not in the list");
        listeners.wake(HIGH_WATERMARK, &tasks);
        assert_eq!((wake_set.take(), wake_set.take()), (Some(3), None), "a second mark changes nothing");
        assert_eq!(waiting(), 1);
        wake_set.mark(3);
        assert_eq!((wake_set.take(), waiting()), (Some(3), 1), "a listener is listed once");
    }

    #[tokio::test]
    async fn many_listeners_are_woken_and_none_is_missed() {
        let (listeners, tasks) = (Arc::<PartitionListeners>::default(), Tasks::new());
        let readers: Vec<_> = (0..1000).map(|index| reader(&listeners, index)).collect();
        for _ in 0..3 {
            listeners.wake(HIGH_WATERMARK, &tasks);
            for (index, wake_set) in readers.iter().enumerate() {
                wake_set.wait_for_mark().await;
                assert_eq!(wake_set.take(), Some(index));
            }
        }
    }

    #[tokio::test]
    async fn dropped_listeners_are_removed_without_a_wake_up() {
        let (listeners, tasks) = (Arc::<PartitionListeners>::default(), Tasks::new());
        let waiting_reader = reader(&listeners, 0);
        for _ in 0..10_000 {
            drop(reader(&listeners, 1));
        }
        assert!(listeners.of(HIGH_WATERMARK).len() <= 2 * MIN_SWEEP);
        listeners.wake(HIGH_WATERMARK, &tasks);
        waiting_reader.wait_for_mark().await;
        assert_eq!(waiting_reader.take(), Some(0));
    }

    #[tokio::test]
    async fn marks_are_taken_once_and_in_order() {
        let wake_set = WakeSet::default();
        wake_set.mark(2);
        wake_set.mark(1);
        wake_set.mark(2);
        wake_set.wait_for_mark().await;
        assert_eq!((wake_set.take(), wake_set.take(), wake_set.take()), (Some(2), Some(1), None));
        wake_set.mark(2);
        wake_set.mark(1);
        wake_set.put_back(3);
        wake_set.put_back(1);
        assert_eq!([(); 4].map(|()| wake_set.take()), [Some(1), Some(3), Some(2), None]);
    }
}
