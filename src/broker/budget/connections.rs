//! Shares and permits of each connection, and the search for connections to close because their clients read nothing.
//!
//! HTTP/2 polls a call for more data only after its client has taken most of the previous data. Until the client reads,
//! the call is not polled and frees neither its responses nor its requests. If other calls wait for memory that such a
//! connection holds, the connection is closed.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Weak},
    time::Duration,
};

use slab::Slab;
use tokio::{sync::Semaphore, time::Instant};

use super::{METADATA_CALLS, Pools};
use crate::{
    limits,
    partition::MemoryBudget,
    task::{clock, lock::Mutex},
};

/// Maximum time that a client may take nothing of its responses while other calls wait for memory. The connection is
/// then closed, and a consumer that paused must connect again.
pub(super) const UNREAD_TIMEOUT: Duration = Duration::from_secs(5);

/// Minimum rate at which a client must take its responses while other calls wait for memory, in bytes per second.
const MIN_BYTES_PER_SECOND: usize = 256 << 10;

/// Additional time that the response of a call may stay unread while other calls wait for memory of another
/// [`MemoryKind`] than that of the call.
const OTHER_KIND_TIMEOUT: Duration = Duration::from_secs(60);

/// Minimum time between two searches for connections to close, for each [`MemoryKind`] and any number of waiting calls.
pub(super) const SEARCH_INTERVAL: Duration = Duration::from_millis(100);

/// Shares of one connection in the memory pools. Clones share them.
#[derive(Clone, Debug)]
pub struct ConnectionMemory(pub(super) Arc<Account>);

/// Shares of one connection in the pools, its permits, and its unread calls.
pub(super) struct Account {
    id: u64,
    /// Registry of all open connections. Dropping the account removes it from the registry.
    connections: Arc<Connections>,
    pub(super) requests: Pools,
    /// Share of small requests that have arrived completely.
    pub(super) complete_requests: MemoryBudget,
    /// Share of the repeated parts of requests.
    pub(super) parts: Pools,
    pub(super) responses: Pools,
    /// Share of the partition state of fetches and reads.
    pub(super) sessions: MemoryBudget,
    /// The one permit for decompressing a batch of this connection.
    pub(super) decompression: Arc<Semaphore>,
    /// The one permit for recompressing a batch of this connection.
    pub(super) recompression: Arc<Semaphore>,
    /// Permits for calls whose responses are built from metadata.
    pub(super) metadata_calls: Arc<Semaphore>,
    /// Permits for appends that wait for the object store.
    pub(super) tiered_appends: Arc<Semaphore>,
    /// Calls with data that was passed to HTTP/2 and has not been sent.
    unread: Mutex<Slab<UnreadCall>>,
    /// Closes the connection.
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

/// A call with data that was passed to HTTP/2 and has not been sent.
#[derive(Debug)]
struct UnreadCall {
    /// Time by which the client must take the next piece while other calls wait for memory.
    next_piece_deadline: Instant,
    /// Time by which the client must have taken all passed data while other calls wait for memory.
    deadline: Instant,
    kind: MemoryKind,
}

/// Kind of memory that an unread call holds, and that other calls wait for. With two kinds, the connection of a
/// consumer that pauses is not closed as soon as producers wait for request memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MemoryKind {
    /// Memory of requests. An unread call is of this kind while its response holds no response memory.
    Requests,
    Responses,
}

impl Account {
    /// Returns true if the client of the connection has missed a deadline of an unread call. The caller waits for
    /// memory of this kind; calls of the other kind get [`OTHER_KIND_TIMEOUT`] more.
    fn is_unread(&self, kind: MemoryKind, now: Instant) -> bool {
        self.unread.lock().iter().any(|(_, call)| {
            let extra = if call.kind == kind { Duration::ZERO } else { OTHER_KIND_TIMEOUT };
            call.next_piece_deadline.min(call.deadline) + extra <= now
        })
    }

