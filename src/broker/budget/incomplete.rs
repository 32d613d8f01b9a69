//! Requests of which only a part has arrived. If other requests wait for memory, incomplete requests fail after their
//! [`arrival_timeout`].

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::Waker,
};

use futures::task::AtomicWaker;
use tokio::time::Instant;

use super::{MIN_LARGE_ARRIVAL_TIMEOUT, SMALL_ARRIVAL_TIMEOUT, SMALL_BYTES, arrival_timeout, connections::Account};
use crate::task::lock::Mutex;

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
    /// Returns the incomplete requests of the pool, small or large, that a request of `bytes` uses.
    const fn of(&mut self, bytes: usize) -> &mut BTreeMap<(Instant, u64), Arc<IncompleteRequest>> {
        if bytes <= SMALL_BYTES { &mut self.small } else { &mut self.large }
    }
}

/// A request of which only a part has arrived.
#[derive(Debug)]
pub(super) struct IncompleteRequest {
    number: u64,
    /// Bytes of memory that the request holds.
    pub(super) bytes: usize,
    /// Time since which the request holds this memory.
    since: Instant,
    /// True once the request must fail, because other requests wait for its memory.
    ended: AtomicBool,
    /// Waker of the task that reads the request.
    waker: AtomicWaker,
    /// Account of the connection on which the request arrives.
    account: Arc<Account>,
}

impl IncompleteRequest {
    /// Returns true if the request must fail. Otherwise, the task of `waker` is woken when the request must fail.
    pub(super) fn is_ended(&self, waker: &Waker) -> bool {
        self.waker.register(waker);
        self.ended.load(Ordering::Acquire)
    }
}

impl IncompleteRequests {
    /// Registers an incomplete request of the connection with this account. The request has held `bytes` since the time
    /// `since`.
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

    /// Ends incomplete requests that have exceeded their [`arrival_timeout`], the oldest first, until they free
    /// `wanted_bytes` together. Only requests of the pool that a request of `bytes` uses are ended. A request that was
    /// ended by an earlier call and still holds its memory counts too. The connection of such a request is closed if
    /// the client reads nothing.
    pub(super) fn end_stalled(&self, bytes: usize, wanted_bytes: usize, now: Instant) {
        let mut freed_bytes = 0;
        let min_age = if bytes <= SMALL_BYTES { SMALL_ARRIVAL_TIMEOUT } else { MIN_LARGE_ARRIVAL_TIMEOUT };
        for request in self.0.lock().of(bytes).values() {
            let age = now.saturating_duration_since(request.since);
            // The requests are sorted by age, so all further ones are younger.
            if age < min_age || freed_bytes >= wanted_bytes {
                return;
            }
            if age < arrival_timeout(request.bytes) {
                continue;
            }
            if !request.ended.swap(true, Ordering::AcqRel) {
                request.waker.wake();
            } else if request.account.is_stalled(now) {
                // HTTP/2 does not poll the call, so the call cannot free its memory.
                request.account.close();
            }
            freed_bytes += request.bytes;
        }
    }
}
