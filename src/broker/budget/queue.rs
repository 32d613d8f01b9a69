//! Requests that wait for memory, and how often and how much of what does not come ends for them.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

use super::SMALL_GRACE;

/// Most bytes of incomplete requests that end at a time, unless a larger one waits: what clients send again takes little of the CPU then.
pub(super) const MAX_ENDED_BYTES: usize = 1 << 20;

/// Longest time between two looks of a waiting request for incomplete ones.
const MAX_LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// Requests that wait for one pool.
#[derive(Debug, Default)]
pub(super) struct RequestQueue {
    requests: AtomicUsize,
    bytes: AtomicUsize,
    /// When incomplete ones were last ended for them.
    ended: Mutex<Option<Instant>>,
}

/// A request in a queue.
pub(super) struct QueuedRequest<'a> {
    queue: &'a RequestQueue,
    bytes: usize,
}

impl<'a> QueuedRequest<'a> {
    pub(super) fn new(queue: &'a RequestQueue, bytes: usize) -> Self {
        queue.requests.fetch_add(1, Ordering::Relaxed);
        queue.bytes.fetch_add(bytes, Ordering::Relaxed);
        Self { queue, bytes }
    }

    /// How long it waits before it looks for incomplete requests: one of many looks as often as one alone.
    pub(super) fn interval(&self) -> Duration {
        let requests = u32::try_from(self.queue.requests.load(Ordering::Relaxed)).unwrap_or(u32::MAX);
        SMALL_GRACE.saturating_mul(requests).min(MAX_LOOK_INTERVAL)
    }

    /// Bytes that are to come free now; `None` where another one has just seen to it.
    pub(super) fn wanted(&self, now: Instant) -> Option<usize> {
        let mut ended = self.queue.ended.lock().unwrap_or_else(PoisonError::into_inner);
        if ended.is_some_and(|ended| now < ended + SMALL_GRACE) {
            return None;
        }
        *ended = Some(now);
        Some(self.queue.bytes.load(Ordering::Relaxed).min(self.bytes.max(MAX_ENDED_BYTES)))
    }
}

impl Drop for QueuedRequest<'_> {
    fn drop(&mut self) {
        self.queue.requests.fetch_sub(1, Ordering::Relaxed);
        self.queue.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}
