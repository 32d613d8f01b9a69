//! What the partition's task publishes for everybody else: marks, configuration, fault. Read without asking the task.

use std::sync::{
    Arc, Mutex, PoisonError, Weak,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use arc_swap::ArcSwap;

use super::Ready;
use crate::model::{LeaderEpoch, Offset, TopicConfig, Watermarks};

/// The published state of one partition. Only its task writes.
#[derive(Debug)]
pub(super) struct Shared {
    log_start: AtomicU64,
    local_start: AtomicU64,
    tiered_end: AtomicU64,
    high_watermark: AtomicU64,
    persisted_end: AtomicU64,
    log_end: AtomicU64,
    local_bytes: AtomicU64,
    /// When the active segment took its first batch, in ms; 0 while it is empty.
    pub(super) active_since_ms: AtomicU64,
    closed: AtomicBool,
    epoch: LeaderEpoch,
    config: ArcSwap<TopicConfig>,
    fault: Mutex<Option<Arc<str>>>,
    followers: Mutex<Vec<(Weak<Ready>, usize)>>,
}

impl Shared {
    pub(super) fn new(epoch: LeaderEpoch, config: Arc<TopicConfig>) -> Self {
        Self {
            log_start: AtomicU64::new(0),
            local_start: AtomicU64::new(0),
            tiered_end: AtomicU64::new(0),
            high_watermark: AtomicU64::new(0),
            persisted_end: AtomicU64::new(0),
            log_end: AtomicU64::new(0),
            local_bytes: AtomicU64::new(0),
            active_since_ms: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            epoch,
            config: ArcSwap::new(config),
            fault: Mutex::new(None),
            followers: Mutex::new(Vec::new()),
        }
    }

    /// Publishes the marks. The ends are stored before the high watermark, so that who sees a high watermark finds
    /// everything below it.
    pub(super) fn publish(&self, marks: Watermarks, local_bytes: u64) {
        self.log_end.store(marks.log_end.get(), Ordering::Release);
        self.persisted_end.store(marks.persisted_end.get(), Ordering::Release);
        self.tiered_end.store(marks.tiered_end.get(), Ordering::Release);
        self.local_start.store(marks.local_start.get(), Ordering::Release);
        self.log_start.store(marks.log_start.get(), Ordering::Release);
        self.local_bytes.store(local_bytes, Ordering::Relaxed);
        let before = self.high_watermark.swap(marks.high_watermark.get(), Ordering::AcqRel);
        if before != marks.high_watermark.get() {
            self.wake();
        }
    }

    pub(super) fn marks(&self) -> Watermarks {
        let load = |mark: &AtomicU64| Offset::new(mark.load(Ordering::Acquire)).expect("a published offset");
        Watermarks {
            high_watermark: load(&self.high_watermark),
            log_start: load(&self.log_start),
            local_start: load(&self.local_start),
            tiered_end: load(&self.tiered_end),
            persisted_end: load(&self.persisted_end),
            log_end: load(&self.log_end),
        }
    }

    pub(super) fn local_bytes(&self) -> u64 {
        self.local_bytes.load(Ordering::Relaxed)
    }

    pub(super) fn epoch(&self) -> LeaderEpoch {
        self.epoch
    }

    pub(super) fn config(&self) -> Arc<TopicConfig> {
        self.config.load_full()
    }

    pub(super) fn configure(&self, config: Arc<TopicConfig>) {
        self.config.store(config);
    }

    pub(super) fn fault(&self) -> Option<Arc<str>> {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_fault(&self, why: &str) {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = Some(why.into());
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Ends the partition for its readers: each is woken and finds it closed.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.wake();
    }

    /// Marks `index` in `ready` from now on whenever the high watermark moves, and once at first.
    pub(super) fn follow(&self, ready: &Arc<Ready>, index: usize) {
        let mut followers = self.followers.lock().unwrap_or_else(PoisonError::into_inner);
        followers.retain(|(follower, _)| follower.strong_count() > 0);
        followers.push((Arc::downgrade(ready), index));
        drop(followers);
        ready.mark(index);
    }

    fn wake(&self) {
        let followers = self.followers.lock().unwrap_or_else(PoisonError::into_inner);
        for (follower, index) in followers.iter() {
            if let Some(ready) = follower.upgrade() {
                ready.mark(*index);
            }
        }
    }
}
