//! Who is woken when a mark of a partition moves.

use std::sync::{
    Arc, Mutex, PoisonError, Weak,
    atomic::{AtomicBool, Ordering},
};

use super::Ready;

/// Readers who wait for the same mark. Without any, a moved mark costs one load.
#[derive(Debug, Default)]
pub(super) struct Listeners {
    some: AtomicBool,
    list: Mutex<Vec<(Weak<Ready>, usize)>>,
}

impl Listeners {
    /// Marks `index` in `ready` at every wake-up, until that is dropped.
    pub(super) fn add(&self, ready: &Arc<Ready>, index: usize) {
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        list.retain(|(ready, _)| ready.strong_count() > 0);
        list.push((Arc::downgrade(ready), index));
        // Whoever moves a mark from here on sees it; who listens looks at the mark after this.
        self.some.store(true, Ordering::SeqCst);
    }

    pub(super) fn wake(&self) {
        if !self.some.load(Ordering::SeqCst) {
            return;
        }
        let list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        for (ready, index) in list.iter() {
            if let Some(ready) = ready.upgrade() {
                ready.mark(*index);
            }
        }
    }
}
