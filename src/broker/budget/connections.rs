//! Memory that each connection holds, and which connections are closed because their clients read nothing.
//!
//! HTTP/2 asks a call for more only when its client takes what it was sent. Until then nothing of the call runs: it gives back neither its
//! responses nor the requests that it began. Where others wait for that memory, its connection is closed.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use tokio::{sync::Semaphore, time::Instant};

use super::{METADATA_CALLS, MIN_BYTES_PER_SECOND, Pools};
use crate::task::clock;

/// How long a response may stay unread while others wait for memory, beside the time that its bytes take. Consumers that pause for longer are
/// honest, and connect again.
pub(super) const UNREAD_GRACE: Duration = Duration::from_secs(5);

/// Least time between two searches for connections to close, however many calls wait.
pub(super) const SEARCH_INTERVAL: Duration = Duration::from_millis(100);

/// Memory that one connection holds. Clones share it.
#[derive(Clone, Debug)]
pub struct ConnectionMemory(pub(super) Arc<Account>);

pub(super) struct Account {
    id: u64,
    connections: Arc<Connections>,
    pub(super) requests: Pools,
    pub(super) parts: Pools,
    pub(super) responses: Pools,
    /// Taken while a batch of this connection is decompressed.
    pub(super) decompression: Arc<Semaphore>,
    pub(super) metadata_calls: Arc<Semaphore>,
    unread: Mutex<Unread>,
    close: Box<dyn Fn() + Send + Sync>,
}

impl fmt::Debug for Account {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Account").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.connections.state().open.remove(&self.id);
    }
}

/// Calls that handed something to HTTP/2 and were not asked for more since.
#[derive(Debug, Default)]
struct Unread {
    next: u64,
    calls: BTreeMap<u64, UnreadCall>,
}

#[derive(Debug)]
struct UnreadCall {
    /// Its client may read until then, while others wait.
    until: Instant,
    holds: Holds,
}

/// What an unread call holds. A consumer that pauses is not closed because others wait to append.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holds {
    /// Of calls whose answers take none of the memory of responses.
    Requests,
    Responses,
}

impl Account {
    fn unread(&self) -> MutexGuard<'_, Unread> {
        self.unread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the client of a call that holds this has read nothing for too long.
    fn is_unread(&self, holds: Holds, now: Instant) -> bool {
        self.unread().calls.values().any(|call| call.holds == holds && call.until <= now)
    }

    /// Ends the connection.
    pub(super) fn close(&self) {
        (self.close)();
    }
}

/// A response that was handed to HTTP/2, for as long as nothing more is asked for.
#[derive(Debug)]
pub(super) struct UnreadResponse {
    account: Arc<Account>,
    number: u64,
}

impl UnreadResponse {
    /// A response of so many bytes.
    pub(super) fn new(account: &Arc<Account>, bytes: usize) -> Self {
        let until = clock::monotonic() + UNREAD_GRACE + Duration::from_secs((bytes / MIN_BYTES_PER_SECOND) as u64);
        let mut unread = account.unread();
        let number = unread.next;
        unread.next += 1;
        let holds = if bytes > 0 { Holds::Responses } else { Holds::Requests };
        unread.calls.insert(number, UnreadCall { until, holds });
        drop(unread);
        Self { account: Arc::clone(account), number }
    }
}

impl Drop for UnreadResponse {
    fn drop(&mut self) {
        self.account.unread().calls.remove(&self.number);
    }
}

/// The connections of a broker.
#[derive(Debug, Default)]
pub(super) struct Connections(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    next: u64,
    searched: Option<Instant>,
    open: BTreeMap<u64, Weak<Account>>,
}

impl Connections {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection with these parts of the pools, which `close` ends.
    pub(super) fn open(
        self: &Arc<Self>,
        [requests, parts, responses]: [Pools; 3],
        close: impl Fn() + Send + Sync + 'static,
    ) -> ConnectionMemory {
        let mut state = self.state();
        let id = state.next;
        state.next += 1;
        let account = Arc::new(Account {
            id,
            connections: Arc::clone(self),
            requests,
            parts,
            responses,
            decompression: Arc::new(Semaphore::new(1)),
            metadata_calls: Arc::new(Semaphore::new(METADATA_CALLS)),
            unread: Mutex::default(),
            close: Box::new(close),
        });
        state.open.insert(id, Arc::downgrade(&account));
        ConnectionMemory(account)
    }

    /// Closes the connections whose clients do not read and that hold something of what is waited for.
    pub(super) fn close_unread(&self, holds: Holds, held: impl Fn(&Account) -> usize) {
        let now = clock::monotonic();
        let mut state = self.state();
        if state.searched.is_some_and(|searched| now.saturating_duration_since(searched) < SEARCH_INTERVAL) {
            return;
        }
        state.searched = Some(now);
        let open: Vec<_> = state.open.values().filter_map(Weak::upgrade).collect();
        // An account that is dropped takes this lock.
        drop(state);
        for account in open.iter().filter(|account| held(account) > 0 && account.is_unread(holds, now)) {
            account.close();
        }
    }
}