    /// Returns true if a call of the connection does not run because its client reads nothing.
    pub(super) fn is_stalled(&self, now: Instant) -> bool {
        self.is_unread(MemoryKind::Requests, now) || self.is_unread(MemoryKind::Responses, now)
    }

    /// Returns true if the connection holds memory of this kind.
    fn holds(&self, kind: MemoryKind) -> bool {
        let is_taken = |pools: &Pools| pools.small.taken() + pools.large.taken() > 0;
        match kind {
            MemoryKind::Requests => {
                is_taken(&self.requests) || self.complete_requests.taken() > 0 || is_taken(&self.parts)
            }
            MemoryKind::Responses => is_taken(&self.responses),
        }
    }

    pub(super) fn close(&self) {
        (self.close)();
    }
}

/// Registration of a call with data that HTTP/2 has not sent, until this value is dropped.
#[derive(Debug)]
pub(super) struct UnreadResponse {
    account: Arc<Account>,
    /// Key of the call in [`Account::unread`].
    key: usize,
}

impl UnreadResponse {
    /// Registers a call that passes data to HTTP/2 now.
    pub(super) fn new(account: &Arc<Account>) -> Self {
        let deadline = clock::monotonic() + UNREAD_TIMEOUT;
        let call = UnreadCall { next_piece_deadline: deadline, deadline, kind: MemoryKind::Requests };
        let key = account.unread.lock().insert(call);
        Self { account: Arc::clone(account), key }
    }

    /// Extends both deadlines, because more data was passed to HTTP/2, with `bytes` of charged memory. HTTP/2 polls for
    /// data only when it has space, so the client has taken some of the previous data.
    pub(super) fn on_data_passed(&self, bytes: usize) {
        let next_piece_deadline = clock::monotonic() + UNREAD_TIMEOUT;
        if let Some(call) = self.account.unread.lock().get_mut(self.key) {
            call.next_piece_deadline = next_piece_deadline;
            call.deadline = next_piece_deadline + Duration::from_secs((bytes / MIN_BYTES_PER_SECOND) as u64);
            if bytes > 0 {
                call.kind = MemoryKind::Responses;
            }
        }
    }

    /// Extends the deadline of the next piece. Called when the client has taken a piece of the data.
    pub(super) fn renew(&self) {
        if let Some(call) = self.account.unread.lock().get_mut(self.key) {
            call.next_piece_deadline = clock::monotonic() + UNREAD_TIMEOUT;
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
    /// Id of the next connection.
    next_id: u64,
    /// Time of the last search for unread connections, by kind of memory.
    last_searches: [Option<Instant>; 2],
    open: BTreeMap<u64, Weak<Account>>,
}

impl Connections {
    /// Registers a connection with these shares of the pools. `close` closes the connection.
    pub(super) fn open(
        self: &Arc<Self>,
        [requests, parts, responses]: [Pools; 3],
        complete_requests: MemoryBudget,
        sessions: MemoryBudget,
        close: impl Fn() + Send + Sync + 'static,
    ) -> ConnectionMemory {
        let mut state = self.0.lock();
        let id = state.next_id;
        state.next_id += 1;
        let account = Arc::new(Account {
            id,
            connections: Arc::clone(self),
            requests,
            complete_requests,
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

    /// Closes the connections that hold memory of this kind and whose clients do not read. Does nothing within
    /// [`SEARCH_INTERVAL`] after the last search for the same kind.
    pub(super) fn close_unread(&self, kind: MemoryKind) {
        let now = clock::monotonic();
        let mut state = self.0.lock();
        let last_search = &mut state.last_searches[kind as usize];
        if last_search.is_some_and(|last_search| now.saturating_duration_since(last_search) < SEARCH_INTERVAL) {
            return;
        }
        *last_search = Some(now);
        let open: Vec<_> = state.open.values().filter_map(Weak::upgrade).collect();
        // Dropping the last reference to an account takes this lock.
        drop(state);
        open.iter()
            .filter(|account| account.holds(kind) && account.is_unread(kind, now))
            .for_each(|account| account.close());
    }
}
