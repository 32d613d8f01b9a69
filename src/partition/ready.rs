//! Which of the partitions that somebody reads have something new. Costs per event, not per partition waited for.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::{Mutex, PoisonError},
};

use tokio::sync::Notify;

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
}

impl Ready {
    /// Marks a partition; marking it twice is marking it once.
    pub fn mark(&self, index: usize) {
        let mut marked = self.marked.lock().unwrap_or_else(PoisonError::into_inner);
        if marked.members.insert(index) {
            marked.order.push_back(index);
            drop(marked);
            self.notify.notify_one();
        }
    }

    /// Takes the partition that was marked first.
    pub fn take(&self) -> Option<usize> {
        let mut marked = self.marked.lock().unwrap_or_else(PoisonError::into_inner);
        let index = marked.order.pop_front()?;
        marked.members.remove(&index);
        Some(index)
    }

    /// Waits until some partition is marked.
    pub async fn wait(&self) {
        loop {
            let notified = self.notify.notified();
            if !self.marked.lock().unwrap_or_else(PoisonError::into_inner).order.is_empty() {
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
    async fn a_mark_is_taken_once_and_in_order() {
        let ready = Ready::default();
        ready.mark(2);
        ready.mark(1);
        ready.mark(2);
        ready.wait().await;
        assert_eq!((ready.take(), ready.take(), ready.take()), (Some(2), Some(1), None));
    }
}
