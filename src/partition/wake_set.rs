//! Set of a reader's partitions that have something new. Its cost is per event, not per partition that is waited for.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::listeners::Listener;

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
    pub(super) fn listen(&self, index: usize, listener: Listener) {
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

#[cfg(test)]
mod tests {
    use super::*;

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
