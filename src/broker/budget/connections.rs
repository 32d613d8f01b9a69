//! Memory of each connection, and the search for connections to close because their clients read nothing.
//!
//! HTTP/2 polls a call for more data only after its client has taken most of the previous data. Until then no code of
//! the call runs, so it frees neither its responses nor its requests. If other calls wait for that memory, the
//! connection is closed.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Weak},
    time::Duration,
};

use parking_lot::Mutex;
use slab::Slab;
use tokio::{sync::Semaphore, time::Instant};

use super::{METADATA_CALLS, Pools};
use crate::{limits, partition::MemoryBudget, task::clock};

/// Maximum time that a client may take nothing of its responses while other calls wait for memory. A consumer that
/// pauses for longer connects again.
pub(super) const UNREAD_TIMEOUT: Duration = Duration::from_secs(5);

/// Minimum rate of a client that takes its responses in small pieces while other calls wait, in bytes per second.
const MIN_BYTES_PER_SECOND: usize = 256 << 10;

/// Additional time that a call may stay unread while other calls wait for memory of the other kind, of which the call
/// holds little or nothing.
const OTHER_KIND_TIMEOUT: Duration = Duration::from_secs(60);

/// Minimum time between two searches for connections to close, for any number of waiting calls.
pub(super) const SEARCH_INTERVAL: Duration = Duration::from_millis(100);

/// Memory of one connection. Clones share it.
#[derive(Clone, Debug)]
pub struct ConnectionMemory(pub(super) Arc<Account>);

pub(super) struct Account {
    id: u64,
    connections: Arc<Connections>,
    pub(super) requests: Pools,
    pub(super) whole: MemoryBudget,
    pub(super) parts: Pools,
    pub(super) responses: Pools,
    pub(super) sessions: MemoryBudget,
    /// Permit for decompressing a batch of this connection.
    pub(super) decompression: Arc<Semaphore>,
    /// Permit for recompressing a batch of this connection.
    pub(super) recompression: Arc<Semaphore>,
    pub(super) metadata_calls: Arc<Semaphore>,
    pub(super) tiered_appends: Arc<Semaphore>,
    /// Calls that passed data to HTTP/2 which has not been sent.
    unread: Mutex<Slab<UnreadCall>>,
    close: Box<dyn Fn() + Send + Sync>,
}

impl fmt::Debug for Account {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Account").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.connections.0.lock().open.remove(&self.id);
    }
}

#[derive(Debug)]
struct UnreadCall {
    /// Time by which the client must take the next piece while other calls wait.
    until: Instant,
    /// Time by which the client must have taken everything.
    deadline: Instant,
    kind: MemoryKind,
}

/// Kind of memory that an unread call holds. A consumer that pauses is not closed because other clients wait to append.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MemoryKind {
    /// Memory of a call whose response takes no response memory.
    Requests,
    Responses,
}

impl Account {
    /// Returns true if a client has read nothing for too long while other calls wait for memory of this kind.
    fn is_unread(&self, kind: MemoryKind, now: Instant) -> bool {
        self.unread.lock().iter().any(|(_, call)| {
            let extra = if call.kind == kind { Duration::ZERO } else { OTHER_KIND_TIMEOUT };
            call.until.min(call.deadline) + extra <= now
        })
    }

    /// Returns true if a call of the connection does not run because its client reads nothing.
    pub(super) fn is_stalled(&self, now: Instant) -> bool {
        self.is_unread(MemoryKind::Requests, now) || self.is_unread(MemoryKind::Responses, now)
    }

    fn holds(&self, kind: MemoryKind) -> bool {
        let is_taken = |pools: &Pools| pools.small.taken() + pools.large.taken() > 0;
        match kind {
            MemoryKind::Requests => is_taken(&self.requests) || self.whole.taken() > 0 || is_taken(&self.parts),
            MemoryKind::Responses => is_taken(&self.responses),
        }
    }

    pub(super) fn close(&self) {
        (self.close)();
    }
}

/// Registration of a call with frames that HTTP/2 has not sent.
#[derive(Debug)]
pub(super) struct UnreadResponse {
    account: Arc<Account>,
    /// Key of the call in `unread`.
    key: usize,
}

impl UnreadResponse {
    /// Registers a call that passes data to HTTP/2 now.
    pub(super) fn new(account: &Arc<Account>) -> Self {
        let until = clock::monotonic() + UNREAD_TIMEOUT;
        let key = account.unread.lock().insert(UnreadCall { until, deadline: until, kind: MemoryKind::Requests });
        Self { account: Arc::clone(account), key }
    }

    /// Records that more data was passed to HTTP/2, of which `bytes` are charged. HTTP/2 polls when it has space, so
    /// the client took something.
    pub(super) fn hand(&self, bytes: usize) {
        let until = clock::monotonic() + UNREAD_TIMEOUT;
        if let Some(call) = self.account.unread.lock().get_mut(self.key) {
            call.until = until;
            call.deadline = until + Duration::from_secs((bytes / MIN_BYTES_PER_SECOND) as u64);
            if bytes > 0 {
                call.kind = MemoryKind::Responses;
            }
        }
    }

    /// Records that the client took a piece of the data.
    pub(super) fn renew(&self) {
        if let Some(call) = self.account.unread.lock().get_mut(self.key) {
            call.until = clock::monotonic() + UNREAD_TIMEOUT;
        }
    }
}

impl Drop for UnreadResponse {
    fn drop(&mut self) {
        self.account.unread.lock().remove(self.key);
    }
}

/// All open connections.
#[derive(Debug, Default)]
pub(super) struct Connections(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    next: u64,
    /// Time of the last search, by kind of memory.
    searched: [Option<Instant>; 2],
    open: BTreeMap<u64, Weak<Account>>,
}

impl Connections {
    /// Registers a connection with these shares of the pools. `close` closes the connection.
    pub(super) fn open(
        self: &Arc<Self>,
        [requests, parts, responses]: [Pools; 3],
        whole: MemoryBudget,
        sessions: MemoryBudget,
        close: impl Fn() + Send + Sync + 'static,
    ) -> ConnectionMemory {
        let mut state = self.0.lock();
        let id = state.next;
        state.next += 1;
        let account = Arc::new(Account {
            id,
            connections: Arc::clone(self),
            requests,
            whole,
            parts,
            responses,
            sessions,
            decompression: Arc::new(Semaphore::new(1)),
            recompression: Arc::new(Semaphore::new(1)),
            metadata_calls: Arc::new(Semaphore::new(METADATA_CALLS)),
            tiered_appends: Arc::new(Semaphore::new(limits::MAX_TIERED_APPENDS_PER_CONNECTION)),
            unread: Mutex::default(),
            close: Box::new(close),
        });
        state.open.insert(id, Arc::downgrade(&account));
        ConnectionMemory(account)
    }

    /// Closes the connections that hold memory of this kind and whose clients do not read.
    pub(super) fn close_unread(&self, kind: MemoryKind) {
        let now = clock::monotonic();
        let mut state = self.0.lock();
        let searched = &mut state.searched[kind as usize];
        if searched.is_some_and(|searched| now.saturating_duration_since(searched) < SEARCH_INTERVAL) {
            return;
        }
        *searched = Some(now);
        let open: Vec<_> = state.open.values().filter_map(Weak::upgrade).collect();
        // Dropping an account takes this lock.
        drop(state);
        open.iter()
            .filter(|account| account.holds(kind) && account.is_unread(kind, now))
            .for_each(|account| account.close());
    }
}
