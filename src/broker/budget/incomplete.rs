//! Requests of which only a part has arrived. Such requests yield to other requests that wait for memory.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::Waker,
};

use futures::task::AtomicWaker;
use parking_lot::Mutex;
use tokio::time::Instant;

use super::{LARGE_GRACE, SMALL_BYTES, SMALL_GRACE, connections::Account, grace};

/// All incomplete requests of a broker.
#[derive(Debug, Default)]
pub(super) struct IncompleteRequests(Mutex<State>);

/// Incomplete requests by pool, oldest first.
#[derive(Debug, Default)]
struct State {
    /// Number of the next request.
    next_number: u64,
    small: BTreeMap<(Instant, u64), Arc<IncompleteRequest>>,
    large: BTreeMap<(Instant, u64), Arc<IncompleteRequest>>,
}

impl State {
    /// Returns the requests that hold memory of the pool for a request of `bytes`.
    const fn of(&mut self, bytes: usize) -> &mut BTreeMap<(Instant, u64), Arc<IncompleteRequest>> {
        if bytes <= SMALL_BYTES { &mut self.small } else { &mut self.large }
    }
}

/// A request of which only a part has arrived.
#[derive(Debug)]
pub(super) struct IncompleteRequest {
    number: u64,
    /// Bytes that the request has taken.
    pub(super) bytes: usize,
    /// Time since which the request holds this memory.
    since: Instant,
    /// True if the request must end.
    ended: AtomicBool,
    /// Waker of the task that reads the request.
    waker: AtomicWaker,
    /// Account of the connection on which the request arrives.
    account: Arc<Account>,
}

impl IncompleteRequest {
    /// Returns true if the request must end. The task of `waker` is woken when that happens later.
    pub(super) fn is_ended(&self, waker: &Waker) -> bool {
        self.waker.register(waker);
        self.ended.load(Ordering::Acquire)
    }
}

impl IncompleteRequests {
    /// Registers an incomplete request of a connection, which has held `bytes` since then.
    pub(super) fn add(&self, bytes: usize, since: Instant, account: &Arc<Account>) -> Arc<IncompleteRequest> {
        let mut state = self.0.lock();
        let number = state.next_number;
        state.next_number += 1;
        let (ended, waker, account) = (AtomicBool::new(false), AtomicWaker::new(), Arc::clone(account));
        let request = Arc::new(IncompleteRequest { number, bytes, since, ended, waker, account });
        state.of(bytes).insert((since, number), Arc::clone(&request));
        request
    }

    /// Removes a request that has arrived completely or has ended.
    pub(super) fn remove(&self, request: &IncompleteRequest) {
        self.0.lock().of(request.bytes).remove(&(request.since, request.number));
    }

    /// Ends stalled requests in the pool for a request of `bytes`, the oldest first, until `wanted_bytes` will be free.
    /// A request that was ended before and still holds its memory counts again. Its connection is closed if its client
    /// reads nothing.
    pub(super) fn end_stalled(&self, bytes: usize, wanted_bytes: usize, now: Instant) {
        let mut freed_bytes = 0;
        let min_age = if bytes <= SMALL_BYTES { SMALL_GRACE } else { LARGE_GRACE };
        for request in self.0.lock().of(bytes).values() {
            let age = now.saturating_duration_since(request.since);
            // All further requests are younger.
            if age < min_age || freed_bytes >= wanted_bytes {
                return;
            }
            if age < grace(request.bytes) {
                continue;
            }
            if !request.ended.swap(true, Ordering::AcqRel) {
                request.waker.wake();
            } else if request.account.is_stalled(now) {
                // The call does not run and cannot free its memory.
                request.account.close();
            }
            freed_bytes += request.bytes;
        }
    }
}
