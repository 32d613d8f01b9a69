//! Queues of requests that wait for memory. A waiting request searches for incomplete requests to end. A queue bounds
//! the number of searches of all its requests, and the bytes that one search frees.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use tokio::time::Instant;

use super::SMALL_ARRIVAL_TIMEOUT;
use crate::task::lock::Mutex;

/// Bytes after which one search ends no further incomplete requests, unless a larger request waits. Clients send ended
/// requests again, and a bounded number of them takes little CPU.
pub(super) const MAX_ENDED_BYTES: usize = 1 << 20;

/// Maximum interval between two searches of a waiting request for incomplete requests.
const MAX_SEARCH_INTERVAL: Duration = Duration::from_millis(200);

/// Requests that wait for one pool.
#[derive(Debug, Default)]
pub(super) struct RequestQueue {
    requests: AtomicUsize,
    bytes: AtomicUsize,
    /// Time of the last search for incomplete requests; `None` before the first.
    last_search: Mutex<Option<Instant>>,
}

/// A request in a queue. The request leaves the queue when this value is dropped.
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

    /// Returns the interval between two searches of this request for incomplete requests. The interval grows with the
    /// number of waiting requests, so that many of them together search about as often as one.
    pub(super) fn interval(&self) -> Duration {
        let requests = u32::try_from(self.queue.requests.load(Ordering::Relaxed)).unwrap_or(u32::MAX);
        SMALL_ARRIVAL_TIMEOUT.saturating_mul(requests).min(MAX_SEARCH_INTERVAL)
    }

    /// Begins a search for incomplete requests. Returns the bytes that the search must free, or `None` if the last
    /// search of this queue began less than [`SMALL_ARRIVAL_TIMEOUT`] ago.
    pub(super) fn begin_search(&self, now: Instant) -> Option<usize> {
        let mut last_search = self.queue.last_search.lock();
        if last_search.is_some_and(|last_search| now < last_search + SMALL_ARRIVAL_TIMEOUT) {
            return None;
        }
        *last_search = Some(now);
        Some(self.queue.bytes.load(Ordering::Relaxed).min(self.bytes.max(MAX_ENDED_BYTES)))
    }
}

impl Drop for QueuedRequest<'_> {
    fn drop(&mut self) {
        self.queue.requests.fetch_sub(1, Ordering::Relaxed);
        self.queue.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}
