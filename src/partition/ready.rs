//! Which of the partitions that somebody reads have something new. Costs per event, not per partition waited for.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

use super::listeners::Listener;

/// The partitions, by the reader's own numbers, that changed since the reader last took them.
#[derive(Debug, Default)]
pub struct Ready {
    marked: Mutex<Marked>,
    notify: Notify,
}

#[derive(Debug, Default)]
struct Marked {
    order: VecDeque<usize>,
    members: BTreeSet<usize>,
    /// What marks each number.
    listeners: BTreeMap<usize, Vec<Arc<Listener>>>,
}

impl Ready {
    /// Marks a partition; marking it twice is marking it once.
    pub fn mark(&self, index: usize) {
        let mut marked = self.lock();
        if marked.members.insert(index) {
            marked.order.push_back(index);
            drop(marked);
            self.notify.notify_one();
        }
    }

    /// Marks a partition again that was taken for nothing: it is the next one.
    pub fn put_back(&self, index: usize) {
        let mut marked = self.lock();
        if !marked.members.insert(index) {
            marked.order.retain(|other| *other != index);
        }
        marked.order.push_front(index);
        drop(marked);
        self.notify.notify_one();
    }

    /// This listener marks its number from the next [`Self::take`] of that on.
    pub(super) fn listen(&self, index: usize, listener: Listener) {
        self.lock().listeners.entry(index).or_default().push(Arc::new(listener));
    }

    /// Takes the partition that was marked first. What it is marked for is to be looked at after this: what changes later marks it again.
    pub fn take(&self) -> Option<usize> {
        let (index, listeners) = {
            let mut marked = self.lock();
            let index = marked.order.pop_front()?;
            marked.members.remove(&index);
            (index, marked.listeners.get(&index).cloned().unwrap_or_default())
        };
        listeners.iter().for_each(Listener::listen);
        Some(index)
    }

    /// Whether some partition is marked.
    pub fn is_marked(&self) -> bool {
        !self.lock().order.is_empty()
    }

    /// Waits until some partition is marked.
    pub async fn wait(&self) {
        loop {
            let notified = self.notify.notified();
            if !self.lock().order.is_empty() {
                return;
            }
            notified.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Marked> {
        self.marked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_mark_is_taken_once_and_in_order() {
        let ready = Ready::default();
        ready.mark(2);
        ready.mark(1);
        ready.mark(2);
        ready.wait().await;
        assert_eq!((ready.take(), ready.take(), ready.take()), (Some(2), Some(1), None));
        ready.mark(2);
        ready.mark(1);
        ready.put_back(3);
        ready.put_back(1);
        assert_eq!([(); 4].map(|()| ready.take()), [Some(1), Some(3), Some(2), None]);
    }
}
